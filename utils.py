"""What the scripts share besides the network: the code of SSD that works on boxes, pictures and files.

Chapters, in reading order: labels · boxes · data lists · transforms · evaluation · checkpoints · script settings.

Three forms of a box occur, always as the last dimension (of size 4) of a tensor:

- boundary coordinates (x_min, y_min, x_max, y_max), in the comments "xy";
- center-size coordinates (c_x, c_y, w, h), "cxcy";
- offsets (g_c_x, g_c_y, g_w, g_h) of such a box from a prior, "gcxgcy".

Coordinates are fractions of the picture's width and height. Only annotations and the input of `transform`
count pixels ("absolute" coordinates).
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
    """Something that the user gave is missing, unreadable or wrong. The message is one sentence that names
    it and says what to do. `run_script` prints it instead of a traceback."""


def require(condition, message):
    """Raises InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


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

    The distance of the centers is measured in units of the prior's size, the size as the logarithm of its
    ratio to the prior's. The factors 10 and 5 aren't in the paper: they are the "variances" 0.1 and 0.2 of
    the authors' Caffe code, which bring all four offsets to about the same spread.
    """
    return torch.cat(((cxcy[..., :2] - priors_cxcy[..., :2]) / (priors_cxcy[..., 2:] / 10),  # g_c_x, g_c_y
                      torch.log(cxcy[..., 2:] / priors_cxcy[..., 2:]) * 5), dim=-1)  # g_w, g_h


# The largest log(w / ŵ) that is decoded, as in torchvision: 62.5 times the prior, far beyond any image.
# Without a limit, exp() could turn one wild prediction into infinity.
MAX_LOG_RATIO = math.log(1000 / 16)


def gcxgcy_to_cxcy(gcxgcy, priors_cxcy):
    """The inverse of `cxcy_to_gcxgcy`: offsets (…, 4) back to center-size coordinates (…, 4)."""
    log_ratio = (gcxgcy[..., 2:] / 5).clamp(max=MAX_LOG_RATIO)
    return torch.cat((gcxgcy[..., :2] * priors_cxcy[..., 2:] / 10 + priors_cxcy[..., :2],  # c_x, c_y
                      torch.exp(log_ratio) * priors_cxcy[..., 2:]), dim=-1)  # w, h


def find_intersection(set_1, set_2):
    """The area (…, n1, n2) that each box of (…, n1, 4) shares with each of (…, n2, 4); boundary coordinates."""
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
PICTURE_SUFFIXES = ('.avif', '.bmp', '.gif', '.jfif', '.jp2', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff',
                    '.webp')
SPLIT_FOLDERS = ('train', 'test', 'valid', 'val')


class Findings:
    """What reading annotations brings to light besides objects, to be reported in a few lines."""

    def __init__(self):
        self.labels = Counter()  # {label: number of objects}, of all labels, wanted or not
        self.notes = defaultdict(list)  # {what is odd: where}
        self.faults = []  # what keeps the data lists from being made


def some(cases) -> str:
    """Return the first three of some texts."""
    return ', '.join(map(str, cases[:3])) + (', …' if len(cases) > 3 else '')


def parse_annotation(annotation_path, label_map=label_map, size=None, findings=None) -> dict[str, list]:
    """Return the objects in an annotation file of VOC's format.

    :param size: width and height of the picture, at whose edges boxes are cut; None: they stay as they are
    :param findings: Findings that note all labels, boxes without area and a <size> that isn't the picture's
    :return: {'boxes': [[x_min, y_min, x_max, y_max], …] in pixels counted from 0, 'labels': [class index,
        …], 'difficulties': [0 or 1, …]}

    Objects of other labels and boxes without area are left out. Raises InputError if the file is missing or no
    such annotation.
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
                           'picture turned by EXIF, shrunk or exchanged?)'].append(
                f"'{annotation_path}' ({noted[0]:g}×{noted[1]:g}, not {size[0]}×{size[1]})")
        for element in root.findall('object'):
            texts = [element.findtext(tag, default='').strip() for tag in OBJECT_TAGS]
            if '' in texts:
                raise ValueError(f'an object without {OBJECT_TAGS[texts.index("")]}')
            label, sides = texts[0], texts[1:]
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
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise InputError(f"picture '{path}' isn't there: copy it there, or make the data lists again "
                         'without it') from None
    except Exception as error:  # each of Pillow's formats raises others
        raise InputError(f"picture '{path}' can't be read ({error}): replace it, or leave it out") from None


