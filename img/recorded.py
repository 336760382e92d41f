"""What trained networks gave out, written down as JSON with boxes in fractional boundary coordinates, and the figures
that are drawn from it without a network."""

import json

import torch
from torch.nn import functional as F
from torchvision.ops import nms

from model import FEATURE_MAPS, SSD300, MultiBoxLoss, load_model
from scenes import BOATS, HERE, Scene, boats_objects, network
from svg import AMBER, BLUE, CHIP_HEIGHT, GREEN, GRAY, LINE_HEIGHT, PURPLE, RED, Canvas, chip_width, tint
from utils import (find_jaccard_overlap, label_map, load_checkpoint, look_through, picture_size, read_image,
                   replaced_file, require)

FOLDER = HERE / 'recorded'
PHOTOS = sorted(path.name for path in (HERE / 'photos').glob('*.jpg') if path.name != 'dogs_and_cat.jpg')
SHOWN = ('hopper.jpg', 'astronaut.jpg', 'cameraman.jpg', 'chelsea.jpg')  # because the network does well in them
SHOWN_FROM = 0.5  # the lowest score that is shown there
FAILURES = (('sheep.jpg', 'bad boxes around ewe and lamb, one\nof them a dog; the flock is missed'),
            ('boats.jpg', 'misses: three boats, two persons'),
            ('astronaut.jpg', 'a duplicate: half of her again;\na person in the flag'),
            ('airplane.jpg', 'a wing as a chair, and a miss:\nno aeroplane'))  # (photograph, what went wrong there)
HARDEST = 20  # hard negatives that are drawn


def read(name):
    """The content of a record."""
    return json.loads((FOLDER / f'{name}.json').read_text(encoding='utf-8'))


def write(name, content):
    with replaced_file(FOLDER / f'{name}.json') as file:
        file.write((json.dumps(content, separators=(',', ':')).replace('},', '},\n') + '\n').encode())
    print(f'recorded/{name}.json')


# -------------------------------------------------------------------------------------------- recording

@torch.no_grad()
def output(model, path):
    """A network's output for a picture: locs (1, 8732, 4) and scores (1, 8732, n_classes)."""
    image = look_through(read_image(path), mean=model.image_mean, std=model.image_std)
    return model.eval()(image.unsqueeze(0))


def rounded(found, names):
    """[{'label', 'score', 'box'}] of boxes (n, 4), labels (n), scores (n)"""
    return [{'label': names[label], 'score': round(score, 3), 'box': [round(value, 4) for value in box]}
            for box, label, score in zip(*(tensor.tolist() for tensor in found))]


def record_photos(checkpoint, candidates_in):
    """What a trained network finds in all photographs; in one of them also its candidates before non-maximum
    suppression, and its best class's scores on all six feature maps."""
    model, own_label_map = load_model(checkpoint)
    names = {number: label for label, number in own_label_map.items()}
    record = {'epoch': load_checkpoint(checkpoint)['epoch'], 'detections': {}, 'candidates_in': candidates_in}
    for name in PHOTOS:
        found = model.detect_objects(*output(model, HERE / 'photos' / name), min_score=0.2, max_overlap=0.45, top_k=20)
        record['detections'][name] = rounded([values[0] for values in found], names)

    boxes, probabilities = (values[0] for values in model.decode(*output(model, HERE / 'photos' / candidates_in)))
    priors, labels = (probabilities[:, 1:] > 0.2).nonzero(as_tuple=True)  # (n_candidates)
    scores = probabilities[priors, labels + 1]
    best = scores.argsort(descending=True, stable=True)
    record['candidates'] = rounded((boxes[priors[best]], labels[best] + 1, scores[best]), names)
    label = int(probabilities[:, 1:].max(dim=0).values.argmax()) + 1
    counts = [feature_map.grid ** 2 * feature_map.n_priors for feature_map in FEATURE_MAPS]
    record['scores_of'] = names[label]
    record['scores'] = [  # in percent, (grid, grid) of each map: the highest of the priors at each position
        (100 * scores.view(feature_map.grid, feature_map.grid, -1).amax(dim=2)).round().int().tolist()
        for feature_map, scores in zip(FEATURE_MAPS, probabilities[:, label].split(counts))]
    write('photos', record)


