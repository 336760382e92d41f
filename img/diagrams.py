"""Figures of the network: its layers, a fully connected layer as a convolution, the predictions, the flow of data.

Shapes come from passing an image through the network itself.
"""

import functools
from typing import NamedTuple

import torch
from torch.nn import functional as F

from model import FEATURE_MAPS, SSD300
from scenes import DOG, PRIOR_NAMES, Scene, dog_objects, dog_overlaps, network, prior, priors_xy, read
from svg import AMBER, BLUE, EDGE, GRAY, GREEN, HAIRLINE, INK, LINE_HEIGHT, PURPLE, RED, WHITE, Canvas, tint
from utils import IMAGE_SIZE, decimate, label_map

POOLS = {'conv1_2': '2×2', 'conv2_2': '2×2', 'conv3_3': '2×2', 'conv4_3': '2×2', 'conv5_3': '3×3'}  # after these


@functools.cache
def layer_shapes():
    """Return {name of a convolution: (channels, side)} of what each layer of SSD300 gives out."""
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
        canvas.volume(left, top, side, side, depth, color)
        if stage.side <= 38:
            canvas.grid(left, top, side, side, stage.side, stage.side, tint(color, 0.6))
        if previous_end is not None:
            canvas.arrow(previous_end + 2, y + 50, left - 2, y + 50)
        previous_end = right
        canvas.text(center, y + 126, f'{stage.side} × {stage.side}\n× {stage.channels}', anchor='middle', bold=True)
        for line, text in enumerate(stage.layers):
            changed = line in stage.changes
            at_y = y + 184 + line * LINE_HEIGHT
            if changed:
                canvas.rect(center - column / 2 + 3, at_y - 19, column - 6, 25, WHITE, INK, corner=3)
            canvas.text(center, at_y, text, anchor='middle', bold=changed)


def blocks():
    """Return the convolutions of VGG's five blocks: [['conv1_1', 'conv1_2'], …]."""
    names = [name for name, _ in network().base.named_children() if '_' in name]
    return [[name for name in names if name.startswith(f'conv{block}')] for block in range(1, 6)]


def vgg16():
    """VGG-16 for the classification of ImageNet, as the authors of SSD found it."""
    side, stages = 224, [Stage(['image'], 3, 224)]
    for layers in blocks():
        channels = layer_shapes()[layers[-1]][0]
        stages.append(Stage([*layers, 'pool 2×2'], channels, side))
        side //= 2
    stages += [Stage(['after the', 'last pool'], channels, side), Stage(['fc6'], 4096, 1), Stage(['fc7'], 4096, 1),
               Stage(['fc8'], 1000, 1)]
    canvas = Canvas(height=590)
    draw_stages(canvas, 16, stages[:5], columns=5)
    draw_stages(canvas, 300, stages[5:], columns=5, continued=True)
    return canvas


def modified_vgg16():
    """The base of SSD300: what was changed, and the maps of conv4_3 and conv7, which are used for predictions."""
    shapes, stages = layer_shapes(), [Stage(['image'], 3, IMAGE_SIZE, changes=(0,))]
    for block, layers in enumerate(blocks(), start=1):
        lines = [*layers, f'pool {POOLS[layers[-1]]}', *{3: ['rounding up'], 5: ['stride 1']}.get(block, [])]
        changes = (3, 4) if block in (3, 5) else ()
        stages.append(Stage(lines, *shapes[layers[-1]], block == 4, changes))
    stages += [Stage(['conv6 3×3', 'dilation 6'], *shapes['conv6'], changes=(0, 1)),
               Stage(['conv7 1×1'], *shapes['conv7'], True, (0,))]
    canvas = Canvas(height=690)
    draw_stages(canvas, 16, stages[:4], columns=4)
    draw_stages(canvas, 316, stages[4:], columns=4, continued=True)
    canvas.rect(24, 644, 34, 25, WHITE, INK, corner=3)
    canvas.text(66, 663, 'changed from VGG-16')
    canvas.rect(290, 647, 20, 20, tint(INK), INK)
    canvas.text(320, 663, 'dark: used for predictions')
    return canvas


