"""Finds the objects in pictures.

    python detect.py                                            # a picture of the sample
    python detect.py --image photo.jpg --min_score 0.4          # your own picture
    python detect.py --image holiday/ cat.png --save_json       # all pictures of a folder, and another one

Prints a line per object with its label, score and box in pixels, and saves a copy of each picture with the objects
drawn in. A single picture is shown, too, if there is a screen.
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from tqdm import tqdm

from model import load_model
from utils import (InputError, autocast, check_precision, render_window, make_folder, make_label_colors, read_image,
                   replaced_file, require, run_script)

# Settings: each annotated constant is also a command-line flag of its name, which changes it for one run.

checkpoint: str = 'checkpoint_ssd300.pth'  # weights of train.py or others; 'coco': torchvision's of COCO
image: list[str] = ['img/emoji_voc/VOC2007/JPEGImages/000009.jpg']  # pictures of any format, or folders of pictures
min_score: float = 0.2  # only objects with a greater score; lower finds more, and more that isn't there
max_overlap: float = 0.5  # boxes of a class that overlap by more are one object; higher leaves more duplicates
top_k: int = 200  # at most this many objects per picture, the best ones
suppress: list[str] | None = None  # classes to leave out; None: all are shown
output: str = 'detections'  # folder for the annotated copies; for one picture, also a file's name: .jpg, .png, …
save_json: bool = False  # write the objects of all pictures to detections.json, beside the copies
precision: str = 'float32'  # 'bfloat16' for hardware that computes in it; 'auto': bfloat16 where that is so


def main():
    check_settings()
    paths = find_pictures(image)
    outputs = output_paths(paths)
    detector = model, label_map = load_detector(checkpoint)
    for label in suppress or ():
        require(label in label_map, f"suppress names '{label}', but the classes are {', '.join(list(label_map)[1:])}")

    found = {}
    for path, output_path in zip(tqdm(paths, unit='picture', disable=len(paths) == 1), outputs):
        try:
            original_image = read_image(path)
            with autocast(model.priors_cxcy.device, precision):
                objects = find_objects(original_image, min_score, max_overlap, top_k, suppress, detector)
            annotated = draw_objects(original_image, objects, make_label_colors(label_map))
            save_image(annotated, output_path)
        except InputError as error:
            if len(paths) == 1:
                raise
            tqdm.write(f'Error: {error}', file=sys.stderr)  # and on with the next one
            continue
        found[str(path)] = [{'label': label, 'score': score, 'box': box} for label, score, box in objects]
        for label, score, box in objects:
            tqdm.write(f'{label:<15} {score:.3f}  ({", ".join(f"{value:.0f}" for value in box)})')
        tqdm.write(f'{len(objects)} objects in {path}, drawn in {output_path}')

    if save_json:
        with replaced_file(outputs[0].parent / 'detections.json') as file:
            file.write(json.dumps(found, indent=2).encode())
    if len(paths) == 1:
        show(annotated)
    n_failed = len(paths) - len(found)
    require(n_failed == 0, f'{n_failed} of {len(paths)} pictures failed; the others are done')


def detect(original_image, min_score, max_overlap, top_k, suppress=None, detector=None):
    """Draws the objects that a network finds into a copy of a picture.

    :param original_image: PIL image; it stays as it is
    :param min_score: only objects with a greater score
    :param max_overlap: two boxes of one class that overlap by more than this are one object
    :param top_k: at most this many objects
    :param suppress: labels of classes to leave out
    :param detector: network and label map, as `load_detector` returns them; None: those of `checkpoint`, loaded once
    :return: PIL image, mode RGB, of the same size
    """
    detector = detector or load_detector(checkpoint)
    objects = find_objects(original_image, min_score, max_overlap, top_k, suppress, detector)
    return draw_objects(original_image, objects, make_label_colors(detector[1]))


@torch.no_grad()
def find_objects(original_image, min_score, max_overlap, top_k, suppress=None, detector=None):
    """The objects in a picture: a list of (label, score, (x_min, y_min, x_max, y_max) in the picture's pixels),
    by falling score. The arguments are those of `detect`."""
    model, label_map = detector or load_detector(checkpoint)
    names = {index: label for label, index in label_map.items()}
    image = render_window(original_image.convert('RGB'), mean=model.image_mean, std=model.image_std)  # (3, 300, 300)
    images = image.unsqueeze(0).to(model.priors_cxcy.device)  # (1, 3, 300, 300): a batch of one
    predicted_locs, predicted_scores = model(images)  # (1, 8732, 4), (1, 8732, n_classes)
    (boxes,), (labels,), (scores,) = model.detect_objects(  # (n, 4), (n), (n)
        predicted_locs, predicted_scores, min_score, max_overlap, top_k)
    width, height = original_image.size
    boxes = boxes.cpu().clamp(0, 1)  # (n, 4): an object may reach beyond the picture, but what we see ends there
    boxes = boxes * torch.tensor([width, height, width, height])  # (n, 4): fractions become pixels
    objects = [(names[label], score, tuple(box))
               for label, score, box in zip(labels.tolist(), scores.tolist(), boxes.tolist())]
    return [found for found in objects if found[0] not in (suppress or ())]


@functools.lru_cache(maxsize=1)
def load_detector(checkpoint):
    """The network of a checkpoint, on the GPU if there is one, and its label map; loaded once."""
    model, label_map = load_model(checkpoint)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    return model.to(device, memory_format=torch.channels_last), label_map


def draw_objects(original_image, objects, colors):
    """A copy of a picture with a frame around each object, and its label and score above the frame."""
    annotated = original_image.convert('RGB')  # a copy, also of a picture in this mode
    width, height = annotated.size
    line = max(2, round(min(width, height) / 150))  # pixels: to be seen in a picture of any size
    font = ImageFont.load_default(size=max(12, round(min(width, height) / 25)))
    draw = ImageDraw.Draw(annotated)
    for label, score, (x_min, y_min, x_max, y_max) in reversed(objects):  # the most confident last, on top
        # The last column and row are width − 1 and height − 1: a frame there is drawn whole.
        corners = min(x_min, width - 1), min(y_min, height - 1), min(x_max, width - 1), min(y_max, height - 1)
        draw.rectangle(corners, outline=colors[label], width=line)

        text = f'{label} {score:.2f}'
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        text_width, text_height = right - left + 2 * line, bottom - top + 2 * line
        # Above the frame, or inside it if there is no room; never outside of the picture.
        x = max(0, min(x_min, width - text_width))
        y = max(0, y_min - text_height if y_min >= text_height else min(y_min, height - text_height))
        draw.rectangle((x, y, x + text_width - 1, y + text_height - 1), fill=colors[label])
        draw.text((x + line - left, y + line - top), text, font=font, fill=readable_on(colors[label]))
    return annotated


def readable_on(color):
    """Black or white, whichever stands out against a color."""
    return 'black' if ImageColor.getcolor(color, 'L') > 110 else 'white'


def find_pictures(names) -> list[Path]:
    """The pictures named, and in place of a folder all pictures in it, by name."""
    require(names, 'no picture is named: set image')
    paths, readable = [], Image.registered_extensions()
    for path in map(Path, names):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in readable)
            require(inside, f"the folder '{path}' holds no picture: name another one")
            paths += inside
        else:
            paths.append(path)
    return paths


def output_paths(paths) -> list[Path]:
    """Where the annotated copies of pictures go, in the same order."""
    formats = Image.registered_extensions()  # {'.jpg': 'JPEG', …}
    is_file = Path(output).suffix.lower() in formats
    require(len(paths) == 1 or not is_file, f"output must be a folder for {len(paths)} pictures, not '{output}'")
    outputs = [Path(output) if is_file else Path(output, path.name) for path in paths]
    # A format that is unknown, or that Pillow can read but not write, becomes JPEG.
    outputs = [path if formats.get(path.suffix.lower()) in Image.SAVE else path.with_suffix('.jpg')
               for path in outputs]
    require(len(set(outputs)) == len(outputs),
            f"copies of several pictures in '{output}' would have the same name: detect in one folder at a time")
    for path, output_path in zip(paths, outputs):
        require(path.resolve() != output_path.resolve(), f"output would overwrite the picture '{path}' itself")
    return outputs


def save_image(image, path):
    """Saves a picture in the format that its name tells."""
    make_folder(path.parent)
    try:
        image.save(path)
    except Exception as error:  # every format has limits and exceptions of its own: WebP takes 16,383 pixels
        raise InputError(f"can't save the picture as '{path}' ({error}): choose another output, like one that ends "
                         'in .png') from None


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
    check_precision(precision)


if __name__ == '__main__':
    run_script(sys.modules[__name__])
