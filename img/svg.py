"""A small canvas for SVG, with the looks that all figures share. Whatever is drawn later lies on top."""

import base64
import functools
import io
import math
from html import escape
from pathlib import Path

from PIL import Image

# A phone shows a figure at two thirds of its size: the letters must be large.
WIDTH, FONT_SIZE, TITLE_SIZE, LINE_HEIGHT = 600, 18, 21, 25
STROKE, HAIRLINE = 2, 1  # of lines, and of the grids behind them
FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
LARGEST_PHOTO = 500  # photographs are embedded with at most so many pixels a side

# Colors that stay apart for color-blind eyes, too. Each has one meaning in all figures.
BLUE = '#0b66a8'  # what a network says of boxes
AMBER = '#e69f00'  # what a network says of classes
RED = '#c8440c'  # priors
GREEN = '#047857'  # positive, true
GRAY = '#6b7280'  # negative, false
PURPLE = '#8a3d8f'  # objects, as people marked them
INK, PAPER, EDGE, WHITE = '#1f2328', '#f6f8fa', '#d0d7de', '#ffffff'


def tint(color, strength=0.25):
    """Return a color mixed with white: 1 leaves it as it is, 0 is white."""
    channels = (int(color[i:i + 2], 16) for i in (1, 3, 5))
    return '#' + ''.join(f'{round(255 - strength * (255 - channel)):02x}' for channel in channels)


def number(value):
    """Return a number with one digit after the point at most, so that every computer writes the same file."""
    return f'{round(value, 1) + 0:g}'  # + 0 makes -0.0 to 0


@functools.cache
def photo(path):
    """Return the size and the JPEG, as base64, of a photograph that may have been made smaller."""
    with Image.open(path) as image:
        image.thumbnail((LARGEST_PHOTO, LARGEST_PHOTO))
        return image.size, jpeg(image)


def jpeg(image):
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=80)
    return base64.b64encode(file.getvalue()).decode()


