"""PascalVOCDataset: from data lists to batches; and how pictures are read."""

import multiprocessing
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_voc, noise
from PIL import Image
from torch.utils.data import DataLoader

import utils
from datasets import PascalVOCDataset
from eval import detect_all, make_test_loader
from utils import InputError, create_data_lists, picture_size, read_image

pytestmark = pytest.mark.usefixtures('one_thread')

CAT, DOG = utils.label_map['cat'], utils.label_map['dog']


@pytest.fixture
def lists(tmp_path):
    """Data lists of four pictures for training: with two objects, one of them difficult; with only a difficult one;
    with none; with three. The test has the first of them."""
    cat, dog = ('cat', (1, 1, 33, 25), 0), ('dog', (11, 13, 64, 48), 1)
    image = noise(64, 48)
    voc = make_voc(tmp_path / 'VOC', {'two': (image, [cat, dog]), 'difficult': [dog], 'none': [],
                                      'three': [cat, cat, cat]})
    make_voc(voc, {'other': (image, [cat, dog])}, split='test')
    create_data_lists(voc, None, tmp_path / 'lists')
    return tmp_path / 'lists'


def test_difficult_objects_are_kept_only_if_asked_for(lists):
    _, boxes, labels, difficulties = PascalVOCDataset(lists, 'TEST', keep_difficult=True)[0]
    assert labels.tolist() == [CAT, DOG] and difficulties.tolist() == [False, True]
    torch.testing.assert_close(boxes, torch.tensor([[0, 0, 32 / 64, 24 / 48], [10 / 64, 12 / 48, 63 / 64, 47 / 48]]))
    _, boxes, labels, difficulties = PascalVOCDataset(lists, 'TEST')[0]
    assert labels.tolist() == [CAT] and difficulties.tolist() == [False]
    torch.testing.assert_close(boxes, torch.tensor([[0, 0, 32 / 64, 24 / 48]]))


@pytest.mark.parametrize(('split', 'augment', 'changes'), [('TRAIN', None, True), ('TRAIN', False, False),
                                                           ('TEST', None, False), ('TEST', True, True)])
def test_pictures_change_at_random_for_training_or_where_augment_says_so(lists, split, augment, changes):
    dataset = PascalVOCDataset(lists, split, augment=augment)
    random.seed(0)
    torch.manual_seed(0)
    images = [dataset[0][0] for _ in range(4)]
    assert all(images[0].equal(image) for image in images[1:]) is not changes


@pytest.mark.parametrize('workers', [0, 2])
def test_a_loader_gives_every_picture_once_also_from_workers(lists, workers):
    dataset = PascalVOCDataset(lists, 'TRAIN', keep_difficult=True, augment=False)
    batches = list(DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=dataset.collate_fn))
    assert [len(batch[0]) for batch in batches] == [3, 1]
    assert batches[0][4] == [2, 1, 0] and batches[0][1].shape == (3, 4)  # the number of objects, and all their boxes
    for i in range(4):
        images, *objects, n_objects = batches[i // 3]
        for column, tensor in zip((images, *(column.split(n_objects) for column in objects)), dataset[i]):
            assert column[i % 3].equal(tensor) and column[i % 3].dtype == tensor.dtype


def test_a_hundred_batches_of_an_evaluation_need_few_open_files(lists, model, monkeypatch):
    # A tensor that a worker hands over as shared memory is an open file for as long as it lives.
    resource = pytest.importorskip('resource')
    dataset = PascalVOCDataset(lists, 'TRAIN', keep_difficult=True, augment=False)
    dataset.paths, dataset.objects = dataset.paths * 50, dataset.objects * 50
    background = torch.eye(21)[:1].expand(2, 8732, 21) * 20
    monkeypatch.setattr(model, 'forward', lambda images: (torch.zeros(2, 8732, 4), background))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[0]), limits[1]))
    try:
        found = detect_all(make_test_loader(dataset, batch_size=2, workers=2), model)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [len(boxes) for boxes in found[3]] == [2, 1, 0, 3] * 50


@pytest.mark.parametrize('start_method', ['fork', *(pytest.param(name, marks=pytest.mark.slow)
                                                    for name in ('spawn', 'forkserver'))])
