"""What the scripts share besides the network: the code of SSD that works on boxes, pictures and files.

Chapters, in reading order: labels · boxes · data lists · transforms · evaluation · checkpoints · script settings.

Three forms of a box occur, always as the last dimension (of size 4) of a tensor:

- boundary coordinates (x_min, y_min, x_max, y_max), in the comments "xy";
- center-size coordinates (c_x, c_y, w, h), "cxcy";
- offsets (g_c_x, g_c_y, g_w, g_h) of such a box from a prior, "gcxgcy".

Coordinates are fractions of the picture's width and height, but for the annotations and the input of
`transform`: those count pixels ("absolute" coordinates).
"""

import argparse
import colorsys
import inspect
import json
import math
import os
import pickle
import random
import re
import signal
import sys
import typing
import warnings
import zipfile
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from xml.etree import ElementTree

import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torch import distributed
from tqdm import tqdm


class InputError(Exception):
    """Something that the user gave is missing, unreadable or wrong. The message is one sentence that names
    it and says what to do; `run_script` prints it instead of a traceback."""


# ------------------------------------------------------------------------------------------------ labels

voc_labels = ('aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow',
              'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train',
              'tvmonitor')


def make_label_map(labels) -> dict[str, int]:
    """{label: class index}: the background is 0, the labels are 1, 2, … in the order given."""
    return {'background': 0, **{label: index for index, label in enumerate(labels, start=1)}}


def make_label_colors(label_map) -> dict[str, str]:
    """{label: '#rrggbb'} for any number of classes."""
    # Hues a golden ratio of the circle apart never repeat, and neighbors in the list look different.
    colors = {}
    for label, index in label_map.items():
        rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.85, 0.95 if index % 2 else 0.75)
        colors[label] = '#' + ''.join(f'{round(255 * value):02x}' for value in rgb)
    return colors


label_map = make_label_map(voc_labels)
rev_label_map = {index: label for label, index in label_map.items()}
label_color_map = make_label_colors(label_map)


# ------------------------------------------------------------------------------------------------- boxes

def xy_to_cxcy(xy):
    """Boundary coordinates (…, 4) to center-size coordinates (…, 4)."""
    return torch.cat(((xy[..., 2:] + xy[..., :2]) / 2,  # c_x, c_y
                      xy[..., 2:] - xy[..., :2]), dim=-1)  # w, h


def cxcy_to_xy(cxcy):
    """Center-size coordinates (…, 4) to boundary coordinates (…, 4)."""
    return torch.cat((cxcy[..., :2] - cxcy[..., 2:] / 2,  # x_min, y_min
                      cxcy[..., :2] + cxcy[..., 2:] / 2), dim=-1)  # x_max, y_max


def cxcy_to_gcxgcy(cxcy, priors_cxcy):
    """Offsets (…, 4) of boxes (…, 4) from their priors (…, 4), both in center-size coordinates.

    The distance of the centers is told in units of the prior's size, the size as the logarithm of its ratio
    to the prior's. The factors 10 and 5 aren't in the paper: they are the "variances" 0.1 and 0.2 of the
    authors' Caffe code, which bring all four offsets to about the same spread.
    """
    return torch.cat(((cxcy[..., :2] - priors_cxcy[..., :2]) / (priors_cxcy[..., 2:] / 10),  # g_c_x, g_c_y
                      torch.log(cxcy[..., 2:] / priors_cxcy[..., 2:]) * 5), dim=-1)  # g_w, g_h


# The largest log(w / ŵ) that is decoded, as in torchvision: 62.5 times the prior, far beyond any image. Without a
# limit, exp() would let one wild prediction grow beyond what floating-point numbers can hold.
MAX_LOG_RATIO = math.log(1000 / 16)


def gcxgcy_to_cxcy(gcxgcy, priors_cxcy):
    """The inverse of `cxcy_to_gcxgcy`: offsets (…, 4) back to center-size coordinates (…, 4). No box gets
    more than 62.5 times as wide or high as its prior."""
    log_ratio = (gcxgcy[..., 2:] / 5).clamp(max=MAX_LOG_RATIO)
    return torch.cat((gcxgcy[..., :2] * priors_cxcy[..., 2:] / 10 + priors_cxcy[..., :2],  # c_x, c_y
                      torch.exp(log_ratio) * priors_cxcy[..., 2:]), dim=-1)  # w, h


def find_intersection(set_1, set_2):
    """Areas (…, n1, n2) of what each box of (…, n1, 4) shares with each of (…, n2, 4); boundary coordinates."""
    lower = torch.maximum(set_1[..., :, None, :2], set_2[..., None, :, :2])  # (…, n1, n2, 2)
    upper = torch.minimum(set_1[..., :, None, 2:], set_2[..., None, :, 2:])  # (…, n1, n2, 2)
    width, height = (upper - lower).clamp(min=0).unbind(dim=-1)  # 0 where the boxes don't meet
    return width * height  # (…, n1, n2)


