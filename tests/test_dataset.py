"""PascalVOCDataset: from data lists to batches; and how pictures are read."""

import json
import random
from pathlib import Path

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import make_voc
from PIL import Image
from torch.utils.data import DataLoader

import utils
from datasets import PascalVOCDataset
from utils import IMAGENET_MEAN, IMAGENET_STD, InputError, create_data_lists, read_image

pytestmark = pytest.mark.usefixtures('one_thread')

CAT, DOG = utils.label_map['cat'], utils.label_map['dog']


@pytest.fixture
def lists(tmp_path):
    """Data lists of four pictures for training: with two objects, one of them difficult; with only a difficult one;
    with none; with three. The test has the first of them."""
    cat, dog = ('cat', (1, 1, 33, 25), 0), ('dog', (11, 13, 64, 48), 1)
    image = Image.effect_noise((64, 48), 90).convert('RGB')
    voc = make_voc(tmp_path / 'VOC', {'two': (image, [cat, dog]), 'difficult': [dog], 'none': [],
                                      'three': [cat, cat, cat]})
    make_voc(voc, {'two': (image, [cat, dog])}, split='test')
    create_data_lists(voc, None, tmp_path / 'lists')
    return tmp_path / 'lists'


# ------------------------------------------------------------------------------------------------- items

@pytest.mark.parametrize('split', ['TRAIN', 'test'])
@pytest.mark.parametrize('augment', [None, True, False])
@pytest.mark.parametrize('keep_difficult', [True, False])
def test_every_item_has_the_promised_shapes_types_and_range(lists, split, augment, keep_difficult):
    dataset = PascalVOCDataset(lists, split, keep_difficult, augment)
    assert len(dataset) == (4 if split == 'TRAIN' else 1)
    low, high = ((value - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD) for value in (0, 1))
    for image, boxes, labels, difficulties in map(dataset.__getitem__, range(len(dataset))):
        n = len(boxes)
        assert image.shape == (3, 300, 300) and image.dtype == torch.float
        assert boxes.shape == (n, 4) and boxes.dtype == torch.float
        assert labels.shape == (n,) and labels.dtype == torch.long
        assert difficulties.shape == (n,) and difficulties.dtype == torch.bool
        assert ((boxes >= 0) & (boxes <= 1)).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (image.amin(dim=(1, 2)) >= low - 1e-5).all() and (image.amax(dim=(1, 2)) <= high + 1e-5).all()


def test_difficult_objects_are_kept_only_if_asked_for(lists):
    _, boxes, labels, difficulties = PascalVOCDataset(lists, 'TEST', keep_difficult=True)[0]
    assert labels.tolist() == [CAT, DOG] and difficulties.tolist() == [False, True]
    torch.testing.assert_close(boxes, torch.tensor([[0, 0, 32 / 64, 24 / 48], [10 / 64, 12 / 48, 63 / 64, 47 / 48]]))
    _, boxes, labels, difficulties = PascalVOCDataset(lists, 'TEST')[0]
    assert labels.tolist() == [CAT] and difficulties.tolist() == [False]
    torch.testing.assert_close(boxes, torch.tensor([[0, 0, 32 / 64, 24 / 48]]))


@pytest.mark.parametrize('augment', [True, False])
def test_a_picture_with_only_difficult_objects_becomes_one_without_objects(lists, augment):
    image, boxes, labels, difficulties = PascalVOCDataset(lists, 'TRAIN', keep_difficult=False, augment=augment)[1]
    assert image.shape == (3, 300, 300)
    assert boxes.shape == (0, 4) and labels.shape == (0,) and difficulties.shape == (0,)
    assert len(PascalVOCDataset(lists, 'TRAIN', keep_difficult=True, augment=augment)[1][1]) == 1


@pytest.mark.parametrize('split, augment, changes', [('TRAIN', None, True), ('TRAIN', True, True),
                                                     ('TRAIN', False, False), ('TEST', None, False),
                                                     ('TEST', False, False), ('TEST', True, True)])
def test_pictures_change_at_random_for_training_or_where_augment_says_so(lists, split, augment, changes):
    dataset = PascalVOCDataset(lists, split, augment=augment)
    random.seed(0)
    torch.manual_seed(0)
    images = [dataset[0][0] for _ in range(4)]
    assert all(images[0].equal(image) for image in images[1:]) is not changes


def test_without_augment_a_training_picture_is_the_file_resized_and_normalized(lists):
    dataset = PascalVOCDataset(lists, 'TRAIN', augment=False)
    with Image.open(dataset.images[0]) as image:
        pixels = TF.to_dtype(TF.to_image(TF.resize(image, [300, 300])), torch.float, scale=True)
    torch.testing.assert_close(dataset[0][0], TF.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), rtol=0, atol=2e-6)


def test_a_split_that_does_not_exist_is_refused(lists):
    with pytest.raises(InputError, match="'train' or 'test', not 'val'"):
        PascalVOCDataset(lists, 'val')


# ----------------------------------------------------------------------------------------------- batches

