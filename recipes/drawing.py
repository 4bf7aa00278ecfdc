"""Pictures of the training recipe: colours, fonts, backdrops, text, shapes and charts.

Everything is in pixels; a box is (left, top, right, bottom), right and bottom exclusive. `level` in [0, 1] is the
difficulty of one picture: every range here is narrow at 0 and has its full width at 1. All randomness comes from the
`random.Random` passed in.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
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
"""Each colour's name and the values people draw it with; the order is that in which the dial introduces them."""

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
"""matplotlib's upright families, and Pillow's own font as None; in the order in which the dial introduces them."""

SHAPE_KINDS = ("circle", "square", "triangle", "star", "diamond")

LINE_PITCH = 1.25  # ems from line to line, of most text
MIN_TEXT_LUMA = 60  # of 255: letters are thin, so they must differ from their backdrop in brightness
MIN_COLOR_DISTANCE = 80  # of 255: filled shapes may differ in hue alone
NOISE_TILE = 128  # pixels: noise is repeated in tiles, as drawing it for each pixel would cost more than the picture

_CAT = Path(__file__).resolve().parent.parent / "examples" / "cat.jpg"
_FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


class Mark(NamedTuple):
    """What a picture shows in one place: a character, or a word for a shape there (its colour, its kind).

    Of an area: what it belongs to, the thing on a receipt's line or the letter of a chart's column.
    """

    text: str
    box: tuple[float, float, float, float]
    order: tuple[int, int] | None = None  # of a character: how many of its text stand before it and after it
    value: int | None = None  # of a chart's column


class Picture(NamedTuple):
    """A picture and what it shows where; without marks, that is not known."""

    image: Image.Image
    marks: tuple[Mark, ...] = ()
    areas: tuple[Mark, ...] = ()


# ---------------------------------------------------------------------------------------------------------------- dial


def ramp(level: float, start: float, end: float) -> float:
    """0 up to `start`, 1 from `end` on, linear between them."""
    return min(1.0, max(0.0, (level - start) / (end - start)))


def lerp(low: float, high: float, weight: float) -> float:
    return low + (high - low) * weight


def log_uniform(rng: random.Random, low: float, high: float, skew: float = 1.0) -> float:
    """With a `skew` above 1 small values are more frequent than large ones."""
    return low * (max(low, high) / low) ** (rng.random() ** skew)