class Canvas:
    def __init__(self, height=0, width=WIDTH, shown_width=None):
        """`shown_width` enlarges the figure: it's as many pixels wide on a page that has the room."""
        self.width, self.height, self.shown_width = width, height, shown_width or width
        self.elements, self.pictures = [], {}

    def save(self, path):
        # Pages are light or dark: with a ground of its own, a figure looks the same on both.
        self.rect(1, 1, self.width - 2, self.height - 2, PAPER, EDGE, corner=8)
        self.elements.insert(0, self.elements.pop())
        defs = ''.join(f'<image id="{name}" width="{w}" height="{h}" href="data:image/jpeg;base64,{data}"/>\n'
                       for name, ((w, h), data) in self.pictures.items())
        width, height, larger = self.width, self.height, self.shown_width / self.width
        size = (f'width="{number(width * larger)}" height="{number(height * larger)}" '
                f'viewBox="0 0 {number(width)} {number(height)}"')
        lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" font-size="{FONT_SIZE}">',
                 *([f'<defs>\n{defs}</defs>'] if defs else []), *self.elements, '</svg>']
        Path(path).write_bytes('\n'.join([*lines, '']).encode())

    def add(self, tag, content=None, **attributes):
        words = ''.join(f' {name.replace("_", "-")}="{value if isinstance(value, str) else number(value)}"'
                        for name, value in attributes.items() if value is not None)
        self.elements.append(f'<{tag}{words}/>' if content is None
                             else f'<{tag}{words}>{escape(content, quote=False)}</{tag}>')

    def rect(self, x, y, width, height, fill='none', stroke=None, dashed=False, opacity=None, corner=None,
             stroke_width=STROKE):
        self.add('rect', x=x, y=y, width=width, height=height, rx=corner, fill=fill, fill_opacity=opacity,
                 stroke=stroke, stroke_width=stroke and stroke_width, stroke_dasharray='6 4' if dashed else None)

    def path(self, points, stroke=INK, fill='none', closed=False, dashed=False, stroke_width=STROKE):
        data = 'M' + ' L'.join(f'{number(x)} {number(y)}' for x, y in points) + ('Z' if closed else '')
        self.add('path', d=data, fill=fill, stroke=stroke, stroke_width=stroke_width, stroke_linejoin='round',
                 stroke_dasharray='6 4' if dashed else None)

    def line(self, x1, y1, x2, y2, color=INK, dashed=False, halo=False, stroke_width=STROKE):
        """`halo` puts a white edge around it, for lines on pictures."""
        if halo:
            self.path([(x1, y1), (x2, y2)], WHITE, stroke_width=3 * STROKE)
        self.path([(x1, y1), (x2, y2)], color, dashed=dashed, stroke_width=stroke_width)

    def arrow(self, x1, y1, x2, y2, color=INK, both=False, halo=False):
        length = math.hypot(x2 - x1, y2 - y1)
        dx, dy = (x2 - x1) / length, (y2 - y1) / length
        self.line(x1, y1, x2 - 4 * dx, y2 - 4 * dy, color, halo=halo)
        for x, y, sign in [(x2, y2, 1), (x1, y1, -1)][:2 if both else 1]:
            back_x, back_y = x - sign * 9 * dx, y - sign * 9 * dy
            self.path([(x, y), (back_x - 4.5 * dy, back_y + 4.5 * dx), (back_x + 4.5 * dy, back_y - 4.5 * dx)],
                      stroke=WHITE if halo else None, fill=color, closed=True, stroke_width=HAIRLINE)

    def dot(self, x, y, color=INK, radius=5):
        self.add('circle', cx=x, cy=y, r=radius, fill=color, stroke=WHITE, stroke_width=HAIRLINE)

    def volume(self, x, y, side, depth, color, cells=1):
        """A feature map: its front is what one channel looks like, its depth tells how many channels it has.
        (x, y) is the upper left corner of the front."""
        d, right, bottom = 0.7 * depth, x + side, y + side  # seen at 45 degrees
        self.path([(x, y), (x + d, y - d), (right + d, y - d), (right, y)], color, tint(color, 0.15), closed=True)
        self.path([(right, y), (right + d, y - d), (right + d, bottom - d), (right, bottom)], color, tint(color, 0.5),
                  closed=True)
        self.rect(x, y, side, side, tint(color), color)
        self.grid(x, y, side, side, cells, cells, tint(color, 0.6))

    def grid(self, x, y, width, height, columns, rows, color=EDGE):
        """The lines between the cells of a grid."""
        for i in range(1, columns):
            self.line(x + width * i / columns, y, x + width * i / columns, y + height, color, stroke_width=HAIRLINE)
        for i in range(1, rows):
            self.line(x, y + height * i / rows, x + width, y + height * i / rows, color, stroke_width=HAIRLINE)

    def text(self, x, y, text, color=INK, anchor='start', bold=False, title=False):
        """(x, y) lies on the base line of the first line; `anchor` is start, middle or end."""
        for i, line in enumerate(text.split('\n')):
            self.add('text', line, x=x, y=y + i * LINE_HEIGHT, fill=color,
                     text_anchor=None if anchor == 'start' else anchor,
                     font_weight='bold' if bold or title else None, font_size=TITLE_SIZE if title else None)

    def center(self, x, y, text, color=INK, bold=True, title=False):
        self.text(x, y, text, color, 'middle', bold, title)

    def chip(self, x, y, text, color):
        """A text on a ground of its color, for labels on pictures; (x, y) is its upper left corner."""
        width = chip_width(text)
        self.rect(x, y, width, CHIP_HEIGHT, color, corner=3)
        self.center(x + width / 2, y + CHIP_HEIGHT - 7, text, INK if color == AMBER else WHITE)

    def table(self, x, y, widths, rows, fills=None, row_height=33):
        """Rows of texts, the first one being the heading. `fills` gives cells (row, column) a color."""
        for i, row in enumerate(rows):
            left = x
            for j, (cell, width) in enumerate(zip(row, widths, strict=True)):
                fill = (fills or {}).get((i, j), PAPER if i == 0 else WHITE)
                self.rect(left, y + i * row_height, width, row_height, fill, EDGE, stroke_width=HAIRLINE)
                self.center(left + width / 2, y + (i + 0.5) * row_height + 6, cell, bold=i == 0)
                left += width

    def picture(self, source, x, y, width, height=None, region=(0, 0, 1, 1)):
        """A photograph's path or a PIL image; used several times, it's stored once. Only a region of it, in fractional
        boundary coordinates, and squeezed, if a height is given that isn't its own. Return the height."""
        if isinstance(source, Image.Image):
            name, size, data = f'picture{len(self.pictures)}', source.size, jpeg(source)
        else:
            name, (size, data) = Path(source).stem, photo(source)
        self.pictures.setdefault(name, (size, data))
        left, top, right, bottom = (value * size[i % 2] for i, value in enumerate(region))
        height = height or width * (bottom - top) / (right - left)
        frame = ' '.join(f'{key}="{number(value)}"' for key, value in
                         (('x', x), ('y', y), ('width', width), ('height', height)))
        box = ' '.join(map(number, (left, top, right - left, bottom - top)))
        self.elements.append(f'<svg {frame} viewBox="{box}" preserveAspectRatio="none"><use href="#{name}"/></svg>')
        return height


