r"""Draws Emoji VOC, a small sample dataset in Pascal VOC's own layout: scenes of one to four emoji on soft
backgrounds, with one emoji for each of VOC's twenty classes.

Draw the set that lies beside this script again:

    python img/emoji_voc/draw_emoji_voc.py

Draw a larger one with three classes somewhere else:

    python img/emoji_voc/draw_emoji_voc.py --output_folder emoji_3 --classes cat dog bird \
        --n_train_2007 1000 --n_train_2012 0 --n_test 200

It needs a color emoji font: Noto Color Emoji, on Debian and Ubuntu `apt install fonts-noto-color-emoji`.

It writes JPEGImages/*.jpg and Annotations/*.xml for each picture, and the lists ImageSets/Main/*.txt, in the
folders VOC2007 (training and test) and VOC2012 (training only) of the output folder. A set that it drew there earlier
is removed first. The same settings and the same Pillow version give the same files.
"""

import random
import sys
from itertools import combinations
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where the project's own modules lie

from utils import InputError, require, run_script

# Where from, where to
output_folder: str = str(Path(__file__).resolve().parent)  # VOC2007 and VOC2012 are written in here
font: str = '/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf'  # from Debian's fonts-noto-color-emoji
font_size: int = 109  # pixels; Noto Color Emoji holds bitmaps of this one size, other fonts may want another

# The set
classes: list[str] = ['aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow',
                      'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa',
                      'train', 'tvmonitor']  # VOC's twenty, or any of them
n_train_2007: int = 6  # training pictures in VOC2007
n_train_2012: int = 2  # training pictures in VOC2012
n_test: int = 8  # test pictures, in VOC2007
n_difficult: int = 1  # objects marked difficult in training, and as many in test; extra ones, and small
seed: int = 4  # another seed, another set

# The pictures
picture_sizes: list[str] = ['500x375', '500x375', '500x333', '375x500']  # pixels; named twice: twice as often
max_objects: int = 4  # a picture has from 1 to this many objects
min_size: int = 90  # pixels; an object's longest side is at least this ...
max_size: int = 260  # pixels; ... and at most this
max_hidden: float = 0.1  # share of a box that may lie in a larger one; the IoU of the two is lower still
noise: int = 6  # gray levels; each background pixel is changed by up to this much in each color
jpeg_quality: int = 90  # 1 to 95; higher looks better and takes more space

EMOJI = {'aeroplane': '✈', 'bicycle': '🚲', 'bird': '🐦', 'boat': '⛵', 'bottle': '🍾', 'bus': '🚌', 'car': '🚗',
         'cat': '🐈', 'chair': '🪑', 'cow': '🐄', 'diningtable': '🍽', 'dog': '🐕', 'horse': '🐎', 'motorbike': '🏍',
         'person': '🧍', 'pottedplant': '🪴', 'sheep': '🐑', 'sofa': '🛋', 'train': '🚆', 'tvmonitor': '📺'}
Objects = list[tuple[str, bool]]  # what is in a picture: class and whether it is difficult
Size, Glyphs = tuple[int, int], dict[str, Image.Image]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels from 0, the last two exclusive
FIELDS = """\
<annotation>
\t<folder>{}</folder>
\t<filename>{}.jpg</filename>
\t<source>
\t\t<database>Emoji VOC</database>
\t\t<annotation>Emoji VOC</annotation>
\t\t<image>Noto Color Emoji</image>
\t</source>
\t<size>
\t\t<width>{}</width>
\t\t<height>{}</height>
\t\t<depth>3</depth>
\t</size>
\t<segmented>0</segmented>
"""
OBJECT_FIELDS = """\
\t<object>
\t\t<name>{}</name>
\t\t<pose>Unspecified</pose>
\t\t<truncated>0</truncated>
\t\t<difficult>{:d}</difficult>
\t\t<bndbox>
\t\t\t<xmin>{}</xmin>
\t\t\t<ymin>{}</ymin>
\t\t\t<xmax>{}</xmax>
\t\t\t<ymax>{}</ymax>
\t\t</bndbox>
\t</object>
"""
MIN_GLYPH = 16  # pixels; thin lines, such as the bicycle's, fade away in smaller glyphs
MAX_TRIES = 10_000  # arrangements tried for one picture


