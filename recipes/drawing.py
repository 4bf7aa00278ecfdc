"""Drawing for the training data: colors, backgrounds, text and shapes. Charts are in `charts.py`.

Everything is in pixels. A box is (left, top, right, bottom), right and bottom exclusive. `level` in [0, 1] is the
difficulty of one picture: every range here is narrow at 0 and has its full width at 1. All randomness comes from the
`random.Random` passed in, so a seed gives the same pixels on every call.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]

MIN_SIDE, MAX_SIDE, MAX_ASPECT = 64, 1024, 4

SHADES: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (200, 20, 20), (230, 40, 40), (214, 39, 40)),
    "blue": ((0, 0, 255), (30, 80, 200), (0, 0, 180), (31, 119, 200)),
    "green": ((0, 128, 0), (0, 180, 0), (44, 160, 44), (0, 220, 0)),
    "yellow": ((255, 255, 0), (245, 225, 0), (255, 225, 25)),
    "black": ((0, 0, 0), (20, 20, 20)),
    "orange": ((255, 165, 0), (255, 140, 0), (255, 127, 14)),
    "purple": ((128, 0, 128), (160, 32, 240), (145, 30, 180), (140, 60, 180)),
    "gray": ((128, 128, 128), (160, 160, 160), (110, 110, 110)),
    "white": ((255, 255, 255), (245, 245, 245)),
}
"""RGB values that go by each color's name. Higher difficulty levels add colors in this order."""

FONT_FILES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif.ttf",
    None,
    "STIXGeneral.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif-Bold.ttf",
    "STIXGeneralBol.ttf",
)
"""Fonts that come with matplotlib; None is Pillow's own. Higher difficulty levels add fonts in this order."""

SHAPE_KINDS = ("circle", "square", "triangle", "star", "diamond")

LINE_SPACING = 1.25  # ems from line to line
MIN_TEXT_LUMA = 60  # of 255: thin letters must differ from their background in brightness
MIN_COLOR_DISTANCE = 80  # of 255: filled shapes may differ in hue alone
NOISE_TILE = 128  # pixels: noise is repeated in tiles, because drawing it per pixel is slow

CAT_PHOTO = Path(__file__).resolve().parent.parent / "examples" / "cat.jpg"
FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


class Annotation(NamedTuple):
    """Ground truth of one place in a picture.

    `text` is the character there; or a shape's color or kind; or the name of a region: the item of a receipt's line,
    the label of a chart's column.
    """

    text: str
    box: tuple[float, float, float, float]
    position: tuple[int, int] | None = None  # of a character: number of characters before and after it in its text
    value: int | None = None  # of a chart's column


class Picture(NamedTuple):
    """An image with its ground truth. Both tuples are empty where it is unknown."""

    image: Image.Image
    annotations: tuple[Annotation, ...] = ()
    regions: tuple[Annotation, ...] = ()


# ---------------------------------------------------------------------------------------------------------- difficulty


def ramp(level: float, start: float, end: float) -> float:
    """0 up to `start`, 1 from `end` on, linear between them."""
    return min(1.0, max(0.0, (level - start) / (end - start)))


def lerp(low: float, high: float, weight: float) -> float:
    return low + (high - low) * weight


def log_uniform(rng: random.Random, low: float, high: float, skew: float = 1.0) -> float:
    """A `skew` above 1 makes small values more frequent."""
    return low * (max(low, high) / low) ** (rng.random() ** skew)


def weighted(rng: random.Random, weights: dict[str, float]) -> str:
    """A key, drawn with probability proportional to its weight."""
    return rng.choices(list(weights), list(weights.values()))[0]


def first_part(items: tuple, at_least: int, weight: float) -> tuple:
    """The leading items: `at_least` of them at weight 0, all at weight 1."""
    return items[: round(lerp(at_least, len(items), weight))]


