"""Figures that are charts: the learning rate, average precision, results of training runs."""

import csv
import json

import torch

import train
from scenes import HERE
from svg import AMBER, BLUE, EDGE, GREEN, GRAY, INK, RED, WHITE, Axes, Canvas, tint
from utils import average_precision

STEPS_PER_EPOCH = -(-16551 // train.batch_size)  # of VOC's trainval 2007 and 2012


def learning_rate():
    """What train.py makes of the learning rate, step by step."""
    canvas = Canvas(height=330)
    axes = Axes(canvas, 96, 50, 600, 200, (0, train.epochs), (5e-6, 3e-3), log_y=True)
    decays = [int(part * train.epochs + 1e-9) for part in train.decay_lr_at]
    axes.ticks_x([0, *decays, train.epochs])
    axes.ticks_y([1e-3, 1e-4, 1e-5], plainly)
    axes.frame('epoch', 'learning rate')
    steps = [*range(0, min(train.warmup, STEPS_PER_EPOCH), 20)]  # the warm-up, then the ends of what stays the same
    for start, end in zip([0, *decays], [*decays, train.epochs]):
        steps += [max(start * STEPS_PER_EPOCH, train.warmup), end * STEPS_PER_EPOCH - 1]
        rate = train.learning_rate(end * STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH)
        x, y = axes.at((start + end) / 2, rate)
        canvas.text(x, y - 10, plainly(rate), BLUE, 'middle', bold=True)
    canvas.path([axes.at(step / STEPS_PER_EPOCH, max(train.learning_rate(step, STEPS_PER_EPOCH), 5e-6))
                 for step in steps], BLUE)
    return canvas


def plainly(value):
    """0.00001 instead of 1e-05, and 1 instead of 1.0."""
    return f'{value:.5f}'.rstrip('0').removesuffix('.')


# ------------------------------------------------------------------------------------ average precision

N_OBJECTS = 7  # of the class, in all pictures
RANKED = (True, True, False, True, False, True, False, False, True, False)  # detections by falling score


def eleven_points():
    """Precision and recall down a ranked list of detections, their curve, and the eleven points of it."""
    true = torch.tensor(RANKED)
    n_true = true.cumsum(dim=0)
    rank = torch.arange(1, len(true) + 1)
    precision, recall = (n_true / rank).tolist(), (n_true / N_OBJECTS).tolist()
    points = []  # the eleven recalls, and the highest precision at each of them or further right
    for tenth in range(11):
        reached = [p for p, found in zip(precision, n_true.tolist()) if 10 * found >= tenth * N_OBJECTS]
        points.append((tenth / 10, max(reached, default=0)))
    value = average_precision(true, N_OBJECTS)
    torch.testing.assert_close(sum(p for _, p in points) / 11, value, rtol=0, atol=1e-6)

    canvas = Canvas(height=452)
    rows = [['rank', 'true?', 'precision', 'recall']]
    rows += [[str(i), 'yes' if hit else 'no', f'{found}/{i} = {p:.2f}', f'{found}/{N_OBJECTS} = {r:.2f}']
             for i, hit, found, p, r in zip(rank.tolist(), RANKED, n_true.tolist(), precision, recall)]
    fills = {(i, 1): tint(GREEN) if hit else tint(GRAY) for i, hit in enumerate(RANKED, start=1)}
    canvas.table(14, 20, (52, 58, 122, 114), rows, fills)
    canvas.text(14, 412, f'{len(RANKED)} detections, by falling score,\nof a class that has {N_OBJECTS} objects')

    axes = Axes(canvas, 412, 50, 290, 270, (0, 1), (0, 1.05))
    axes.ticks_x([0, 0.2, 0.4, 0.6, 0.8, 1], plainly)
    axes.ticks_y([0, 0.2, 0.4, 0.6, 0.8, 1], plainly)
    axes.frame('recall', 'precision')
    draw_interpolated(canvas, axes, precision, recall)
    canvas.path([axes.at(r, p) for r, p in zip(recall, precision)], BLUE)
    for r, p in zip(recall, precision):
        canvas.dot(*axes.at(r, p), BLUE, radius=4)
    for point in points:
        canvas.dot(*axes.at(*point), RED, radius=6)
    canvas.text(384, 412, f'AP: mean height of the eleven\nred points, {value:.2f}', RED, bold=True)
    return canvas


def draw_interpolated(canvas, axes, precision, recall):
    """At each recall, the highest precision at this recall or a higher one."""
    steps, previous = [], 0
    for i, r in enumerate(recall):
        if r > previous:
            height = max(precision[i:])
            steps += [axes.at(previous, height), axes.at(r, height)]
            previous = r
    steps.append(axes.at(previous, 0))
    canvas.path(steps, AMBER, dashed=True)


# --------------------------------------------------------------------------------------------- training runs

TENTHS = (0, 0.2, 0.4, 0.6, 0.8, 1)
VOC_IMAGES = 1238  # in an "epoch" of our training on VOC, a quarter of a pass


def read_results(folder):
    """A training's log, {column: [(epoch, value), …]}, and report.json."""
    path = HERE / 'results' / folder
    return read_log(path / 'training_log.csv'), json.loads((path / 'report.json').read_text())


def read_log(path):
    with open(path, newline='', encoding='utf-8') as file:
        lines = list(csv.DictReader(file))
    return {name: [(int(line['epoch']), float(line[name])) for line in lines if line[name]] for name in lines[0]}


def draw_curve(axes, points, color):
    places = [axes.at(*point) for point in points]
    axes.canvas.path(places, color)
    for place in places:
        axes.canvas.dot(*place, color, radius=4)


def draw_classes(canvas, x, y, width, classes):
    """A bar for the average precision of each class."""
    for i, (label, row) in enumerate(classes):
        at_y = y + i * 32
        canvas.text(x + 112, at_y + 18, label, anchor='end')
        canvas.rect(x + 120, at_y, width - 172, 24, WHITE, EDGE)
        canvas.rect(x + 120, at_y, (width - 172) * row['AP'], 24, tint(GREEN, 0.6))
        canvas.text(x + width, at_y + 18, f'{row["AP"]:.2f}', anchor='end', bold=True)


def results_bccd():
    """Both parts of the loss and the mAP over the epochs, and the classes' average precision in the end."""
    log, report = read_results('bccd')
    canvas, last = Canvas(height=370 + 32 * len(report['classes'])), log['epoch'][-1][0]
    highest = -(-max(value for _, value in log['confidence_loss']) // 1)
    losses = Axes(canvas, 56, 50, 280, 200, (0, last), (0, highest))
    losses.ticks_y(range(0, int(highest) + 1, 2))
    mAP = Axes(canvas, 418, 50, 280, 200, (0, last), (0, 1))
    mAP.ticks_y(TENTHS, plainly)
    for axes, label in ((losses, 'loss'), (mAP, f'mAP: {report["mAP"]:.2f} at the end')):
        axes.ticks_x(range(0, last + 1, 3))
        axes.frame('epoch', label)
    for name, color, ink in (('confidence', AMBER, INK), ('localization', BLUE, BLUE)):
        points = log[f'{name}_loss']
        draw_curve(losses, points, color)
        x, y = losses.at(*points[last // 2])
        canvas.text(x + 30, y - 12, name, ink, 'middle', bold=True)
    draw_curve(mAP, log['mAP'], GREEN)
    draw_classes(canvas, 16, 344, 688, report['classes'].items())
    canvas.text(136, 332, 'average precision', bold=True)
    return canvas


def results_voc():
    """The mAP over the number of pictures seen, beside a published one, and the classes' average precision."""
    log, report = read_results('voc')
    canvas = Canvas(height=872)
    axes = Axes(canvas, 56, 50, 640, 280, (1e3, 4e6), (0, 0.8), log_x=True)
    axes.ticks_x([1e3, 1e4, 1e5, 1e6], '{:,.0f}'.format)
    axes.ticks_y(TENTHS[:-1], plainly)
    axes.frame('training pictures seen', 'mAP')
    published = read_log(HERE / 'results/voc/gluoncv.csv')
    canvas.path([axes.at(pictures, value) for (_, pictures), (_, value)
                 in zip(published['pictures'], published['mAP'])])
    measured = read_log(HERE / 'results/voc/first_pass.csv')['mAP'] + log['mAP']
    draw_curve(axes, [(epoch * VOC_IMAGES, value) for epoch, value in measured], GREEN)
    canvas.text(20, 420, 'GluonCV: all of VOC, 16,551 training and 4,952 test pictures', bold=True)
    canvas.text(20, 448, f'This code: 4,952 training and {report["images"]:,} test pictures, conv6 and\n'
                'conv7 from random weights, a tenth of the rate at the end', GREEN, bold=True)
    for i in (0, 1):
        draw_classes(canvas, 8 + i * 352, 540, 340, list(report['classes'].items())[10 * i:10 * i + 10])
    canvas.text(128, 528, f'average precision (mAP {report["mAP"]:.2f})', bold=True)
    return canvas