def record_hard_negatives(checkpoint):
    """Which priors a network's loss takes for hard negatives in the running example. A half-trained network tells
    most; without a checkpoint, an untrained one."""
    if checkpoint is None:
        torch.manual_seed(0)
        model, epoch = SSD300(n_classes=len(label_map)), 0
    else:
        (model, own_label_map), epoch = load_model(checkpoint), load_checkpoint(checkpoint)['epoch']
        require(own_label_map == label_map, f"record_hard_negatives needs VOC's classes: '{checkpoint}' has others")
    boxes, labels = boats_objects()
    criterion = MultiBoxLoss(model.priors_cxcy)
    locs, scores = output(model, BOATS)
    classes = criterion.match([boxes], [labels])[1][0]  # (8732)
    losses = F.cross_entropy(scores[0], classes, reduction='none')  # (8732)
    n_positives = int((classes > 0).sum())
    ranked, order = losses.masked_fill(classes > 0, 0).sort(descending=True, stable=True)
    n_hard = criterion.neg_pos_ratio * n_positives

    # The loss itself does not tell which negatives it chose, but it tells their sum.
    criterion(locs, scores, [boxes], [labels])
    total = (losses[classes > 0].sum() + ranked[:n_hard].sum()) / n_positives
    torch.testing.assert_close(criterion.parts[0], total)
    write('hard_negatives', {'epoch': epoch, 'hard': order[:n_hard].tolist(),
                             'highest_loss': round(ranked[0].item(), 2),
                             'lowest_loss': round(ranked[n_hard - 1].item(), 2)})


def record_quick_start(checkpoint, picture):
    """What a checkpoint of the quick start finds in a training picture (its path inside img/), without duplicates.
    Records of other epochs and the same picture stay."""
    record = read('quick_start')
    if record['picture'] != picture:
        record = {'picture': picture, 'epochs': {}}
    model, own_label_map = load_model(checkpoint)
    names = {number: label for label, number in own_label_map.items()}
    boxes, labels, scores = model.detect_objects(*output(model, HERE / picture), 0.2, max_overlap=0.2, top_k=4)
    record['epochs'][str(load_checkpoint(checkpoint)['epoch'])] = rounded((boxes[0], labels[0], scores[0]), names)
    write('quick_start', record)


# ------------------------------------------------------------------------------------------- detections

def draw_found(canvas, path, found, x, y, width):
    """A picture with the boxes of detections, and below it what they are. Returns its height with the labels."""
    scene = Scene(canvas, path, x, y, width)
    colors = [(BLUE, AMBER, PURPLE, GREEN, RED)[i % 5] for i in range(len(found))]
    for one, color in reversed(list(zip(found, colors))):  # the best on top
        scene.box(clipped(one['box']), color)
    left, top = x, y + scene.height + 6
    for one, color in zip(found, colors):
        text = f'{one["label"]} {one["score"]:.2f}'
        if left > x and left + chip_width(text) > x + width:
            left, top = x, top + CHIP_HEIGHT + 4
        canvas.chip(left, top, text, color)
        left += chip_width(text) + 4
    return top + CHIP_HEIGHT - y if found else scene.height


def clipped(box):
    """A box may reach beyond the picture; what can be drawn ends there."""
    return [min(max(value, 0), 1) for value in box]


