"""Samples of the training recipe: pictures with questions and their answers, drawn from a seed.

A sample is made in three steps: its content (a string, a receipt, a chart, a scene), a question about the content, and
the picture (`drawing.py`). The text-only stage asks the same questions about the content in words. `level` in [0, 1]
is the difficulty of one sample, as in `drawing.py`.

To see a picture costs far more than to answer a question about it. In training a picture therefore gets several
questions where it has several answers, one more task, `describe`, asks for everything that a picture shows, and one,
`page`, asks nothing: it is there for the labels of its visual tokens (`cells.py`).
"""

import hashlib
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from PIL import Image

from . import drawing
from .drawing import Chart, Picture, Shape, first_part, lerp, ramp, weighted

Content = TypeVar("Content")

SPLITS = ("train", "heldout")
MOST_QUESTIONS = 6  # about a training picture
EASIER_SHARE = 0.2  # of training samples: drawn below the difficulty asked for, so that easy ones are not forgotten
SMALL_TEXT_SKEW = 3  # of the font sizes of training texts, at level 1: letters drawn small are the hardest to read
MATPLOTLIB_SHARE = 0.2  # of training charts, at level 1
READ_OFF_TOLERANCE = 2  # of a chart's values, where they are not written on top
READ_OFF_HEIGHT = 128  # pixels: on lower charts nobody can read values off the axis that closely
MIN_IOU = 0.5

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,:/-$%"
LABELS = "ABCDEF"

WORDS = tuple(
    """
    able about above actor adult after again agent agree ahead air alarm album alive allow almost alone along always
    amount anchor angle animal answer apple april arm army around arrive arrow art artist ask aunt author autumn away
    baby back bad bag ball banana band bank bar basket beach bean bear beauty bed before begin bell below best better
    bicycle big bird birthday black blanket blue board boat body bone book border bottle bottom box boy branch bread
    break breakfast bridge bright bring brother brown brush bucket build building bus business busy butter button buy
    cable cake call camera camp candle car card careful carry castle cat catch center chair chance change cheese child
    choice church circle city class clean clear clock close cloud coat coffee coin cold color come common computer cook
    cool copper corner cotton count country course cousin cover cow cream crowd cup curtain dance danger dark daughter
    day deep desert desk dinner direction dirty doctor dog dollar door double down dragon drawer dream dress drink drive
    dry duck dust ear early earth east easy edge egg eight elephant empty end energy engine enough evening every exit
    eye face factory fall family famous farm fast father feather february few field film finger fire fish five flag
    floor flower fly follow food foot forest forget fork four fox free fresh friday friend front fruit full game garden
    gate gift girl give glass glove go goat gold good grass gray great green ground group grow guitar hair half hammer
    hand happy harbor hat head health heart heavy hello help here high hill history holiday home honey hope horse hot
    hotel hour house hundred hungry ice idea inside iron island jacket january job join joke juice july jump june
    kettle key king kitchen kite knee knife know ladder lake lamp language large last laugh leaf learn left lemon
    letter library light lion list little long lost love low lucky lunch machine magic map march market match may meal
    measure meat medicine meeting metal middle milk minute mirror monday money month moon morning mother mountain mouse
    mouth movie museum music nail name narrow near neck needle nest never new news night nine north nose notebook
    november number ocean october office oil old one onion open orange order other oven owner page paint paper parent
    park party path pencil people pepper perfect phone photo piano picture pig pillow pilot pink plane planet plant
    plate play pocket point police pond pool potato present price prize purple queen question quick quiet rabbit radio
    rain rainbow read ready red rest rice right ring river road rock roof room root rope rose round run sad safe salt
    sand saturday school science sea season secret seed sell seven shadow sharp sheep ship shirt shoe shop short
    shoulder show silver simple sister six size sky sleep slow small smile smoke snow soap soft song soup south spoon
    spring square stairs stamp star start station stone stop store storm story street strong student sugar summer sun
    sunday sweet swim table tall taxi tea teacher team telephone ten tent thank thick thin three thunder thursday ticket
    tiger time today together tomato tomorrow tower town toy traffic train travel tree triangle truck true tuesday two
    umbrella uncle under valley village violin visit voice wait walk wall warm wash watch water weather wednesday week
    welcome west wheel white wide wild wind window winter wish wolf woman wonder wood word work world write yellow
    yes yesterday young zebra zero
    """.split()
)

