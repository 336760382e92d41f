"""Measure the mean average precision (mAP) of a trained SSD300 by the rules of PASCAL VOC 2007.

    python eval.py                       # checkpoint_ssd300.pth on the test split
    python eval.py --split train         # on the pictures that it was trained with: has it learned at all?
    torchrun --nproc_per_node=4 eval.py  # the same on four GPUs

Reads the data lists of create_data_lists.py. Prints a table of the classes and writes it to output_folder as
report.json; also the precision–recall curves, precision_recall.png, if matplotlib is installed, and the detections
with --save_results.
"""

import json
import math
import os
import re
import sys
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import torch
from torch import distributed
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm

from datasets import PascalVOCDataset
from model import load_model
from utils import (CtrlC, autocast, average_precision, calculate_mAP, check_label_map, check_ranges, choose_dtype,
                   ignore_ctrl_c, join_processes, label_map, make_folder, mean_of_classes, picture_size,
                   place_network, rank_detections, replaced_file, require, run_script, several_processes, until_ctrl_c)

# Settings: each annotated constant is also a command-line flag of its name, which changes it for one run.

data_folder: str = 'data'  # folder with the data lists of create_data_lists.py
checkpoint: str = 'checkpoint_ssd300.pth'  # the trained network: a file of train.py or others; 'coco': torchvision's
split: str = 'test'  # 'test' or 'train'
batch_size: int = 16  # pictures per forward pass; changes speed and memory, not the result
workers: int = min(4, os.cpu_count() or 1)  # processes that read pictures; 0: the main process reads them itself
device: str = 'auto'  # 'auto': CUDA if there is a GPU, else the CPU; or any PyTorch device, like 'cuda:1'
precision: str = 'float32'  # TF32 on GPUs since Ampere; 'bfloat16', 'float16'; 'auto': the best the device supports
report_threshold: float = 0.5  # the report's precision and recall count detections with at least this score
save_results: bool = False  # also write the detections in the format of VOC's development kit
output_folder: str = 'evaluation'  # folder for report.json, precision_recall.png and the results

# These aren't settings: with them, results can be compared with the paper's and others'.
MIN_SCORE = 0.01  # so low that the precision–recall curve gets its long tail
MAX_OVERLAP = 0.45  # boxes of one class that overlap by more are one object
TOP_K = 200  # objects per picture
OVERLAPS = [percent / 100 for percent in range(50, 100, 5)]  # a true detection needs more; 0.5 in VOC


def main():
    check_ranges(sys.modules[__name__], batch_size=(1, math.inf), workers=(0, math.inf), report_threshold=(0, 1))
    rank, n_processes, main_device = join_processes(device)
    dtype = choose_dtype(main_device, precision)
    torch.backends.cudnn.benchmark = True  # all inputs have one size: cuDNN may try what is fastest
    # With difficult objects: finding one must not count as an error.
    dataset = PascalVOCDataset(data_folder, split, keep_difficult=True, augment=False)
    model, model_label_map = load_model(checkpoint)
    check_label_map(model_label_map, dataset.label_map)
    dataset.normalize_for(model)
    place_network(model, main_device, dtype)
    loader = make_test_loader(dataset, batch_size, workers, rank, n_processes)
    names = result_names(dataset) if save_results else None  # now, since they may be refused
    make_folder(output_folder)

    with CtrlC(), autocast(main_device, dtype):
        results = detect_all(loader, model)
    if n_processes > 1:
        distributed.destroy_process_group()
    if rank > 0:
        return  # the first process continues alone
    ranked = rank_detections(*results, dataset.label_map, OVERLAPS)
    about = {'checkpoint': str(checkpoint), 'split': split, 'images': len(dataset)}
    report = about | make_report(ranked, report_threshold)
    with replaced_file(Path(output_folder, 'report.json')) as file:
        file.write(json.dumps(without_nan(report), indent=2).encode())
    draw_plots(Path(output_folder, 'precision_recall.png'), precision_recall_curves(ranked[0]))
    if save_results:
        write_results(results, dataset, names, Path(output_folder, 'results'))
    print_report(report)  # last: whatever happens to the output, the files are saved
    print(f"The report is in '{output_folder}'")


