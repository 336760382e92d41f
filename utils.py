"""What the scripts share besides the network: functions for boxes, pictures, detections and files.

Chapters, in reading order: labels · boxes · data lists · transforms · evaluation · checkpoints · script settings.

A box is the last dimension of a tensor, of size 4. It has one of three forms:

- boundary coordinates (x_min, y_min, x_max, y_max), called "xy" in names and comments;
- center-size coordinates (c_x, c_y, w, h), called "cxcy";
- offsets from a prior (g_c_x, g_c_y, g_w, g_h), called "gcxgcy".

Coordinates are fractions of the picture's width and height. Only annotations and the input of `transform` are in
pixels ("absolute" coordinates).

A "picture" is a photograph: a file or a PIL image. An "image" is the normalized tensor that the network sees.
"""

import argparse
import colorsys
import csv
import inspect
import json
import math
import os
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
import typing
import warnings
import zipfile
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torch import distributed
from tqdm import tqdm


class InputError(Exception):
    """Something that the user provided is missing, unreadable or wrong. The message is one sentence that names it and
    says what to do; `run_script` prints it instead of a traceback. `changes` are settings that may help next time."""

    def __init__(self, message, **changes):
        super().__init__(message)
        self.changes = changes


def require(condition, message, **changes):
    """Raise InputError unless the condition holds."""
    if not condition:
        raise InputError(message, **changes)


# ------------------------------------------------------------------------------------------------ labels

voc_labels = ('aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow',
              'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train',
              'tvmonitor')


def make_label_map(labels) -> dict[str, int]:
    """Return {label: class index}: 0 for the background, then 1, 2, … in the order of the labels."""
    return {'background': 0, **{label: index for index, label in enumerate(labels, start=1)}}


def make_label_colors(label_map) -> dict[str, str]:
    """Return {label: '#rrggbb'} for any number of classes."""
    # Steps of the golden ratio around the color circle never repeat a hue, and make neighbors in the list differ.
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
    """Convert boundary coordinates (…, 4) to center-size coordinates (…, 4)."""
    x_min, y_min, x_max, y_max = xy.unbind(dim=-1)
    c_x = (x_min + x_max) / 2
    c_y = (y_min + y_max) / 2
    return torch.stack((c_x, c_y, x_max - x_min, y_max - y_min), dim=-1)


def cxcy_to_xy(cxcy):
    """Convert center-size coordinates (…, 4) to boundary coordinates (…, 4)."""
    c_x, c_y, w, h = cxcy.unbind(dim=-1)
    return torch.stack((c_x - w / 2, c_y - h / 2, c_x + w / 2, c_y + h / 2), dim=-1)


def cxcy_to_gcxgcy(cxcy, priors_cxcy):
    """Encode boxes (…, 4) as offsets (…, 4) from their priors (…, 4); both in center-size coordinates.

    The offset of a center is measured in units of the prior's size, that of a size by the logarithm of the ratio. The
    factors 10 and 5 aren't in the paper. They are the "variances" 0.1 and 0.2 of the authors' Caffe code, and give all
    four offsets about the same spread.
    """
    c_x, c_y, w, h = cxcy.unbind(dim=-1)
    prior_x, prior_y, prior_w, prior_h = priors_cxcy.unbind(dim=-1)
    g_c_x = (c_x - prior_x) / (prior_w / 10)
    g_c_y = (c_y - prior_y) / (prior_h / 10)
    g_w = torch.log(w / prior_w) * 5
    g_h = torch.log(h / prior_h) * 5
    return torch.stack((g_c_x, g_c_y, g_w, g_h), dim=-1)


# The largest log(w / ŵ) that is decoded, as in torchvision: a box 62.5 times the size of its prior. Without a limit,
# exp() could turn one wild prediction into infinity.
MAX_LOG_RATIO = math.log(1000 / 16)


def gcxgcy_to_cxcy(gcxgcy, priors_cxcy):
    """Decode offsets (…, 4) from priors (…, 4) to boxes (…, 4): the inverse of `cxcy_to_gcxgcy`."""
    g_c_x, g_c_y, g_w, g_h = gcxgcy.unbind(dim=-1)
    prior_x, prior_y, prior_w, prior_h = priors_cxcy.unbind(dim=-1)
    c_x = g_c_x * prior_w / 10 + prior_x
    c_y = g_c_y * prior_h / 10 + prior_y
    w = torch.exp((g_w / 5).clamp(max=MAX_LOG_RATIO)) * prior_w
    h = torch.exp((g_h / 5).clamp(max=MAX_LOG_RATIO)) * prior_h
    return torch.stack((c_x, c_y, w, h), dim=-1)


def find_intersection(set_1, set_2):
    """Return the area (…, n1, n2) that each box of (…, n1, 4) shares with each of (…, n2, 4); boundary coordinates."""
    lower = torch.maximum(set_1[..., :, None, :2], set_2[..., None, :, :2])  # (…, n1, n2, 2): left and top
    upper = torch.minimum(set_1[..., :, None, 2:], set_2[..., None, :, 2:])  # (…, n1, n2, 2): right and bottom
    width, height = (upper - lower).clamp(min=0).unbind(dim=-1)  # (…, n1, n2): 0 where the boxes don't touch
    return width * height  # (…, n1, n2)


def find_jaccard_overlap(set_1, set_2):
    """Return the Jaccard overlap (IoU) (…, n1, n2) of each box of (…, n1, 4) with each of (…, n2, 4); boundary
    coordinates. The overlap of boxes without area is 0."""
    width_1, height_1 = (set_1[..., 2:] - set_1[..., :2]).unbind(dim=-1)  # (…, n1)
    width_2, height_2 = (set_2[..., 2:] - set_2[..., :2]).unbind(dim=-1)  # (…, n2)
    intersection = find_intersection(set_1, set_2)  # (…, n1, n2)
    union = (width_1 * height_1)[..., :, None] + (width_2 * height_2)[..., None, :] - intersection  # (…, n1, n2)
    return torch.where(union > 0, intersection / union, 0)


def decimate(tensor, m):
    """Keep every m[d]-th value along dimension d, or all of them where m[d] is None."""
    return tensor[tuple(slice(None, None, step) for step in m)]


# -------------------------------------------------------------------------------------------- data lists

OBJECT_TAGS = ('name', 'bndbox/xmin', 'bndbox/ymin', 'bndbox/xmax', 'bndbox/ymax')
PICTURE_SUFFIXES = ('.avif', '.bmp', '.gif', '.jfif', '.jp2', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff',
                    '.webp')
SPLIT_FOLDERS = ('train', 'test', 'valid', 'val')