GOODS = tuple(
    """
    tea egg jam milk soup rice cake fish salt corn bread apple juice pasta pizza salad sugar honey lemon onion cheese
    coffee butter banana tomato potato yogurt cookie carrot cereal pepper orange chicken sandwich lettuce mushroom
    cucumber chocolate pineapple sausages strawberry soap pen candle towel notebook battery umbrella toothpaste beans
    water beer wine ham oil nuts grapes shampoo magazine
    """.split()
)
"""What a receipt lists; the dial introduces it in this order, short names first. Each is one token of a question."""
OTHER_GOODS = tuple(
    """
    almonds apricot avocado bacon bagel basil beef biscuit blender broccoli brush bulb burger cabbage cashews celery
    chair charger cherries cherry chips cigar cloth cocoa coconut comb cotton crackers cream cup dates detergent
    diapers donut duck eggs eraser figs flour fork garlic ginger glue grape hammer herbs hummus ketchup kiwi
    knife lamb lamp lime lobster mango margarine marker melon mint mop muffin mug mustard napkins noodles oats
    olives oranges oregano pan papaya paper paprika parsley peach peanuts pear pears peas pencil perfume pie pillow
    plate plum pork pretzel prawns pumpkin quinoa radish raisins razor ribbon ruler salmon salsa sauce scarf
    scissors seeds shirt shrimp socks soda spinach sponge spoon steak stamps syrup tape tofu tomatoes tuna turkey
    vanilla vinegar vodka waffle walnuts whisky yeast zucchini
    """.split()
)
"""More of what a receipt may list, which a question spells, or starts as one of `GOODS` and then spells."""
UNLISTED_SHARE = 0.4  # of the names on a receipt, at level 1: others than `GOODS`, half of them goods and half any word
LEADER_SHARE = 0.1  # of training receipts, at level 1: dots lead from the names to the prices
CLOSE_CALL_SHARE = 0.5  # of the questions which of two images has more, at level 1: both have what is counted

WORDINGS: dict[str, tuple[str, ...]] = {
    "text.read": (
        "What does the text say?",
        "Read the text.",
        "What is written in the image?",
        "What text is shown?",
        "Which text can you see?",
        "What does it say?",
        "Read the text in the image.",
        "Transcribe the text.",
    ),
    "receipt.total": (
        "What is the total?",
        "How much is the total?",
        "What is the sum?",
        "What does everything cost together?",
        "What is the total amount?",
        "What is the total price?",
    ),
    "receipt.price": (
        "How much is the {item}?",
        "What does the {item} cost?",
        "What is the price of the {item}?",
        "How much does the {item} cost?",
        "What is the {item} price?",
    ),
    "receipt.count": (
        "How many items are there?",
        "How many items are on the receipt?",
        "How many items were bought?",
        "How many things are listed?",
        "What is the number of items?",
    ),
    "chart.highest": (
        "Which {mark} is the highest?",
        "Which {mark} has the highest value?",
        "What is the highest {mark}?",
        "Which {mark} is the largest?",
        "Which label has the highest value?",
        "Which {mark} is the {tallest}?",
    ),
    "chart.lowest": (
        "Which {mark} is the lowest?",
        "Which {mark} has the lowest value?",
        "What is the lowest {mark}?",
        "Which {mark} is the smallest?",
        "Which label has the lowest value?",
        "Which {mark} is the {shortest}?",
    ),
    "chart.value": (
        "What is the value of {label}?",
        "What value does {label} have?",
        "How much is {label}?",
        "What is the value of {mark} {label}?",
        "Read the value of {label}.",
    ),
    "scene.count": (
        "How many {things} are there?",
        "How many {things} can you see?",
        "How many {things} are in the image?",
        "Count the {things}.",
        "What is the number of {things}?",
    ),
    "scene.color": (
        "What color is the {kind}?",
        "What is the color of the {kind}?",
        "Which color is the {kind}?",
        "Which color does the {kind} have?",
        "What colour is the {kind}?",
    ),
    "scene.exists": (
        "Is there {a_thing}?",
        "Is there {a_thing} in the image?",
        "Can you see {a_thing}?",
        "Does the image show {a_thing}?",
        "Does the picture contain {a_thing}?",
    ),
    "grounding.box": (
        "Where is the {thing}?",
        "Find the {thing}.",
        "Locate the {thing}.",
        "Give the bounding box of the {thing}.",
        "Where can you see the {thing}?",
    ),
    "two_images.more": (
        "Which image has more {things}?",
        "Which image shows more {things}?",
        "In which image are there more {things}?",
        "Which picture has more {things}?",
        "Which image has more {things}: first, second or same?",
    ),
    "two_images.both": (
        "Do both images show {a_thing}?",
        "Is there {a_thing} in both images?",
        "Do both images have {a_thing}?",
        "Can you see {a_thing} in both images?",
        "Do both pictures contain {a_thing}?",
    ),
    "text_only.arithmetic": (
        "What is {sum}?",
        "{sum}?",
        "Calculate {sum}.",
        "How much is {sum}?",
        "Compute {sum}.",
        "{sum} =",
        "What is the result of {sum}?",
    ),
    "describe.lines": ("Read all lines.", "What do the lines say?", "Transcribe every line."),
    "describe.receipt": ("Read the receipt.", "What is on the receipt?", "Transcribe the receipt."),
    "describe.chart": ("List the values.", "What are the values?", "Read the chart."),
    "describe.scene": ("List the shapes.", "What shapes are there?", "Which shapes can you see?"),
    "pretrain_text.copy": ("Repeat: {text}", "Copy: {text}", "Say: {text}", "Write: {text}", "Repeat this: {text}"),
}