def canvas_size(rng: random.Random, level: float, easiest_side: int, smallest_side: int = MIN_SIDE) -> tuple[int, int]:
    """(width, height): a square of `easiest_side` at level 0; the full range, log-uniform in area, at level 1."""
    base = lerp(easiest_side, smallest_side, ramp(level, 0.3, 1.0))
    top = easiest_side * (MAX_SIDE / easiest_side) ** ramp(level, 0.1, 1.0)
    aspect = log_uniform(rng, 1.0, min(MAX_ASPECT, top / base) ** ramp(level, 0.2, 0.8))
    area = log_uniform(rng, base**2 * aspect, top**2 / aspect)
    short = max(smallest_side, round(math.sqrt(area / aspect)))
    long = min(MAX_SIDE, MAX_ASPECT * short, max(short, round(math.sqrt(area * aspect))))
    return (long, short) if rng.random() < 0.5 else (short, long)


# -------------------------------------------------------------------------------------------------------------- colors


def luma(color: RGB) -> float:
    """Brightness, 0 to 255."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def color_distance(a: RGB, b: RGB) -> float:
    """Euclidean distance, 0 to 255; green weighs most, as for the eye."""
    red, green, blue = (x - y for x, y in zip(a, b, strict=True))
    return math.sqrt((2 * red**2 + 4 * green**2 + 3 * blue**2) / 9)


def blend(a: RGB, b: RGB, weight: float) -> RGB:
    return tuple(round(lerp(x, y, weight)) for x, y in zip(a, b, strict=True))


def shade(rng: random.Random, name: str, level: float) -> RGB:
    """A value of the named color; always the same one at low levels."""
    values = SHADES[name]
    other = blend(rng.choice(values), rng.choice(values), rng.random())
    return blend(values[0], other, ramp(level, 0.2, 0.6))


def is_readable(color: RGB, tones: tuple[RGB, ...]) -> bool:
    """Whether text of this color can be read on all tones of the background."""
    return all(
        abs(luma(color) - luma(tone)) >= MIN_TEXT_LUMA and color_distance(color, tone) >= MIN_COLOR_DISTANCE
        for tone in tones
    )


def text_color(rng: random.Random, level: float, tones: tuple[RGB, ...]) -> RGB:
    """Black or white at low levels, any readable color at high levels."""
    if rng.random() < 0.85 * ramp(level, 0.15, 0.5):
        for name in rng.sample(list(SHADES), k=len(SHADES)):
            color = shade(rng, name, level)
            if is_readable(color, tones):
                return color
    return max((SHADES["black"][0], SHADES["white"][0]), key=lambda c: min(abs(luma(c) - luma(t)) for t in tones))


def contrast(color: RGB, tones: tuple[RGB, ...]) -> float:
    """Distance of the color from the nearest tone."""
    return min(color_distance(color, tone) for tone in tones)


def fill_colors(names: tuple[str, ...], tones: tuple[RGB, ...]) -> tuple[str, ...]:
    """The named colors in which a shape can be seen on all tones; never empty."""
    visible = tuple(name for name in names if contrast(SHADES[name][0], tones) >= MIN_COLOR_DISTANCE)
    return visible or (max(SHADES, key=lambda name: contrast(SHADES[name][0], tones)),)


def fill_color(rng: random.Random, name: str, level: float, tones: tuple[RGB, ...]) -> RGB:
    color = shade(rng, name, level)
    return color if contrast(color, tones) >= MIN_COLOR_DISTANCE else SHADES[name][0]


# --------------------------------------------------------------------------------------------------------- backgrounds


@dataclass(frozen=True)
class Background:
    """An image to draw on, and the tones that text and shapes on it must contrast with.

    A photograph (`needs_panel`) gets a panel in its one tone first; text and shapes go on the panel.
    """

    image: Image.Image
    tones: tuple[RGB, ...]
    needs_panel: bool = False


def make_background(rng: random.Random, level: float, size: tuple[int, int]) -> Background:
    kinds = {
        "plain": 1.0,
        "gradient": ramp(level, 0.4, 0.9),
        "noise": ramp(level, 0.5, 0.95),
        "photo": ramp(level, 0.6, 1.0),
    }
    kind, color = weighted(rng, kinds), _plain_color(rng, level)
    if kind == "gradient":
        return _gradient(rng, size, color)
    if kind == "noise":
        return _noise(rng, size, color)
    if kind == "photo":
        return Background(photograph(rng, size), (color,), needs_panel=True)
    return Background(Image.new("RGB", size, color), (color,))


def paint_panel(rng: random.Random, background: Background, box: Box, inset: int) -> None:
    """Fills the box, with sharp or rounded corners; everything `inset` pixels inside the box is on the panel.

    `inset` is negative, and corners are sharp, where the content is larger than the box: hinting can make small letters
    a pixel wider than `text_extent` says.
    """
    max_radius = int(max(0, inset) / (1 - math.sqrt(0.5)))  # a larger one would cut off the corner of the content
    radius = rng.choice((0, 0, min(max_radius, min(box[2] - box[0], box[3] - box[1]) // 6)))
    inclusive = (box[0], box[1], box[2] - 1, box[3] - 1)
    ImageDraw.Draw(background.image).rounded_rectangle(inclusive, radius, fill=background.tones[0])


def photograph(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A crop of the example photograph, or a texture: smooth noise in several octaves and three colors."""
    if rng.random() < 0.3:
        photo = _cat_photo()
        scale = rng.uniform(0.3, 1.0) * min(photo.width / size[0], photo.height / size[1])
        width, height = size[0] * scale, size[1] * scale
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        return photo.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    generator = np.random.default_rng(rng.getrandbits(64))
    side, height_map = 96, np.zeros((96, 96), dtype=np.float32)
    for octave in range(2, 7):
        grid = Image.fromarray(generator.random((2**octave, 2**octave), dtype=np.float32))
        height_map += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC)) / octave ** rng.uniform(1, 2)
    height_map -= height_map.min()
    weight = height_map / height_map.max() * 2  # three colors span two intervals
    colors = generator.integers(0, 256, (3, 3))
    pixels = np.stack([np.interp(weight, (0, 1, 2), colors[:, channel]) for channel in range(3)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)


@lru_cache(maxsize=1)
def _cat_photo() -> Image.Image:
    photo = Image.open(CAT_PHOTO).convert("RGB")
    photo.thumbnail((MAX_SIDE, MAX_SIDE))
    return photo


def _plain_color(rng: random.Random, level: float) -> RGB:
    if rng.random() >= 0.75 * ramp(level, 0.2, 0.7):
        return SHADES["white"][0]
    if rng.random() < 0.6:
        return shade(rng, rng.choice(list(SHADES)), level)
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _gradient(rng: random.Random, size: tuple[int, int], start: RGB) -> Background:
    end = blend(start, (rng.randrange(256), rng.randrange(256), rng.randrange(256)), rng.uniform(0.2, 0.7))
    if abs(luma(start) - luma(end)) > 110:  # neither black nor white would be readable everywhere
        end = blend(start, end, 0.4)
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-1, 1, 32, dtype=np.float32)
    weight = axis[None] * math.cos(angle) + axis[:, None] * math.sin(angle)
    weight = (weight - weight.min()) / (weight.max() - weight.min())
    mask = Image.fromarray((weight * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    image = Image.new("RGB", size, start)
    image.paste(end, (0, 0, *size), mask)
    return Background(image, tuple(blend(start, end, step / 4) for step in range(5)))


def _noise(rng: random.Random, size: tuple[int, int], color: RGB) -> Background:
    generator = np.random.default_rng(rng.getrandbits(64))
    grain, channels = rng.choice((1, 1, 2, 4)), rng.choice((1, 3))
    spread = rng.uniform(3, 14)
    noise = generator.normal(0, spread, (NOISE_TILE // grain, NOISE_TILE // grain, channels)).astype(np.float32)
    pixels = np.clip(np.asarray(color, dtype=np.float32) + noise, 0, 255).astype(np.uint8)
    tile = Image.fromarray(pixels).resize((NOISE_TILE, NOISE_TILE), Image.Resampling.NEAREST)
    image = Image.new("RGB", size)
    for top in range(0, size[1], NOISE_TILE):
        for left in range(0, size[0], NOISE_TILE):
            image.paste(tile, (left, top))
    return Background(image, (color,))


# ---------------------------------------------------------------------------------------------------------------- text


@lru_cache(maxsize=1024)
def load_font(file: str | None, size: int) -> ImageFont.FreeTypeFont:
    """`file` is one of FONT_FILES, `size` the em height in pixels."""
    if file is None:
        return ImageFont.load_default(size=size)
    return ImageFont.truetype(FONT_FOLDER / file, size)


def pick_font(rng: random.Random, level: float) -> str | None:
    return rng.choice(first_part(FONT_FILES, 1, ramp(level, 0.1, 0.6)))


@dataclass(frozen=True)
class TextStyle:
    """How a block of lines is written."""

    font: str | None
    size: int  # em height in pixels
    angle: float = 0.0  # degrees
    line_spacing: float = LINE_SPACING  # ems


def text_extent(lines: list[str], font: str | None, line_spacing: float = LINE_SPACING) -> tuple[float, float]:
    """Upper bounds of the width and height of the lines, in ems."""
    measured = load_font(font, 64)
    width = max(measured.getlength(line) for line in lines) / 64 + 0.15
    return width, line_spacing * (len(lines) - 1) + LINE_SPACING


def largest_font_size(
    lines: list[str], font: str | None, angle: float, size: tuple[int, int], line_spacing: float = LINE_SPACING
) -> int:
    """The largest em height at which the lines, rotated by `angle` degrees, stay 2 pixels inside the canvas."""
    wide, high = text_extent(lines, font, line_spacing)
    cosine, sine = math.cos(math.radians(angle)), abs(math.sin(math.radians(angle)))
    return int(min((size[0] - 4) / (wide * cosine + high * sine), (size[1] - 4) / (wide * sine + high * cosine)))


def write_text(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    color: RGB | int,
    font: ImageFont.FreeTypeFont,
    anchor: str,
    outline: RGB | None = None,
) -> list[Annotation]:
    """Draws as `ImageDraw.text` does and returns the characters, each with a box as high as the whole text.

    `outline` adds a border of one pixel in that color.
    """
    draw.text(place, text, color, font, anchor=anchor, stroke_width=0 if outline is None else 1, stroke_fill=outline)
    left, top, _, bottom = draw.textbbox(place, text, font, anchor=anchor)
    edges = [left + font.getlength(text[:end]) for end in range(len(text) + 1)]
    return [
        Annotation(character, (edges[index], top, edges[index + 1], bottom), position=(index, len(text) - 1 - index))
        for index, character in enumerate(text)
        if character != " "
    ]


def rotated(annotations: list[Annotation], angle: float, before: Image.Image, after: Image.Image) -> list[Annotation]:
    """Annotations after `after = before.rotate(angle, expand=True)`: centers rotate, boxes stay upright."""
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))

    def rotate(annotation: Annotation) -> Annotation:
        left, top, right, bottom = annotation.box
        x, y = (left + right - before.width) / 2, (top + bottom - before.height) / 2
        to_x, to_y = after.width / 2 + cosine * x + sine * y, after.height / 2 - sine * x + cosine * y
        half_width, half_height = (right - left) / 2, (bottom - top) / 2
        return annotation._replace(box=(to_x - half_width, to_y - half_height, to_x + half_width, to_y + half_height))

    return [rotate(annotation) for annotation in annotations]


def shifted(annotations: Iterable[Annotation], x: float, y: float) -> tuple[Annotation, ...]:
    return tuple(
        annotation._replace(box=tuple(side + shift for side, shift in zip(annotation.box, (x, y, x, y), strict=True)))
        for annotation in annotations
    )


def text_mask(lines: list[str], style: TextStyle, column_gap: float = 0.0, names: Sequence[str] = ()) -> Picture:
    """The lines in white on black (mode L), cropped to the text.

    With a `column_gap` (pixels) the last word of each line goes into a second, right-aligned column. `names`, one for
    each line, become regions.
    """
    font = load_font(style.font, style.size)
    wide, high = text_extent(lines, style.font, style.line_spacing)
    width = math.ceil(wide * style.size + column_gap)
    pad = style.size // 2  # glyphs may reach beyond their advance width
    mask = Image.new("L", (width + 2 * pad, math.ceil(high * style.size) + 2 * pad))
    draw = ImageDraw.Draw(mask)
    pitch = style.line_spacing * style.size
    regions = [
        Annotation(name, (pad, pad + pitch * i, pad + width, pad + pitch * (i + 1))) for i, name in enumerate(names)
    ]
    characters: list[Annotation] = []
    for index, line in enumerate(lines):
        top = pad + pitch * index
        if column_gap:
            line, price = line.rsplit(" ", 1)
            characters += write_text(draw, (pad + width, top), price, 255, font, "ra")
        characters += write_text(draw, (pad, top), line, 255, font, "la")
    if style.angle:
        upright, mask = mask, mask.rotate(style.angle, Image.Resampling.BICUBIC, expand=True)
        characters, regions = (rotated(kept, style.angle, upright, mask) for kept in (characters, regions))
    box = mask.getbbox()
    return Picture(mask.crop(box), *(shifted(kept, -box[0], -box[1]) for kept in (characters, regions)))


def draw_lines(
    rng: random.Random,
    level: float,
    lines: list[str],
    style: TextStyle,
    size: tuple[int, int],
    in_columns: bool,
    names: Sequence[str] = (),
) -> Picture:
    """The lines on a background of the given size, near its center at low levels; `names` as in `text_mask`."""
    slack = size[0] - 4 - text_extent(lines, style.font)[0] * style.size
    mask, *kept = text_mask(lines, style, rng.uniform(0, max(0.0, slack)) if in_columns else 0.0, names)
    background = make_background(rng, level, size)
    jitter = ramp(level, 0.05, 0.4)
    left, top = (
        2 + round(max(0, room) * (0.5 + jitter * rng.uniform(-0.5, 0.5)))
        for room in (size[0] - 4 - mask.width, size[1] - 4 - mask.height)
    )
    if background.needs_panel:
        pad = round(style.size * rng.uniform(0.15, 0.6))
        right, bottom = left + mask.width, top + mask.height
        panel = (max(0, left - pad), max(0, top - pad), min(size[0], right + pad), min(size[1], bottom + pad))
        paint_panel(rng, background, panel, min(left - panel[0], top - panel[1], panel[2] - right, panel[3] - bottom))
    background.image.paste(text_color(rng, level, background.tones), (left, top), mask)
    return Picture(background.image, *(shifted(annotations, left, top) for annotations in kept))


# -------------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Shape:
    color: str
    kind: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


@lru_cache(maxsize=256)
def _polygon(kind: str, inner_radius: float) -> tuple[tuple[float, float], ...]:
    """Corners of a polygon that touches all sides of the unit square."""
    if kind == "square":
        return (0, 0), (1, 0), (1, 1), (0, 1)
    if kind == "triangle":
        return (0.5, 0), (1, 1), (0, 1)
    if kind == "diamond":
        return (0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)
    corners = [
        (radius * math.sin(index * math.pi / 5), -radius * math.cos(index * math.pi / 5))
        for index, radius in enumerate((1.0, inner_radius) * 5)
    ]
    lows, highs = [min(axis) for axis in zip(*corners, strict=True)], [max(axis) for axis in zip(*corners, strict=True)]
    return tuple(tuple((c - lo) / (hi - lo) for c, lo, hi in zip(xy, lows, highs, strict=True)) for xy in corners)


def _draw_shape(draw: ImageDraw.ImageDraw, kind: str, box: Box, fill: RGB | int, inner_radius: float) -> None:
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    if kind == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
        return
    corners = _polygon(kind, inner_radius)
    draw.polygon([(lerp(left, right, x), lerp(top, bottom, y)) for x, y in corners], fill=fill)


def draw_shapes(rng: random.Random, level: float, background: Background, shapes: tuple[Shape, ...]) -> Picture:
    """The shapes on the background, with or without smooth edges; a color has one shade in a picture."""
    names = dict.fromkeys(shape.color for shape in shapes)
    colors = {name: fill_color(rng, name, level, background.tones) for name in names}
    inner_radius = round(rng.uniform(0.38, 0.5), 2)
    smooth = rng.random() < 0.3 * ramp(level, 0.4, 0.8)
    draw = ImageDraw.Draw(background.image)
    for shape in shapes:
        if not smooth:
            _draw_shape(draw, shape.kind, shape.box, colors[shape.color], inner_radius)
            continue
        width, height = shape.box[2] - shape.box[0], shape.box[3] - shape.box[1]
        mask = Image.new("L", (3 * width, 3 * height))
        _draw_shape(ImageDraw.Draw(mask), shape.kind, (0, 0, *mask.size), 255, inner_radius)
        background.image.paste(colors[shape.color], shape.box, mask.reduce(3))
    return Picture(background.image, tuple(Annotation(word, s.box) for s in shapes for word in (s.color, s.kind)))


def shape_area(rng: random.Random, background: Background) -> Box:
    """Where shapes may go: the whole canvas, or on a photograph a panel, which is painted."""
    width, height = background.image.size
    if not background.needs_panel:
        return 0, 0, width, height
    margins = [rng.uniform(0.02, 0.12) for _ in range(4)]
    left, top = round(width * margins[0]), round(height * margins[1])
    right, bottom = round(width * (1 - margins[2])), round(height * (1 - margins[3]))
    inset = min(width, height) // 32
    paint_panel(rng, background, (left, top, right, bottom), inset)
    return left + inset, top + inset, right - inset, bottom - inset


def place_box(rng: random.Random, level: float, kind: str, area: Box, taken: list[Box]) -> Box | None:
    """A box for one more shape, at least 3 pixels away from those taken; None if there is no room."""
    room = (area[2] - area[0] - 4, area[3] - area[1] - 4)
    spread = ramp(level, 0.05, 0.7)
    largest = max(20.0, min(lerp(44, 200, spread), 0.9 * min(room)))
    for attempt in range(24):
        # Each attempt allows less: small shapes still fit where large ones do not.
        side = log_uniform(rng, min(lerp(32, 20, spread), largest), lerp(largest, 20, attempt / 24))
        squeeze = rng.uniform(0.75, 1.0) if kind in ("triangle", "diamond") else 1.0
        width, height = max(20, round(side * (squeeze if kind == "diamond" else 1))), max(20, round(side))
        height = max(20, round(side * squeeze)) if kind == "triangle" else height
        left, top = area[0] + 2 + rng.uniform(0, room[0] - width), area[1] + 2 + rng.uniform(0, room[1] - height)
        box = (round(left), round(top), round(left) + width, round(top) + height)
        if not any(_is_near(box, other, margin=3) for other in taken):
            return box
    return None


def _is_near(a: Box, b: Box, margin: int) -> bool:
    """Whether the boxes overlap or are less than `margin` pixels apart on both axes."""
    return a[0] < b[2] + margin and b[0] < a[2] + margin and a[1] < b[3] + margin and b[1] < a[3] + margin