def upright_rgb(image) -> Image.Image:
    """Return a copy of a PIL image, upright and in mode RGB."""
    require(isinstance(image, Image.Image),
            f"a picture must be a PIL image, not {type(image).__name__}: make one by Image.fromarray(frame) of an RGB "
            "array, by Image.fromarray(frame[..., ::-1]) of OpenCV's BGR frames")
    image = ImageOps.exif_transpose(image)  # phones only note in EXIF data how to turn a photo
    if image.mode[0] in 'IF':  # more than 8 bits a pixel, which Pillow would cut off at 255
        image = image.convert('I' if image.mode[0] == 'I' else 'F')  # also I;16
        highest = int(image.getextrema()[1])
        n_bits = next((bits for bits in (8, 12, 16) if highest < 2 ** bits), 32)  # cameras often use 12 of 16 bits
        scale = 255 if highest == 1 else 2 ** (8 - n_bits)  # 1: fractions
        image = image.convert('F').point(lambda value: value * scale).convert('L')
    return image.convert('RGB')


def read_image(path) -> Image.Image:
    """Return the picture in a file, upright and in mode RGB. Raises InputError if it can't be read."""
    with opened_picture(path) as image:
        return upright_rgb(image)


def picture_size(path, decode=False) -> tuple[int, int]:
    """Return width and height of the picture that `read_image` would give, from the file's header alone; with
    `decode`, also read the rest, to see whether it is broken."""
    with opened_picture(path) as image:
        width, height = image.size
        if decode:
            image.draft('L', (1, 1))  # of JPEG, all is read but only every eighth pixel computed
            image.load()
        # Not image.getexif(): it would decode PNG, since EXIF data may also stand behind the pixels.
        on_its_side = Image.Image.getexif(image).get(0x0112) in (5, 6, 7, 8)  # EXIF's orientation
        return (height, width) if on_its_side else (width, height)


def find_files(folder, suffixes) -> dict[str, list[str]]:
    """Return {name: paths} of all files below a folder that end like that. A name is a path in the folder without
    suffix, with slashes."""
    files = defaultdict(list)
    for parent, _, file_names in sorted(os.walk(folder)):
        start = Path(parent).relative_to(folder).as_posix().removeprefix('.')
        for stem, suffix in map(os.path.splitext, sorted(file_names)):
            if suffix.lower() in suffixes and not stem.startswith('.'):  # the Mac's ._a.jpg is no picture
                files[f'{start}/{stem}'.removeprefix('/')].append(os.path.join(parent, stem + suffix))
    return files


def read_names(list_path, pictures) -> list[str]:
    """Return the names in one of VOC's lists, one a line. A line may also have a suffix and a flag: 'a.jpg 1'."""
    try:
        data = list_path.read_bytes() if list_path.exists() else b''
        # Windows' PowerShell writes UTF-16, and Windows' editors put a byte order mark before UTF-8.
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
    """Return the names of a folder's pictures for training and for testing: those in its lists; without lists, those
    below train/ and below test/, valid/ or val/; without these folders, every fifth is for testing (with_test)."""
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
          f'{len(test):,} of them. Write lists if pictures belong together: all frames of a film must be in one split')
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
            f"'{voc_path}' has {len(pictures):,} pictures and {len(annotations):,} XML files, but none of a picture's "
            'name: export your annotations as Pascal VOC, and name the folders JPEGImages and Annotations')
    splits = split_names(voc_path, pictures, annotations, with_test)[:1 + with_test]
    names, usable = dict.fromkeys(chain(*splits)), {}
    for name in tqdm(names, desc=voc_path.name, unit=' pictures'):
        path, *others = pictures.get(name, [str(folders[0] / name)])
        if name in pictures and name not in annotations and not keep_unannotated:
            findings.notes['pictures have no XML file and are left out (--keep_unannotated takes them as pictures '
                           'without objects)'].append(f"'{path}'")
            continue
        try:
            require(not others, f"pictures '{path}' and '{some(others)}' have one name: rename one")
            size = picture_size(path, decode=True)
            objects = {'boxes': [], 'labels': [], 'difficulties': []}
            if name in annotations:
                objects = parse_annotation(annotations[name][0], label_map, size, findings)
            usable[name] = path, size, objects
        except InputError as error:
            findings.faults.append(str(error).rpartition(': ')[0])  # without its advice
    orphans = [f"'{paths[0]}'" for name, paths in annotations.items() if name not in pictures and name not in names]
    if orphans:
        findings.notes['XML files have no picture of their name'] += orphans
    return [[usable[name] for name in names if name in usable] for names in splits]