_ASKING = set(re.findall(r"\w+", " ".join(wording for wordings in WORDINGS.values() for wording in wordings)))
OTHER_NAMES = tuple(word for word in WORDS if word not in GOODS and word not in _ASKING)


@dataclass(frozen=True)
class Accepted:
    """What is right besides the answer itself.

    Numbers that differ by `tolerance` at most; or, where `box` is set (x1, y1, x2, y2 in thousandths of the image),
    any box with an IoU of 0.5 or more.
    """

    tolerance: int = 0
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Sample:
    """One conversation about images (RGB), which stand in front of its first question.

    `as_is`: the model gets the images in their own size, at one scale.
    """

    task: str
    pictures: list[Picture]
    turns: list[tuple[str, str]]
    accepted: list[Accepted]  # one for each turn
    as_is: bool = False

    @property
    def images(self) -> list[Image.Image]:
        return [picture.image for picture in self.pictures]


@dataclass(frozen=True)
class Turn:
    """A question about some content, not yet worded, and its answer."""

    kind: str  # a key of WORDINGS
    answer: str
    fields: dict[str, str] = field(default_factory=dict)  # what fills the wording's braces
    accepted: Accepted = Accepted()


@dataclass(frozen=True)
class Receipt:
    items: dict[str, int]  # name as in the question: price in cents

    @property
    def total(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True)
class Scene:
    size: tuple[int, int]  # pixels
    shapes: tuple[Shape, ...]

    def count(self, color: str | None = None, kind: str | None = None) -> int:
        return sum(color in (None, shape.color) and kind in (None, shape.kind) for shape in self.shapes)

    def thousandths(self, shape: Shape) -> tuple[int, int, int, int]:
        return thousandths(shape.box, self.size)


