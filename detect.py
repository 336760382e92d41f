"""Finds the objects in a picture.

    python detect.py                                       # a picture of the sample
    python detect.py --image photo.jpg --min_score 0.4     # a picture of one's own

Prints a line per object, saves a copy of the picture with the objects drawn in, and shows it if there is a screen.
"""

import functools
import os
import sys
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from model import load_model
from utils import look_through, make_folder, make_label_colors, read_image, replaced_file, require, run_script

checkpoint: str = 'checkpoint_ssd300.pth'  # the trained network, a file that train.py wrote
image: str = 'img/emoji_voc/VOC2007/JPEGImages/000001.jpg'  # the picture, in any format that Pillow reads
min_score: float = 0.2  # only objects with a greater score; lower finds more, and more that isn't there
max_overlap: float = 0.5  # boxes of a class that overlap by more are one object; higher lets more duplicates through
top_k: int = 200  # at most this many objects, the best ones
suppress: list[str] | None = None  # classes to leave out; None: all are shown
output: str = 'detections'  # folder for the annotated copy, or a file's name for it that ends in .jpg, .png, …


def main():
    check_settings()
    original_image = read_image(image)
    _, label_map = load_detector(checkpoint)
    for label in suppress or ():
        require(label in label_map, f"suppress names '{label}', but the classes are {', '.join(list(label_map)[1:])}")

    objects = find_objects(original_image, min_score, max_overlap, top_k, suppress)
    annotated = draw_objects(original_image, objects, make_label_colors(label_map))
    for label, score, box in objects:
        print(f'{label:<15} {score:.3f}  ({", ".join(f"{value:.0f}" for value in box)})')
    print(f'{len(objects)} objects, drawn in {save_image(annotated, output_path(image))}')
    show(annotated)


def detect(original_image, min_score, max_overlap, top_k, suppress=None):
    """Draws the objects that the network of `checkpoint` finds into a copy of a picture.

    :param original_image: PIL image; it stays as it is
    :param min_score: only objects with a greater score
    :param max_overlap: two boxes of one class that overlap by more than this are one object
    :param top_k: at most this many objects
    :param suppress: labels of classes to leave out
    :return: PIL image, mode RGB, of the same size
    """
    objects = find_objects(original_image, min_score, max_overlap, top_k, suppress)
    return draw_objects(original_image, objects, make_label_colors(load_detector(checkpoint)[1]))


@torch.no_grad()
def find_objects(original_image, min_score, max_overlap, top_k, suppress=None):
    """The objects in a picture: a list of (label, score, (x_min, y_min, x_max, y_max) in the picture's pixels), by
    falling score. The arguments are those of `detect`."""
    model, label_map = load_detector(checkpoint)
    names = {index: label for label, index in label_map.items()}
    device = model.priors_cxcy.device
    pixels = look_through(original_image.convert('RGB')).unsqueeze(0).to(device)  # (1, 3, 300, 300)
    predicted_locs, predicted_scores = model(pixels)  # (1, 8732, 4), (1, 8732, n_classes)
    boxes, labels, scores = model.detect_objects(predicted_locs, predicted_scores, min_score, max_overlap, top_k)
    # An object may reach beyond the picture's edge; what can be drawn ends there.
    width, height = original_image.size
    boxes = boxes[0].cpu().clamp(0, 1) * torch.tensor([width, height, width, height])  # (n, 4), pixels
    objects = zip((names[label] for label in labels[0].tolist()), scores[0].tolist(), map(tuple, boxes.tolist()))
    return [found for found in objects if found[0] not in (suppress or ())]


@functools.lru_cache(maxsize=1)
def load_detector(checkpoint):
    """The network of a checkpoint, on the GPU if there is one, and its label map; loaded once."""
    model, label_map = load_model(checkpoint)
    return model.to('cuda' if torch.cuda.is_available() else 'cpu'), label_map


def draw_objects(original_image, objects, colors):
    """A copy of a picture with a frame around each object, and its label and score above the frame."""
    annotated = original_image.convert('RGB')
    if annotated is original_image:
        annotated = original_image.copy()
    width, height = annotated.size
    line = max(2, round(min(width, height) / 150))  # pixels: to be seen in a picture of any size
    font = ImageFont.load_default(size=max(12, round(min(width, height) / 25)))
    draw = ImageDraw.Draw(annotated)
    for label, score, (x_min, y_min, x_max, y_max) in reversed(objects):  # the surest last, on top
        draw.rectangle((x_min, y_min, x_max, y_max), outline=colors[label], width=line)

        text = f'{label} {score:.2f}'
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        text_width, text_height = right - left + 2 * line, bottom - top + 2 * line
        # Above the frame, or inside it if there is no room; never outside of the picture.
        x = max(0, min(x_min, width - text_width))
        y = max(0, y_min - text_height if y_min >= text_height else min(y_min, height - text_height))
        draw.rectangle((x, y, x + text_width, y + text_height), fill=colors[label])
        draw.text((x + line - left, y + line - top), text, font=font, fill=readable_on(colors[label]))
    return annotated


def readable_on(color):
    """Black or white, whichever stands out against a colour."""
    return 'black' if ImageColor.getcolor(color, 'L') > 140 else 'white'


def output_path(image_path):
    """Where the annotated copy goes."""
    path = Path(output)
    if path.suffix.lower() not in Image.registered_extensions():
        path = path / Path(image_path).name
    require(path.resolve() != Path(image_path).resolve(), f"output would overwrite the picture '{image_path}' itself")
    return path


def save_image(image, path):
    """Saves a picture in the format that its name tells, or in JPEG's, and returns the path."""
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in Image.SAVE:
        path, image_format = path.with_suffix('.jpg'), 'JPEG'
    make_folder(path.parent)
    with replaced_file(path) as file:
        image.save(file, image_format)
    return path


def show(image):
    """Shows a picture where there is a screen. Detection has done its work by then: nothing may fail here."""
    if sys.platform in ('darwin', 'win32') or os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY'):
        try:
            image.show()
        except Exception as error:
            print(f"The picture can't be shown here ({error})")


def check_settings():
    require(0 <= min_score < 1, f'min_score must be at least 0 and less than 1, not {min_score}')
    require(0 <= max_overlap <= 1, f'max_overlap must be between 0 and 1, not {max_overlap}')
    require(top_k >= 1, f'top_k must be at least 1, not {top_k}')


if __name__ == '__main__':
    run_script(sys.modules[__name__])