def test_collate_fn_stacks_images_and_lists_what_differs_in_size(lists):
    dataset = PascalVOCDataset(lists, 'TRAIN', keep_difficult=True, augment=False)
    images, boxes, labels, difficulties = dataset.collate_fn([dataset[i] for i in range(4)])
    assert images.shape == (4, 3, 300, 300) and images.dtype == torch.float
    for column in (boxes, labels, difficulties):
        assert isinstance(column, list) and [len(tensor) for tensor in column] == [2, 1, 0, 3]


@pytest.mark.parametrize('workers', [0, 2])
def test_a_loader_gives_every_picture_once_also_from_workers(lists, workers):
    dataset = PascalVOCDataset(lists, 'TRAIN', keep_difficult=True, augment=False)
    batches = list(DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=dataset.collate_fn))
    assert [len(batch[0]) for batch in batches] == [3, 1]
    for i in range(4):
        for column, tensor in zip(batches[i // 3], dataset[i]):
            assert column[i % 3].equal(tensor) and column[i % 3].dtype == tensor.dtype


def test_keeping_the_objects_of_many_pictures_keeps_no_files_open(lists):
    # As in evaluation: a tensor that a worker hands over as shared memory is an open file for as long as it lives.
    resource = pytest.importorskip('resource')
    dataset = PascalVOCDataset(lists, 'TRAIN', keep_difficult=True, augment=False)
    dataset.images, dataset.objects = dataset.images * 20, dataset.objects * 20
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(100, limits[0]), limits[1]))
    try:
        kept = [objects for _, *objects in DataLoader(dataset, num_workers=2, collate_fn=dataset.collate_fn)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [len(boxes[0]) for boxes, _, _ in kept] == [2, 1, 0, 3] * 20


# --------------------------------------------------------------------------------------------- bad lists

@pytest.mark.parametrize(('content', 'advice'), [(None, 'run create_data_lists.py first'),
                                                 ('[{"boxes"', 'make it again'), ('[]', 'make it again'),
                                                 ('{"a": 1}', 'make it again')])
@pytest.mark.parametrize('name', ['TRAIN_images.json', 'TRAIN_objects.json'])
def test_a_missing_or_damaged_data_list_is_named_with_what_to_do(lists, name, content, advice):
    (lists / name).unlink()
    if content:
        (lists / name).write_text(content)
    with pytest.raises(InputError, match=advice) as refused:
        PascalVOCDataset(lists, 'TRAIN')
    message, = str(refused.value).splitlines()
    assert str(lists / name) in message


def test_lists_that_do_not_belong_together_are_refused(lists):
    images = json.loads((lists / 'TRAIN_images.json').read_text())
    (lists / 'TRAIN_images.json').write_text(json.dumps(images[:-1]))
    with pytest.raises(InputError, match=f"'{lists}' has lists of 3 images but of 4 .* make them again"):
        PascalVOCDataset(lists, 'TRAIN')


# ---------------------------------------------------------------------------------------------- pictures

@pytest.mark.parametrize('complaint', ["isn't there", "can't be read"])
def test_a_picture_that_is_missing_or_truncated_is_named(lists, complaint):
    dataset = PascalVOCDataset(lists, 'TRAIN')
    path = Path(dataset.images[0])
    content = path.read_bytes()
    path.unlink()
    if complaint == "can't be read":
        path.write_bytes(content[:len(content) // 2])
    with pytest.raises(InputError) as refused:
        dataset[0]
    message, = str(refused.value).splitlines()
    assert message.startswith(f"picture '{path}' {complaint}")


@pytest.mark.parametrize('augment', [False, True])
def test_a_picture_exchanged_for_a_smaller_one_is_named(lists, augment):
    dataset = PascalVOCDataset(lists, 'TRAIN', augment=augment)
    Image.new('RGB', (48, 36)).save(dataset.images[0])  # the dog's center, (37.5, 30.5), is still inside
    dataset[0]
    Image.new('RGB', (32, 24)).save(dataset.images[0])
    with pytest.raises(InputError, match=f"'{dataset.images[0]}' has 32×24 pixels.*create_data_lists.py"):
        dataset[0]


@pytest.mark.parametrize('mode', ['L', 'I;16', 'P', 'RGBA', 'CMYK'])
def test_a_picture_of_any_mode_is_read_as_rgb(mode, tmp_path):
    color = (100, 100, 100) if mode in ('L', 'I;16') else (200, 100, 40)
    image = Image.new('RGB', (6, 4), color)
    if mode == 'I;16':
        image = image.convert('I').point(lambda value: value * 257).convert(mode)
    else:
        image = image.quantize(5) if mode == 'P' else image.convert(mode)
    image.save(tmp_path / 'picture.jpg', 'TIFF' if mode == 'CMYK' else 'PNG')
    read = read_image(tmp_path / 'picture.jpg')
    assert (read.mode, read.size, read.getpixel((3, 2))) == ('RGB', (6, 4), color)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photo_is_read_upright_whatever_way_the_camera_was_held(orientation, tmp_path):
    upright = Image.effect_noise((16, 24), 80).convert('RGB').resize((64, 96))
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # from upright to how the sensor saw it
    seen = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen.save(tmp_path / 'photo.png', exif=exif)
    assert read_image(tmp_path / 'photo.png').tobytes() == upright.tobytes()
