"""Figures of the network: its layers, a fully connected layer as a convolution, the predictions.

Shapes come from passing an image through the network itself.
"""

import functools
from typing import NamedTuple

import torch
from torch.nn import functional as F

from model import FEATURE_MAPS, SSD300
from scenes import BOATS, POOLS, PRIOR_NAMES, Scene, network, prior
from svg import AMBER, BLUE, EDGE, GREEN, GRAY, HAIRLINE, INK, LINE_HEIGHT, RED, WHITE, Canvas, tint
from utils import IMAGE_SIZE, cxcy_to_xy, decimate, label_map


@functools.lru_cache(maxsize=1)
def layer_shapes():
    """{name of a convolution: (channels, side)} of what each layer of SSD300 gives out."""
    shapes = {}
    # On the "meta" device, tensors have shapes but no values: nothing is computed.
    with torch.device('meta'), torch.no_grad():
        model = SSD300(n_classes=len(label_map))
        for part in (model.base, model.aux_convs, model.pred_convs):
            for name, layer in part.named_children():
                layer.register_forward_hook(
                    lambda _, __, output, name=name: shapes.__setitem__(name, tuple(output.shape[1:3])))
        model(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return shapes


# --------------------------------------------------------------------------------- feature maps in a row

class Stage(NamedTuple):
    """A feature map in a row of them, with what is written below it."""
    layers: list[str]  # how it is made
    channels: int
    side: int
    color: str = GRAY
    changes: tuple = ()  # which lines of `layers` are other than in VGG-16


def draw_stages(canvas, y, stages, columns, continued=False):
    """Feature maps side by side, as grids where their positions can be seen, with arrows between them and their sizes
    and layers below; `continued` draws an arrow to the first one, too."""
    column, previous_end = (canvas.width - 16) / columns, 6 if continued else None
    for i, stage in enumerate(stages):
        side, depth = 22 * stage.side ** 0.25, 0.5 * stage.channels ** 0.5
        center = 8 + (i + 0.5) * column
        left, right = center - (side + 0.7 * depth) / 2, center + (side + 0.7 * depth) / 2
        top = y + 50 - (side - 0.7 * depth) / 2
        canvas.volume(left, top, side, side, depth, stage.color)
        if stage.side <= 38:
            canvas.grid(left, top, side, side, stage.side, stage.side, tint(stage.color, 0.6))
        if previous_end is not None:
            canvas.arrow(previous_end + 2, y + 50, left - 2, y + 50)
        previous_end = right
        canvas.text(center, y + 126, f'{stage.side} × {stage.side}\n× {stage.channels}',
                    INK if stage.color == GRAY else stage.color, 'middle', bold=True)
        for line, text in enumerate(stage.layers):
            changed = line in stage.changes
            at_y = y + 184 + line * LINE_HEIGHT
            if changed:
                canvas.rect(center - column / 2 + 1, at_y - 19, column - 2, 25, tint(AMBER, 0.5), corner=3)
            canvas.text(center, at_y, text, anchor='middle', bold=changed)


def blocks():
    """The convolutions of VGG's five blocks: [['conv1_1', 'conv1_2'], …]."""
    names = [name for name, _ in network().base.named_children() if '_' in name]
    return [[name for name in names if name.startswith(f'conv{block}')] for block in range(1, 6)]


def vgg16():
    """VGG-16 for the classification of ImageNet, as the authors of SSD found it."""
    side, stages = 224, [Stage(['image'], 3, 224)]
    for layers in blocks():
        stages.append(Stage([*layers, 'pool 2×2'], layer_shapes()[layers[-1]][0], side))
        side //= 2
    stages += [Stage(['fc6', 'on 7 × 7'], 4096, 1), Stage(['fc7'], 4096, 1), Stage(['fc8'], 1000, 1)]
    canvas = Canvas(height=592, width=640)
    draw_stages(canvas, 16, stages[:5], columns=5)
    draw_stages(canvas, 290, stages[5:], columns=5, continued=True)
    return canvas


def modified_vgg16():
    """The base of SSD300: what was changed, and the maps of conv4_3 and conv7, which are used for predictions."""
    shapes, stages = layer_shapes(), [Stage(['image'], 3, IMAGE_SIZE, changes=(0,))]
    for block, layers in enumerate(blocks(), start=1):
        size, _ = POOLS[layers[-1]]
        lines = [*layers, f'pool {size}×{size}', *{3: ['rounding up'], 5: ['stride 1']}.get(block, [])]
        changes = (3, 4) if block in (3, 5) else ()
        stages.append(Stage(lines, *shapes[layers[-1]], BLUE if block == 4 else GRAY, changes))
    stages += [Stage(['conv6 3×3', 'dilation 6'], *shapes['conv6'], changes=(0, 1)),
               Stage(['conv7 1×1'], *shapes['conv7'], BLUE, (0,))]
    canvas = Canvas(height=690, width=640)
    draw_stages(canvas, 16, stages[:4], columns=4)
    draw_stages(canvas, 316, stages[4:], columns=4, continued=True)
    canvas.rect(24, 644, 30, 25, tint(AMBER, 0.5), corner=3)
    canvas.text(62, 663, 'changed from VGG-16')
    canvas.text(330, 663, 'blue: used for predictions', BLUE, bold=True)
    return canvas


def auxiliary_convolutions():
    """The eight layers on top of the base; every second one gives a feature map for predictions."""
    shapes, stages = layer_shapes(), [Stage(['from the base'], *layer_shapes()['conv7'], BLUE)]
    convs = list(network().aux_convs.named_children())
    for (first, _), (second, conv) in zip(convs[::2], convs[1::2]):
        how = f'stride {conv.stride[0]}' if conv.stride[0] > 1 else 'no padding'
        stages.append(Stage([f'{first} 1×1', f'→ {shapes[first][0]}', f'{second} 3×3', how], *shapes[second], BLUE))
    canvas = Canvas(height=292)
    draw_stages(canvas, 16, stages, columns=5)
    return canvas


def ssd300():
    """The whole network: base and auxiliary convolutions, six feature maps, predictions."""
    shapes, column, total = layer_shapes(), 116, 0
    canvas = Canvas(height=452)
    for i, feature_map in enumerate(FEATURE_MAPS):
        channels, side = shapes[feature_map.name]
        x, size, depth = 17 + i * column, 10.5 * side ** 0.5, 0.5 * channels ** 0.5
        canvas.volume(x + 50 - size / 2, 148 - size / 2, size, size, depth, BLUE)
        canvas.grid(x + 50 - size / 2, 148 - size / 2, size, size, side, side, tint(BLUE, 0.6))
        canvas.text(x + 53, 224, feature_map.name, BLUE, 'middle', bold=True)
        canvas.text(x + 53, 250, f'{side} × {side}\n× {channels}', anchor='middle')
        canvas.arrow(x + 53, 284, x + 53, 306)
        count = side ** 2 * feature_map.n_priors
        total += count
        for y, color, text in ((310, BLUE, f'{count} × 4'), (344, AMBER, f'{count} × {len(label_map)}')):
            canvas.rect(x, y, 106, 34, tint(color), color)
            canvas.text(x + 53, y + 23, text, anchor='middle')
        canvas.arrow(x + 53, 56, x + 53, 80)
    for text, first, last in (('base (VGG-16)', 0, 1), ('auxiliary convolutions', 2, 5)):
        left, right = 17 + first * column, 17 + last * column + 106
        canvas.rect(left, 18, right - left, 34, tint(GRAY), GRAY, corner=6)
        canvas.text((left + right) / 2, 41, text, anchor='middle', bold=True)
    canvas.text(17, 410, f'prediction convolutions: {total} × 4 offsets from the priors (blue)\n'
                f'and {total} × {len(label_map)} class scores (amber)', bold=True)
    return canvas


# ------------------------------------------------------------------------- fully connected as convolution

CHANNEL_COLORS = (tint(RED, 0.35), tint(GREEN, 0.3), tint(BLUE, 0.35))
CELL = 32


def draw_channels(canvas, x, y, values, colors, in_a_row=False):
    """(3, 2, 2): the channels one below the other, or all twelve values in a row."""
    for channel, color in enumerate(colors):
        for cell, value in enumerate(values[channel].flatten().tolist()):
            left, top = (channel * 4 + cell, 0) if in_a_row else (cell % 2, channel * 2.25 + cell // 2)
            canvas.rect(x + left * CELL, y + top * CELL, CELL, CELL, color, INK, stroke_width=HAIRLINE)
            canvas.text(x + (left + 0.5) * CELL, y + (top + 0.5) * CELL + 6, f'{value:.0f}'.replace('-', '−'),
                        anchor='middle')


def fc_as_conv():
    """The same twelve values and twice twelve weights, as a fully connected layer and as a convolution."""
    generator, gray = torch.Generator().manual_seed(3), [tint(GRAY)] * 3
    image = torch.randint(0, 6, (3, 2, 2), generator=generator).float()
    weights = torch.randint(-2, 4, (2, 12), generator=generator).float()
    as_linear = F.linear(image.flatten(), weights).tolist()  # (2)
    weights = weights.view(2, 3, 2, 2)
    as_convolution = F.conv2d(image[None], weights).flatten().tolist()  # (1, 2, 1, 1) → (2)
    canvas = Canvas(height=660, width=600)
    canvas.text(24, 36, 'Fully connected', title=True)
    canvas.text(24, 70, 'the image, flattened: 12 values')
    draw_channels(canvas, 24, 80, image, CHANNEL_COLORS, in_a_row=True)
    for i, output in enumerate(as_linear):
        y = 148 + i * 68
        canvas.text(24, y, f'weights {i}')
        draw_channels(canvas, 24, y + 10, weights[i], gray, in_a_row=True)
        canvas.arrow(24 + 12 * CELL + 6, y + 26, 450, y + 26)
        canvas.text(460, y + 33, f'Y{i} = {output:.0f}'.replace('-', '−'), title=True)

    canvas.line(24, 276, 576, 276, EDGE)
    canvas.text(24, 310, 'Convolution', title=True)
    canvas.text(24, 344, '3 channels')
    draw_channels(canvas, 36, 356, image, CHANNEL_COLORS)
    for i, output in enumerate(as_convolution):
        x = 170 + i * 210
        canvas.text(x, 344, f'filter {i}')
        draw_channels(canvas, x, 356, weights[i], gray)
        canvas.arrow(x + 2 * CELL + 6, 460, x + 2 * CELL + 30, 460)
        canvas.text(x + 2 * CELL + 36, 467, f'Y{i} = {output:.0f}'.replace('-', '−'), title=True)
    if as_linear == as_convolution:
        canvas.text(300, 634, 'the same 12 products, the same sums', GREEN, 'middle', title=True)
    return canvas


def decimation():
    """Of 7 × 7 values, every third is kept; a dilated kernel puts them back to where they were."""
    canvas = Canvas(height=724, width=620)
    kernel = torch.arange(49).view(7, 7)
    kept = decimate(kernel, (3, 3))  # (3, 3)
    for x, y, caption, values, spread in ((20, 50, 'fc6\'s kernel: 7 × 7', kernel, 1), (242, 50, 'decimated', kept, 1),
                                          (384, 50, 'dilation 3: 7 × 7', kept, 3),
                                          (20, 316, 'dilation 6: 13 × 13', kept, 6)):
        canvas.text(x, y - 14, caption, bold=True)
        draw_kernel(canvas, x, y, values, kept, spread)
    before = torch.empty(4096, 512, 7, 7, device='meta')
    for y, name, weights in ((346, 'fc6 as a convolution', before), (471, 'conv6', decimate(before, (4, None, 3, 3)))):
        canvas.text(412, y, f'{name}:\n{" × ".join(map(str, weights.shape))}\n= {weights.numel() / 1e6:.1f} million\n'
                    'weights')
    return canvas


def draw_kernel(canvas, x, y, values, kept, spread, cell=29):
    """A matrix with its values `spread` cells apart; those that are kept are blue."""
    side = (len(values) - 1) * spread + 1
    canvas.rect(x, y, side * cell, side * cell, WHITE)
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            left, top = x + column * spread * cell, y + row * spread * cell
            if value in kept:
                canvas.rect(left, top, cell, cell, tint(BLUE, 0.4))
            canvas.text(left + cell / 2, top + cell / 2 + 6, str(value), anchor='middle')
    canvas.grid(x, y, side * cell, side * cell, side, side)
    canvas.rect(x, y, side * cell, side * cell, stroke=EDGE, stroke_width=HAIRLINE)


# ------------------------------------------------------------------------------------------- predictions

GRID, N_PRIORS = FEATURE_MAPS[3].grid, FEATURE_MAPS[3].n_priors  # of conv9_2, on which all is shown
TILE = (2, 2)  # row and column of the tile that is opened up
N_CLASSES = 3  # where classes are counted out: background, cat, dog


def draw_map(canvas, x, y, channels, color, cell=24, marked=()):
    """A feature map of conv9_2's grid with some of its tiles marked. Returns where it ends, right and below."""
    side, depth = GRID * cell, 2.6 * channels ** 0.5
    canvas.volume(x, y, side, side, depth, color)
    for row, column in marked:
        canvas.rect(x + column * cell, y + row * cell, cell, cell, tint(color, 0.7))
    canvas.grid(x, y, side, side, GRID, GRID, color)
    return x + side + 0.7 * depth, y + side


def prediction_convolutions():
    """From the feature map through two convolutions with 3 × 3 kernels to the two outputs."""
    canvas = Canvas(height=436, width=660)
    channels = FEATURE_MAPS[3].channels
    window = [(TILE[0] + i, TILE[1] + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    right, bottom = draw_map(canvas, 24, 160, channels, GRAY, 24, window)
    canvas.text(92, bottom + 32, f'conv9_2\n{GRID} × {GRID} × {channels}', anchor='middle', bold=True)
    for y, color, text, count, of in ((54, BLUE, 'localization', f'{N_PRIORS} · 4', N_PRIORS * 4),
                                      (254, AMBER, 'classes', f'{N_PRIORS} · n', N_PRIORS * 21)):
        canvas.arrow(right + 8, 208, 272, y + 36)
        for i in (2, 1, 0):
            canvas.volume(290 + i * 15, y + 16 - i * 10, 54, 54, 22, color)
        canvas.grid(290, y + 16, 54, 54, 3, 3, color)
        canvas.text(345, y + 106, f'{text}:\n{count} filters\n3 × 3 × {channels}', anchor='middle', bold=True)
        canvas.arrow(412, y + 36, 470, y + 36)
        draw_map(canvas, 490, y, of, color, 24, [TILE])
        canvas.text(565, y + 150, f'{GRID} × {GRID} × ({count})', anchor='middle', bold=True)
    return canvas


def prediction_channels():
    """The channels of one tile: four offsets and n scores for each of its priors, which are drawn."""
    canvas = Canvas(height=640)
    names = ['c_x', 'c_y', 'w', 'h', 'backgr.', 'cat', 'dog']
    left, widths = 222, [42] * 4 + [80, 42, 42]
    for y, color, width, text in ((112, BLUE, 4, 'offsets'), (382, AMBER, N_CLASSES, 'scores')):
        right, bottom = draw_map(canvas, 20, y, N_PRIORS * width, color, 18, [TILE])
        canvas.text(74, bottom + 30, f'one tile has\n{N_PRIORS * width} channels:\n{N_PRIORS} × {width} {text}',
                    anchor='middle')
        canvas.arrow(right + 4, y + 45, left - 8, y + 45, color)
    canvas.text(left, 32, 'channels of the tile', bold=True)
    canvas.text(651, 32, 'their prior', anchor='middle', bold=True)
    priors = cxcy_to_xy(network().priors_cxcy).tolist()
    for kind in range(N_PRIORS):
        x, y = left, 64 + kind * 95
        for i, (name, width) in enumerate(zip(names, widths)):
            first = kind * 4 + i if i < 4 else kind * N_CLASSES + i - 4
            color = BLUE if i < 4 else AMBER
            x += 10 if i == 4 else 0
            if kind == 0:
                canvas.text(x + width / 2, y - 6, name, anchor='middle')
            canvas.rect(x, y + 18, width, 38, tint(color, 0.35), color, stroke_width=HAIRLINE)
            canvas.text(x + width / 2, y + 43, str(first), anchor='middle')
            x += width
        canvas.arrow(x + 6, y + 37, 600, y + 37)
        scene = Scene(canvas, BOATS, 608, y, 86, 86, faded=True)
        canvas.grid(scene.x, y, 86, 86, GRID, GRID, WHITE)
        scene.box(priors[prior('conv9_2', *TILE, kind)], RED)
        canvas.text(left - 6, y + 43, PRIOR_NAMES[kind].replace(' extra', ' +'), RED, 'end', bold=True)
    return canvas


def reshaping():
    """The predictions of conv9_2 in a row: 150 boxes, 150 sets of scores."""
    canvas = Canvas(height=470)
    total = GRID ** 2 * N_PRIORS
    for y, channels, color in ((56, N_PRIORS * 4, BLUE), (256, N_PRIORS * N_CLASSES, AMBER)):
        right, bottom = draw_map(canvas, 20, y, channels, color, 20, [(0, 0)])
        canvas.text(74, bottom + 28, f'{GRID} × {GRID} × {channels}', anchor='middle', bold=True)
        canvas.arrow(right + 6, y + 50, 196, y + 50)
    rows = [['row', 'tile', 'prior', 'offsets', f'{N_CLASSES} scores']]
    for i in (0, 1, 2, 3, 4, 5, 6, None, total - 2, total - 1):
        if i is None:
            rows.append(['…', '…', '…', '', ''])
        else:
            tile, kind = divmod(i, N_PRIORS)
            rows.append([str(i), f'{tile // GRID}, {tile % GRID}', PRIOR_NAMES[kind], '', ''])
    fills = {(i, j): tint(color, 0.35) for i in range(1, len(rows)) for j, color in ((3, BLUE), (4, AMBER))}
    widths = (54, 58, 124, 140, 120)
    canvas.table(206, 20, widths, rows, fills)
    for x, width, columns in ((442, 140, 4), (582, 120, N_CLASSES)):
        canvas.grid(x, 53, width, 330, columns, 1, WHITE)
    canvas.text(512, 410, f'{total} × 4', BLUE, 'middle', bold=True)
    canvas.text(642, 410, f'{total} × {N_CLASSES}', INK, 'middle', bold=True)
    canvas.text(206, 446, 'row by row, tile by tile, prior by prior')
    return canvas


def stacking():
    """The predictions of all six feature maps, one below the other."""
    canvas = Canvas(height=360)
    rows = [['feature map', 'tiles · priors', 'rows', 'offsets', 'class scores']]
    total = 0
    for feature_map in FEATURE_MAPS:
        count = feature_map.grid ** 2 * feature_map.n_priors
        rows.append([feature_map.name, f'{feature_map.grid} · {feature_map.grid} · {feature_map.n_priors}',
                     f'{total} – {total + count - 1}', f'{count} × 4', f'{count} × {len(label_map)}'])
        total += count
    rows.append(['all', '', f'0 – {total - 1}', f'{total} × 4', f'{total} × {len(label_map)}'])
    fills = {(i, j): tint(color, 0.6 if i == 7 else 0.3) for i in range(1, 8) for j, color in ((3, BLUE), (4, AMBER))}
    canvas.table(16, 20, (130, 140, 150, 125, 143), rows, fills, row_height=36)
    canvas.text(16, 340, 'The order is that of the priors: row i of both belongs to prior i.')
    return canvas
