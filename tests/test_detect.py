"""detect.py: from pictures to their annotated copies."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import noise
from PIL import Image, ImageColor, ImageDraw

import detect
from utils import IMAGENET_MEAN, IMAGENET_STD, InputError, label_color_map, label_map, read_image

pytestmark = pytest.mark.usefixtures('one_thread')

COLORS = {'cat': '#ff0000', 'dog': '#00c000', 'diningtable': '#0000ff'}


class FakeNetwork:
    """Stands for an SSD300 that finds certain objects in each picture: (label, score, fractional box)."""

    priors_cxcy, image_mean, image_std = torch.zeros(1, 4), IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, objects):
        self.objects, self.seen = objects, []

    def __call__(self, images):
        self.seen.append(images)
        self.is_mixed = torch.is_autocast_enabled('cpu')
        return torch.zeros(1, 1, 4), torch.zeros(1, 1, 21)

    def detect_objects(self, locs, scores, min_score, max_overlap, top_k):
        self.arguments = min_score, max_overlap, top_k
        return ([torch.tensor([box for *_, box in self.objects]).view(-1, 4)],
                [torch.tensor([label_map[label] for label, *_ in self.objects], dtype=torch.long)],
                [torch.tensor([score for _, score, _ in self.objects])])


@pytest.fixture
def network(monkeypatch):
    """A fake network in place of the checkpoint's, which finds a cat, a dog beyond the edges, and another cat."""
    fake = FakeNetwork([('cat', 0.9, [0.25, 0.25, 0.5, 0.75]), ('dog', 0.6, [-0.5, 0.5, 1.25, 1.5]),
                        ('cat', 0.3, [0.0, 0.0, 0.125, 0.125])])
    monkeypatch.setattr(detect, 'load_detector', lambda *_: (fake, label_map))
    monkeypatch.setattr(detect, 'show', lambda image: None)
    return fake


@pytest.fixture
def run(tmp_path, monkeypatch, network):
    """Runs main() on pictures, with the output in tmp_path."""
    def run(*pictures, output='out', **settings):
        settings |= {'image': list(map(str, pictures)), 'output': str(tmp_path / output)}
        for name, value in settings.items():
            monkeypatch.setattr(detect, name, value)
        detect.main()

    return run


@pytest.fixture
def picture(tmp_path):
    noise(400, 200).save(tmp_path / 'my photo.png')
    return tmp_path / 'my photo.png'


# ----------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize('size', [(640, 480), (3000, 200), (20, 20), (1, 1)])
def test_boxes_anywhere_can_be_drawn_and_their_labels_stay_inside_the_picture(size, monkeypatch):
    labels, draw = [], ImageDraw.ImageDraw.rectangle
    monkeypatch.setattr(ImageDraw.ImageDraw, 'rectangle', lambda self, box, fill=None, **settings: (
        draw(self, box, fill, **settings), labels.append(box) if fill else None))
    columns, rows = ((0, side / 2, side - 1, side) for side in size)
    boxes = [(columns[i], rows[j], columns[k], rows[m]) for i in range(4) for j in range(4)
             for k in range(i, 4) for m in range(j, 4)]  # in the middle, at all edges, in all corners, without area
    for box in boxes:
        detect.draw_objects(Image.new('RGB', size), [('diningtable', 0.99, box)], COLORS)
        left, top, right, bottom = labels.pop()
        assert left >= 0 and top >= 0
        # A label that is wider or higher than the picture begins at its edge.
        assert right <= size[0] - 1 or (left == 0 and right - left >= size[0])
        assert bottom <= size[1] - 1 or (top == 0 and bottom - top >= size[1])
        if size == (640, 480) and box[1] > 100:
            assert box[1] - 1.01 <= bottom <= box[1]  # above the frame, where there is room


