"""Figures that show boxes on a picture: coordinates, overlaps, priors, offsets, matching."""

import functools
import json
from pathlib import Path

import torch

from model import FEATURE_MAPS, SSD300, MultiBoxLoss
from svg import (BLUE, CHIP_HEIGHT, GRAY, GREEN, HAIRLINE, INK, PAPER, PURPLE, RED, STROKE, WHITE, Canvas,
                 chip_width, tint)
from utils import (cxcy_to_gcxgcy, cxcy_to_xy, find_intersection, find_jaccard_overlap, label_map,
                   picture_size, rev_label_map, xy_to_cxcy)

HERE = Path(__file__).resolve().parent
PRIOR_NAMES = ('1 : 1', 'extra', '2 : 1', '3 : 1', '1 : 2', '1 : 3')  # of conv9_2: width to height

# The picture that runs through the README, and its objects in pixels. The dog is the example of a box.
DOG = HERE / 'photos/dog.jpg'
OBJECTS = (('dog', (132, 222, 312, 536)), ('bicycle', (128, 136, 566, 420)), ('car', (468, 74, 690, 171)),
           ('motorbike', (58, 90, 110, 122)))


class Scene:
    """A picture on a canvas, or a region of it, on which boxes are drawn in fractional boundary coordinates. A faded
    one leaves the stage to its boxes; one with a height is squeezed, as the network sees pictures."""

    def __init__(self, canvas, source, x, y, width, height=None, faded=False, region=(0, 0, 1, 1)):
        self.canvas, self.x, self.y, self.width, self.region, self.chips = canvas, x, y, width, region, []
        self.height = canvas.picture(source, x, y, width, height, region)
        if faded:
            canvas.rect(x, y, width, self.height, WHITE, opacity=0.5)

    def at(self, x, y):
        left, top, right, bottom = self.region
        return (self.x + (x - left) / (right - left) * self.width,
                self.y + (y - top) / (bottom - top) * self.height)

    def box(self, xy, color, dashed=False, thin=False):
        (left, top), (right, bottom) = self.at(*xy[:2]), self.at(*xy[2:])
        frame = (left, top, right - left, bottom - top)
        if not thin:
            self.canvas.rect(*frame, stroke=WHITE, stroke_width=5)  # stands out against any picture
        self.canvas.rect(*frame, stroke=color, dashed=dashed, stroke_width=HAIRLINE if thin else STROKE)

    def boxes(self, all_xy, color, **style):
        for xy in all_xy.tolist():
            self.box(xy, color, **style)

    def label(self, xy, color, text):
        """A chip at a corner of a box, above it if there's room, where no other chip lies. To be drawn after all boxes,
        which would cross it."""
        (left, top), (right, bottom), width = self.at(*xy[:2]), self.at(*xy[2:]), chip_width(text)
        corners = [(min(max(x, self.x), self.x + self.width - width), y) for y in
                   (top - CHIP_HEIGHT, top, bottom - CHIP_HEIGHT, bottom) for x in (left, right - width)
                   if self.y <= y <= self.y + self.height - CHIP_HEIGHT]
        free = [(x, y) for x, y in corners if all(x + width < x1 or x > x2 or abs(y - other_y) > CHIP_HEIGHT
                                                  for x1, x2, other_y in self.chips)]
        for x, y in free[:1]:  # no place, no chip
            self.chips.append((x, x + width, y))
            self.canvas.chip(x, y, text, color)

    def callout(self, xy, color, text, side, place=0.5):
        """A chip outside the picture, and a line to a box: from the middle of one of its sides, or another place."""
        (left, top), (right, bottom) = self.at(*xy[:2]), self.at(*xy[2:])
        x, y = left + place * (right - left), top + place * (bottom - top)
        if side in ('left', 'right'):
            x, chip_x, chip_y = (left, self.x - 22, y) if side == 'left' else (right, self.x + self.width + 22, y)
        else:
            y, chip_x, chip_y = (top, x, self.y - 22) if side == 'top' else (bottom, x, self.y + self.height + 22)
        self.canvas.line(x, y, chip_x, chip_y, color, halo=True)
        self.canvas.dot(x, y, color)
        self.canvas.chip(chip_x - chip_width(text) / 2, chip_y - CHIP_HEIGHT / 2, text, color)

    def grid(self, size, tile=None, color=WHITE):
        """The tiles of a feature map over the picture, one of them marked: (row, column)."""
        side = self.width / size
        self.canvas.grid(self.x, self.y, self.width, self.height, size, size, color)
        if tile:
            frame = (self.x + tile[1] * side, self.y + tile[0] * side, side, side)
            self.canvas.rect(*frame, WHITE, INK, opacity=0.6)


