"""Pictures and annotations of the kinds that real collections hold: each works, or is refused by name."""

import io
import json
import math
import random
import struct
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from conftest import make_annotation, make_voc
from PIL import EpsImagePlugin, Image

import detect
import utils
from datasets import PascalVOCDataset
from model import MultiBoxLoss
from utils import InputError, calculate_mAP, create_data_lists, parse_annotation, picture_size, read_image, voc_labels

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]

TURNS = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
         7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}  # from an upright picture to the sensor's


def encoded(image, image_format, **arguments):
    file = io.BytesIO()
    image.save(file, image_format, **arguments)
    return file.getvalue()


def turned(image, orientation, image_format='JPEG', **arguments):
    """An upright picture as a file of a camera that was held in another way."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if TURNS[orientation] is not None:
        image = image.transpose(TURNS[orientation])
    return encoded(image, image_format, exif=exif, **arguments)


def sixteen_bits(image, mode='I;16'):
    return image.convert('I').point(lambda value: value * 257).convert(mode)


def png_bomb(width, height):
    """A PNG file of a few bytes that says it holds width × height pixels."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))


# Files of every kind, made of an upright picture in RGB.
READABLE = {
    'JPEG': lambda image: encoded(image, 'JPEG'),
    'progressive JPEG': lambda image: encoded(image, 'JPEG', progressive=True),
    'grey JPEG': lambda image: encoded(image.convert('L'), 'JPEG'),
    'CMYK JPEG': lambda image: encoded(image.convert('CMYK'), 'JPEG'),
    'PNG': lambda image: encoded(image, 'PNG'),
    'grey PNG': lambda image: encoded(image.convert('L'), 'PNG'),
    '1-bit PNG': lambda image: encoded(image.convert('1'), 'PNG'),
    '16-bit PNG': lambda image: encoded(sixteen_bits(image.convert('L')), 'PNG'),
    '16-bit TIFF': lambda image: encoded(sixteen_bits(image.convert('L')), 'TIFF'),
    'palette PNG': lambda image: encoded(image.quantize(200), 'PNG'),
    'palette PNG with one transparent colour': lambda image: encoded(image.quantize(200), 'PNG', transparency=0),
    'palette PNG with transparency': lambda image: encoded(image.quantize(200), 'PNG', transparency=bytes(range(200))),
    'RGBA PNG': lambda image: encoded(image.convert('RGBA'), 'PNG'),
    'LA PNG': lambda image: encoded(image.convert('LA'), 'PNG'),
    'PNG with a transparent colour': lambda image: encoded(image, 'PNG', transparency=(1, 2, 3)),
    'GIF': lambda image: encoded(image, 'GIF'),
    'moving GIF': lambda image: encoded(image, 'GIF', save_all=True, append_images=[image.convert('L')]),
    'BMP': lambda image: encoded(image, 'BMP'),
    'WebP': lambda image: encoded(image, 'WEBP'),
    'TIFF of floating-point numbers, grey': lambda image: encoded(image.convert('F'), 'TIFF'),
    **{f'turned JPEG {i}': lambda image, i=i: turned(image, i) for i in TURNS},
    'turned PNG': lambda image: turned(image, 6, 'PNG'),
    'turned TIFF': lambda image: turned(image, 8, 'TIFF'),
}
NOT_A_PICTURE = {
    'text': lambda image: b'<html>404 Not Found</html>',
    'nothing': lambda image: b'',
    'zeros': lambda image: bytes(500),
    'a JPEG without its head': lambda image: encoded(image, 'JPEG')[30:],
    'a program in PostScript': lambda image: encoded(image, 'EPS'),
    'a billion pixels': lambda image: png_bomb(40_000, 25_000),
    'two billion columns': lambda image: png_bomb(2 ** 31 - 1, 2 ** 31 - 1),
}
BROKEN_PIXELS = {
    'truncated JPEG': lambda image: encoded(image, 'JPEG')[:-len(encoded(image, 'JPEG')) // 3],
    'truncated PNG': lambda image: encoded(image, 'PNG')[:-len(encoded(image, 'PNG')) // 3],
    'false PNG': lambda image: encoded(image, 'PNG').replace(b'IDAT', b'IDAX'),
    'truncated BMP': lambda image: encoded(image, 'BMP')[:-100],
}
NAMES = ['a', 'with blanks', ' ünïcode', '写真', '🐕', 'a.b.c', "it's", 'per%cent', 'ALL CAPS']


def noise(rng, width, height):
    return Image.frombytes('RGB', (width, height), rng.randbytes(3 * width * height))


def nasty_box(rng, width, height):
    """(xmin, ymin, xmax, ymax) counted from 1, in some way that annotators have come up with."""
    def inside(size):
        return sorted((rng.randint(1, size), rng.randint(1, size)))

    (x_min, x_max), (y_min, y_max) = inside(width), inside(height)
    kind = rng.randrange(12)
    if kind == 0:  # a single pixel
        return x_min, y_min, x_min, y_min
    if kind == 1:  # two pixels by two
        return x_min, y_min, x_min + 1, y_min + 1
    if kind == 2:  # swapped corners
        return x_max, y_min, x_min, y_max
    if kind == 3:  # outside
        return x_min + width, y_min, x_max + width + 1, y_max
    if kind == 4:  # outside, on the other side
        return x_min, y_min - height - 5, x_max, y_max - height - 5
    if kind == 5:  # beyond all edges
        return -rng.randint(0, 50), 0, width + rng.randint(0, 50), height + 1
    if kind == 6:  # decimals
        return x_min - 0.25, y_min + 0.5, x_max + 0.25, y_max + 0.75
    if kind == 7:  # no numbers, or none that could be a place
        return tuple(rng.choice((1, 'nan', 'inf', '-inf', 1e300, -1e300)) for _ in range(4))
    if kind == 8:  # a line
        return x_min, y_min, x_max, y_min
    if kind == 9:  # in the picture's last pixels
        return width - 1, height - 1, width, height
    return x_min, y_min, x_max, y_max


def usable(label, box, width, height):
    """What the data lists must hold of an object, or None if nothing of it can be used."""
    x_min, y_min, x_max, y_max = (float(side) - 1 for side in box)
    if label.strip().lower() not in voc_labels or not all(math.isfinite(float(side)) for side in box):
        return None
    if x_min >= x_max or y_min >= y_max:
        return None
    inside = [max(x_min, 0.0), max(y_min, 0.0), min(x_max, width - 1.0), min(y_max, height - 1.0)]
    return inside if inside[0] < inside[2] and inside[1] < inside[3] else None


class Nasty:
    """Some random nasty pictures with annotations in a folder like VOC's, and what must become of each."""

    def __init__(self, folder, seed, n_pictures):
        rng = random.Random(seed)
        self.folder = folder / rng.choice(['VOC', 'my VOC', 'große Daten', '数据'])
        self.expected, self.unreadable, self.broken, pictures = {}, set(), set(), {}
        for i in range(n_pictures):
            name = f'{rng.choice(NAMES).strip()} {i}'
            width, height = rng.choice([(1, 1), (6000, 40), (40, 6000), (rng.randint(1, 4), rng.randint(1, 400))]
                                       + 12 * [(rng.randint(20, 300), rng.randint(20, 300))])
            kind = rng.choice(list(READABLE))
            if i == 0:
                kind = 'JPEG'  # so that something is left
            elif rng.random() < 0.08:
                kind = rng.choice(list(NOT_A_PICTURE))
                self.unreadable.add(name)
            elif rng.random() < 0.08:
                kind, width, height = rng.choice(list(BROKEN_PIXELS)), 100, 70
                self.broken.add(name)
            content = {**READABLE, **NOT_A_PICTURE, **BROKEN_PIXELS}[kind](noise(rng, width, height))

            objects, self.expected[name] = [], {'boxes': [], 'labels': [], 'difficulties': []}
            always_difficult = rng.random() < 0.2
            for _ in range(rng.choice([0, 1, 1, 2, 5, 40])):
                label = rng.choice([*voc_labels, 'Person ', ' CAT', 'yeti', 'background', ''])
                box = nasty_box(rng, width, height)
                difficult = 1 if always_difficult else rng.choice([None, 0, 0, 1])
                objects.append((label, box, difficult))
                inside = usable(label, box, width, height)
                if inside:
                    values = (inside, utils.label_map[label.strip().lower()], difficult or 0)
                    for key, value in zip(self.expected[name], values):
                        self.expected[name][key].append(value)
            pictures[name] = (content, make_annotation(objects, (width, height)))
        self.names = list(pictures)
        make_voc(self.folder, pictures)
        make_voc(self.folder, {'test': []}, split='test')

    def make_lists(self):
        """Makes the data lists, leaving out one by one the pictures that are refused. Returns their folder and the
        names of those that were left out."""
        left_out, lists = set(), self.folder.parent / 'lists'
        while True:
            names = [name for name in self.names if name not in left_out]
            (self.folder / 'ImageSets/Main/trainval.txt').write_text('\n'.join(names), encoding='utf-8')
            try:
                create_data_lists(self.folder, None, lists)
                return lists, left_out
            except InputError as error:
                culprit, = (name for name in names if f'{name}.jpg' in one_line(error))
                left_out.add(culprit)


def one_line(error):
    message, = str(error).splitlines()
    return message


@pytest.mark.parametrize('seed', range(20))
def test_nasty_data_works_or_is_refused_by_name_from_the_lists_to_the_drawing(seed, tmp_path, model):
    nasty = Nasty(tmp_path, seed, n_pictures=18)
    lists, left_out = nasty.make_lists()
    # Of some formats, the header ends behind the pixels: broken pixels are noticed already here.
    assert nasty.unreadable <= left_out <= nasty.unreadable | nasty.broken

    # No object that could have been used is lost.
    paths = [Path(path) for path in json.loads((lists / 'TRAIN_images.json').read_text())]
    objects = json.loads((lists / 'TRAIN_objects.json').read_text())
    assert {path.stem: found for path, found in zip(paths, objects)} == {
        name: expected for name, expected in nasty.expected.items() if name not in left_out}

    torch.manual_seed(seed)
    random.seed(seed)
    for augment, keep_difficult in ((False, True), (True, bool(seed % 2))):
        dataset = PascalVOCDataset(lists, 'TRAIN', keep_difficult, augment)
        items = []
        for i, path in enumerate(paths):
            try:
                items.append(dataset[i])
                assert path.stem not in nasty.broken
            except InputError as error:
                assert str(path) in one_line(error) and path.stem in nasty.broken
                continue
            image, boxes, labels, difficulties = items[-1]
            assert image.shape == (3, 300, 300) and image.isfinite().all()
            assert ((boxes >= 0) & (boxes <= 1)).all() and (boxes[:, 2:] > boxes[:, :2]).all()
            assert len(boxes) == len(labels) == len(difficulties)
            kept = sum(not difficult or keep_difficult for difficult in objects[i]['difficulties'])
            assert len(boxes) == kept if not augment else min(kept, 1) <= len(boxes) <= kept
        _, boxes, labels, difficulties = dataset.collate_fn(items)
        check_loss(boxes, labels, model.priors_cxcy)
        check_mAP(boxes, labels, difficulties)

    for path, found in zip(paths, objects):
        if path.stem not in nasty.broken:
            check_drawing(path, found)


def check_loss(boxes, labels, priors):
    """The loss of random predictions is finite, and so is its gradient."""
    locs = torch.randn(len(boxes), 8732, 4).requires_grad_()
    scores = torch.randn(len(boxes), 8732, 21).requires_grad_()
    loss = MultiBoxLoss(priors)(locs, scores, boxes, labels)
    loss.backward()
    assert loss.isfinite() and locs.grad.isfinite().all() and scores.grad.isfinite().all()
    assert (loss > 0) == (sum(map(len, boxes)) > 0)


def check_mAP(boxes, labels, difficulties):
    """Detections that are the objects themselves, moved a little, and some more: all precisions are between 0 and 1."""
    det_boxes = [torch.cat(((found + 0.01 * torch.randn_like(found)).clamp(0, 1), torch.rand(3, 4).sort().values))
                 for found in boxes]
    det_labels = [torch.cat((found, torch.randint(1, 21, (3,)))) for found in labels]
    det_scores = [torch.rand(len(found)) for found in det_labels]
    precisions, mean = calculate_mAP(det_boxes, det_labels, det_scores, boxes, labels, difficulties)
    countable = {int(label) for found, hard in zip(labels, difficulties) for label in found[~hard]}
    for label, precision in precisions.items():
        assert 0 <= precision <= 1 if utils.label_map[label] in countable else math.isnan(precision)
    assert 0 <= mean <= 1 if countable else math.isnan(mean)


def check_drawing(path, objects):
    """The objects can be drawn into the picture, which stays as it was."""
    image = read_image(path)
    before = image.tobytes()
    drawn = detect.draw_objects(image, [(utils.rev_label_map[label], 0.5, tuple(box)) for box, label in
                                        zip(objects['boxes'], objects['labels'])], utils.label_color_map)
    assert drawn is not image and image.tobytes() == before
    assert drawn.size == image.size == picture_size(path) and drawn.mode == 'RGB'
    assert (drawn.tobytes() != before) == bool(objects['boxes'])


@pytest.mark.parametrize('kind', {**NOT_A_PICTURE, **BROKEN_PIXELS})
def test_what_is_no_whole_picture_is_refused_in_one_line(kind, tmp_path):
    path = tmp_path / 'picture.jpg'
    path.write_bytes({**NOT_A_PICTURE, **BROKEN_PIXELS}[kind](noise(random.Random(0), 100, 70)))
    with pytest.raises(InputError) as refused:
        read_image(path)
    assert str(path) in one_line(refused.value)
    if kind in NOT_A_PICTURE:
        with pytest.raises(InputError) as refused:
            picture_size(path)
        assert str(path) in one_line(refused.value)


@pytest.mark.parametrize('kind', READABLE)
def test_a_picture_of_any_kind_is_read_upright_with_its_own_colours(kind, tmp_path):
    # Quarters of different brightness in reds: any turn, any lost scale and most mixed-up channels would show.
    image = Image.new('RGB', (64, 48))
    for corner, colour in zip(((0, 0), (32, 0), (0, 24), (32, 24)),
                              ((250, 200, 180), (180, 120, 110), (130, 60, 50), (20, 0, 0))):
        image.paste(colour, (*corner, corner[0] + 32, corner[1] + 24))
    path = tmp_path / 'picture.jpg'
    path.write_bytes(READABLE[kind](image))
    read = read_image(path)
    assert read.mode == 'RGB' and read.size == (64, 48) == picture_size(path)
    grey = any(word in kind for word in ('grey', 'LA ', '16-bit', '1-bit'))
    expected = image.convert('L').convert('RGB') if grey else image
    for corner in ((5, 5), (58, 5), (5, 42), (58, 42)):
        if kind != '1-bit PNG':
            assert read.getpixel(corner) == pytest.approx(expected.getpixel(corner), abs=14)
    if kind == '1-bit PNG':
        def brightness(box):
            return sum(read.crop(box).convert('L').tobytes())

        assert brightness((0, 0, 32, 24)) > brightness((32, 0, 64, 24)) > brightness((0, 24, 32, 48))
        assert set(read.tobytes()) == {0, 255}


@pytest.mark.parametrize('orientation', TURNS)
@pytest.mark.parametrize('image_format', ['PNG', 'TIFF'])
def test_a_turned_picture_is_read_pixel_by_pixel_as_the_upright_one(orientation, image_format, tmp_path):
    image = noise(random.Random(orientation), 31, 17)
    (tmp_path / 'picture.jpg').write_bytes(turned(image, orientation, image_format))
    assert read_image(tmp_path / 'picture.jpg').tobytes() == image.tobytes()


@pytest.mark.parametrize('image_format', ['PNG', 'TIFF'])
def test_sixteen_bits_are_scaled_to_eight(image_format, tmp_path):
    gradient = Image.linear_gradient('L')  # 256×256: each row has the value of its number
    (tmp_path / 'picture.jpg').write_bytes(encoded(sixteen_bits(gradient), image_format))
    assert read_image(tmp_path / 'picture.jpg').getchannel('R').tobytes() == gradient.tobytes()


def test_sixteen_bits_of_either_byte_order_are_scaled_to_eight(tmp_path):
    # A TIFF of a Mac of old times: most significant byte first. Pillow has a mode of its own for it.
    values = [0, 257 * 100, 257 * 200, 65535]
    entries = [(256, 3, 2), (257, 3, 2), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 2),
               (279, 4, 8)]  # width, height, bits, no compression, black is 0, the strip's place, …, and its length
    directory = b''.join(struct.pack('>HHI', tag, kind, 1) + (struct.pack('>I', value) if kind == 4 else
                                                              struct.pack('>HH', value, 0))
                         for tag, kind, value in entries)
    (tmp_path / 'picture.jpg').write_bytes(b'MM\0*' + struct.pack('>I', 16) + struct.pack('>4H', *values)
                                           + struct.pack('>H', len(entries)) + directory + bytes(4))
    with Image.open(tmp_path / 'picture.jpg') as image:
        assert image.mode == 'I;16B'
    assert list(read_image(tmp_path / 'picture.jpg').getchannel('R').tobytes()) == [0, 100, 200, 255]


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    # Pillow has Ghostscript run PostScript, whatever the file's name is.
    started = []
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr('subprocess.Popen', lambda *arguments, **_: started.append(arguments))
    (tmp_path / 'picture.jpg').write_bytes(encoded(Image.new('RGB', (20, 20)), 'EPS'))
    for read in (picture_size, read_image):
        with pytest.raises(InputError, match='PostScript'):
            read(tmp_path / 'picture.jpg')
    assert started == []


FORMATS = ['JPEG', 'PNG', 'GIF', 'TIFF', 'WEBP', 'BMP', 'TGA', 'PPM', 'DDS']
FORMATS += ['AVIF'] * ('.avif' in Image.registered_extensions())


@pytest.mark.parametrize('image_format', FORMATS)
def test_a_picture_with_random_damage_is_read_or_refused_by_name(image_format, tmp_path):
    rng, path = random.Random(image_format), tmp_path / 'picture.jpg'
    whole, refused = encoded(noise(rng, 24, 16), image_format), 0
    for _ in range(60):
        damaged = bytearray(whole[:rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.choice([1, 3, 20])):
            if damaged:
                # Most of what can go wrong is in the head.
                damaged[rng.randrange(min(len(damaged), rng.choice([40, 300, 10_000])))] = rng.choice([0, 255, 128, 7])
        path.write_bytes(damaged)
        for read in (picture_size, read_image):
            try:
                read(path)
            except InputError as error:
                refused += 1
                assert str(path) in one_line(error)
    assert refused > 0


@pytest.mark.parametrize('seed', range(10))
def test_an_annotation_with_random_damage_is_read_or_refused_by_name(seed, tmp_path):
    rng, path = random.Random(seed), tmp_path / 'picture.xml'
    whole = make_annotation([('cat', (1, 2, 30, 40), 0), ('dog', (5, 6, 64, 48), 1)]).encode()
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole[:rng.choice([len(whole)] * 4 + [rng.randrange(len(whole))])])
        for _ in range(rng.choice([0, 1, 1, 3])):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.choice(b'\0\xff<>&/"a1. ')
        path.write_bytes(damaged)
        try:
            objects = parse_annotation(path)
            assert len(objects['boxes']) == len(objects['labels']) == len(objects['difficulties']) <= 2
            assert all(math.isfinite(side) for box in objects['boxes'] for side in box)
        except InputError as error:
            refused += 1
            assert str(path) in one_line(error)
    assert 0 < refused < 60


def test_boxes_of_next_to_no_width_cost_no_finite_loss(tmp_path, model):
    # In float32, 5999.0000001 and 5999.0000002 are the same: such an object has a width of 0, whose logarithm the loss
    # would take.
    boxes = [('5999.0000001', 1, '5999.0000002', 40), (1, '20.0001', 6000, '20.0002'), ('5999.9999', 1, '6005', 40),
             (1, 1, '1.02', '1.02'), ('5999.98', '39.98', 6000, 40)]
    make_voc(tmp_path / 'VOC', {'a': (Image.new('RGB', (6000, 40)), [('cat', box, 0) for box in boxes])})
    make_voc(tmp_path / 'VOC', {'b': []}, split='test')
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        create_data_lists(tmp_path / 'VOC', None, tmp_path / 'lists')
    assert sum('left out' in str(warning.message) for warning in warned) == 3
    random.seed(0)
    torch.manual_seed(0)
    for augment in (False, True, True, True):
        dataset = PascalVOCDataset(tmp_path / 'lists', 'TRAIN', augment=augment)
        _, boxes, labels, _ = dataset.collate_fn([dataset[0]])
        assert len(boxes[0]) > 0
        check_loss(boxes, labels, model.priors_cxcy)


def test_the_generator_makes_all_kinds_of_outcomes(tmp_path):
    # Else the test above would prove less than it says.
    kinds, n_objects, n_usable = set(), 0, 0
    for seed in range(6):
        nasty = Nasty(tmp_path / str(seed), seed, n_pictures=18)
        kinds |= {'unreadable'} if nasty.unreadable else set()
        kinds |= {'broken'} if nasty.broken else set()
        for name, expected in nasty.expected.items():
            n_usable += len(expected['boxes'])
            n_objects += (nasty.folder / 'Annotations' / f'{name}.xml').read_text().count('<object>')
            if expected['difficulties'] and all(expected['difficulties']):
                kinds.add('only difficult')
            if not expected['boxes']:
                kinds.add('nothing usable')
    assert kinds == {'unreadable', 'broken', 'only difficult', 'nothing usable'}
    assert 0.2 < n_usable / n_objects < 0.8
