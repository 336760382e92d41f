"""Figures that are charts: the learning rate, average precision."""

import torch

import train
from svg import AMBER, BLUE, GREEN, GREY, RED, Axes, Canvas, tint
from utils import average_precision

STEPS_PER_EPOCH = -(-16551 // train.batch_size)  # of VOC's trainval 2007 and 2012


def learning_rate():
    """What train.py makes of the learning rate, step by step."""
    canvas = Canvas(height=330)
    axes = Axes(canvas, 96, 50, 600, 200, (0, train.epochs), (5e-6, 2e-3), log_y=True)
    decays = [int(part * train.epochs + 1e-9) for part in train.decay_lr_at]
    axes.ticks_x([0, *decays, train.epochs])
    axes.ticks_y([1e-3, 1e-4, 1e-5], plainly)
    axes.frame('epoch', 'learning rate')
    steps = [*range(0, min(train.warmup, STEPS_PER_EPOCH), 20)]  # the warm-up, then the ends of what stays the same
    for start, end in zip([0, *decays], [*decays, train.epochs]):
        steps += [max(start * STEPS_PER_EPOCH, train.warmup), end * STEPS_PER_EPOCH - 1]
    canvas.path([axes.at(step / STEPS_PER_EPOCH, max(train.learning_rate(step, STEPS_PER_EPOCH), 5e-6))
                 for step in steps], BLUE)
    for start, end in zip([0, *decays], [*decays, train.epochs]):
        rate = train.learning_rate(end * STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH)
        x, y = axes.at((start + end) / 2, rate)
        canvas.text(x, y - 10, plainly(rate), BLUE, 'middle', bold=True)
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
    fills = {(i, 1): tint(GREEN) if hit else tint(GREY) for i, hit in enumerate(RANKED, start=1)}
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