def make_test_loader(dataset, batch_size, workers, rank=0, n_processes=1):
    """Return the batches of a PascalVOCDataset in its order. The n-th of several processes gets every n-th of the
    batches that a single one would compute: the same arithmetic gives the same report."""
    batches = list(BatchSampler(range(len(dataset)), batch_size, drop_last=False))[rank::n_processes]
    # With its own generator: otherwise each pass would use up random numbers of the training.
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=dataset.collate_fn,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_ctrl_c,
                      generator=torch.Generator())


def evaluate(test_loader, model, label_map=label_map):
    """Return {label: average precision} and the mAP of a network (see `calculate_mAP`) on the pictures of a loader from
    `make_test_loader`, whose dataset must keep difficult objects. The network stays in its mode, training or
    evaluation. Only the first of several processes gets the result, the others get None."""
    results = detect_all(test_loader, model)
    return calculate_mAP(*results, label_map) if results else None


@torch.no_grad()
def detect_all(test_loader, model):
    """Return the detections in all pictures and the true objects as `calculate_mAP` takes them: detected boxes, labels
    and scores, true boxes, labels and difficulties, each a list with a tensor per picture in the dataset's order. Only
    the first of several processes gets them, the others get None. After Ctrl-C, raises KeyboardInterrupt between
    batches."""
    several = several_processes()
    is_main = not several or distributed.get_rank() == 0
    device = model.priors_cxcy.device
    was_training = model.training
    model.eval()
    batches = []  # of each batch, six lists of N tensors
    for images, *truth, n_objects in until_ctrl_c(tqdm(test_loader, 'Evaluating', unit='batch', disable=not is_main)):
        images = images.to(device, non_blocking=True)  # (N, 3, 300, 300)
        predicted_locs, predicted_scores = model(images)  # (N, 8732, 4), (N, 8732, n_classes)
        detected = model.detect_objects(  # boxes N × (n_detections, 4), labels and scores N × (n_detections)
            predicted_locs, predicted_scores, MIN_SCORE, MAX_OVERLAP, TOP_K)
        # Cloned, since a tensor from a worker keeps a file open as long as it lives.
        truth = [tensor.clone().split(n_objects) for tensor in truth]  # N × (n_objects, 4), N × (n_objects), the same
        batches.append([*([tensor.cpu() for tensor in tensors] for tensors in detected), *truth])
    model.train(was_training)

    if several:
        shares = [None] * distributed.get_world_size() if is_main else None
        distributed.gather_object(batches, shares)
        if not is_main:
            return None
        # The processes took turns: first come the first batches of all, then the second ones, …
        batches = [batch for turn in zip_longest(*shares) for batch in turn if batch]
    return tuple([tensor for batch in batches for tensor in batch[i]] for i in range(6))


def make_report(ranked, report_threshold) -> dict:
    """Return the figures of the report, from `rank_detections` for OVERLAPS. Its precision and recall count detections
    with a score of at least report_threshold."""
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
    """Return the average precision of VOC 2010 and later: the area under the precision–recall curve, made monotonically
    decreasing. The arguments are those of `average_precision`."""
    if n_objects == 0:
        return math.nan
    precision = true.cumsum(dim=0).double() / torch.arange(1, len(true) + 1, device=true.device)  # (d)
    highest = precision.flip(0).cummax(dim=0).values.flip(0)  # (d): at this recall or a higher one
    return highest[true].sum().item() / n_objects  # each true detection raises the recall by 1 / n_objects


