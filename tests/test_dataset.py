"""PascalVOCDataset: from data lists to batches."""

import json
import random
from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as F
from conftest import make_voc
from PIL import Image
from torch.utils.data import DataLoader

import utils
from datasets import PascalVOCDataset
from utils import read_image, IMAGENET_MEAN, IMAGENET_STD, InputError, create_data_lists

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

@pytest.mark.parametrize('split', ['TRAIN', 'TEST'])
@pytest.mark.parametrize('augment', [None, True, False])
@pytest.mark.parametrize('keep_difficult', [True, False])
def test_every_item_has_the_promised_shapes_types_and_range(lists, split, augment, keep_difficult):
    dataset = PascalVOCDataset(lists, split, keep_difficult, augment)
    assert len(dataset) == (4 if split == 'TRAIN' else 1)
    for i in range(len(dataset)):
        for _ in range(3):
            image, boxes, labels, difficulties = dataset[i]
            assert image.shape == (3, 300, 300) and image.dtype == torch.float
            n = len(boxes)
            assert boxes.shape == (n, 4) and boxes.dtype == torch.float
            assert labels.shape == (n,) and labels.dtype == torch.long
            assert difficulties.shape == (n,) and difficulties.dtype == torch.bool
            assert ((boxes >= 0) & (boxes <= 1)).all() and (boxes[:, 2:] > boxes[:, :2]).all()
            low = (0 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
            high = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
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
        expected = F.normalize(F.to_tensor(F.resize(image, [300, 300])), IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(dataset[0][0], expected, rtol=0, atol=2e-6)


def test_items_do_not_share_memory_with_the_dataset(lists):
    dataset = PascalVOCDataset(lists, 'TEST', keep_difficult=True)
    for tensor in dataset[0]:
        tensor.zero_()
    assert dataset[0][2].tolist() == [CAT, DOG] and (dataset[0][0] != 0).any()


# ----------------------------------------------------------------------------------------------- batches

def check_batch(batch, n):
    images, boxes, labels, difficulties = batch
    assert images.shape == (n, 3, 300, 300) and images.dtype == torch.float
    for tensors in (boxes, labels, difficulties):
        assert isinstance(tensors, list) and len(tensors) == n
    assert [len(tensor) for tensor in boxes] == [len(tensor) for tensor in labels] == [
        len(tensor) for tensor in difficulties]


def test_collate_fn_stacks_images_and_lists_what_differs_in_size(lists):
    dataset = PascalVOCDataset(lists, 'TRAIN', keep_difficult=True, augment=False)
    items = [dataset[i] for i in range(4)]
    batch = dataset.collate_fn(items)
    check_batch(batch, 4)
    assert [len(boxes) for boxes in batch[1]] == [2, 1, 0, 3]
    for i, item in enumerate(items):
        for column, tensor in zip(batch, item):
            assert column[i].equal(tensor)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_loader_gives_every_picture_once_also_from_workers(lists, workers):
    dataset = PascalVOCDataset(lists, 'TRAIN', keep_difficult=True, augment=False)
    batches = list(DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=dataset.collate_fn))
    assert len(batches) == 2
    check_batch(batches[0], 3)
    check_batch(batches[1], 1)
    for i in range(4):
        for column, tensor in zip(batches[i // 3], dataset[i]):
            assert column[i % 3].equal(tensor)


def test_keeping_the_objects_of_many_pictures_keeps_no_files_open(lists):
    # As in evaluation: a tensor that a worker hands over as shared memory is an open file for as long as it lives.
    resource = pytest.importorskip('resource')
    dataset = PascalVOCDataset(lists, 'TRAIN', keep_difficult=True, augment=False)
    dataset.images, dataset.objects = dataset.images * 50, dataset.objects * 50
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, limits[0]), limits[1]))
    try:
        kept = [objects for _, *objects in DataLoader(dataset, num_workers=2, collate_fn=dataset.collate_fn)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [len(boxes[0]) for boxes, _, _ in kept] == [2, 1, 0, 3] * 50


# --------------------------------------------------------------------------------------------- bad lists

NAMES = ['TRAIN_images.json', 'TRAIN_objects.json', 'label_map.json']


@pytest.mark.parametrize('name', NAMES)
def test_a_missing_data_list_is_named_with_what_to_run(lists, name):
    (lists / name).unlink()
    with pytest.raises(InputError, match=r'create_data_lists\.py') as refused:
        PascalVOCDataset(lists, 'TRAIN')
    message, = str(refused.value).splitlines()
    assert str(lists / name) in message


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'bytes', 'folder', 'null', '"text"', '7', 'nothing in it',
                                    'other kind'])
