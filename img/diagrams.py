"""Figures of the network: its layers, a fully connected layer as a convolution, the predictions.

Shapes come from passing an image through the network itself.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import FEATURE_MAPS, SSD300, AuxiliaryConvolutions
from scenes import PRIOR_NAMES, VGG_BLOCKS
from svg import AMBER, BLUE, EDGE, GREEN, GREY, HAIRLINE, INK, LINE_HEIGHT, RED, WHITE, Canvas, tint
from utils import IMAGE_SIZE, decimate, label_map


@functools.lru_cache(maxsize=1)
def layer_shapes():
    """{name of a convolution: (channels, side)} of what each layer of SSD300 gives out."""
    shapes = {}
    # On the "meta" device, tensors have shapes but no values: nothing is computed.
    with torch.device('meta'), torch.no_grad():
        network = SSD300(n_classes=len(label_map))
        for part in (network.base, network.aux_convs, network.pred_convs):
            for name, layer in part.named_children():
                layer.register_forward_hook(
                    lambda _, __, output, name=name: shapes.__setitem__(name, tuple(output.shape[1:3])))
        network(torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return shapes


# --------------------------------------------------------------------------------- feature maps in a row

class Stage(NamedTuple):
    """A feature map in a row of them, with what is written below it."""
    layers: list[str]  # the names of the layers that made it
    channels: int
    side: int
    note: str = ''
    color: str = GREY  # of the map, and of its last layer's name


def draw_row(canvas, stages, scale):
    """Feature maps side by side, with arrows between them and their sizes, layers and notes below."""
    column, middle, text_y = (canvas.width - 20) / len(stages), 75, 150
    note_y = text_y + 54 + max(len(stage.layers) for stage in stages) * LINE_HEIGHT + 4
    previous_end = None
    for i, stage in enumerate(stages):
        side, depth = scale * stage.side ** 0.5, 0.6 * stage.channels ** 0.5
        center = 10 + (i + 0.5) * column
        left, right = center - (side + 0.7 * depth) / 2, center + (side + 0.7 * depth) / 2
        canvas.volume(left, middle - (side - 0.7 * depth) / 2, side, side, depth, stage.color)
        if previous_end is not None:
            canvas.arrow(previous_end + 3, middle, left - 3, middle)
        previous_end = right

        canvas.text(center, text_y, f'{stage.side} × {stage.side}\n× {stage.channels}', anchor='middle', bold=True)
        for line, layer in enumerate(stage.layers):
            marked = stage.color != GREY and layer == stage.layers[-1]
            canvas.text(center, text_y + 54 + line * LINE_HEIGHT, layer, stage.color if marked else INK, 'middle',
                        bold=marked)
        canvas.text(center, note_y, stage.note, anchor='middle')


def block_layers(block, n_convs):
    return [f'conv{block}_{i}' for i in range(1, n_convs + 1)]


def vgg16():
    """VGG-16 for the classification of ImageNet, as the authors of SSD found it."""
    side, stages = 224, [Stage(['image'], 3, 224)]
    for block, (n_convs, channels) in enumerate(VGG_BLOCKS, start=1):
        stages.append(Stage(block_layers(block, n_convs), channels, side, f'2×2 pool\n→ {side // 2}'))
        side //= 2
    stages += [Stage(['fc6'], 4096, 1), Stage(['fc7'], 4096, 1), Stage(['fc8'], 1000, 1, '1000\nclasses')]
    canvas = Canvas(height=318)
    draw_row(canvas, stages, scale=4.3)
    return canvas


def modified_vgg16():
    """The base of SSD300; the maps of conv4_3 and conv7 are used for predictions."""
    shapes = layer_shapes()
    notes = {1: '2×2 pool', 2: '2×2 pool', 3: '2×2 pool,\nrounds up', 4: '2×2 pool', 5: '3×3 pool,\nstride 1'}
    stages = [Stage(['image'], 3, IMAGE_SIZE)]
    for block, (n_convs, _) in enumerate(VGG_BLOCKS, start=1):
        stages.append(Stage(block_layers(block, n_convs), *shapes[f'conv{block}_{n_convs}'], notes[block],
                            BLUE if block == 4 else GREY))
    stages += [Stage(['conv6'], *shapes['conv6'], '3×3,\ndilation 6'),
               Stage(['conv7'], *shapes['conv7'], '1×1', BLUE)]
    canvas = Canvas(height=340)
    draw_row(canvas, stages, scale=4.3)
    canvas.text(415, 322, 'Blue: used for predictions, conv4_3 (38 × 38) and conv7 (19 × 19)', BLUE, 'middle',
                bold=True)
    return canvas


def auxiliary_convolutions():
    """The eight layers on top of the base; every second one gives a feature map for predictions."""
    shapes = layer_shapes()
    stages = [Stage(['conv7'], *shapes['conv7'], color=BLUE)]
    for name, conv in AuxiliaryConvolutions().named_children():
        kernel_size, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        note = f'{kernel_size}×{kernel_size}' + (f',\nstride {stride}' if stride > 1 else '')
        if kernel_size == 3 and padding == 0:
            note += ',\nno padding'
        stages.append(Stage([name], *shapes[name], note, BLUE if name.endswith('_2') else GREY))
    canvas = Canvas(height=300)
    draw_row(canvas, stages, scale=14)
    canvas.text(415, 282, 'Blue: used for predictions', BLUE, 'middle', bold=True)
    return canvas


def ssd300():
    """The whole network: base and auxiliary convolutions, six feature maps, predictions."""
    shapes = layer_shapes()
    canvas = Canvas(height=420)
    column, total = 132, 0
    for i, feature_map in enumerate(FEATURE_MAPS):
        channels, side = shapes[feature_map.name]
        x, size, depth = 24 + i * column, 12 * side ** 0.5, 0.6 * channels ** 0.5
        canvas.volume(x + 56 - size / 2, 148 - size / 2, size, size, depth, BLUE)
        canvas.text(x + 56, 224, feature_map.name, BLUE, 'middle', title=True)
        canvas.text(x + 56, 248, f'{side} × {side} × {channels}', anchor='middle')
        canvas.arrow(x + 56, 258, x + 56, 286)
        count = side ** 2 * feature_map.n_priors
        total += count
        canvas.rect(x, 290, 112, 30, tint(BLUE), BLUE)
        canvas.rect(x, 320, 112, 30, tint(AMBER), AMBER)
        canvas.text(x + 56, 310, f'{count} × 4', anchor='middle')
        canvas.text(x + 56, 340, f'{count} × {len(label_map)}', anchor='middle')
    for text, first, last in (('base: modified VGG-16', 0, 1), ('auxiliary convolutions', 2, 5)):
        left, right = 24 + first * column, 24 + last * column + 112
        canvas.rect(left, 20, right - left, 32, tint(GREY), GREY, corner=6)
        canvas.text((left + right) / 2, 41, text, anchor='middle', bold=True)
    canvas.arrow(24 + column + 114, 36, 24 + 2 * column - 2, 36)
    for i in range(len(FEATURE_MAPS)):
        canvas.arrow(24 + i * column + 56, 56, 24 + i * column + 56, 80)
    canvas.text(24, 376, f'prediction convolutions: {total} × 4 offsets (blue) and {total} × {len(label_map)} '
                'class scores (amber)', bold=True)
    canvas.text(24, 402, f'From one image of {IMAGE_SIZE} × {IMAGE_SIZE}: {total} boxes, most of them around nothing')
    return canvas


# ------------------------------------------------------------------------- fully connected as convolution

@functools.lru_cache(maxsize=1)
def fc_example():
    """A tiny image (3, 2, 2), the weights (2, 12) of a fully connected layer, and its outputs (2), made both ways."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 6, (3, 2, 2), generator=generator).float()
    weights = torch.randint(-2, 4, (2, 12), generator=generator).float()
    as_linear = F.linear(image.flatten(), weights)  # (2)
    as_convolution = F.conv2d(image[None], weights.view(2, 3, 2, 2)).flatten()  # (2, 3, 2, 2) → (1, 2, 1, 1) → (2)
    return image, weights, as_linear.tolist(), as_convolution.tolist()