def find_jaccard_overlap(set_1, set_2):
    """Jaccard overlap (IoU) (…, n1, n2) of each box of (…, n1, 4) with each of (…, n2, 4); boundary
    coordinates. Two boxes without any area overlap by 0."""
    area_1, area_2 = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
                      for boxes in (set_1, set_2))  # (…, n1), (…, n2)
    intersection = find_intersection(set_1, set_2)  # (…, n1, n2)
    union = area_1[..., :, None] + area_2[..., None, :] - intersection  # (…, n1, n2)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def decimate(tensor, m):
    """Keeps every m[d]-th value along dimension d, all of them where m[d] is None."""
    return tensor[tuple(slice(None, None, step) for step in m)]


# -------------------------------------------------------------------------------------------- data lists

OBJECT_TAGS = ('name', 'bndbox/xmin', 'bndbox/ymin', 'bndbox/xmax', 'bndbox/ymax')


def parse_annotation(annotation_path, label_map=label_map, unknown_labels=None, size=None) -> dict[str, list]:
    """The objects in an annotation file of VOC's format.

    :param unknown_labels: a Counter, to which labels outside the label map are added; their objects are
        left out
    :param size: width and height of the picture, at whose edges boxes are cut; None: they stay as they are
    :return: {'boxes': [[x_min, y_min, x_max, y_max], …] in pixels counted from 0, 'labels': [class index,
        …], 'difficulties': [0 or 1, …]}

    Boxes without area are left out with a warning. A file that is missing or isn't such an annotation
    raises InputError.
    """
    index_of = {label.lower(): index for label, index in label_map.items() if index > 0}
    objects = {'boxes': [], 'labels': [], 'difficulties': []}
    try:
        root = ElementTree.parse(annotation_path).getroot()
        if root.tag != 'annotation':
            raise ValueError(f'its root is <{root.tag}>, not <annotation>')
        for element in root.findall('object'):
            label, *sides = texts = [element.findtext(tag, default='').strip() for tag in OBJECT_TAGS]
            if '' in texts:
                raise ValueError(f'an object without {OBJECT_TAGS[texts.index("")]}')
            box = [float(side) - 1 for side in sides]  # VOC counts pixels from 1
            if size:
                box = [*(max(low, 0) for low in box[:2]), *(min(high, end - 1) for high, end in zip(box[2:], size))]
            if label.lower() not in index_of:
                if unknown_labels is not None:
                    unknown_labels[label] += 1
            elif not (box[2] - box[0] >= 0.01 and box[3] - box[1] >= 0.01):  # float32 would make less nothing
                warnings.warn(f"'{annotation_path}': left out a {label} whose box has no area in the picture "
                              f'(xmin, ymin, xmax, ymax: {", ".join(sides)})')
            else:
                objects['boxes'].append(box)
                objects['labels'].append(index_of[label.lower()])
                objects['difficulties'].append(int(element.findtext('difficult', '0').strip() == '1'))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise InputError(f"annotation '{annotation_path}' can't be read ({error}): repair it, or take its name out of "
                         'the list in ImageSets/Main') from None
    return objects


@contextmanager
def opened_picture(path):
    """The picture in a file, as Pillow opens it. Everything that Pillow raises for one that can't be read becomes one
    InputError that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise InputError(f"picture '{path}' isn't there: copy it there, or make the data lists again without "
                         'it') from None
    except Exception as error:  # each of Pillow's formats raises others
        raise InputError(f"picture '{path}' can't be read ({error}): replace it, or leave it out") from None


def read_image(path) -> Image.Image:
    """The picture in a file, upright and in mode RGB, whatever mode it was saved in.

    Phones save a photo as the sensor saw it, with the turn to be made in its EXIF data. Raises InputError,
    naming the file, if it can't be read.
    """
    with opened_picture(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith('I'):  # 16 bits a pixel: Pillow's own conversion would cut off, not scale
            image = image.convert('I').point(lambda value: value / 256).convert('L')
        return image.convert('RGB')


def picture_size(path) -> tuple[int, int]:
    """Width and height in pixels of the picture that `read_image` would give, from the file's header alone."""
    with opened_picture(path) as image:
        on_its_side = image.getexif().get(0x0112) in (5, 6, 7, 8)  # EXIF's orientation
        return image.size[::-1] if on_its_side else image.size


