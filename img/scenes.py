"""Figures that show boxes on a picture: coordinates, overlaps, priors, offsets, matching."""

import json
from pathlib import Path

import torch

from model import FEATURE_MAPS, SSD300, MultiBoxLoss
from svg import (BLUE, CHIP_HEIGHT, GRAY, GREEN, HAIRLINE, INK, PAPER, PURPLE, RED, STROKE, WHITE, chip_width,
                 figure, tint)
from utils import (cxcy_to_gcxgcy, cxcy_to_xy, find_intersection, find_jaccard_overlap, label_map,
                   picture_size, rev_label_map, xy_to_cxcy)

HERE = Path(__file__).resolve().parent
PRIOR_NAMES = ('1 : 1', 'extra', '2 : 1', '3 : 1', '1 : 2', '1 : 3')  # of conv9_2: width to height

# The picture that runs through the README, and its objects in pixels. The dog is the example of a box.
DOG = HERE / 'photos/dog.jpg'
OBJECTS = {'dog': (132, 222, 312, 536), 'bicycle': (128, 136, 566, 420), 'car': (468, 74, 690, 171),
           'motorbike': (58, 90, 110, 122)}
BOXES = torch.tensor([*OBJECTS.values()]) / torch.tensor(2 * picture_size(DOG))  # (4, 4), fractional
LABELS = torch.tensor([label_map[label] for label in OBJECTS])  # (4)
PRIORS = SSD300.create_prior_boxes()  # (8732, 4), center-size
PRIORS_XY = cxcy_to_xy(PRIORS)  # (8732, 4)
OVERLAPS = find_jaccard_overlap(PRIORS_XY, BOXES)  # (8732, 4)
CLASSES = MultiBoxLoss(PRIORS).match(BOXES, LABELS)[1]  # (8732): what each prior has to learn


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
        """A chip at a corner of a box, outside it if there's room, where no other chip lies. To be drawn after all
        boxes, which would cross it."""
        (left, top), (right, bottom), width = self.at(*xy[:2]), self.at(*xy[2:]), chip_width(text)
        corners = [(min(max(x, self.x), self.x + self.width - width), y) for xs in ((left, right - width), (right,))
                   for y in (top - CHIP_HEIGHT, bottom, top, bottom - CHIP_HEIGHT) for x in xs
                   if self.y <= y <= self.y + self.height - CHIP_HEIGHT]
        free = [(x, y) for x, y in corners
                if all(x + width < x1 or x > x2 or abs(y - y1) > CHIP_HEIGHT for x1, x2, y1 in self.chips)]
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


PLACES = [(feature_map, row, column) for feature_map in FEATURE_MAPS for row in range(feature_map.grid)
          for column in range(feature_map.grid) for _ in range(feature_map.n_priors)]  # of the 8732 priors


def priors_at(name, row, column):
    """Return all priors of one tile of a feature map, boundary coordinates (n_priors, 4)."""
    return PRIORS_XY[[(place[0].name, *place[1:]) == (name, row, column) for place in PLACES]]


@figure(height=658)
def coordinates(canvas):
    """The box of the dog in pixels, in fractions, and as its center and size."""
    size, pixels, box = picture_size(DOG), OBJECTS['dog'], BOXES[0].tolist()
    scene = Scene(canvas, DOG, 92, 52, 480)
    (x1, y1), (x2, y2) = scene.at(*box[:2]), scene.at(*box[2:])
    c_x, c_y = (x1 + x2) / 2, (y1 + y2) / 2
    scene.box(box, PURPLE)
    canvas.arrow(92, 52, 590, 52)
    canvas.arrow(92, 52, 92, 432)
    for x, y, text in ((578, 40, 'x'), (72, 432, 'y'), (70, 46, '0')):
        canvas.text(x, y, text, bold=True)
    for name, x in (('x_min', x1), ('x_max', x2)):
        canvas.line(x, 52, x, y1, PURPLE, dashed=True, halo=True)
        canvas.center(x, 38, name, PURPLE)
    for name, y in (('y_min', y1), ('y_max', y2)):
        canvas.line(92, y, x1, y, PURPLE, dashed=True, halo=True)
        canvas.text(84, y + 6, name, PURPLE, 'end', bold=True)
    canvas.arrow(x1, y1 - 18, x2, y1 - 18, PURPLE, both=True, halo=True)
    canvas.arrow(x2 + 18, y1, x2 + 18, y2, PURPLE, both=True, halo=True)
    canvas.dot(c_x, c_y, PURPLE)
    for x, y, text in ((c_x - 13, y1 - 52, 'w'), (x2 + 30, c_y - 13, 'h'), (c_x - 46, c_y + 10, 'c_x, c_y')):
        canvas.chip(x, y, text, PURPLE)

    fractions, center_size = ([f'{value:.2f}' for value in values]
                              for values in (box, xy_to_cxcy(torch.tensor(box)).tolist()))
    rows = [['', 'x_min', 'y_min', 'x_max', 'y_max'], ['pixels', *map(str, pixels)], ['fractions', *fractions],
            ['', 'c_x', 'c_y', 'w', 'h'], ['fractions', *center_size]]
    canvas.table(16, 446, (108, *[115] * 4), rows, {(3, i): PAPER for i in range(5)})
    canvas.text(16, 640, f'The picture has {size[0]} × {size[1]} pixels: '
                + ', '.join(f'{pixels[i]} / {size[i]} = {fractions[i]}' for i in (0, 1)))