def auxiliary_convolutions():
    """The eight layers on top of the base; every second one gives a feature map for predictions."""
    shapes, stages = layer_shapes(), [Stage(['from the base'], *layer_shapes()['conv7'], True)]
    convs = list(network().aux_convs.named_children())
    for (first, _), (second, conv) in zip(convs[::2], convs[1::2]):
        how = f'stride {conv.stride[0]}' if conv.stride[0] > 1 else 'no padding'
        stages.append(Stage([f'{first} 1×1', f'→ {shapes[first][0]}', f'{second} 3×3', how], *shapes[second], True))
    canvas = Canvas(height=292, width=660)
    draw_stages(canvas, 16, stages, columns=5)
    return canvas


def ssd300():
    """The whole network: image, base and auxiliary convolutions, six feature maps, predictions."""
    shapes, column, total = layer_shapes(), 94, 0
    canvas = Canvas(height=640)
    Scene(canvas, DOG, 24, 20, 110, 110)
    canvas.text(79, 152, f'image\n{IMAGE_SIZE} × {IMAGE_SIZE} × 3', anchor='middle')
    canvas.arrow(138, 75, 176, 75)
    for x, width, text in ((180, 150, 'base\n(VGG-16)'), (376, 206, 'auxiliary\nconvolutions')):
        canvas.rect(x, 42, width, 66, tint(GRAY), GRAY, corner=6)
        canvas.text(x + width / 2, 69, text, anchor='middle', bold=True)
    canvas.arrow(334, 75, 372, 75)
    for i, feature_map in enumerate(FEATURE_MAPS):
        channels, side = shapes[feature_map.name]
        x, size, depth = 18 + i * column, 9.5 * side ** 0.5, 0.42 * channels ** 0.5
        top = (205, 305, 402, 453, 504, 556)[i]  # where it comes out of its part
        canvas.path([(top, 108), (top, 196), (x + 47, 196)] if i > 1 else [(top, 108), (top, 196), (x + 47, 196)])
        canvas.arrow(x + 47, 196, x + 47, 214)
        canvas.volume(x + 44 - size / 2, 270 - size / 2, size, size, depth, INK)
        canvas.grid(x + 44 - size / 2, 270 - size / 2, size, size, side, side, tint(INK, 0.6))
        canvas.text(x + 47, 346, feature_map.name, anchor='middle', bold=True)
        canvas.text(x + 47, 372, f'{side} × {side}\n× {channels}', anchor='middle')
        canvas.arrow(x + 47, 406, x + 47, 472)
        count = side ** 2 * feature_map.n_priors
        total += count
        for y, color, text in ((476, BLUE, f'{count} × 4'), (514, AMBER, f'{count} × {len(label_map)}')):
            canvas.rect(x, y, 91, 36, tint(color), color)
            canvas.text(x + 45, y + 24, text, anchor='middle')
    canvas.rect(18, 422, 561, 30, tint(GRAY), GRAY, corner=6)
    canvas.text(300, 443, 'prediction convolutions', anchor='middle', bold=True)
    canvas.text(18, 584, f'together {total} × 4 offsets from the priors', BLUE, bold=True)
    canvas.text(18, 612, f'and {total} × {len(label_map)} scores of the classes', bold=True)
    return canvas


# ------------------------------------------------------------------------- fully connected as convolution

CHANNEL_COLORS = (tint(INK, 0.06), tint(INK, 0.18), tint(INK, 0.32))
CELL = 32


