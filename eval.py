"""Measures the mean average precision (mAP) of a trained SSD300, by the rules of PASCAL VOC 2007.

    python eval.py                       # checkpoint_ssd300.pth on the test split
    python eval.py --split train         # on what it was trained with: has it learned at all?
    torchrun --nproc_per_node=4 eval.py  # the same on four GPUs

Needs the data lists of create_data_lists.py. Prints a table of the classes, and writes it as report.json,
with the precision–recall curves as precision_recall.png, to output_folder; with --save_results, the
detections as well.
"""

import json
import math
import os
import sys
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import distributed
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm

from datasets import PascalVOCDataset
from model import load_model
from utils import (autocast, average_precision, calculate_mAP, check_label_map, check_precision,
                   ignore_ctrl_c, join_processes, label_map, make_folder, make_label_colors, mean_of_classes,
                   picture_size, rank_detections, replaced_file, require, run_script, several_processes)

# Settings: each annotated constant is also a command-line flag of its name, which changes it for one run.

data_folder: str = 'data'  # where create_data_lists.py put the data lists
checkpoint: str = 'checkpoint_ssd300.pth'  # the trained network, a file that train.py wrote
split: str = 'test'  # 'test' or 'train'
batch_size: int = 16  # images per forward pass; changes speed and memory, not the result
workers: int = min(4, os.cpu_count() or 1)  # processes that read pictures; 0: the main one reads them itself
precision: str = 'float32'  # 'bfloat16' for hardware that computes in it; 'auto': bfloat16 where that is so
report_threshold: float = 0.5  # the report's precision and recall count detections with at least this score
save_results: bool = False  # also write the detections as VOC's development kit wants them
output_folder: str = 'evaluation'  # where report.json, precision_recall.png and the folder of results go

# With these, results compare with the paper's and others'. They aren't settings.
MIN_SCORE = 0.01  # so low that the precision–recall curve gets its long tail
MAX_OVERLAP = 0.45  # boxes of a class that overlap by more are one object
TOP_K = 200  # objects per image
OVERLAPS = [percent / 100 for percent in range(50, 100, 5)]  # of which a true detection needs more; VOC asks for 0.5


def main():
    check_settings()
    rank, n_processes, device = join_processes()
    torch.backends.cudnn.benchmark = True  # all inputs have one size: cuDNN may try what is fastest
    # With difficult objects: finding one must not be counted as an error.
    dataset = PascalVOCDataset(data_folder, split, keep_difficult=True, augment=False)
    model, model_label_map = load_model(checkpoint)
    check_label_map(model_label_map, dataset.label_map)
    dataset.normalize_for(model)
    model.to(device, memory_format=torch.channels_last)
    loader = make_test_loader(dataset, batch_size, workers, rank, n_processes)

    with autocast(device, precision):
        results = detect_all(loader, model)
    if n_processes > 1:
        distributed.destroy_process_group()
    if rank > 0:
        return  # the first process goes on alone
    ranked = rank_detections(*results, dataset.label_map, OVERLAPS)
    report = {'checkpoint': str(checkpoint), 'split': split, 'images': len(dataset),
              **make_report(ranked, report_threshold)}
    print_report(report)
    make_folder(output_folder)
    with replaced_file(Path(output_folder, 'report.json')) as file:
        file.write(json.dumps(without_nan(report), indent=2).encode())
    with replaced_file(Path(output_folder, 'precision_recall.png')) as file:
        draw_curves(ranked[0], make_label_colors(dataset.label_map)).save(file, 'PNG')
    if save_results:
        write_results(results, dataset, Path(output_folder, 'results'))
    print(f'Saved report.json{", results" if save_results else ""} and precision_recall.png in {output_folder}')


def make_test_loader(dataset, batch_size, workers, rank=0, n_processes=1):
    """The batches of a PascalVOCDataset in its order. Of several processes, each gets every n-th of the very
    batches that a single one would compute: the same arithmetic gives the same report."""
    batches = list(BatchSampler(range(len(dataset)), batch_size, drop_last=False))[rank::n_processes]
    # With a generator of its own: otherwise each pass would use up random numbers of the training.
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=dataset.collate_fn,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_ctrl_c,
                      generator=torch.Generator())


def evaluate(test_loader, model, label_map=label_map):
    """Detects the objects in all images of a loader and compares them with the true ones.

    :param test_loader: of `make_test_loader`, its dataset with difficult objects; of several processes, each
        calls this with its own
    :param model: SSD300; left in the mode, training or evaluation, in which it was
    :return: {label: average precision}, mAP; see `calculate_mAP`. Of several processes, the first gets it,
        the others None.
    """
    results = detect_all(test_loader, model)
    return calculate_mAP(*results, label_map) if results else None


