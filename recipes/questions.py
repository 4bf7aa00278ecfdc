"""What the training data asks: contents (a text, a receipt, a chart, a scene), questions about them, and their answers.

`level` in [0, 1] is the difficulty of one sample, as in `drawing.py`.
"""

import math
import random
import re
from dataclasses import dataclass, field

from .charts import Chart
from .drawing import SHADES, SHAPE_KINDS, Box, Shape, first_part, lerp, log_uniform, place_box, ramp, weighted
from .words import ALPHABET, CHART_LABELS, GOODS, OTHER_GOODS, OTHER_NAMES, WORDINGS, WORDS

UNUSUAL_ITEM_SHARE = 0.4  # of a receipt's items, at level 1: not in GOODS; half of these receipts use arbitrary words
BOTH_PRESENT_SHARE = 0.5  # of the questions which of two images has more, at level 1: both have some
ESTIMATE_TOLERANCE = 2  # of a chart's values without value labels
MIN_IOU = 0.5


@dataclass(frozen=True)
class Accepted:
    """What counts as right besides the exact answer.

    Numbers within `tolerance`; or, if `box` (x1, y1, x2, y2 in thousandths of the image) is set, any box with an IoU of
    at least 0.5.
    """

    tolerance: int = 0
    box: Box | None = None


@dataclass(frozen=True)
class Question:
    """A question, not yet worded, and its answer."""

    kind: str  # a key of WORDINGS
    answer: str
    fields: dict[str, str] = field(default_factory=dict)  # fill the wording's braces
    accepted: Accepted = Accepted()


@dataclass(frozen=True)
class Receipt:
    items: dict[str, int]  # name as in the question: price in cents

    @property
    def total(self) -> int:
        return sum(self.items.values())

    @property
    def lines(self) -> list[str]:
        return [f"{name} {money(cents)}" for name, cents in self.items.items()]


@dataclass(frozen=True)
class Scene:
    size: tuple[int, int]  # pixels
    shapes: tuple[Shape, ...]

    def count(self, color: str | None = None, kind: str | None = None) -> int:
        return sum(color in (None, shape.color) and kind in (None, shape.kind) for shape in self.shapes)

    @property
    def unique_shapes(self) -> list[Shape]:
        """The shapes whose color and kind no other shape shares."""
        return [shape for shape in self.shapes if self.count(shape.color, shape.kind) == 1]


def thousandths(box: tuple[float, ...], size: tuple[int, int]) -> Box:
    """A box of pixels in thousandths of the picture's (width, height)."""
    return tuple(round(1000 * side / length) for side, length in zip(box, 2 * size, strict=True))


def money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# ------------------------------------------------------------------------------------------------------------- content


def usable_colors(level: float) -> tuple[str, ...]:
    return first_part(tuple(SHADES), 2, ramp(level, 0.02, 0.5))


def usable_kinds(level: float) -> tuple[str, ...]:
    return first_part(SHAPE_KINDS, 2, ramp(level, 0.02, 0.4))


def make_text(rng: random.Random, level: float) -> str:
    """1 to 10 characters: digits first, then mixed strings over a growing alphabet, then words."""
    alphabet = first_part(tuple(ALPHABET), 4, ramp(level, 0, 0.6))
    longest = round(lerp(1, 10, ramp(level, 0.03, 0.6)))
    kinds = {"digits": 0.7, "mix": 1.5 * ramp(level, 0.06, 0.4), "word": 1.5 * ramp(level, 0.25, 0.6)}
    kind = weighted(rng, kinds)
    if kind == "word":
        word = rng.choice([word for word in WORDS if len(word) <= longest])
        cases = first_part((str.upper, str.capitalize, str.lower), 1, ramp(level, 0.35, 0.6))
        return rng.choice(cases)(word)
    symbols = alphabet[:10] if kind == "digits" else alphabet
    return "".join(rng.choices(symbols, k=rng.randint(1, longest)))


def make_receipt(rng: random.Random, level: float) -> Receipt:
    """2 to 5 items (at the lowest levels: one), 0.50 to 99.99 each."""
    most = round(lerp(1, 5, ramp(level, 0.02, 0.7)))
    names = rng.sample(first_part(GOODS, 5, ramp(level, 0, 0.6)), k=rng.randint(min(2, most), most))
    share = UNUSUAL_ITEM_SHARE * ramp(level, 0.5, 1.0)
    others = rng.sample(rng.choice((OTHER_NAMES, OTHER_GOODS)), k=len(names))
    names = [other if rng.random() < share else name for name, other in zip(names, others, strict=True)]
    step = next(step for step, until in ((100, 0.08), (50, 0.16), (10, 0.3), (1, math.inf)) if level < until)
    highest = lerp(900, 9999, ramp(level, 0.1, 0.8))
    prices = [round(log_uniform(rng, 50, highest) / step) * step for _ in names]
    if rng.random() < 0.5:  # spread evenly instead of log-uniformly
        prices = [round(rng.uniform(50, highest) / step) * step for _ in names]
    return Receipt({name: max(50, step, price) for name, price in zip(names, prices, strict=True)})