def create_data_lists(voc07_path, voc12_path, output_folder, labels=voc_labels, skip_empty=False,
                      keep_unannotated=False):
    """Read annotations in VOC's format and write five JSON files for PascalVOCDataset.

    TRAIN_images.json and TEST_images.json list the pictures' absolute paths. TRAIN_objects.json and
    TEST_objects.json list, in the same order, their objects as `parse_annotation` returns them.
    label_map.json is the label map.

    :param voc07_path: folder with pictures for training and for testing; see `split_names`
    :param voc12_path: another folder, or a list of them, whose training pictures are taken as well; or None
    :param labels: names of the classes, VOC's or others
    :param skip_empty: leave out training pictures without an object of these classes
    :param keep_unannotated: take pictures without an XML file as pictures without objects
    :return: the training objects: boxes in fractional boundary coordinates (n, 4), labels (n)

    Raises InputError, before anything is written, if folders, files or pictures are missing or broken.
    """
    labels, findings = [label.strip() for label in labels], Findings()
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
                          f'{some(findings.faults)}: repair (texts as UTF-8) or replace them, or leave them out')
    for name, pictures in (('trainval.txt', train), ('test.txt', test)):
        require(pictures, f"there is no annotated picture for {Path(voc07_path, 'ImageSets', 'Main', name)}: " + (
            'extract both archives of VOC 2007 there' if Path(voc07_path).name == 'VOC2007' else 'name some in it'))
    others = ', '.join(f'{label} ({count:,})' for label, count in findings.labels.most_common()
                       if label.lower() not in map(str.lower, labels))
    n_empty = sum(not objects['boxes'] for *_, objects in train)
    require(n_empty < len(train), f'no training picture has an object of {", ".join(labels)}: set labels to those that '
                                  f'the annotations have (others there: {others or "none"})')
    if skip_empty:
        train = [picture for picture in train if picture[2]['boxes']]

    write_data_lists(output_folder, label_map, TRAIN=train, TEST=test)
    if n_empty:
        print(f"{n_empty:,} training pictures have no object of these labels: " + ('left out' if skip_empty else (
            "they teach nothing without train.py's min_negatives, --skip_empty leaves them out")))
    if others:
        print(f'Left out the objects of other labels: {others}')

    boxes = [[x_min / width, y_min / height, x_max / width, y_max / height] for _, (width, height), objects in train
             for x_min, y_min, x_max, y_max in objects['boxes']]
    indices = [index for *_, objects in train for index in objects['labels']]
    return torch.tensor(boxes), torch.tensor(indices)  # (n, 4), (n)


def write_data_lists(output_folder, label_map, **pictures):
    """Write label_map.json and the two lists of each split, given as {split: what `read_folder` returns}."""
    files = {'label_map': label_map}
    for split in pictures:
        files[f'{split}_images'], _, files[f'{split}_objects'] = zip(*pictures[split])
        n_objects = sum(len(objects['boxes']) for objects in files[f'{split}_objects'])
        print(f'{split}: {len(pictures[split]):,} images with {n_objects:,} objects')
    make_folder(output_folder)
    with ExitStack() as stack:  # no file is replaced before all are written: never old ones beside new ones
        for name, content in files.items():
            file = stack.enter_context(replaced_file(Path(output_folder, f'{name}.json')))
            file.write(json.dumps(content).encode())
            file.flush()
    print(f"The data lists are in '{Path(output_folder).resolve()}'")


# -------------------------------------------------------------------------------------------- transforms
#
# Zooming out is looking through a window that is larger than the picture, zooming in (cropping) is looking
# through one that is smaller. Both only choose a rectangle (left, top, right, bottom) in the picture's own
# pixel coordinates; `right` and `bottom` are the first column and row that no longer belong to it. So all
# the geometry is done on five numbers and the boxes; pixels are touched once, at the end.

