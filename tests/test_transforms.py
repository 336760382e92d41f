"""The transforms: what becomes of pictures and boxes on their way to the network."""

import random
from collections import Counter

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import noise
from PIL import Image
from references import iou

import utils
from utils import (DISTORTIONS, IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD, adjust_contrast, photometric_distort,
                   random_crop, render_window, shift_hue, transform, zoom_out)

pytestmark = pytest.mark.usefixtures('one_thread')

OVERLAPS = (None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9)


def seed(value):
    random.seed(value)
    torch.manual_seed(value)


def pixel_boxes(n, width, height, margin=0, smallest=1):
    """Boxes (n, 4) with whole coordinates in a picture, at least `margin` pixels away from its edges."""
    lows = [[random.randint(margin, size - 1 - margin - smallest) for size in (width, height)] for _ in range(n)]
    return torch.tensor([[x, y, random.randint(x + smallest, width - 1 - margin),
                          random.randint(y + smallest, height - 1 - margin)] for x, y in lows], dtype=torch.float)


def random_case(value, margin=0, smallest=1, low=20, high=250):
    """A picture with one to six objects. The i-th has the label i + 1 and is difficult if i is odd."""
    seed(value)
    width, height = random.randint(low, high), random.randint(low, high)
    boxes = pixel_boxes(random.randint(1, 6), width, height, margin, smallest)
    labels = torch.arange(1, len(boxes) + 1)
    return noise(width, height), boxes, labels, (labels % 2 == 0)


def painted(width, height):
    """A picture of at most 256×256 whose red is a pixel's column and whose green is its row."""
    columns = Image.frombytes('L', (width, 1), bytes(range(width))).resize((width, height))
    rows = Image.frombytes('L', (1, height), bytes(range(height))).resize((width, height))
    return Image.merge('RGB', (columns, rows, Image.new('L', (width, height))))


def colors(image):
    """The values from 0 to 255 (3, 300, 300) that a normalized picture had before."""
    return (image * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]) * 255


# --------------------------------------------------------------------------------- for any training picture

@pytest.mark.parametrize('value', range(20))
def test_a_training_picture_keeps_shapes_and_types_with_labels_and_difficulties_beside_their_boxes(value):
    case = image, boxes, labels, difficulties = random_case(value)
    before = [image.tobytes(), *(tensor.clone() for tensor in case[1:])]
    image, new_boxes, new_labels, new_difficulties = transform(image, boxes, labels, difficulties, 'TRAIN')
    n = len(new_boxes)
    assert 1 <= n <= len(boxes)  # some object always survives
    assert image.shape == (3, IMAGE_SIZE, IMAGE_SIZE) and image.dtype == torch.float and image.isfinite().all()
    assert new_boxes.shape == (n, 4) and new_boxes.dtype == torch.float
    assert new_labels.shape == (n,) and new_labels.dtype == torch.long
    assert new_difficulties.shape == (n,) and new_difficulties.dtype == torch.bool
    assert (new_boxes >= 0).all() and (new_boxes <= 1).all() and (new_boxes[:, 2:] > new_boxes[:, :2]).all()
    assert new_difficulties.equal(new_labels % 2 == 0)
    assert new_labels.tolist() == sorted({*new_labels.tolist()} & {*labels.tolist()})
    assert case[0].tobytes() == before[0] and all(map(torch.equal, case[1:], before[1:]))  # the caller's