def read_split(voc_path, split, label_map, unknown_labels) -> list[tuple[str, tuple[int, int], dict]]:
    """The pictures of one split ('trainval' or 'test') of a folder in VOC's layout: of each, its absolute path, its
    size (width, height) in pixels, and its objects."""
    voc_path = Path(voc_path).resolve()
    require(voc_path.is_dir(), f"VOC folder '{voc_path}' isn't there: set the path to where VOC lies, or set download")
    list_path = voc_path / 'ImageSets' / 'Main' / f'{split}.txt'
    try:
        # utf-8-sig: Windows' editors put an invisible mark before the first name.
        names = [line.strip() for line in list_path.read_text(encoding='utf-8-sig').splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{list_path}', the list of pictures, can't be read ({error}): is '{voc_path}' a whole "
                         "folder in VOC's layout, with 2007 test extracted over 2007 trainval?") from None
    require(names, f"'{list_path}' names no picture: write a picture's name without .jpg on each line")

    pictures = []
    for name in tqdm(names, desc=f'{voc_path.name} {split}', unit=' pictures'):
        path = voc_path / 'JPEGImages' / f'{name}.jpg'
        size = picture_size(path)
        objects = parse_annotation(voc_path / 'Annotations' / f'{name}.xml', label_map, unknown_labels, size)
        pictures.append((str(path), size, objects))
    return pictures


def create_data_lists(voc07_path, voc12_path, output_folder, labels=voc_labels, skip_empty=False):
    """Reads VOC's annotations and writes what PascalVOCDataset reads, as five JSON files.

    TRAIN_images.json and TEST_images.json list the pictures' absolute paths; TRAIN_objects.json and
    TEST_objects.json give, at the same place of their list, the objects in the picture as `parse_annotation`
    returns them; label_map.json is the label map with which they are encoded.

    The training data are the split trainval of voc07_path and of voc12_path, which may be None, a folder or a list of
    folders; the test data are the split test of voc07_path. Folders with other labels than VOC's will do as well, if
    their layout is VOC's. With skip_empty, training pictures without an object of the labels are left out. Raises
    InputError before anything is written if a folder, file or picture is missing or broken.

    :return: the objects of the training data: boxes in fractional boundary coordinates (n, 4), labels (n)
    """
    labels, unknown_labels = [label.strip() for label in labels], Counter()
    require(labels and all(labels) and len({'background', *map(str.lower, labels)}) == len(labels) + 1,
            f"labels must be names that differ, none of them 'background', not {', '.join(labels) or 'none at all'}")
    label_map = make_label_map(labels)
    more_paths = [voc12_path] if isinstance(voc12_path, (str, Path)) else voc12_path or []
    train = [picture for path in (voc07_path, *more_paths)
             for picture in read_split(path, 'trainval', label_map, unknown_labels)]
    test = read_split(voc07_path, 'test', label_map, unknown_labels)
    n_empty = sum(not objects['boxes'] for _, _, objects in train)
    if skip_empty:
        train = [picture for picture in train if picture[2]['boxes']]
        require(train, f"no training picture has an object of {', '.join(labels)}: name other labels")

    write_data_lists(output_folder, label_map, TRAIN=train, TEST=test)
    if n_empty:
        print(f'{n_empty:,} training pictures have no object of these labels: '
              + ('left out' if skip_empty else '--skip_empty leaves them out'))
    for label, count in unknown_labels.most_common():
        print(f"Left out of the label '{label}', which is none of these labels: {count:,}")

    boxes = [[x_min / width, y_min / height, x_max / width, y_max / height] for _, (width, height), objects in train
             for x_min, y_min, x_max, y_max in objects['boxes']]
    indices = [index for _, _, objects in train for index in objects['labels']]
    return torch.tensor(boxes).view(-1, 4), torch.tensor(indices, dtype=torch.long)


def write_data_lists(output_folder, label_map, **pictures):
    """Writes label_map.json and the two lists of each split, whose pictures are given as `read_split` returns them;
    says how many there are."""
    files = {'label_map': label_map}
    for split in pictures:
        files[f'{split}_images'], _, files[f'{split}_objects'] = zip(*pictures[split])
        n_objects = sum(len(objects['boxes']) for objects in files[f'{split}_objects'])
        print(f'{split}: {len(pictures[split]):,} images with {n_objects:,} objects')
    make_folder(output_folder)
    with ExitStack() as stack:  # which puts the files in place when all five are written: never old beside new ones
        for name, content in files.items():
            file = stack.enter_context(replaced_file(Path(output_folder, f'{name}.json')))
            file.write(json.dumps(content).encode())
            file.flush()
    print(f"The data lists are in '{Path(output_folder).resolve()}'")


# -------------------------------------------------------------------------------------------- transforms
#
# Zooming out is looking through a window that is larger than the picture, zooming in (cropping) is looking
# through one that is smaller. Both only choose a rectangle (left, top, right, bottom) in the picture's own
# pixel coordinates; `right` and `bottom` are the first column and row that no longer belong to it. So the
# whole geometry is played with five numbers and the boxes, and pixels are touched once, at the end.

IMAGE_SIZE = 300  # width and height in pixels of what SSD300 sees
IMAGENET_MEAN = [0.485, 0.456, 0.406]  # of the pictures with which the VGG base was trained, RGB in [0, 1]
IMAGENET_STD = [0.229, 0.224, 0.225]