class Findings:
    """What the annotations reveal besides objects. It is reported in a few lines."""

    def __init__(self):
        self.labels = Counter()  # {label: number of objects}, of all labels, wanted or not
        self.notes = defaultdict(list)  # {what is odd: where}
        self.faults = []  # reasons why the data lists can't be made


def some(cases) -> str:
    """Return the first three of several texts as one text."""
    return ', '.join(map(str, cases[:3])) + (', …' if len(cases) > 3 else '')


def parse_annotation(annotation_path, label_map=label_map, size=None, findings=None) -> dict[str, list]:
    """Return the objects in an annotation file of VOC's format, without those of other labels and boxes without area.

    :param size: width and height of the picture, at whose edges boxes are clipped; None: boxes stay as they are
    :param findings: Findings to which to add all labels, boxes without area, and a <size> that isn't the picture's
    :return: {'boxes': [[x_min, y_min, x_max, y_max], …] in pixels counted from 0, 'labels': [class index, …],
        'difficulties': [0 or 1, …]}

    Raises InputError if the file is missing or isn't such an annotation.
    """
    findings = findings or Findings()
    index_of = {label.lower(): index for label, index in label_map.items() if index > 0}
    objects = {'boxes': [], 'labels': [], 'difficulties': []}
    try:
        root = ElementTree.parse(annotation_path).getroot()
        if root.tag != 'annotation':
            raise ValueError(f'its root is <{root.tag}>, not <annotation>')
        noted = [float(root.findtext(tag) or 0) for tag in ('size/width', 'size/height')]
        fits = not size or 0 in noted or all(abs(noted[i] - size[i]) <= 0.02 * size[i] for i in (0, 1))
        if not fits:
            findings.notes["annotations have a <size> that isn't their picture's, so boxes may be wrong (was the "
                           'picture rotated by EXIF, shrunk or replaced?)'].append(
                f"'{annotation_path}' ({noted[0]:g}×{noted[1]:g}, not {size[0]}×{size[1]})")
        for element in root.findall('object'):
            texts = [element.findtext(tag, default='').strip() for tag in OBJECT_TAGS]
            if '' in texts:
                raise ValueError(f'an object without {OBJECT_TAGS[texts.index("")]}')
            label, *sides = texts
            x_min, y_min, x_max, y_max = (float(side) - 1 for side in sides)  # VOC counts pixels from 1
            if size:
                x_min, y_min = max(x_min, 0), max(y_min, 0)
                x_max, y_max = min(x_max, size[0] - 1), min(y_max, size[1] - 1)
            findings.labels[label] += 1
            if label.lower() not in index_of:
                continue
            if x_max - x_min >= 0.01 and y_max - y_min >= 0.01:  # less could become 0 in float32
                objects['boxes'].append([x_min, y_min, x_max, y_max])
                objects['labels'].append(index_of[label.lower()])
                objects['difficulties'].append(int(element.findtext('difficult', '0').strip() == '1'))
            elif fits:
                findings.notes['boxes have no area in their picture and are left out'].append(
                    f"'{annotation_path}' {label} ({', '.join(sides)})")
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"annotation '{annotation_path}' can't be read ({error}): repair it, and save it as UTF-8"
                         ) from None
    return objects


@contextmanager
def opened_picture(path):
    """Open the picture in a file with Pillow. Raises InputError, naming the file, if it can't be read."""
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError:
        raise InputError(f"picture '{path}' isn't there: copy it there, or make the data lists without it") from None
    except Exception as error:  # each of Pillow's formats has its own errors
        raise InputError(f"picture '{path}' can't be read ({error}): replace it or leave it out") from None


def upright_rgb(picture) -> Image.Image:
    """Return a copy of a PIL image, upright and in mode RGB."""
    require(isinstance(picture, Image.Image),
            f"a picture must be a PIL image, not {type(picture).__name__}: convert an RGB array with "
            "Image.fromarray(frame), OpenCV's BGR frames with Image.fromarray(frame[..., ::-1])")
    picture = ImageOps.exif_transpose(picture)  # a phone only notes in EXIF data how a photo must be rotated
    if picture.mode[0] in 'IF':  # more than 8 bits per pixel, which Pillow would clip at 255
        picture = picture.convert('F')
        highest = int(picture.getextrema()[1])
        n_bits = next((bits for bits in (8, 12, 16) if highest < 2 ** bits), 32)  # cameras often use 12 of 16 bits
        scale = 255 if highest == 1 else 2 ** (8 - n_bits)  # 1: fractions
        picture = picture.point(lambda value: value * scale).convert('L')
    return picture.convert('RGB')


def read_image(path) -> Image.Image:
    """Return the picture in a file, upright and in mode RGB. Raises InputError if it can't be read."""
    with opened_picture(path) as picture:
        return upright_rgb(picture)


def picture_size(path, decode=False) -> tuple[int, int]:
    """Return width and height of the picture that `read_image` would return, from the file's header alone. With
    `decode`, also read the rest, to find broken files."""
    with opened_picture(path) as picture:
        width, height = picture.size
        if decode:
            picture.draft('L', (1, 1))  # makes it fast: of JPEG, all is read but only every eighth pixel computed
            picture.load()
        # Not picture.getexif(): it would decode a whole PNG, where EXIF data may follow the pixels.
        on_its_side = Image.Image.getexif(picture).get(0x0112) in (5, 6, 7, 8)  # EXIF's orientation
        return (height, width) if on_its_side else (width, height)


def find_files(folder, suffixes) -> dict[str, list[str]]:
    """Return {name: paths} of all files in a folder with these suffixes; a name is a path without suffix: train/a."""
    files = defaultdict(list)
    for parent, _, file_names in sorted(os.walk(folder)):
        start = Path(parent).relative_to(folder).as_posix().removeprefix('.')
        for stem, suffix in map(os.path.splitext, sorted(file_names)):
            if suffix.lower() in suffixes and not stem.startswith('.'):  # macOS's ._a.jpg isn't a picture
                files[f'{start}/{stem}'.removeprefix('/')].append(os.path.join(parent, stem + suffix))
    return files