def print_report(report):
    columns = ('AP', 'AP_area', 'AP_50_95', 'precision', 'recall')
    width = max(map(len, report['classes'])) + 2
    print(f'{"class":<{width}}{"objects":>9}' + ''.join(f'{column:>11}' for column in columns))
    for label, row in report['classes'].items():
        percents = ('–' if math.isnan(row[column]) else f'{100 * row[column]:.1f}' for column in columns)
        print(f'{label:<{width}}{row["objects"]:>9,}' + ''.join(f'{percent:>11}' for percent in percents))
    print('All in %. AP: 11 points, as in VOC 2007. AP_area: area under the curve, as in VOC 2010 and later.\n'
          'AP_50_95: mean of such areas for overlaps of 0.5, 0.55, … 0.95, as in COCO.\n'
          f'precision, recall: of the detections with a score of at least {report["report_threshold"]}')
    print(f'mAP of {report["images"]:,} pictures: {report["mAP"]:.1%} (area: {report["mAP_area"]:.1%}, '
          f'50:95: {report["mAP_50_95"]:.1%})')


def without_nan(value):
    """Return a value with None in place of nan, which JSON lacks."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def precision_recall_curves(ranked) -> dict:
    """Return the precision–recall curve of each class as `draw_plots` takes them."""
    plots = {}
    for label, (_, true, n_objects) in ranked.items():
        n_true = true.cumsum(dim=0)  # (d): after the best 1, 2, …, d detections
        recall = n_true / n_objects if n_objects else n_true  # (d)
        precision = n_true / torch.arange(1, len(true) + 1)  # (d)
        plots[f'{label} {average_precision(true, n_objects):.1%}'] = {'': (recall.tolist(), precision.tolist())}
    return plots


def draw_plots(path, plots):
    """Save small line charts, in rows and columns, as a PNG. Does nothing if matplotlib isn't installed.

    :param plots: {title: {name: (list of x, list of y)}}; points whose y is None are left out
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    n_columns = math.ceil(math.sqrt(len(plots)))
    n_rows = math.ceil(len(plots) / n_columns)
    figure = Figure(figsize=(4 * n_columns, 3 * n_rows), layout='constrained')
    for i, (title, lines) in enumerate(plots.items(), start=1):
        axes = figure.add_subplot(n_rows, n_columns, i, title=title)
        for name, points in lines.items():
            points = [(x, y) for x, y in zip(*points) if y is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], '.-' if len(points) < 40 else '-', label=name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.4)
        if len(lines) > 1:
            axes.legend()
    with replaced_file(path) as file:
        figure.savefig(file, format='png')


def result_names(dataset) -> list[str]:
    """Return the pictures' names for VOC's result files, in which a name is one word. Raises InputError if one isn't,
    or if two are the same."""
    names = [Path(path).stem for path in dataset.paths]
    for name, count in Counter(names).items():
        require(len(name.split()) == count == 1, f"save_results needs pictures with different names without spaces, "
                f"unlike '{name}': rename them, or leave save_results off")
    return names


def write_results(results, dataset, names, folder):
    """Write the detections of `detect_all` in VOC's format, a file per class. A line is a detection: the picture's
    name, the score, and xmin, ymin, xmax, ymax in the picture's pixels, which VOC counts from 1."""
    lines = {index: [] for index in dataset.label_map.values() if index > 0}
    for path, name, boxes, indices, scores in zip(dataset.paths, names, *results[:3]):
        boxes = boxes * torch.tensor(picture_size(path)).repeat(2) + 1  # (n, 4): fractions become pixels
        for box, index, score in zip(boxes.tolist(), indices.tolist(), scores.tolist()):
            numbers = ' '.join(f'{value:.3f}' for value in box)
            lines[index].append(f'{name} {score:.6f} {numbers}\n')
    make_folder(folder)
    for label, index in dataset.label_map.items():
        if index > 0:
            safe_label = re.sub(r'[/\\:*?"<>|]', '_', label)  # which a file name can't have
            with replaced_file(Path(folder, f'comp4_det_{dataset.split.lower()}_{safe_label}.txt')) as file:
                file.write(''.join(lines[index]).encode())


if __name__ == '__main__':
    run_script(sys.modules[__name__])
