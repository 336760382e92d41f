"""Figures that are charts: the learning rate, average precision, results of training runs."""

import csv
import itertools
import json

import torch

import train
from scenes import BOXES, HERE, OBJECTS, read
from svg import AMBER, BLUE, EDGE, GRAY, GREEN, INK, WHITE, Axes, figure, tint
from utils import average_precision, find_jaccard_overlap

STEPS_PER_EPOCH = -(-16551 // train.batch_size)  # of VOC's trainval 2007 and 2012


def read_log(path):
    """Return {column: [(epoch, value), …]} of a log in results."""
    with open(HERE / 'results' / path, newline='', encoding='utf-8') as file:
        lines = list(csv.DictReader(file))
    return {name: [(int(line['epoch']), float(line[name])) for line in lines if line[name]] for name in lines[0]}


def read_report(path):
    """Return of a report the mAP in percent, [(class, AP in percent), …], best first, and the number of pictures."""
    report = json.loads((HERE / 'results' / path).read_text(encoding='utf-8'))
    classes = [(label, 100 * row['AP']) for label, row in report['classes'].items()]
    return 100 * report['mAP'], sorted(classes, key=lambda item: -item[1]), report['images']


def plainly(value):
    """Return 0.00001 instead of 1e-05, and 1 instead of 1.0."""
    return f'{value:.5f}'.rstrip('0').removesuffix('.')


@figure(height=574)
def learning_rate(canvas):
    """What train.py makes of the learning rate, below the mAP of a run with the same schedule."""
    published = read_log('voc/gluoncv.csv')['mAP']
    last = published[-1][0]
    above = Axes(canvas, 86, 44, 484, 234, (0, 1), (0, 80))
    below = Axes(canvas, 86, 352, 484, 150, (0, 1), (5e-6, 3e-3), log_y=True)
    drops = [0, *train.decay_lr_at, 1]
    for axes, total in ((above, last), (below, train.epochs)):
        axes.ticks_x(drops, lambda part, total=total: str(int(part * total + 1e-9)))
    above.ticks_y(range(0, 81, 20))
    below.ticks_y([1e-3, 1e-4, 1e-5], plainly)
    above.frame('', f'mAP of GluonCV, {last} epochs')
    below.frame('epoch', f'learning rate here, {train.epochs} epochs; both drops aligned')
    above.curve([(epoch / last, 100 * value) for epoch, value in published], INK, dots=False)
    epoch, value = published[3]
    x, y = above.at(epoch / last, 100 * value)
    canvas.dot(x, y)
    canvas.text(x + 12, y + 6, f'epoch {epoch}: {100 * value:.0f}')
    epochs, steps = [int(part * train.epochs + 1e-9) for part in drops], []
    for start, end in itertools.pairwise(epochs):
        steps += [max(start * STEPS_PER_EPOCH, train.warmup), end * STEPS_PER_EPOCH - 1]
        rate = train.learning_rate(steps[-1], STEPS_PER_EPOCH)
        x, y = below.at((start + end) / 2 / train.epochs, rate)
        canvas.center(x, y - 10, plainly(rate))
    below.curve([(step / STEPS_PER_EPOCH / train.epochs, train.learning_rate(step, STEPS_PER_EPOCH))
                 for step in steps], INK, dots=False)


@figure(height=760)
def eleven_points(canvas):
    """Precision and recall down the ranked list of what the network says at step 35, all classes taken as one."""
    ranked, known, lines = read('teach')['steps']['35']['objects'], set(), []
    for one in ranked:  # each class has one object, which can be found once
        overlaps = dict(zip(OBJECTS, find_jaccard_overlap(torch.tensor([one['box']]), BOXES)[0].tolist()))
        lines.append((one, overlaps.get(one['label'], 0)))
    true = [overlap > 0.5 and not (one['label'] in known or known.add(one['label'])) for one, overlap in lines]
    n_objects, n_all = len(OBJECTS), len(lines)
    found, rank = torch.tensor(true).cumsum(dim=0), torch.arange(1, n_all + 1)
    precision, recall = (found / rank).tolist(), (found / n_objects).tolist()
    points = []  # the eleven recalls, and the highest precision at each of them or further right
    for tenth in range(11):
        reached = [p for p, n in zip(precision, found.tolist()) if 10 * n >= tenth * n_objects]
        points.append((tenth / 10, max(reached, default=0)))
    value = average_precision(torch.tensor(true), n_objects)
    torch.testing.assert_close(sum(p for _, p in points) / 11, value, rtol=0, atol=1e-6)

    rows, fills = [['rank', 'detection', 'overlap', 'true?', 'precision', 'recall']], {}
    for i in range(n_all):
        if i < 6 or true[i] or i == n_all - 1:
            (one, overlap), n = lines[i], found[i].item()
            fills[len(rows), 3] = tint(GREEN if true[i] else GRAY)
            rows.append([str(i + 1), f'{one["label"]} {one["score"]:.2f}', f'{overlap:.2f}', 'yes' if true[i] else 'no',
                         f'{n}/{i + 1} = {precision[i]:.2f}', f'{n}/{n_objects} = {recall[i]:.2f}'])
        elif rows[-1][0] != '…':
            rows.append(6 * ['…'])
    canvas.table(16, 16, (52, 150, 80, 62, 118, 110), rows, fills)
    canvas.text(16, 40 + 33 * len(rows), 'true: the first to overlap an object of its class by more than 0.5')

    axes = Axes(canvas, 60, 458, 524, 236, (0, 1), (0, 1.08))
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


def draw_classes(canvas, x, y, width, classes):
    """A bar for the average precision of each class, in percent."""
    for i, (label, percent) in enumerate(classes):
        at_y = y + i * 30
        canvas.text(x + 106, at_y + 18, label, anchor='end')
        canvas.rect(x + 112, at_y, width - 160, 23, WHITE, EDGE)
        canvas.rect(x + 112, at_y, (width - 160) * percent / 100, 23, tint(INK, 0.4))
        canvas.text(x + width, at_y + 18, f'{percent:.1f}', anchor='end', bold=True)


@figure()
def results_bccd(canvas):
    """Both parts of the loss and the mAP over the epochs, and the classes' average precision in the end."""
    log, (_, classes, _) = read_log('bccd/training_log.csv'), read_report('bccd/report.json')
    last, canvas.height = log['epoch'][-1][0], 350 + 30 * len(classes)
    highest = -(-max(value for _, value in log['confidence_loss']) // 1)
    losses = Axes(canvas, 44, 46, 224, 190, (0, last), (0, highest))
    losses.ticks_y(range(0, int(highest) + 1, 2))
    mAP = Axes(canvas, 340, 46, 240, 190, (0, last), (50, 90))
    mAP.ticks_y(range(50, 91, 10))
    for axes, label in ((losses, 'loss'), (mAP, 'mAP')):
        axes.ticks_x(range(0, last + 1, 6))
        axes.frame('epoch', label)
    for name, color, shift in (('confidence', AMBER, -14), ('localization', BLUE, -12)):
        points = log[f'{name}_loss']
        losses.curve(points, color)
        x, y = losses.at(*points[last // 2])
        canvas.center(x + 24, y + shift, name, BLUE if color == BLUE else INK)
    for name, path, color, down in ('float32', 'training_log', INK, -14), ('bfloat16', 'amx', GRAY, 50):
        points = [(epoch, 100 * value) for epoch, value in read_log(f'bccd/{path}.csv')['mAP']]
        mAP.curve(points, color)
        canvas.text(580, mAP.at(*points[-1])[1] + down, f'{name}: {points[-1][1]:.1f}', color, 'end', bold=True)
    canvas.text(128, 322, 'average precision, float32', bold=True)
    draw_classes(canvas, 16, 334, 568, classes)


@figure(height=760)
def results_voc(canvas):
    """The mAP over the number of pictures seen, beside a published one, and the classes' average precision."""
    axes = Axes(canvas, 50, 46, 530, 280, (1e3, 4e6), (0, 80), log_x=True)
    axes.ticks_x([1e3, 1e4, 1e5, 1e6], '{:,.0f}'.format)
    axes.ticks_y(range(0, 81, 20))
    axes.frame('training pictures seen', 'mAP')
    axes.curve([(16551 * epoch, 100 * value) for epoch, value in read_log('voc/gluoncv.csv')['mAP']], GRAY, dots=False)
    canvas.text(*axes.at(4.2e5, 62), 'GluonCV,\nall of VOC', GRAY, bold=True)
    for name, log, report, pictures_per_epoch, right, down in (
            ('CPU, one pass', 'first_pass.csv', 'first_pass.json', 1238, 10, 16),
            ('CPU', 'training_log.csv', 'report.json', 1238, -8, -10), ('GPU', 'gpu.csv', 'gpu.json', 7004, 10, 12)):
        points = [(epoch * pictures_per_epoch, 100 * value) for epoch, value in read_log(f'voc/{log}')['mAP']]
        axes.curve(points, INK)
        value, classes, n_pictures = read_report(f'voc/{report}')
        (x, y), anchor = axes.at(*points[-1]), 'start' if right > 0 else 'end'
        canvas.text(x + right, y + down, f'{name}: {value:.1f}', INK, anchor, bold=True)
    canvas.text(16, 412, f'black: here, parts of VOC, tested on {n_pictures:,} pictures', bold=True)
    for i in (0, 1):
        draw_classes(canvas, 8 + i * 296, 450, 280, classes[10 * i:10 * i + 10])
    canvas.text(120, 440, f'average precision of the GPU\'s run (mAP {value:.1f})', bold=True)