def make_chart(rng: random.Random, level: float) -> Chart:
    """3 to 6 integers of 1 to 99 with a clear maximum and minimum."""
    count = rng.randint(3, round(lerp(3, 6, ramp(level, 0.05, 0.5))))
    labels = list(CHART_LABELS[:count])
    if rng.random() < 0.3 * ramp(level, 0.4, 0.8):
        labels = sorted(rng.sample(CHART_LABELS, k=count))
    step = max(1, round(lerp(10, 1, ramp(level, 0, 0.4))))
    has_value_labels = rng.random() < lerp(0.8, 0.4, ramp(level, 0, 0.6))
    # Without value labels a small chart does not show a smaller difference.
    gap = round(lerp(15, 1 if has_value_labels else 3, ramp(level, 0, 0.7)))
    while True:
        values = [min(99, step * rng.randint(1, max(1, 99 // step))) for _ in labels]
        ordered = sorted(values)
        if ordered[1] - ordered[0] >= gap and ordered[-1] - ordered[-2] >= gap:
            kind = "line" if rng.random() < 0.5 * ramp(level, 0.1, 0.4) else "bar"
            return Chart(kind, dict(zip(labels, values, strict=True)), has_value_labels)


def make_scene(rng: random.Random, level: float, size: tuple[int, int], area: Box, colors: tuple[str, ...]) -> Scene:
    """1 to 6 shapes inside `area`, of few or many kinds and colors, so that counts of all sizes occur."""
    kinds = usable_kinds(level)
    kinds = rng.sample(kinds, k=rng.randint(1, len(kinds)))
    colors = rng.sample(colors, k=rng.randint(1, len(colors)))
    shapes: list[Shape] = []
    for _ in range(rng.randint(1, round(lerp(1.6, 6, ramp(level, 0, 0.6))))):
        kind = rng.choice(kinds)
        box = place_box(rng, level, kind, area, [shape.box for shape in shapes])
        if box is not None:
            shapes.append(Shape(rng.choice(colors), kind, box))
    return Scene(size, tuple(shapes))


# ----------------------------------------------------------------------------------------------------------- questions


def phrase(rng: random.Random, level: float, question: Question) -> str:
    """The question in words."""
    return rng.choice(first_part(WORDINGS[question.kind], 1, ramp(level, 0.05, 0.4))).format(**question.fields)


def ask_receipt(rng: random.Random, receipt: Receipt) -> Question:
    kind = weighted(rng, {"receipt.price": 1.2, "receipt.total": 1.0, "receipt.count": 0.7})
    if kind == "receipt.price":
        item, cents = rng.choice(list(receipt.items.items()))
        return Question(kind, money(cents), {"item": item})
    return Question(kind, money(receipt.total) if kind == "receipt.total" else str(len(receipt.items)))


def ask_chart(rng: random.Random, chart: Chart, is_drawn: bool) -> Question:
    """A drawn value without a label must be estimated by the axis and gets a tolerance."""
    values = chart.values
    bars = {"mark": "bar", "tallest": "tallest", "shortest": "shortest"}
    fields = bars if chart.kind == "bar" else {"mark": "point", "tallest": "uppermost", "shortest": "lowermost"}
    kind = weighted(rng, {"chart.highest": 1.0, "chart.lowest": 1.0, "chart.value": 1.5})
    if kind != "chart.value":
        return Question(kind, (max if kind == "chart.highest" else min)(values, key=values.__getitem__), fields)
    label = rng.choice(list(values))
    tolerance = ESTIMATE_TOLERANCE if is_drawn and not chart.has_value_labels else 0
    return Question(kind, str(values[label]), {**fields, "label": label}, Accepted(tolerance))


def ask_scene(rng: random.Random, level: float, scene: Scene) -> Question:
    """A color question needs a shape that is the only one of its kind; without one, existence is asked."""
    kind = rng.choice(("scene.color", "scene.exists", "scene.count"))
    if kind == "scene.count":
        return ask_count(rng, level, scene)
    unique = [shape for shape in scene.shapes if scene.count(kind=shape.kind) == 1]
    if kind == "scene.exists" or not unique:
        return ask_exists(rng, level, scene)
    shape = rng.choice(unique)
    return Question(kind, shape.color, {"kind": shape.kind})


def ask_exists(rng: random.Random, level: float, scene: Scene) -> Question:
    """Half of the answers are yes. Half of the absent shapes share color or kind with a present one."""
    present = [shape.name for shape in scene.shapes]
    if rng.random() < 0.5:
        return Question("scene.exists", "yes", {"a_thing": with_article(rng.choice(present))})
    names = [f"{color} {kind}" for color in usable_colors(level) for kind in usable_kinds(level)]
    absent = [name for name in names if name not in present]
    words = set(" ".join(present).split())
    similar = [name for name in absent if words & set(name.split())]
    thing = rng.choice(similar if similar and rng.random() < 0.5 else absent)
    return Question("scene.exists", "no", {"a_thing": with_article(thing)})


def ask_count(rng: random.Random, level: float, scene: Scene) -> Question:
    """Counts all shapes, those of a kind, of a color, or of both; one question in ten names a shape at random."""
    shape = rng.choice(scene.shapes)
    color, kind = shape.color, shape.kind
    if rng.random() < 0.1:
        color, kind = rng.choice(usable_colors(level)), rng.choice(usable_kinds(level))
    things, count = {
        "all": ("shapes", scene.count()),
        "kind": (f"{kind}s", scene.count(kind=kind)),
        "color": (f"{color} shapes", scene.count(color)),
        "both": (f"{color} {kind}s", scene.count(color, kind)),
    }[weighted(rng, {"all": 1.0, "kind": 1.0, "color": ramp(level, 0.1, 0.4), "both": ramp(level, 0.02, 0.2)})]
    return Question("scene.count", str(count), {"things": things})


def ask_grounding(rng: random.Random, scene: Scene) -> Question:
    """The scene must have a unique shape."""
    shape = rng.choice(scene.unique_shapes)
    box = thousandths(shape.box, scene.size)
    answer = f"<ref>{shape.name}</ref><box>[{list(box)}]</box>"
    return Question("grounding.box", answer, {"thing": shape.name}, Accepted(box=box))


def choose_comparison(rng: random.Random, level: float) -> tuple[str, str, bool]:
    """Arguments for `compare_scenes`: kind of question, answer, and `both_present`; answers are equally frequent."""
    kind = rng.choice(("two_images.more", "two_images.both"))
    if kind == "two_images.both":
        return kind, rng.choice(("yes", "no")), False
    return kind, rng.choice(("first", "second", "same")), rng.random() < BOTH_PRESENT_SHARE * ramp(level, 0.2, 0.6)


def compare_scenes(
    rng: random.Random, scenes: list[Scene], kind: str, wanted: str, both_present: bool = False
) -> Question | None:
    """A question about two scenes with the answer `wanted`; None if these scenes allow none.

    With `both_present` both scenes have shapes of the kind in question, so they must be counted.
    """
    present = [{shape.kind for shape in scene.shapes} for scene in scenes]
    asked = present[0] & present[1] if both_present else present[0] | present[1]
    answers = {shape_kind: _comparison(scenes, kind, shape_kind) for shape_kind in sorted(asked)}
    if kind == "two_images.more" and not both_present:
        answers["shape"] = _comparison(scenes, kind, None)
    fitting = [name for name, answer in answers.items() if answer == wanted]
    if not fitting:
        return None
    name = rng.choice(fitting)
    fields = {"things": f"{name}s"} if kind == "two_images.more" else {"a_thing": with_article(name)}
    return Question(kind, wanted, fields)


def _comparison(scenes: list[Scene], kind: str, shape_kind: str | None) -> str:
    first, second = (scene.count(kind=shape_kind) for scene in scenes)
    if kind == "two_images.both":
        return "yes" if first and second else "no"
    return "same" if first == second else "first" if first > second else "second"


def ask_arithmetic(rng: random.Random, level: float) -> Question:
    operator = weighted(rng, {"+": 1.0, "-": 0.3 + 0.7 * ramp(level, 0, 0.2), "*": ramp(level, 0.1, 0.4)})
    largest = round(lerp(3, 12, ramp(level, 0.1, 0.8)) if operator == "*" else lerp(4, 99, ramp(level, 0, 0.9) ** 2))
    a, b = rng.randint(0, largest), rng.randint(0, largest)
    if operator == "-":
        a, b = max(a, b), min(a, b)
    answer = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return Question("text_only.arithmetic", str(answer), {"sum": f"{a} {operator} {b}"})


# ------------------------------------------------------------------------------------------------------------- scoring


def is_correct(given: str, expected: str, accepted: Accepted) -> bool:
    """Whether an answer counts as right: as `expected` but for case and surrounding blanks, or as `accepted` says."""
    given = given.strip().lower()
    if accepted.box is not None:
        box = parse_box(given)
        return box is not None and iou(box, accepted.box) >= MIN_IOU
    if accepted.tolerance and re.fullmatch(r"\d+(\.\d+)?", given):
        return abs(float(given) - float(expected)) <= accepted.tolerance
    return given == expected.lower()


def parse_box(answer: str) -> Box | None:
    """The four numbers of `<box>[[x1, y1, x2, y2]]</box>`; None if the answer has no such box."""
    match = re.search(r"<box>\s*\[\[\s*(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\s*\]\]\s*</box>", answer)
    return tuple(int(number) for number in match.groups()) if match else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 for boxes without area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(0, width) * max(0, height)
    union = sum(max(0, box[2] - box[0]) * max(0, box[3] - box[1]) for box in (a, b)) - overlap
    return overlap / union if union else 0.0