def read(name):
    """Return the content of a record."""
    return json.loads((HERE / f'recorded/{name}.json').read_text(encoding='utf-8'))


@functools.cache
def network():
    """Return an untrained SSD300, for its priors and its way to detect objects."""
    return SSD300(n_classes=len(label_map))


MAPS = {feature_map.name: feature_map for feature_map in FEATURE_MAPS}


def prior(name, row, column, kind):
    """Return the number, among the 8732, of a prior of a feature map."""
    below = sum(feature_map.grid ** 2 * feature_map.n_priors for feature_map in FEATURE_MAPS[:[*MAPS].index(name)])
    return below + (row * MAPS[name].grid + column) * MAPS[name].n_priors + kind


def place_of(number):
    """Return a prior's feature map, row and column."""
    for feature_map in FEATURE_MAPS:
        count = feature_map.grid ** 2 * feature_map.n_priors
        if number < count:
            return feature_map, *divmod(number // feature_map.n_priors, feature_map.grid)
        number -= count


def priors_at(name, row, column):
    """Return all priors of one tile of a feature map, center-size coordinates (n_priors, 4)."""
    first = prior(name, row, column, 0)
    return network().priors_cxcy[first:first + MAPS[name].n_priors]


def priors_xy():
    """Return all priors in boundary coordinates (8732, 4)."""
    return cxcy_to_xy(network().priors_cxcy)


def fractional(boxes, path):
    """Return boxes in a picture's pixels as fractions of its size."""
    return torch.tensor(boxes, dtype=torch.float) / torch.tensor(picture_size(path) * 2)


@functools.cache
def dog_objects():
    """Return the running example's boxes (4, 4), fractional, and labels (4)."""
    labels, boxes = zip(*OBJECTS)
    return fractional(boxes, DOG), torch.tensor([label_map[label] for label in labels])


@functools.cache
def dog_overlaps():
    """Return the overlaps of all priors with the objects (8732, 4), and the priors' classes (8732)."""
    boxes, labels = dog_objects()
    classes = MultiBoxLoss(network().priors_cxcy).match([boxes], [labels])[1][0]
    return find_jaccard_overlap(priors_xy(), boxes), classes


# ------------------------------------------------------------------------------------------ coordinates

def coordinates():
    """The box of the dog in pixels, in fractions, and as its center and size."""
    canvas = Canvas(height=658)
    (width, height), pixels = picture_size(DOG), OBJECTS[0][1]
    scene = Scene(canvas, DOG, 100, 60, 480)
    box = dog_objects()[0][0]
    left, top, right, bottom = box.tolist()
    c_x, c_y, w, h = xy_to_cxcy(box).tolist()
    scene.box(box.tolist(), PURPLE)
    canvas.arrow(92, 52, 590, 52)
    canvas.arrow(92, 52, 92, 432)
    canvas.text(578, 40, 'x', bold=True)
    canvas.text(72, 432, 'y', bold=True)
    canvas.text(80, 46, '0', anchor='end')
    for name, x, y in (('x_min', left, top), ('x_max', right, top)):
        at_x, at_y = scene.at(x, y)
        canvas.line(at_x, 52, at_x, at_y, PURPLE, dashed=True, halo=True)
        canvas.text(at_x, 38, name, PURPLE, 'middle', bold=True)
    for name, x, y in (('y_min', left, top), ('y_max', left, bottom)):
        at_x, at_y = scene.at(x, y)
        canvas.line(92, at_y, at_x, at_y, PURPLE, dashed=True, halo=True)
        canvas.text(84, at_y + 6, name, PURPLE, 'end', bold=True)
    (x1, y1), (x2, y2), (middle_x, middle_y) = scene.at(left, top), scene.at(right, bottom), scene.at(c_x, c_y)
    canvas.arrow(x1, y1 - 18, x2, y1 - 18, PURPLE, both=True, halo=True)
    canvas.chip(middle_x - 13, y1 - 52, 'w', PURPLE)
    canvas.arrow(x2 + 18, y1, x2 + 18, y2, PURPLE, both=True, halo=True)
    canvas.chip(x2 + 30, middle_y - 13, 'h', PURPLE)
    canvas.dot(middle_x, middle_y, PURPLE)
    canvas.chip(middle_x - chip_width('c_x, c_y') / 2, middle_y + 10, 'c_x, c_y', PURPLE)

    rows = [['', 'x_min', 'y_min', 'x_max', 'y_max'], ['pixels', *map(str, pixels)],
            ['fractions', *(f'{value:.2f}' for value in box.tolist())],
            ['', 'c_x', 'c_y', 'w', 'h'], ['fractions', *(f'{value:.2f}' for value in (c_x, c_y, w, h))]]
    terms = [f'{pixel} / {size} = {value:.2f}' for pixel, size, value in zip(pixels, (width, height), box.tolist())]
    canvas.table(16, 446, (108, *[115] * 4), rows, {(3, i): PAPER for i in range(5)})
    canvas.text(16, 640, f'The picture has {width} × {height} pixels: {terms[0]}, {terms[1]}')
    return canvas


# ---------------------------------------------------------------------------------------- Jaccard overlap

def jaccard_index():
    """Two boxes on squared paper, their intersection and their union."""
    canvas = Canvas(height=258)
    one, two = torch.tensor([[1., 1, 7, 5]]), torch.tensor([[3., 2, 9, 7]])
    overlap, intersection = find_jaccard_overlap(one, two).item(), find_intersection(one, two).item()
    area_1, area_2 = (((box[0, 2:] - box[0, :2]).prod()).item() for box in (one, two))
    union = area_1 + area_2 - intersection
    shared = (*torch.maximum(one, two)[0, :2].tolist(), *torch.minimum(one, two)[0, 2:].tolist())

    captions = (f'{area_1:.0f} and {area_2:.0f} squares', f'intersection: {intersection:.0f}', f'union: {union:.0f}')
    square = 17.6
    for panel, caption in enumerate(captions):
        x, y = 20 + panel * 192, 20

        def draw(left, top, right, bottom, fill='none', stroke=None, x=x, y=y):
            canvas.rect(x + left * square, y + top * square, (right - left) * square, (bottom - top) * square, fill,
                        stroke)

        draw(0, 0, 10, 8, WHITE)
        boxes = [(one[0].tolist(), PURPLE), (two[0].tolist(), RED)]
        for filled in ([], [shared], [box for box, _ in boxes])[panel]:
            draw(*filled, tint(INK, 0.25))
        canvas.grid(x, y, 10 * square, 8 * square, 10, 8)
        for box, color in boxes:
            draw(*box, stroke=color)
        canvas.text(x + 5 * square, y + 8 * square + 30, caption, anchor='middle', bold=True)
    canvas.text(300, 232, f'Jaccard overlap = intersection / union = {intersection:.0f} / {union:.0f} = {overlap:.2f}',
                anchor='middle', title=True)
    return canvas


def jaccard_values():
    """What overlaps of about 0.25, 0.5, 0.75 and 0.9 look like."""
    canvas = Canvas(height=508)
    dog = dog_objects()[0][:1]
    width, height = (dog[0, 2:] - dog[0, :2]).tolist()
    for i, (shift_x, shift_y) in enumerate([(0.46, -0.26), (0.22, -0.145), (0.09, -0.06), (0.035, -0.018)]):
        x, y = 20 + i % 2 * 285, 20 + i // 2 * 222
        scene = Scene(canvas, DOG, x, y, width=275)
        shifted = dog + torch.tensor([shift_x * width, shift_y * height]).repeat(2)
        scene.boxes(dog, PURPLE)
        scene.boxes(shifted, RED)
        canvas.chip(x + 8, y + 8, f'{find_jaccard_overlap(dog, shifted).item():.2f}', INK)
    canvas.text(300, 486, 'Jaccard overlap of the red box with the purple one', anchor='middle')
    return canvas


# ----------------------------------------------------------------------------------------------- priors

def feature_maps():
    """The six feature maps as grids over the squeezed picture, with the priors of one tile each."""
    canvas, total = Canvas(height=640), 0
    for i, feature_map in enumerate(FEATURE_MAPS):
        x, y, side, grid = 20 + i % 3 * 192, 20 + i // 3 * 290, 176, feature_map.grid
        scene = Scene(canvas, DOG, x, y, side, side, faded=True)
        scene.grid(grid, color=GRAY)
        scene.boxes(cxcy_to_xy(priors_at(feature_map.name, grid // 2, grid // 2)), RED)
        count = grid ** 2 * feature_map.n_priors
        total += count
        canvas.text(x + side / 2, y + side + 30, feature_map.name, anchor='middle', bold=True)
        canvas.text(x + side / 2, y + side + 57, f'scale {feature_map.scale}\n{grid} · {grid} · {feature_map.n_priors} '
                    f'= {count}', anchor='middle')
    canvas.text(300, 614, f'together {total} priors', RED, 'middle', title=True)
    return canvas


def priors_center():
    """The priors of the central tile of conv9_2, over a picture squeezed to a square."""
    canvas = Canvas(height=390)
    scene = Scene(canvas, DOG, 16, 20, 320, 320, faded=True)
    scene.grid(5, tile=(2, 2), color=GRAY)
    priors = priors_at('conv9_2', 2, 2)
    scene.boxes(cxcy_to_xy(priors), RED)
    for i, xy in enumerate(cxcy_to_xy(priors).tolist(), start=1):
        scene.label(xy, RED, str(i))
    rows = [[str(i), ratio, f'{w:.2f}', f'{h:.2f}']
            for i, (ratio, (w, h)) in enumerate(zip(PRIOR_NAMES, priors[:, 2:].tolist()), start=1)]
    canvas.text(352, 40, 'conv9_2, scale 0.55', title=True)
    canvas.table(352, 56, (54, 70, 54, 54), [['prior', 'w : h', 'w', 'h'], *rows])
    c_x, c_y = priors[0, :2].tolist()
    canvas.text(352, 316, f'all centered at ({c_x:.1f}, {c_y:.1f})')
    canvas.text(16, 370, 'the photograph as the network sees it: 300 × 300 pixels')
    return canvas


def priors_neighbors():
    """The same six priors on two other tiles of conv9_2; some overshoot the picture."""
    canvas = Canvas(height=372)

    def overshooting(xy):
        return ((xy < 0) | (xy > 1)).any(dim=1).sum().item()

    for (row, column), x in zip([(2, 3), (0, 0)], (50, 380)):
        scene = Scene(canvas, DOG, x, 86, 185, 185, faded=True)
        scene.grid(5, tile=(row, column), color=GRAY)
        boxes = cxcy_to_xy(priors_at('conv9_2', row, column))
        scene.boxes(boxes, RED)
        canvas.text(x + 92, 300, f'row {row}, column {column}:\n{overshooting(boxes)} of 6 overshoot', anchor='middle',
                    bold=True)
    canvas.text(300, 356, f'{overshooting(priors_xy())} of all {len(priors_xy())} priors overshoot an edge, and stay so',
                anchor='middle')
    return canvas


def objects_on_maps():
    """Each object on the grid of the map that has its best prior."""
    canvas, overlaps = Canvas(height=694), dog_overlaps()[0]
    for i, (label, box) in enumerate(zip((label for label, _ in OBJECTS), dog_objects()[0].tolist())):
        best = overlaps[:, i].argmax().item()
        feature_map, row, column = place_of(best)
        x, y, side = 20 + i % 2 * 288, 20 + i // 2 * 324, 272
        scene = Scene(canvas, DOG, x, y, side, side)
        scene.grid(feature_map.grid, (row, column))
        scene.box(box, PURPLE)
        scene.box(priors_xy()[best].tolist(), RED)
        canvas.text(x, y + side + 28, f'{label}: {feature_map.name}, {overlaps[best, i]:.2f}', bold=True)
    canvas.text(20, 676, 'red: the prior that overlaps it most (by the number), and its tile')
    return canvas


def offsets_from_prior():
    """The dog's box told as its offsets from its best prior."""
    canvas = Canvas(height=496)
    dog, best = dog_objects()[0][:1], dog_overlaps()[0][:, 0].argmax().item()
    chosen, xy = network().priors_cxcy[best], priors_xy()[best].tolist()
    scene = Scene(canvas, DOG, 16, 20, 268, 268, region=(0, 0.37, 0.6, 0.97))
    offsets = cxcy_to_gcxgcy(xy_to_cxcy(dog), chosen)[0].tolist()
    (p_x, p_y, p_w, p_h), (c_x, c_y, w, h) = chosen.tolist(), xy_to_cxcy(dog)[0].tolist()
    scene.box(xy, RED)
    scene.boxes(dog, PURPLE)
    scene.callout(xy, RED, 'prior', 'bottom', 0.2)
    scene.callout(dog[0].tolist(), PURPLE, 'dog', 'bottom', 0.8)
    canvas.arrow(*scene.at(p_x, p_y), *scene.at(c_x, c_y), halo=True)
    canvas.dot(*scene.at(p_x, p_y), RED)
    canvas.dot(*scene.at(c_x, c_y), PURPLE)

    rows = [['', 'c_x', 'c_y', 'w', 'h'],
            ['dog', *(f'{value:.3f}' for value in (c_x, c_y, w, h))],
            ['prior', *(f'{value:.3f}' for value in chosen.tolist())],
            ['offset', *map(signed, offsets)]]
    fills = {(1, 0): tint(PURPLE), (2, 0): tint(RED), **{(3, column): tint(BLUE) for column in range(5)}}
    canvas.table(296, 20, (60, *[57] * 4), rows, fills, row_height=38)
    feature_map, row, column = place_of(best)
    canvas.text(296, 212, f'A prior of {feature_map.name}, row {row},\ncolumn {column}; it overlaps the dog\nby {dog_overlaps()[0][best, 0]:.2f}.')
    lines = (('g_c_x', '(c_x − ĉ_x) / (ŵ / 10)', f'({c_x:.3f} − {p_x:.3f}) / {p_w / 10:.4f}'),
             ('g_c_y', '(c_y − ĉ_y) / (ĥ / 10)', f'({c_y:.3f} − {p_y:.3f}) / {p_h / 10:.4f}'),
             ('g_w', '5 · log(w / ŵ)', f'5 · log({w:.3f} / {p_w:.3f})'),
             ('g_h', '5 · log(h / ĥ)', f'5 · log({h:.3f} / {p_h:.3f})'))
    for i, ((name, formula, numbers), offset) in enumerate(zip(lines, offsets)):
        y = 366 + i * 36
        canvas.text(16, y, name, BLUE, bold=True)
        canvas.text(70, y, f'= {formula}')
        canvas.text(270, y, f'= {numbers}')
        canvas.text(584, y, f'= {signed(offset)}', BLUE, 'end', bold=True)
    return canvas


def signed(value):
    """Return a number with a true minus sign."""
    return f'{value:.2f}'.replace('-', '−')


# --------------------------------------------------------------------------------------------- matching

# Seven of the 8732 priors: feature map, row, column, number at this tile; and the side where its number stands.
MATCHED_PRIORS = ((('conv8_2', 6, 2, 4), 'left', 0.8), (('conv8_2', 6, 3, 4), 'bottom', 0.6),
                  (('conv9_2', 2, 2, 0), 'right', 0.75), (('conv8_2', 5, 3, 0), 'bottom', 0.9),
                  (('conv7', 4, 14, 2), 'top', 0.2), (('conv4_3', 6, 4, 0), None, 0), (('conv7', 16, 15, 1), 'right', 0.5))
OBJECT_SIDES = (('left', 0.3), ('right', 0.4), ('top', 0.8))
CLOSE_UP = (0.04, 0.11, 0.19, 0.26)  # the region around the motorbike


def matching_example():
    """Return the numbers of the seven priors, their overlaps (7, 4), and their classes (7)."""
    numbers = [prior(*place) for place, _, _ in MATCHED_PRIORS]
    overlaps, classes = dog_overlaps()
    return numbers, overlaps[numbers], classes[numbers]


def matching_scene():
    """The objects, seven priors, and the table of their overlaps."""
    canvas, objects = Canvas(height=782), dog_objects()[0].tolist()
    numbers, overlaps, _ = matching_example()
    scene = Scene(canvas, DOG, 56, 56, 340, 340)
    inset = Scene(canvas, DOG, 446, 90, 138, 138, region=CLOSE_UP)
    canvas.rect(inset.x, inset.y, 138, 138, stroke=INK)
    (left, top), (right, bottom) = scene.at(*CLOSE_UP[:2]), scene.at(*CLOSE_UP[2:])
    canvas.rect(left, top, right - left, bottom - top, stroke=INK)
    canvas.text(515, 254, 'motorbike,\nenlarged', anchor='middle')
    seven = priors_xy()[numbers].tolist()
    for i, xy in enumerate(seven):
        (scene if MATCHED_PRIORS[i][1] else inset).box(xy, RED)
    for i, xy in enumerate(objects):
        (scene if i < 3 else inset).box(xy, PURPLE)
    for letter, xy, side in zip('ABC', objects, OBJECT_SIDES):
        scene.callout(xy, PURPLE, letter, *side)
    for i, (xy, (_, side, at)) in enumerate(zip(seven, MATCHED_PRIORS), start=1):
        if side:
            scene.callout(xy, RED, str(i), side, at)
    inset.callout(objects[3], PURPLE, 'D', 'top', 0.3)
    inset.callout(seven[5], RED, '6', 'top', 0.8)

    rows = [['prior', *(f'{letter}: {label}' for letter, (label, _) in zip('ABCD', OBJECTS))]]
    rows += [[str(i), *(f'{value:.2f}' for value in row)] for i, row in enumerate(overlaps.tolist(), start=1)]
    fills = {(i + 1, overlaps[i].argmax().item() + 1): tint(RED) for i in range(len(seven)) if overlaps[i].max() > 0}
    fills |= {(overlaps[:, j].argmax().item() + 1, j + 1): tint(PURPLE, 0.5) for j in range(len(objects))}
    canvas.table(16, 446, (60, 120, 124, 120, 144), rows, fills)
    for y, color, text in ((726, tint(RED), 'rule 2: a prior\'s best object'),
                           (754, tint(PURPLE, 0.5), 'rule 3: an object\'s best prior, which it claims')):
        canvas.rect(16, y, 18, 18, color)
        canvas.text(44, y + 15, text)
    return canvas


def matching_result():
    """All positive priors of each object, and what became of the seven."""
    canvas, (boxes, labels) = Canvas(height=532), dog_objects()
    numbers, overlaps, classes = matching_example()
    everywhere = dog_overlaps()[1]
    for i, (label, _) in enumerate(OBJECTS):
        x, positive = 16 + i * 144, priors_xy()[everywhere == labels[i]].clamp(0, 1)
        scene = Scene(canvas, DOG, x, 20, 136, 136, faded=True)
        scene.boxes(positive, GREEN, thin=True)
        canvas.text(x + 68, 182, label, PURPLE, 'middle', bold=True)
        canvas.text(x + 68, 207, f'{len(positive)} positive', GREEN, 'middle', bold=True)
    rows, fills = [['prior', '1. overlap', '2. best', '3. claimed', '4. match', '5. class']], {}
    for i, (label, row) in enumerate(zip(classes.tolist(), overlaps), start=1):
        overlap, best = row.max(dim=0)
        claims = dog_overlaps()[0][:, best].argmax().item() == numbers[i - 1]
        rows.append([str(i), f'{overlap.item():.2f}', 'ABCD'[best] if overlap > 0 else '–',
                     f'by {"ABCD"[best]}' if claims else '–', 'positive' if label else 'negative', rev_label_map[label]])
        fills |= {(i, column): tint(GREEN if label else GRAY, 0.25) for column in (4, 5)}
    canvas.table(16, 228, (56, 102, 82, 104, 104, 120), rows, fills)
    canvas.text(16, 518, f'{(everywhere > 0).sum()} of {len(everywhere)} priors are positive, the other '
                f'{(everywhere == 0).sum()} negative')
    return canvas
