"""Figures that are charts: the learning rate, average precision, results of training runs."""

import csv
import itertools
import json

import torch

import train
from scenes import BOXES, HERE, OBJECTS, read
from svg import AMBER, BLUE, EDGE, GRAY, GREEN, INK, WHITE, Axes, Canvas, tint
from utils import average_precision, find_jaccard_overlap

TENTHS = (0, 20, 40, 60, 80, 100)  # of a mAP in percent
STEPS_PER_EPOCH = -(-16551 // train.batch_size)  # of VOC's trainval 2007 and 2012


def read_log(path):
    """Return {column: [(epoch, value), …]} of a log in results."""
    with open(HERE / 'results' / path, newline='', encoding='utf-8') as file:
        lines = list(csv.DictReader(file))
    return {name: [(int(line['epoch']), float(line[name])) for line in lines if line[name]] for name in lines[0]}


def read_report(path):
    return json.loads((HERE / 'results' / path).read_text(encoding='utf-8'))


def plainly(value):
    """Return 0.00001 instead of 1e-05, and 1 instead of 1.0."""
    return f'{value:.5f}'.rstrip('0').removesuffix('.')


# ---------------------------------------------------------------------------------------- learning rate

def learning_rate():
    """What train.py makes of the learning rate, below the mAP of a run with the same schedule."""
    canvas = Canvas(height=530)
    published = read_log('voc/gluoncv.csv')['mAP']
    last = published[-1][0]
    above = Axes(canvas, 86, 44, 484, 190, (0, 1), (65, 80))
    below = Axes(canvas, 86, 308, 484, 150, (0, 1), (5e-6, 3e-3), log_y=True)
    drops = [0, *train.decay_lr_at, 1]
    for axes in (above, below):
        total = last if axes is above else train.epochs
        axes.ticks_x(drops, lambda part, total=total: str(int(part * total + 1e-9)))
    above.ticks_y(range(65, 81, 5))
    below.ticks_y([1e-3, 1e-4, 1e-5], plainly)
    above.frame('', f'mAP of GluonCV, {last} epochs')
    below.frame('epoch', f'learning rate here, {train.epochs} epochs')
    above.curve([(epoch / last, 100 * value) for epoch, value in published if value > 0.65], GREEN, dots=False)
    steps = [*range(0, train.warmup, 20)]  # the warm-up, then the ends of what stays the same
    epochs = [int(part * train.epochs + 1e-9) for part in drops]
    for start, end in itertools.pairwise(epochs):
        steps += [max(start * STEPS_PER_EPOCH, train.warmup), end * STEPS_PER_EPOCH - 1]
        rate = train.learning_rate(steps[-1], STEPS_PER_EPOCH)
        x, y = below.at((start + end) / 2 / train.epochs, rate)
        canvas.center(x, y - 10, plainly(rate))
    below.curve([(step / STEPS_PER_EPOCH / train.epochs, max(train.learning_rate(step, STEPS_PER_EPOCH), 5e-6))
                 for step in steps], INK, dots=False)
    return canvas


# ------------------------------------------------------------------------------------ average precision

SHOWN = 6  # detections that are listed one by one


def judged(found):
    """Return (detection, overlap with its class's object, whether it's true) for all of them, highest score first. Each
    class has one object in the photograph, which can be found once."""
    lines, known = [], set()
    for one in found:
        place = [*OBJECTS].index(one['label']) if one['label'] in OBJECTS else None
        overlap = 0 if place is None else find_jaccard_overlap(torch.tensor([one['box']]), BOXES)[0, place].item()
        lines.append((one, overlap, overlap > 0.5 and place not in known))
        known |= {place} if lines[-1][2] else set()
    return lines


def eleven_points():
    """Precision and recall down the ranked list of what the network says at step 35, all classes taken as one."""
    lines = judged(read('teach')['steps']['35']['objects'])
    true, n_objects = torch.tensor([hit for _, _, hit in lines]), len(OBJECTS)
    found, rank = true.cumsum(dim=0), torch.arange(1, len(true) + 1)
    precision, recall = (found / rank).tolist(), (found / n_objects).tolist()
    points = []  # the eleven recalls, and the highest precision at each of them or further right
    for tenth in range(11):
        reached = [p for p, n in zip(precision, found.tolist()) if 10 * n >= tenth * n_objects]
        points.append((tenth / 10, max(reached, default=0)))
    value = average_precision(true, n_objects)
    torch.testing.assert_close(sum(p for _, p in points) / 11, value, rtol=0, atol=1e-6)

    canvas = Canvas(height=650)
    rows, fills = [['rank', 'detection', 'overlap', 'true?', 'precision', 'recall']], {}
    for i, ((one, overlap, hit), n) in enumerate(zip(lines[:SHOWN], found.tolist()), start=1):
        rows.append([str(i), f'{one["label"]} {one["score"]:.2f}', f'{overlap:.2f}', 'yes' if hit else 'no',
                     f'{n}/{i} = {n / i:.2f}', f'{n}/{n_objects} = {n / n_objects:.2f}'])
        fills[i, 3] = tint(GREEN if hit else GRAY)
    n = found[-1].item()
    rows.append([f'… {len(lines)}', '…', '', 'no', f'{n}/{len(lines)} = {precision[-1]:.2f}',
                 f'{n}/{n_objects} = {recall[-1]:.2f}'])
    fills[SHOWN + 1, 3] = tint(GRAY)
    canvas.table(16, 16, (62, 132, 84, 64, 114, 112), rows, fills)

    axes = Axes(canvas, 60, 330, 524, 236, (0, 1), (0, 1.08))
    axes.ticks_x([tenth / 10 for tenth in range(11)], plainly)
    axes.ticks_y([0, 0.25, 0.5, 0.75, 1], plainly)
    axes.frame('recall', 'precision')
    steps, previous = [], 0
    for i, r in enumerate(recall):
        if r > previous:
            steps += [axes.at(previous, max(precision[i:])), axes.at(r, max(precision[i:]))]
            previous = r
    canvas.path([*steps, axes.at(previous, 0)], GREEN, dashed=True)
    axes.curve(list(zip(recall, precision)), INK)
    for point in points:
        canvas.dot(*axes.at(*point), GREEN, radius=7)
    x, y = axes.at(0.04, 0.42)
    canvas.text(x, y, f'black: each detection\ngreen: the highest precision\nfrom here on; AP = {value:.2f},\n'
                'mean of the eleven points')
    return canvas


# --------------------------------------------------------------------------------------------- training runs

# Runs on VOC, beside GluonCV's: (name, log, pictures in an epoch, where the name stands beside the last point).
VOC_RUNS = (('one pass', 'voc/first_pass.csv', 1238, (10, 16)),
            ('three passes', 'voc/training_log.csv', 1238, (-8, -12)))
VOC_REPORT = 'voc/report.json'  # of the run whose classes are shown


def draw_classes(canvas, x, y, width, classes):
    """A bar for the average precision of each class, in percent."""
    for i, (label, row) in enumerate(classes):
        at_y = y + i * 30
        canvas.text(x + 106, at_y + 18, label, anchor='end')
        canvas.rect(x + 112, at_y, width - 160, 23, WHITE, EDGE)
        canvas.rect(x + 112, at_y, (width - 160) * row['AP'], 23, tint(GREEN, 0.6))
        canvas.text(x + width, at_y + 18, f'{100 * row["AP"]:.1f}', anchor='end', bold=True)


def ranked_classes(report):
    return sorted(report['classes'].items(), key=lambda item: -item[1]['AP'])


def results_bccd():
    """Both parts of the loss and the mAP over the epochs, and the classes' average precision in the end."""
    log, report = read_log('bccd/training_log.csv'), read_report('bccd/report.json')
    canvas, last = Canvas(height=350 + 30 * len(report['classes'])), log['epoch'][-1][0]
    highest = -(-max(value for _, value in log['confidence_loss']) // 1)
    losses = Axes(canvas, 44, 46, 224, 190, (0, last), (0, highest))
    losses.ticks_y(range(0, int(highest) + 1, 2))
    mAP = Axes(canvas, 340, 46, 240, 190, (0, last), (0, 100))
    mAP.ticks_y(TENTHS)
    for axes, label in ((losses, 'loss'), (mAP, f'mAP: {100 * report["mAP"]:.1f} at the end')):
        axes.ticks_x(range(0, last + 1, 6))
        axes.frame('epoch', label)
    for name, color, shift in (('confidence', AMBER, -14), ('localization', BLUE, -12)):
        points = log[f'{name}_loss']
        losses.curve(points, color)
        x, y = losses.at(*points[last // 2])
        canvas.center(x + 24, y + shift, name, BLUE if color == BLUE else INK)
    mAP.curve([(epoch, 100 * value) for epoch, value in log['mAP']], GREEN)
    canvas.text(128, 322, 'average precision', bold=True)
    draw_classes(canvas, 16, 334, 568, ranked_classes(report))
    return canvas


def results_voc():
    """The mAP over the number of pictures seen, beside a published one, and the classes' average precision."""
    report = read_report(VOC_REPORT)
    canvas = Canvas(height=760)
    axes = Axes(canvas, 50, 46, 530, 280, (1e3, 4e6), (0, 80), log_x=True)
    axes.ticks_x([1e3, 1e4, 1e5, 1e6], '{:,.0f}'.format)
    axes.ticks_y(TENTHS[:-1])
    axes.frame('training pictures seen', 'mAP')
    published = read_log('voc/gluoncv.csv')
    axes.curve([(pictures, 100 * value) for (_, pictures), (_, value) in zip(published['pictures'], published['mAP'])],
               INK, dots=False)
    canvas.text(*axes.at(4.2e5, 52), 'GluonCV,\nall of VOC', bold=True)
    for name, log, pictures, (right, down) in VOC_RUNS:
        points = [(epoch * pictures, 100 * value) for epoch, value in read_log(log)['mAP']]
        axes.curve(points, GREEN)
        x, y = axes.at(*points[-1])
        anchor = 'start' if right > 0 else 'end'
        canvas.text(x + right, y + down, f'{name}: {points[-1][1]:.1f}', GREEN, anchor, bold=True)
    canvas.text(16, 412, f'green: here, a part of VOC, tested on {report["images"]:,} pictures', GREEN, bold=True)
    classes = ranked_classes(report)
    for i in (0, 1):
        draw_classes(canvas, 8 + i * 296, 450, 280, classes[10 * i:10 * i + 10])
    canvas.text(120, 440, f'average precision of {VOC_RUNS[-1][0]} (mAP {100 * report["mAP"]:.1f})', bold=True)
    return canvas