def read_names(list_path, pictures) -> list[str]:
    """Return the names in one of VOC's lists, one per line. A line may also have a suffix and a flag: 'a.jpg 1'."""
    try:
        data = list_path.read_bytes() if list_path.exists() else b''
        # PowerShell writes UTF-16, and Windows editors put a byte order mark before UTF-8.
        text = data.decode('utf-16' if data[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the list '{list_path}' can't be read ({error}): save it as UTF-8") from None
    names = []
    for line in filter(None, map(str.strip, text.replace('\\', '/').splitlines())):
        forms = [line, re.sub(r'\s+-?[01]$', '', line)]
        forms += [re.sub(r'\.\w+$', '', form) for form in forms]
        names.append(next((form for form in forms if form in pictures), line))
    return names


def split_names(voc_path, pictures, annotations, with_test) -> list[list[str]]:
    """Return the names of a folder's pictures for training and for testing. They are those in its lists; without lists,
    those below train/ and below test/, valid/ or val/; without these, every fifth is for testing (with_test)."""
    lists = [voc_path / 'ImageSets' / 'Main' / f'{split}.txt' for split in ('trainval', 'test')]
    if any(path.exists() for path in lists):
        return [read_names(path, pictures) for path in lists]
    below = defaultdict(list)  # {folder of a split, or None: names}
    for name in pictures:
        below[next((part for part in name.lower().split('/')[:-1] if part in SPLIT_FOLDERS), None)].append(name)
    test = next((folder for folder in SPLIT_FOLDERS[1:] if folder in below), None)
    if 'train' in below and test:
        print(f"'{voc_path}' has no lists: train/ is for training, {test}/ for testing, all else is left out")
        return [below['train'], below[test]]
    if not with_test:
        return [list(pictures), []]
    test = [name for name in pictures if name in annotations][::5]
    print(f"'{voc_path}' has no lists (ImageSets/Main/trainval.txt and test.txt): every fifth picture is for testing, "
          f'{len(test):,} of them. Write lists if pictures belong together: all frames of a video must be in one split')
    return [sorted(pictures.keys() - set(test)), test]


def read_folder(voc_path, label_map, findings, keep_unannotated=False, with_test=True) -> list[list[tuple]]:
    """Return a folder's pictures for training and, with_test, for testing, each as (absolute path, (width, height),
    objects). What is odd or wrong is added to the findings."""
    voc_path = Path(voc_path).resolve()
    require(voc_path.is_dir(), f"the folder '{voc_path}' isn't there: set the path to where VOC is, or set download")
    folders = [voc_path / 'JPEGImages', voc_path / 'Annotations']
    if not all(folder.is_dir() for folder in folders):
        folders = [voc_path, voc_path]  # then each XML file is beside its picture
    pictures, annotations = find_files(folders[0], PICTURE_SUFFIXES), find_files(folders[1], ('.xml',))
    require(pictures.keys() & annotations.keys(),
            f"'{voc_path}' has {len(pictures):,} pictures and {len(annotations):,} XML files, but none has a picture's "
            'name: export your annotations as Pascal VOC, and name the folders JPEGImages and Annotations')
    splits = split_names(voc_path, pictures, annotations, with_test)
    splits = splits if with_test else splits[:1]
    names = dict.fromkeys(chain(*splits))
    usable = {}
    for name in tqdm(names, desc=voc_path.name, unit=' pictures'):
        path, *others = pictures.get(name, [str(folders[0] / name)])
        if name in pictures and name not in annotations and not keep_unannotated:
            findings.notes['pictures have no XML file and are left out (--keep_unannotated takes them as pictures '
                           'without objects)'].append(f"'{path}'")
            continue
        try:
            require(not others, f"pictures '{path}' and '{some(others)}' have the same name: rename one")
            size = picture_size(path, decode=True)
            objects = {'boxes': [], 'labels': [], 'difficulties': []}
            if name in annotations:
                objects = parse_annotation(annotations[name][0], label_map, size, findings)
            usable[name] = path, size, objects
        except InputError as error:
            findings.faults.append(str(error).rpartition(': ')[0])  # without its advice
    orphans = [f"'{paths[0]}'" for name, paths in annotations.items() if name not in pictures and name not in names]
    if orphans:
        findings.notes['XML files have no picture of that name'] += orphans
    return [[usable[name] for name in names if name in usable] for names in splits]


def create_data_lists(voc07_path, voc12_path, output_folder, labels=voc_labels, skip_empty=False,
                      keep_unannotated=False):
    """Read annotations in VOC's format and write five JSON files for PascalVOCDataset.

    TRAIN_images.json and TEST_images.json list the pictures' absolute paths. TRAIN_objects.json and TEST_objects.json
    list their objects in the same order, as `parse_annotation` returns them. label_map.json is the label map.

    :param voc07_path: folder with pictures for training and for testing; see `split_names`
    :param voc12_path: another folder, or a list of folders, whose training pictures are added; or None
    :param labels: names of the classes, VOC's or others
    :param skip_empty: leave out training pictures without an object of these classes
    :param keep_unannotated: take pictures without an XML file as pictures without objects
    :return: the training objects: boxes in fractional boundary coordinates (n, 4), labels (n)

    Raises InputError, before anything is written, if folders, files or pictures are missing or broken.
    """
    findings = Findings()
    labels = [label.strip() for label in labels]
    require(labels and all(labels) and len({'background', *map(str.lower, labels)}) == len(labels) + 1,
            f"labels must be names that differ, none of them 'background', not {', '.join(labels) or 'none at all'}")
    label_map = make_label_map(labels)
    train, test = read_folder(voc07_path, label_map, findings, keep_unannotated)
    for path in [voc12_path] if isinstance(voc12_path, (str, Path)) else voc12_path or []:
        train += read_folder(path, label_map, findings, keep_unannotated, with_test=False)[0]

    in_both = sorted({f"'{path}'" for path, *_ in train} & {f"'{path}'" for path, *_ in test})
    if in_both:
        findings.notes['test pictures are training pictures, too: the mAP will be too high'] = in_both
    for remark, cases in findings.notes.items():
        warnings.warn(f'{len(cases):,} {remark}: {some(cases)}')
    n_faults = len(findings.faults)
    require(not n_faults, f"of {len(train) + len(test) + n_faults:,} pictures {n_faults:,} can't be used: "
                          f'{some(findings.faults)}: repair them (texts as UTF-8), replace them or leave them out')
    for name, pictures in (('trainval.txt', train), ('test.txt', test)):
        advice = 'extract both archives of VOC 2007 there' if Path(voc07_path).name == 'VOC2007' else 'name some in it'
        require(pictures, f"there is no annotated picture for {Path(voc07_path, 'ImageSets', 'Main', name)}: {advice}")
    others = ', '.join(f'{label} ({count:,})' for label, count in findings.labels.most_common()
                       if label.lower() not in map(str.lower, labels))
    n_empty = sum(not objects['boxes'] for *_, objects in train)
    require(n_empty < len(train), f'no training picture has an object of {", ".join(labels)}: set labels to those of '
                                  f'the annotations (others there: {others or "none"})')
    if skip_empty:
        train = [picture for picture in train if picture[2]['boxes']]

    write_data_lists(output_folder, label_map, TRAIN=train, TEST=test)
    if n_empty:
        print(f'{n_empty:,} training pictures have no object of these labels: ' + ('left out' if skip_empty else (
            "they teach nothing without train.py's min_negatives; --skip_empty leaves them out")))
    if others:
        print(f'Left out the objects of other labels: {others}')

    boxes = [[x_min / width, y_min / height, x_max / width, y_max / height] for _, (width, height), objects in train
             for x_min, y_min, x_max, y_max in objects['boxes']]
    indices = [index for *_, objects in train for index in objects['labels']]
    return torch.tensor(boxes), torch.tensor(indices)  # (n, 4), (n)


def write_data_lists(output_folder, label_map, **pictures):
    """Write label_map.json and the two lists of each split, given as {split: what `read_folder` returns}."""
    files = {'label_map': label_map}
    for split, entries in pictures.items():
        paths, _, objects = zip(*entries)
        files |= {f'{split}_images': paths, f'{split}_objects': objects}
        n_objects = sum(len(of_picture['boxes']) for of_picture in objects)
        print(f'{split}: {len(paths):,} pictures with {n_objects:,} objects')
    make_folder(output_folder)
    with ExitStack() as stack:  # no file is replaced until all are written: old and new ones never mix
        for name, content in files.items():
            file = stack.enter_context(replaced_file(Path(output_folder, f'{name}.json')))
            file.write(json.dumps(content).encode())
            file.flush()
    print(f"The data lists are in '{Path(output_folder).resolve()}'")


# -------------------------------------------------------------------------------------------- transforms
#
# Zooming out shows a picture through a window larger than the picture; zooming in (cropping), through a smaller one.
# Both only choose a rectangle (left, top, right, bottom) in the picture's own pixel coordinates, where `right` and
# `bottom` are the first column and row outside. So all geometry is computed for this window and the boxes; pixels are
# touched once, at the end.

IMAGE_SIZE = 300  # width and height of the image that SSD300 sees, in pixels
IMAGENET_MEAN = [0.485, 0.456, 0.406]  # of the pictures that the VGG base was trained with, RGB in [0, 1]
IMAGENET_STD = [0.229, 0.224, 0.225]


def adjust_contrast(image, factor):
    """Multiply the contrast of an image (3, height, width) with values in [0, 1] by a factor.

    Does what torchvision's adjust_contrast does, but always adds up the pixels in the same order: row by row. The last
    digits of a whole image's sum depend on the number of threads.
    """
    mean = TF.rgb_to_grayscale(image).mean(dim=-1).mean()
    return (mean + factor * (image - mean)).clamp(0, 1)


def shift_hue(image, shift):
    """Shift the hue of an image (3, height, width) with values in [0, 1] by a fraction of the color circle.

    Does what torchvision's adjust_hue does, several times faster. On the circle, from 0 to 6, red is at 0, green at 2
    and blue at 4. Whatever the hue, a channel is high within 1 of its place and low beyond 2.
    """
    red, green, blue = image  # each (height, width), like everything up to the last line
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    hue = torch.where(high == red, green - blue,
                      torch.where(high == green, blue - red + 2 * chroma, red - green + 4 * chroma))
    hue = hue / chroma.clamp(min=1e-8) + 6 * shift  # a gray pixel has no hue, and no chroma to show it
    hue = hue - 6 * (hue / 6).floor()  # back into [0, 6)
    return torch.stack((low + chroma * ((hue - 3).abs() - 1).clamp(0, 1),
                        low + chroma * (2 - (hue - 2).abs()).clamp(0, 1),
                        low + chroma * (2 - (hue - 4).abs()).clamp(0, 1)))  # (3, height, width)


# The functions and the ranges of their factors, as in the Caffe code.
DISTORTIONS = ((TF.adjust_brightness, 0.5, 1.5), (adjust_contrast, 0.5, 1.5),
               (TF.adjust_saturation, 0.5, 1.5), (shift_hue, -18 / 255, 18 / 255))


def photometric_distort(image):
    """Change brightness, contrast, saturation and hue of an image (3, height, width) with values in [0, 1] in place:
    each with a probability of 50%, in random order."""
    for adjust, low, high in random.sample(DISTORTIONS, len(DISTORTIONS)):
        if random.random() < 0.5:
            image.copy_(adjust(image, random.uniform(low, high)))


def zoom_out(width, height) -> tuple[int, int, int, int]:
    """Return a window 1 to 4 times as wide and high as a picture, with the picture at a random place inside it. This
    teaches the network small objects (paper, section 3.6)."""
    scale = random.uniform(1, 4)
    window_width = int(scale * width)
    window_height = int(scale * height)
    left = random.randint(0, window_width - width)
    top = random.randint(0, window_height - height)
    return -left, -top, window_width - left, window_height - top


def random_crop(window, boxes):
    """Zoom in: choose a smaller window inside the given one. This teaches the network large objects and parts of
    objects (paper, section 2.2, "data augmentation").

    Objects whose center is outside are dropped. At least one of the others overlaps the crop by a minimum, which is
    chosen at random. If the choice is no minimum (1 in 7) or there is no object, the window stays as it is.

    :param boxes: objects in the picture's absolute boundary coordinates (n, 4)
    :return: the window; the boxes in it (m, 4), clipped at its edges; which of the n objects they are, bool (n)
    """
    start, end = torch.tensor(window).view(2, 2)  # (2): left and top; (2): right and bottom
    size = end - start  # (2): width and height
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2  # (n, 2)
    while True:
        min_overlap = random.choice((None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9))
        if min_overlap is None or len(boxes) == 0:
            return window, boxes, torch.ones(len(boxes), dtype=torch.bool)

        # Make fifty tries at once and take the first good one. If none is good, choose another minimum.
        crop_size = (size * torch.empty(50, 2).uniform_(0.3, 1)).long()  # (50, 2): width and height
        room = size - crop_size  # (50, 2)
        first = start + (torch.rand(50, 2) * (room + 1)).long().minimum(room)  # (50, 2): left and top
        last = first + crop_size - 1  # (50, 2): the last column and row inside
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


def render_window(picture, window=None, mirror=False, distort=False, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Render the part of a picture inside a window as a normalized tensor.

    :param picture: PIL image, mode RGB
    :param window: (left, top, right, bottom) in the picture's pixels; None: the whole picture
    :param mirror: flip it left to right
    :param distort: change its colors at random
    :return: (3, 300, 300), RGB in [0, 1] normalized by mean and standard deviation
    """
    left, top, right, bottom = window or (0, 0, *picture.size)
    visible = (max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height))

    # The place of the visible part among the 300×300 pixels: whole pixels, at least one.
    def place(low, high, start, end):
        first = min(round((low - start) / (end - start) * IMAGE_SIZE), IMAGE_SIZE - 1)
        return first, max(round((high - start) / (end - start) * IMAGE_SIZE), first + 1)

    x1, x2 = place(visible[0], visible[2], left, right)
    y1, y2 = place(visible[1], visible[3], top, bottom)
    part = picture.resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR, box=visible)
    if mirror:
        part = ImageOps.mirror(part)
        x1, x2 = IMAGE_SIZE - x2, IMAGE_SIZE - x1

    # The picture is surrounded by the mean color, which normalization makes 0. Pixels are changed in place: allocating
    # copies of a megabyte each would take longer than filling them.
    canvas = torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)
    pixels = canvas[:, y1:y2, x1:x2]  # (3, y2 − y1, x2 − x1), a view
    pixels.copy_(TF.pil_to_tensor(part)).div_(255)  # in [0, 1]
    if distort:
        photometric_distort(pixels)
    TF.normalize(pixels, mean, std, inplace=True)
    return canvas


def transform(image, boxes, labels, difficulties, split, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Prepare a picture and its objects for the network; for training, change them at random.

    :param image: PIL image, mode RGB
    :param boxes: absolute boundary coordinates (n, 4); the last pixel of each side belongs to the object
    :param labels, difficulties: (n) each
    :param split: 'TRAIN' zooms out, crops, mirrors and distorts colors; 'TEST' only resizes
    :param mean, std: the normalization that the network expects, RGB in [0, 1]
    :return: image (3, 300, 300), boxes in fractional boundary coordinates (m, 4), labels (m), difficulties (m). A crop
        may drop objects, but never all of them. The arguments stay unchanged.
    """
    if split not in ('TRAIN', 'TEST'):
        raise ValueError(f"split must be 'TRAIN' or 'TEST', not {split!r}")
    window = (0, 0, *image.size)
    mirror = False
    if split == 'TRAIN':
        if random.random() < 0.5:
            window = zoom_out(*image.size)
        window, boxes, kept = random_crop(window, boxes)
        labels, difficulties = labels[kept], difficulties[kept]
        mirror = random.random() < 0.5

    image = render_window(image, window, mirror, distort=split == 'TRAIN', mean=mean, std=std)

    left, top, right, bottom = window
    width, height = right - left, bottom - top
    boxes = boxes - torch.tensor([left, top, left, top])  # now in the window's own pixel coordinates
    if mirror:
        x_min, y_min, x_max, y_max = boxes.unbind(dim=1)
        # Pixel 0 becomes the last one, width − 1, and the right side becomes the left one.
        boxes = torch.stack((width - 1 - x_max, y_min, width - 1 - x_min, y_max), dim=1)
    boxes = boxes / torch.tensor([width, height, width, height])  # fractional
    return image, boxes, labels, difficulties


# -------------------------------------------------------------------------------------------- evaluation

def match_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
                     min_overlaps=(0.5,)):
    """Tell true detections from false ones by the rules of VOC 2007's development kit.

    A detection is compared with the object of its picture and class that it overlaps most. It is true if this overlap
    exceeds a minimum, 0.5 in VOC, and if no detection with a higher score has found the same object. A detection of a
    difficult object is neither true nor false and is left out.

    :param min_overlaps: the minimums to apply, one after the other; for the other arguments see `calculate_mAP`
    :return: for each minimum, the detections that count, highest score first: labels (d), scores (d), whether true,
        bool (d); on the CPU
    """
    # For each detection: its highest overlap with an object, and the number of that object.
    highest_overlaps, best_objects, n_objects = [], [], 0
    for boxes, labels, objects, object_labels in zip(det_boxes, det_labels, true_boxes, true_labels):
        if len(objects) > 0:
            overlap = find_jaccard_overlap(boxes, objects)  # (n_detections, n_objects)
            overlap = overlap.masked_fill(labels[:, None] != object_labels, 0)  # only objects of its class
            overlap, best_object = overlap.max(dim=1)  # (n_detections)
        else:
            overlap = torch.zeros_like(labels, dtype=torch.float)
            best_object = torch.zeros_like(labels)
        highest_overlaps.append(overlap)
        best_objects.append(best_object + n_objects)  # numbers count through all pictures
        n_objects += len(objects)

    # All pictures together, highest score first. A stable sort: equal scores stay in the order of the pictures.
    scores, order = torch.cat(det_scores).cpu().sort(descending=True, stable=True)  # (D)
    labels = torch.cat(det_labels).cpu()[order]  # (D)
    highest_overlaps = torch.cat(highest_overlaps).cpu()[order]  # (D)
    best_objects = torch.cat(best_objects).cpu()[order]  # (D)
    difficult = torch.cat(true_difficulties).tolist()

    matches = []
    for min_overlap in min_overlaps:
        true = torch.zeros(len(scores), dtype=torch.bool)  # (D): a detection that finds no object is false
        counts = torch.ones(len(scores), dtype=torch.bool)  # (D)
        hits, = (highest_overlaps > min_overlap).nonzero(as_tuple=True)  # (n_hits): detections that find an object
        found = set()
        for detection, best_object in zip(hits.tolist(), best_objects[hits].tolist()):
            if difficult[best_object]:
                counts[detection] = False
            elif best_object not in found:  # otherwise it is a duplicate, and false
                true[detection] = True
                found.add(best_object)
        matches.append((labels[counts], scores[counts], true[counts]))
    return matches


def average_precision(true, n_objects) -> float:
    """Return the 11-point interpolated average precision of VOC 2007.

    :param true: whether each detection of a class is true, highest score first, bool (d)
    :param n_objects: how many objects could be found
    :return: the mean, over the recalls 0, 0.1, …, 1, of the highest precision at this recall or a higher one; nan if
        there are no objects
    """
    if n_objects == 0:
        return math.nan
    n_true = true.cumsum(dim=0)  # (d): among the best 1, 2, …, d detections
    precision = n_true.double() / torch.arange(1, len(true) + 1, device=true.device)  # (d)
    total = 0.0
    for t in range(11):
        # Compare the recall n_true / n_objects with t / 10 in whole numbers. Rounding could keep 3 of 10 from 0.3.
        reached = precision[10 * n_true >= t * n_objects]
        if len(reached) > 0:
            total += reached.max().item()
    return total / 11


def rank_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
                    label_map=label_map, min_overlaps=(0.5,)) -> list[dict[str, tuple]]:
    """Rank the detections of each class. Precision and recall follow from this ranking; see `match_detections`.

    :return: for each minimum overlap {label: (scores (d), whether true, bool (d), number of objects)}, highest score
        first, without the detections that don't count. A warning names the classes without objects.
    """
    countable = torch.cat(true_labels)[~torch.cat(true_difficulties).bool()]  # labels of objects that count
    n_objects = {label: int((countable == index).sum()) for label, index in label_map.items() if index > 0}
    missing = [label for label, n in n_objects.items() if n == 0]
    if missing:
        warnings.warn(f'no objects to be found of {", ".join(missing)}: no AP, left out of the mean')
    ranked = []
    for labels, scores, true in match_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels,
                                                 true_difficulties, min_overlaps):
        classes = {}
        for label, n in n_objects.items():
            of_class = labels == label_map[label]  # (d)
            classes[label] = scores[of_class], true[of_class], n
        ranked.append(classes)
    return ranked


