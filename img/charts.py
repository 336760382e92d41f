"""Figures that are charts: the learning rate, hard negatives, average precision."""

import torch
import torch.nn.functional as F

import train
from model import MultiBoxLoss
from scenes import Scene, network, sample
from svg import AMBER, BLUE, EDGE, GREEN, GREY, INK, PURPLE, RED, Axes, Canvas, tint
from utils import average_precision, find_jaccard_overlap


def learning_rate():
    """The learning rate of train.py at the end of each epoch."""
    steps = 2069  # of 8 images, per epoch of VOC's 16,551
    rates = [train.learning_rate((epoch + 1) * steps - 1, steps) for epoch in range(train.epochs)]
    falls = [epoch for epoch in range(1, train.epochs) if rates[epoch] < rates[epoch - 1]]

    canvas = Canvas(height=300)
    axes = Axes(canvas, 90, 46, 700, 190, (0, train.epochs), (5e-6, 2e-3), log_y=True)
    axes.ticks_x([0, *falls, train.epochs])
    axes.ticks_y([1e-3, 1e-4, 1e-5], plainly)
    axes.frame('epoch', 'learning rate')
    points = [axes.at(epoch + offset, rate) for epoch, rate in enumerate(rates) for offset in (0, 1)]
    corners = [point for before, point, after in zip([None, *points], points, [*points[1:], None])
               if before is None or after is None or before[1] != point[1] or after[1] != point[1]]
    canvas.path(corners, BLUE)
    for start, end in zip([0, *falls], [*falls, train.epochs]):
        x, y = axes.at((start + end) / 2, rates[start])
        canvas.text(x, y - 10, plainly(rates[start]), BLUE, 'middle', bold=True)
    return canvas


def plainly(value):
    """0.00001 instead of 1e-05, and 1 instead of 1.0."""
    return f'{value:.5f}'.rstrip('0').removesuffix('.')


# --------------------------------------------------------------------------------------- hard negatives

def half_trained_scores(overlaps):
    """Made-up scores (8732, 2), background and object, of a network that takes too much near the object for it."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(overlaps), generator=generator)  # (8732)
    background = 5 - 11 * overlaps + 0.7 * noise  # (8732)
    return torch.stack((background, torch.zeros_like(background)), dim=1)


def hard_negatives():
    """The negative priors with the highest confidence losses, on a picture and in the ranking of all of them."""
    path, boxes, _ = sample('000007')
    labels = torch.tensor([1])  # one object, one class
    criterion = MultiBoxLoss(network().priors_cxcy)
    scores = half_trained_scores(find_jaccard_overlap(boxes, criterion.priors_xy)[0])
    positive = criterion.match([boxes], [labels])[1][0] > 0  # (8732)
    losses = F.cross_entropy(scores, positive.long(), reduction='none')  # (8732)
    n_positives = int(positive.sum())
    n_hard = criterion.neg_pos_ratio * n_positives
    ranked, order = losses.masked_fill(positive, 0).sort(descending=True)

    # The loss itself does not tell which negatives it chose, but it tells their sum.
    criterion(torch.zeros(1, len(scores), 4), scores[None], [boxes], [labels])
    total = (losses[positive].sum() + ranked[:n_hard].sum()) / n_positives
    torch.testing.assert_close(criterion.parts[0], total)

    canvas = Canvas(height=376)
    scene = Scene(canvas, path, 16, 16, width=380, faded=True)
    scene.boxes(criterion.priors_xy[order[:n_hard]].clamp(0, 1), GREY, thin=True)
    scene.boxes(criterion.priors_xy[positive], GREEN)
    scene.boxes(boxes, PURPLE)
    canvas.text(16, 328, f'{n_positives} positive priors', GREEN, bold=True)
    canvas.text(190, 328, f'{n_hard} hard negatives', GREY, bold=True)
    canvas.text(16, 352, f'the other {len(scores) - n_positives - n_hard} priors are left out of the loss')
    draw_ranking(canvas, ranked, n_hard)
    return canvas


def draw_ranking(canvas, losses, n_hard):
    n_shown = 2 * n_hard
    axes = Axes(canvas, 446, 46, 360, 240, (0, n_shown), (0, 2))
    axes.ticks_y([0, 0.5, 1, 1.5, 2], plainly)
    axes.ticks_x([0, n_hard, n_shown])
    for rank, loss in enumerate(losses[:n_shown].tolist()):
        x, y = axes.at(rank, loss)
        canvas.rect(x + 0.5, y, 360 / n_shown - 1, 286 - y, GREY if rank < n_hard else EDGE)
    x, _ = axes.at(n_hard, 0)
    canvas.line(x, 46, x, 286, INK, dashed=True)
    canvas.text(x + 8, 66, f'after {n_hard} = 3 · {n_hard // 3}')
    canvas.text(x + 8, 87, 'the others don\'t count')
    axes.frame('negative priors, by falling loss', 'confidence loss')


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

    canvas = Canvas(height=424)
    rows = [['rank', 'true?', 'precision', 'recall']]
    rows += [[str(i), 'yes' if hit else 'no', f'{found}/{i} = {p:.2f}', f'{found}/{N_OBJECTS} = {r:.2f}']
             for i, hit, found, p, r in zip(rank.tolist(), RANKED, n_true.tolist(), precision, recall)]
    fills = {(i, 1): tint(GREEN) if hit else tint(GREY) for i, hit in enumerate(RANKED, start=1)}
    canvas.table(16, 24, (50, 55, 105, 100), rows, fills)
    canvas.text(16, 348, f'{len(RANKED)} detections of a class that has\n{N_OBJECTS} objects, by falling score')

    axes = Axes(canvas, 386, 46, 420, 270, (0, 1), (0, 1.05))
    axes.ticks_x([i / 10 for i in range(11)], plainly)
    axes.ticks_y([0, 0.2, 0.4, 0.6, 0.8, 1], plainly)
    axes.frame('recall', 'precision')
    draw_interpolated(canvas, axes, precision, recall)
    canvas.path([axes.at(r, p) for r, p in zip(recall, precision)], BLUE)
    for r, p in zip(recall, precision):
        canvas.dot(*axes.at(r, p), BLUE, radius=4)
    for point in points:
        canvas.dot(*axes.at(*point), RED, radius=6)
    canvas.text(386, 404, f'mean height of the eleven red points: AP = {value:.2f}', RED, bold=True)
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
