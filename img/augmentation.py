"""Figures of the augmentation: they show what the transforms of utils.py give out."""

import random

import torch
from torchvision.transforms.v2 import functional as TF

from scenes import BOATS, BOATS_OBJECTS, HERE, Scene, fractional
from svg import AMBER, PURPLE, Canvas
from utils import IMAGENET_MEAN, IMAGENET_STD, look_through, random_crop, read_image, transform, zoom_out

BOATS_BOXES = [box for _, box in BOATS_OBJECTS]
DOGS_AND_CAT_BOXES = ((153, 114, 325, 297), (17, 68, 191, 253), (255, 28, 433, 226))  # in pixels: dog, dog, cat
SAMPLES = (('boats', BOATS_BOXES), ('chelsea', ((28, 0, 402, 299),)), ('dogs_and_cat', DOGS_AND_CAT_BOXES))


def seed(number):
    random.seed(number)
    torch.manual_seed(number)


def to_picture(normalized):
    """What the network gets, (3, 300, 300), as a picture again."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return TF.to_pil_image((normalized * std + mean).clamp(0, 1))


def through(boxes, window):
    """Boxes in a picture's pixels as fractions of a window."""
    left, top, right, bottom = window
    return (boxes - torch.tensor([left, top, left, top])) / torch.tensor([right - left, bottom - top] * 2)


def augmentation():
    """One picture on its way: zoomed out, cropped, mirrored, its colors distorted."""
    picture, boxes = read_image(BOATS), torch.tensor(BOATS_BOXES, dtype=torch.float)
    seed(4)
    larger = zoom_out(*picture.size)
    smaller, visible, _ = random_crop(larger, boxes)
    last = 1 - 1 / (smaller[2] - smaller[0])  # where the first column of pixels goes
    mirrored = through(visible, smaller)[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
    mirrored += torch.tensor([last, 0, last, 0])
    steps = (('the picture', look_through(picture), fractional(BOATS_BOXES, BOATS)),
             ('zoomed out', look_through(picture, larger), through(boxes, larger)),
             ('cropped', look_through(picture, smaller), through(visible, smaller)),
             ('mirrored', look_through(picture, smaller, mirror=True), mirrored),
             ('other colors', look_through(picture, smaller, mirror=True, distort=True), mirrored))

    canvas = Canvas(height=534)
    for i, (name, image, seen) in enumerate(steps):
        x, y = 20 + i % 3 * 232, 20 + i // 3 * 252
        scene = Scene(canvas, to_picture(image), x, y, 214)
        scene.boxes(seen, PURPLE)
        if name == 'zoomed out':
            crop = through(torch.tensor([smaller], dtype=torch.float), larger)
            scene.boxes(crop, AMBER)
        canvas.text(x + 107, y + 238, f'{i + 1}. {name}', anchor='middle', bold=True)
    canvas.text(500, 330, 'Purple: the objects.\nAmber: the crop.\n\n'
                f'{len(boxes) - len(visible)} of {len(boxes)} objects have\ntheir center outside it\n'
                'and are dropped.')
    return canvas


def augmented_samples():
    """Three pictures, each as it is and as training sees it four times."""
    canvas = Canvas(height=478)
    canvas.text(82, 34, 'the picture', anchor='middle', bold=True)
    canvas.text(429, 34, 'what training sees of it in four epochs', anchor='middle', bold=True)
    seed(9)
    for row, (name, boxes) in enumerate(SAMPLES):
        picture, boxes = read_image(HERE / f'photos/{name}.jpg'), torch.tensor(boxes, dtype=torch.float)
        labels = difficulties = torch.zeros(len(boxes), dtype=torch.long)
        for column, split in enumerate(['TEST'] + 4 * ['TRAIN']):
            image, seen, _, _ = transform(picture, boxes, labels, difficulties, split)
            Scene(canvas, to_picture(image), 16 + column * 139, 48 + row * 140, 132).boxes(seen, PURPLE)
    return canvas