@pytest.mark.parametrize('size', [(1, 1), (1, 500), (6000, 40)])
@pytest.mark.parametrize('split', ['TRAIN', 'TEST'])
def test_pictures_of_any_size_work_with_and_without_an_object(size, split):
    seed(0)
    whole = torch.tensor([[0.0, 0, size[0] - 1, size[1] - 1]])
    for n in (0, 1) if min(size) > 1 else (0,):  # the data lists leave out boxes without area
        boxes = whole[:n]
        for _ in range(8 if split == 'TRAIN' else 1):
            pixels, new_boxes, labels, difficulties = transform(
                Image.new('RGB', size, 'red'), boxes, torch.ones(n, dtype=torch.long), torch.zeros(n).bool(), split)
            assert pixels.shape == (3, 300, 300) and pixels.isfinite().all()
            assert new_boxes.shape == (n, 4) and labels.shape == (n,) and difficulties.shape == (n,)
            assert (new_boxes[:, 2:] > new_boxes[:, :2]).all()
            assert (pixels != 0).any()  # something of the picture is to be seen, however thin it is
    image = render_window(Image.new('RGB', (10, 10), 'red'), (-500, -500, 10_500, 10_500))
    assert (image != 0).any(dim=0).sum() == 1


# ---------------------------------------------------------------------------------------- test pictures

@pytest.mark.parametrize(('mean', 'std'), [(IMAGENET_MEAN, IMAGENET_STD), ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3])])
def test_a_test_picture_is_only_resized_and_normalized_as_torchvision_does_it(mean, std):
    for value in range(6):
        image, boxes, labels, difficulties = random_case(value, high=600)
        pixels, new_boxes, *others = transform(image, boxes, labels, difficulties, 'TEST', mean, std)
        expected = TF.to_dtype(TF.to_image(TF.resize(image, [300, 300])), torch.float, scale=True)
        torch.testing.assert_close(pixels, TF.normalize(expected, mean, std), rtol=0, atol=5e-6)
        torch.testing.assert_close(new_boxes, boxes / torch.tensor(image.size * 2))
        assert others[0].equal(labels) and others[1].equal(difficulties)


@pytest.fixture
def no_crop(monkeypatch):
    monkeypatch.setattr(utils, 'random_crop', lambda window, boxes: (window, boxes, torch.ones(len(boxes)).bool()))


# -------------------------------------------------------------------------- boxes and pixels move together

def check_painting(image, boxes, originals, scale):
    """Compare the coordinates painted at the corners and the centers of a picture's boxes (n, 4) with the original
    boxes (n, 4). `scale` is how many pixels of the original an output pixel covers, (2). Return whether the picture is
    mirrored."""
    column, row, _ = colors(image)  # (300, 300) each: what is painted there
    to_be_seen = (image != 0).any(dim=0)  # (300, 300)
    mirrored = False
    for box, (x_min, y_min, x_max, y_max) in zip(boxes.tolist(), originals.tolist()):
        # In output pixels: the middles of the object's first and last column and row, and its center.
        left, top, right, bottom = (min(int(300 * side + 0.5 / scale[i % 2]), 299) for i, side in enumerate(box))
        x, y = (left + right) // 2, (top + bottom) // 2
        visible = column[y, to_be_seen[y]]
        mirrored = (visible[0] > visible[-1]).item()
        if mirrored:
            x_min, x_max = x_max, x_min
        for axis, place, painted, original, opposite in (
                (0, left, column[y, left], x_min, x_max), (0, right, column[y, right], x_max, x_min),
                (1, top, row[top, x], y_min, y_max), (1, bottom, row[bottom, x], y_max, y_min)):
            near = abs(painted - original) < 1.5 * scale[axis] + 0.51  # 0.51: painted values are rounded to bytes
            # A crop cuts a box at its own first or last pixel. All other sides are where they were.
            at_edge = min(place, 299 - place) < 1.5 + 0.5 / scale[axis]
            assert near or (at_edge and min(original, opposite) < painted < max(original, opposite))
        assert min(x_min, x_max) < column[y, x] < max(x_min, x_max) and y_min < row[y, x] < y_max
    return mirrored