def shift_hue(image, shift):
    """Turns the hue of an image (3, height, width) with values in [0, 1] by a fraction of the color circle.

    The result is that of torchvision's adjust_hue, which takes several times as long. On the circle, from 0 to 6, red
    lies at 0, green at 2 and blue at 4; a channel is high within 1 of its place and low beyond 2, whatever the hue.
    """
    red, green, blue = image  # (height, width) each, like all that follows
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    hue = torch.where(high == red, green - blue,
                      torch.where(high == green, blue - red + 2 * chroma, red - green + 4 * chroma))
    hue = hue / chroma.clamp(min=1e-8) + 6 * shift  # a gray pixel has no hue, and no chroma to show it
    hue = hue - 6 * (hue / 6).floor()  # once around the circle is back again
    return torch.stack((low + chroma * ((hue - 3).abs() - 1).clamp(0, 1),
                        low + chroma * (2 - (hue - 2).abs()).clamp(0, 1),
                        low + chroma * (2 - (hue - 4).abs()).clamp(0, 1)))  # (3, height, width)


DISTORTIONS = ((TF.adjust_brightness, 0.5, 1.5), (TF.adjust_contrast, 0.5, 1.5), (TF.adjust_saturation, 0.5, 1.5),
               (shift_hue, -18 / 255, 18 / 255))  # function and range of its factor, as in the Caffe code


def photometric_distort(image):
    """Changes brightness, contrast, saturation and hue of an image (3, height, width) with values in [0, 1], in place
    and at random: each with a chance of 50 %, in random order."""
    for adjust, low, high in random.sample(DISTORTIONS, len(DISTORTIONS)):
        if random.random() < 0.5:
            image.copy_(adjust(image, random.uniform(low, high)))


def zoom_out(width, height) -> tuple[int, int, int, int]:
    """A window 1 to 4 times as wide and high as a picture, which lies at a random place inside it. Trains for
    small objects (paper, section 3.6)."""
    scale = random.uniform(1, 4)
    window_width, window_height = int(scale * width), int(scale * height)
    left = random.randint(0, window_width - width)
    top = random.randint(0, window_height - height)
    return -left, -top, window_width - left, window_height - top


def random_crop(window, boxes):
    """Zooms in: a smaller window inside the given one. Trains for large and for partly visible objects (paper,
    section 2.2, "data augmentation").

    :param boxes: objects in the picture's absolute boundary coordinates (n, 4)
    :return: the window; the boxes in it (m, 4), cut at its edges; which of the n objects they are, bool (n)

    The window is left as it is with a chance of 1 in 7 per round, or if there are no objects. Otherwise at
    least one object stays in it: objects whose center is outside are dropped, and one of those that stay
    overlaps with the crop at least as much as the minimum, which is chosen at random.
    """
    start, size = torch.tensor(window[:2]), torch.tensor(window[2:]) - torch.tensor(window[:2])
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2  # (n, 2)
    while True:
        min_overlap = random.choice((None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9))
        if min_overlap is None or len(boxes) == 0:
            return window, boxes, torch.ones(len(boxes), dtype=torch.bool)

        # Fifty tries, then another minimum. All tries are made at once; the first good one counts.
        crop_size = (size * torch.empty(50, 2).uniform_(0.3, 1)).long()  # (50, 2): width and height
        room = size - crop_size  # (50, 2)
        first = start + (torch.rand(50, 2) * (room + 1)).long().minimum(room)  # (50, 2): left and top
        last = first + crop_size - 1  # (50, 2): the last column and row of pixels inside
        aspect_ratio = crop_size[:, 1] / crop_size[:, 0]  # (50)
        contained = ((centers > first[:, None]) & (centers < last[:, None])).all(dim=2)  # (50, n)
        overlap = find_jaccard_overlap(torch.cat((first, last), dim=1).float(), boxes)  # (50, n)
        good = ((contained & (overlap >= min_overlap)).any(dim=1)
                & (aspect_ratio > 0.5) & (aspect_ratio < 2))  # (50)
        if good.any():
            i = good.int().argmax()  # the first True
            kept = contained[i]  # (n)
            boxes = boxes[kept].clamp(min=first[i].repeat(2), max=last[i].repeat(2))  # (m, 4)
            return (*first[i].tolist(), *(last[i] + 1).tolist()), boxes, kept