CHANNEL_COLORS = (tint(RED, 0.35), tint(GREEN, 0.3), tint(BLUE, 0.35))
CELL = 27


def draw_cells(canvas, x, y, values, fill):
    """A small matrix of whole numbers."""
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            canvas.rect(x + j * CELL, y + i * CELL, CELL, CELL, fill, INK, stroke_width=HAIRLINE)
            canvas.text(x + (j + 0.5) * CELL, y + (i + 0.5) * CELL + 5, f'{value:.0f}'.replace('-', '−'),
                        anchor='middle')


def draw_channels(canvas, x, y, values, colors):
    """(3, 2, 2): the channels one below the other."""
    for channel, (matrix, color) in enumerate(zip(values.tolist(), colors)):
        draw_cells(canvas, x, y + channel * (2 * CELL + 8), matrix, color)


def draw_vector(canvas, x, y, values, colors):
    """(12): four cells in each of the channels' colors."""
    for channel, color in enumerate(colors):
        draw_cells(canvas, x + channel * 4 * CELL, y, [values.tolist()[channel * 4:channel * 4 + 4]], color)


def draw_fully_connected(canvas, x, y):
    image, weights, outputs, _ = fc_example()
    draw_vector(canvas, x, y, image.flatten(), CHANNEL_COLORS)
    canvas.text(x, y - 10, 'the image, flattened: 12 values')
    for i, output in enumerate(outputs):
        top = y + 66 + i * 62
        canvas.text(x, top - 10, f'weights {i}')
        draw_vector(canvas, x, top, weights[i], [tint(GREY)] * 3)
        canvas.arrow(x + 12 * CELL + 4, top + CELL / 2, x + 12 * CELL + 24, top + CELL / 2)
        canvas.text(x + 12 * CELL + 30, top + CELL / 2 + 5, output_text(i, output), bold=True)