IMAGE_SIZE = 300  # width and height in pixels of what SSD300 sees
IMAGENET_MEAN = [0.485, 0.456, 0.406]  # of the pictures with which the VGG base was trained, RGB in [0, 1]
IMAGENET_STD = [0.229, 0.224, 0.225]


def shift_hue(image, shift):
    """Turns the hue of an image (3, height, width) with values in [0, 1] by a fraction of the color circle.

    Does what torchvision's adjust_hue does, several times faster. On the circle, from 0 to 6, red lies at 0,
    green at 2 and blue at 4; whatever the hue, a channel is high within 1 of its place and low beyond 2.
    """
    red, green, blue = image  # each (height, width), like everything up to the last line
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    hue = torch.where(high == red, green - blue,
                      torch.where(high == green, blue - red + 2 * chroma, red - green + 4 * chroma))
    hue = hue / chroma.clamp(min=1e-8) + 6 * shift  # a gray pixel has no hue, and no chroma to show it
    hue = hue - 6 * (hue / 6).floor()  # once around the circle is back again
    return torch.stack((low + chroma * ((hue - 3).abs() - 1).clamp(0, 1),
                        low + chroma * (2 - (hue - 2).abs()).clamp(0, 1),
                        low + chroma * (2 - (hue - 4).abs()).clamp(0, 1)))  # (3, height, width)


# Functions and the ranges of their factors, as in the Caffe code.
DISTORTIONS = ((TF.adjust_brightness, 0.5, 1.5), (TF.adjust_contrast, 0.5, 1.5),
               (TF.adjust_saturation, 0.5, 1.5), (shift_hue, -18 / 255, 18 / 255))


def photometric_distort(image):
    """Changes brightness, contrast, saturation and hue of an image (3, height, width) with values in [0, 1]
    in place: each with a chance of 50 %, in random order."""
    for adjust, low, high in random.sample(DISTORTIONS, len(DISTORTIONS)):
        if random.random() < 0.5:
            image.copy_(adjust(image, random.uniform(low, high)))


def zoom_out(width, height) -> tuple[int, int, int, int]:
    """A window 1 to 4 times as wide and high as a picture, which lies at a random place inside it. Makes the
    network learn small objects (paper, section 3.6)."""
    scale = random.uniform(1, 4)
    window_width, window_height = int(scale * width), int(scale * height)
    left = random.randint(0, window_width - width)
    top = random.randint(0, window_height - height)
    return -left, -top, window_width - left, window_height - top


def random_crop(window, boxes):
    """Zooms in: a smaller window inside the given one. Makes the network learn large objects and parts of
    objects (paper, section 2.2, "data augmentation").

    Objects whose center is outside are dropped; one of those that stay overlaps with the crop by at least a
    minimum, chosen at random. If the choice is no minimum (1 in 7), or without objects, the window stays.

    :param boxes: objects in the picture's absolute boundary coordinates (n, 4)
    :return: the window; the boxes in it (m, 4), cut at its edges; which of the n objects they are, bool (n)
    """
    start, end = torch.tensor(window).view(2, 2)  # (2): left and top; (2): right and bottom
    size = end - start  # (2): width and height
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2  # (n, 2)
    while True:
        min_overlap = random.choice((None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9))
        if min_overlap is None or len(boxes) == 0:
            return window, boxes, torch.ones(len(boxes), dtype=torch.bool)

        # Fifty tries, all made at once; the first good one counts. If none is good, another minimum is chosen.
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
    """What a window shows of a picture, as the network wants it.

    :param image: PIL image, mode RGB
    :param window: (left, top, right, bottom) in the image's pixels; None: the whole image
    :param mirror: mirror it left to right
    :param distort: change its colors at random
    :return: (3, 300, 300), RGB in [0, 1] normalized by mean and standard deviation
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

    # Around the picture lies the mean color, which normalization makes 0. The picture itself is changed in
    # place: getting memory for copies, of a megabyte each, would take longer than filling them.
    canvas = torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)
    pixels = canvas[:, y1:y2, x1:x2]  # (3, y2 − y1, x2 − x1), a view
    pixels.copy_(TF.pil_to_tensor(part)).div_(255)  # in [0, 1]
    if distort:
        photometric_distort(pixels)
    TF.normalize(pixels, mean, std, inplace=True)
    return canvas


def transform(image, boxes, labels, difficulties, split, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """A picture and its objects made ready for the network; for training, changed at random.

    :param image: PIL image, mode RGB
    :param boxes: absolute boundary coordinates, float (n, 4); a side's last pixel belongs to the object
    :param labels, difficulties: (n) each
    :param split: 'TRAIN' zooms out, crops, mirrors and distorts colors; 'TEST' only resizes
    :param mean, std: with which the network wants images normalized, RGB in [0, 1]
    :return: image (3, 300, 300), boxes in fractional boundary coordinates (m, 4), labels (m), difficulties
        (m); a crop may drop objects, but never all of them. What was passed in stays as it was.
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
        # Pixel 0 becomes the last one, width − 1, and the right side the left one.
        boxes = torch.stack((width - 1 - x_max, y_min, width - 1 - x_min, y_max), dim=1)
    boxes = boxes / torch.tensor([width, height, width, height])  # fractional
    return image, boxes, labels, difficulties