def mean_of_classes(values) -> float:
    """Return the mean over the classes that have a value. The value of a class without objects is nan."""
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def calculate_mAP(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
                  label_map=label_map) -> tuple[dict[str, float], float]:
    """Return the average precision of each class and their mean by VOC 2007's rules (development kit, section 4.4).

    All arguments but the last are lists with one tensor per picture. Of its detections: boxes in boundary coordinates
    (d, 4), labels (d), scores (d). Of its objects: boxes (n, 4), labels (n), difficulties (n).

    :return: {label: AP}, mAP. A class without objects (difficult ones don't count) has no AP: it is nan, stays out of
        the mean, and is named in a warning.
    """
    ranked, = rank_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
                              label_map)
    precisions = {label: average_precision(true, n) for label, (_, true, n) in ranked.items()}
    return precisions, mean_of_classes(precisions.values())


# ------------------------------------------------------------------------------------------- checkpoints

def make_folder(path):
    """Make a folder for results, unless it exists. Raises InputError if nothing can be written to it: better now than
    after hours of training."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't make the folder '{path}' ({error.strerror}): choose another one") from None
    require(os.access(path, os.W_OK), f"can't write to the folder '{path}': choose another one")


@contextmanager
def only_warn():
    """Turn an error in writing a file that isn't essential into a warning."""
    try:
        yield
    except (InputError, OSError) as error:
        warnings.warn(str(error))


