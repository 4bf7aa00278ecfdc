"""The tasks: samples of pictures with questions and their answers, drawn from a seed.

    content (a text, a receipt, a chart, a scene) -> picture and questions -> questions in words -> Sample

`_TASKS`, near the end of the file, lists all tasks. `level` in [0, 1] is the difficulty of one sample, as in
`drawing.py`.

Encoding a picture costs far more than answering a question about it, so a training picture gets several questions
if possible. Three tasks serve training alone: DESCRIBE asks for everything in a picture, TEXT_PRETRAINING has
no pictures, and PAGE is a picture full of characters without a question, for the auxiliary labels of `labels.py`.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

from PIL import Image

from . import charts, drawing
from .charts import Chart
from .drawing import Box, Picture, Shape, TextStyle, first_part, lerp, log_uniform, pick_font, ramp, weighted
from .questions import (
    Accepted,
    Question,
    Receipt,
    Scene,
    ask_arithmetic,
    ask_chart,
    ask_grounding,
    ask_receipt,
    ask_scene,
    choose_comparison,
    compare_scenes,
    make_chart,
    make_receipt,
    make_scene,
    make_text,
    money,
    phrase,
    thousandths,
    usable_colors,
)
from .words import ALPHABET, GOODS, WORDS

Content = TypeVar("Content")

SPLITS = ("train", "heldout")
MAX_QUESTIONS = 6  # about a training picture
EASIER_SHARE = 0.2  # of training samples: drawn below the given difficulty, so that easy ones are not forgotten
SMALL_TEXT_SKEW = 3  # of training texts, at level 1: more small font sizes, which are hardest to read
DOT_LEADER_SHARE = 0.1  # of training receipts, at level 1: dots lead from the items to the prices
MATPLOTLIB_SHARE = 0.2  # of training charts, at level 1
MIN_HEIGHT_TO_ESTIMATE = 128  # pixels: lower charts get value labels, because their axis is too coarse


@dataclass(frozen=True)
class Sample:
    """A conversation about images, which precede its first question.

    `native_size`: the model gets the images at their own size and at one scale.
    """

    task: str
    pictures: list[Picture]
    turns: list[tuple[str, str]]  # question, answer
    accepted: list[Accepted]  # one for each turn
    native_size: bool = False

    @property
    def images(self) -> list[Image.Image]:
        return [picture.image for picture in self.pictures]


class Drawn(NamedTuple):
    """A sample before its questions are worded; `opening` precedes the first question."""

    pictures: list[Picture]
    questions: list[Question]
    opening: str = ""


# ---------------------------------------------------------------------------------------------------- text and receipt


def _draw_fitting(
    rng: random.Random,
    level: float,
    make: Callable[[random.Random, float], Content],
    draw: Callable[[random.Random, float, Content], Picture | None],
) -> tuple[Content, Picture]:
    """Content and its picture: up to 20 canvases are tried for long content before other content is made."""
    while True:
        content = make(rng, level)
        for _ in range(20):
            picture = draw(rng, level, content)
            if picture is not None:
                return content, picture


def draw_text(rng: random.Random, level: float, text: str, skew: float = 1.0) -> Picture | None:
    """The text on a canvas; None if it does not fit at the smallest font size. `skew` is that of the font sizes."""
    size = drawing.canvas_size(rng, level, easiest_side=64)
    font = pick_font(rng, level)
    angle = rng.uniform(-5, 5) * ramp(level, 0.4, 0.9) if rng.random() < 0.7 else 0.0
    spread = ramp(level, 0.05, 0.7)
    # Up to 96 pixels for the height of capitals, whose font is a third larger.
    highest = min(lerp(40, 128, spread), drawing.largest_font_size([text], font, angle, size))
    lowest = lerp(40, 16, spread)
    if highest < lowest:
        return None
    style = TextStyle(font, round(log_uniform(rng, lowest, highest, skew)), angle)
    return drawing.draw_lines(rng, level, [text], style, size, in_columns=False)


def draw_receipt(rng: random.Random, level: float, receipt: Receipt, dot_leader_share: float = 0.0) -> Picture | None:
    """A line for each item and one for the total; None if they do not fit at the smallest font size."""
    size = drawing.canvas_size(rng, level, easiest_side=160)
    font = pick_font(rng, level)
    case = rng.choice(first_part((str.lower, str.capitalize, str.upper), 1, ramp(level, 0.1, 0.5)))
    prices = {case(name): money(cents) for name, cents in receipt.items.items()} | {"TOTAL": money(receipt.total)}
    lines = [f"{name} {price}" for name, price in prices.items()]
    has_dots = dot_leader_share > 0 and rng.random() < dot_leader_share * ramp(level, 0.5, 1.0)
    if has_dots:
        longest, more = max(map(len, lines)), rng.randint(2, 6)
        lines = [f"{name} {'.' * (longest + more - len(name + price))} {price}" for name, price in prices.items()]
    spacing = lerp(drawing.LINE_SPACING, rng.uniform(1.1, 2.0), ramp(level, 0.2, 0.8))
    highest = min(lerp(26, 56, ramp(level, 0.1, 0.8)), drawing.largest_font_size(lines, font, 0, size, spacing))
    lowest = lerp(22, 12, ramp(level, 0.1, 0.8))
    if highest < lowest:
        return None
    style = TextStyle(font, round(log_uniform(rng, lowest, highest)), line_spacing=spacing)
    in_columns = not has_dots and rng.random() < 0.5 * ramp(level, 0.2, 0.5)
    return drawing.draw_lines(rng, level, lines, style, size, in_columns, names=[*receipt.items, "total"])


def _drawn_receipt(rng: random.Random, level: float, split: str) -> tuple[Receipt, Picture]:
    share = DOT_LEADER_SHARE if split == "train" else 0.0
    return _draw_fitting(rng, level, make_receipt, partial(draw_receipt, dot_leader_share=share))


def _text(rng: random.Random, level: float, split: str) -> Drawn:
    skew = lerp(1, SMALL_TEXT_SKEW, level) if split == "train" else 1.0
    text, picture = _draw_fitting(rng, level, make_text, partial(draw_text, skew=skew))
    return Drawn([picture], [Question("text.read", text)])


def _receipt(rng: random.Random, level: float, split: str) -> Drawn:
    receipt, picture = _drawn_receipt(rng, level, split)
    return Drawn([picture], _questions(rng, split, lambda: ask_receipt(rng, receipt)))


# ---------------------------------------------------------------------------------------------------- chart and shapes


def _drawn_chart(rng: random.Random, level: float, split: str) -> tuple[Chart, Picture]:
    """Held-out charts are drawn by matplotlib; most training charts by its fast imitation."""
    share = MATPLOTLIB_SHARE * ramp(level, 0.4, 1.0)
    by_matplotlib = split == "heldout" or rng.random() < share
    chart = make_chart(rng, level)
    size = drawing.canvas_size(rng, level, easiest_side=160, smallest_side=96)
    if size[1] < MIN_HEIGHT_TO_ESTIMATE:
        chart = replace(chart, has_value_labels=True)
    draw = charts.draw_chart_with_matplotlib if by_matplotlib else charts.draw_chart
    return chart, draw(rng, level, size, chart)


@dataclass(frozen=True)
class _Canvas:
    """An empty picture for a scene: where shapes may go, and the colors that can be seen there."""

    background: drawing.Background
    area: Box
    colors: tuple[str, ...]

    def make_scene(self, rng: random.Random, level: float) -> Scene:
        return make_scene(rng, level, self.background.image.size, self.area, self.colors)

    def draw(self, rng: random.Random, level: float, scene: Scene) -> Picture:
        return drawing.draw_shapes(rng, level, self.background, scene.shapes)


def _empty_canvas(rng: random.Random, level: float) -> _Canvas:
    background = drawing.make_background(rng, level, drawing.canvas_size(rng, level, easiest_side=96))
    area = drawing.shape_area(rng, background)
    return _Canvas(background, area, drawing.fill_colors(usable_colors(level), background.tones))


def _drawn_scene(rng: random.Random, level: float) -> tuple[Scene, Picture]:
    canvas = _empty_canvas(rng, level)
    scene = canvas.make_scene(rng, level)
    return scene, canvas.draw(rng, level, scene)


def _with_unique_shape(rng: random.Random, level: float, make: Callable[[random.Random, float], Scene]) -> Scene:
    while True:
        scene = make(rng, level)
        if scene.unique_shapes:
            return scene


def _comparable_scenes(
    rng: random.Random, level: float, makers: Sequence[Callable[[random.Random, float], Scene]]
) -> tuple[list[Scene], Question]:
    """Scenes and a question about them; all answers to a question are equally frequent."""
    comparison = choose_comparison(rng, level)
    while True:
        scenes = [make(rng, level) for make in makers]
        question = compare_scenes(rng, scenes, *comparison)
        if question is not None:
            return scenes, question


def _chart(rng: random.Random, level: float, split: str) -> Drawn:
    chart, picture = _drawn_chart(rng, level, split)
    return Drawn([picture], _questions(rng, split, lambda: ask_chart(rng, chart, is_drawn=True)))


def _scene(rng: random.Random, level: float, split: str) -> Drawn:
    scene, picture = _drawn_scene(rng, level)
    return Drawn([picture], _questions(rng, split, lambda: ask_scene(rng, level, scene)))


def _grounding(rng: random.Random, level: float, split: str) -> Drawn:
    canvas = _empty_canvas(rng, level)
    scene = _with_unique_shape(rng, level, canvas.make_scene)
    return Drawn([canvas.draw(rng, level, scene)], _questions(rng, split, lambda: ask_grounding(rng, scene)))


def _two_images(rng: random.Random, level: float, split: str) -> Drawn:
    canvases = [_empty_canvas(rng, level) for _ in range(2)]
    scenes, question = _comparable_scenes(rng, level, [canvas.make_scene for canvas in canvases])
    pictures = [canvas.draw(rng, level, scene) for canvas, scene in zip(canvases, scenes, strict=True)]
    first = iter([question])

    def ask() -> Question:
        return next(first, None) or compare_scenes(rng, scenes, *choose_comparison(rng, level)) or question

    return Drawn(pictures, _questions(rng, split, ask))


# --------------------------------------------------------------------------------------------------------- other tasks


def _questions(rng: random.Random, split: str, ask: Callable[[], Question]) -> list[Question]:
    """One question about a held-out picture, up to MAX_QUESTIONS different ones about a training picture."""
    draws = 1 if split == "heldout" else rng.randint(1, MAX_QUESTIONS)
    questions = [ask() for _ in range(draws)]
    return list({(question.kind, *question.fields.items()): question for question in questions}.values())


def _two_questions(ask: Callable[[], Question]) -> list[Question]:
    first = second = ask()
    while (second.kind, second.fields) == (first.kind, first.fields):
        second = ask()
    return [first, second]


def _two_turns(rng: random.Random, level: float, split: str) -> Drawn:
    if rng.random() < 0.5:
        receipt, picture = _drawn_receipt(rng, level, split)
        return Drawn([picture], _two_questions(lambda: ask_receipt(rng, receipt)))
    scene, picture = _drawn_scene(rng, level)
    return Drawn([picture], _two_questions(lambda: ask_scene(rng, level, scene)))


def _text_only(rng: random.Random, level: float, split: str) -> Drawn:
    return Drawn([], [ask_arithmetic(rng, level)])


def _describe(rng: random.Random, level: float, split: str) -> Drawn:
    kind = weighted(rng, {"lines": 2.0, "receipt": 1.0, "chart": 0.7, "scene": 1.0})
    if kind == "lines":
        parts, picture = _draw_fitting(rng, level, _make_lines, _draw_lines)
    elif kind == "receipt":
        receipt, picture = _drawn_receipt(rng, level, split)
        parts = [*receipt.lines, f"TOTAL {money(receipt.total)}"]
    elif kind == "chart":
        chart, picture = _drawn_chart(rng, level, split)
        parts = [f"{label}={value}" for label, value in chart.values.items()]
    else:
        scene, picture = _drawn_scene(rng, level)
        from_left = sorted(scene.shapes, key=lambda shape: shape.box[0] + shape.box[2])
        parts = [shape.name for shape in from_left]
    return Drawn([picture], [Question(f"describe.{kind}", "\n".join(parts))])


def _make_lines(rng: random.Random, level: float) -> list[str]:
    return [make_text(rng, level) for _ in range(rng.randint(2, round(lerp(2, 5, ramp(level, 0.02, 0.4)))))]


def _draw_lines(rng: random.Random, level: float, lines: list[str]) -> Picture | None:
    size = drawing.canvas_size(rng, level, easiest_side=64)
    font = pick_font(rng, level)
    highest = min(lerp(28, 56, ramp(level, 0.1, 0.8)), drawing.largest_font_size(lines, font, 0, size))
    lowest = lerp(22, 14, ramp(level, 0.1, 0.8))
    if highest < lowest:
        return None
    style = TextStyle(font, round(log_uniform(rng, lowest, highest)))
    return drawing.draw_lines(rng, level, lines, style, size, in_columns=False)


def _page(rng: random.Random, level: float, split: str) -> Drawn:
    """A small picture full of characters of any height, without a question.

    All of its visual tokens have labels, so it needs no curriculum: difficulties are mixed from the start.
    """
    level *= rng.random()
    size = tuple(round(log_uniform(rng, 64, 224)) for _ in range(2))
    font = pick_font(rng, level)
    height = log_uniform(rng, lerp(32, 11, level), min(64, min(size) / 1.4))
    room = size[0] / (0.6 * height)
    lines = [_page_line(rng, room) for _ in range(max(1, int(size[1] / (1.25 * height))))]
    angle = rng.uniform(-5, 5) * level if rng.random() < 0.4 else 0.0
    style = TextStyle(font, min(round(height), drawing.largest_font_size(lines, font, angle, size)), angle)
    return Drawn([drawing.draw_lines(rng, level, lines, style, size, in_columns=False)], [])


def _page_line(rng: random.Random, room: float) -> str:
    """Words, prices, numbers and mixed strings that fit into `room` characters; at least one character."""
    words: list[str] = []
    while True:
        kind = rng.choice(("word", "price", "number", "mix"))
        if kind == "word":
            word = rng.choice((str.lower, str.capitalize, str.upper))(rng.choice(WORDS + GOODS))
        elif kind == "price":
            word = money(rng.randint(50, 9999))
        else:
            word = "".join(rng.choices(ALPHABET[:10] if kind == "number" else ALPHABET, k=rng.randint(1, 6)))
        if len(" ".join([*words, word])) > room:
            return " ".join(words) or word[: max(1, int(room))]
        words.append(word)


# ------------------------------------------------------------------------------------------------ pretraining on text


def _pretrain_text(rng: random.Random, level: float, split: str) -> Drawn:
    """For the stage on text alone: arithmetic, copying, and questions about pictures described in words."""
    kind = weighted(rng, {"described": 0.6, "copy": 0.25, "arithmetic": 0.15})
    arithmetic = ask_arithmetic(rng, level)
    if kind == "copy":
        text = make_text(rng, level)
        return Drawn([], [Question("pretrain_text.copy", text, {"text": text})])
    if kind == "described":
        description, questions = rng.choice(_DESCRIPTIONS)(rng, level)
        return Drawn([], questions, opening=f"{description} ")
    return Drawn([], [arithmetic])


def _listed(shapes: tuple[Shape, ...]) -> str:
    return ", ".join(shape.name for shape in shapes)


def _scene_in_words(rng: random.Random, level: float) -> Scene:
    return make_scene(rng, level, (400, 400), (0, 0, 400, 400), usable_colors(level))


def _text_in_words(rng: random.Random, level: float) -> tuple[str, list[Question]]:
    text = make_text(rng, level)
    return f"Text: {text}.", [Question("text.read", text)]


def _receipt_in_words(rng: random.Random, level: float) -> tuple[str, list[Question]]:
    receipt = make_receipt(rng, level)
    questions = _two_questions(lambda: ask_receipt(rng, receipt))
    return f"Receipt: {', '.join(receipt.lines)}, TOTAL {money(receipt.total)}.", questions


def _chart_in_words(rng: random.Random, level: float) -> tuple[str, list[Question]]:
    chart = make_chart(rng, level)
    values = ", ".join(f"{label}={value}" for label, value in chart.values.items())
    return f"Chart: {values}.", [ask_chart(rng, chart, is_drawn=False)]


def _shapes_in_words(rng: random.Random, level: float) -> tuple[str, list[Question]]:
    scene = _scene_in_words(rng, level)
    return f"Shapes: {_listed(scene.shapes)}.", _two_questions(lambda: ask_scene(rng, level, scene))


def _boxes_in_words(rng: random.Random, level: float) -> tuple[str, list[Question]]:
    scene = _with_unique_shape(rng, level, _scene_in_words)
    boxes = ((shape.name, thousandths(shape.box, scene.size)) for shape in scene.shapes)
    places = (f"{name} at {' '.join(map(str, box))}" for name, box in boxes)
    return f"Shapes: {', '.join(places)}.", [ask_grounding(rng, scene)]


def _two_images_in_words(rng: random.Random, level: float) -> tuple[str, list[Question]]:
    scenes, question = _comparable_scenes(rng, level, [_scene_in_words, _scene_in_words])
    first, second = (_listed(scene.shapes) for scene in scenes)
    return f"First image: {first}. Second image: {second}.", [question]


_DESCRIPTIONS = (
    _text_in_words,
    _receipt_in_words,
    _chart_in_words,
    _shapes_in_words,
    _boxes_in_words,
    _two_images_in_words,
)


# ------------------------------------------------------------------------------------------------------------- samples

DESCRIBE, TEXT_PRETRAINING, PAGE = "describe", "pretrain_text", "page"
"""Tasks for training alone."""

_TASKS: dict[str, Callable[[random.Random, float, str], Drawn]] = {
    "text": _text,
    "receipt": _receipt,
    "chart": _chart,
    "scene": _scene,
    "grounding": _grounding,
    "two_images": _two_images,
    "two_turns": _two_turns,
    "text_only": _text_only,
    DESCRIBE: _describe,
    TEXT_PRETRAINING: _pretrain_text,
    PAGE: _page,
}
ALL_TASKS = tuple(_TASKS)
"""A task's place in this tuple is its index in batches and in the curriculum."""
TASKS = tuple(task for task in ALL_TASKS if task not in (DESCRIBE, TEXT_PRETRAINING, PAGE))
"""The tasks that the model is scored on."""


