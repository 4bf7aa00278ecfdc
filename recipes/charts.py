"""Bar and line charts: by matplotlib, and by a fast imitation of its look with Pillow.

Boxes, sizes and `level` are those of `drawing.py`.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image, ImageDraw

from .drawing import (
    FONT_FILES,
    FONT_FOLDER,
    RGB,
    SHADES,
    Annotation,
    Box,
    Picture,
    blend,
    is_readable,
    lerp,
    load_font,
    pick_font,
    ramp,
    shade,
    write_text,
)

TAB_COLORS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75))
"""The first colors of matplotlib's default cycle."""
TITLES = ("Sales", "Results", "Chart", "Values", "Visitors", "Scores", "Output", "Report")


@dataclass(frozen=True)
class Chart:
    kind: str  # "bar" or "line"
    values: dict[str, int]
    has_value_labels: bool  # the values are written above the bars or points


@dataclass(frozen=True)
class ChartStyle:
    face: RGB
    text: RGB
    fills: tuple[RGB, ...]  # one for each value; a line takes the first
    font: str | None
    font_size: int  # pixels
    title: str
    grid: bool
    from_zero: bool
    marker: bool
    wide_margins: bool  # matplotlib's default for figures


def chart_style(rng: random.Random, level: float, size: tuple[int, int], chart: Chart) -> ChartStyle:
    """matplotlib's defaults at low levels; other faces, fonts and colors at high levels."""
    varied = ramp(level, 0.2, 0.8)
    face = SHADES["white"][0]
    if rng.random() < 0.3 * varied:
        face = blend(face, (rng.randrange(256), rng.randrange(256), rng.randrange(256)), rng.uniform(0.05, 0.25))
    text = SHADES["black"][0]
    if rng.random() < 0.1 * varied:
        face, text = blend(text, face, 0.12), blend(SHADES["white"][0], text, 0.1)
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
        text=text,
        fills=fills,
        font=pick_font(rng, level) if rng.random() < 0.6 else FONT_FILES[0],
        font_size=max(9, round(min(size_px, min(size) / 9))),
        title=rng.choice(TITLES) if rng.random() < 0.4 * varied and min(size) >= 120 else "",
        grid=rng.random() < 0.25 * varied,
        from_zero=chart.kind == "bar" or rng.random() < lerp(1.0, 0.4, varied),
        marker=rng.random() >= 0.2 * varied,
        wide_margins=rng.random() < 0.4 * varied,
    )


def axis_limits(chart: Chart, style: ChartStyle, height: int) -> tuple[float, float]:
    """Lowest and highest value of an axis `height` pixels long: matplotlib's margin of 5 %, plus room for value labels.

    Wide margins leave room for the labels unless there is a title.
    """
    low, high = 0.0 if style.from_zero else float(min(chart.values.values())), float(max(chart.values.values()))
    margin = 0.05 * (high - low)
    needs_room = chart.has_value_labels and (style.title or not style.wide_margins)
    label = min(0.35, 1.5 * style.font_size / height) if needs_room else 0.0  # share of the axis
    top = high + max(margin, (high - low) * label / (1 - label))
    return low if chart.kind == "bar" else low - margin, top


def _tick_step(span: float, most: float) -> int:
    """The smallest round step that divides the span into at most `most` intervals."""
    return next((step for step in (1, 2, 5, 10, 20, 25) if span / step <= most), 50)