@pytest.mark.parametrize('name', NAMES)
def test_a_damaged_data_list_is_named(lists, name, damage):
    path, is_list = lists / name, name != 'label_map.json'
    content = path.read_text()
    if damage == 'folder':
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({'truncated': content[:len(content) // 2].encode(), 'empty': b'', 'bytes': b'\xff\xfe\x81',
                          'nothing in it': b'[]' if is_list else b'{}',
                          'other kind': b'{"a": 1}' if is_list else b'[1]'}.get(damage, damage.encode()))
    with pytest.raises(InputError, match='make it again') as refused:
        PascalVOCDataset(lists, 'TRAIN')
    message, = str(refused.value).splitlines()
    assert str(path) in message


@pytest.mark.parametrize('name', NAMES[:2])
def test_lists_that_do_not_belong_together_are_refused(lists, name):
    (lists / name).write_text(json.dumps(json.loads((lists / name).read_text())[:-1]))
    with pytest.raises(InputError, match='make them again') as refused:
        PascalVOCDataset(lists, 'TRAIN')
    message, = str(refused.value).splitlines()
    assert str(lists) in message and '3' in message and '4' in message


# ------------------------------------------------------------------------------------------ bad pictures

@pytest.mark.parametrize('damage', ['missing', 'empty', 'truncated', 'text', 'folder'])
def test_a_picture_that_cannot_be_read_is_named(lists, damage):
    dataset = PascalVOCDataset(lists, 'TRAIN')
    break_picture(dataset.images[2], damage)
    with pytest.raises(InputError) as refused:
        dataset[2]
    message, = str(refused.value).splitlines()
    assert dataset.images[2] in message


@pytest.mark.parametrize('augment', [False, True])
def test_a_picture_exchanged_for_a_smaller_one_is_named(lists, augment):
    dataset = PascalVOCDataset(lists, 'TRAIN', augment=augment)
    Image.new('RGB', (48, 36)).save(dataset.images[0])  # the dog's center, (37.5, 30.5), is still inside
    dataset[0]
    Image.new('RGB', (32, 24)).save(dataset.images[0])
    with pytest.raises(InputError, match=f"'{dataset.images[0]}' has 32×24 pixels.*create_data_lists.py"):
        dataset[0]


def break_picture(path, damage):
    path = Path(path)
    content = path.read_bytes()
    path.unlink()
    if damage == 'folder':
        path.mkdir()
    elif damage != 'missing':
        path.write_bytes({'empty': b'', 'truncated': content[:len(content) // 2], 'text': b'hello'}[damage])


def error_of(function, kind):
    """The text of the exception that a function raises. In a traceback that is kept, as pytest.raises does, workers
    would live on for seconds."""
    try:
        function()
    except kind as error:
        for link in (error, error.__context__):
            if link is not None:
                link.with_traceback(None)
        return str(error)
    return pytest.fail(f'no {kind.__name__}')


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'CMYK', 'I;16'])
def test_a_picture_of_any_mode_is_read_as_rgb(mode, tmp_path):
    gray = Image.new('L', (6, 4), 100)
    image = gray.convert('I').point(lambda value: value * 256).convert('I;16') if mode == 'I;16' else gray.convert(mode)
    path = tmp_path / ('picture.tif' if mode == 'CMYK' else 'picture.png')
    image.save(path)
    read = read_image(path)
    assert (read.mode, read.size) == ('RGB', (6, 4))
    assert all(abs(value - 100) <= 1 for value in read.getpixel((3, 2)))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photo_is_read_upright_whatever_way_the_camera_was_held(orientation, tmp_path):
    upright = Image.effect_noise((16, 24), 80).convert('RGB').resize((64, 96))
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # from upright to how the sensor saw it
    seen = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen.save(tmp_path / 'photo.png', exif=exif)
    assert read_image(tmp_path / 'photo.png').tobytes() == upright.tobytes()