@torch.no_grad()
def detect_all(test_loader, model):
    """The detections in all images and the true objects, as `calculate_mAP` wants them: detected boxes, labels
    and scores, true boxes, labels and difficulties, each a list with a tensor per image in the dataset's order.
    Of several processes, the first gets all of them, the others None."""
    several, device, was_training = several_processes(), model.priors_cxcy.device, model.training
    is_main = not several or distributed.get_rank() == 0
    model.eval()
    batches = []  # of each batch, six lists of N tensors
    for images, *truth in tqdm(test_loader, desc='Evaluating', unit='batch', disable=not is_main):
        images = images.to(device, non_blocking=True)  # (N, 3, 300, 300)
        predicted_locs, predicted_scores = model(images)  # (N, 8732, 4), (N, 8732, n_classes)
        boxes, labels, scores = model.detect_objects(  # N × (n_detections, 4), N × (n_detections), the same
            predicted_locs, predicted_scores, MIN_SCORE, MAX_OVERLAP, TOP_K)
        batches.append([[tensor.cpu() for tensor in tensors] for tensors in (boxes, labels, scores, *truth)])
    model.train(was_training)

    if several:
        shares = [None] * distributed.get_world_size() if is_main else None
        distributed.gather_object(batches, shares)
        if not is_main:
            return None
        # The processes took turns: so the first batches of all come first, then the second ones, …
        batches = [batch for turn in zip_longest(*shares) for batch in turn if batch]
    return tuple([tensor for batch in batches for tensor in batch[i]] for i in range(6))


def make_report(ranked, report_threshold) -> dict:
    """The figures of the report, from `rank_detections` for OVERLAPS. Precision and recall are those of the
    detections with a score of at least report_threshold."""
    classes = {}
    for label, (scores, true, n_objects) in ranked[0].items():  # (d), (d)
        areas = [area_under_curve(by_label[label][1], n_objects) for by_label in ranked]
        reported = true[scores >= report_threshold]  # (n_reported)
        classes[label] = {'objects': n_objects, 'AP': average_precision(true, n_objects), 'AP_area': areas[0],
                          'AP_50_95': sum(areas) / len(areas),
                          'precision': reported.float().mean().item(),  # nan if there is none
                          'recall': reported.sum().item() / n_objects if n_objects else math.nan}
    means = {f'm{name}': mean_of_classes(row[name] for row in classes.values())
             for name in ('AP', 'AP_area', 'AP_50_95')}
    return {**means, 'report_threshold': report_threshold, 'classes': classes}


def area_under_curve(true, n_objects) -> float:
    """The average precision of VOC 2010 and later: the area under the precision–recall curve, made to fall
    monotonously. The arguments are those of `average_precision`, whose value is about 2 points lower on VOC."""
    if n_objects == 0:
        return math.nan
    precision = true.cumsum(dim=0).double() / torch.arange(1, len(true) + 1, device=true.device)  # (d)
    highest = precision.flip(0).cummax(dim=0).values.flip(0)  # (d): at this recall or a higher one
    return highest[true].sum().item() / n_objects  # each true detection raises the recall by 1 / n_objects


def print_report(report):
    columns = ('objects', 'AP', 'AP_area', 'AP_50_95', 'precision', 'recall')
    print(f'{"class":<16}' + ''.join(f'{column:>11}' for column in columns))
    for label, row in report['classes'].items():
        print(f'{label:<16}{row["objects"]:>11,}' + ''.join(f'{row[column]:>11.4f}' for column in columns[1:]))
    print('AP: by 11 points, as in VOC 2007. AP_area: area under the curve, as from VOC 2010 on.\n'
          'AP_50_95: the mean of such areas for overlaps of 0.5, 0.55, … 0.95, as in COCO.\n'
          f'precision, recall: of the detections with a score of at least {report["report_threshold"]}')
    print(f'mAP of {report["images"]:,} images: {report["mAP"]:.4f} (area: {report["mAP_area"]:.4f}, '
          f'50:95: {report["mAP_50_95"]:.4f})')