# -------------------------------------------------------------------------------------------- evaluation

def match_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
                     min_overlaps=(0.5,)):
    """Tells true from false detections by the rules of VOC 2007's development kit.

    Of the objects of its picture and class, a detection finds the one that it overlaps most, if by more than
    a smallest overlap, 0.5 in VOC. Of several detections that find the same object, the one with the highest
    score is true and the others are false. Those that find a difficult object don't count and are left out.

    :return: for each smallest overlap, the detections that count, by falling score: labels (d), scores (d),
        whether true, bool (d). The first six arguments are those of `calculate_mAP`.
    """
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
        rank, = (overlaps > min_overlap).nonzero(as_tuple=True)  # (f): of the detections that find an object
        objects = found[rank]  # (f): which one
        first = torch.full((n_objects,), len(scores), device=rank.device)
        first = first.scatter_reduce(0, objects, rank, 'amin')  # (n_objects): rank of the first to find it
        true = torch.zeros_like(labels, dtype=torch.bool).scatter(0, rank, rank == first[objects])  # (D)
        counts = torch.ones_like(true).scatter(0, rank, ~difficult[objects])  # (D)
        matches.append((labels[counts], scores[counts], true[counts]))
    return matches


def average_precision(true, n_objects) -> float:
    """The 11-point interpolated average precision of VOC 2007.

    :param true: whether each detection of a class is true, by falling score, bool (d)
    :param n_objects: how many objects there are to be found
    :return: the mean, over the recalls 0, 0.1, …, 1, of the highest precision at this recall or a higher one;
        nan if there are no objects
    """
    if n_objects == 0:
        return math.nan
    n_true = true.cumsum(dim=0)  # (d): after the best 1, 2, …, d detections
    precision = n_true.double() / torch.arange(1, len(true) + 1, device=true.device)  # (d)
    # Recall n_true / n_objects is compared with t / 10 in whole numbers: rounding errors could keep 3 of 10
    # from reaching 0.3.
    reached = [precision[10 * n_true >= t * n_objects] for t in range(11)]
    return sum(values.max().item() for values in reached if len(values)) / 11


def rank_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
                    label_map=label_map, min_overlaps=(0.5,)) -> list[dict[str, tuple]]:
    """The detections of each class, from which precision and recall follow; see `match_detections`.

    :return: for each smallest overlap {label: (scores (d), whether true, bool (d), number of objects)}, by
        falling score, without those that don't count. Classes without objects are named in a warning.
    """
    countable = torch.cat(true_labels)[~torch.cat(true_difficulties).bool()]  # labels of objects that count
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

    :return: {label: AP}, mAP. A class without objects (difficult ones don't count) has no AP: it is nan,
        stays out of the mean and is named in a warning.
    """
    ranked, = rank_detections(det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
                              label_map)
    precisions = {label: average_precision(true, n) for label, (_, true, n) in ranked.items()}
    return precisions, mean_of_classes(precisions.values())


# ------------------------------------------------------------------------------------------- checkpoints

def make_folder(path):
    """Makes a folder for results, unless it exists. Raises InputError if nothing can be written to it: better
    now than after hours of training."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't make the folder '{path}' ({error.strerror}): choose another one") from None
    require(os.access(path, os.W_OK), f"can't write to the folder '{path}': choose another one")