def check_settings() -> None:
    unknown = [name for name in classes if name not in EMOJI]
    require(classes and not unknown, f'classes must be some of {", ".join(EMOJI)}, not {", ".join(unknown)}')
    require(min(n_train_2007, n_train_2012, n_test, n_difficult) >= 0 < max_objects,
            'numbers of pictures and difficult objects can\'t be negative, and max_objects must be at least 1')
    shortest_side = min(min(parse_size(text)) for text in picture_sizes)
    require(MIN_GLYPH <= min_size <= max_size <= shortest_side,
            f'min_size and max_size must rise from {MIN_GLYPH} to the shortest side of a picture, {shortest_side}')


def parse_size(text: str) -> Size:
    """'500x375' -> (500, 375), width and height."""
    width, _, height = text.partition('x')
    require(width.isdecimal() and height.isdecimal(), f"picture_sizes must be like 500x375, not '{text}'")
    return int(width), int(height)


def draw_glyphs() -> Glyphs:
    """Each class's emoji, RGBA on transparent ground, cropped to what is visible."""
    try:
        emoji_font = ImageFont.truetype(font, font_size)
    except (OSError, ValueError) as error:
        raise InputError(f"font '{font}' can't be used at font_size {font_size} ({error}): install Noto Color Emoji "
                         '(fonts-noto-color-emoji on Debian and Ubuntu), or name another emoji font') from None
    return {name: draw_glyph(name, emoji_font) for name in classes}


def draw_glyph(name: str, emoji_font: ImageFont.FreeTypeFont) -> Image.Image:
    canvas = Image.new('RGBA', (3 * font_size, 3 * font_size))
    ImageDraw.Draw(canvas).text((font_size, font_size), EMOJI[name], 'black', emoji_font, embedded_color=True)
    require(canvas.convert('RGB').getbbox(), f"font '{font}' has no {EMOJI[name]} ({name}) in color")
    # On the empty canvas soft edges have mixed with black; read as premultiplied ('RGBa') they recover
    glyph = Image.frombytes('RGBa', canvas.size, canvas.tobytes()).convert('RGBA')
    return glyph.crop(glyph.getbbox())


def tight_box(image: Image.Image) -> Box | None:
    """The box around all pixels that are at least half opaque; None if there are none."""
    return image.getchannel('A').point(lambda alpha: 255 * (alpha > 127)).getbbox()


def deal_objects(n_pictures: int, rng: random.Random) -> list[Objects]:
    """Decides what is in each picture.

    The classes take turns, in a new order each round, so each occurs if the pictures have room for all.
    Difficult objects come from later rounds only: their class has been dealt as a normal object before.
    """
    counts = [rng.randint(1, max_objects) for _ in range(n_pictures)]
    wanted = min(len(classes) + n_difficult, n_pictures * max_objects)
    while sum(counts) < wanted:
        counts[rng.choice([i for i, count in enumerate(counts) if count < max_objects])] += 1

    total = sum(counts)
    names = []
    while len(names) < total:
        names += rng.sample(classes, len(classes))
    first_difficult = max(len(classes), total - n_difficult)
    objects = [(name, i >= first_difficult) for i, name in enumerate(names[:total])]
    rng.shuffle(objects)
    return [[objects.pop() for _ in range(count)] for count in counts]


def arrange(objects: Objects, glyphs: Glyphs, picture_size: Size, rng: random.Random) -> list[Box]:
    """Chooses a place and a size for each object, at random."""
    for attempt in range(MAX_TRIES):
        # Crowded pictures need smaller objects: the limit falls with each attempt
        limit = max_size - (max_size - min_size) * attempt // MAX_TRIES
        rectangles = []
        for name, difficult in objects:
            longest_side = min_size if difficult else rng.randint(min_size, limit)
            rectangles.append(place(glyphs[name].size, longest_side, picture_size, rng))
        if all(hidden_share(a, b) <= max_hidden for a, b in combinations(rectangles, 2)):
            return rectangles
    raise InputError(f'there is no room for {len(objects)} objects of at least {min_size} pixels in a picture of '
                     f'{picture_size[0]}x{picture_size[1]}: lower min_size or max_objects')


def place(glyph_size: Size, longest_side: int, picture_size: Size, rng: random.Random) -> Box:
    scale = longest_side / max(glyph_size)
    width, height = (max(1, round(side * scale)) for side in glyph_size)
    left = rng.randint(0, picture_size[0] - width)
    top = rng.randint(0, picture_size[1] - height)
    return left, top, left + width, top + height


