"""Figures that show boxes on a picture: coordinates, priors, offsets, matching and the like."""

import functools
from pathlib import Path

import torch

from model import FEATURE_MAPS, SSD300, MultiBoxLoss
from svg import (AMBER, BLUE, CHIP_HEIGHT, GREEN, GRAY, HAIRLINE, INK, PURPLE, RED, STROKE, WHITE, Canvas, chip_width,
                 tint)
from utils import (IMAGE_SIZE, cxcy_to_gcxgcy, cxcy_to_xy, find_intersection, find_jaccard_overlap, label_map,
                   picture_size, rev_label_map, xy_to_cxcy)

HERE = Path(__file__).resolve().parent
PRIOR_NAMES = ('1 : 1', '1 : 1 extra', '2 : 1', '3 : 1', '1 : 2', '1 : 3')  # of conv9_2: width to height

# The picture that runs through the README, and its objects in pixels. The first boat is the example of a box.
BOATS = HERE / 'photos/boats.jpg'
BOATS_OBJECTS = (('boat', (215, 60, 365, 284)), ('boat', (0, 304, 370, 380)), ('boat', (335, 316, 500, 400)),
                 ('person', (185, 316, 225, 348)), ('person', (365, 324, 400, 396)))


class Scene:
    """A picture on a canvas, on which boxes are drawn in fractional boundary coordinates. A faded one leaves the
    stage to its boxes; one with a height is squeezed, as the network sees pictures."""

    def __init__(self, canvas, source, x, y, width, height=None, faded=False):
        self.canvas, self.x, self.y, self.width, self.chips = canvas, x, y, width, []
        self.height = canvas.picture(source, x, y, width, height)
        if faded:
            canvas.rect(x, y, width, self.height, WHITE, opacity=0.5)

    def at(self, x, y):
        return self.x + x * self.width, self.y + y * self.height

    def box(self, xy, color, dashed=False, thin=False, halo=True):
        (left, top), (right, bottom) = self.at(*xy[:2]), self.at(*xy[2:])
        frame = (left, top, right - left, bottom - top)
        if halo and not thin:
            self.canvas.rect(*frame, stroke=WHITE, stroke_width=5)  # stands out against any picture
        self.canvas.rect(*frame, stroke=color, dashed=dashed, stroke_width=HAIRLINE if thin else STROKE)

    def boxes(self, all_xy, color, **style):
        for xy in all_xy.tolist():
            self.box(xy, color, **style)

    def label(self, xy, color, text):
        """A chip in a corner of a box where no other chip lies. To be drawn after all boxes, which would cross it."""
        (left, top), (right, bottom), width = self.at(*xy[:2]), self.at(*xy[2:]), chip_width(text)
        corners = [(x, y) for y in (top, bottom - CHIP_HEIGHT) for x in (left, right - width)]
        free = [(x, y) for x, y in corners if all(x + width < x1 or x > x2 or abs(y - other_y) > CHIP_HEIGHT
                                                  for x1, x2, other_y in self.chips)]
        x, y = (free or corners)[0]
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


@functools.lru_cache(maxsize=1)
def network():
    """An untrained SSD300, for its priors and its way to detect objects."""
    return SSD300(n_classes=len(label_map))


MAPS = {feature_map.name: feature_map for feature_map in FEATURE_MAPS}


def prior(name, row, column, kind):
    """The number, among the 8732, of a prior of a feature map."""
    below = sum(feature_map.grid ** 2 * feature_map.n_priors for feature_map in FEATURE_MAPS[:[*MAPS].index(name)])
    return below + (row * MAPS[name].grid + column) * MAPS[name].n_priors + kind


def priors_at(name, row, column):
    """All priors of one tile of a feature map, center-size coordinates (n_priors, 4)."""
    first = prior(name, row, column, 0)
    return network().priors_cxcy[first:first + MAPS[name].n_priors]


def fractional(boxes, path):
    """Boxes in a picture's pixels as fractions of its size."""
    return torch.tensor(boxes, dtype=torch.float) / torch.tensor(picture_size(path) * 2)


