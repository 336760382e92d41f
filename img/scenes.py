"""Figures that show boxes on a picture: coordinates, priors, matching, non-maximum suppression and the like.

All numbers in them come from the functions that train and run the network.
"""

import functools
import json
from pathlib import Path

import torch

from model import FEATURE_MAPS, SSD300, MultiBoxLoss
from svg import (AMBER, BLUE, CHIP_HEIGHT, EDGE, GREEN, GREY, HAIRLINE, INK, LINE_HEIGHT, PURPLE, RED, STROKE, WHITE,
                 Canvas, chip_width, tint)
from utils import (IMAGE_SIZE, cxcy_to_gcxgcy, cxcy_to_xy, find_intersection, find_jaccard_overlap, label_map,
                   parse_annotation, picture_size, rev_label_map, xy_to_cxcy)

HERE = Path(__file__).resolve().parent
ASTRONAUT, COFFEE = HERE / 'photos/astronaut.jpg', HERE / 'photos/coffee.jpg'
DOGS_AND_CAT = HERE / 'photos/dogs_and_cat.jpg'
QUICK_START = HERE / 'quick_start_detections.json'
VGG_BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # convolutions and channels of VGG-16's blocks
PRIOR_NAMES = ('1 : 1', '1 : 1 extra', '2 : 1', '3 : 1', '1 : 2', '1 : 3')  # of conv9_2: width to height

COFFEE_BOX = (61, 15, 384, 307)  # in pixels: cup and saucer
CUP_BOX = (137, 14, 334, 243)  # in pixels: the cup alone
DOGS_AND_CAT_BOXES = ((153, 114, 325, 297), (17, 68, 191, 253), (255, 28, 433, 226))  # in pixels: dog, dog, cat


class Scene:
    """A picture on a canvas, on which boxes are drawn in fractional boundary coordinates. A faded one leaves the
    stage to its boxes."""

    def __init__(self, canvas, path, x, y, width, faded=False):
        self.canvas, self.x, self.y, self.width = canvas, x, y, width
        self.height = canvas.picture(path, x, y, width)
        if faded:
            canvas.rect(x, y, width, self.height, WHITE, opacity=0.5)

    def at(self, x, y):
        return self.x + x * self.width, self.y + y * self.height

    def box(self, xy, color, dashed=False, thin=False):
        (left, top), (right, bottom) = self.at(*xy[:2]), self.at(*xy[2:])
        frame = (left, top, right - left, bottom - top)
        if not thin:
            self.canvas.rect(*frame, stroke=WHITE, stroke_width=5)  # stands out against any picture
        self.canvas.rect(*frame, stroke=color, dashed=dashed, stroke_width=HAIRLINE if thin else STROKE)

    def label(self, xy, color, text, corner='top left'):
        """A chip inside one corner of a box, or 'above left' of it. To be drawn after all boxes, lest one of them
        crosses it out."""
        (left, top), (right, bottom) = self.at(*xy[:2]), self.at(*xy[2:])
        x = left if 'left' in corner else right - chip_width(text)
        x = min(max(x, self.x), self.x + self.width - chip_width(text))  # never beside the picture
        y = {'top': top, 'bottom': bottom - CHIP_HEIGHT, 'above': max(top - CHIP_HEIGHT, self.y)}[corner.split()[0]]
        self.canvas.chip(x, y, text, color)

    def boxes(self, all_xy, color, **style):
        for xy in all_xy.tolist():
            self.box(xy, color, **style)


@functools.lru_cache(maxsize=1)
def network():
    """An untrained SSD300, for its priors and its way to detect objects."""
    return SSD300(n_classes=len(label_map))


def prior(name, row, column, kind):
    """The number, among the 8732, of a prior of a feature map."""
    number = 0
    for feature_map in FEATURE_MAPS:
        if feature_map.name == name:
            return number + (row * feature_map.grid + column) * feature_map.n_priors + kind
        number += feature_map.grid ** 2 * feature_map.n_priors
    raise ValueError(name)