@contextmanager
def replaced_file(path):
    """Yield a binary file to write to. It replaces `path` when it is complete and on the disk: even after a kill or a
    power failure, `path` is either the old file or the new one. Raises InputError if it can't be written."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')  # in the same folder: a rename can't cross file systems
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError, ValueError):
            temporary.unlink()
        # torch.save hides a full disk or Ctrl-C as the context of a RuntimeError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, (OSError, UnicodeError)):
            reason = getattr(cause, 'strerror', None) or cause
            raise InputError(f"can't write '{path}' ({reason}): make room or choose another place; what was there "
                             'before is unchanged') from None
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise


def save_checkpoint(path, epoch, model, optimizer, label_map, settings, scaler=None, log=()):
    """Save a training run after `epoch` finished epochs, in plain containers that torch.load(path, weights_only=True)
    loads: no code is saved. Raises InputError if the file can't be written.

    :param scaler: the GradScaler of training in float16
    :param log: a list with a dict of figures for each epoch
    """
    with replaced_file(path) as file:
        torch.save({'format': 3, 'epoch': epoch, 'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
                    'scaler': scaler.state_dict() if scaler else {}, 'log': list(log), 'label_map': label_map,
                    'settings': settings, 'priors_cxcy': model.priors_cxcy, 'image_mean': list(model.image_mean),
                    'image_std': list(model.image_std), 'clip_boxes': model.clip_boxes}, file)


def download_weights(source, instead) -> dict:
    """Return the state dict of torchvision's weights `source`, downloaded once. Raises InputError if that fails."""
    try:
        return source.get_state_dict(progress=True, check_hash=True, map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{source.url} can't be downloaded ({error}): {instead}, or put that file into "
                         f'{torch.hub.get_dir()}/checkpoints') from None