def look_through(image, window=None, mirror=False, distort=False, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """What a window shows of a picture, as the network wants it: (3, 300, 300), RGB in [0, 1] normalized by mean and
    standard deviation.

    :param image: PIL image, mode RGB
    :param window: (left, top, right, bottom) in the image's pixels; None: the whole image
    :param mirror: mirror it left to right
    :param distort: change its colors at random
    """
    left, top, right, bottom = window or (0, 0, *image.size)
    visible = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))

    # The place of the visible part among 300×300, rounded to whole pixels but never to nothing.
    def place(low, high, start, end):
        first = min(round((low - start) / (end - start) * IMAGE_SIZE), IMAGE_SIZE - 1)
        return first, max(round((high - start) / (end - start) * IMAGE_SIZE), first + 1)

    x1, x2 = place(visible[0], visible[2], left, right)
    y1, y2 = place(visible[1], visible[3], top, bottom)
    part = image.resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR, box=visible)
    if mirror:
        part = ImageOps.mirror(part)
        x1, x2 = IMAGE_SIZE - x2, IMAGE_SIZE - x1

    # Around the picture lies the mean color, which normalization makes 0. The picture itself is changed where it lies:
    # every copy of it would be a megabyte, which takes longer to get from the system than to fill.
    canvas = torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)
    pixels = canvas[:, y1:y2, x1:x2]  # (3, y2 − y1, x2 − x1): a view of its place
    pixels.copy_(TF.pil_to_tensor(part)).div_(255)  # the same, in [0, 1]
    if distort:
        photometric_distort(pixels)
    TF.normalize(pixels, mean, std, inplace=True)
    return canvas


def transform(image, boxes, labels, difficulties, split, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """A picture and its objects made ready for the network; for training, changed at random.

    :param image: PIL image, mode RGB
    :param boxes: absolute boundary coordinates, float (n, 4); a side's last pixel belongs to the object
    :param labels: (n)
    :param difficulties: (n)
    :param split: 'TRAIN' zooms out, crops, mirrors and distorts colors; 'TEST' only resizes
    :param mean, std: with which the network wants images normalized, RGB in [0, 1]
    :return: image (3, 300, 300), boxes in fractional boundary coordinates (m, 4), labels (m), difficulties (m);
        a crop may drop objects, but never all of them. What was passed in stays as it was.
    """
    if split not in ('TRAIN', 'TEST'):
        raise ValueError(f"split must be 'TRAIN' or 'TEST', not {split!r}")
    train, mirror, window = split == 'TRAIN', False, (0, 0, *image.size)
    if train:
        if random.random() < 0.5:
            window = zoom_out(*image.size)
        window, boxes, kept = random_crop(window, boxes)
        labels, difficulties = labels[kept], difficulties[kept]
        mirror = random.random() < 0.5

    image = look_through(image, window, mirror, distort=train, mean=mean, std=std)

    left, top, right, bottom = window
    width, height = right - left, bottom - top
    boxes = boxes - torch.tensor([left, top, left, top])  # the window's own pixel coordinates
    if mirror:
        x_min, y_min, x_max, y_max = boxes.unbind(dim=1)
        # Pixel 0 becomes the last one, width − 1; and what was the right side is now the left one.
        boxes = torch.stack((width - 1 - x_max, y_min, width - 1 - x_min, y_max), dim=1)
    boxes = boxes / torch.tensor([width, height, width, height])  # fractional
    return image, boxes, labels, difficulties


# -------------------------------------------------------------------------------------------- evaluation

def match_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
                     min_overlaps=(0.5,)):
    """Tells true from false detections by the rules of VOC 2007's development kit.

    The first six arguments are those of `calculate_mAP`. A detection finds, among the objects of its picture and
    class, the one that it overlaps most, if by more than a smallest overlap, 0.5 in VOC. Of several detections
    that find the same object, the one with the highest score is true and the others are false; those that find a
    difficult object count neither way and are left out.

    :return: a list with, for each smallest overlap, the detections that count, by falling score: labels (d),
        scores (d), whether true, bool (d)
    """
    # One overlap matrix per picture, whatever the number of smallest overlaps.
    overlaps, found, n_objects = [], [], 0  # of each detection: its highest overlap, and the object's number
    for boxes, labels, objects, object_labels in zip(det_boxes, det_labels, true_boxes, true_labels):
        if len(objects) > 0:
            overlap = find_jaccard_overlap(boxes, objects)  # (n_detections, n_objects)
            overlap = overlap.masked_fill(labels[:, None] != object_labels, 0)  # only objects of its class
            overlap, best = overlap.max(dim=1)  # (n_detections)
        else:
            overlap, best = torch.zeros_like(labels, dtype=torch.float), torch.zeros_like(labels)
        overlaps.append(overlap)
        found.append(best + n_objects)
        n_objects += len(objects)

    # From here on all pictures at once. A stable sort: equal scores stay in the order of the pictures.
    scores, order = torch.cat(det_scores).sort(descending=True, stable=True)  # (D)
    labels, overlaps, found = (torch.cat(values)[order] for values in (det_labels, overlaps, found))  # (D)
    difficult = torch.cat(true_difficulties).bool()  # (n_objects)
    matches = []
    for min_overlap in min_overlaps:
        rank, = (overlaps > min_overlap).nonzero(as_tuple=True)  # of the detections that find an object
        objects = found[rank]
        first = torch.full((n_objects,), len(scores), device=rank.device)  # rank of each object's first detection
        first = first.scatter_reduce(0, objects, rank, 'amin')
        true = torch.zeros_like(labels, dtype=torch.bool).scatter(0, rank, rank == first[objects])  # (D)
        counts = torch.ones_like(true).scatter(0, rank, ~difficult[objects])  # (D)
        matches.append((labels[counts], scores[counts], true[counts]))
    return matches