def priors_at(name, row, column):
    """All priors of one tile of a feature map, center-size coordinates (n_priors, 4)."""
    first = prior(name, row, column, 0)
    n_priors = next(feature_map.n_priors for feature_map in FEATURE_MAPS if feature_map.name == name)
    return network().priors_cxcy[first:first + n_priors]


def sample(name):
    """A picture of Emoji VOC: its path, fractional boxes (n, 4) and labels (n)."""
    folder = HERE / 'emoji_voc/VOC2007'
    path = folder / 'JPEGImages' / f'{name}.jpg'
    objects = parse_annotation(folder / 'Annotations' / f'{name}.xml')
    return path, fractional(objects['boxes'], path), torch.tensor(objects['labels'])


def fractional(boxes, path):
    """Boxes in a picture's pixels as fractions of its size."""
    return torch.tensor(boxes, dtype=torch.float) / torch.tensor(picture_size(path) * 2)


# ------------------------------------------------------------------------------------------ coordinates

def coordinates(lines, center_size=False, unit=(1, 1), digits=2):
    """The box of the cup with its coordinates marked on the axes, each divided by `unit`."""
    canvas = Canvas(height=380)
    scene = Scene(canvas, COFFEE, 100, 62, width=432)
    box = fractional(COFFEE_BOX, COFFEE)
    left, top, right, bottom = box.tolist()
    scene.box((left, top, right, bottom), PURPLE)
    canvas.arrow(92, 54, 560, 54)
    canvas.arrow(92, 54, 92, 372)
    canvas.text(566, 59, 'x', bold=True)
    canvas.text(102, 374, 'y', bold=True)
    canvas.text(84, 50, '0', anchor='end')

    width, height = picture_size(COFFEE)
    c_x, c_y, w, h = xy_to_cxcy(box).tolist()
    for name, x in [('c_x', c_x)] if center_size else [('x_min', left), ('x_max', right)]:
        at_x, at_y = scene.at(x, c_y if center_size else top)
        canvas.line(at_x, 54, at_x, at_y, PURPLE, dashed=True, halo=True)
        canvas.text(at_x, 44, f'{name} = {x * width / unit[0]:.{digits}f}', PURPLE, 'middle', bold=True)
    for name, y in [('c_y', c_y)] if center_size else [('y_min', top), ('y_max', bottom)]:
        at_x, at_y = scene.at(c_x if center_size else left, y)
        canvas.line(92, at_y, at_x, at_y, PURPLE, dashed=True, halo=True)
        canvas.text(86, at_y, f'{name}\n= {y * height / unit[1]:.{digits}f}', PURPLE, 'end', bold=True)
    if center_size:
        draw_size(scene, (left, top, right, bottom), w, h)
    canvas.text(580, 100, lines)
    return canvas


def draw_size(scene, xy, w, h):
    """Arrows beside a box for its width and height, and a dot at its center."""
    canvas = scene.canvas
    (left, top), (right, bottom) = scene.at(*xy[:2]), scene.at(*xy[2:])
    c_x, c_y = (left + right) / 2, (top + bottom) / 2
    canvas.arrow(left, bottom + 22, right, bottom + 22, PURPLE, both=True, halo=True)
    canvas.chip(c_x - 40, bottom + 12, f'w = {w:.2f}', PURPLE)
    canvas.arrow(right + 20, top, right + 20, bottom, PURPLE, both=True, halo=True)
    canvas.chip(right + 4, c_y - 10, f'h = {h:.2f}', PURPLE)
    canvas.dot(c_x, c_y, PURPLE)


def coordinates_pixels():
    width, height = picture_size(COFFEE)
    return coordinates(f'Boundary coordinates\nin pixels\n\n(x_min, y_min, x_max, y_max)\n= {COFFEE_BOX}\n\n'
                       f'of a picture that is\n{width} pixels wide\nand {height} high', digits=0)


def coordinates_fractional():
    size = picture_size(COFFEE)
    names = ('x_min', 'y_min', 'x_max', 'y_max')
    values = fractional(COFFEE_BOX, COFFEE).tolist()
    lines = [f'{name} = {pixels} / {size[i % 2]} = {value:.2f}'
             for i, (name, pixels, value) in enumerate(zip(names, COFFEE_BOX, values))]
    return coordinates('Boundary coordinates\nas fractions of the\npicture\'s width and height\n\n' + '\n'.join(lines)
                       + '\n\nThe right and lower edges\nare at 1.', unit=size)