@pytest.mark.parametrize('value', range(8))
def test_a_picture_painted_with_its_own_coordinates_proves_that_boxes_and_pixels_move_together(value, monkeypatch):
    windows = []

    def look(image, window=None, mirror=False, **arguments):
        windows.append((window, mirror))
        return render_window(image, window, mirror, **arguments)

    monkeypatch.setattr(utils, 'render_window', look)
    monkeypatch.setattr(utils, 'photometric_distort', lambda image: None)
    _, boxes, labels, difficulties = random_case(value, margin=10, smallest=30, low=120, high=256)
    width, height = int(boxes[:, 2].max()) + 11, int(boxes[:, 3].max()) + 11
    picture = painted(width, height)
    for _ in range(6):
        image, new_boxes, new_labels, _ = transform(picture, boxes, labels, difficulties, 'TRAIN')
        (left, top, right, bottom), mirror = windows.pop()
        scale = (right - left) / IMAGE_SIZE, (bottom - top) / IMAGE_SIZE
        assert check_painting(image, new_boxes, boxes[new_labels - 1], scale) == mirror


@pytest.mark.parametrize('value', range(12))
def test_around_a_zoomed_out_picture_is_exactly_the_mean_color(value, monkeypatch, no_crop):
    seed(value)
    width, height = random.randint(30, 300), random.randint(30, 300)
    window = zoom_out(width, height)
    monkeypatch.setattr(utils, 'zoom_out', lambda *_: window)
    monkeypatch.setattr(random, 'random', iter([0, *[1] * 5]).__next__)  # zoom out; don't mirror, don't distort
    boxes = torch.tensor([[0.0, 0, width - 1, height - 1]])
    image, new_boxes, *_ = transform(Image.new('RGB', (width, height), 'white'), boxes, torch.ones(1),
                                     torch.zeros(1), 'TRAIN')
    x_min, y_min, x_max, y_max = (new_boxes[0] * 300).tolist()
    rows, columns = (image != 0).all(dim=0).nonzero(as_tuple=True)
    # The picture is a rectangle of whole pixels in which nothing is 0; beyond it everything is.
    first, last = (int(columns.min()), int(rows.min())), (int(columns.max()) + 1, int(rows.max()) + 1)
    assert len(rows) == (last[0] - first[0]) * (last[1] - first[1])
    assert (image != 0).sum() == 3 * len(rows)
    pixel = 300 / (window[2] - window[0]), 300 / (window[3] - window[1])  # the last pixel of an object belongs to it
    expected = (x_min, y_min, x_max + pixel[0], y_max + pixel[1])
    assert (*first, *last) == pytest.approx(expected, abs=0.51)


def test_half_of_the_pictures_are_mirrored_and_half_zoomed_out_independently(monkeypatch, no_crop):
    seen = []
    monkeypatch.setattr(utils, 'render_window', lambda image, window, mirror, distort, **_: seen.append(
        (window != (0, 0, 40, 40), mirror, distort)))
    seed(0)
    for _ in range(2000):
        transform(Image.new('RGB', (40, 40)), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), 'TRAIN')
    zoomed, mirrored, distorted = (sum(column) / 2000 for column in zip(*seen))
    assert 0.45 < zoomed < 0.55 and 0.45 < mirrored < 0.55 and distorted == 1
    both = sum(z and m for z, m, _ in seen) / 2000
    assert 0.21 < both < 0.29  # they are independent


# ------------------------------------------------------------------------------------------- zooming in