def draw_convolution(canvas, x, y):
    image, weights, _, outputs = fc_example()
    canvas.text(x, y - 10, 'the image')
    draw_channels(canvas, x, y, image, CHANNEL_COLORS)
    for i, output in enumerate(outputs):
        left = x + 120 + i * 110
        canvas.text(left, y - 10, f'filter {i}')
        draw_channels(canvas, left, y, weights.view(2, 3, 2, 2)[i], [tint(GREY)] * 3)
        canvas.text(left + CELL, y + 208, output_text(i, output), anchor='middle', bold=True)


def output_text(i, output):
    return f'Y{i} = {output:.0f}'.replace('-', '−')


def fc_as_conv_1():
    """A fully connected layer on an image of 2 × 2 × 3."""
    canvas = Canvas(height=286)
    canvas.text(64, 42, 'image: 2 × 2 × 3')
    draw_channels(canvas, 94, 54, fc_example()[0], CHANNEL_COLORS)
    canvas.arrow(180, 140, 250, 140)
    draw_fully_connected(canvas, 290, 64)
    canvas.text(415, 268, 'Y0 and Y1: each value of the image times the weight below it, all added up',
                anchor='middle')
    return canvas


def fc_as_conv_2():
    """A convolution with a kernel as large as the image."""
    canvas = Canvas(height=296)
    draw_convolution(canvas, 268, 42)
    canvas.text(415, 282, 'Y0 and Y1: each value of the image times the filter\'s value at the same place, '
                'all added up', anchor='middle')
    return canvas


def fc_as_conv_3():
    """Both side by side: the same outputs."""
    canvas = Canvas(height=330)
    canvas.text(24, 34, 'fully connected', title=True)
    draw_fully_connected(canvas, 24, 86)
    canvas.text(500, 34, 'convolution', title=True)
    draw_convolution(canvas, 500, 72)
    canvas.line(470, 24, 470, 280, EDGE)
    _, _, as_linear, as_convolution = fc_example()
    if as_linear == as_convolution:
        canvas.text(415, 314, 'the same 12 products, the same sums', GREEN, 'middle', title=True)
    return canvas


def fc_as_conv_4():
    """The general case, and VGG-16's two layers."""
    canvas = Canvas(height=200)
    rows = [['', 'fully connected weights', 'the same as a convolution', 'kernel'],
            ['in general', 'N × (I · H · W)', 'N × I × H × W', 'H × W']]
    fc6, fc7 = torch.empty(4096, 512 * 7 * 7, device='meta'), torch.empty(4096, 4096, device='meta')
    for name, weights, kernel in (('fc6 → conv6', fc6, 7), ('fc7 → conv7', fc7, 1)):
        convolution = weights.view(4096, -1, kernel, kernel)
        rows.append([name, by(weights), by(convolution), f'{kernel} × {kernel}'])
    canvas.table(20, 20, (130, 250, 280, 130), rows, {(1, column): tint(BLUE) for column in range(4)})
    canvas.text(20, 158, 'An image or feature map of I channels, H high and W wide; N outputs. The weights stay what\n'
                'they are, only their shape changes; fc7\'s input is a feature map of 1 × 1.')
    return canvas


def by(tensor):
    """'2 × 3 × 4', the shape of a tensor"""
    return ' × '.join(map(str, tensor.shape))