def test_the_surest_object_is_drawn_on_top_in_a_frame_that_is_seen_in_pictures_of_any_size():
    for side in (60, 300, 1200):
        box = side * 0.25, side * 0.4, side * 0.75, side * 0.75
        drawn = detect.draw_objects(Image.new('RGB', (side, side)), [('cat', 0.987, box), ('dog', 0.4, box)], COLORS)
        for i in range(max(2, side // 150)):
            for place in ((side // 4 + i, side // 2), (side * 3 // 4 - i, side // 2), (side // 2, side * 3 // 4 - i)):
                assert drawn.getpixel(place) == ImageColor.getrgb(COLORS['cat'])
        assert drawn.getpixel((side // 2, side // 2)) == (0, 0, 0)  # a frame, no area


def test_letters_that_the_font_lacks_are_warned_of_and_a_font_can_be_named(recwarn):
    colors, place = {'big cat': 'red', 'бумага': 'red'}, (1, (9, 30, 80, 50))
    detect.draw_objects(Image.new('RGB', (90, 60)), [('big cat', *place)], colors)
    assert not recwarn
    with pytest.warns(UserWarning, match="lacks letters of 'бумага': set font"):
        detect.draw_objects(Image.new('RGB', (90, 60)), [('бумага', *place)], colors)
    with pytest.raises(InputError, match="font 'no.ttf' can't be read"):
        detect.draw_objects(Image.new('RGB', (90, 60)), [], colors, 'no.ttf')


# --------------------------------------------------------------------------------------- finding objects

def test_objects_are_told_in_the_pictures_own_pixels_and_end_at_its_edges(network):
    network.objects.insert(1, ('bus', 0.8, [0.25, -0.5, 0.5, -0.1]))  # wholly above the picture
    assert detect.find_objects(noise(400, 200), 0.2, 0.5, 200) == [
        ('cat', pytest.approx(0.9), (100, 50, 200, 150)), ('dog', pytest.approx(0.6), (0, 100, 400, 200)),
        ('cat', pytest.approx(0.3), (0, 0, 50, 25))]


def test_the_network_sees_the_picture_as_it_wants_it_and_gets_the_settings(network):
    network.image_mean, network.image_std = [0.5, 0.25, 0.125], [1 / 255] * 3  # as weights from elsewhere
    detect.find_objects(Image.new('RGB', (50, 90), (255, 0, 0)), 0.125, 0.375, 7)
    image, = network.seen
    assert image.shape == (1, 3, 300, 300) and network.arguments == (0.125, 0.375, 7)
    expected = torch.tensor([0.5, -0.25, -0.125]) * 255
    torch.testing.assert_close(image.amin(dim=(0, 2, 3)), expected)
    torch.testing.assert_close(image.amax(dim=(0, 2, 3)), expected)


@pytest.mark.parametrize(('mode', 'orientation', 'size'), [('RGB', 6, (48, 64)), ('I;16', 1, (64, 48))])
def test_turned_and_deep_pictures_are_seen_as_in_training(network, tmp_path, mode, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 65536, (48, 64)).astype('uint16')
    (Image.fromarray(pixels) if mode == 'I;16' else noise(64, 48)).save(tmp_path / 'picture.png', exif=exif)
    with Image.open(tmp_path / 'picture.png') as image:
        assert detect.find_objects(image, 0.2, 0.5, 9)[0][2] == (size[0] / 4, size[1] / 4, size[0] / 2, size[1] * 0.75)
        assert detect.detect(image, 0.2, 0.5, 9, detector=(network, label_map)).size == size
    detect.find_objects(read_image(tmp_path / 'picture.png'), 0.2, 0.5, 9)
    assert torch.equal(network.seen[0], network.seen[2])
    with pytest.raises(InputError, match=r'not ndarray.*fromarray\(frame\[..., ::-1\]\)'):
        detect.detect(pixels, 0.2, 0.5, 9)


def test_detect_annotates_a_copy_for_any_detector_and_leaves_out_what_is_suppressed(monkeypatch):
    monkeypatch.setattr(detect, 'load_detector', lambda checkpoint: pytest.fail('the checkpoint is not asked for'))
    detector = FakeNetwork([('cat', 0.9, [0.25, 0.25, 0.5, 0.75]), ('dog', 0.6, [-0.5, 0.5, 1.25, 1.5])]), label_map
    image = noise(400, 200, 'L')
    before = image.tobytes()
    everything = detect.detect(image, 0.2, 0.5, 200, detector=detector)
    assert image.tobytes() == before and everything.size == (400, 200) and everything.mode == 'RGB'
    assert everything.getpixel((100, 100)) == ImageColor.getrgb(label_color_map['cat'])
    no_cats = detect.detect(image, 0.2, 0.5, 200, suppress=['cat'], detector=detector)
    assert no_cats.getpixel((100, 75)) == image.convert('RGB').getpixel((100, 75))
    assert no_cats.getpixel((200, 100)) == ImageColor.getrgb(label_color_map['dog'])
    nothing = detect.detect(image, 0.2, 0.5, 200, suppress=['cat', 'dog'], detector=detector)
    assert nothing is not image and nothing.tobytes() == image.convert('RGB').tobytes()


# --------------------------------------------------------------------------------------- main and saving

def test_main_prints_a_line_per_object_and_the_path_of_the_copy(run, picture, network, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(detect, 'choose_dtype', lambda *_: torch.bfloat16)
    run(picture)
    assert network.is_mixed
    *objects, last = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=2) for line in objects] == [
        ['cat', '0.900', '(100, 50, 200, 150)'], ['dog', '0.600', '(0, 100, 400, 200)'],
        ['cat', '0.300', '(0, 0, 50, 25)']]
    copy = tmp_path / 'out' / 'my photo.png'
    assert str(copy) in last and '3 objects' in last
    with Image.open(copy) as image:
        assert image.size == (400, 200) and image.getpixel((100, 100)) == ImageColor.getrgb(label_color_map['cat'])
    with pytest.raises(InputError, match=r"'yeti'.*are aeroplane, .*tvmonitor"):
        run(picture, suppress=['cat', 'yeti'])
    with pytest.raises(InputError, match="device 'gpu' can't be used here"):
        run(picture, device='gpu')
    monkeypatch.setattr(sys.stdout, 'writelines', lambda lines: os.write(-1, b''))  # as if its pipe were closed
    with pytest.raises(OSError):
        run(picture, output='first', device='cpu', suppress=None, save_json=True)
    assert sorted(os.listdir(tmp_path / 'first')) == ['detections.json', 'my photo.png']  # all was saved before


@pytest.mark.parametrize(('output', 'expected', 'kind'), [
    ('out/deep/er', 'out/deep/er/my photo.png', 'PNG'), ('out/copy.JPG', 'out/copy.JPG', 'JPEG'),
    ('v1.0', 'v1.0/my photo.png', 'PNG')])
def test_output_is_a_files_name_if_it_ends_like_a_picture_otherwise_a_folder(
        run, picture, output, expected, kind, tmp_path):
    run(picture, output=output)
    with Image.open(tmp_path / expected) as image:
        assert image.size == (400, 200) and image.format == kind


@pytest.mark.parametrize('output', ['.', 'my photo.png', 'link'])
def test_the_picture_itself_is_never_overwritten(run, picture, output, tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path)
    before = picture.read_bytes()
    with pytest.raises(InputError, match='overwrite.*my photo'):
        run(picture, output=output)
    assert picture.read_bytes() == before


# ------------------------------------------------------------------------------------------- many pictures

def test_one_unreadable_picture_of_a_folder_is_reported_and_the_rest_goes_on(run, network, tmp_path, capsys):
    network.objects, folder = [('cat', 0.75, [0.25, 0.5, 0.5, 1.0])], tmp_path / 'album'
    folder.mkdir()
    for name in ('a.jpg', 'c.png'):
        Image.new('RGB', (60, 40)).save(folder / name)
    (folder / 'b.jpg').write_bytes(b'no picture')
    for name in ('notes.txt', 'notes.pdf', 'film.mpg'):
        (folder / name).write_text('no picture either')
    with pytest.raises(InputError, match='1 of 3 pictures'):
        run(folder, save_json=True)
    assert str(folder / 'b.jpg') in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / 'out')) == ['a.jpg', 'c.png', 'detections.json']
    found = json.loads((tmp_path / 'out' / 'detections.json').read_text())
    assert found == {str(folder / name): [{'label': 'cat', 'score': 0.75, 'box': [15, 20, 30, 40]}]
                     for name in ('a.jpg', 'c.png')}
    for name in ('a.jpg', 'c.png'):
        (folder / name).write_bytes(b'no picture')
    with pytest.raises(InputError, match='3 of 3 pictures failed'):
        run(folder, output='nothing', save_json=True)


def test_the_copies_of_several_pictures_never_overwrite_each_other_and_must_be_writable(run, picture, tmp_path):
    (tmp_path / 'more').mkdir()
    noise(9, 9).save(tmp_path / 'more' / picture.name)
    with pytest.raises(InputError, match='several pictures'):
        run(picture, tmp_path / 'more')
    with pytest.raises(InputError, match=r'2 pictures.*found\.jpg'):
        run(picture, tmp_path / 'more', output='found.jpg')
    assert not (tmp_path / 'out').exists()
    with pytest.raises(InputError, match=r"copy\.webp' .* choose another"):
        detect.save_image(Image.new('RGB', (70_000, 1)), tmp_path / 'copy.webp')  # WebP takes 16,383 pixels