def average_precision(true, n_objects) -> float:
    """The 11-point interpolated average precision of VOC 2007.

    :param true: whether each detection of a class is true, by falling score, bool (d)
    :param n_objects: how many objects there are to be found
    :return: the mean, over the recalls 0, 0.1, …, 1, of the highest precision at this recall or a higher one; nan
        if there are no objects
    """
    if n_objects == 0:
        return math.nan
    n_true = true.cumsum(dim=0)  # (d): after the best 1, 2, …, d detections
    precision = n_true.double() / torch.arange(1, len(true) + 1, device=true.device)  # (d)
    # Recall n_true / n_objects is compared with t / 10 in whole numbers: 3 of 10 does reach 0.3, which as a
    # floating-point number it might miss by a rounding error.
    reached = [precision[10 * n_true >= t * n_objects] for t in range(11)]
    return sum(values.max().item() for values in reached if len(values)) / 11


def area_under_curve(true, n_objects) -> float:
    """The average precision of VOC 2010 and later: the area under the precision–recall curve, made to fall
    monotonously. The arguments are those of `average_precision`, whose value is about 2 points lower on VOC."""
    if n_objects == 0:
        return math.nan
    precision = true.cumsum(dim=0).double() / torch.arange(1, len(true) + 1, device=true.device)  # (d)
    highest = precision.flip(0).cummax(dim=0).values.flip(0)  # (d): at this recall or a higher one
    return highest[true].sum().item() / n_objects  # each true detection raises the recall by 1 / n_objects


def rank_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
                    label_map=label_map, min_overlaps=(0.5,)) -> list[dict[str, tuple]]:
    """What the precision and recall of each class follow from. The arguments are those of `match_detections`.

    :return: for each smallest overlap {label: (scores (d), whether true, bool (d), number of objects to be found)},
        by falling score; of detections and objects, only those that count. Classes without an object to be found
        are named in a warning.
    """
    countable = torch.cat(true_labels)[~torch.cat(true_difficulties).bool()]  # labels of the objects to be found
    n_objects = {label: int((countable == index).sum()) for label, index in label_map.items() if index > 0}
    missing = [label for label, n in n_objects.items() if n == 0]
    if missing:
        warnings.warn(f'no objects to be found of {", ".join(missing)}: no AP, and left out of the mean')
    ranked = []
    for labels, scores, true in match_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels,
                                                 true_difficulties, min_overlaps):
        of_class = {label: labels == label_map[label] for label in n_objects}
        ranked.append({label: (scores[mask], true[mask], n_objects[label]) for label, mask in of_class.items()})
    return ranked


def mean_of_classes(values) -> float:
    """The mean over the classes that have a value: a class without objects has nan."""
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def calculate_mAP(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
                  label_map=label_map) -> tuple[dict[str, float], float]:
    """Average precision of each class and their mean, as VOC 2007 defines them (development kit, section 4.4).

    All arguments but the last are lists with a tensor per picture, of its detections: boxes in boundary
    coordinates (d, 4), labels (d), scores (d); and of its objects: boxes (n, 4), labels (n), difficulties (n).

    :return: {label: AP}, mAP. A class without objects (difficult ones don't count) has no AP: it is nan, stays
        out of the mean and is named in a warning.
    """
    ranked, = rank_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map)
    average_precisions = {label: average_precision(true, n_objects) for label, (_, true, n_objects) in ranked.items()}
    return average_precisions, mean_of_classes(average_precisions.values())


# ------------------------------------------------------------------------------------------- checkpoints

def make_folder(path):
    """Makes a folder for results, with those above it, unless it is there. Raises InputError if nothing can be written
    to it: better now than after hours of training."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't make the folder '{path}' ({error.strerror}): choose another one") from None
    require(os.access(path, os.W_OK), f"can't write to the folder '{path}': choose another one")


@contextmanager
def replaced_file(path):
    """A binary file to write to, which replaces `path` in one step once it is whole and on the disk. Whatever
    happens in between – an error, a kill, a power cut –, `path` is the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')  # in the same folder: a rename can't cross file systems
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # What stops torch.save, a full disk or Ctrl-C, is the context of the RuntimeError that comes out of it.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise InputError(f"can't write '{path}' ({cause.strerror or cause}): make room or choose another "
                             'place; what was there before is unchanged') from None
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise


