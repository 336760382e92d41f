"""Figures of the augmentation, made of pixels: they show what the transforms of utils.py give out.

Drawn twice as large as they are shown, for sharp screens.
"""

import random

import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageDraw, ImageFont

from scenes import ASTRONAUT, DOGS_AND_CAT, DOGS_AND_CAT_BOXES, HERE
from svg import AMBER, FONT_SIZE, INK, PAPER, PURPLE, STROKE, WHITE, WIDTH
from utils import IMAGENET_MEAN, IMAGENET_STD, look_through, random_crop, read_image, transform, zoom_out

ZOOM = 2  # pixels drawn per pixel shown
ASTRONAUT_BOXES = ((18, 10, 284, 399), (276, 0, 358, 224))  # in pixels: person, space shuttle
CHELSEA, CHELSEA_BOXES = HERE / 'photos/chelsea.jpg', ((28, 0, 402, 299),)  # in pixels: cat
FILLER = tuple(round(255 * channel) for channel in IMAGENET_MEAN)


def seed_everything(seed):
    """Makes what is random below the same each time."""
    random.seed(seed)
    torch.manual_seed(seed)


class Sheet:
    """A light ground for pictures in rows and columns."""

    def __init__(self, columns, rows, margin, caption_height):
        self.margin, self.caption_height = margin * ZOOM, caption_height * ZOOM
        self.side = (WIDTH * ZOOM - (columns + 1) * self.margin) // columns  # of a picture
        height = rows * (self.side + self.margin + self.caption_height) + self.margin
        self.image = Image.new('RGB', (WIDTH * ZOOM, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(size=FONT_SIZE * ZOOM)

    def paste(self, picture, column, row, caption=''):
        left = self.margin + column * (self.side + self.margin)
        top = self.margin + row * (self.side + self.margin + self.caption_height)
        self.image.paste(picture.resize((self.side, self.side), Image.Resampling.LANCZOS), (left, top))
        self.draw.text((left + self.side / 2, top + self.side + 6 * ZOOM), caption, INK, self.font, anchor='ma')

    def save(self, path):
        self.image.save(path, quality=85, optimize=True)


def draw_boxes(picture, boxes, color=PURPLE):
    """A picture with boxes drawn in, fractional boundary coordinates (n, 4)."""
    side, line = 800, 2 * STROKE * ZOOM  # about twice as large as on the sheet, so that lines become smooth
    picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    for box in (boxes * side).tolist():
        around = [value + sign * line / 2 for value, sign in zip(box, (-1, -1, 1, 1))]
        draw.rectangle(around, outline=WHITE, width=2 * line)
        draw.rectangle(box, outline=color, width=line)
    return picture


def to_picture(normalized):
    """What the network gets, (3, 300, 300), as a picture again."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return F.to_pil_image((normalized * std + mean).clamp(0, 1))


def through(boxes, window, mirror=False):
    """Boxes in a picture's pixels as fractions of a window."""
    left, top, right, bottom = window
    boxes = (boxes - torch.tensor([left, top, left, top])) / torch.tensor([right - left, bottom - top] * 2)
    if mirror:  # as in `transform`: pixel 0 becomes the last one, and the right side the left one
        last = 1 - 1 / (right - left)
        boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([last, 0, last, 0])
    return boxes


def draw_window(picture, window, boxes):
    """A picture with a window on it; the ground between them, where the window is larger, is the filler."""
    around = (min(0, window[0]), min(0, window[1]), max(picture.width, window[2]), max(picture.height, window[3]))
    side = max(around[2] - around[0], around[3] - around[1])
    board = Image.new('RGB', (side, side), PAPER)
    board.paste(Image.new('RGB', (window[2] - window[0], window[3] - window[1]), FILLER),
                (window[0] - around[0], window[1] - around[1]))
    faded = Image.blend(picture, Image.new('RGB', picture.size, WHITE), 0.6)
    inside = (max(0, window[0]), max(0, window[1]), min(picture.width, window[2]), min(picture.height, window[3]))
    faded.paste(picture.crop(inside), inside[:2])
    board.paste(faded, (-around[0], -around[1]))
    whole = (around[0], around[1], around[0] + side, around[1] + side)
    return draw_boxes(draw_boxes(board, through(boxes, whole)),
                      through(torch.tensor([window]), whole).clamp(0.005, 0.995), AMBER)


def augmentation():
    """Zooming out, cropping, mirroring, distorting colors: the picture and its window, and what comes out."""
    picture, boxes = read_image(ASTRONAUT), torch.tensor(ASTRONAUT_BOXES, dtype=torch.float)
    whole = (0, 0, *picture.size)
    seed_everything(1)
    larger = zoom_out(*picture.size)
    smaller, visible = whole, boxes
    while smaller == whole:  # one time in seven, the window stays as it is
        smaller, visible, _ = random_crop(whole, boxes)

    sheet = Sheet(columns=4, rows=2, margin=12, caption_height=26)
    steps = (('zoom out', larger, boxes, {}), ('crop', smaller, visible, {}),
             ('mirror', whole, boxes, {'mirror': True}), ('colors', whole, boxes, {'distort': True}))
    for column, (name, window, seen, how) in enumerate(steps):
        sheet.paste(draw_window(picture, window, boxes), column, 0, f'{name}: the window')
        result = to_picture(look_through(picture, window, **how))
        sheet.paste(draw_boxes(result, through(seen, window, how.get('mirror', False))), column, 1, 'what it shows')
    return sheet


def augmented_samples():
    """Three pictures, each as it is and as training sees it four times."""
    sheet = Sheet(columns=5, rows=3, margin=10, caption_height=0)
    seed_everything(9)
    pictures = ((ASTRONAUT, ASTRONAUT_BOXES), (CHELSEA, CHELSEA_BOXES), (DOGS_AND_CAT, DOGS_AND_CAT_BOXES))
    for row, (path, boxes) in enumerate(pictures):
        boxes = torch.tensor(boxes, dtype=torch.float)
        labels = difficulties = torch.zeros(len(boxes), dtype=torch.long)
        for column, split in enumerate(['TEST'] + 4 * ['TRAIN']):
            image, seen, _, _ = transform(read_image(path), boxes, labels, difficulties, split)
            sheet.paste(draw_boxes(to_picture(image), seen), column, row)
    return sheet