def boats_objects():
    """The running example's boxes (5, 4), fractional, and labels (5)."""
    labels, boxes = zip(*BOATS_OBJECTS)
    return fractional(boxes, BOATS), torch.tensor([label_map[label] for label in labels])


# ------------------------------------------------------------------------------------------ coordinates

def coordinates(lines, center_size=False, unit=(1, 1), digits=2):
    """The box of a boat with its coordinates marked on the axes, each divided by `unit`."""
    canvas = Canvas(height=486 + 25 * len(lines.splitlines()), width=600)
    scene = Scene(canvas, BOATS, 120, 70, width=450)
    box = boats_objects()[0][0]
    left, top, right, bottom = box.tolist()
    scene.box((left, top, right, bottom), PURPLE)
    canvas.arrow(112, 62, 584, 62)
    canvas.arrow(112, 62, 112, 452)
    canvas.text(578, 48, 'x', bold=True)
    canvas.text(92, 452, 'y', bold=True)
    canvas.text(100, 54, '0', anchor='end')

    width, height = picture_size(BOATS)
    c_x, c_y, w, h = xy_to_cxcy(box).tolist()
    for name, x, shift in [('c_x', c_x, 0)] if center_size else [('x_min', left, -16), ('x_max', right, 16)]:
        at_x, at_y = scene.at(x, c_y if center_size else top)
        canvas.line(at_x, 62, at_x, at_y, PURPLE, dashed=True, halo=True)
        canvas.text(at_x + shift, 48, f'{name} = {x * width / unit[0]:.{digits}f}', PURPLE, 'middle', bold=True)
    for name, y in [('c_y', c_y)] if center_size else [('y_min', top), ('y_max', bottom)]:
        at_x, at_y = scene.at(c_x if center_size else left, y)
        canvas.line(112, at_y, at_x, at_y, PURPLE, dashed=True, halo=True)
        canvas.text(104, at_y, f'{name}\n= {y * height / unit[1]:.{digits}f}', PURPLE, 'end', bold=True)
    if center_size:
        draw_size(scene, (left, top, right, bottom), w, h)
    canvas.text(300, 484, lines, anchor='middle')
    return canvas


def draw_size(scene, xy, w, h):
    """Arrows beside a box for its width and height, and a dot at its center."""
    canvas = scene.canvas
    (left, top), (right, bottom) = scene.at(*xy[:2]), scene.at(*xy[2:])
    c_x, c_y = (left + right) / 2, (top + bottom) / 2
    canvas.arrow(left, bottom + 22, right, bottom + 22, PURPLE, both=True, halo=True)
    canvas.chip(c_x - chip_width('w = 0.00') / 2, bottom + 9, f'w = {w:.2f}', PURPLE)
    canvas.arrow(right + 26, top, right + 26, bottom, PURPLE, both=True, halo=True)
    canvas.chip(right + 12, c_y - 13, f'h = {h:.2f}', PURPLE)
    canvas.dot(c_x, c_y, PURPLE)


def coordinates_pixels():
    width, height = picture_size(BOATS)
    return coordinates(f'(x_min, y_min, x_max, y_max) = {BOATS_OBJECTS[0][1]} pixels,\n'
                       f'in a picture of {width} × {height} pixels', digits=0)


def coordinates_fractional():
    size, pixels = picture_size(BOATS), BOATS_OBJECTS[0][1]
    terms = [f'{pixel} / {size[i % 2]} = {value:.2f}'
             for i, (pixel, value) in enumerate(zip(pixels, fractional(pixels, BOATS).tolist()))]
    return coordinates(f'x: {terms[0]} and {terms[2]}\ny: {terms[1]} and {terms[3]}', unit=size)


def coordinates_center_size():
    box = boats_objects()[0][0]
    left, top, right, bottom = (f'{value:.2f}' for value in box.tolist())
    c_x, c_y, w, h = (f'{value:.2f}' for value in xy_to_cxcy(box).tolist())
    return coordinates(f'c_x = ({left} + {right}) / 2 = {c_x} and w = {right} − {left} = {w}\n'
                       f'c_y = ({top} + {bottom}) / 2 = {c_y} and h = {bottom} − {top} = {h}',
                       center_size=True, unit=picture_size(BOATS))


# ---------------------------------------------------------------------------------------- Jaccard overlap