FIGURES = {}  # {name of the file: function that draws it}


def figure(**size):
    """Make a function one that draws a figure of its own name, on a canvas of this size."""
    def register(draw):
        def save(folder):
            canvas = Canvas(**size)
            draw(canvas)
            canvas.save(Path(folder, f'{draw.__name__}.svg'))

        FIGURES[f'{draw.__name__}.svg'] = save

    return register


CHIP_HEIGHT = 26


def chip_width(text):
    return max(0.58 * FONT_SIZE * len(text) + 10, CHIP_HEIGHT)  # for a wide font


class Axes:
    """The frame of a chart, and the way from its values to the canvas."""

    def __init__(self, canvas, x, y, width, height, x_range, y_range, log_x=False, log_y=False):
        self.canvas, self.x, self.y, self.width, self.height = canvas, x, y, width, height
        self.scales = [[math.log10 if log else float, *ends] for ends, log in ((x_range, log_x), (y_range, log_y))]
        canvas.rect(x, y, width, height, WHITE)

    def at(self, *values):
        x, y = ((scale(value) - scale(start)) / (scale(end) - scale(start))
                for value, (scale, start, end) in zip(values, self.scales))
        return self.x + x * self.width, self.y + self.height - y * self.height

    def ticks_x(self, values, show=str):
        for value in values:
            x, _ = self.at(value, self.scales[1][1])
            self.canvas.line(x, self.y, x, self.y + self.height, EDGE, stroke_width=HAIRLINE)
            self.canvas.center(x, self.y + self.height + 24, show(value), bold=False)

    def ticks_y(self, values, show=str):
        for value in values:
            _, y = self.at(self.scales[0][1], value)
            self.canvas.line(self.x, y, self.x + self.width, y, EDGE, stroke_width=HAIRLINE)
            self.canvas.text(self.x - 8, y + 6, show(value), anchor='end')

    def frame(self, x_label, y_label):
        bottom = self.y + self.height
        self.canvas.path([(self.x, self.y), (self.x, bottom), (self.x + self.width, bottom)])
        self.canvas.center(self.x + self.width / 2, bottom + 52, x_label)
        self.canvas.text(self.x, self.y - 12, y_label, bold=True)

    def curve(self, points, color, dots=True):
        places = [self.at(*point) for point in points]
        self.canvas.path(places, color)
        for place in places if dots else ():
            self.canvas.dot(*place, color, radius=4)