def test_workers_are_started_once_and_see_each_epoch_however_they_are_started(lists, start_method):
    dataset = PascalVOCDataset(lists, 'TRAIN', seed=0)
    others, workers = multiprocessing.active_children(), set()
    loader = DataLoader(dataset, 4, num_workers=1, persistent_workers=True, collate_fn=dataset.collate_fn,
                        multiprocessing_context=start_method)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        (images, *_), = loader
        assert images.equal(dataset.collate_fn([dataset[i] for i in range(4)])[0])
        workers.update(multiprocessing.active_children())
    assert len(workers.difference(others)) == 1


@pytest.mark.parametrize(('content', 'advice'), [
    (None, r"TRAIN_images\.json' isn't there: run create_data_lists.py first"),
    ('[{"boxes"', r"TRAIN_images\.json' can't be read .* make it again"),
    ('["a.jpg"]', 'lists 1 pictures but the objects of 4: make the lists again')])
def test_a_data_list_that_is_missing_damaged_or_of_other_data_is_named_with_what_to_do(lists, content, advice):
    path = lists / 'TRAIN_images.json'
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=advice) as refused:
        PascalVOCDataset(lists, 'TRAIN')
    message, = str(refused.value).splitlines()
    assert str(lists) in message


def test_a_picture_that_is_missing_or_truncated_is_named(lists):
    dataset = PascalVOCDataset(lists, 'TRAIN')
    path = Path(dataset.paths[0])
    path.write_bytes(path.read_bytes()[:-200])
    for complaint in ("can't be read", "isn't there"):
        with pytest.raises(InputError, match=f"^picture '{path}' {complaint}.*$"):
            dataset[0]
        path.unlink(missing_ok=True)


@pytest.mark.parametrize('augment', [False, True])
def test_a_picture_exchanged_for_a_smaller_one_is_named(lists, augment):
    dataset = PascalVOCDataset(lists, 'TRAIN', augment=augment)
    Image.new('RGB', (48, 36)).save(dataset.paths[0])  # the dog's center, (37.5, 30.5), is still inside
    dataset[0]
    Image.new('RGB', (32, 24)).save(dataset.paths[0])
    with pytest.raises(InputError, match=f"'{dataset.paths[0]}' has 32×24 pixels.*create_data_lists.py"):
        dataset[0]


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'CMYK'])
def test_a_picture_of_any_mode_is_read_as_rgb(mode, tmp_path):
    color = (100, 100, 100) if mode == 'L' else (200, 100, 40)
    image = Image.new('RGB', (6, 4), color)
    image = image.quantize(5) if mode == 'P' else image.convert(mode)
    image.save(tmp_path / 'picture.jpg', 'TIFF' if mode == 'CMYK' else 'PNG')
    read = read_image(tmp_path / 'picture.jpg')
    assert (read.mode, read.size, read.getpixel((3, 2))) == ('RGB', (6, 4), color)


@pytest.mark.parametrize(('kind', 'highest'), [('uint16', 4095), ('uint16', 65535), ('float32', 1), ('int32', 255)])
def test_pictures_of_more_than_8_bits_become_gray_values(tmp_path, kind, highest):
    ramp = np.linspace(0, highest, 256).reshape(16, 16).astype(kind)
    Image.fromarray(ramp).save(tmp_path / 'deep.jpg', 'TIFF')
    read = np.asarray(read_image(tmp_path / 'deep.jpg'))[..., 0].flatten()
    assert np.abs(read - np.arange(256)).max() <= 1


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photo_and_its_size_are_read_upright_whatever_way_the_camera_was_held(orientation, tmp_path):
    upright = noise(64, 96)
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # from upright to how the sensor saw it
    seen = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen.save(tmp_path / 'photo.png', exif=exif)
    assert read_image(tmp_path / 'photo.png').tobytes() == upright.tobytes()
    (tmp_path / 'photo.png').write_bytes((tmp_path / 'photo.png').read_bytes()[:-40])  # the header alone is read
    assert picture_size(tmp_path / 'photo.png') == (64, 96)
