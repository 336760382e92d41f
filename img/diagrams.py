"""Figures of the network: its layers, a fully connected layer as a convolution, the predictions, the flow of data.

Shapes come from passing an image through the network itself.
"""

import functools
from typing import NamedTuple

import torch
from torch.nn import functional as F

from model import FEATURE_MAPS, SSD300
from scenes import BOXES, CLASSES, DOG, PRIOR_NAMES, PRIORS, PRIORS_XY, Scene, priors_at, read
from svg import AMBER, BLUE, EDGE, GRAY, GREEN, HAIRLINE, INK, LINE_HEIGHT, PURPLE, RED, WHITE, figure, tint
from utils import IMAGE_SIZE, decimate, label_map


@functools.cache
def layers():
    """Return {name of a convolution: (channels, side of its map, stride)} of all layers of SSD300."""
    found = {}
    # On the "meta" device, tensors have shapes but no values: nothing is computed.
    with torch.device('meta'), torch.no_grad():
        model = SSD300(n_classes=len(label_map))
        for part in (model.base, model.aux_convs):
            for name, layer in part.named_children():
                layer.register_forward_hook(lambda layer, _, output, name=name: found.__setitem__(
                    name, (*output.shape[1:3], layer.stride[0])))
        model(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return found


BLOCKS = [['conv1_1', 'conv1_2'], ['conv2_1', 'conv2_2'], *([f'conv{i}_{j}' for j in (1, 2, 3)] for i in (3, 4, 5))]


class Stage(NamedTuple):
    """A feature map in a row of them, with what is written below it."""
    layers: list[str]  # how it is made
    channels: int
    side: int
    predicts: bool = False  # whether predictions are made from it
    changes: tuple = ()  # which lines of `layers` are other than in VGG-16


def draw_stages(canvas, y, stages, columns, continued=False):
    """Feature maps side by side, as grids where their positions can be seen, with arrows between them and their sizes
    and layers below; `continued` draws an arrow to the first one, too."""
    column, previous_end = (canvas.width - 16) / columns, 6 if continued else None
    for i, stage in enumerate(stages):
        side, depth, color = 22 * stage.side ** 0.25, 0.5 * stage.channels ** 0.5, INK if stage.predicts else GRAY
        center = 8 + (i + 0.5) * column
        left, right = center - (side + 0.7 * depth) / 2, center + (side + 0.7 * depth) / 2
        top = y + 50 - (side - 0.7 * depth) / 2
        canvas.volume(left, top, side, depth, color, stage.side if stage.side <= 38 else 1)
        if previous_end is not None:
            canvas.arrow(previous_end + 2, y + 50, left - 2, y + 50)
        previous_end = right
        canvas.center(center, y + 126, f'{stage.side} × {stage.side}\n× {stage.channels}')
        for line, text in enumerate(stage.layers):
            changed = line in stage.changes
            at_y = y + 184 + line * LINE_HEIGHT
            if changed:
                canvas.rect(center - column / 2 + 3, at_y - 19, column - 6, 25, WHITE, INK, corner=3)
            canvas.center(center, at_y, text, bold=changed)


@figure(height=590)
def vgg16(canvas):
    """VGG-16 for the classification of ImageNet, as the authors of SSD found it."""
    side, stages = 224, [Stage(['image'], 3, 224)]
    for convs in BLOCKS:
        channels = layers()[convs[-1]][0]
        stages.append(Stage([*convs, 'pool 2×2'], channels, side))
        side //= 2
    stages += [Stage(['after the', 'last pool'], channels, side), Stage(['fc6'], 4096, 1), Stage(['fc7'], 4096, 1),
               Stage(['fc8'], 1000, 1)]
    draw_stages(canvas, 16, stages[:5], columns=5)
    draw_stages(canvas, 300, stages[5:], columns=5, continued=True)


@figure(height=690)
def modified_vgg16(canvas):
    """The base of SSD300: what was changed, and the maps of conv4_3 and conv7, which are used for predictions."""
    stages = [Stage(['image'], 3, IMAGE_SIZE, changes=(0,))]
    pools = {3: ['pool 2×2', 'rounding up'], 5: ['pool 3×3', 'stride 1']}
    for block, convs in enumerate(BLOCKS, start=1):
        stages.append(Stage([*convs, *pools.get(block, ['pool 2×2'])], *layers()[convs[-1]][:2], block == 4,
                            (3, 4) if block in pools else ()))
    stages += [Stage(['conv6 3×3', 'dilation 6'], *layers()['conv6'][:2], changes=(0, 1)),
               Stage(['conv7 1×1'], *layers()['conv7'][:2], True, (0,))]
    draw_stages(canvas, 16, stages[:4], columns=4)
    draw_stages(canvas, 316, stages[4:], columns=4, continued=True)
    canvas.rect(24, 644, 34, 25, WHITE, INK, corner=3)
    canvas.text(66, 663, 'changed from VGG-16')
    canvas.rect(290, 647, 20, 20, tint(INK), INK)
    canvas.text(320, 663, 'dark: used for predictions')


@figure(height=292, width=660)
def auxiliary_convolutions(canvas):
    """The eight layers on top of the base; every second one gives a feature map for predictions."""
    stages = [Stage(['from the base'], *layers()['conv7'][:2], True)]
    for block in range(8, 12):
        first, (second, side, stride) = layers()[f'conv{block}_1'][0], layers()[f'conv{block}_2']
        how = f'stride {stride}' if stride > 1 else 'no padding'
        stages.append(Stage([f'conv{block}_1 1×1', f'→ {first}', f'conv{block}_2 3×3', how], second, side, True))
    draw_stages(canvas, 16, stages, columns=5)


@figure(height=652)
def ssd300(canvas):
    """The whole network: image, base and auxiliary convolutions, six feature maps, predictions."""
    column, total = 94, 0
    Scene(canvas, DOG, 18, 16, 100, 100)
    canvas.text(130, 60, f'the image:\n{IMAGE_SIZE} × {IMAGE_SIZE} × 3')
    canvas.arrow(68, 120, 68, 142)
    for x, width, text in ((18, 184, 'base (VGG-16)'), (232, 347, 'auxiliary convolutions')):
        canvas.rect(x, 146, width, 38, tint(GRAY), GRAY, corner=6)
        canvas.center(x + width / 2, 171, text)
    canvas.arrow(204, 165, 230, 165)
    for i, feature_map in enumerate(FEATURE_MAPS):
        channels, side, _ = layers()[feature_map.name]
        x, size, depth = 18 + i * column, 9.5 * side ** 0.5, 0.42 * channels ** 0.5
        canvas.arrow(x + 50, 186, x + 50, 218)
        canvas.volume(x + 44 - size / 2, 264 - size / 2, size, depth, INK, side)
        canvas.center(x + 47, 328, feature_map.name)
        canvas.center(x + 47, 354, f'{side} × {side}\n× {channels}', bold=False)
        canvas.arrow(x + 47, 390, x + 47, 414)
        canvas.arrow(x + 47, 450, x + 47, 474)
        count = side ** 2 * feature_map.n_priors
        total += count
        for y, color, text in ((478, BLUE, f'{count} × 4'), (516, AMBER, f'{count} × {len(label_map)}')):
            canvas.rect(x, y, 91, 36, tint(color), color)
            canvas.center(x + 45, y + 24, text, bold=False)
    canvas.rect(18, 418, 561, 34, tint(GRAY), GRAY, corner=6)
    canvas.center(300, 441, 'prediction convolutions')
    canvas.text(18, 590, f'together {total} × 4 offsets from the priors', BLUE, bold=True)
    canvas.text(18, 620, f'and {total} × {len(label_map)} scores of the classes', bold=True)


CHANNEL_COLORS = (tint(INK, 0.06), tint(INK, 0.18), tint(INK, 0.32))
CELL = 32


def draw_channels(canvas, x, y, values, in_a_row=False):
    """(3, 2, 2): the channels one below the other, or all twelve values in a row."""
    for channel, color in enumerate(CHANNEL_COLORS):
        for cell, value in enumerate(values[channel].flatten().tolist()):
            left, top = (channel * 4 + cell, 0) if in_a_row else (cell % 2, channel * 2.25 + cell // 2)
            canvas.rect(x + left * CELL, y + top * CELL, CELL, CELL, color, INK, stroke_width=HAIRLINE)
            canvas.center(x + (left + 0.5) * CELL, y + top * CELL + 22, f'{value:.0f}'.replace('-', '−'), bold=False)


@figure(height=660)
def fc_as_conv(canvas):
    """The same twelve values and twice twelve weights, as a fully connected layer and as a convolution."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 6, (3, 2, 2), generator=generator).float()
    weights = torch.randint(-2, 4, (2, 12), generator=generator).float()
    as_linear = F.linear(image.flatten(), weights).tolist()  # (2)
    weights = weights.view(2, 3, 2, 2)
    as_convolution = F.conv2d(image[None], weights).flatten().tolist()  # (1, 2, 1, 1) → (2)
    canvas.text(24, 36, 'Fully connected', title=True)
    canvas.text(24, 70, 'the image, flattened: 12 values')
    draw_channels(canvas, 24, 80, image, in_a_row=True)
    canvas.line(24, 276, 576, 276, EDGE)
    canvas.text(24, 310, 'Convolution', title=True)
    canvas.text(24, 344, '3 channels')
    draw_channels(canvas, 36, 356, image)
    for i, output in enumerate(as_linear):
        canvas.text(24, 148 + i * 68, f'weights {i}')
        canvas.text(170 + i * 210, 344, f'filter {i}')
        draw_channels(canvas, 24, 158 + i * 68, weights[i], in_a_row=True)
        draw_channels(canvas, 170 + i * 210, 356, weights[i])
        for x, y in ((414, 174 + i * 68), (240 + i * 210, 460)):
            canvas.arrow(x, y, x + 24, y)
            canvas.text(x + 32, y + 7, f'Y{i} = {output:.0f}'.replace('-', '−'), title=True)
    torch.testing.assert_close(as_linear, as_convolution)
    canvas.center(300, 634, 'the same 12 products, the same sums', title=True)


@figure(height=724, width=620)
def decimation(canvas):
    """Of 7 × 7 values, every third is kept; a dilated kernel puts them back to where they were."""
    kernel, cell = torch.arange(49).view(7, 7), 29
    kept = decimate(kernel, (3, 3))  # (3, 3)
    for x, y, caption, values, spread in ((20, 50, 'fc6\'s kernel: 7 × 7', kernel, 1), (242, 50, 'decimated', kept, 1),
                                          (384, 50, 'dilation 3: 7 × 7', kept, 3),
                                          (20, 316, 'dilation 6: 13 × 13', kept, 6)):
        canvas.text(x, y - 14, caption, bold=True)
        side = (len(values) - 1) * spread + 1
        canvas.rect(x, y, side * cell, side * cell, WHITE, EDGE, stroke_width=HAIRLINE)
        for i, value in enumerate(values.flatten().tolist()):
            row, column = divmod(i, len(values))
            left, top = x + column * spread * cell, y + row * spread * cell
            if value in kept:
                canvas.rect(left, top, cell, cell, tint(INK, 0.3))
            canvas.center(left + cell / 2, top + cell / 2 + 6, str(value), bold=False)
        canvas.grid(x, y, side * cell, side * cell, side, side)
    before = torch.empty(4096, 512, 7, 7, device='meta')
    for y, name, weights in ((346, 'fc6 as a convolution', before), (471, 'conv6', decimate(before, (4, None, 3, 3)))):
        canvas.text(412, y, f'{name}:\n{" × ".join(map(str, weights.shape))}\n= {weights.numel() / 1e6:.1f} million\n'
                    'weights')


GRID, N_PRIORS = FEATURE_MAPS[3].grid, FEATURE_MAPS[3].n_priors  # of conv9_2, on which all is shown
TILE = (2, 2)  # row and column of the tile that is opened up
N_CLASSES = 3  # where classes are counted out: background, bicycle, dog


def draw_map(canvas, x, y, channels, color, cell=24, marked=()):
    """A feature map of conv9_2's grid with some of its tiles marked. Return where it ends, right and below."""
    side, depth = GRID * cell, 2.6 * channels ** 0.5
    canvas.volume(x, y, side, depth, color, GRID)
    for row, column in marked:
        canvas.rect(x + column * cell, y + row * cell, cell, cell, WHITE, INK, opacity=0.6)
    return x + side + 0.7 * depth, y + side


@figure(height=430)
def prediction_convolutions(canvas):
    """From the feature map through two convolutions with 3 × 3 kernels to the two outputs."""
    channels = FEATURE_MAPS[3].channels
    right, bottom = draw_map(canvas, 20, 160, channels, GRAY)
    canvas.rect(20 + (TILE[1] - 1) * 24, 160 + (TILE[0] - 1) * 24, 72, 72, WHITE, INK, opacity=0.6)
    canvas.center(82, bottom + 32, f'conv9_2\n{GRID} × {GRID} × {channels}')
    for y, color, text, count, of in ((54, BLUE, 'localization', f'{N_PRIORS} · 4', N_PRIORS * 4),
                                      (254, AMBER, 'classes', f'{N_PRIORS} · n', N_PRIORS * 21)):
        canvas.arrow(right + 6, 208, 240, y + 36)
        for i in (2, 1, 0):
            canvas.volume(252 + i * 15, y + 16 - i * 10, 54, 22, color, 3)
        canvas.center(304, y + 106, f'{text}:\n{count} filters\n3 × 3 × {channels}')
        canvas.arrow(364, y + 36, 418, y + 36)
        draw_map(canvas, 432, y, of, color, 24, [TILE])
        canvas.center(505, y + 150, f'{GRID} × {GRID} × ({count})')


@figure(height=620)
def prediction_channels(canvas):
    """The channels of one tile: four offsets and n scores for each of its priors, which are drawn."""
    names, left, width = ['c_x', 'c_y', 'w', 'h', 'backgr.', 'bicycle', 'dog'], 134, 42
    widths = [width] * 4 + [70, 70, 42]
    for y, color, n, text in ((112, BLUE, 4, 'offsets'), (382, AMBER, N_CLASSES, 'scores')):
        _, bottom = draw_map(canvas, 16, y, N_PRIORS * n, color, 16, [TILE])
        canvas.center(64, bottom + 30, f'one tile has\n{N_PRIORS * n} channels:\n{N_PRIORS} × {n}\n{text}', bold=False)
    canvas.text(left, 32, 'the tile\'s channels, counted from 0', bold=True)
    canvas.center(542, 32, 'prior', RED)
    for kind in range(N_PRIORS):
        x, y = left, 64 + kind * 92
        for i, (name, wide) in enumerate(zip(names, widths)):
            first = kind * 4 + i if i < 4 else kind * N_CLASSES + i - 4
            color = BLUE if i < 4 else AMBER
            x += 8 if i == 4 else 0
            if kind == 0:
                canvas.center(x + wide / 2, y + 10, name, bold=False)
            canvas.rect(x, y + 22, wide, 38, tint(color, 0.35), color, stroke_width=HAIRLINE)
            canvas.center(x + wide / 2, y + 47, str(first), bold=False)
            x += wide
        canvas.path([(x + 6, y + 18), (x + 14, y + 18), (x + 14, y + 64), (x + 6, y + 64)])
        scene = Scene(canvas, DOG, 510, y, 78, 78, faded=True)
        scene.grid(GRID)
        scene.box(priors_at('conv9_2', *TILE)[kind].tolist(), RED)


@figure(height=470, width=640)
def reshaping(canvas):
    """The predictions of conv9_2 in a row: 150 boxes, 150 sets of scores."""
    total = GRID ** 2 * N_PRIORS
    for y, channels, color in ((56, N_PRIORS * 4, BLUE), (256, N_PRIORS * N_CLASSES, AMBER)):
        right, bottom = draw_map(canvas, 16, y, channels, color, 18, [(0, 0)])
        canvas.center(66, bottom + 28, f'{GRID} × {GRID} × {channels}')
        canvas.arrow(right + 6, y + 50, 168, y + 50)
    rows = [['row', 'tile', 'prior', 'offsets', f'{N_CLASSES} scores']]
    for i in (*range(7), total - 2, total - 1):
        tile, kind = divmod(i, N_PRIORS)
        rows.append([str(i), f'{tile // GRID}, {tile % GRID}', PRIOR_NAMES[kind], '', ''])
    rows.insert(-2, ['…', '…', '…', '', ''])
    fills = {(i, j): tint(color, 0.35) for i in range(1, len(rows)) for j, color in ((3, BLUE), (4, AMBER))}
    canvas.table(178, 20, (54, 58, 74, 140, 120), rows, fills)
    for x, width, columns in ((364, 140, 4), (504, 120, N_CLASSES)):
        canvas.grid(x, 53, width, 330, columns, 1, WHITE)
    canvas.center(434, 410, f'{total} × 4', BLUE)
    canvas.center(564, 410, f'{total} × {N_CLASSES}')
    canvas.text(178, 446, 'row by row, tile by tile, prior by prior')


@figure(height=916)
def data_flow(canvas):
    """The way of a picture through the network, to a loss in training or to objects in detection."""
    total, said = len(PRIORS), read('teach')['steps']['60']
    Scene(canvas, DOG, 20, 20, 150)
    canvas.center(95, 156, 'a picture', bold=False)
    canvas.arrow(174, 76, 206, 76)
    Scene(canvas, DOG, 210, 20, 112, 112)
    canvas.center(266, 156, f'{IMAGE_SIZE} × {IMAGE_SIZE}', bold=False)
    canvas.arrow(326, 76, 358, 76)
    x = 364
    for feature_map in FEATURE_MAPS:
        size, depth = 8.2 * feature_map.grid ** 0.5, 0.3 * feature_map.channels ** 0.5
        canvas.volume(x, 78 - size / 2, size, depth, INK, feature_map.grid)
        x += size + 0.7 * depth + 5
    canvas.center(472, 156, 'six feature maps', bold=False)
    canvas.path([(472, 166), (472, 182), (300, 182)])
    canvas.arrow(300, 182, 300, 204)

    def step(x, y, text, color, fill=None, width=250, bold=False):
        canvas.rect(x, y, width, 43 + text.count('\n') * LINE_HEIGHT, fill or tint(color), color, corner=6)
        canvas.center(x + width / 2, y + 28, text, bold=bold)

    step(70, 208, f'{total} × 4 offsets', BLUE, width=224, bold=True)
    step(306, 208, f'{total} × {len(label_map)} scores', AMBER, width=224, bold=True)
    canvas.path([(182, 254), (182, 264), (418, 264), (418, 254)])  # both go both ways
    canvas.path([(300, 264), (300, 772)])
    canvas.path([(300, 276), (455, 276)])
    canvas.arrow(455, 276, 455, 306)
    canvas.center(145, 298, 'training')
    canvas.text(467, 298, 'detection', bold=True)
    positive = PRIORS_XY[CLASSES > 0].clamp(0, 1)
    for x, width, text, color in ((20, 138, f'{len(BOXES)} annotated\nobjects', PURPLE),
                                  (168, 102, f'{total}\npriors', RED)):
        step(x, 310, text, color, width=width)
        canvas.arrow(x + width / 2, 382, x + width / 2, 402)
    step(20, 406, 'matched: what should\nhave been said', GREEN)
    scene = Scene(canvas, DOG, 20, 486, 120, 120, faded=True)
    scene.boxes(positive, GREEN, thin=True)
    scene.boxes(BOXES, PURPLE)
    canvas.text(150, 530, f'{len(positive)} positive\npriors', GREEN, bold=True)
    canvas.arrow(145, 612, 145, 632)
    step(20, 636, f'loss of the classes:\nof {len(positive)} positives and\n{3 * len(positive)} hard negatives', AMBER)
    step(20, 738, 'loss of the boxes:\nof positives only', BLUE)
    for y in (682, 772):
        canvas.arrow(300, y, 274, y)  # what has been said
    canvas.arrow(145, 810, 145, 830)
    step(20, 834, 'one number,\nand its gradients', INK, WHITE)

    step(330, 310, f'decoded with {total} priors:\nboxes and probabilities', RED)
    for y, kind, thin in ((388, 'candidates', True), (670, 'objects', False)):
        scene = Scene(canvas, DOG, 347, y, 216, faded=thin)
        scene.boxes(torch.tensor([one['box'] for one in said[kind]]).clamp(0, 1), BLUE, thin=thin)
        canvas.center(455, y + 190, f'{len(said[kind])} {kind}', BLUE)
    canvas.center(455, 885, ', '.join(one['label'] for one in said['objects']), bold=False)
    canvas.arrow(455, 588, 455, 610)
    step(330, 614, 'duplicates suppressed', INK, WHITE)