def read_checkpoint_file(path):
    """Return the content of a file that torch.save wrote, ours or another project's, with its tensors on the CPU. Never
    runs code from the file. Raises InputError if the file is missing, damaged or something else."""
    try:
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith('/constants.pkl') for name in names):
            raise ValueError('a TorchScript archive')  # a program, which torch.load would start
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except (pickle.UnpicklingError, RuntimeError):
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # that the source code of the original's classes is missing
                content = torch.load(path, map_location='cpu', weights_only=False, pickle_module=InertPickle)
            if isinstance(content['model'], StandIn):
                return original_checkpoint(content)
            return {'model': content['model']}  # without the objects beside it, because of which weights_only refused
    except FileNotFoundError:
        raise InputError(f"checkpoint '{path}' isn't there: train one with train.py, or name another one") from None
    except Exception as error:  # a damaged file may raise anything
        reason = (error.strerror if isinstance(error, OSError) and error.filename
                  else "it is damaged or wasn't written by train.py")
        raise InputError(f"checkpoint '{path}' can't be loaded: {reason}") from None


def load_checkpoint(path) -> dict:
    """Return the content of a checkpoint that `save_checkpoint` or, converted, the original tutorial's code wrote."""
    content = read_checkpoint_file(path)
    require(is_checkpoint(content), f"'{path}' isn't a checkpoint of this project: choose one that train.py wrote")
    if 'log' not in content:  # older versions kept the log beside the checkpoint, and gave decay_lr_at in epochs
        content.update(log=read_log(Path(path).with_name('training_log.csv'), content['epoch']), scaler={})
        settings = content.get('settings', {})
        if any(epoch > 1 for epoch in settings.get('decay_lr_at', ())):
            settings['decay_lr_at'] = [epoch / settings['epochs'] for epoch in settings['decay_lr_at']]
    return content


def read_log(path, n_epochs) -> list[dict]:
    """Return the lines of a training_log.csv for the first epochs; none if it is missing or damaged."""
    try:
        lines = [{'mAP': None, **{name: float(value) if value else None for name, value in line.items()}}
                 for line in csv.DictReader(path.read_text().splitlines())]
        return [line | {'epoch': int(line['epoch'])} for line in lines if line['epoch'] <= n_epochs]
    except (OSError, LookupError, TypeError, ValueError):
        return []


