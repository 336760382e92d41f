"""What several tests need: the repository on the path, networks built once, small folders in VOC's format."""

import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from benchmark import ROOT, SAMPLE, make_model, save_untrained  # which puts the repository on the path
from PIL import Image

from utils import create_data_lists


@pytest.fixture(scope='session')
def model():
    """An SSD300 for VOC with random weights, in evaluation mode. Tests leave it as it is."""
    return make_model()


@pytest.fixture
def one_thread():
    """PyTorch with a single thread: starting several of them takes longer than a small tensor does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def sample_lists(tmp_path_factory):
    """The folder with the data lists of the embedded sample."""
    folder = tmp_path_factory.mktemp('sample_lists')
    create_data_lists(SAMPLE / 'VOC2007', SAMPLE / 'VOC2012', folder)
    return folder


@pytest.fixture(scope='session')
def untrained_checkpoint(model, tmp_path_factory):
    """A checkpoint file with the random weights of `model`, as train.py would write it."""
    return save_untrained(model, tmp_path_factory.mktemp('checkpoint'))


def make_annotation(objects, size=(64, 48)):
    """VOC's XML of a picture, as text; objects are (name, (xmin, ymin, xmax, ymax), difficult or None), coordinates
    counted from 1."""
    root = ElementTree.Element('annotation')
    for tag, value in zip(('width', 'height', 'depth'), (*size, 3)):
        parent = root.find('size') if root.find('size') is not None else ElementTree.SubElement(root, 'size')
        ElementTree.SubElement(parent, tag).text = str(value)
    for name, box, difficult in objects:
        element = ElementTree.SubElement(root, 'object')
        ElementTree.SubElement(element, 'name').text = name
        if difficult is not None:
            ElementTree.SubElement(element, 'difficult').text = str(difficult)
        bndbox = ElementTree.SubElement(element, 'bndbox')
        for tag, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), box):
            ElementTree.SubElement(bndbox, tag).text = str(value)
    return ElementTree.tostring(root, encoding='unicode')


def make_voc(folder, pictures, split='trainval'):
    """Adds pictures to a folder in VOC's layout. `pictures` is {name: objects, or (image, objects)}, objects as in
    `make_annotation` or the text of an XML file; without an image, a gray one of 64×48 is made. An image given as bytes
    is written as it is. Returns the folder."""
    for sub in ('Annotations', 'ImageSets/Main', 'JPEGImages'):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        image, objects = content if isinstance(content, tuple) else (Image.new('RGB', (64, 48), 'gray'), content)
        xml = objects if isinstance(objects, str) else make_annotation(objects, getattr(image, 'size', (64, 48)))
        (folder / 'Annotations' / f'{name}.xml').write_text(xml, encoding='utf-8')
        image_path = folder / 'JPEGImages' / f'{name}.jpg'
        image_path.write_bytes(image) if isinstance(image, bytes) else image.save(image_path)
    list_path = folder / 'ImageSets' / 'Main' / f'{split}.txt'
    known = list_path.read_text(encoding='utf-8') if list_path.exists() else ''
    list_path.write_text(known + ''.join(f'{name}\n' for name in pictures), encoding='utf-8')
    return folder


def noise(width, height, mode='RGB'):
    """A picture of random pixels."""
    return Image.merge('RGB', [Image.effect_noise((width, height), 90) for _ in range(3)]).convert(mode)


def random_boxes(*shape, seed=0, grid=None):
    """Boundary coordinates (…, 4) of small and large boxes within the image; on a grid, many overlaps are equal."""
    generator = torch.Generator().manual_seed(seed)
    first, last = torch.rand(2, *shape, 2, generator=generator).sort(dim=0).values  # (…, 2) each
    if grid:
        return torch.cat(((first * grid).floor(), (last * grid).floor() + 1), dim=-1) / grid
    return torch.cat((0.98 * first, 0.98 * last + 0.02), dim=-1)


def run_script(name, *arguments, folder=ROOT, n_processes=1, **environment):
    """Runs one of the scripts as a user would; returns the finished process with its output as text."""
    launcher = ['-m', 'torch.distributed.run', f'--nproc_per_node={n_processes}'] if n_processes > 1 else []
    return subprocess.run([sys.executable, *launcher, str(ROOT / name), *map(str, arguments)], cwd=folder, text=True,
                          capture_output=True, timeout=300, env={**os.environ, **environment}, check=False)