@figure(height=258)
def jaccard_index(canvas):
    """Two boxes on squared paper, their intersection and their union."""
    square = 17.6
    one, two = torch.tensor([[1., 1, 7, 5]]), torch.tensor([[3., 2, 9, 7]])
    overlap, shared = find_jaccard_overlap(one, two).item(), find_intersection(one, two).item()
    area_1, area_2 = (((box[0, 2:] - box[0, :2]).prod()).item() for box in (one, two))
    common = torch.cat((torch.maximum(one, two)[:, :2], torch.minimum(one, two)[:, 2:]), dim=1)
    panels = (((), f'{area_1:.0f} and {area_2:.0f} squares'), ((common,), f'intersection: {shared:.0f}'),
              ((one, two), f'union: {area_1 + area_2 - shared:.0f}'))
    for panel, (filled, caption) in enumerate(panels):
        x, y = 20 + panel * 192, 20

        def draw(box, x=x, y=y, **style):
            left, top, right, bottom = (square * value for value in box[0].tolist())
            canvas.rect(x + left, y + top, right - left, bottom - top, **style)

        draw(torch.tensor([[0, 0, 10, 8]]), fill=WHITE)
        for box in filled:
            draw(box, fill=tint(INK, 0.25))
        canvas.grid(x, y, 10 * square, 8 * square, 10, 8)
        draw(one, stroke=PURPLE)
        draw(two, stroke=INK)
        canvas.center(x + 5 * square, y + 8 * square + 30, caption)
    canvas.center(300, 232, f'Jaccard overlap = intersection / union = {shared:.0f} / {area_1 + area_2 - shared:.0f} '
                  f'= {overlap:.2f}', title=True)


@figure(height=508)
def jaccard_values(canvas):
    """What overlaps of about 0.25, 0.5, 0.75 and 0.9 look like."""
    dog = BOXES[:1]
    width, height = (dog[0, 2:] - dog[0, :2]).tolist()
    for i, (shift_x, shift_y) in enumerate([(0.46, -0.26), (0.22, -0.145), (0.09, -0.06), (0.035, -0.018)]):
        x, y = 20 + i % 2 * 285, 20 + i // 2 * 222
        scene = Scene(canvas, DOG, x, y, width=275)
        shifted = dog + torch.tensor([shift_x * width, shift_y * height]).repeat(2)
        scene.boxes(dog, PURPLE)
        scene.boxes(shifted, INK)
        canvas.chip(x + 8, y + 8, f'{find_jaccard_overlap(dog, shifted).item():.2f}', INK)
    canvas.center(300, 486, 'Jaccard overlap of the black box with the purple one', bold=False)