def plot_box(style: ChartStyle, size: tuple[int, int], tick_length: int) -> Box:
    """The frame of the axes; ticks, their labels and the title are outside."""
    unit = style.font_size
    left = tick_length + 5 + math.ceil(load_font(style.font, unit).getlength("100"))
    top = round(unit * (1.8 if style.title else 0.8))
    right, bottom = size[0] - max(4, unit // 2), size[1] - tick_length - 3 - round(1.35 * unit)
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
    # Drawn at twice the size and reduced, because Pillow does not smooth lines.
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
    """An imitation of matplotlib's look with Pillow, about twenty times as fast."""
    style = chart_style(rng, level, size, chart)
    image = Image.new("RGB", size, style.face)
    draw = ImageDraw.Draw(image)
    font = load_font(style.font, style.font_size)
    stroke, tick_length = max(1, round(style.font_size / 14)), max(2, round(style.font_size / 3))
    box = plot_box(style, size, tick_length)
    low, high = axis_limits(chart, style, box[3] - box[1])
    ys = _Axis(low, high, box[3], box[1])
    characters: list[Annotation] = []
    columns: list[Annotation] = []
    step = _tick_step(high - low, max(2.0, min(9.0, (box[3] - box[1]) / (1.8 * style.font_size))))
    for tick in range(math.ceil(low / step) * step, math.floor(high) + 1, step):
        y = ys(tick)
        if style.grid:
            draw.line((box[0], y, box[2], y), blend(style.face, style.text, 0.3), stroke)
        draw.line((box[0] - tick_length, y, box[0], y), style.text, stroke)
        characters += write_text(draw, (box[0] - tick_length - 2, y), str(tick), style.text, font, "rm")
    edge = 0.4 if chart.kind == "bar" else 0.0
    last = len(chart.values) - 1
    margin = 0.05 * (last + 2 * edge)
    xs = _Axis(-edge - margin, last + edge + margin, box[0], box[2])
    (_draw_bars if chart.kind == "bar" else _draw_line)(image, chart, style, xs, ys)
    draw.rectangle(box, outline=style.text, width=stroke)
    for index, (label, value) in enumerate(chart.values.items()):
        draw.line((xs(index), box[3], xs(index), box[3] + tick_length), style.text, stroke)
        characters += write_text(draw, (xs(index), box[3] + tick_length + 2), label, style.text, font, "mt")
        column = (xs(index - 0.5), box[1], xs(index + 0.5), box[3])
        columns += [Annotation(label, column, value=value), Annotation(str(value // 10), column)]
        if chart.has_value_labels:
            above = (xs(index), ys(value) - (2 if chart.kind == "bar" else 2 + style.font_size // 4))
            characters += write_text(draw, above, str(value), style.text, font, "mb", outline=style.face)
    center = ((box[0] + box[2]) / 2, 0.2 * style.font_size)
    characters += write_text(draw, center, style.title, style.text, font, "mt")
    return Picture(image, tuple(characters), tuple(columns))


def draw_chart_with_matplotlib(rng: random.Random, level: float, size: tuple[int, int], chart: Chart) -> Picture:
    """The same chart by matplotlib, without annotations; takes tens of milliseconds."""
    style = chart_style(rng, level, size, chart)
    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, facecolor=_unit(style.face))
    canvas = FigureCanvasAgg(figure)
    left, top, right, bottom = plot_box(style, size, tick_length=6)
    frame = (left / size[0], 1 - bottom / size[1], (right - left) / size[0], (bottom - top) / size[1])
    axes = figure.add_axes(frame, facecolor=_unit(style.face))
    points = 0.72 * style.font_size  # an inch is 100 dots and 72 points
    font = FontProperties(fname=FONT_FOLDER / (style.font or FONT_FILES[0]), size=points)
    places, values = range(len(chart.values)), list(chart.values.values())
    if chart.kind == "bar":
        axes.bar(places, values, color=[_unit(fill) for fill in style.fills])
    else:
        axes.plot(places, values, color=_unit(style.fills[0]), marker="o" if style.marker else None)
    axes.set_xticks(places, list(chart.values))
    axes.set_ylim(*axis_limits(chart, style, bottom - top))
    axes.set_title(style.title, fontproperties=font, color=_unit(style.text), pad=3)
    axes.tick_params(color=_unit(style.text), length=3)
    if style.grid:
        axes.grid(axis="y", alpha=0.4)
        axes.set_axisbelow(True)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set(fontproperties=font, color=_unit(style.text))
    for spine in axes.spines.values():
        spine.set_color(_unit(style.text))
    if chart.has_value_labels:
        for place, value in enumerate(values):
            offset = {"xytext": (0, 2 if chart.kind == "bar" else 5), "textcoords": "offset points", "ha": "center"}
            axes.annotate(str(value), (place, value), **offset, fontproperties=font, color=_unit(style.text))
    canvas.draw()
    return Picture(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))


def _unit(color: RGB) -> tuple[float, ...]:
    """RGB of 0 to 1, as matplotlib takes it."""
    return tuple(channel / 255 for channel in color)