def decimation():
    """Of 7 × 7 values, every third is kept; a dilated kernel puts them back to where they were."""
    canvas = Canvas(height=352)
    kernel = torch.arange(49).view(7, 7)
    kept = decimate(kernel, (3, 3))  # (3, 3)
    canvas.text(20, 38, 'fc6\'s kernel: 7 × 7', bold=True)
    draw_kernel(canvas, 20, kernel, kept, spread=1, cell=26)
    for x, caption, spread, cell in ((222, 'decimated', 1, 26), (324, 'dilation 3: 7 × 7', 3, 26),
                                     (530, 'dilation 6: 13 × 13', 6, 21)):
        canvas.text(x, 38, caption, bold=True)
        draw_kernel(canvas, x, kept, kept, spread, cell)
    before = torch.empty(4096, 512, 7, 7, device='meta')
    after = decimate(before, (4, None, 3, 3))
    canvas.text(20, 316, f'conv6: {by(before)} = {before.numel():,} weights,\n'
                f'decimated to {by(after)} = {after.numel():,}')
    return canvas


def draw_kernel(canvas, x, values, kept, spread, cell):
    """A matrix with its values `spread` cells apart; those that are kept are blue."""
    side = (len(values) - 1) * spread + 1
    canvas.rect(x, 52, side * cell, side * cell, WHITE)
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            left, top = x + column * spread * cell, 52 + row * spread * cell
            if value in kept:
                canvas.rect(left, top, cell, cell, tint(BLUE, 0.4))
            canvas.text(left + cell / 2, top + cell / 2 + 5, str(value), anchor='middle')
    canvas.grid(x, 52, side * cell, side * cell, side, side)
    canvas.rect(x, 52, side * cell, side * cell, stroke=EDGE, stroke_width=HAIRLINE)


# ------------------------------------------------------------------------------------------- predictions

GRID, N_PRIORS = FEATURE_MAPS[3].grid, FEATURE_MAPS[3].n_priors  # of conv9_2, on which all is shown
TILE = (1, 3)  # row and column of the tile that is opened up


def draw_map(canvas, x, y, channels, color, cell=22, marked=()):
    """A feature map of conv9_2's grid with some of its tiles marked. Returns where it ends, right and below."""
    side, depth = GRID * cell, 2.6 * channels ** 0.5
    canvas.volume(x, y, side, side, depth, color)
    for row, column in marked:
        canvas.rect(x + column * cell, y + row * cell, cell, cell, tint(color, 0.7))
    canvas.grid(x, y, side, side, GRID, GRID, color)
    return x + side + 0.7 * depth, y + side