@pytest.mark.parametrize('overlap', OVERLAPS[1:])
def test_a_crop_keeps_the_limits_of_size_aspect_ratio_center_and_overlap(overlap, monkeypatch):
    seed(1)
    cropped, sizes, aspect_ratios = 0, [], []
    for _ in range(120):
        window = zoom_out(random.randint(60, 400), random.randint(60, 400))
        width, height = window[2] - window[0], window[3] - window[1]
        boxes = pixel_boxes(random.randint(1, 5), width, height) + torch.tensor(window[:2]).repeat(2)
        if random.random() < 0.5:  # small objects can't fill nine tenths of a crop
            boxes[-1] = torch.tensor(window) - torch.tensor([0, 0, 1, 1])
        drawn = iter([overlap] * 20)  # no crop at all only if 20 times 50 tries have failed
        monkeypatch.setattr(random, 'choice', lambda options, drawn=drawn: next(drawn, None))
        (left, top, right, bottom), new_boxes, kept = random_crop(window, boxes)
        if (left, top, right, bottom) == window and kept.all() and new_boxes.equal(boxes):
            continue
        cropped += 1
        sizes.append((right - left) / width)
        aspect_ratios.append((bottom - top) / (right - left))
        assert window[0] <= left < right <= window[2] and window[1] <= top < bottom <= window[3]
        assert all(isinstance(side, int) for side in (left, top, right, bottom))
        assert 0.3 * width - 1 < right - left <= width and 0.3 * height - 1 < bottom - top <= height
        assert 0.5 < aspect_ratios[-1] < 2

        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centers > torch.tensor([left, top])) & (centers < torch.tensor([right - 1, bottom - 1]))).all(dim=1)
        assert kept.equal(inside) and kept.any()  # those with their center outside are dropped, some object stays
        crop = [left, top, right - 1, bottom - 1]
        assert new_boxes.tolist() == [[max(box[0], left), max(box[1], top), min(box[2], right - 1),
                                       min(box[3], bottom - 1)] for box in boxes[kept].tolist()]
        assert max(iou(crop, box) for box in boxes[kept].tolist()) >= overlap - 1e-6
    assert cropped > 30
    assert max(sizes) > 0.9 and min(sizes) < max(overlap, 0.35)
    assert overlap > 0.1 or (min(aspect_ratios) < 0.57 and max(aspect_ratios) > 1.8)
    window, boxes, kept = random_crop((-5, -6, 70, 80), torch.zeros(0, 4))  # without objects, nothing is cropped
    assert window == (-5, -6, 70, 80) and boxes.shape == (0, 4) and kept.shape == (0,) and kept.dtype == torch.bool


def reference_crop(width, height, boxes):
    """The crop as the original tutorial describes it: one try after the other, in plain Python."""
    while True:
        overlap = random.choice(OVERLAPS)
        if overlap is None:
            return 0, 0, width, height
        for _ in range(50):
            w, h = int(random.uniform(0.3, 1) * width), int(random.uniform(0.3, 1) * height)
            if not 0.5 < h / w < 2:
                continue
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            right, bottom = left + w - 1, top + h - 1
            for box in boxes:
                inside = left < (box[0] + box[2]) / 2 < right and top < (box[1] + box[3]) / 2 < bottom
                if inside and iou((left, top, right, bottom), box) >= overlap:
                    return left, top, left + w, top + h


def test_fifty_tries_at_once_have_the_distribution_of_a_plain_loop():
    seed(3)
    width, height, boxes = 200, 150, [[20, 30, 120, 130], [150, 10, 190, 60], [5, 100, 40, 140]]
    ours = torch.tensor([random_crop((0, 0, width, height), torch.tensor(boxes).float())[0] for _ in range(1500)])
    plain = torch.tensor([reference_crop(width, height, boxes) for _ in range(1500)])

    def features(crops):
        left, top, right, bottom = crops.float().unbind(dim=1)
        w, h = (right - left) / width, (bottom - top) / height
        return torch.stack((left / width, top / height, w, h, w * h, h / w, (w * h) ** 2, w * h == 1), dim=1)

    ours, plain = features(ours), features(plain)
    assert ours[:, 2:4].min() < 0.305 and ours[ours[:, 4] < 1, 2:4].max() > 0.99
    # The means of 1500 draws each differ by 4.5 standard errors once in 150,000 times.
    error = ((ours.var(dim=0) + plain.var(dim=0)) / 1500).sqrt()
    assert ((ours.mean(dim=0) - plain.mean(dim=0)).abs() < 4.5 * error).all()


# ------------------------------------------------------------------------------------------ zooming out