def without_nan(value):
    """The same with None in place of nan, which JSON doesn't know."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def draw_curves(ranked, colors):
    """One picture with the precision–recall curve of each class: recall to the right, precision upwards."""
    plots = []
    for label, (_, true, n_objects) in ranked.items():
        n_true = true.cumsum(dim=0)  # (d): after the best 1, 2, …, d detections
        precision = n_true / torch.arange(1, len(true) + 1)  # (d)
        points = list(zip((n_true / n_objects).tolist(), precision.tolist())) if n_objects else []
        points = [(0, y) for _, y in points[:1]] + points  # from the left edge on
        title = f'{label} {average_precision(true, n_objects):.3f}'
        plots.append(Plot(title, [(None, colors[label], points)], (0, 1), (0, 1)))
    return draw_plots(plots)


def write_results(results, dataset, folder):
    """Writes the detections of `detect_all` in VOC's format, a file per class. Each line is a detection: the
    picture's name, the score, and xmin, ymin, xmax, ymax in the picture's pixels, which VOC counts from 1."""
    lines = {label: [] for label, index in dataset.label_map.items() if index > 0}
    names = {index: label for label, index in dataset.label_map.items()}
    for path, boxes, indices, scores in zip(dataset.images, *results[:3]):
        boxes = boxes * torch.tensor(picture_size(path)).repeat(2) + 1  # (n, 4): fractions become pixels
        for box, index, score in zip(boxes.tolist(), indices.tolist(), scores.tolist()):
            numbers = ' '.join(f'{value:.3f}' for value in box)
            lines[names[index]].append(f'{Path(path).stem} {score:.6f} {numbers}\n')
    make_folder(folder)
    for label in lines:
        with replaced_file(Path(folder, f'comp4_det_{dataset.split.lower()}_{label}.txt')) as file:
            file.write(''.join(lines[label]).encode())


def check_settings():
    require(batch_size >= 1, f'batch_size must be at least 1, not {batch_size}')
    require(0 <= report_threshold <= 1, f'report_threshold must be between 0 and 1, not {report_threshold}')
    require(workers >= 0, f'workers must be 0 or more, not {workers}')
    check_precision(precision)


# ------------------------------------------------------------------------------------------- curves

class Plot(NamedTuple):
    """A small line chart. A range is (lowest, highest); None: from 0 to what the lines need."""
    title: str
    lines: list  # of (name or None, color, [(x, y), …])
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


def draw_log(lines) -> Image.Image:
    """A picture of train.py's log, of losses, learning rate and mAP over the epochs."""
    def curve(column):
        return [(int(line['epoch']), float(line[column])) for line in lines
                if line.get(column, '') != '']  # the log of an older version may lack a column

    losses = [('loss', 'black', curve('loss')), ('confidence', 'darkorange', curve('confidence_loss')),
              ('localization', 'steelblue', curve('localization_loss'))]
    return draw_plots([Plot('loss', losses), Plot('learning rate', [(None, 'black', curve('lr'))]),
                       Plot('mAP', [(None, 'seagreen', curve('mAP'))], y_range=(0, 1))])


def draw_plots(plots) -> Image.Image:
    """One picture of several plots, side by side and in rows."""
    # Everything is drawn at twice its size and then reduced, which smooths the lines.
    width, height, left, top, right, bottom = 520, 360, 116, 60, 44, 60  # of a plot, and the space around it
    columns = math.ceil(math.sqrt(len(plots)))
    rows = math.ceil(len(plots) / columns)
    image = Image.new('RGB', (columns * (left + width + right), rows * (top + height + bottom)), 'white')
    for i, plot in enumerate(plots):
        row, column = divmod(i, columns)
        corner = column * (left + width + right) + left, row * (top + height + bottom) + top
        draw_plot(ImageDraw.Draw(image), plot, *corner, width, height)
    return image.reduce(2)


def draw_plot(draw, plot, left, top, width, height):
    """Draws one plot whose axes enclose the given rectangle. Points whose y is nan are left out; a line of
    few points shows each as a dot."""
    lines = [(name, color, [(x, y) for x, y in points if math.isfinite(y)]) for name, color, points in plot.lines]
    x_low, x_high = plot.x_range or range_from_zero(x for _, _, points in lines for x, _ in points)
    y_low, y_high = plot.y_range or range_from_zero(y for _, _, points in lines for _, y in points)

    def place(x, y):
        return left + width * (x - x_low) / (x_high - x_low), top + height * (y_high - y) / (y_high - y_low)

    text = partial(draw.text, font=ImageFont.load_default(size=28))
    text((left, top - 16), plot.title, fill='black', anchor='ls')
    for tick in round_ticks(x_low, x_high):
        x, _ = place(tick, y_low)
        draw.line((x, top, x, top + height), fill='lightgray', width=2)
        text((x, top + height + 10), f'{tick:g}', fill='black', anchor='mt')
    for tick in round_ticks(y_low, y_high):
        _, y = place(x_low, tick)
        draw.line((left, y, left + width, y), fill='lightgray', width=2)
        text((left - 12, y), f'{tick:g}', fill='black', anchor='rm')
    draw.line((left, top, left, top + height, left + width, top + height), fill='gray', width=2)

    for i, (name, color, points) in enumerate(lines):
        places = [place(*point) for point in points]
        draw.line(places, fill=color, width=5)
        for x, y in places if len(places) <= 30 else ():
            draw.ellipse((x - 7, y - 7, x + 7, y + 7), fill=color)
        if name:
            text((left + width - 10, top + 10 + 36 * i), name, fill=color, anchor='ra', stroke_width=4,
                 stroke_fill='white')


def range_from_zero(values) -> tuple[float, float]:
    """The range of an axis that shows 0 and all values."""
    values = [0, *values]
    return (min(values), max(values)) if any(values) else (0, 1)


def round_ticks(low, high) -> list[float]:
    """At most six round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 5.001 > high - low)
    return [n * step for n in range(math.ceil(low / step - 0.001), math.floor(high / step + 0.001) + 1)]


if __name__ == '__main__':
    run_script(sys.modules[__name__])
