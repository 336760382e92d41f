"""Find the objects in pictures.

    python detect.py                                         # a picture of the sample
    python detect.py --image photo.jpg --min_score 0.4       # your own picture
    python detect.py --image holiday/ cat.png --save_json    # all pictures in a folder, and another one

Prints a line per object with its label, score and box in pixels. Saves a copy of each picture with the objects drawn.
Shows a single picture if there is a screen.
"""

import functools
import json
import math
import os
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from tqdm import tqdm

from model import load_model
from utils import (PICTURE_SUFFIXES, InputError, autocast, check_ranges, choose_device, choose_dtype, make_folder,
                   make_label_colors, place_network, read_image, render_window, replaced_file, require, run_script,
                   upright_rgb)

# Settings: each annotated constant is also a command-line flag of its name, which changes it for one run.

checkpoint: str = 'checkpoint_ssd300.pth'  # the trained network: a file of train.py or others; 'coco': torchvision's
image: list[str] = ['img/emoji_voc/VOC2007/JPEGImages/000009.jpg']  # pictures of any format, or folders of pictures
min_score: float = 0.2  # objects must have a higher score; a lower limit finds more, also more that isn't there
max_overlap: float = 0.5  # boxes of one class that overlap by more are one object; higher leaves more duplicates
top_k: int = 200  # at most this many objects per picture, the best ones
suppress: list[str] | None = None  # classes to leave out; None: show all
output: str = 'detections'  # folder for the annotated copies; for one picture, also a file name: .jpg, .png, …
save_json: bool = False  # also write the objects of all pictures to detections.json, beside the copies
device: str = 'auto'  # 'auto': CUDA if there is a GPU, else the CPU; or any PyTorch device, like 'cuda:1'
precision: str = 'float32'  # TF32 on GPUs since Ampere; 'bfloat16', 'float16'; 'auto': the best the device supports
font: str | None = None  # TrueType file for labels, like DejaVuSans.ttf; None: Pillow's own, for English


def main():
    require(0 <= min_score < 1, f'min_score must be at least 0 and less than 1, not {min_score}')
    check_ranges(sys.modules[__name__], max_overlap=(0, 1), top_k=(1, math.inf))
    paths = find_pictures(image)
    outputs = output_paths(paths)
    torch_device = choose_device(device)
    dtype = choose_dtype(torch_device, precision)
    model, label_map = load_detector(checkpoint, torch_device, dtype)
    for label in suppress or ():
        require(label in label_map, f"suppress names '{label}', but the classes are {', '.join(list(label_map)[1:])}")

    found, lines = {}, []
    for path, output_path in zip(tqdm(paths, unit='picture', disable=len(paths) == 1), outputs):
        try:
            original_image = read_image(path)
            with autocast(torch_device, dtype):
                objects = find_objects(original_image, min_score, max_overlap, top_k, suppress, (model, label_map))
            annotated = draw_objects(original_image, objects, make_label_colors(label_map), font)
            save_image(annotated, output_path)
        except InputError as error:
            if len(paths) == 1:
                raise
            tqdm.write(f'Error: {error}', file=sys.stderr)  # and continue with the next one
            continue
        found[str(path)] = [{'label': label, 'score': score, 'box': box} for label, score, box in objects]
        lines += [f'{label:<15} {score:.3f}  ({", ".join(f"{side:.0f}" for side in box)})\n'
                  for label, score, box in objects]
        lines.append(f'{len(objects)} objects in {path}, drawn in {output_path}\n')

    if save_json and found:
        with replaced_file(outputs[0].parent / 'detections.json') as file:
            file.write(json.dumps(found, indent=2).encode())
    sys.stdout.writelines(lines)  # last: everything is saved even if `| head` stops reading
    if len(paths) == 1:
        show(annotated)
    require(len(found) == len(paths), f'{len(paths) - len(found)} of {len(paths)} pictures failed')


def detect(original_image, min_score, max_overlap, top_k, suppress=None, detector=None):
    """Draw the objects that a network finds in a picture on a copy of it.

    :param original_image: PIL image; it stays as it is
    :param min_score, max_overlap, top_k, suppress: like the settings above
    :param detector: network and label map, as `load_detector` returns them; None: those of `checkpoint`, loaded once
    :return: PIL image, upright, mode RGB, of the same size
    """
    detector = detector or load_detector(checkpoint)
    objects = find_objects(original_image, min_score, max_overlap, top_k, suppress, detector)
    return draw_objects(original_image, objects, make_label_colors(detector[1]), font)