def jaccard_index():
    """Two boxes on squared paper, their intersection and their union."""
    canvas = Canvas(height=292)
    one, two = torch.tensor([[1., 1, 7, 5]]), torch.tensor([[3., 2, 9, 7]])
    overlap, intersection = find_jaccard_overlap(one, two).item(), find_intersection(one, two).item()
    area_1, area_2 = (((box[0, 2:] - box[0, :2]).prod()).item() for box in (one, two))
    union = area_1 + area_2 - intersection
    shared = (*torch.maximum(one, two)[0, :2].tolist(), *torch.minimum(one, two)[0, 2:].tolist())

    captions = (f'{area_1:.0f} and {area_2:.0f} squares', f'intersection: {intersection:.0f}', f'union: {union:.0f}')
    square = 21
    for panel, caption in enumerate(captions):
        x, y = 24 + panel * 231, 24

        def draw(left, top, right, bottom, fill='none', stroke=None, x=x, y=y):
            canvas.rect(x + left * square, y + top * square, (right - left) * square, (bottom - top) * square, fill,
                        stroke)

        draw(0, 0, 10, 8, WHITE)
        boxes = [(one[0].tolist(), PURPLE), (two[0].tolist(), RED)]
        for filled in ([], [shared], [box for box, _ in boxes])[panel]:
            draw(*filled, tint(GREEN, 0.4))
        canvas.grid(x, y, 10 * square, 8 * square, 10, 8)
        for box, color in boxes:
            draw(*box, stroke=color)
        canvas.text(x + 5 * square, y + 8 * square + 30, caption, anchor='middle', bold=True)
    canvas.text(360, 266, f'Jaccard overlap = intersection / union = {intersection:.0f} / {union:.0f} = {overlap:.2f}',
                anchor='middle', title=True)
    return canvas


def jaccard_values():
    """What overlaps of about 0.25, 0.5, 0.75 and 0.9 look like."""
    canvas = Canvas(height=552, width=600)
    boat = boats_objects()[0][:1]
    width, height = (boat[0, 2:] - boat[0, :2]).tolist()
    for i, (shift_x, shift_y) in enumerate([(0.46, 0.26), (0.22, 0.145), (0.09, 0.06), (0.035, 0.018)]):
        x, y = 20 + i % 2 * 285, 20 + i // 2 * 250
        scene = Scene(canvas, BOATS, x, y, width=275)
        shifted = boat + torch.tensor([shift_x * width, shift_y * height]).repeat(2)
        scene.boxes(boat, PURPLE)
        scene.boxes(shifted, RED)
        overlap = find_jaccard_overlap(boat, shifted).item()
        canvas.chip(x + 8, y + 8, f'{overlap:.2f}', INK)
    canvas.text(300, 530, 'Jaccard overlap of the red box with the purple one', anchor='middle')
    return canvas


# ----------------------------------------------------------------------------------------------- priors