def save_checkpoint(path, epoch, model, optimizer, label_map, settings):
    """Saves a training run after `epoch` finished epochs, in plain containers only.

    Besides the weights it holds what the network needs: its priors, how images are normalized for it, whether boxes
    are cut at the image's edges. It loads with `torch.load(path, weights_only=True)`, which runs no code from it.
    """
    with replaced_file(path) as file:
        torch.save({'format': 2, 'epoch': epoch, 'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
                    'label_map': label_map, 'settings': settings, 'priors_cxcy': model.priors_cxcy,
                    'image_mean': list(model.image_mean), 'image_std': list(model.image_std),
                    'clip_boxes': model.clip_boxes}, file)


def read_checkpoint_file(path):
    """The content of a file that torch.save wrote, with its tensors on the CPU: a checkpoint of ours, or weights from
    elsewhere. No code from the file is run. Raises InputError if the file is missing, damaged or something else."""
    try:
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
            if any(name.endswith('/constants.pkl') for name in names):
                raise ValueError('a TorchScript archive') from error  # a program, which torch.load would start
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # that the source code of the original's classes is missing
                content = torch.load(path, map_location='cpu', weights_only=False, pickle_module=InertPickle)
            # Weights of others may lie beside objects that weights_only refuses: those stay behind.
            model = content['model']
            return original_checkpoint(content) if isinstance(model, StandIn) else {'model': model}
    except FileNotFoundError:
        raise InputError(f"checkpoint '{path}' isn't there: train one with train.py, or name another one") from None
    except Exception as error:  # a file of any content may raise anything
        reason = (error.strerror if isinstance(error, OSError) and error.filename
                  else "it is damaged or wasn't written by train.py")
        raise InputError(f"checkpoint '{path}' can't be loaded: {reason}") from None


def load_checkpoint(path) -> dict:
    """What `save_checkpoint` wrote, or the original code's checkpoint in the same form, with its tensors on the CPU.
    Raises InputError if the file is missing, damaged or something else."""
    content = read_checkpoint_file(path)
    require(is_checkpoint(content), f"'{path}' isn't a checkpoint of this project: name one that train.py wrote")
    return content


def is_checkpoint(content) -> bool:
    """Whether the content of a file has the parts of a checkpoint. Whether its weights fit the network, only the
    network knows."""
    parts = ('model', 'label_map', 'optimizer', 'settings')
    return (isinstance(content, dict) and {'epoch', 'model', 'label_map'} <= content.keys()
            and all(isinstance(content.get(name, {}), dict) for name in parts))


def check_label_map(checkpoint_label_map, data_label_map):
    """Raises InputError, showing both, if a checkpoint was trained for other classes than the data lists have."""
    require(checkpoint_label_map == data_label_map,
            f'the checkpoint has the classes {checkpoint_label_map} but the data lists have {data_label_map}: use data '
            'lists and a checkpoint that belong together')


# The tutorial's original code pickled the whole network and the whole optimizer: so do its published weights, which
# reach 77.2 mAP, and all that others have trained with it. Unpickling calls whatever a file says. So only what tensors
# are made of is resolved; all else that a file names becomes a stand-in, and of that, only parameters are used.

RESOLVED = {('torch._utils', '_rebuild_tensor'), ('torch._utils', '_rebuild_tensor_v2'),
            ('torch._utils', '_rebuild_parameter'), ('torch.nn.parameter', 'Parameter'), ('collections', 'OrderedDict')}


class StandIn(dict):
    """Takes the place of any class or function: when called, it does nothing; as an object, it keeps its state."""

    def __init__(self, *args):
        """Keeps dict from reading the arguments."""

    def __setstate__(self, state):
        self.state = state

    __hash__ = object.__hash__  # the optimizer has objects as keys


class InertPickle:
    """In place of the module pickle, for torch.load."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return super().find_class(module, name) if (module, name) in RESOLVED else type(name, (StandIn,), {})

    @staticmethod
    def load(file, **options):
        return InertPickle.Unpickler(file, **options).load()


def original_checkpoint(content) -> dict:
    """A checkpoint of the original code as one of ours, without a training to go on with."""
    def parameters(module, prefix=''):
        for name, parameter in module.state['_parameters'].items():
            yield prefix + name, parameter.detach()
        for name, child in module.state['_modules'].items():
            yield from parameters(child, f'{prefix}{name}.')

    # It counts epochs from 0 and names the last one; we count those that are finished.
    return {'epoch': content['epoch'] + 1, 'model': dict(parameters(content['model'])), 'label_map': dict(label_map)}


# --------------------------------------------------------------------------------------- script settings

def require(condition, message):
    """Raises InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