def hidden_share(a: Box, b: Box) -> float:
    """How much of the smaller rectangle lies inside the other, from 0 to 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller_area = min((right - left) * (bottom - top) for left, top, right, bottom in (a, b))
    return max(0, width) * max(0, height) / smaller_area


def draw_background(picture_size: Size, rng: random.Random) -> Image.Image:
    """Four soft colors, one in each corner, that melt into one another, with noise on top."""
    corners = Image.new('RGB', (2, 2))
    base = [rng.randint(130, 215) for _ in range(3)]
    for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
        corners.putpixel(corner, tuple(level + rng.randint(-30, 30) for level in base))
    # The box joins the centers of the four pixels; beyond them there would be nothing to blend
    gradient = corners.resize(picture_size, Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))

    # Image.effect_noise would be shorter, but cannot be seeded
    grain = Image.frombytes('RGB', picture_size, rng.randbytes(3 * picture_size[0] * picture_size[1]))
    grain = grain.point([level * (2 * noise + 1) // 256 for level in range(256)] * 3)  # 0 to 2 * noise
    return ImageChops.add(gradient, grain, offset=-noise)


def draw_scene(objects: Objects, glyphs: Glyphs, rng: random.Random) -> tuple[Image.Image, list[Box]]:
    """A picture of the objects, and the tight box of each."""
    picture_size = parse_size(rng.choice(picture_sizes))
    picture = draw_background(picture_size, rng)
    boxes = []
    for (name, _), (left, top, right, bottom) in zip(objects, arrange(objects, glyphs, picture_size, rng)):
        glyph = glyphs[name].resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        if rng.random() < 0.5:
            glyph = ImageOps.mirror(glyph)
        picture.paste(glyph, (left, top), glyph)
        x_min, y_min, x_max, y_max = tight_box(glyph)
        boxes.append((left + x_min, top + y_min, left + x_max, top + y_max))
    return picture, boxes


def make_annotation(folder: str, image_id: str, picture: Image.Image, objects: Objects, boxes: list[Box]) -> str:
    """VOC's XML of one picture."""
    text = FIELDS.format(folder, image_id, *picture.size)
    for (name, difficult), (left, top, right, bottom) in zip(objects, boxes):
        # VOC counts pixels from 1 and its box includes the last one: only the left and the top move
        text += OBJECT_FIELDS.format(name, difficult, left + 1, top + 1, right, bottom)
    return text + '</annotation>\n'


def main() -> None:
    check_settings()
    glyphs = draw_glyphs()
    rng = random.Random(seed)
    root = Path(output_folder)
    old_annotations = list(root.glob('VOC20*/Annotations/*.xml'))
    require(all('<database>Emoji VOC' in path.read_text(encoding='utf-8') for path in old_annotations),
            f"output_folder '{output_folder}' holds other pictures: name another folder")
    for path in old_annotations:
        path.unlink()
        (path.parents[1] / 'JPEGImages' / f'{path.stem}.jpg').unlink(missing_ok=True)

    # As in the real VOC2007, training and test pictures share one numbering
    ids_2007 = [f'{i:06d}' for i in range(1, n_train_2007 + n_test + 1)]
    rng.shuffle(ids_2007)
    ids_2012 = [f'2012_{i:06d}' for i in range(1, n_train_2012 + 1)]
    lists = [('VOC2007', 'trainval', sorted(ids_2007[:n_train_2007])),
             ('VOC2012', 'trainval', ids_2012),
             ('VOC2007', 'test', sorted(ids_2007[n_train_2007:]))]
    # The classes take turns over the training pictures of both years together
    contents = deal_objects(n_train_2007 + n_train_2012, rng) + deal_objects(n_test, rng)

    for folder, split, ids in lists:
        for subfolder in ('Annotations', 'ImageSets/Main', 'JPEGImages'):
            (root / folder / subfolder).mkdir(parents=True, exist_ok=True)
        (root / folder / 'ImageSets/Main' / f'{split}.txt').write_text(''.join(f'{i}\n' for i in ids))

    pictures = [(folder, image_id) for folder, _, ids in lists for image_id in ids]
    for (folder, image_id), objects in zip(tqdm(pictures, desc='Drawing'), contents):
        picture, boxes = draw_scene(objects, glyphs, rng)
        annotation = make_annotation(folder, image_id, picture, objects, boxes)
        (root / folder / 'Annotations' / f'{image_id}.xml').write_bytes(annotation.encode())
        picture.save(root / folder / 'JPEGImages' / f'{image_id}.jpg', quality=jpeg_quality, optimize=True)
    print(f'{len(pictures)} pictures with {sum(map(len, contents))} objects are in {root}.')


if __name__ == '__main__':
    run_script(sys.modules[__name__])