def make_sample(task: str, seed: int, difficulty: float = 1.0, split: str = "train") -> Sample:
    """The sample that belongs to these arguments: the same pixels and text on every call.

    `task` is one of ALL_TASKS. `difficulty` 0 is the easiest version of the task, 1 its full range. A fifth of the
    training samples are easier than `difficulty`, and most have several questions. Held-out samples have exactly that
    difficulty and one question (`two_turns` two).

    Raises:
        ValueError: an unknown task or split, or a difficulty outside [0, 1].
    """
    if task not in ALL_TASKS:
        raise ValueError(f"task must be one of {ALL_TASKS}, got {task!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty must be between 0 and 1, got {difficulty!r}")
    rng = _seeded(task, split, seed)
    is_easier = split == "train" and rng.random() < EASIER_SHARE
    level = difficulty * rng.random() if is_easier else float(difficulty)
    pictures, questions, opening = _TASKS[task](rng, level, split)
    turns = [(phrase(rng, level, question), question.answer) for question in questions]
    if opening:
        turns[0] = (opening + turns[0][0], turns[0][1])
    return Sample(task, pictures, turns, [question.accepted for question in questions])


def _seeded(task: str, split: str, seed: int) -> random.Random:
    """Independent randomness for each triple; Python's own hash() differs between processes."""
    digest = hashlib.sha256(f"{task}/{split}/{seed}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