def feature_maps():
    """The six feature maps as grids laid over the image, with the priors of one tile each."""
    canvas = Canvas(height=356)
    total = 0
    for i, feature_map in enumerate(FEATURE_MAPS):
        x, y, side, grid = 18 + i * 116, 24, 104, feature_map.grid
        canvas.rect(x, y, side, side, WHITE, INK)
        canvas.grid(x, y, side, side, grid, grid)
        for left, top, right, bottom in cxcy_to_xy(priors_at(feature_map.name, grid // 2, grid // 2)).tolist():
            canvas.rect(x + left * side, y + top * side, (right - left) * side, (bottom - top) * side, stroke=RED)
        count = grid ** 2 * feature_map.n_priors
        total += count
        canvas.text(x + side / 2, y + side + 34, feature_map.name, anchor='middle', bold=True)
        canvas.text(x + side / 2, y + side + 64, f'{grid} × {grid}\n× {feature_map.n_priors} priors\n'
                    f'scale {feature_map.scale}', anchor='middle')
        canvas.text(x + side / 2, y + side + 150, str(count), RED, 'middle', bold=True)
        if i:
            canvas.text(x - 6, y + side + 150, '+', RED, 'middle', bold=True)
    canvas.text(360, 326, f'= {total} priors', RED, 'middle', title=True)
    return canvas


def priors_center():
    """The priors of the central tile of conv9_2, over a picture squeezed to a square."""
    canvas = Canvas(height=410)
    scene = Scene(canvas, BOATS, 20, 20, 370, 370, faded=True)
    draw_grid(scene, 5, tile=(2, 2))
    priors = priors_at('conv9_2', 2, 2)
    scene.boxes(cxcy_to_xy(priors), RED)
    for i, xy in enumerate(cxcy_to_xy(priors).tolist(), start=1):
        scene.label(xy, RED, str(i))
    rows = [[str(i), ratio, f'{w:.2f}', f'{h:.2f}']
            for i, (ratio, (w, h)) in enumerate(zip(PRIOR_NAMES, priors[:, 2:].tolist()), start=1)]
    canvas.text(410, 44, 'conv9_2, scale 0.55', title=True)
    canvas.table(410, 62, (56, 120, 58, 58), [['prior', 'w : h', 'w', 'h'], *rows])
    c_x, c_y = priors[0, :2].tolist()
    canvas.text(410, 324, f'The 6 priors of the central\ntile: all have their center\nat ({c_x:.1f}, {c_y:.1f})')
    return canvas


def draw_grid(scene, size, tile):
    """A feature map's tiles over a picture, one of them marked: (row, column)."""
    canvas, side = scene.canvas, scene.width / size
    canvas.grid(scene.x, scene.y, scene.width, scene.height, size, size, WHITE)
    canvas.rect(scene.x + tile[1] * side, scene.y + tile[0] * side, side, side, AMBER, opacity=0.5)


def priors_neighbors():
    """The same six priors on two other tiles of conv9_2; some overshoot the picture."""
    canvas = Canvas(height=450)

    def overshooting(xy):
        return ((xy < 0) | (xy > 1)).any(dim=1).sum().item()

    for (row, column), x in zip([(2, 3), (0, 0)], (60, 452)):
        scene = Scene(canvas, BOATS, x, 106, 230, 230, faded=True)
        draw_grid(scene, 5, tile=(row, column))
        boxes = cxcy_to_xy(priors_at('conv9_2', row, column))
        scene.boxes(boxes, RED)
        canvas.text(x + 115, 366, f'row {row}, column {column}:\n{overshooting(boxes)} of 6 overshoot', anchor='middle',
                    bold=True)
    all_priors = cxcy_to_xy(network().priors_cxcy)
    canvas.text(360, 430, f'{overshooting(all_priors)} of all {len(all_priors)} priors overshoot an edge, '
                'and stay that way', anchor='middle')
    return canvas


def offsets_from_prior():
    """The box of a boat told as its offsets from a prior."""
    canvas = Canvas(height=484)
    scene = Scene(canvas, BOATS, 20, 20, width=350)
    boat, chosen = boats_objects()[0][:1], network().priors_cxcy[prior('conv8_2', 5, 6, 1)]
    offsets = cxcy_to_gcxgcy(xy_to_cxcy(boat), chosen)[0].tolist()
    scene.box(cxcy_to_xy(chosen).tolist(), RED, dashed=True)
    scene.boxes(boat, PURPLE)
    scene.label(cxcy_to_xy(chosen).tolist(), RED, 'prior')
    scene.label(boat[0].tolist(), PURPLE, 'boat')
    (p_x, p_y, p_w, p_h), (c_x, c_y, w, h) = chosen.tolist(), xy_to_cxcy(boat)[0].tolist()
    canvas.arrow(*scene.at(p_x, p_y), *scene.at(c_x, c_y), halo=True)
    canvas.dot(*scene.at(p_x, p_y), RED)
    canvas.dot(*scene.at(c_x, c_y), PURPLE)

    rows = [['', 'c_x', 'c_y', 'w', 'h'],
            ['boat', *(f'{value:.3f}' for value in (c_x, c_y, w, h))],
            ['prior', *(f'{value:.3f}' for value in chosen.tolist())],
            ['offset', *map(signed, offsets)]]
    fills = {(1, 0): tint(PURPLE), (2, 0): tint(RED), **{(3, column): tint(BLUE) for column in range(5)}}
    canvas.table(388, 20, (70, 61, 61, 61, 61), rows, fills, row_height=38)
    canvas.text(388, 208, 'The boat\'s center lies to the left\nof the prior\'s, and higher. It is\n'
                'narrower than the prior, and taller.')
    lines = (('g_c_x', '(c_x − ĉ_x) / (ŵ / 10)', f'({c_x:.3f} − {p_x:.3f}) / {p_w / 10:.4f}'),
             ('g_c_y', '(c_y − ĉ_y) / (ĥ / 10)', f'({c_y:.3f} − {p_y:.3f}) / {p_h / 10:.4f}'),
             ('g_w', '5 · log(w / ŵ)', f'5 · log({w:.3f} / {p_w:.3f})'),
             ('g_h', '5 · log(h / ĥ)', f'5 · log({h:.3f} / {p_h:.3f})'))
    for i, ((name, formula, numbers), offset) in enumerate(zip(lines, offsets)):
        y = 346 + i * 36
        canvas.text(20, y, name, BLUE, bold=True)
        canvas.text(84, y, f'= {formula}')
        canvas.text(330, y, f'= {numbers}')
        canvas.text(700, y, f'= {signed(offset)}', BLUE, 'end', bold=True)
    return canvas


def signed(value):
    """With a true minus sign."""
    return f'{value:.2f}'.replace('-', '−')


POOLS = {'conv1_2': (2, 2), 'conv2_2': (2, 2), 'conv3_3': (2, 2), 'conv4_3': (2, 2), 'conv5_3': (3, 1)}  # size, stride


def receptive_fields():
    """Side in pixels of what one output of each feature map's 3×3 prediction convolution sees."""
    fields, field, distance = {}, 1, 1  # distance: of two neighboring outputs, in pixels
    for name, conv in [*network().base.named_children(), *network().aux_convs.named_children()]:
        field += (conv.kernel_size[0] - 1) * conv.dilation[0] * distance
        distance *= conv.stride[0]
        fields[name] = field + 2 * distance  # 2: for the prediction convolution's own 3×3 kernel
        if name in POOLS:
            size, stride = POOLS[name]
            field += (size - 1) * distance
            distance *= stride
    return {feature_map.name: fields[feature_map.name] for feature_map in FEATURE_MAPS}


def receptive_field():
    """What a prediction sees of the image, beside its kernel and its priors."""
    canvas = Canvas(height=640)
    fields = receptive_fields()
    for (name, tile), x in zip([('conv4_3', 19), ('conv7', 9)], (60, 444)):
        scene = Scene(canvas, BOATS, x, 98, 200, 200, faded=True)
        priors = priors_at(name, tile, tile)
        center, around = priors[0, :2].repeat(2), torch.tensor([-0.5, -0.5, 0.5, 0.5])
        scene.box((center + around * fields[name] / IMAGE_SIZE).tolist(), BLUE)
        scene.boxes(cxcy_to_xy(priors), RED)
        scene.box((center + around * 3 / MAPS[name].grid).tolist(), AMBER)
        canvas.text(x + 100, 34, name, anchor='middle', title=True)

    rows = [['map', '3×3 kernel', 'largest prior', 'receptive field', 'as a fraction']]
    for feature_map in FEATURE_MAPS:
        widest = priors_at(feature_map.name, 0, 0)[:, 2:].max().item()
        field = fields[feature_map.name]
        rows.append([feature_map.name, f'{min(3 / feature_map.grid, 1):.2f}', f'{widest:.2f}', f'{field} pixels',
                     f'{field / IMAGE_SIZE:.2f}'])
    fills = {(0, 1): tint(AMBER), (0, 2): tint(RED), (0, 3): tint(BLUE), (0, 4): tint(BLUE)}
    canvas.table(20, 388, (110, 130, 145, 155, 140), rows, fills)
    return canvas


# --------------------------------------------------------------------------------------------- matching

# Seven of the 8732 priors: feature map, row, column, number at this tile; and the side where its number stands.
MATCHED_PRIORS = ((('conv8_2', 4, 5, 4), 'right', 0.3), (('conv8_2', 8, 3, 3), 'bottom', 0.2),
                  (('conv8_2', 8, 5, 2), 'bottom', 0.6), (('conv7', 16, 15, 1), 'right', 0.2),
                  (('conv4_3', 31, 15, 0), 'left', 0.5), (('conv4_3', 35, 29, 0), 'right', 0.5),
                  (('conv8_2', 3, 2, 4), 'left', 0.5))
OBJECT_SIDES = (('top', 0.5), ('left', 0.8), ('right', 0.35), ('bottom', 0.5), ('bottom', 0.5))


def matching_example():
    """The five objects and seven priors: boxes, labels, priors (7, 4), overlaps (7, 5)."""
    boxes, labels = boats_objects()
    priors = network().priors_cxcy[[prior(*place) for place, _, _ in MATCHED_PRIORS]]
    return boxes, labels, priors, find_jaccard_overlap(cxcy_to_xy(priors), boxes)


def draw_matching(canvas, boxes, priors, colors):
    """The objects, named by letters, and the priors, named by numbers."""
    scene = Scene(canvas, BOATS, 100, 54, width=520)
    for xy, color in zip(cxcy_to_xy(priors).tolist(), colors):
        scene.box(xy, color)
    scene.boxes(boxes, PURPLE)
    for letter, xy, (side, place) in zip('ABCDE', boxes.tolist(), OBJECT_SIDES):
        scene.callout(xy, PURPLE, letter, side, place)
    for i, (xy, color, (_, side, place)) in enumerate(zip(cxcy_to_xy(priors).tolist(), colors, MATCHED_PRIORS), 1):
        scene.callout(xy, color, str(i), side, place)


def matching_scene():
    """The objects and priors, and the table of their overlaps."""
    canvas = Canvas(height=880)
    boxes, labels, priors, overlaps = matching_example()
    draw_matching(canvas, boxes, priors, [RED] * len(priors))
    rows = [['prior', *(f'{letter}: {rev_label_map[label]}' for letter, label in zip('ABCDE', labels.tolist()))]]
    rows += [[str(i), *(f'{value:.2f}' for value in row)] for i, row in enumerate(overlaps.tolist(), start=1)]
    best_object, best_prior = overlaps.argmax(dim=1), overlaps.argmax(dim=0)
    fills = {(i + 1, best_object[i].item() + 1): tint(RED) for i in range(len(priors)) if overlaps[i].max() > 0}
    fills |= {(best_prior[j].item() + 1, j + 1): tint(PURPLE, 0.5) for j in range(len(boxes))}
    canvas.table(60, 540, (75, *[105] * 5), rows, fills)
    canvas.rect(60, 818, 18, 18, tint(RED))
    canvas.text(88, 834, 'a prior\'s best object')
    canvas.rect(60, 846, 18, 18, tint(PURPLE, 0.5))
    canvas.text(88, 862, 'an object\'s best prior (and that prior\'s best object)')
    return canvas


def matching_result():
    """Which priors are positive, and what for."""
    canvas = Canvas(height=880)
    boxes, labels, priors, overlaps = matching_example()
    loss = MultiBoxLoss(priors)
    classes = loss.match([boxes], [labels])[1][0].tolist()
    draw_matching(canvas, boxes, priors, [GREEN if label else GRAY for label in classes])
    fills, rows = {}, [['prior', 'object', 'overlap', 'match', 'class to learn']]
    for i, (label, row) in enumerate(zip(classes, overlaps), start=1):
        overlap, best = row.max(dim=0)
        rows.append([str(i), 'ABCDE'[best] if overlap > 0 else '–', f'{overlap.item():.2f}',
                     'positive' if label else 'negative', rev_label_map[label]])
        fills |= {(i, column): tint(GREEN if label else GRAY, 0.25) for column in (3, 4)}
    canvas.table(75, 540, (75, 95, 105, 125, 170), rows, fills)
    for i, label in enumerate(classes):
        if label and overlaps[i].max() < loss.threshold:
            canvas.text(60, 836, f'Prior {i + 1} overlaps by less than {loss.threshold}, but is positive:\n'
                        f'it is the best of these seven for {"ABCDE"[overlaps[i].argmax()]}.')
    return canvas