def thousandths(box: tuple[float, ...], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box of pixels in thousandths of the picture's (width, height)."""
    return tuple(round(1000 * side / length) for side, length in zip(box, 2 * size, strict=True))


# ----------------------------------------------------------------------------------------------------------- questions


def phrase(rng: random.Random, level: float, turn: Turn) -> str:
    """One of the wordings of the question; at level 0 always the first."""
    return rng.choice(first_part(WORDINGS[turn.kind], 1, ramp(level, 0.05, 0.4))).format(**turn.fields)


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def _priced(receipt: Receipt) -> list[str]:
    return [f"{name} {money(cents)}" for name, cents in receipt.items.items()]


def ask_receipt(rng: random.Random, receipt: Receipt) -> Turn:
    kind = weighted(rng, {"receipt.price": 1.2, "receipt.total": 1.0, "receipt.count": 0.7})
    if kind == "receipt.price":
        item, cents = rng.choice(list(receipt.items.items()))
        return Turn(kind, money(cents), {"item": item})
    return Turn(kind, money(receipt.total) if kind == "receipt.total" else str(len(receipt.items)))


def ask_chart(rng: random.Random, chart: Chart, read_off: bool) -> Turn:
    """`read_off`: values that are not written on top have to be judged by the axis, and get a tolerance."""
    values = chart.values
    bars = {"mark": "bar", "tallest": "tallest", "shortest": "shortest"}
    fields = bars if chart.kind == "bar" else {"mark": "point", "tallest": "uppermost", "shortest": "lowermost"}
    kind = weighted(rng, {"chart.highest": 1.0, "chart.lowest": 1.0, "chart.value": 1.5})
    if kind != "chart.value":
        return Turn(kind, (max if kind == "chart.highest" else min)(values, key=values.__getitem__), fields)
    label = rng.choice(list(values))
    tolerance = READ_OFF_TOLERANCE if read_off and not chart.annotated else 0
    return Turn(kind, str(values[label]), {**fields, "label": label}, Accepted(tolerance))


def ask_scene(rng: random.Random, level: float, scene: Scene) -> Turn:
    """The colour question needs a shape that is the only one of its kind; without one, existence is asked."""
    kind = rng.choice(("scene.color", "scene.exists", "scene.count"))
    if kind == "scene.count":
        return _ask_count(rng, level, scene)
    unique = [shape for shape in scene.shapes if scene.count(kind=shape.kind) == 1]
    if kind == "scene.exists" or not unique:
        return _ask_exists(rng, level, scene)
    shape = rng.choice(unique)
    return Turn(kind, shape.color, {"kind": shape.kind})


def _ask_exists(rng: random.Random, level: float, scene: Scene) -> Turn:
    """Half of the answers are yes. Half of the shapes that do not exist share colour or kind with one that does."""
    present = [shape.name for shape in scene.shapes]
    if rng.random() < 0.5:
        return Turn("scene.exists", "yes", {"a_thing": with_article(rng.choice(present))})
    names = [f"{color} {kind}" for color in usable_colors(level) for kind in usable_kinds(level)]
    absent = [name for name in names if name not in present]
    words = set(" ".join(present).split())
    similar = [name for name in absent if words & set(name.split())]
    thing = rng.choice(similar if similar and rng.random() < 0.5 else absent)
    return Turn("scene.exists", "no", {"a_thing": with_article(thing)})


def _ask_count(rng: random.Random, level: float, scene: Scene) -> Turn:
    """All shapes, those of a kind, of a colour, or of both; one in ten counts what need not be there."""
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
    return Turn("scene.count", str(count), {"things": things})


def unique_shapes(scene: Scene) -> list[Shape]:
    """The shapes whose colour and kind no other shape shares."""
    return [shape for shape in scene.shapes if scene.count(shape.color, shape.kind) == 1]


def ask_grounding(rng: random.Random, scene: Scene) -> Turn:
    """The scene must hold a unique shape."""
    shape = rng.choice(unique_shapes(scene))
    box = scene.thousandths(shape)
    answer = f"<ref>{shape.name}</ref><box>[{list(box)}]</box>"
    return Turn("grounding.box", answer, {"thing": shape.name}, Accepted(box=box))


def compare_scenes(
    rng: random.Random, scenes: list[Scene], kind: str, wanted: str, close_call: bool = False
) -> Turn | None:
    """A question about two scenes whose answer is `wanted`; None where these scenes allow none.

    In a `close_call` both scenes have shapes of the kind, so that it does not do to see which one has any.
    """
    seen = [{shape.kind for shape in scene.shapes} for scene in scenes]
    asked = seen[0] & seen[1] if close_call else seen[0] | seen[1]
    answers = {shape_kind: _comparison(scenes, kind, shape_kind) for shape_kind in sorted(asked)}
    if kind == "two_images.more" and not close_call:
        answers["shape"] = _comparison(scenes, kind, None)
    fitting = [name for name, answer in answers.items() if answer == wanted]
    if not fitting:
        return None
    name = rng.choice(fitting)
    return Turn(kind, wanted, {"things": f"{name}s"} if kind == "two_images.more" else {"a_thing": with_article(name)})


def _comparison(scenes: list[Scene], kind: str, shape_kind: str | None) -> str:
    first, second = (scene.count(kind=shape_kind) for scene in scenes)
    if kind == "two_images.both":
        return "yes" if first and second else "no"
    return "same" if first == second else "first" if first > second else "second"


def ask_arithmetic(rng: random.Random, level: float) -> Turn:
    operator = weighted(rng, {"+": 1.0, "-": 0.3 + 0.7 * ramp(level, 0, 0.2), "*": ramp(level, 0.1, 0.4)})
    largest = round(lerp(3, 12, ramp(level, 0.1, 0.8)) if operator == "*" else lerp(4, 99, ramp(level, 0, 0.9) ** 2))
    a, b = rng.randint(0, largest), rng.randint(0, largest)
    if operator == "-":
        a, b = max(a, b), min(a, b)
    answer = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return Turn("text_only.arithmetic", str(answer), {"sum": f"{a} {operator} {b}"})


# ------------------------------------------------------------------------------------------------------------- content


def usable_colors(level: float) -> tuple[str, ...]:
    return first_part(tuple(drawing.SHADES), 2, ramp(level, 0.02, 0.5))


def usable_kinds(level: float) -> tuple[str, ...]:
    return first_part(drawing.SHAPE_KINDS, 2, ramp(level, 0.02, 0.4))


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
    share = UNLISTED_SHARE * ramp(level, 0.5, 1.0)
    others = rng.sample(rng.choice((OTHER_NAMES, OTHER_GOODS)), k=len(names))
    names = [other if rng.random() < share else name for name, other in zip(names, others, strict=True)]
    step = next(step for step, until in ((100, 0.08), (50, 0.16), (10, 0.3), (1, math.inf)) if level < until)
    highest = lerp(900, 9999, ramp(level, 0.1, 0.8))
    prices = [round(drawing.log_uniform(rng, 50, highest) / step) * step for _ in names]
    if rng.random() < 0.5:  # cheap and dear goods alike, but also evenly spread prices
        prices = [round(rng.uniform(50, highest) / step) * step for _ in names]
    return Receipt({name: max(50, step, price) for name, price in zip(names, prices, strict=True)})


def make_chart(rng: random.Random, level: float) -> Chart:
    """3 to 6 integers of 1 to 99; the highest and the lowest stand out."""
    count = rng.randint(3, round(lerp(3, 6, ramp(level, 0.05, 0.5))))
    labels = list(LABELS[:count])
    if rng.random() < 0.3 * ramp(level, 0.4, 0.8):
        labels = sorted(rng.sample(LABELS, k=count))
    step = max(1, round(lerp(10, 1, ramp(level, 0, 0.4))))
    annotated = rng.random() < lerp(0.8, 0.4, ramp(level, 0, 0.6))
    # Without the numbers, a difference of less than this cannot be seen on a small chart.
    gap = round(lerp(15, 1 if annotated else 3, ramp(level, 0, 0.7)))
    while True:
        values = [min(99, step * rng.randint(1, max(1, 99 // step))) for _ in labels]
        ordered = sorted(values)
        if ordered[1] - ordered[0] >= gap and ordered[-1] - ordered[-2] >= gap:
            kind = "line" if rng.random() < 0.5 * ramp(level, 0.1, 0.4) else "bar"
            return Chart(kind, dict(zip(labels, values, strict=True)), annotated)


def make_scene(
    rng: random.Random, level: float, size: tuple[int, int], area: drawing.Box, colors: tuple[str, ...]
) -> Scene:
    """1 to 6 shapes inside `area`, of few or many kinds and colours, so that counts of all sizes occur."""
    kinds = usable_kinds(level)
    kinds = rng.sample(kinds, k=rng.randint(1, len(kinds)))
    colors = rng.sample(colors, k=rng.randint(1, len(colors)))
    shapes: list[Shape] = []
    for _ in range(rng.randint(1, round(lerp(1.6, 6, ramp(level, 0, 0.6))))):
        kind = rng.choice(kinds)
        box = drawing.place_box(rng, level, kind, area, [shape.box for shape in shapes])
        if box is not None:
            shapes.append(Shape(rng.choice(colors), kind, box))
    return Scene(size, tuple(shapes))


# ------------------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class _Canvas:
    """An empty picture for a scene: where shapes may go and which colours can be seen there."""

    backdrop: drawing.Backdrop
    area: drawing.Box
    colors: tuple[str, ...]

    def make_scene(self, rng: random.Random, level: float) -> Scene:
        return make_scene(rng, level, self.backdrop.image.size, self.area, self.colors)

    def draw(self, rng: random.Random, level: float, scene: Scene) -> Picture:
        return drawing.draw_shapes(rng, level, self.backdrop, scene.shapes)


def _empty_canvas(rng: random.Random, level: float) -> _Canvas:
    backdrop = drawing.make_backdrop(rng, level, drawing.canvas_size(rng, level, easiest_side=96))
    area = drawing.shape_area(rng, backdrop)
    return _Canvas(backdrop, area, drawing.fill_colors(usable_colors(level), backdrop.tones))


def draw_text(rng: random.Random, level: float, text: str, skew: float = 1.0) -> Picture | None:
    """The string on a canvas; None where it does not fit at the smallest font size. `skew`: of font sizes."""
    size = drawing.canvas_size(rng, level, easiest_side=64)
    font = drawing.pick_font(rng, level)
    angle = rng.uniform(-5, 5) * ramp(level, 0.4, 0.9) if rng.random() < 0.7 else 0.0
    spread = ramp(level, 0.05, 0.7)
    # The height of 16 to 96 pixels may be meant of lines or of capitals, whose font is a third larger.
    highest = min(lerp(40, 128, spread), drawing.largest_font_size([text], font, angle, size))
    lowest = lerp(40, 16, spread)
    if highest < lowest:
        return None
    lettering = drawing.Lettering(font, round(drawing.log_uniform(rng, lowest, highest, skew)), angle)
    return drawing.draw_lines(rng, level, [text], lettering, size, in_columns=False)


def draw_receipt(rng: random.Random, level: float, receipt: Receipt, leader_share: float = 0.0) -> Picture | None:
    """One line for each item and the total; None where they do not fit at the smallest font size.

    `leader_share`: of such pictures, at level 1, in which dots lead from the names to the prices.
    """
    size = drawing.canvas_size(rng, level, easiest_side=160)
    font = drawing.pick_font(rng, level)
    case = rng.choice(first_part((str.lower, str.capitalize, str.upper), 1, ramp(level, 0.1, 0.5)))
    prices = {case(name): money(cents) for name, cents in receipt.items.items()} | {"TOTAL": money(receipt.total)}
    lines = [f"{name} {price}" for name, price in prices.items()]
    has_leaders = leader_share > 0 and rng.random() < leader_share * ramp(level, 0.5, 1.0)
    if has_leaders:
        longest, more = max(map(len, lines)), rng.randint(2, 6)
        lines = [f"{name} {'.' * (longest + more - len(name + price))} {price}" for name, price in prices.items()]
    pitch = lerp(drawing.LINE_PITCH, rng.uniform(1.1, 2.0), ramp(level, 0.2, 0.8))
    highest = min(lerp(26, 56, ramp(level, 0.1, 0.8)), drawing.largest_font_size(lines, font, 0, size, pitch))
    lowest = lerp(22, 12, ramp(level, 0.1, 0.8))
    if highest < lowest:
        return None
    lettering = drawing.Lettering(font, round(drawing.log_uniform(rng, lowest, highest)), pitch=pitch)
    in_columns = not has_leaders and rng.random() < 0.5 * ramp(level, 0.2, 0.5)
    return drawing.draw_lines(rng, level, lines, lettering, size, in_columns, names=[*receipt.items, "total"])


def _draw_fitting(
    rng: random.Random,
    level: float,
    make: Callable[[random.Random, float], Content],
    draw: Callable[[random.Random, float, Content], Picture | None],
) -> tuple[Content, Picture]:
    """Some content and its picture. Long content gets several canvases before it is given up for other content."""
    while True:
        content = make(rng, level)
        for _ in range(20):
            picture = draw(rng, level, content)
            if picture is not None:
                return content, picture


# --------------------------------------------------------------------------------------------------------------- tasks


def _text(rng: random.Random, level: float, split: str) -> tuple[list[Picture], list[Turn]]:
    skew = lerp(1, SMALL_TEXT_SKEW, level) if split == "train" else 1.0
    text, picture = _draw_fitting(rng, level, make_text, partial(draw_text, skew=skew))
    return [picture], [Turn("text.read", text)]


def _receipt(rng: random.Random, level: float, split: str) -> tuple[list[Picture], list[Turn]]:
    receipt, picture = _drawn_receipt(rng, level, split)
    return [picture], _questions(rng, split, lambda: ask_receipt(rng, receipt))


def _drawn_receipt(rng: random.Random, level: float, split: str) -> tuple[Receipt, Picture]:
    draw = partial(draw_receipt, leader_share=LEADER_SHARE if split == "train" else 0.0)
    return _draw_fitting(rng, level, make_receipt, draw)


def _chart(rng: random.Random, level: float, split: str) -> tuple[list[Picture], list[Turn]]:
    chart, picture = _drawn_chart(rng, level, split)
    return [picture], _questions(rng, split, lambda: ask_chart(rng, chart, read_off=True))


def _drawn_chart(rng: random.Random, level: float, split: str) -> tuple[Chart, Picture]:
    """Held-out charts are by matplotlib itself; its imitation is only for speed."""
    share = MATPLOTLIB_SHARE * ramp(level, 0.4, 1.0)
    by_matplotlib = split == "heldout" or rng.random() < share
    chart = make_chart(rng, level)
    size = drawing.canvas_size(rng, level, easiest_side=160, smallest_side=96)
    if size[1] < READ_OFF_HEIGHT:
        chart = replace(chart, annotated=True)
    draw = drawing.draw_chart_with_matplotlib if by_matplotlib else drawing.draw_chart
    return chart, draw(rng, level, size, chart)


def _scene(rng: random.Random, level: float, split: str) -> tuple[list[Picture], list[Turn]]:
    scene, picture = _drawn_scene(rng, level)
    return [picture], _questions(rng, split, lambda: ask_scene(rng, level, scene))


def _drawn_scene(rng: random.Random, level: float) -> tuple[Scene, Picture]:
    canvas = _empty_canvas(rng, level)
    scene = canvas.make_scene(rng, level)
    return scene, canvas.draw(rng, level, scene)


def _grounding(rng: random.Random, level: float, split: str) -> tuple[list[Picture], list[Turn]]:
    canvas = _empty_canvas(rng, level)
    scene = canvas.make_scene(rng, level)
    while not unique_shapes(scene):
        scene = canvas.make_scene(rng, level)
    return [canvas.draw(rng, level, scene)], _questions(rng, split, lambda: ask_grounding(rng, scene))


def _two_images(rng: random.Random, level: float, split: str) -> tuple[list[Picture], list[Turn]]:
    canvases = [_empty_canvas(rng, level) for _ in range(2)]
    scenes, turn = _comparable_scenes(rng, level, [canvas.make_scene for canvas in canvases])
    pictures = [canvas.draw(rng, level, scene) for canvas, scene in zip(canvases, scenes, strict=True)]
    first = iter([turn])
    return pictures, _questions(rng, split, lambda: next(first, None) or _ask_again(rng, level, scenes) or turn)


def _comparable_scenes(
    rng: random.Random, level: float, makers: list[Callable[[random.Random, float], Scene]]
) -> tuple[list[Scene], Turn]:
    """Scenes and a question about them; all answers to a question are equally frequent."""
    asked = _comparison_wanted(rng, level)
    while True:
        scenes = [make(rng, level) for make in makers]
        turn = compare_scenes(rng, scenes, *asked)
        if turn is not None:
            return scenes, turn


def _comparison_wanted(rng: random.Random, level: float) -> tuple[str, str, bool]:
    """Kind of question, answer, and whether it is a close call."""
    kind = rng.choice(("two_images.more", "two_images.both"))
    if kind == "two_images.both":
        return kind, rng.choice(("yes", "no")), False
    return kind, rng.choice(("first", "second", "same")), rng.random() < CLOSE_CALL_SHARE * ramp(level, 0.2, 0.6)


def _ask_again(rng: random.Random, level: float, scenes: list[Scene]) -> Turn | None:
    return compare_scenes(rng, scenes, *_comparison_wanted(rng, level))


def _two_turns(rng: random.Random, level: float, split: str) -> tuple[list[Picture], list[Turn]]:
    if rng.random() < 0.5:
        receipt, picture = _drawn_receipt(rng, level, split)
        return [picture], _two_questions(lambda: ask_receipt(rng, receipt))
    scene, picture = _drawn_scene(rng, level)
    return [picture], _two_questions(lambda: ask_scene(rng, level, scene))


def _questions(rng: random.Random, split: str, ask: Callable[[], Turn]) -> list[Turn]:
    """One question about a held-out picture, up to MOST_QUESTIONS different ones about a training picture."""
    draws = 1 if split == "heldout" else rng.randint(1, MOST_QUESTIONS)
    turns = [ask() for _ in range(draws)]
    return list({(turn.kind, *turn.fields.items()): turn for turn in turns}.values())


def _two_questions(ask: Callable[[], Turn]) -> list[Turn]:
    first = second = ask()
    while (second.kind, second.fields) == (first.kind, first.fields):
        second = ask()
    return [first, second]


def _text_only(rng: random.Random, level: float, split: str) -> tuple[list[Picture], list[Turn]]:
    return [], [ask_arithmetic(rng, level)]


def _describe(rng: random.Random, level: float, split: str) -> tuple[list[Picture], list[Turn]]:
    kind = weighted(rng, {"lines": 2.0, "receipt": 1.0, "chart": 0.7, "scene": 1.0})
    if kind == "lines":
        parts, picture = _draw_fitting(rng, level, _make_lines, _draw_lines)
    elif kind == "receipt":
        receipt, picture = _drawn_receipt(rng, level, split)
        parts = [*_priced(receipt), f"TOTAL {money(receipt.total)}"]
    elif kind == "chart":
        chart, picture = _drawn_chart(rng, level, split)
        parts = [f"{label}={value}" for label, value in chart.values.items()]
    else:
        scene, picture = _drawn_scene(rng, level)
        from_left = sorted(scene.shapes, key=lambda shape: shape.box[0] + shape.box[2])
        parts = [shape.name for shape in from_left]
    return [picture], [Turn(f"describe.{kind}", "\n".join(parts))]


def _make_lines(rng: random.Random, level: float) -> list[str]:
    return [make_text(rng, level) for _ in range(rng.randint(2, round(lerp(2, 5, ramp(level, 0.02, 0.4)))))]


def _draw_lines(rng: random.Random, level: float, lines: list[str]) -> Picture | None:
    size = drawing.canvas_size(rng, level, easiest_side=64)
    font = drawing.pick_font(rng, level)
    highest = min(lerp(28, 56, ramp(level, 0.1, 0.8)), drawing.largest_font_size(lines, font, 0, size))
    lowest = lerp(22, 14, ramp(level, 0.1, 0.8))
    if highest < lowest:
        return None
    lettering = drawing.Lettering(font, round(drawing.log_uniform(rng, lowest, highest)))
    return drawing.draw_lines(rng, level, lines, lettering, size, in_columns=False)


def _page(rng: random.Random, level: float, split: str) -> tuple[list[Picture], list[Turn]]:
    """A small picture full of characters of any height, to be learned from by its visual tokens alone.

    Every token of it has a label, so it needs no dial: pictures of every difficulty are mixed from the start.
    """
    level *= rng.random()
    size = tuple(round(drawing.log_uniform(rng, 64, 224)) for _ in range(2))
    font = drawing.pick_font(rng, level)
    height = drawing.log_uniform(rng, lerp(32, 11, level), min(64, min(size) / 1.4))
    room = size[0] / (0.6 * height)
    lines = [_page_line(rng, room) for _ in range(max(1, int(size[1] / (1.25 * height))))]
    angle = rng.uniform(-5, 5) * level if rng.random() < 0.4 else 0.0
    lettering = drawing.Lettering(font, min(round(height), drawing.largest_font_size(lines, font, angle, size)), angle)
    return [drawing.draw_lines(rng, level, lines, lettering, size, in_columns=False)], []


def _page_line(rng: random.Random, room: float) -> str:
    """Words, prices, numbers and mixed strings, as many as fit into `room` characters; at least one character."""
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


_MAKERS = {
    "text": _text,
    "receipt": _receipt,
    "chart": _chart,
    "scene": _scene,
    "grounding": _grounding,
    "two_images": _two_images,
    "two_turns": _two_turns,
    "text_only": _text_only,
}
TASKS = tuple(_MAKERS)
"""What the model is for, and is scored on."""
DESCRIBE = "describe"
PAGE = "page"
"""Tasks for training alone; the second has no question."""
_MAKERS |= {DESCRIBE: _describe, PAGE: _page}


# -------------------------------------------------------------------------------------------------- described pictures


def _listed(shapes: tuple[Shape, ...]) -> str:
    return ", ".join(shape.name for shape in shapes)


def _described_scene(rng: random.Random, level: float) -> Scene:
    """In words any size will do, and all colours can be seen."""
    return make_scene(rng, level, (400, 400), (0, 0, 400, 400), usable_colors(level))


def _describe_text(rng: random.Random, level: float) -> tuple[str, list[Turn]]:
    text = make_text(rng, level)
    return f"Text: {text}.", [Turn("text.read", text)]


def _describe_receipt(rng: random.Random, level: float) -> tuple[str, list[Turn]]:
    receipt = make_receipt(rng, level)
    turns = _two_questions(lambda: ask_receipt(rng, receipt))
    return f"Receipt: {', '.join(_priced(receipt))}, TOTAL {money(receipt.total)}.", turns


def _describe_chart(rng: random.Random, level: float) -> tuple[str, list[Turn]]:
    chart = make_chart(rng, level)
    values = ", ".join(f"{label}={value}" for label, value in chart.values.items())
    return f"Chart: {values}.", [ask_chart(rng, chart, read_off=False)]


def _describe_scene(rng: random.Random, level: float) -> tuple[str, list[Turn]]:
    scene = _described_scene(rng, level)
    return f"Shapes: {_listed(scene.shapes)}.", _two_questions(lambda: ask_scene(rng, level, scene))


def _describe_grounding(rng: random.Random, level: float) -> tuple[str, list[Turn]]:
    scene = _described_scene(rng, level)
    while not unique_shapes(scene):
        scene = _described_scene(rng, level)
    places = (f"{shape.name} at {' '.join(map(str, scene.thousandths(shape)))}" for shape in scene.shapes)
    return f"Shapes: {', '.join(places)}.", [ask_grounding(rng, scene)]


def _describe_two_images(rng: random.Random, level: float) -> tuple[str, list[Turn]]:
    scenes, turn = _comparable_scenes(rng, level, [_described_scene, _described_scene])
    first, second = (_listed(scene.shapes) for scene in scenes)
    return f"First image: {first}. Second image: {second}.", [turn]


_DESCRIBERS = (
    _describe_text,
    _describe_receipt,
    _describe_chart,
    _describe_scene,
    _describe_grounding,
    _describe_two_images,
)


# ------------------------------------------------------------------------------------------------------------- samples


def make_sample(task: str, seed: int, difficulty: float = 1.0, split: str = "train") -> Sample:
    """The sample that belongs to these arguments: the same pixels and text on every call.

    `task` is one of TASKS, DESCRIBE or PAGE. `difficulty` 0 is the easiest version of the task, 1 all of it. A fifth of
    the training samples are easier than asked for, and most have several questions; held-out samples are not and have
    one (`two_turns` two). Raises ValueError for an unknown task or split or a difficulty outside [0, 1].
    """
    if task not in _MAKERS:
        raise ValueError(f"task must be one of {tuple(_MAKERS)}, got {task!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    rng = _seeded(task, split, seed)
    level = _level(rng, difficulty, split)
    pictures, turns = _MAKERS[task](rng, level, split)
    return _worded(rng, level, task, pictures, "", turns)


def make_text_sample(seed: int, difficulty: float = 1.0) -> Sample:
    """A sample for the stage on text alone: arithmetic, copying, or questions about a picture described in words.

    Raises ValueError for a difficulty outside [0, 1].
    """
    rng = _seeded("pretrain_text", "train", seed)
    level = _level(rng, difficulty, "train")
    kind = weighted(rng, {"described": 0.6, "copy": 0.25, "arithmetic": 0.15})
    opening, turns = "", [ask_arithmetic(rng, level)]
    if kind == "copy":
        text = make_text(rng, level)
        turns = [Turn("pretrain_text.copy", text, {"text": text})]
    elif kind == "described":
        description, turns = rng.choice(_DESCRIBERS)(rng, level)
        opening = f"{description} "
    return _worded(rng, level, "pretrain_text", [], opening, turns)


def _seeded(task: str, split: str, seed: int) -> random.Random:
    """Independent randomness for each triple; Python's own hash() differs between processes."""
    digest = hashlib.sha256(f"{task}/{split}/{seed}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def _level(rng: random.Random, difficulty: float, split: str) -> float:
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty must be between 0 and 1, got {difficulty!r}")
    easier = split == "train" and rng.random() < EASIER_SHARE
    return difficulty * rng.random() if easier else float(difficulty)


def _worded(
    rng: random.Random, level: float, task: str, pictures: list[Picture], opening: str, turns: list[Turn]
) -> Sample:
    """The questions in words, the first after `opening`."""
    pairs = [(opening * (index == 0) + phrase(rng, level, turn), turn.answer) for index, turn in enumerate(turns)]
    return Sample(task, pictures, pairs, [turn.accepted for turn in turns])


# ------------------------------------------------------------------------------------------------------------- scoring


def is_correct(sample: Sample, turn: int, answer: str) -> bool:
    """Whether the answer to the question of the given turn counts as right.

    Case and outer blanks do not matter; boxes need an IoU of 0.5 with the true one; values that can only be read off
    an axis may differ by 2.
    """
    expected, accepted = sample.turns[turn][1], sample.accepted[turn]
    given = answer.strip().lower()
    if accepted.box is not None:
        box = parse_box(given)
        return box is not None and iou(box, accepted.box) >= MIN_IOU
    if accepted.tolerance and re.fullmatch(r"\d+(\.\d+)?", given):
        return abs(float(given) - float(expected)) <= accepted.tolerance
    return given == expected.lower()


def parse_box(answer: str) -> tuple[int, int, int, int] | None:
    """The four numbers of `<box>[[x1, y1, x2, y2]]</box>`; None where the answer holds no such box."""
    match = re.search(r"<box>\s*\[\[\s*(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\s*\]\]\s*</box>", answer)
    return tuple(int(number) for number in match.groups()) if match else None


def iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection over union of two boxes; 0 for boxes without area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(0, width) * max(0, height)
    union = sum(max(0, box[2] - box[0]) * max(0, box[3] - box[1]) for box in (a, b)) - overlap
    return overlap / union if union else 0.0