@torch.no_grad()
def find_objects(original_image, min_score, max_overlap, top_k, suppress=None, detector=None):
    """Return the objects in a picture, highest score first: a list of (label, score, (x_min, y_min, x_max, y_max)),
    boxes in the upright picture's pixels. The arguments are those of `detect`."""
    model, label_map = detector or load_detector(checkpoint)
    names = {index: label for label, index in label_map.items()}
    picture = upright_rgb(original_image)
    image = render_window(picture, mean=model.image_mean, std=model.image_std)  # (3, 300, 300)
    images = image.unsqueeze(0).to(model.priors_cxcy.device)  # (1, 3, 300, 300): a batch of one
    predicted_locs, predicted_scores = model(images)  # (1, 8732, 4), (1, 8732, n_classes)
    (boxes,), (labels,), (scores,) = model.detect_objects(  # (n, 4), (n), (n)
        predicted_locs, predicted_scores, min_score, max_overlap, top_k)
    boxes = boxes.cpu().clamp(0, 1)  # (n, 4): objects may reach beyond the picture, boxes end there
    boxes = boxes * torch.tensor([picture.width, picture.height] * 2)  # (n, 4): fractions become pixels
    return [(names[i], score, tuple(box)) for i, score, box in zip(labels.tolist(), scores.tolist(), boxes.tolist())
            if names[i] not in (suppress or ()) and box[0] < box[2] and box[1] < box[3]]  # else it is outside


@functools.lru_cache(maxsize=1)
def load_detector(checkpoint, device=None, dtype=torch.float32):
    """Return the network of a checkpoint, on a GPU if there is one, and its label map; loads them once."""
    model, label_map = load_model(checkpoint)
    place_network(model, device or choose_device('auto'), dtype)
    return model, label_map


def draw_objects(original_image, objects, colors, font=None):
    """Return a copy of a picture with a frame around each object, and its label and score above the frame."""
    annotated = upright_rgb(original_image)
    width, height = annotated.size
    line = max(2, round(min(width, height) / 150))  # pixels: visible in a picture of any size
    size = max(12, round(min(width, height) / 25))
    try:
        letters = ImageFont.truetype(font, size) if font else ImageFont.load_default(size)
    except OSError as error:
        raise InputError(f"font '{font}' can't be read ({error}): choose a TrueType file") from None
    no_letter = bytes(letters.getmask('\uffff'))  # what is drawn in place of letters that the font lacks
    draw = ImageDraw.Draw(annotated)
    for label, score, (x_min, y_min, x_max, y_max) in reversed(objects):  # the best last, on top
        # The last column and row are width − 1 and height − 1: frames at the edges stay inside.
        corners = min(x_min, width - 1), min(y_min, height - 1), min(x_max, width - 1), min(y_max, height - 1)
        draw.rectangle(corners, outline=colors[label], width=line)
        text = f'{label} {score:.2f}'
        if any(bytes(letters.getmask(letter)) == no_letter for letter in label):
            warnings.warn(f"the font lacks letters of '{label}': set font to a TrueType file that has them")
        left, top, right, bottom = draw.textbbox((0, 0), text, font=letters)
        text_width, text_height = right - left + 2 * line, bottom - top + 2 * line
        # Above the frame, or inside it if there is no room above; never outside the picture.
        x = max(0, min(x_min, width - text_width))
        y = max(0, y_min - text_height if y_min >= text_height else min(y_min, height - text_height))
        draw.rectangle((x, y, x + text_width - 1, y + text_height - 1), fill=colors[label])
        draw.text((x + line - left, y + line - top), text, font=letters, fill=readable_on(colors[label]))
    return annotated


def readable_on(color):
    """Return black or white, whichever stands out against a color."""
    return 'black' if ImageColor.getcolor(color, 'L') > 110 else 'white'


def find_pictures(names) -> list[Path]:
    """Return the paths of the named pictures and, for a folder, of all pictures in it, sorted by name."""
    require(names, 'no picture is given: set image')
    paths = []
    for path in map(Path, names):
        files = path.iterdir() if path.is_dir() else [path]
        inside = sorted(file for file in files if file == path or file.suffix.lower() in PICTURE_SUFFIXES)
        require(inside, f"the folder '{path}' has no picture: choose another one")
        paths += inside
    return paths


def output_paths(paths) -> list[Path]:
    """Return where the annotated copies of pictures go, in the same order."""
    formats = Image.registered_extensions()  # {'.jpg': 'JPEG', …}
    is_file = Path(output).suffix.lower() in formats
    require(len(paths) == 1 or not is_file, f"output must be a folder for {len(paths)} pictures, not '{output}'")
    outputs = [Path(output) if is_file else Path(output, path.name) for path in paths]
    # Formats that are unknown, or that Pillow can read but not write, become JPEG.
    outputs = [path if formats.get(path.suffix.lower()) in Image.SAVE else path.with_suffix('.jpg')
               for path in outputs]
    require(len(set(outputs)) == len(outputs),
            f"copies of several pictures in '{output}' would have the same name: detect in one folder at a time")
    for path, output_path in zip(paths, outputs):
        require(path.resolve() != output_path.resolve(), f"output would overwrite the picture '{path}' itself")
    return outputs


def save_image(picture, path):
    """Save a picture in the format implied by its extension."""
    make_folder(path.parent)
    try:
        picture.save(path)
    except Exception as error:  # every format has its own limits and errors: WebP takes 16,383 pixels
        raise InputError(f"can't save the picture as '{path}' ({error}): choose another output, like one that ends "
                         'in .png') from None


def show(picture):
    """Show a picture if there is a screen. The results are saved by then, so nothing may fail here."""
    if sys.platform in ('darwin', 'win32') or os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY'):
        try:
            picture.show()
        except Exception as error:
            print(f"The picture can't be shown here ({error})")


if __name__ == '__main__':
    run_script(sys.modules[__name__])