def test_zooming_out_goes_from_once_to_four_times_with_the_picture_anywhere_inside():
    seed(0)
    scales, places = [], []
    for _ in range(2000):
        width, height = random.randint(1, 500), random.randint(1, 500)
        left, top, right, bottom = zoom_out(width, height)
        assert left <= 0 and top <= 0 and right >= width and bottom >= height  # the picture is inside
        assert width <= right - left <= 4 * width and height <= bottom - top <= 4 * height
        if min(width, height) > 50:
            scale = (right - left) / width
            assert scale == pytest.approx((bottom - top) / height, abs=0.04)  # the same in both directions
            scales.append(scale)
            if right - left > 2 * width:
                places.append(-left / (right - left - width))
    assert min(scales) < 1.1 and max(scales) > 3.9 and 2.4 < sum(scales) / len(scales) < 2.6
    assert min(places) < 0.05 and max(places) > 0.95 and 0.45 < sum(places) / len(places) < 0.55


# ---------------------------------------------------------------------------------------------- colors

def test_each_distortion_comes_half_of_the_time_anywhere_in_its_range_and_in_any_order(monkeypatch):
    ranges = {adjust.__name__: (low, high) for adjust, low, high in DISTORTIONS}  # those of the Caffe code
    assert ranges == {'adjust_brightness': (0.5, 1.5), 'adjust_contrast': (0.5, 1.5), 'adjust_saturation': (0.5, 1.5),
                      'shift_hue': (-18 / 255, 18 / 255)}
    calls = []
    monkeypatch.setattr(utils, 'DISTORTIONS', tuple(
        (lambda image, factor, i=i: calls.append((i, factor)) or image, 10 * i, 10 * i + 1) for i in range(4)))
    seed(0)
    orders, factors = Counter(), {i: [] for i in range(4)}
    for _ in range(4000):
        calls.clear()
        photometric_distort(torch.zeros(3, 2, 2))
        orders[tuple(i for i, _ in calls)] += 1
        for i, factor in calls:
            factors[i].append(factor - 10 * i)
    assert all(len(set(order)) == len(order) for order in orders)
    complete = [count for order, count in orders.items() if len(order) == 4]
    assert len(complete) == 24 and 200 < sum(complete) < 300  # 4000 / 16, in all orders
    for values in factors.values():
        assert 1880 < len(values) < 2120
        assert 0 <= min(values) < 0.02 and 0.98 < max(values) <= 1 and 0.47 < sum(values) / len(values) < 0.53


@pytest.mark.parametrize('ours', [shift_hue, adjust_contrast])
@pytest.mark.parametrize('by', [-0.5, -18 / 255, -0.01, 0, 0.02, 18 / 255, 0.5])
def test_hue_and_contrast_change_as_torchvision_changes_them(ours, by):
    torch.manual_seed(0)
    image = torch.rand(3, 40, 50)
    image[:, :5] = image[:1, :5]  # gray
    image[:2, 5:10] = 0.5  # two channels equal
    image[:, 10:12] = torch.tensor([[1.0, 0.0]]).view(1, 2, 1)  # white and black
    theirs, amount = (TF.adjust_hue, by) if ours is shift_hue else (TF.adjust_contrast, 1 + by)
    torch.testing.assert_close(ours(image, amount), theirs(image, amount), rtol=0, atol=2e-6)


def test_the_bits_of_an_image_do_not_depend_on_the_number_of_threads():
    picture, images = noise(400, 300), []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        seed(2)
        images.append(torch.stack([render_window(picture, distort=True) for _ in range(8)]))
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_the_filler_around_a_picture_is_not_distorted():
    seed(0)
    for _ in range(20):
        image = render_window(Image.new('RGB', (30, 30), 'red'), (-30, -30, 60, 60), distort=True)
        assert (image[:, :100] == 0).all() and (image[:, 200:] == 0).all() and (image[:, 100:200, 100:200] != 0).any()