@contextmanager
def replaced_file(path):
    """A binary file to write to, which replaces `path` once it is whole and on the disk. Even after a kill or
    a power cut, `path` is the old file or the new one. Raises InputError if it can't be written."""
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
            temporary.unlink()
        # From torch.save, a full disk or Ctrl-C comes out as a RuntimeError with that as its context.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise InputError(f"can't write '{path}' ({cause.strerror or cause}): make room or choose another "
                             'place; what was there before is unchanged') from None
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise


def save_checkpoint(path, epoch, model, optimizer, label_map, settings):
    """Saves a training run after `epoch` finished epochs, in plain containers, which load by
    `torch.load(path, weights_only=True)`: no code is saved. Raises InputError if that fails."""
    with replaced_file(path) as file:
        torch.save({'format': 2, 'epoch': epoch, 'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
                    'label_map': label_map, 'settings': settings, 'priors_cxcy': model.priors_cxcy,
                    'image_mean': list(model.image_mean), 'image_std': list(model.image_std),
                    'clip_boxes': model.clip_boxes}, file)


def read_checkpoint_file(path):
    """The content of a file that torch.save wrote, ours or another's, with its tensors on the CPU. No code
    from the file is run. Raises InputError if the file is missing, damaged or something else."""
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
            return {'model': content['model']}  # without the objects beside it, which weights_only refused
    except FileNotFoundError:
        raise InputError(f"checkpoint '{path}' isn't there: train one with train.py, or name another one") from None
    except Exception as error:  # a damaged file may raise anything
        reason = (error.strerror if isinstance(error, OSError) and error.filename
                  else "it is damaged or wasn't written by train.py")
        raise InputError(f"checkpoint '{path}' can't be loaded: {reason}") from None


def load_checkpoint(path) -> dict:
    """A file of `save_checkpoint`, or of the original code in the same form; see `read_checkpoint_file`."""
    content = read_checkpoint_file(path)
    require(is_checkpoint(content), f"'{path}' isn't a checkpoint of this project: name one that train.py wrote")
    return content


def is_checkpoint(content) -> bool:
    """Whether the content of a file has the parts of a checkpoint; whether its weights fit is left open."""
    parts = ('model', 'label_map', 'optimizer', 'settings')
    return (isinstance(content, dict) and {'epoch', 'model', 'label_map'} <= content.keys()
            and all(isinstance(content.get(name, {}), dict) for name in parts))


def check_label_map(checkpoint_label_map, data_label_map):
    """Raises InputError, showing both, if a checkpoint and the data lists have different classes."""
    require(checkpoint_label_map == data_label_map,
            f'the checkpoint has the classes {checkpoint_label_map} but the data lists have {data_label_map}: use '
            'data lists and a checkpoint that belong together')


# The tutorial's original code, and so its published weights of 77.2 mAP, pickled the whole network and the
# whole optimizer. Unpickling calls whatever a file says. So only what tensors are made of is resolved;
# everything else that a file names becomes a stand-in, of which only the parameters are used.

RESOLVED = {('torch._utils', '_rebuild_tensor'), ('torch._utils', '_rebuild_tensor_v2'),
            ('torch._utils', '_rebuild_parameter'), ('torch.nn.parameter', 'Parameter'),
            ('collections', 'OrderedDict')}


class StandIn(dict):
    """In place of any class or function: does nothing when called, and keeps its state as an object."""

    def __init__(self, *args):
        """Keeps dict from reading the arguments."""

    def __setstate__(self, state):
        self.state = state

    __hash__ = object.__hash__  # the optimizer has objects as keys