def is_checkpoint(content) -> bool:
    """Return whether the content of a file has the parts of a checkpoint. Its weights may still not fit."""
    parts = ('model', 'label_map', 'optimizer', 'settings')
    return (isinstance(content, dict) and {'epoch', 'model', 'label_map'} <= content.keys()
            and all(isinstance(content.get(name, {}), dict) for name in parts))


def check_label_map(checkpoint_label_map, data_label_map):
    """Raise InputError, showing both, if a checkpoint and the data lists have different classes."""
    require(checkpoint_label_map == data_label_map,
            f'the checkpoint has the classes {checkpoint_label_map} but the data lists have {data_label_map}: use '
            'data lists and a checkpoint that belong together')


# The original tutorial's code pickled the whole network and optimizer, and its published weights (77.2 mAP) are stored
# like that. Unpickling calls whatever a file names. So only the names that tensors need are resolved. All others become
# stand-ins, of which only the parameters are used.
RESOLVED = {('torch._utils', '_rebuild_tensor'), ('torch._utils', '_rebuild_tensor_v2'),
            ('torch._utils', '_rebuild_parameter'), ('torch.nn.parameter', 'Parameter'),
            ('collections', 'OrderedDict')}


class StandIn(dict):
    """Stands in for any class or function: does nothing when called, and keeps an object's state."""

    def __init__(self, *args):
        """Keep dict from reading the arguments."""

    def __setstate__(self, state):
        self.state = state

    __hash__ = object.__hash__  # the optimizer's state has objects as keys


class InertPickle:
    """Stands in for the module pickle in torch.load."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) in RESOLVED:
                return super().find_class(module, name)
            return type(name, (StandIn,), {})

    @staticmethod
    def load(file, **options):
        return InertPickle.Unpickler(file, **options).load()


def original_checkpoint(content) -> dict:
    """Convert a checkpoint of the original tutorial's code to the form of ours, without a training state."""
    def parameters(module, prefix=''):
        for name, parameter in module.state['_parameters'].items():
            yield prefix + name, parameter.detach()
        for name, child in module.state['_modules'].items():
            yield from parameters(child, f'{prefix}{name}.')

    return {'epoch': content['epoch'] + 1,  # it holds the last epoch's number, counted from 0
            'model': dict(parameters(content['model'])), 'label_map': dict(label_map)}


# --------------------------------------------------------------------------------------- script settings