def prediction_convolutions_1():
    """Two convolutions with 3 × 3 kernels pass over the feature map."""
    canvas = Canvas(height=282)
    channels = FEATURE_MAPS[3].channels
    window = [(TILE[0] + i, TILE[1] + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    right, bottom = draw_map(canvas, 40, 84, channels, GREY, 26, window)
    canvas.text(105, bottom + 28, f'conv9_2\n{GRID} × {GRID} × {channels}', anchor='middle', bold=True)
    for y, color, text, count in ((48, BLUE, 'localization', f'{N_PRIORS} · 4 = {N_PRIORS * 4}'),
                                  (184, AMBER, 'classes', f'{N_PRIORS} · n_classes')):
        canvas.arrow(right + 12, 140, 300, y + 24)
        for i in (2, 1, 0):
            canvas.volume(316 + i * 14, y - 8 + i * 10, 54, 54, 30, color)
        canvas.grid(316, y - 8, 54, 54, 3, 3, color)
        canvas.text(450, y + 14, f'{text}: {count} filters', bold=True)
        canvas.text(450, y + 38, f'each 3 × 3 × {channels}; stride 1, padding 1')
    return canvas


def prediction_convolutions_2():
    """What comes out of the two convolutions."""
    canvas = Canvas(height=240)
    outputs = ((190, N_PRIORS * 4, BLUE, f'localization\n{GRID} × {GRID} × {N_PRIORS * 4}'),
               (520, N_PRIORS * 21, AMBER, f'classes\n{GRID} × {GRID} × ({N_PRIORS} · n_classes)'))
    for x, channels, color, text in outputs:
        draw_map(canvas, x, 58, channels, color, 24, [TILE])
        canvas.text(x + 60, 200, text, anchor='middle', bold=True)
    return canvas


def open_tile(channels, color, heading, cells, first_width):
    """The channels of one tile, opened up: one row per prior."""
    canvas = Canvas(height=250)
    right, bottom = draw_map(canvas, 30, 62, channels, color, 22, [TILE])
    canvas.text(85, bottom + 26, f'{GRID} × {GRID} × {channels}', anchor='middle', bold=True)
    tile_y = 62 + (TILE[0] + 0.5) * 22
    canvas.arrow(right + 6, tile_y, 244, tile_y)
    rows = [['prior', *heading], *([name, *row] for name, row in zip(PRIOR_NAMES, cells))]
    width = (810 - 252 - first_width) / len(heading)
    fills = {(i + 1, j + 1): tint(color, 0.35) for i in range(N_PRIORS) for j in range(len(heading))}
    canvas.table(252, 24, (first_width, *[width] * len(heading)), rows, fills)
    return canvas


def prediction_convolutions_3():
    """The 24 localization channels of one tile: four offsets for each of six priors."""
    numbers = torch.arange(N_PRIORS * 4).view(N_PRIORS, 4).tolist()
    cells = [[f'channel {i}' for i in row] for row in numbers]
    canvas = open_tile(N_PRIORS * 4, BLUE, ['g_c_x', 'g_c_y', 'g_w', 'g_h'], cells, 110)
    canvas.text(252, 236, 'one tile\'s 24 channels are 6 priors\' 4 offsets')
    return canvas


def prediction_convolutions_4():
    """The class channels of one tile, for three classes."""
    numbers = torch.arange(N_PRIORS * 3).view(N_PRIORS, 3).tolist()
    cells = [[f'channel {i}' for i in row] for row in numbers]
    canvas = open_tile(N_PRIORS * 3, AMBER, ['background', 'cat', 'dog'], cells, 110)
    canvas.text(252, 236, 'with n_classes = 3, one tile\'s 18 channels are 6 priors\' 3 scores')
    return canvas


def reshaping():
    """The predictions of conv9_2 in a row: 150 boxes, 150 sets of scores."""
    canvas = Canvas(height=400)
    total = GRID ** 2 * N_PRIORS
    for y, channels, color, text in ((50, N_PRIORS * 4, BLUE, f'{GRID} × {GRID} × {N_PRIORS * 4}'),
                                     (216, N_PRIORS * 3, AMBER, f'{GRID} × {GRID} × {N_PRIORS * 3}')):
        right, bottom = draw_map(canvas, 30, y, channels, color, 20, [(0, 0)])
        canvas.text(80, bottom + 24, text, anchor='middle', bold=True)
        canvas.arrow(right + 8, y + 50, 226, y + 50)
    rows = [['', 'tile', 'prior', 'g_c_x', 'g_c_y', 'g_w', 'g_h', 'backgr.', 'cat', 'dog']]
    for i in (0, 1, 2, 3, 4, 5, 6, None, total - 2, total - 1):
        if i is None:
            rows.append(['…'] * 3 + [''] * 7)
        else:
            tile, kind = divmod(i, N_PRIORS)
            rows.append([str(i), f'{tile // GRID}, {tile % GRID}', PRIOR_NAMES[kind]] + [''] * 7)
    fills = {(i, j): tint(BLUE if j < 7 else AMBER, 0.35) for i in range(1, len(rows)) for j in range(3, 10)}
    canvas.table(236, 30, (44, 46, 100, 54, 54, 46, 46, 70, 46, 46), rows, fills)
    canvas.text(470, 356, f'{total} × 4', BLUE, 'middle', bold=True)
    canvas.text(690, 356, f'{total} × n_classes (here 3)', INK, 'middle', bold=True)
    canvas.text(236, 384, 'row by row, tile by tile, prior by prior')
    return canvas


def stacking():
    """The predictions of all six feature maps, one below the other."""
    canvas = Canvas(height=330)
    rows = [['feature map', 'tiles · priors', 'predictions', 'rows', 'offsets', 'class scores']]
    total = 0
    for feature_map in FEATURE_MAPS:
        count = feature_map.grid ** 2 * feature_map.n_priors
        rows.append([feature_map.name, f'{feature_map.grid} · {feature_map.grid} · {feature_map.n_priors}', str(count),
                     f'{total} – {total + count - 1}', f'{count} × 4', f'{count} × {len(label_map)}'])
        total += count
    rows.append(['all', '', str(total), f'0 – {total - 1}', f'{total} × 4', f'{total} × {len(label_map)}'])
    fills = {(i, j): tint(color, 0.6 if i == 7 else 0.3) for i in range(1, 8) for j, color in ((4, BLUE), (5, AMBER))}
    canvas.table(30, 24, (130, 130, 120, 140, 115, 135), rows, fills, row_height=34)
    canvas.text(30, 318, 'The order is that of the priors: row i of both belongs to prior i.')
    return canvas