def quick_start_training():
    """The two most confident boxes in one training picture as the quick start goes on."""
    record = read('quick_start')
    path, epochs = HERE / record['picture'], sorted(record['epochs'], key=int)
    canvas = Canvas(height=44 + -(-len(epochs) // 3) * 276)
    canvas.text(360, canvas.height - 18, 'the two most confident boxes after each of these epochs', anchor='middle')
    for i, epoch in enumerate(epochs):
        x, y = 20 + i % 3 * 232, 20 + i // 3 * 276
        canvas.text(x + 107, y + 18, f'epoch {epoch}', anchor='middle', bold=True)
        draw_found(canvas, path, record['epochs'][epoch][:2], x, y + 30, 214)
    return canvas


def detections(names=SHOWN, captions=()):
    """Photographs with what the network finds in them, two side by side."""
    record = read('photos')
    canvas, heights = Canvas(), [20, 20]
    for i, name in enumerate(names):
        column = heights.index(min(heights))
        x, y = 20 + column * 345, heights[column]
        found = [one for one in record['detections'][name] if one['score'] >= SHOWN_FROM or captions]
        height = draw_found(canvas, HERE / 'photos' / name, found[:5], x, y, 335)
        if captions:
            canvas.text(x, y + height + 24, captions[i])
            height += LINE_HEIGHT * len(captions[i].splitlines()) + 4
        heights[column] += height + 20
    canvas.height = max(heights)
    return canvas


def failures():
    return detections(*zip(*FAILURES))


def score_maps():
    """The scores of one class on each feature map, over the picture squeezed as the network sees it."""
    record = read('photos')
    canvas, highest = Canvas(height=574), max(max(map(max, scores)) for scores in record['scores'])
    for i, (feature_map, scores) in enumerate(zip(FEATURE_MAPS, record['scores'])):
        x, y, side = 20 + i % 3 * 232, 20 + i // 3 * 262, 214
        Scene(canvas, HERE / 'photos' / record['candidates_in'], x, y, side, side, faded=True)
        cell = side / feature_map.grid
        for row, values in enumerate(scores):
            for column, percent in enumerate(values):
                if percent > 1:
                    canvas.rect(x + column * cell, y + row * cell, cell, cell, AMBER,
                                opacity=f'{percent / highest:.2f}')
        canvas.text(x + side / 2, y + side + 26, f'{feature_map.name}: up to {max(map(max, scores)) / 100:.2f}',
                    anchor='middle', bold=True)
    canvas.text(360, 556, f'amber: the best score of "{record["scores_of"]}" at each position', anchor='middle')
    return canvas


# --------------------------------------------------------------------------------------- hard negatives

def hard_negatives():
    """The objects, the positive priors, and the negative ones with the highest confidence losses."""
    record, (boxes, labels) = read('hard_negatives'), boats_objects()
    criterion = MultiBoxLoss(network().priors_cxcy)
    positive = criterion.match([boxes], [labels])[1][0] > 0  # (8732)
    priors = criterion.priors_xy.clamp(0, 1)
    canvas = Canvas(height=304)
    panels = ((boxes, PURPLE, f'{len(boxes)} objects'), (priors[positive], GREEN, f'{positive.sum()} positive priors'),
              (priors[record['hard'][:HARDEST]], GRAY, f'{len(record["hard"])} hard negatives'))
    for i, (boxes, color, text) in enumerate(panels):
        x = 20 + i * 232
        scene = Scene(canvas, BOATS, x, 20, 214, faded=i > 0)
        scene.boxes(boxes, color, thin=i > 0)
        canvas.text(x + 107, 220, text, color, 'middle', bold=True)
    trained = 'a half-trained network' if record['epoch'] else 'a network before training'
    canvas.text(360, 258, f'Scored by {trained}. Their losses range from {record["highest_loss"]:.1f} down\nto '
                f'{record["lowest_loss"]:.1f}; the {HARDEST} highest are drawn', anchor='middle')
    return canvas


# ------------------------------------------------------------------------------- non-maximum suppression

MAX_OVERLAP, MOST_CLASSES, MOST_OF_A_CLASS = 0.5, 3, 5
CLASS_COLORS = (AMBER, BLUE, GREEN, PURPLE, RED)


def candidates():
    """The picture, and the best candidates in it: {label: [(title, score, box), …] by falling score}."""
    record = read('photos')
    path = HERE / 'photos' / record['candidates_in']
    found = [(one['label'], one['score'], one['box']) for one in record['candidates']]
    classes = {label: [] for label in list(dict.fromkeys(label for label, _, _ in found))[:MOST_CLASSES]}
    for label, score, box in found:
        own = classes.get(label, [])
        if len(own) < MOST_OF_A_CLASS:  # whether one stays depends on better ones alone
            own.append((f'{label} {len(own) + 1}', score, box))
    return path, classes


def suppressed(own):
    """The overlaps (n, n) of a class's candidates, and the numbers of those that suppression leaves."""
    boxes = torch.tensor([box for _, _, box in own])
    kept = nms(boxes, torch.tensor([score for _, score, _ in own]), MAX_OVERLAP).tolist()
    return find_jaccard_overlap(boxes, boxes).tolist(), kept


def draw_candidates(only_kept):
    canvas, (path, classes), drawn = Canvas(width=600), candidates(), []
    scene = Scene(canvas, path, 20, 20, width=560)
    for own, color in zip(classes.values(), CLASS_COLORS):
        shown = [own[i] for i in suppressed(own)[1]] if only_kept else own
        for title, score, box in reversed(shown):  # the best on top
            box = clipped(box)
            again = any(box == other for other, _, _ in drawn)  # the same prior's box, for another class
            scene.box(box, color, dashed=again, halo=not again)
            drawn.append((box, color, f'{title}: {score:.2f}' if only_kept else title))
    for label in drawn if only_kept or len(drawn) < 7 else ():
        scene.label(*label)
    places = len({tuple(box) for box, _, _ in drawn})
    canvas.text(300, scene.height + 54, f'{len(drawn)} boxes in {places} {"places" if places > 1 else "place"}',
                anchor='middle')
    canvas.height = scene.height + 74
    return canvas


def nms_1_candidates():
    return draw_candidates(only_kept=False)


def nms_2_sorted():
    """The candidates of each class, cut out of the picture and lined up by score."""
    path, classes = candidates()
    width, height = picture_size(path)
    canvas = Canvas(222 * len(classes), 26 + 139 * max(map(len, classes.values())))
    for row, (own, color) in enumerate(zip(classes.values(), CLASS_COLORS)):
        for i, (title, score, box) in enumerate(own):
            x, y, (left, top, right, bottom) = 20 + i * 139, 20 + row * 220, clipped(box)
            shown_width, shown_height = (right - left) * width, (bottom - top) * height
            scale = 63 / max(shown_width, shown_height)
            frame = (x + 63 - shown_width * scale, y + 63 - shown_height * scale, 2 * shown_width * scale,
                     2 * shown_height * scale)
            canvas.picture(path, *frame, region=(left, top, right, bottom))
            canvas.rect(*frame, stroke=color, stroke_width=3)
            canvas.text(x + 63, y + 152, f'{title}\n{score:.2f}', anchor='middle', bold=True)
    return canvas


def nms_3_overlaps():
    """The overlaps of the candidates of each class, and who suppresses whom."""
    canvas, y = Canvas(width=600), 20
    for (label, own), color in zip(candidates()[1].items(), CLASS_COLORS):
        overlaps, kept = suppressed(own)
        titles, lines = [title for title, _, _ in own], []
        rows = [[label, *(str(i) for i in range(1, len(own) + 1))]]
        rows += [[title, *(f'{value:.2f}' for value in row)] for title, row in zip(titles, overlaps)]
        fills = {cell: tint(color, 0.5) for i in range(1, len(rows)) for cell in ((0, i), (i, 0))}
        for row, title in enumerate(titles):
            by = [column for column in kept if column < row and overlaps[row][column] > MAX_OVERLAP]
            if by:
                fills[row + 1, by[0] + 1] = tint(RED, 0.4)
                lines.append(f'{titles[by[0]]} suppresses {title}: they overlap by {overlaps[row][by[0]]:.2f}')
        canvas.table(20, y, [150, *[76] * len(own)], rows, fills)
        y += 33 * len(rows) + 26
        canvas.text(20, y, '\n'.join(lines))
        y += LINE_HEIGHT * len(lines) + 10
    canvas.height = y
    return canvas


def nms_4_result():
    return draw_candidates(only_kept=True)