def coordinates_center_size():
    box = fractional(COFFEE_BOX, COFFEE)
    left, top, right, bottom = (f'{value:.2f}' for value in box.tolist())
    c_x, c_y, w, h = (f'{value:.2f}' for value in xy_to_cxcy(box).tolist())
    return coordinates(f'Center-size coordinates\n(c_x, c_y, w, h)\n\nc_x = ({left} + {right}) / 2 = {c_x}\n'
                       f'c_y = ({top} + {bottom}) / 2 = {c_y}\nw = {right} − {left} = {w}\n'
                       f'h = {bottom} − {top} = {h}', center_size=True, unit=picture_size(COFFEE))


# ---------------------------------------------------------------------------------------- Jaccard index

def jaccard_index():
    """Two boxes on squared paper, their intersection and their union."""
    canvas = Canvas(height=304)
    one, two = torch.tensor([[1., 1, 7, 5]]), torch.tensor([[3., 2, 9, 7]])
    overlap, intersection = find_jaccard_overlap(one, two).item(), find_intersection(one, two).item()
    area_1, area_2 = (((box[0, 2:] - box[0, :2]).prod()).item() for box in (one, two))
    union = area_1 + area_2 - intersection
    shared = (*torch.maximum(one, two)[0, :2].tolist(), *torch.minimum(one, two)[0, 2:].tolist())

    captions = (f'two boxes: {area_1:.0f} and {area_2:.0f} squares', f'intersection: {intersection:.0f} squares',
                f'union: {union:.0f} squares')
    for panel, caption in enumerate(captions):
        x, y, square = 30 + panel * 270, 28, 23
        canvas.rect(x, y, 10 * square, 8 * square, WHITE)
        boxes = [(one[0].tolist(), PURPLE), (two[0].tolist(), RED)]
        filled = ([], [shared], [box for box, _ in boxes])[panel]
        for left, top, right, bottom in filled:
            canvas.rect(x + left * square, y + top * square, (right - left) * square, (bottom - top) * square,
                        tint(GREEN, 0.4))
        canvas.grid(x, y, 10 * square, 8 * square, 10, 8)
        for (left, top, right, bottom), color in boxes:
            canvas.rect(x + left * square, y + top * square, (right - left) * square, (bottom - top) * square,
                        stroke=color)
        canvas.text(x + 5 * square, y + 8 * square + 24, caption, anchor='middle', bold=True)
    canvas.text(415, 282, f'Jaccard index = intersection / union = {intersection:.0f} / {union:.0f} = {overlap:.2f}',
                anchor='middle', title=True)
    return canvas


def jaccard_values():
    """What overlaps of about 0.25, 0.5, 0.75 and 0.9 look like."""
    canvas = Canvas(height=212)
    cup = fractional([CUP_BOX], COFFEE)
    width, height = (cup[0, 2:] - cup[0, :2]).tolist()
    for i, (shift_x, shift_y) in enumerate([(0.46, 0.26), (0.22, 0.145), (0.09, 0.06), (0.035, 0.018)]):
        scene = Scene(canvas, COFFEE, 16 + i * 202, 16, width=192)
        shifted = cup + torch.tensor([shift_x * width, shift_y * height]).repeat(2)
        scene.boxes(cup, PURPLE)
        scene.boxes(shifted, RED)
        canvas.text(112 + i * 202, 172, f'{find_jaccard_overlap(cup, shifted).item():.2f}', anchor='middle', title=True)
    canvas.text(415, 197, 'Jaccard index of the red box with the purple one', anchor='middle')
    return canvas


# ----------------------------------------------------------------------------------------------- priors