def weighted(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def first_part(items: tuple, at_least: int, weight: float) -> tuple:
    """The leading items: `at_least` of them at weight 0, all at weight 1."""
    return items[: round(lerp(at_least, len(items), weight))]


def canvas_size(rng: random.Random, level: float, easiest_side: int, smallest_side: int = MIN_SIDE) -> tuple[int, int]:
    """(width, height): `easiest_side` squared at level 0; log-uniform in area over the full range at level 1."""
    base = lerp(easiest_side, smallest_side, ramp(level, 0.3, 1.0))
    top = easiest_side * (MAX_SIDE / easiest_side) ** ramp(level, 0.1, 1.0)
    aspect = log_uniform(rng, 1.0, min(MAX_ASPECT, top / base) ** ramp(level, 0.2, 0.8))
    area = log_uniform(rng, base**2 * aspect, top**2 / aspect)
    short = max(smallest_side, round(math.sqrt(area / aspect)))
    long = min(MAX_SIDE, MAX_ASPECT * short, max(short, round(math.sqrt(area * aspect))))
    return (long, short) if rng.random() < 0.5 else (short, long)


# ------------------------------------------------------------------------------------------------------------- colours


def luma(color: RGB) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def color_distance(a: RGB, b: RGB) -> float:
    """0 to 255: Euclidean, green weighted most, as the eye does."""
    red, green, blue = (x - y for x, y in zip(a, b, strict=True))
    return math.sqrt((2 * red**2 + 4 * green**2 + 3 * blue**2) / 9)


def blend(a: RGB, b: RGB, weight: float) -> RGB:
    return tuple(round(lerp(x, y, weight)) for x, y in zip(a, b, strict=True))


def shade(rng: random.Random, name: str, level: float) -> RGB:
    """A value that goes by the colour's name; always the same one at low levels."""
    values = SHADES[name]
    other = blend(rng.choice(values), rng.choice(values), rng.random())
    return blend(values[0], other, ramp(level, 0.2, 0.6))


def is_readable(color: RGB, tones: tuple[RGB, ...]) -> bool:
    """Whether letters of this colour can be read on every tone of the backdrop."""
    return all(
        abs(luma(color) - luma(tone)) >= MIN_TEXT_LUMA and color_distance(color, tone) >= MIN_COLOR_DISTANCE
        for tone in tones
    )


def text_color(rng: random.Random, level: float, tones: tuple[RGB, ...]) -> RGB:
    """Black (on dark: white) at low levels; any readable one of the nine colours at high levels."""
    if rng.random() < 0.85 * ramp(level, 0.15, 0.5):
        for name in rng.sample(list(SHADES), k=len(SHADES)):
            color = shade(rng, name, level)
            if is_readable(color, tones):
                return color
    return max((SHADES["black"][0], SHADES["white"][0]), key=lambda c: min(abs(luma(c) - luma(t)) for t in tones))


def fill_colors(names: tuple[str, ...], tones: tuple[RGB, ...]) -> tuple[str, ...]:
    """The colours, of those named, in which a shape stands out on every tone; never empty."""
    visible = tuple(name for name in names if _gap(SHADES[name][0], tones) >= MIN_COLOR_DISTANCE)
    return visible or (max(SHADES, key=lambda name: _gap(SHADES[name][0], tones)),)


def fill_color(rng: random.Random, name: str, level: float, tones: tuple[RGB, ...]) -> RGB:
    color = shade(rng, name, level)
    return color if _gap(color, tones) >= MIN_COLOR_DISTANCE else SHADES[name][0]


def _gap(color: RGB, tones: tuple[RGB, ...]) -> float:
    return min(color_distance(color, tone) for tone in tones)


# ----------------------------------------------------------------------------------------------------------- backdrops


@dataclass(frozen=True)
class Backdrop:
    """A background and the tones that ink on it must contrast with.

    On a photograph (`needs_patch`) the ink goes on a patch of the one tone, which is painted first.
    """

    image: Image.Image
    tones: tuple[RGB, ...]
    needs_patch: bool = False


def make_backdrop(rng: random.Random, level: float, size: tuple[int, int]) -> Backdrop:
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
        return Backdrop(photograph(rng, size), (color,), needs_patch=True)
    return Backdrop(Image.new("RGB", size, color), (color,))


def paint_patch(rng: random.Random, backdrop: Backdrop, box: Box, inset: int) -> None:
    """Paints the box, its corners sharp or rounded; what is `inset` pixels inside it is all on the patch.

    `inset` is negative where the content sticks out of the box, as small letters do by a pixel in one receipt of
    thousands: hinting makes them wider than `text_extent` tells. The corners are sharp then.
    """
    most = int(max(0, inset) / (1 - math.sqrt(0.5)))  # a rounder corner would cut the corner of the content off
    radius = rng.choice((0, 0, min(most, min(box[2] - box[0], box[3] - box[1]) // 6)))
    inclusive = (box[0], box[1], box[2] - 1, box[3] - 1)
    ImageDraw.Draw(backdrop.image).rounded_rectangle(inclusive, radius, fill=backdrop.tones[0])


def photograph(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A crop of the example photograph, or a texture of smooth noise in several octaves and three colours."""
    if rng.random() < 0.3:
        photo = _cat()
        scale = rng.uniform(0.3, 1.0) * min(photo.width / size[0], photo.height / size[1])
        width, height = size[0] * scale, size[1] * scale
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        return photo.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    generator = np.random.default_rng(rng.getrandbits(64))
    side, height_map = 96, np.zeros((96, 96), dtype=np.float32)
    for octave in range(2, 7):
        cells = Image.fromarray(generator.random((2**octave, 2**octave), dtype=np.float32))
        height_map += np.asarray(cells.resize((side, side), Image.Resampling.BICUBIC)) / octave ** rng.uniform(1, 2)
    height_map -= height_map.min()
    weight = height_map / height_map.max() * 2  # over three colours: two intervals
    colors = generator.integers(0, 256, (3, 3))
    pixels = np.stack([np.interp(weight, (0, 1, 2), colors[:, channel]) for channel in range(3)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)


@lru_cache(maxsize=1)
def _cat() -> Image.Image:
    photo = Image.open(_CAT).convert("RGB")
    photo.thumbnail((MAX_SIDE, MAX_SIDE))
    return photo


def _plain_color(rng: random.Random, level: float) -> RGB:
    if rng.random() >= 0.75 * ramp(level, 0.2, 0.7):
        return SHADES["white"][0]
    if rng.random() < 0.6:
        return shade(rng, rng.choice(list(SHADES)), level)
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _gradient(rng: random.Random, size: tuple[int, int], start: RGB) -> Backdrop:
    end = blend(start, (rng.randrange(256), rng.randrange(256), rng.randrange(256)), rng.uniform(0.2, 0.7))
    if abs(luma(start) - luma(end)) > 110:  # neither black nor white would be readable on all of it
        end = blend(start, end, 0.4)
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-1, 1, 32, dtype=np.float32)
    weight = axis[None] * math.cos(angle) + axis[:, None] * math.sin(angle)
    weight = (weight - weight.min()) / (weight.max() - weight.min())
    mask = Image.fromarray((weight * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    image = Image.new("RGB", size, start)
    image.paste(end, (0, 0, *size), mask)
    return Backdrop(image, tuple(blend(start, end, step / 4) for step in range(5)))


def _noise(rng: random.Random, size: tuple[int, int], color: RGB) -> Backdrop:
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
    return Backdrop(image, (color,))


# ---------------------------------------------------------------------------------------------------------------- text


@lru_cache(maxsize=1024)
def load_font(file: str | None, size: int) -> ImageFont.FreeTypeFont:
    """`file` is one of FONT_FILES, `size` the em height in pixels."""
    if file is None:
        return ImageFont.load_default(size=size)
    return ImageFont.truetype(_FONT_FOLDER / file, size)


def pick_font(rng: random.Random, level: float) -> str | None:
    return rng.choice(first_part(FONT_FILES, 1, ramp(level, 0.1, 0.6)))


@dataclass(frozen=True)
class Lettering:
    """Font, em height in pixels, angle in degrees and distance in ems from line to line of a block of lines."""

    font: str | None
    size: int
    angle: float = 0.0
    pitch: float = LINE_PITCH


def text_extent(lines: list[str], font: str | None, pitch: float = LINE_PITCH) -> tuple[float, float]:
    """Upper bounds of the width and height of the lines, in ems."""
    measured = load_font(font, 64)
    return max(measured.getlength(line) for line in lines) / 64 + 0.15, pitch * (len(lines) - 1) + LINE_PITCH


def largest_font_size(
    lines: list[str], font: str | None, angle: float, size: tuple[int, int], pitch: float = LINE_PITCH
) -> int:
    """The largest em height at which the lines, rotated by `angle` degrees, stay 2 pixels inside the canvas."""
    wide, high = text_extent(lines, font, pitch)
    cosine, sine = math.cos(math.radians(angle)), abs(math.sin(math.radians(angle)))
    return int(min((size[0] - 4) / (wide * cosine + high * sine), (size[1] - 4) / (wide * sine + high * cosine)))


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    ink: RGB | int,
    font: ImageFont.FreeTypeFont,
    anchor: str,
    **options: Any,
) -> list[Mark]:
    """As `ImageDraw.text`; returns the characters' marks, each as high as the whole text."""
    draw.text(place, text, ink, font, anchor=anchor, **options)
    left, top, _, bottom = draw.textbbox(place, text, font, anchor=anchor)
    edges = [left + font.getlength(text[:end]) for end in range(len(text) + 1)]
    return [
        Mark(character, (edges[place], top, edges[place + 1], bottom), order=(place, len(text) - 1 - place))
        for place, character in enumerate(text)
        if character != " "
    ]


def rotated(marks: list[Mark], angle: float, before: Image.Image, after: Image.Image) -> list[Mark]:
    """Marks after `before.rotate(angle, expand=True)` made `after`: their middles turn, their boxes stay upright."""
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))

    def turn(mark: Mark) -> Mark:
        left, top, right, bottom = mark.box
        x, y = (left + right - before.width) / 2, (top + bottom - before.height) / 2
        to_x, to_y = after.width / 2 + cosine * x + sine * y, after.height / 2 - sine * x + cosine * y
        half_width, half_height = (right - left) / 2, (bottom - top) / 2
        return mark._replace(box=(to_x - half_width, to_y - half_height, to_x + half_width, to_y + half_height))

    return [turn(mark) for mark in marks]


def shifted(marks: Iterable[Mark], x: float, y: float) -> tuple[Mark, ...]:
    return tuple(
        mark._replace(box=tuple(side + shift for side, shift in zip(mark.box, (x, y, x, y), strict=True)))
        for mark in marks
    )


def text_mask(lines: list[str], lettering: Lettering, column_gap: float = 0.0, names: Sequence[str] = ()) -> Picture:
    """The lines in white on black ("L"), cut to their ink.

    With `column_gap` (pixels), the last word of each line goes into a second, right-aligned column. `names`, one for
    each line, are what the lines' areas belong to.
    """
    font = load_font(lettering.font, lettering.size)
    wide, high = text_extent(lines, lettering.font, lettering.pitch)
    width = math.ceil(wide * lettering.size + column_gap)
    pad = lettering.size // 2  # glyphs may reach beyond their advance width
    mask = Image.new("L", (width + 2 * pad, math.ceil(high * lettering.size) + 2 * pad))
    draw = ImageDraw.Draw(mask)
    pitch = lettering.pitch * lettering.size
    areas = [Mark(name, (pad, pad + pitch * i, pad + width, pad + pitch * (i + 1))) for i, name in enumerate(names)]
    marks: list[Mark] = []
    for index, line in enumerate(lines):
        top = pad + pitch * index
        if column_gap:
            line, price = line.rsplit(" ", 1)
            marks += write(draw, (pad + width, top), price, 255, font, "ra")
        marks += write(draw, (pad, top), line, 255, font, "la")
    if lettering.angle:
        upright, mask = mask, mask.rotate(lettering.angle, Image.Resampling.BICUBIC, expand=True)
        marks, areas = (rotated(kept, lettering.angle, upright, mask) for kept in (marks, areas))
    box = mask.getbbox()
    return Picture(mask.crop(box), *(shifted(kept, -box[0], -box[1]) for kept in (marks, areas)))


def draw_lines(
    rng: random.Random,
    level: float,
    lines: list[str],
    lettering: Lettering,
    size: tuple[int, int],
    in_columns: bool,
    names: Sequence[str] = (),
) -> Picture:
    """The lines anywhere on a backdrop of the given size (near the middle at low levels); `names` as in `text_mask`."""
    slack = size[0] - 4 - text_extent(lines, lettering.font)[0] * lettering.size
    mask, *kept = text_mask(lines, lettering, rng.uniform(0, max(0.0, slack)) if in_columns else 0.0, names)
    backdrop = make_backdrop(rng, level, size)
    jitter = ramp(level, 0.05, 0.4)
    left, top = (
        2 + round(max(0, room) * (0.5 + jitter * rng.uniform(-0.5, 0.5)))
        for room in (size[0] - 4 - mask.width, size[1] - 4 - mask.height)
    )
    if backdrop.needs_patch:
        pad = round(lettering.size * rng.uniform(0.15, 0.6))
        right, bottom = left + mask.width, top + mask.height
        patch = (max(0, left - pad), max(0, top - pad), min(size[0], right + pad), min(size[1], bottom + pad))
        paint_patch(rng, backdrop, patch, min(left - patch[0], top - patch[1], patch[2] - right, patch[3] - bottom))
    backdrop.image.paste(text_color(rng, level, backdrop.tones), (left, top), mask)
    return Picture(backdrop.image, *(shifted(marks, left, top) for marks in kept))


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
def _outline(kind: str, inner_radius: float) -> tuple[tuple[float, float], ...]:
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


def _draw_outline(draw: ImageDraw.ImageDraw, kind: str, box: Box, fill: RGB | int, inner_radius: float) -> None:
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    if kind == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
        return
    corners = _outline(kind, inner_radius)
    draw.polygon([(lerp(left, right, x), lerp(top, bottom, y)) for x, y in corners], fill=fill)


def draw_shapes(rng: random.Random, level: float, backdrop: Backdrop, shapes: tuple[Shape, ...]) -> Picture:
    """The backdrop with the shapes, with or without smooth edges; each colour has one shade in a picture."""
    colors = {name: fill_color(rng, name, level, backdrop.tones) for name in dict.fromkeys(s.color for s in shapes)}
    inner_radius = round(rng.uniform(0.38, 0.5), 2)
    smooth = rng.random() < 0.3 * ramp(level, 0.4, 0.8)
    draw = ImageDraw.Draw(backdrop.image)
    for shape in shapes:
        if not smooth:
            _draw_outline(draw, shape.kind, shape.box, colors[shape.color], inner_radius)
            continue
        width, height = shape.box[2] - shape.box[0], shape.box[3] - shape.box[1]
        mask = Image.new("L", (3 * width, 3 * height))
        _draw_outline(ImageDraw.Draw(mask), shape.kind, (0, 0, *mask.size), 255, inner_radius)
        backdrop.image.paste(colors[shape.color], shape.box, mask.reduce(3))
    return Picture(backdrop.image, tuple(Mark(word, s.box) for s in shapes for word in (s.color, s.kind)))


def shape_area(rng: random.Random, backdrop: Backdrop) -> Box:
    """Where shapes may go: all of the canvas, or on a photograph a patch of it, which is painted."""
    width, height = backdrop.image.size
    if not backdrop.needs_patch:
        return 0, 0, width, height
    margins = [rng.uniform(0.02, 0.12) for _ in range(4)]
    left, top = round(width * margins[0]), round(height * margins[1])
    right, bottom = round(width * (1 - margins[2])), round(height * (1 - margins[3]))
    inset = min(width, height) // 32
    paint_patch(rng, backdrop, (left, top, right, bottom), inset)
    return left + inset, top + inset, right - inset, bottom - inset


def place_box(rng: random.Random, level: float, kind: str, area: Box, taken: list[Box]) -> Box | None:
    """A box for one more shape, 3 pixels or more away from those taken; None where no room was found."""
    room = (area[2] - area[0] - 4, area[3] - area[1] - 4)
    spread = ramp(level, 0.05, 0.7)
    largest = max(20.0, min(lerp(44, 200, spread), 0.9 * min(room)))
    for attempt in range(24):
        # Where shapes do not fit, ever smaller ones are tried.
        side = log_uniform(rng, min(lerp(32, 20, spread), largest), lerp(largest, 20, attempt / 24))
        squeeze = rng.uniform(0.75, 1.0) if kind in ("triangle", "diamond") else 1.0
        width, height = max(20, round(side * (squeeze if kind == "diamond" else 1))), max(20, round(side))
        height = max(20, round(side * squeeze)) if kind == "triangle" else height
        left, top = area[0] + 2 + rng.uniform(0, room[0] - width), area[1] + 2 + rng.uniform(0, room[1] - height)
        box = (round(left), round(top), round(left) + width, round(top) + height)
        if not any(_within(box, other, margin=3) for other in taken):
            return box
    return None


def _within(a: Box, b: Box, margin: int) -> bool:
    """Whether the boxes overlap or are nearer than `margin` pixels on both axes."""
    return a[0] < b[2] + margin and b[0] < a[2] + margin and a[1] < b[3] + margin and b[1] < a[3] + margin


# -------------------------------------------------------------------------------------------------------------- charts

TAB_COLORS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75))
CHART_TITLES = ("Sales", "Results", "Chart", "Values", "Visitors", "Scores", "Output", "Report")


@dataclass(frozen=True)
class Chart:
    kind: str  # "bar" or "line"
    values: dict[str, int]
    annotated: bool  # the values are written on top


@dataclass(frozen=True)
class ChartStyle:
    face: RGB
    ink: RGB
    fills: tuple[RGB, ...]  # one for each value; a line takes the first
    font: str | None
    font_size: int  # pixels
    title: str
    grid: bool
    from_zero: bool
    marker: bool
    wide_margins: bool  # as matplotlib's figures have them by default


def chart_style(rng: random.Random, level: float, size: tuple[int, int], chart: Chart) -> ChartStyle:
    """matplotlib's defaults at low levels, other faces, fonts and colours at high ones."""
    varied = ramp(level, 0.2, 0.8)
    face = SHADES["white"][0]
    if rng.random() < 0.3 * varied:
        face = blend(face, (rng.randrange(256), rng.randrange(256), rng.randrange(256)), rng.uniform(0.05, 0.25))
    ink = SHADES["black"][0]
    if rng.random() < 0.1 * varied:
        face, ink = blend(ink, face, 0.12), blend(SHADES["white"][0], ink, 0.1)
    if rng.random() < 0.5 * varied:
        shades = [shade(rng, name, level) for name in rng.sample(list(SHADES), k=len(SHADES))]
        palette = [color for color in shades if is_readable(color, (face,))]
    else:
        palette = list(TAB_COLORS)
    many = chart.kind == "bar" and rng.random() < 0.3 * varied
    fills = tuple(palette[index % len(palette) if many else 0] for index in range(len(chart.values)))
    part_of_side = lerp(0.11, 0.045, ramp(level, 0.1, 0.7))
    size_px = min(22.0, max(9.0, part_of_side * math.sqrt(size[0] * size[1]))) * lerp(1, rng.uniform(0.9, 1.35), varied)
    if rng.random() < 0.4 * varied:
        size_px = rng.uniform(11, 16)  # 10 points, matplotlib's default, at 80 to 115 dots per inch
    return ChartStyle(
        face=face,
        ink=ink,
        fills=fills,
        font=pick_font(rng, level) if rng.random() < 0.6 else FONT_FILES[0],
        font_size=max(9, round(min(size_px, min(size) / 9))),
        title=rng.choice(CHART_TITLES) if rng.random() < 0.4 * varied and min(size) >= 120 else "",
        grid=rng.random() < 0.25 * varied,
        from_zero=chart.kind == "bar" or rng.random() < lerp(1.0, 0.4, varied),
        marker=rng.random() >= 0.2 * varied,
        wide_margins=rng.random() < 0.4 * varied,
    )


def axis_limits(chart: Chart, style: ChartStyle, height: int) -> tuple[float, float]:
    """Of the value axis, `height` pixels long: matplotlib's margin of 5 %, with room for values on top.

    Without a title wide margins are room enough.
    """
    low, high = 0.0 if style.from_zero else float(min(chart.values.values())), float(max(chart.values.values()))
    margin = 0.05 * (high - low)
    needs_room = chart.annotated and (style.title or not style.wide_margins)
    label = min(0.35, 1.5 * style.font_size / height) if needs_room else 0.0  # of the axis
    top = high + max(margin, (high - low) * label / (1 - label))
    return low if chart.kind == "bar" else low - margin, top


def _tick_step(span: float, most: float) -> int:
    """The smallest round step that makes at most `most` intervals of the span."""
    return next((step for step in (1, 2, 5, 10, 20, 25) if span / step <= most), 50)


def _plot_box(style: ChartStyle, size: tuple[int, int], mark: int) -> Box:
    """The frame of the axes: beside it are ticks of length `mark`, their labels and the title."""
    unit = style.font_size
    left = mark + 5 + math.ceil(load_font(style.font, unit).getlength("100"))
    top = round(unit * (1.8 if style.title else 0.8))
    right, bottom = size[0] - max(4, unit // 2), size[1] - mark - 3 - round(1.35 * unit)
    if style.wide_margins:
        left, top = max(left, round(0.125 * size[0])), max(top, round(0.12 * size[1]), 2 * unit)
        right, bottom = min(right, round(0.9 * size[0])), min(bottom, round(0.89 * size[1]))
    return left, top, right, bottom


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels, `low` to `start` and `high` to `end`."""

    low: float
    high: float
    start: int
    end: int

    def __call__(self, value: float) -> int:
        return round(lerp(self.start, self.end, (value - self.low) / (self.high - self.low)))


def _draw_bars(image: Image.Image, chart: Chart, style: ChartStyle, xs: _Axis, ys: _Axis) -> None:
    draw = ImageDraw.Draw(image)
    for index, value in enumerate(chart.values.values()):
        draw.rectangle((xs(index - 0.4), ys(value), xs(index + 0.4), ys(0)), fill=style.fills[index])


def _draw_line(image: Image.Image, chart: Chart, style: ChartStyle, xs: _Axis, ys: _Axis) -> None:
    # At twice the size and then reduced: Pillow's own lines have jagged edges, matplotlib's have not.
    points = [(2 * xs(index), 2 * ys(value)) for index, value in enumerate(chart.values.values())]
    width = max(3, round(style.font_size / 3.3))
    mask = Image.new("L", (2 * image.width, 2 * image.height))
    draw = ImageDraw.Draw(mask)
    draw.line(points, 255, width, joint="curve")
    if style.marker:
        for point in points:
            draw.circle(point, 2 * width, 255)
    image.paste(style.fills[0], (0, 0, *image.size), mask.reduce(2))


def draw_chart(rng: random.Random, level: float, size: tuple[int, int], chart: Chart) -> Picture:
    """An imitation of matplotlib's look with Pillow, some twenty times as fast."""
    style = chart_style(rng, level, size, chart)
    image = Image.new("RGB", size, style.face)
    draw = ImageDraw.Draw(image)
    font = load_font(style.font, style.font_size)
    stroke, mark = max(1, round(style.font_size / 14)), max(2, round(style.font_size / 3))
    box = _plot_box(style, size, mark)
    low, high = axis_limits(chart, style, box[3] - box[1])
    ys = _Axis(low, high, box[3], box[1])
    marks: list[Mark] = []
    areas: list[Mark] = []
    step = _tick_step(high - low, max(2.0, min(9.0, (box[3] - box[1]) / (1.8 * style.font_size))))
    for tick in range(math.ceil(low / step) * step, math.floor(high) + 1, step):
        y = ys(tick)
        if style.grid:
            draw.line((box[0], y, box[2], y), blend(style.face, style.ink, 0.3), stroke)
        draw.line((box[0] - mark, y, box[0], y), style.ink, stroke)
        marks += write(draw, (box[0] - mark - 2, y), str(tick), style.ink, font, "rm")
    edge = 0.4 if chart.kind == "bar" else 0.0
    last = len(chart.values) - 1
    margin = 0.05 * (last + 2 * edge)
    xs = _Axis(-edge - margin, last + edge + margin, box[0], box[2])
    (_draw_bars if chart.kind == "bar" else _draw_line)(image, chart, style, xs, ys)
    draw.rectangle(box, outline=style.ink, width=stroke)
    for index, (label, value) in enumerate(chart.values.items()):
        draw.line((xs(index), box[3], xs(index), box[3] + mark), style.ink, stroke)
        marks += write(draw, (xs(index), box[3] + mark + 2), label, style.ink, font, "mt")
        column = (xs(index - 0.5), box[1], xs(index + 0.5), box[3])
        areas += [Mark(label, column, value=value), Mark(str(value // 10), column)]
        if chart.annotated:
            lift = 2 if chart.kind == "bar" else 2 + style.font_size // 4
            halo = {"stroke_width": 1, "stroke_fill": style.face}
            marks += write(draw, (xs(index), ys(value) - lift), str(value), style.ink, font, "mb", **halo)
    marks += write(draw, ((box[0] + box[2]) / 2, 0.2 * style.font_size), style.title, style.ink, font, "mt")
    return Picture(image, tuple(marks), tuple(areas))


def draw_chart_with_matplotlib(rng: random.Random, level: float, size: tuple[int, int], chart: Chart) -> Picture:
    """The same chart by matplotlib itself, which chooses the ticks: tens of milliseconds."""
    style = chart_style(rng, level, size, chart)
    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, facecolor=_unit(style.face))
    canvas = FigureCanvasAgg(figure)
    left, top, right, bottom = _plot_box(style, size, mark=6)
    frame = (left / size[0], 1 - bottom / size[1], (right - left) / size[0], (bottom - top) / size[1])
    axes = figure.add_axes(frame, facecolor=_unit(style.face))
    points = 0.72 * style.font_size  # 100 dots and 72 points make an inch
    font = FontProperties(fname=_FONT_FOLDER / (style.font or FONT_FILES[0]), size=points)
    places, values = range(len(chart.values)), list(chart.values.values())
    if chart.kind == "bar":
        axes.bar(places, values, color=[_unit(fill) for fill in style.fills])
    else:
        axes.plot(places, values, color=_unit(style.fills[0]), marker="o" if style.marker else None)
    axes.set_xticks(places, list(chart.values))
    axes.set_ylim(*axis_limits(chart, style, bottom - top))
    axes.set_title(style.title, fontproperties=font, color=_unit(style.ink), pad=3)
    axes.tick_params(color=_unit(style.ink), length=3)
    if style.grid:
        axes.grid(axis="y", alpha=0.4)
        axes.set_axisbelow(True)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set(fontproperties=font, color=_unit(style.ink))
    for spine in axes.spines.values():
        spine.set_color(_unit(style.ink))
    if chart.annotated:
        for place, value in enumerate(values):
            offset = {"xytext": (0, 2 if chart.kind == "bar" else 5), "textcoords": "offset points", "ha": "center"}
            axes.annotate(str(value), (place, value), **offset, fontproperties=font, color=_unit(style.ink))
    canvas.draw()
    return Picture(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))


def _unit(color: RGB) -> tuple[float, ...]:
    return tuple(channel / 255 for channel in color)
