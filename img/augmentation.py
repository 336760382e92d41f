"""Figures of the augmentation: they show what the transforms of utils.py give out."""

import random

import torch
from torchvision.transforms.v2 import functional as TF

import utils
from scenes import BOXES, DOG, OBJECTS, Scene
from svg import INK, PURPLE, figure
from utils import IMAGENET_MEAN, IMAGENET_STD, random_crop, read_image, transform, zoom_out

PIXELS = torch.tensor([*OBJECTS.values()], dtype=torch.float)


def to_picture(normalized):
    """Return what the network gets, (3, 300, 300), as a picture again."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return TF.to_pil_image((normalized * std + mean).clamp(0, 1))


def through(boxes, window):
    """Return boxes in a picture's pixels as fractions of a window."""
    left, top, right, bottom = window
    return (boxes - torch.tensor([left, top, left, top])) / torch.tensor([right - left, bottom - top] * 2)


@figure(height=468)
def augmentation(canvas):
    """One picture on its way: zoomed out, cropped, mirrored, its colors distorted."""
    picture, window = read_image(DOG), utils.render_window
    random.seed(4)
    torch.manual_seed(4)
    larger = zoom_out(*picture.size)
    smaller, visible, _ = random_crop(larger, PIXELS)
    last = 1 - 1 / (smaller[2] - smaller[0])  # where the first column of pixels goes
    mirrored = through(visible, smaller)[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
    mirrored += torch.tensor([last, 0, last, 0])
    steps = (('the picture', window(picture), BOXES),
             ('zoomed out', window(picture, larger), through(PIXELS, larger)),
             ('cropped', window(picture, smaller), through(visible, smaller)),
             ('mirrored', window(picture, smaller, mirror=True), mirrored),
             ('other colors', window(picture, smaller, mirror=True, distort=True), mirrored))

    for i, (name, image, seen) in enumerate(steps):
        x, y = 16 + i % 3 * 192, 16 + i // 3 * 226
        scene = Scene(canvas, to_picture(image), x, y, 184)
        scene.boxes(seen, PURPLE)
        if name == 'zoomed out':
            scene.boxes(through(torch.tensor([smaller], dtype=torch.float), larger), INK)
        canvas.center(x + 92, y + 208, f'{i + 1}. {name}')
    canvas.text(404, 272, 'purple: the objects\nblack: the crop\n\n'
                f'{len(PIXELS) - len(visible)} of {len(PIXELS)} objects have\ntheir center outside\nof it and go')


@figure(height=480)
def augmented_samples(canvas):
    """The photograph as it is and as training sees it eleven times."""
    random.seed(9)
    torch.manual_seed(9)
    labels = difficulties = torch.zeros(len(PIXELS), dtype=torch.long)
    for i, split in enumerate(['TEST'] + 11 * ['TRAIN']):
        image, seen, _, _ = transform(read_image(DOG), PIXELS, labels, difficulties, split)
        Scene(canvas, to_picture(image), 16 + i % 4 * 144, 16 + i // 4 * 144, 136).boxes(seen, PURPLE)
    canvas.center(300, 466, 'first the picture, then what eleven epochs of training see', bold=False)