def feature_maps():
    """The six feature maps as grids laid over the image, with the priors of one tile each."""
    canvas = Canvas(height=330)
    total = 0
    for i, feature_map in enumerate(FEATURE_MAPS):
        x, y, side, grid = 24 + i * 134, 24, 112, feature_map.grid
        canvas.rect(x, y, side, side, WHITE, INK)
        canvas.grid(x, y, side, side, grid, grid)
        for left, top, right, bottom in cxcy_to_xy(priors_at(feature_map.name, grid // 2, grid // 2)).tolist():
            canvas.rect(x + left * side, y + top * side, (right - left) * side, (bottom - top) * side, stroke=RED)
        count = grid ** 2 * feature_map.n_priors
        total += count
        canvas.text(x + side / 2, y + side + 26, feature_map.name, anchor='middle', title=True)
        canvas.text(x + side / 2, y + side + 52, f'{grid} · {grid} tiles\n{feature_map.n_priors} priors each\n'
                    f'scale {feature_map.scale}', anchor='middle')
        canvas.text(x + side / 2, y + side + 127, f'{count} priors', RED, 'middle', bold=True)
        if i:
            canvas.text(x - 11, y + side + 127, '+', RED, 'middle', bold=True)
    canvas.text(415, 308, f'= {total} priors', RED, 'middle', title=True)
    return canvas


def priors_center():
    """The priors of the central tile of conv9_2, over a picture."""
    canvas = Canvas(height=440)
    scene = Scene(canvas, ASTRONAUT, 20, 20, width=400, faded=True)
    draw_grid(scene, 5, tile=(2, 2))
    priors = priors_at('conv9_2', 2, 2)
    corners = ('bottom left', 'top right', 'bottom left', 'top left', 'bottom right', 'top left')
    scene.boxes(cxcy_to_xy(priors), RED)
    for i, (xy, corner) in enumerate(zip(cxcy_to_xy(priors).tolist(), corners), start=1):
        scene.label(xy, RED, str(i), corner)
    rows = [[str(i), ratio, f'{w:.2f}', f'{h:.2f}']
            for i, (ratio, (w, h)) in enumerate(zip(PRIOR_NAMES, priors[:, 2:].tolist()), start=1)]
    canvas.text(452, 45, 'conv9_2: 5 × 5 tiles, scale 0.55', title=True)
    canvas.text(452, 72, 'The 6 priors of the central tile')
    canvas.table(452, 92, (70, 120, 75, 75), [['prior', 'w : h', 'w', 'h'], *rows])
    c_x, c_y = priors[0, :2].tolist()
    canvas.text(452, 312, f'All have their center at ({c_x:.1f}, {c_y:.1f}).\nThe extra prior is a square, too: its\n'
                'scale lies between this map\'s 0.55\nand the next one\'s 0.725.')
    return canvas


def draw_grid(scene, size, tile):
    """A feature map's tiles over a picture, one of them marked: (row, column)."""
    canvas, side = scene.canvas, scene.width / size
    canvas.grid(scene.x, scene.y, scene.width, scene.height, size, size, WHITE)
    canvas.rect(scene.x + tile[1] * side, scene.y + tile[0] * side, side, side, AMBER, opacity=0.5)


def priors_neighbors():
    """The same six priors on two other tiles of conv9_2; some overshoot the picture."""
    canvas = Canvas(height=432)
    priors_xy = cxcy_to_xy(network().priors_cxcy)
    overshoot = ((priors_xy < 0) | (priors_xy > 1)).any(dim=1)
    for (row, column), x in zip([(2, 3), (0, 0)], (60, 510)):
        scene = Scene(canvas, ASTRONAUT, x, 112, width=250, faded=True)
        draw_grid(scene, 5, tile=(row, column))
        first = prior('conv9_2', row, column, 0)
        scene.boxes(priors_xy[first:first + 6], RED)
        canvas.text(x + 125, 388, f'row {row}, column {column}: {overshoot[first:first + 6].sum()} of 6 overshoot',
                    anchor='middle', bold=True)
    canvas.text(415, 414, f'{overshoot.sum()} of all {len(overshoot)} priors overshoot an edge of the picture, '
                'and are left so', anchor='middle')
    return canvas


def offsets_from_prior():
    """The box of a cat told as its offsets from a prior."""
    canvas = Canvas(height=386)
    scene = Scene(canvas, DOGS_AND_CAT, 20, 20, width=400)
    cat = fractional([DOGS_AND_CAT_BOXES[2]], DOGS_AND_CAT)
    chosen = network().priors_cxcy[prior('conv8_2', 4, 6, 1)]
    c_x, c_y, w, h = xy_to_cxcy(cat)[0].tolist()
    p_x, p_y, p_w, p_h = chosen.tolist()
    offsets = cxcy_to_gcxgcy(xy_to_cxcy(cat), chosen)[0].tolist()

    for xy, color, text, corner in ((cxcy_to_xy(chosen).tolist(), RED, 'prior', 'bottom left'),
                                    (cat[0].tolist(), PURPLE, 'cat', 'top right')):
        scene.box(xy, color, dashed=color == RED)
        scene.label(xy, color, text, corner)
    canvas.arrow(*scene.at(p_x, p_y), *scene.at(c_x, c_y), halo=True)
    canvas.dot(*scene.at(p_x, p_y), RED)
    canvas.dot(*scene.at(c_x, c_y), PURPLE)

    rows = [['', 'c_x', 'c_y', 'w', 'h'],
            ['cat', *(f'{value:.3f}' for value in (c_x, c_y, w, h))],
            ['prior', *(f'{value:.3f}' for value in chosen.tolist())],
            ['offset', *(signed(value) for value in offsets)]]
    fills = {(1, 0): tint(PURPLE), (2, 0): tint(RED), **{(3, column): tint(BLUE) for column in range(5)}}
    canvas.table(440, 20, (70, 75, 75, 75, 75), rows, fills)
    formulas = (f'g_c_x = ({c_x:.3f} − {p_x:.3f}) / ({p_w:.3f} / 10) = {signed(offsets[0])}',
                f'g_c_y = ({c_y:.3f} − {p_y:.3f}) / ({p_h:.3f} / 10) = {signed(offsets[1])}',
                f'g_w = 5 · ln({w:.3f} / {p_w:.3f}) = {signed(offsets[2])}',
                f'g_h = 5 · ln({h:.3f} / {p_h:.3f}) = {signed(offsets[3])}')
    for i, formula in enumerate(formulas):
        canvas.text(440, 172 + i * 30, formula)
    canvas.text(440, 310, 'The cat\'s center lies to the right of the\nprior\'s and higher; the cat is narrower\n'
                'than the prior, and taller.')
    return canvas


def signed(value):
    """With a true minus sign."""
    return f'{value:.2f}'.replace('-', '−')


def receptive_fields():
    """Side in pixels of what one output of each feature map's 3×3 prediction convolution sees, and the distance in
    pixels of two neighboring outputs: {name: (receptive field, stride)}."""
    layers = []  # (name, kernel size, stride, dilation), in the order in which an image passes them
    for block, (n_convs, _) in enumerate(VGG_BLOCKS, start=1):
        layers += [(f'conv{block}_{i}', 3, 1, 1) for i in range(1, n_convs + 1)]
        layers.append((f'pool{block}', *((3, 1) if block == 5 else (2, 2)), 1))
    base = network().base
    upper = {'conv6': base.conv6, 'conv7': base.conv7, **dict(network().aux_convs.named_children())}
    layers += [(name, conv.kernel_size[0], conv.stride[0], conv.dilation[0]) for name, conv in upper.items()]

    fields, field, distance = {}, 1, 1
    for name, kernel_size, stride, dilation in layers:
        field += (kernel_size - 1) * dilation * distance
        distance *= stride
        fields[name] = (field + 2 * distance, distance)  # 2: for the prediction convolution's own 3×3 kernel
    return {feature_map.name: fields[feature_map.name] for feature_map in FEATURE_MAPS}


def receptive_field():
    """What a prediction sees of the image, beside its kernel and its priors."""
    canvas = Canvas(height=600)
    fields = receptive_fields()
    for (name, tile), x in zip([('conv4_3', 19), ('conv7', 9)], (110, 520)):
        scene = Scene(canvas, ASTRONAUT, x, 98, width=200, faded=True)
        grid = next(feature_map.grid for feature_map in FEATURE_MAPS if feature_map.name == name)
        priors = priors_at(name, tile, tile)
        center = priors[0, :2].repeat(2)
        around = torch.tensor([-0.5, -0.5, 0.5, 0.5])
        seen = center + around * fields[name][0] / IMAGE_SIZE
        scene.box(seen.tolist(), BLUE)
        scene.boxes(cxcy_to_xy(priors), RED)
        kernel = (center + around * 3 / grid).tolist()
        scene.box(kernel, AMBER)
        canvas.text(x + 100, 32, name, anchor='middle', title=True)

    rows = [['feature map', '3×3 kernel covers', 'largest prior', 'receptive field', '… as a fraction']]
    for feature_map in FEATURE_MAPS:
        widest = priors_at(feature_map.name, 0, 0)[:, 2:].max().item()
        field = fields[feature_map.name][0]
        rows.append([feature_map.name, f'{min(3 / feature_map.grid, 1):.2f}', f'{widest:.2f}', f'{field} pixels',
                     f'{field / IMAGE_SIZE:.2f}'])
    fills = {(0, 1): tint(AMBER), (0, 2): tint(RED), (0, 3): tint(BLUE), (0, 4): tint(BLUE)}
    canvas.table(40, 392, (130, 165, 145, 155, 155), rows, fills)
    return canvas


# --------------------------------------------------------------------------------------------- matching

# Seven of the 8732 priors: feature map, row, column, number at this tile; and where the chip goes.
MATCHED_PRIORS = ((('conv8_2', 4, 2, 5), 'bottom left'), (('conv8_2', 3, 2, 4), 'top right'),
                  (('conv9_2', 2, 1, 5), 'bottom right'), (('conv7', 10, 9, 1), 'bottom right'),
                  (('conv7', 11, 8, 1), 'bottom left'), (('conv7', 5, 15, 1), 'bottom right'),
                  (('conv8_2', 8, 7, 0), 'bottom right'))


def matching_example():
    """The scene with three objects and seven priors: path, boxes, labels, priors (7, 4), overlaps (7, 3)."""
    path, boxes, labels = sample('000012')
    priors = network().priors_cxcy[[prior(*place) for place, _ in MATCHED_PRIORS]]
    return path, boxes, labels, priors, find_jaccard_overlap(cxcy_to_xy(priors), boxes)


def matching_scene():
    """The objects and priors, and the table of their overlaps."""
    canvas = Canvas(height=350)
    path, boxes, labels, priors, overlaps = matching_example()
    scene = Scene(canvas, path, 20, 20, width=410)
    scene.boxes(boxes, PURPLE)
    scene.boxes(cxcy_to_xy(priors), RED, dashed=True)
    for i, (xy, (_, corner)) in enumerate(zip(cxcy_to_xy(priors).tolist(), MATCHED_PRIORS), start=1):
        scene.label(xy, RED, str(i), corner)

    names = [rev_label_map[label] for label in labels.tolist()]
    rows = [['prior', *names]]
    rows += [[str(i), *(f'{value:.2f}' for value in row)] for i, row in enumerate(overlaps.tolist(), start=1)]
    best_object, best_prior = overlaps.argmax(dim=1), overlaps.argmax(dim=0)
    fills = {(i + 1, best_object[i].item() + 1): tint(RED) for i in range(len(rows) - 1) if overlaps[i].max() > 0}
    fills |= {(best_prior[j].item() + 1, j + 1): tint(PURPLE, 0.5) for j in range(len(names))}
    canvas.text(450, 40, 'Jaccard overlaps', title=True)
    canvas.table(450, 54, (60, 95, 95, 110), rows, fills)
    canvas.rect(450, 286, 16, 16, tint(RED))
    canvas.text(474, 299, 'a prior\'s best object')
    canvas.rect(450, 312, 16, 16, tint(PURPLE, 0.5))
    canvas.text(474, 325, 'an object\'s best prior (and its best object)')
    return canvas


def matching_result():
    """Which priors are positive, and what for."""
    canvas = Canvas(height=314)
    path, boxes, labels, priors, overlaps = matching_example()
    loss = MultiBoxLoss(priors)
    _, classes = loss.match([boxes], [labels])
    classes = classes[0].tolist()
    scene = Scene(canvas, path, 20, 20, width=350)
    scene.boxes(boxes, PURPLE)
    priors_xy, colors = cxcy_to_xy(priors).tolist(), [GREEN if label else GREY for label in classes]
    for xy, color in zip(priors_xy, colors):
        scene.box(xy, color, dashed=color == GREY)
    fills, rows = {}, [['prior', 'object', 'overlap', 'match', 'class to learn']]
    for i, (xy, color, label) in enumerate(zip(priors_xy, colors, classes), start=1):
        scene.label(xy, color, str(i), MATCHED_PRIORS[i - 1][1])
        overlap, best = overlaps[i - 1].max(dim=0)
        rows.append([str(i), rev_label_map[labels[best].item()] if overlap > 0 else '–', f'{overlap.item():.2f}',
                     'positive' if label else 'negative', rev_label_map[label]])
        fills |= {(i, column): tint(color, 0.25 if label else 0.15) for column in (3, 4)}
    claimed = [i for i, label in enumerate(classes) if label and overlaps[i].max() < loss.threshold]
    canvas.table(384, 20, (55, 95, 80, 85, 115), rows, fills)
    for i in claimed:
        canvas.text(384, 262, f'Prior {i + 1} overlaps by less than {loss.threshold}, and is positive\n'
                    f'nevertheless: it is the best that the {rev_label_map[classes[i]]} has.')
    return canvas


# ------------------------------------------------------------------------------- non-maximum suppression

MIN_SCORE, MAX_OVERLAP = 0.2, 0.5
# What a network could have found in DOGS_AND_CAT: label, score, box in pixels, where the chip goes.
CANDIDATES = (('dog', 0.96, (150, 112, 329, 301), 'bottom right'), ('cat', 0.93, (259, 22, 437, 230), 'top right'),
              ('dog', 0.89, (12, 66, 189, 258), 'bottom left'), ('dog', 0.74, (31, 48, 218, 236), 'top left'),
              ('cat', 0.58, (234, 42, 404, 214), 'top left'))
CLASS_COLORS = {'dog': AMBER, 'cat': BLUE}


def candidate_boxes():
    """The candidates' boxes (5, 4), fractional."""
    return fractional([box for _, _, box, _ in CANDIDATES], DOGS_AND_CAT)


def kept_candidates():
    """The numbers of the candidates that the network's `detect_objects` leaves.

    It is given 8732 predictions, as always: the first five say what the candidates are, the others "background".
    """
    model = network()
    probabilities = torch.zeros(1, len(model.priors_cxcy), model.n_classes)  # (1, 8732, 21)
    for i, (label, score, _, _) in enumerate(CANDIDATES):
        probabilities[0, i, label_map[label]] = score
    probabilities[..., 0] = 1 - probabilities.sum(dim=2)
    locs = torch.zeros(1, len(model.priors_cxcy), 4)  # (1, 8732, 4)
    locs[0, :len(CANDIDATES)] = cxcy_to_gcxgcy(xy_to_cxcy(candidate_boxes()), model.priors_cxcy[:len(CANDIDATES)])
    _, _, scores = model.detect_objects(locs, probabilities.log(), MIN_SCORE, MAX_OVERLAP, top_k=200)
    found = [round(score, 2) for score in scores[0].tolist()]
    return [i for i, (_, score, _, _) in enumerate(CANDIDATES) if score in found]


def by_class():
    """{label: numbers of its candidates, by falling score}"""
    ranked = sorted(range(len(CANDIDATES)), key=lambda i: -CANDIDATES[i][1])
    return {label: [i for i in ranked if CANDIDATES[i][0] == label] for label in CLASS_COLORS}


def title_of(i):
    """'dog 1' for the best dog and so on."""
    label = CANDIDATES[i][0]
    return f'{label} {by_class()[label].index(i) + 1}'


def draw_candidates(numbers):
    canvas = Canvas(height=442)
    scene = Scene(canvas, DOGS_AND_CAT, 155, 16, width=520)
    boxes = candidate_boxes().tolist()
    for i in reversed(numbers):  # the best ones on top
        scene.box(boxes[i], CLASS_COLORS[CANDIDATES[i][0]])
    for i in numbers:
        label, score, _, corner = CANDIDATES[i]
        scene.label(boxes[i], CLASS_COLORS[label], f'{title_of(i)}: {score:.2f}', corner)
    canvas.text(415, 429, f'{len(numbers)} boxes for 3 animals', anchor='middle')
    return canvas


def nms_1_candidates():
    return draw_candidates(range(len(CANDIDATES)))


def nms_2_sorted():
    """The candidates of each class, lined up by score."""
    canvas = Canvas(height=160)
    for (label, numbers), x in zip(by_class().items(), (24, 430)):
        for place, i in enumerate(numbers):
            score, y = CANDIDATES[i][1], 22 + place * 42
            canvas.text(x, y + 20, title_of(i), bold=True)
            canvas.rect(x + 55, y, 260, 30, WHITE, EDGE, stroke_width=HAIRLINE)
            canvas.rect(x + 55, y, 260 * score, 30, CLASS_COLORS[label])
            canvas.text(x + 325, y + 20, f'{score:.2f}')
    return canvas


def nms_3_overlaps():
    """The overlaps of the candidates of each class, and who suppresses whom."""
    canvas = Canvas(height=202)
    kept = kept_candidates()
    for (label, numbers), x in zip(by_class().items(), (24, 470)):
        boxes = candidate_boxes()[numbers]
        overlaps = find_jaccard_overlap(boxes, boxes).tolist()
        rows = [['', *map(title_of, numbers)]]
        rows += [[title_of(i), *(f'{value:.2f}' for value in row)] for i, row in zip(numbers, overlaps)]
        fills = {(0, column + 1): tint(CLASS_COLORS[label], 0.5) for column in range(len(numbers))}
        fills |= {(row + 1, 0): tint(CLASS_COLORS[label], 0.5) for row in range(len(numbers))}
        fills |= {(row + 1, column + 1): tint(RED, 0.4) for row in range(len(numbers)) for column in range(row)
                  if numbers[column] in kept and overlaps[row][column] > MAX_OVERLAP}
        canvas.table(x, 24, [85] * len(rows[0]), rows, fills)
        y = 24 + 27 * len(rows) + 26
        for row, i in enumerate(numbers):
            if i not in kept:
                best = max((column for column in range(row) if numbers[column] in kept),
                           key=lambda column: overlaps[row][column])
                canvas.text(x, y, f'{title_of(i)} is suppressed by {title_of(numbers[best])}:\n'
                            f'they overlap by {overlaps[row][best]:.2f}, more than {MAX_OVERLAP}')
    return canvas


def nms_4_result():
    return draw_candidates(kept_candidates())


# ------------------------------------------------------------------------------------------ quick start

def quick_start_training():
    """What the network finds in one training picture as the quick start goes on; None without recorded
    detections."""
    if not QUICK_START.exists():
        return None
    recorded = json.loads(QUICK_START.read_text(encoding='utf-8'))
    path, epochs = HERE / recorded['picture'], sorted(recorded['epochs'], key=int)
    width, height = picture_size(path)
    panel_width, columns = 256, 3
    panel_height = panel_width * height / width
    rows = -(-len(epochs) // columns)
    canvas = Canvas(height=round(16 + rows * (panel_height + 2 * LINE_HEIGHT)))
    for i, epoch in enumerate(epochs):
        x, y = 16 + i % columns * (panel_width + 15), 16 + i // columns * (panel_height + 2 * LINE_HEIGHT)
        scene = Scene(canvas, path, x, y, panel_width)
        found = recorded['epochs'][epoch]
        boxes = fractional([one['box'] for one in found], path).view(-1, 4)
        scene.boxes(boxes.flip(0), BLUE)  # the surest last, on top
        for one, xy in zip(reversed(found), boxes.flip(0).tolist()):
            scene.label(xy, BLUE, f'{one["label"]} {one["score"]:.2f}', 'above left')
        count = len(found)
        canvas.text(x + panel_width / 2, y + panel_height + 22,
                    f'epoch {epoch}: {count or "no"} {"box" if count == 1 else "boxes"}', anchor='middle', bold=True)
    return canvas