def current_settings(script) -> dict:
    """Return {name: value} of a script's annotated constants, in the plain types that a checkpoint may hold."""
    settings = {name: getattr(script, name) for name in typing.get_type_hints(script)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


def as_flags(settings) -> str:
    """Return settings in the form in which they are typed on a command line."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f'--{name}' if value else f'--no-{name}')
        else:
            flags += [f'--{name}', *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(flags)


def check_ranges(script, **ranges):
    """Raise InputError unless each of a script's settings is in its range (lowest, highest), or None."""
    for name, (lowest, highest) in ranges.items():
        value = getattr(script, name)
        wanted = f'at least {lowest}' if highest == math.inf else f'between {lowest} and {highest}'
        require(value is None or (lowest <= value <= highest and value < math.inf),
                f'{name} must be {wanted}, not {value}')


def choose_device(name) -> torch.device:
    """Return the device of this name; 'auto': CUDA if there is a GPU, else the CPU. Raises InputError if it can't be
    used."""
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except Exception as error:  # each kind of device has its own errors
        raise InputError(f"device '{name}' can't be used here ({str(error).splitlines()[0]}): choose 'auto', 'cpu' or "
                         'another PyTorch device') from None


def choose_dtype(device, precision) -> torch.dtype:
    """Return the type in which a device computes convolutions: 'float32', 'bfloat16', 'float16' or, for 'auto', the
    best that its hardware supports. Raises InputError for others: emulated, they take ten times as long as float32."""
    if device.type == 'cuda':
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        float16 = torch.cuda.get_device_capability(device) >= (7, 0)  # from V100 and T4 on
    else:
        capabilities = getattr(torch.cpu, 'get_capabilities', dict)()  # older versions of PyTorch lack it
        bfloat16 = device.type == 'cpu' and any(capabilities.get(name) for name in ('avx512_bf16', 'amx_bf16'))
        float16 = False
    supported = {'bfloat16': bfloat16, 'float16': float16, 'float32': True}  # the best first
    require(precision in ('auto', *supported),
            f"precision must be one of auto, {', '.join(supported)}, not '{precision}'")
    if precision == 'auto':
        precision = next(name for name in supported if supported[name])
    require(supported[precision],
            f"precision '{precision}' has no hardware support on this {device.type}: choose 'auto' or 'float32'")
    return getattr(torch, precision)


def autocast(device, dtype):
    """Return the context in which a network computes in this type wherever that is safe (mixed precision)."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def place_network(model, device, dtype, training=False):
    """Move a network to a device and put its convolutions in the memory format that is fastest there."""
    model.to(device)
    # That is channels last, except for float32 training on a CPU without AVX-512, which computes weight gradients four
    # times as fast in the ordinary format (measured on an AMD EPYC 7003). With AVX-512, channels last saves 15%.
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith('AVX512')
    if not (training and device.type == 'cpu' and dtype == torch.float32 and not has_avx512):
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):  # only these: DDP would warn about rescale_factors
                module.to(memory_format=torch.channels_last)


def several_processes() -> bool:
    """Return whether this is one of several processes that train or evaluate together."""
    return distributed.is_available() and distributed.is_initialized()


def mean_over_processes(count):
    """Average a number of positives over the training processes, each of which has a part of the batch. Their total
    counts as at least 1: without positives, the loss must not be divided by 0."""
    if not several_processes():
        return count.clamp(min=1)
    distributed.all_reduce(count)  # now the total
    return count.clamp(min=1) / distributed.get_world_size()  # DistributedDataParallel averages the gradients likewise


def join_processes(device_name) -> tuple[int, int, torch.device]:
    """Return the rank of this process, the number of processes, and its device. If torchrun started several, only the
    first prints."""
    device = choose_device(device_name)
    if 'LOCAL_RANK' not in os.environ:
        return 0, 1, device
    if device.type == 'cuda':
        local_rank, n_gpus = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        require(local_rank < n_gpus, f'there are {n_gpus} GPUs: start torchrun with --nproc_per_node={n_gpus} or less')
        device = torch.device('cuda', local_rank)
        torch.cuda.set_device(device)
    backend = 'nccl' if device.type == 'cuda' and distributed.is_nccl_available() else 'gloo'
    # Hours, since the others wait while the first process downloads weights or computes the mAP.
    distributed.init_process_group(backend, timeout=timedelta(hours=2))
    rank, n_processes = distributed.get_rank(), distributed.get_world_size()
    if rank > 0:
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115
    return rank, n_processes, device


class CtrlC:
    """Within `with CtrlC():`, only note the first Ctrl-C, so that a script can stop between two batches. A
    KeyboardInterrupt anywhere else can leave workers behind that wait forever."""

    pressed = False

    def __enter__(self):
        CtrlC.pressed = False
        self.process, self.before = os.getpid(), signal.signal(signal.SIGINT, self.note)

    def __exit__(self, kind, error, _):
        signal.signal(signal.SIGINT, self.before)
        # After Ctrl-C, a process or worker that stops first breaks the connection of the others.
        if CtrlC.pressed and isinstance(error, RuntimeError):
            raise KeyboardInterrupt from None

    def note(self, signal_number, frame):
        if os.getpid() != self.process:
            return  # a worker that is just starting
        if 'LOCAL_RANK' not in os.environ:  # torchrun repeats the signal by itself
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if not CtrlC.pressed and int(os.environ.get('RANK', 0)) == 0:  # print() isn't safe in a signal handler
            os.write(2, b'\nStopping after this step; press Ctrl-C again to stop at once\n')
        CtrlC.pressed = True


def until_ctrl_c(batches):
    """Yield batches, but raise KeyboardInterrupt before the next one once Ctrl-C was pressed."""
    for batch in batches:
        if CtrlC.pressed:
            raise KeyboardInterrupt
        yield batch


def ignore_ctrl_c(worker_id):
    """Ignore Ctrl-C in a DataLoader's worker. Terminals send it to workers, too; these end with the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def way_back(run):
    """If a training ends early, print the command that resumes it. `run` has `last_saved` (its last checkpoint, or
    None), `n_saved` (the number of saved epochs), and `is_main` (whether this process speaks for the others)."""
    try:
        with CtrlC():
            yield
    except (Exception, KeyboardInterrupt) as error:
        reason = explain(error)
        if reason is None or not run.is_main:
            raise
        way = f'To resume after epoch {run.n_saved}:' if run.n_saved else 'Nothing is saved yet. To start again:'
        command = command_to_resume(run.last_saved, **getattr(error, 'changes', {}))
        sys.exit(f'{reason.removesuffix(".")}. {way}\n{command}')


def command_to_resume(checkpoint, **changes) -> str:
    """Return the command that started this script, with settings changed, so that it resumes from a checkpoint or, if
    that is None, starts the same run again."""
    arguments = sys.argv[1:]
    if checkpoint:
        changes['checkpoint'] = str(checkpoint)
        arguments = [argument for argument in arguments if argument != '--overwrite']
    for name in changes:
        while f'--{name}' in arguments:
            place = arguments.index(f'--{name}')
            del arguments[place:place + 2]
        arguments = [argument for argument in arguments if not argument.startswith(f'--{name}=')]
    n_processes, n_here = os.environ.get('WORLD_SIZE'), os.environ.get('LOCAL_WORLD_SIZE')
    if n_processes != n_here:  # on several machines
        return f'the same torchrun command with {as_flags(changes)}'
    start = sys.orig_argv[:len(sys.orig_argv) - len(sys.argv) + 1]  # like python train.py
    if n_here:
        start = ['torchrun', f'--nproc_per_node={n_here}', sys.argv[0]]
    quote = subprocess.list2cmdline if os.name == 'nt' else shlex.join
    return f'{quote([*start, *arguments])} {as_flags(changes)}'.strip()


def override_settings(script):
    """Set a script's annotated constants from the command line: `batch_size: int = 8` becomes `--batch_size 4`.

    Types may be int, float, str, bool (`--augment`, `--no-augment`), `X | None` (`--grad_clip None`) and `list[X]`
    (`--labels cat dog`). `--help` shows each setting with its default and its comment.
    """
    parser = argparse.ArgumentParser(description=script.__doc__, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,  # settings not given stay as they are
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f'{parser.prog}: {message}; --help lists the settings\n')
    comments = dict(re.findall(r'^(\w+): .*?  # (.*)$', inspect.getsource(script), re.MULTILINE))
    for name, kind in typing.get_type_hints(script).items():
        optional = type(None) in typing.get_args(kind)  # X | None
        kind = typing.get_args(kind)[0] if optional else kind
        many = typing.get_origin(kind) is list  # list[X]
        kind = typing.get_args(kind)[0] if many else kind
        text = f'{comments.get(name, "")} (default: {getattr(script, name)})'.replace('%', '%%')
        if kind is bool:
            parser.add_argument(f'--{name}', action=argparse.BooleanOptionalAction, help=text)
            continue

        def convert(value, kind=kind, optional=optional):
            return None if optional and value == 'None' else kind(value)

        convert.__name__ = kind.__name__  # for argparse's "invalid int value: 'x'"
        parser.add_argument(f'--{name}', type=convert, nargs='*' if many else None, help=text,
                            metavar=kind.__name__.upper())
    for name, value in vars(parser.parse_args()).items():
        setattr(script, name, None if value == [None] else value)


def explain(error) -> str | None:
    """Return the message for an error about which the user can do something; None for any other."""
    if isinstance(error, KeyboardInterrupt):
        return 'Stopped.'
    if isinstance(error, BrokenPipeError):
        return 'Error: the program that read the output has ended'
    text = str(error)
    if isinstance(error, InputError):
        # From a DataLoader's worker it arrives inside that worker's traceback; the last line is ours.
        return 'Error: ' + text.splitlines()[-1].removeprefix('utils.InputError: ')
    if isinstance(error, getattr(torch, 'OutOfMemoryError', torch.cuda.OutOfMemoryError)):
        return "Error: out of memory on the device: lower batch_size, or set precision to 'auto'"
    if isinstance(error, RuntimeError) and ('shared memory' in text or 'shm' in text):
        return ('Error: there is too little shared memory for the workers: set workers to 0 or, in Docker, start the '
                'container with --shm-size=1g')
    return None


def run_script(script):
    """Run a script's main() with the settings from the command line. An error that the user can fix ends the program
    with one sentence and exit status 1."""
    if hasattr(sys.stdout, 'reconfigure'):  # a notebook's stdout isn't a file
        sys.stdout.reconfigure(errors='backslashreplace')  # an unprintable file name must not end a run
    override_settings(script)
    warnings.formatwarning = lambda message, *_, **__: f'Warning: {message}\n'
    try:
        script.main()
        print(end='', flush=True)
    except BrokenPipeError:  # the reader of the output, like `head`, has ended; eval.py and detect.py print last
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        if explain(error) is None:
            raise
        sys.exit(explain(error))