def draw_channels(canvas, x, y, values, in_a_row=False):
    """(3, 2, 2): the channels one below the other, or all twelve values in a row."""
    for channel, color in enumerate(CHANNEL_COLORS):
        for cell, value in enumerate(values[channel].flatten().tolist()):
            left, top = (channel * 4 + cell, 0) if in_a_row else (cell % 2, channel * 2.25 + cell // 2)
            canvas.rect(x + left * CELL, y + top * CELL, CELL, CELL, color, INK, stroke_width=HAIRLINE)
            canvas.text(x + (left + 0.5) * CELL, y + (top + 0.5) * CELL + 6, f'{value:.0f}'.replace('-', '−'),
                        anchor='middle')


def fc_as_conv():
    """The same twelve values and twice twelve weights, as a fully connected layer and as a convolution."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 6, (3, 2, 2), generator=generator).float()
    weights = torch.randint(-2, 4, (2, 12), generator=generator).float()
    as_linear = F.linear(image.flatten(), weights).tolist()  # (2)
    weights = weights.view(2, 3, 2, 2)
    as_convolution = F.conv2d(image[None], weights).flatten().tolist()  # (1, 2, 1, 1) → (2)
    canvas = Canvas(height=660)
    canvas.text(24, 36, 'Fully connected', title=True)
    canvas.text(24, 70, 'the image, flattened: 12 values')
    draw_channels(canvas, 24, 80, image, in_a_row=True)
    for i, output in enumerate(as_linear):
        y = 148 + i * 68
        canvas.text(24, y, f'weights {i}')
        draw_channels(canvas, 24, y + 10, weights[i], in_a_row=True)
        canvas.arrow(24 + 12 * CELL + 6, y + 26, 450, y + 26)
        canvas.text(460, y + 33, f'Y{i} = {output:.0f}'.replace('-', '−'), title=True)

    canvas.line(24, 276, 576, 276, EDGE)
    canvas.text(24, 310, 'Convolution', title=True)
    canvas.text(24, 344, '3 channels')
    draw_channels(canvas, 36, 356, image)
    for i, output in enumerate(as_convolution):
        x = 170 + i * 210
        canvas.text(x, 344, f'filter {i}')
        draw_channels(canvas, x, 356, weights[i])
        canvas.arrow(x + 2 * CELL + 6, 460, x + 2 * CELL + 30, 460)
        canvas.text(x + 2 * CELL + 36, 467, f'Y{i} = {output:.0f}'.replace('-', '−'), title=True)
    torch.testing.assert_close(as_linear, as_convolution)
    canvas.text(300, 634, 'the same 12 products, the same sums', anchor='middle', title=True)
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
    """A matrix with its values `spread` cells apart; those that are kept are dark."""
    side = (len(values) - 1) * spread + 1
    canvas.rect(x, y, side * cell, side * cell, WHITE)
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            left, top = x + column * spread * cell, y + row * spread * cell
            if value in kept:
                canvas.rect(left, top, cell, cell, tint(INK, 0.3))
            canvas.text(left + cell / 2, top + cell / 2 + 6, str(value), anchor='middle')
    canvas.grid(x, y, side * cell, side * cell, side, side)
    canvas.rect(x, y, side * cell, side * cell, stroke=EDGE, stroke_width=HAIRLINE)


# ------------------------------------------------------------------------------------------- predictions

GRID, N_PRIORS = FEATURE_MAPS[3].grid, FEATURE_MAPS[3].n_priors  # of conv9_2, on which all is shown
TILE = (2, 2)  # row and column of the tile that is opened up
N_CLASSES = 3  # where classes are counted out: background, bicycle, dog


def draw_map(canvas, x, y, channels, color, cell=24, marked=()):
    """A feature map of conv9_2's grid with some of its tiles marked. Return where it ends, right and below."""
    side, depth = GRID * cell, 2.6 * channels ** 0.5
    canvas.volume(x, y, side, side, depth, color)
    canvas.grid(x, y, side, side, GRID, GRID, color)
    for row, column in marked:
        canvas.rect(x + column * cell, y + row * cell, cell, cell, WHITE, INK, opacity=0.6)
    return x + side + 0.7 * depth, y + side


def prediction_convolutions():
    """From the feature map through two convolutions with 3 × 3 kernels to the two outputs."""
    canvas = Canvas(height=430)
    channels = FEATURE_MAPS[3].channels
    right, bottom = draw_map(canvas, 20, 160, channels, GRAY)
    canvas.rect(20 + (TILE[1] - 1) * 24, 160 + (TILE[0] - 1) * 24, 72, 72, WHITE, INK, opacity=0.6)
    canvas.text(82, bottom + 32, f'conv9_2\n{GRID} × {GRID} × {channels}', anchor='middle', bold=True)
    for y, color, text, count, of in ((54, BLUE, 'localization', f'{N_PRIORS} · 4', N_PRIORS * 4),
                                      (254, AMBER, 'classes', f'{N_PRIORS} · n', N_PRIORS * 21)):
        canvas.arrow(right + 6, 208, 240, y + 36)
        for i in (2, 1, 0):
            canvas.volume(252 + i * 15, y + 16 - i * 10, 54, 54, 22, color)
        canvas.grid(252, y + 16, 54, 54, 3, 3, color)
        canvas.text(304, y + 106, f'{text}:\n{count} filters\n3 × 3 × {channels}', anchor='middle', bold=True)
        canvas.arrow(364, y + 36, 418, y + 36)
        draw_map(canvas, 432, y, of, color, 24, [TILE])
        canvas.text(505, y + 150, f'{GRID} × {GRID} × ({count})', anchor='middle', bold=True)
    return canvas


def prediction_channels():
    """The channels of one tile: four offsets and n scores for each of its priors, which are drawn."""
    canvas = Canvas(height=620)
    names, left, width = ['c_x', 'c_y', 'w', 'h', 'none', 'bicycle', 'dog'], 150, 42
    widths = [width] * 4 + [54, 70, 42]
    for y, color, n, text in ((112, BLUE, 4, 'offsets'), (382, AMBER, N_CLASSES, 'scores')):
        _, bottom = draw_map(canvas, 16, y, N_PRIORS * n, color, 16, [TILE])
        canvas.text(64, bottom + 30, f'one tile has\n{N_PRIORS * n} channels:\n{N_PRIORS} × {n}\n{text}',
                    anchor='middle')
    canvas.text(left, 32, 'the tile\'s channels, counted from 0', bold=True)
    canvas.text(542, 32, 'prior', RED, anchor='middle', bold=True)
    for kind in range(N_PRIORS):
        x, y = left, 64 + kind * 92
        for i, (name, wide) in enumerate(zip(names, widths)):
            first = kind * 4 + i if i < 4 else kind * N_CLASSES + i - 4
            color = BLUE if i < 4 else AMBER
            x += 8 if i == 4 else 0
            if kind == 0:
                canvas.text(x + wide / 2, y + 10, name, anchor='middle')
            canvas.rect(x, y + 22, wide, 38, tint(color, 0.35), color, stroke_width=HAIRLINE)
            canvas.text(x + wide / 2, y + 47, str(first), anchor='middle')
            x += wide
        canvas.brace(x + 5, y + 14, 54)
        scene = Scene(canvas, DOG, 510, y, 78, 78, faded=True)
        scene.grid(GRID)
        scene.box(priors_xy()[prior('conv9_2', *TILE, kind)].tolist(), RED)
    return canvas


def reshaping():
    """The predictions of conv9_2 in a row: 150 boxes, 150 sets of scores."""
    canvas = Canvas(height=470, width=640)
    total = GRID ** 2 * N_PRIORS
    for y, channels, color in ((56, N_PRIORS * 4, BLUE), (256, N_PRIORS * N_CLASSES, AMBER)):
        right, bottom = draw_map(canvas, 16, y, channels, color, 18, [(0, 0)])
        canvas.text(66, bottom + 28, f'{GRID} × {GRID} × {channels}', anchor='middle', bold=True)
        canvas.arrow(right + 6, y + 50, 168, y + 50)
    rows = [['row', 'tile', 'prior', 'offsets', f'{N_CLASSES} scores']]
    for i in (0, 1, 2, 3, 4, 5, 6, None, total - 2, total - 1):
        if i is None:
            rows.append(['…', '…', '…', '', ''])
        else:
            tile, kind = divmod(i, N_PRIORS)
            rows.append([str(i), f'{tile // GRID}, {tile % GRID}', PRIOR_NAMES[kind], '', ''])
    fills = {(i, j): tint(color, 0.35) for i in range(1, len(rows)) for j, color in ((3, BLUE), (4, AMBER))}
    canvas.table(178, 20, (54, 58, 74, 140, 120), rows, fills)
    for x, width, columns in ((364, 140, 4), (504, 120, N_CLASSES)):
        canvas.grid(x, 53, width, 330, columns, 1, WHITE)
    canvas.text(434, 410, f'{total} × 4', BLUE, 'middle', bold=True)
    canvas.text(564, 410, f'{total} × {N_CLASSES}', anchor='middle', bold=True)
    canvas.text(178, 446, 'row by row, tile by tile, prior by prior')
    return canvas


# ------------------------------------------------------------------------------------------ flow of data

def data_flow():
    """The way of a picture through the network, to a loss in training or to objects in detection."""
    canvas, total, said = Canvas(height=860), len(priors_xy()), read('teach')['steps']['60']
    Scene(canvas, DOG, 20, 20, 150)
    canvas.text(95, 156, 'a picture', anchor='middle')
    canvas.arrow(174, 76, 206, 76)
    Scene(canvas, DOG, 210, 20, 112, 112)
    canvas.text(266, 156, f'{IMAGE_SIZE} × {IMAGE_SIZE}', anchor='middle')
    canvas.arrow(326, 76, 358, 76)
    x = 364
    for feature_map in FEATURE_MAPS:
        size, depth = 8.2 * feature_map.grid ** 0.5, 0.3 * feature_map.channels ** 0.5
        canvas.volume(x, 78 - size / 2, size, size, depth, INK)
        canvas.grid(x, 78 - size / 2, size, size, feature_map.grid, feature_map.grid, tint(INK, 0.6))
        x += size + 0.7 * depth + 5
    canvas.text(472, 156, 'six feature maps', anchor='middle')
    canvas.path([(472, 166), (472, 182), (300, 182)])
    canvas.arrow(300, 182, 300, 204)
    for x, color, text in ((70, BLUE, f'{total} × 4 offsets'), (306, AMBER, f'{total} × {len(label_map)} scores')):
        canvas.rect(x, 208, 224, 44, tint(color), color)
        canvas.text(x + 112, 237, text, anchor='middle', bold=True)

    def step(x, y, width, text, color, fill=None):
        lines = text.count('\n') + 1
        canvas.rect(x, y, width, 18 + lines * LINE_HEIGHT, fill or tint(color), color, corner=6)
        canvas.text(x + width / 2, y + 28, text, anchor='middle')

    canvas.arrow(160, 256, 160, 306)
    canvas.arrow(440, 256, 440, 306)
    canvas.text(150, 286, 'training', anchor='end', bold=True)
    canvas.text(450, 286, 'detection', bold=True)
    boxes, _ = dog_objects()
    positive = priors_xy()[dog_overlaps()[1] > 0]
    step(20, 310, 270, f'matched with {total} priors:\nobjects claim theirs', RED)
    scene = Scene(canvas, DOG, 20, 392, 130, 130, faded=True)
    scene.boxes(positive, GREEN, thin=True)
    scene.boxes(boxes, PURPLE)
    canvas.text(162, 424, f'{len(positive)} positive\npriors,', GREEN, bold=True)
    canvas.text(162, 480, f'{3 * len(positive)} hard\nnegatives', GRAY, bold=True)
    canvas.arrow(160, 530, 160, 566)
    step(20, 570, 270, 'loss of the classes:\nof positives, hard negatives', AMBER)
    step(20, 650, 270, 'loss of the boxes:\nof positives only', BLUE)
    canvas.arrow(160, 722, 160, 758)
    step(20, 762, 270, 'one number,\nand its gradients', INK, WHITE)

    step(310, 310, 270, f'decoded with {total} priors:\nboxes and probabilities', RED)
    for y, shown, text, thin in ((392, said['candidates'], f'{len(said["candidates"])} candi-\ndates\nabove 0.2', True),
                                 (626, said['objects'], f'{len(said["objects"])} objects', False)):
        scene = Scene(canvas, DOG, 310, y, 173, faded=thin)
        scene.boxes(torch.tensor([one['box'] for one in shown]).clamp(0, 1), BLUE, thin=thin)
        canvas.text(494, y + 30, text, BLUE, bold=True)
    canvas.text(494, 684, '\n'.join(one['label'] for one in said['objects']))
    canvas.arrow(396, 526, 396, 562)
    step(310, 566, 270, 'duplicates suppressed', INK, WHITE)
    return canvas