@figure(height=640)
def feature_maps(canvas):
    """The six feature maps as grids over the squeezed picture, with the priors of one tile each."""
    total = 0
    for i, feature_map in enumerate(FEATURE_MAPS):
        x, y, side, grid = 20 + i % 3 * 192, 20 + i // 3 * 290, 176, feature_map.grid
        scene = Scene(canvas, DOG, x, y, side, side, faded=True)
        scene.grid(grid, color=GRAY)
        scene.boxes(priors_at(feature_map.name, grid // 2, grid // 2), RED)
        count = grid ** 2 * feature_map.n_priors
        total += count
        canvas.center(x + side / 2, y + side + 30, feature_map.name)
        canvas.center(x + side / 2, y + side + 57,
                      f'scale {feature_map.scale}\n{grid} · {grid} · {feature_map.n_priors} '
                      f'= {count}', bold=False)
    canvas.center(300, 614, f'together {total} priors', RED, title=True)


@figure(height=390)
def priors_center(canvas):
    """The priors of the central tile of conv9_2, over a picture squeezed to a square."""
    scene = Scene(canvas, DOG, 16, 20, 320, 320, faded=True)
    scene.grid(5, tile=(2, 2), color=GRAY)
    priors = priors_at('conv9_2', 2, 2)
    scene.boxes(priors, RED)
    for i in (0, 1, 2, 3, 5):
        scene.label(priors[i].tolist(), RED, str(i + 1))
    x, y = scene.at(priors[4, 0].item(), priors[4, 3].item())
    canvas.chip(x - CHIP_HEIGHT, y, '5', RED)  # at a corner through which no other box goes
    rows = [[str(i), ratio, f'{w:.2f}', f'{h:.2f}']
            for i, (ratio, (w, h)) in enumerate(zip(PRIOR_NAMES, xy_to_cxcy(priors)[:, 2:].tolist()), start=1)]
    canvas.text(352, 40, 'conv9_2, scale 0.55', title=True)
    canvas.table(352, 56, (54, 70, 54, 54), [['prior', 'w : h', 'w', 'h'], *rows])
    canvas.text(352, 316, 'all centered at (0.5, 0.5)')
    canvas.text(16, 370, 'the photograph as the network sees it: 300 × 300 pixels')


@figure(height=372)
def priors_neighbors(canvas):
    """The same six priors on two other tiles of conv9_2; some overshoot the picture."""

    def overshooting(xy):
        return ((xy < 0) | (xy > 1)).any(dim=1).sum().item()

    for (row, column), x in zip([(2, 3), (0, 0)], (50, 380)):
        scene = Scene(canvas, DOG, x, 86, 185, 185, faded=True)
        scene.grid(5, tile=(row, column), color=GRAY)
        boxes = priors_at('conv9_2', row, column)
        scene.boxes(boxes, RED)
        canvas.center(x + 92, 300, f'row {row}, column {column}:\n{overshooting(boxes)} of 6 overshoot')
    canvas.center(300, 356, f'{overshooting(PRIORS_XY)} of all {len(PRIORS)} priors overshoot an edge '
                  'and aren\'t clipped', bold=False)


@figure(height=718)
def objects_on_maps(canvas):
    """Each object on the grid of the map that has its best prior."""
    for i, (label, box) in enumerate(zip(OBJECTS, BOXES.tolist())):
        best = OVERLAPS[:, i].argmax().item()
        feature_map, row, column = PLACES[best]
        x, y, side = 20 + i % 2 * 288, 20 + i // 2 * 324, 272
        scene = Scene(canvas, DOG, x, y, side, side)
        scene.grid(feature_map.grid, (row, column))
        scene.box(box, PURPLE)
        scene.box(PRIORS_XY[best].tolist(), RED)
        canvas.text(x, y + side + 28, f'{label}: {feature_map.name}, {OVERLAPS[best, i]:.2f}', bold=True)
    canvas.text(20, 676, 'purple: the object; red: the prior that overlaps it most,\nand by how much; black: its tile')


@figure(height=496)
def offsets_from_prior(canvas):
    """The dog's box told as its offsets from its best prior."""
    dog, best = BOXES[0], OVERLAPS[:, 0].argmax().item()
    scene = Scene(canvas, DOG, 16, 20, 268, 268, region=(0, 0.37, 0.6, 0.97))
    offsets = cxcy_to_gcxgcy(xy_to_cxcy(dog), PRIORS[best]).tolist()
    (p_x, p_y, p_w, p_h), (c_x, c_y, w, h) = PRIORS[best].tolist(), xy_to_cxcy(dog).tolist()
    for name, xy, color, place in (('prior', PRIORS_XY[best], RED, 0.2), ('dog', dog, PURPLE, 0.8)):
        scene.box(xy.tolist(), color)
        scene.callout(xy.tolist(), color, name, 'bottom', place)
    canvas.arrow(*scene.at(p_x, p_y), *scene.at(c_x, c_y), halo=True)
    canvas.dot(*scene.at(p_x, p_y), RED)
    canvas.dot(*scene.at(c_x, c_y), PURPLE)
    rows = [['', 'c_x', 'c_y', 'w', 'h'], ['dog', *(f'{value:.3f}' for value in (c_x, c_y, w, h))],
            ['prior', *(f'{value:.3f}' for value in (p_x, p_y, p_w, p_h))], ['offset', *map(signed, offsets)]]
    fills = {(1, 0): tint(PURPLE), (2, 0): tint(RED), **{(3, column): tint(BLUE) for column in range(5)}}
    canvas.table(296, 20, (60, *[57] * 4), rows, fills, row_height=38)
    feature_map, row, column = PLACES[best]
    canvas.text(296, 212, f'A prior of {feature_map.name}, row {row},\ncolumn {column}; it overlaps the dog\n'
                f'by {OVERLAPS[best, 0]:.2f}.')
    lines = (('g_c_x', '(c_x − ĉ_x) / (ŵ / 10)', f'({c_x:.3f} − {p_x:.3f}) / {p_w / 10:.4f}'),
             ('g_c_y', '(c_y − ĉ_y) / (ĥ / 10)', f'({c_y:.3f} − {p_y:.3f}) / {p_h / 10:.4f}'),
             ('g_w', '5 · log(w / ŵ)', f'5 · log({w:.3f} / {p_w:.3f})'),
             ('g_h', '5 · log(h / ĥ)', f'5 · log({h:.3f} / {p_h:.3f})'))
    for i, (words, offset) in enumerate(zip(lines, offsets)):
        for x, text, color, anchor in zip((16, 70, 270, 584), (*words, signed(offset)), (BLUE, INK, INK, BLUE),
                                          ('start', 'start', 'start', 'end')):
            canvas.text(x, 366 + i * 36, text if x == 16 else f'= {text}', color, anchor, bold=color == BLUE)


def signed(value):
    """Return a number with a true minus sign."""
    return f'{value:.2f}'.replace('-', '−')


# Seven of the 8732 priors, and the side where the number of each stands, or for objects the letter.
SEVEN = {8318: ('left', 0.8), 8324: ('bottom', 0.6), 8614: ('right', 0.75), 8260: ('bottom', 0.9), 6318: ('top', 0.2),
         928: ('top', 0.8), 7810: ('right', 0.5)}
OBJECT_SIDES = ('left', 0.3), ('right', 0.4), ('top', 0.8), ('top', 0.3)
CLOSE_UP = (0.04, 0.11, 0.19, 0.26)  # the region around the motorbike


@figure(height=782)
def matching_scene(canvas):
    """The objects, seven priors, and the table of their overlaps."""
    overlaps = OVERLAPS[[*SEVEN]]
    scene = Scene(canvas, DOG, 56, 56, 340, 340)
    inset = Scene(canvas, DOG, 446, 90, 138, 138, region=CLOSE_UP)
    canvas.rect(inset.x, inset.y, 138, 138, stroke=INK)
    (left, top), (right, bottom) = scene.at(*CLOSE_UP[:2]), scene.at(*CLOSE_UP[2:])
    canvas.rect(left, top, right - left, bottom - top, stroke=INK)
    canvas.center(515, 254, 'motorbike,\nenlarged', bold=False)
    boxes = torch.cat((PRIORS_XY[[*SEVEN]], BOXES)).tolist()
    shown = [(inset if name in '6D' else scene, xy, RED if name.isdigit() else PURPLE, name)
             for name, xy in zip('1234567ABCD', boxes)]
    for place, xy, color, _ in shown:
        place.box(xy, color)
    for (place, *box), side in zip(shown, (*SEVEN.values(), *OBJECT_SIDES)):
        place.callout(*box, *side)

    rows = [['prior', *(f'{letter}: {label}' for letter, label in zip('ABCD', OBJECTS))]]
    rows += [[str(i), *(f'{value:.2f}' for value in row)] for i, row in enumerate(overlaps.tolist(), start=1)]
    fills = {(i + 1, overlaps[i].argmax().item() + 1): tint(RED) for i in range(len(SEVEN)) if overlaps[i].max() > 0}
    fills |= {(overlaps[:, j].argmax().item() + 1, j + 1): tint(PURPLE, 0.5) for j in range(len(OBJECTS))}
    canvas.table(16, 446, (60, 120, 124, 120, 144), rows, fills)
    for y, color, text in ((726, tint(RED), 'rule 2: a prior\'s best object'),
                           (754, tint(PURPLE, 0.5), 'rule 3: an object\'s best prior, which it claims')):
        canvas.rect(16, y, 18, 18, color)
        canvas.text(44, y + 15, text)


@figure(height=532)
def matching_result(canvas):
    """All positive priors of each object, and what became of the seven."""
    for i, (label, number) in enumerate(zip(OBJECTS, LABELS)):
        x, positive = 16 + i * 144, PRIORS_XY[number == CLASSES].clamp(0, 1)
        scene = Scene(canvas, DOG, x, 20, 136, 136, faded=True)
        scene.boxes(positive, GREEN, thin=True)
        canvas.center(x + 68, 182, label, PURPLE)
        canvas.center(x + 68, 207, f'{len(positive)} positive', GREEN)
    rows, fills = [['prior', '1. overlap', '2. best', '3. claimed', '4. match', '5. class']], {}
    for i, number in enumerate(SEVEN, start=1):
        (overlap, best), label = OVERLAPS[number].max(dim=0), CLASSES[number].item()
        claims = OVERLAPS[:, best].argmax() == number
        rows.append([str(i), f'{overlap.item():.2f}', 'ABCD'[best] if overlap > 0 else '–', 'yes' if claims else '–',
                     'positive' if label else 'negative', rev_label_map[label]])
        fills |= {(i, column): tint(GREEN if label else GRAY, 0.25) for column in (4, 5)}
    canvas.table(16, 228, (56, 102, 82, 104, 104, 120), rows, fills)
    n_positive = (CLASSES > 0).sum()
    canvas.text(16, 518, f'{n_positive} of {len(PRIORS)} priors are positive, {len(PRIORS) - n_positive} negative')