def current_settings(script) -> dict:
    """{name: value} of a script's annotated constants, in plain types: a Path in a checkpoint couldn't be loaded."""
    settings = {name: getattr(script, name) for name in typing.get_type_hints(script)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


PRECISIONS = ('float32', 'bfloat16', 'auto')


def check_precision(precision):
    """Raises InputError for a precision that `autocast` doesn't know."""
    require(precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}, not '{precision}'")


def autocast(device, precision):
    """The context in which a network runs in 'float32'; in 'bfloat16' where that is safe (mixed precision);
    or, with 'auto', in bfloat16 if the device computes in it."""
    enabled = precision == 'bfloat16' or (precision == 'auto' and computes_in_bfloat16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def computes_in_bfloat16(device) -> bool:
    """Whether a device has instructions for bfloat16. Without them, a CPU takes ten times as long with it."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, 'get_capabilities', dict)()  # older versions of PyTorch can't tell
    return any(capabilities.get(name) for name in ('avx512_bf16', 'amx_bf16'))


def several_processes() -> bool:
    """Whether this is one of several processes that train or evaluate together."""
    return distributed.is_available() and distributed.is_initialized()


def join_processes() -> tuple[int, int, torch.device]:
    """Returns the rank of this process, the number of processes, and its device: one of several if torchrun started
    it, otherwise the only one. Of several, the first alone prints."""
    cuda = torch.cuda.is_available()
    if 'LOCAL_RANK' not in os.environ:
        return 0, 1, torch.device('cuda' if cuda else 'cpu')
    local_rank = int(os.environ['LOCAL_RANK'])
    if cuda:
        require(local_rank < torch.cuda.device_count(),
                f'there are {torch.cuda.device_count()} GPUs: start torchrun with --nproc_per_node of at most that')
        torch.cuda.set_device(local_rank)
    # Others wait for the first process while it downloads weights or computes a mAP.
    distributed.init_process_group('nccl' if cuda else 'gloo', timeout=timedelta(hours=2))
    if distributed.get_rank() > 0:
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115
    device = torch.device('cuda', local_rank) if cuda else torch.device('cpu')
    return distributed.get_rank(), distributed.get_world_size(), device


class DelayedCtrlC:
    """Within `with`, Ctrl-C only sets `pressed`, to be heeded where it does no harm; pressed twice, it stops at once.
    A KeyboardInterrupt then ends the program with `message`. Left to itself, Python raises it wherever it is: in the
    middle of starting a worker process, say, where it may be lost or leave that process hanging."""

    def __init__(self, message):
        self.message, self.pressed = message, False

    def __enter__(self):
        signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, signal_number, frame):
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b'\nStopping after this step; press Ctrl-C again to stop at once\n')  # print isn't safe in here

    def __exit__(self, kind, *_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if kind is KeyboardInterrupt:
            sys.exit(self.message)


def ignore_ctrl_c(worker_id):
    """For a worker of a DataLoader. It gets the terminal's Ctrl-C, too, but it ends when the main process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def override_settings(script) -> set[str]:
    """Sets a script's annotated constants from the command line, each by its own name; returns those names.

    `batch_size: int = 8` becomes `--batch_size 4`. Understood are int, float, str, bool (`--augment`,
    `--no-augment`), `X | None` (`--grad_clip None`) and `list[X]` (`--labels cat dog`). `--help` shows each
    with its default and the comment behind it.
    """
    parser = argparse.ArgumentParser(description=script.__doc__, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,  # only what is given is returned
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f'{parser.prog}: {message}; --help lists the settings\n')
    comments = dict(re.findall(r'^(\w+): .*?  # (.*)$', inspect.getsource(script), re.MULTILINE))
    for name, kind in typing.get_type_hints(script).items():
        optional = type(None) in typing.get_args(kind)
        if optional:
            kind = next(choice for choice in typing.get_args(kind) if choice is not type(None))
        many = typing.get_origin(kind) is list
        if many:
            kind, = typing.get_args(kind)
        text = f'{comments.get(name, "")} (default: {getattr(script, name)})'.replace('%', '%%')
        if kind is bool:
            parser.add_argument(f'--{name}', action=argparse.BooleanOptionalAction, help=text)
            continue

        def convert(value, kind=kind, optional=optional):
            return None if optional and value == 'None' else kind(value)

        convert.__name__ = kind.__name__  # for argparse's "invalid int value: 'x'"
        parser.add_argument(f'--{name}', type=convert, nargs='*' if many else None, help=text,
                            metavar=kind.__name__.upper())
    given = vars(parser.parse_args())
    for name, value in given.items():
        setattr(script, name, None if value == [None] else value)
    return set(given)


def run_script(script, pass_given=False):
    """Runs a script's main() with its settings from the command line; with pass_given, main(names of the settings
    given there). What the user can mend is told in one sentence on standard error, with exit status 1."""
    sys.stdout.reconfigure(errors='backslashreplace')  # a file's name that can't be printed must not end a run
    given = override_settings(script)
    warnings.formatwarning = lambda message, *_, **__: f'Warning: {message}\n'
    try:
        script.main(*[given] * pass_given)
    except InputError as error:
        # From a worker of a DataLoader it arrives wrapped in that worker's traceback; the last line is ours.
        sys.exit('Error: ' + str(error).splitlines()[-1].removeprefix('utils.InputError: '))
    except KeyboardInterrupt:
        sys.exit('Stopped.')