class InertPickle:
    """In place of the module pickle, for torch.load."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) in RESOLVED:
                return super().find_class(module, name)
            return type(name, (StandIn,), {})

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

    return {'epoch': content['epoch'] + 1,  # it has the number of the last one, counted from 0
            'model': dict(parameters(content['model'])), 'label_map': dict(label_map)}


# --------------------------------------------------------------------------------------- script settings

def current_settings(script) -> dict:
    """{name: value} of a script's annotated constants, in the plain types that a checkpoint may hold."""
    settings = {name: getattr(script, name) for name in typing.get_type_hints(script)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


def check_precision(precision):
    """Raises InputError unless `choose_dtype` knows the precision."""
    require(precision in ('auto', 'bfloat16', 'float16', 'float32'),
            f"precision must be one of auto, bfloat16, float16, float32, not '{precision}'")


def choose_device(name) -> torch.device:
    """Return the device of a name: 'auto' is CUDA if there is any, else the CPU."""
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except Exception as error:
        raise InputError(f"device '{name}' can't be used here ({str(error).splitlines()[0]}): choose 'auto', 'cpu' or "
                         'another device of PyTorch') from None


def choose_dtype(device, precision) -> torch.dtype:
    """Return the type in which a device is to compute convolutions."""
    check_precision(precision)
    if precision == 'auto':
        precision = 'bfloat16' if computes_in_bfloat16(device) else 'float32'
    return getattr(torch, precision)


def autocast(device, dtype):
    """Return the context in which a network computes in a type wherever that is safe (mixed precision)."""
    dtype = choose_dtype(device, dtype) if isinstance(dtype, str) else dtype
    return torch.autocast(device.type, dtype=torch.bfloat16 if dtype == torch.float32 else dtype,
                          enabled=dtype != torch.float32)


def place_network(model, device, dtype, training=False):
    """Move a network to a device, in the memory format that is fastest there."""
    model.to(device, memory_format=torch.channels_last)


def computes_in_bfloat16(device) -> bool:
    """Whether a device has instructions for bfloat16; without them, a CPU takes ten times as long."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, 'get_capabilities', dict)()  # older versions of PyTorch can't tell
    return any(capabilities.get(name) for name in ('avx512_bf16', 'amx_bf16'))


def several_processes() -> bool:
    """Whether this is one of several processes that train or evaluate together."""
    return distributed.is_available() and distributed.is_initialized()


def join_processes() -> tuple[int, int, torch.device]:
    """The rank of this process, the number of processes, and its device. There are several processes if
    torchrun started them; then only the first one prints."""
    cuda = torch.cuda.is_available()
    if 'LOCAL_RANK' not in os.environ:
        return 0, 1, torch.device('cuda' if cuda else 'cpu')
    local_rank = int(os.environ['LOCAL_RANK'])
    if cuda:
        n_gpus = torch.cuda.device_count()
        require(local_rank < n_gpus, f'there are {n_gpus} GPUs: start torchrun with --nproc_per_node of at most that')
        torch.cuda.set_device(local_rank)
    # Hours, since the others wait while the first process downloads weights or computes a mAP.
    distributed.init_process_group('nccl' if cuda else 'gloo', timeout=timedelta(hours=2))
    rank, n_processes = distributed.get_rank(), distributed.get_world_size()
    if rank > 0:
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115
    return rank, n_processes, torch.device('cuda', local_rank) if cuda else torch.device('cpu')


class DelayedCtrlC:
    """Within `with`, Ctrl-C only sets `pressed`, so that the program can stop where that does no harm: while a
    worker process is starting, say, a KeyboardInterrupt may be lost or leave that process hanging. Pressed
    twice, Ctrl-C stops at once. Either way the program ends with `message`."""

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
    """For DataLoader's workers: a terminal sends Ctrl-C to them, too, but they end with the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def override_settings(script) -> set[str]:
    """Sets a script's annotated constants from the command line; returns the names of those given there.

    `batch_size: int = 8` becomes `--batch_size 4`. Types may be int, float, str, bool (`--augment`,
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
        if optional:  # X | None
            kind = typing.get_args(kind)[0]
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
    """Runs a script's main() with its settings from the command line; with pass_given, main(names of the
    settings given there). An InputError ends the program with one sentence and exit status 1."""
    sys.stdout.reconfigure(errors='backslashreplace')  # a file's name that can't be printed must not end a run
    given = override_settings(script)
    warnings.formatwarning = lambda message, *_, **__: f'Warning: {message}\n'
    try:
        script.main(given) if pass_given else script.main()
    except InputError as error:
        # From a worker of a DataLoader it arrives wrapped in that worker's traceback; the last line is ours.
        sys.exit('Error: ' + str(error).splitlines()[-1].removeprefix('utils.InputError: '))
    except KeyboardInterrupt:
        sys.exit('Stopped.')
