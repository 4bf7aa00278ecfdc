"""The recipe's samples: reproducible, within the stated ranges, and with answers that follow from what is shown."""

import hashlib
import random
import re
from decimal import Decimal

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import matplotlib  # noqa: E402
import PIL  # noqa: E402
from PIL import Image, ImageChops  # noqa: E402

from recipes import charts, drawing, questions, tasks, words  # noqa: E402
from recipes.drawing import SHADES, SHAPE_KINDS, Background, Shape, TextStyle  # noqa: E402
from recipes.questions import Accepted, is_correct  # noqa: E402
from recipes.tasks import ALL_TASKS, DESCRIBE, PAGE, TASKS, TEXT_PRETRAINING, make_sample  # noqa: E402

SEEDS = range(40)
VISUAL_TASKS = [task for task in ALL_TASKS if task not in ("text_only", TEXT_PRETRAINING)]
SHORT_TASKS = ("text", "text_only", "two_turns")  # at most two questions

# Text and pixels of samples: they may only change together with the published scores, which depend on them. Pixels are
# those of these versions of Pillow and matplotlib.
DRAWN_BY = ("13.0.0", "3.11.2")
RECORDED = (
    "591eaee386161da9 c73581bc24f8899e d5fddfaf60f61dc5 e818ce68ade37539 5e01115c869a492c 2a6aa8e810386a1a "
    "316a026216257943 dc566c04aa9f5ee9 0f28ac62c6635364 c3b872c140286aba 08fc847c997a4bdc"
)

_KINDS, _COLORS = "|".join(SHAPE_KINDS), "|".join(SHADES)
FIELDS = {
    "item": "|".join(words.GOODS + words.OTHER_NAMES + words.OTHER_GOODS),
    "label": "[A-F]",
    "mark": "bar|point",
    "tallest": "tallest|uppermost",
    "shortest": "shortest|lowermost",
    "kind": _KINDS,
    "thing": f"({_COLORS}) ({_KINDS})",
    "a_thing": f"an? (({_COLORS}) )?({_KINDS})",
    "things": f"(({_COLORS}) )?({_KINDS}|shape)s",
    "sum": r"\d+ [-+*] \d+",
    "text": ".+",
}
WORDING_PATTERNS = [
    (kind, re.sub(r"\\\{(\w+)\\\}", lambda match: f"({FIELDS[match[1]]})", re.escape(wording)))
    for kind, wordings in words.WORDINGS.items()
    for wording in wordings
]


def question_kind(question: str) -> str:
    """The entry of WORDINGS that the question was worded by."""
    return next(kind for kind, pattern in WORDING_PATTERNS if re.fullmatch(pattern, question))


def described(kind: str) -> list[tuple[str, str, str]]:
    """(description, question, answer) of the pretraining samples of one kind, such as "Chart"."""
    found = []
    for seed in range(1200):
        sample = make_sample(TEXT_PRETRAINING, seed)
        match = re.fullmatch(rf"{kind}: (.*)\. (.*)", sample.turns[0][0])
        if match:
            asked = [match[2], *(question for question, _ in sample.turns[1:])]
            found += [(match[1], q, answer) for q, (_, answer) in zip(asked, sample.turns, strict=True)]
    assert len(found) > 10
    return found


def ink_box(image: Image.Image) -> tuple[int, int, int, int]:
    """The bounding box of everything that is not white."""
    return ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()


def pixels(image: Image.Image, mode: str = "RGB") -> np.ndarray:
    return np.asarray(image.convert(mode)).astype(int)


# ------------------------------------------------------------------------------------------------------------- samples


def digest(task: str) -> str:
    """Hash of all that makes up four held-out samples at full difficulty and four easier training samples."""
    result = hashlib.sha256()
    for seed in range(4):
        for sample in (make_sample(task, seed, 1.0, "heldout"), make_sample(task, seed, 0.7)):
            accepted = [(one.tolerance, one.box) for one in sample.accepted]
            result.update(repr((sample.turns, accepted)).encode())
            for image, *annotations in sample.pictures:
                result.update(repr((image.size, [[tuple(a) for a in group] for group in annotations])).encode())
                result.update(image.tobytes())
    return result.hexdigest()[:16]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_samples_are_those_recorded(task):
    if task in VISUAL_TASKS and (PIL.__version__, matplotlib.__version__) != DRAWN_BY:
        pytest.skip(f"recorded with Pillow and matplotlib {DRAWN_BY}")
    assert digest(task) == RECORDED.split()[ALL_TASKS.index(task)]


@pytest.mark.parametrize("task", [task for task in ALL_TASKS if task != PAGE])
def test_train_and_heldout_differ(task):
    pairs = [(make_sample(task, seed), make_sample(task, seed, split="heldout")) for seed in range(8)]
    assert sum(train.turns != heldout.turns for train, heldout in pairs) >= 6


@pytest.mark.parametrize("task", VISUAL_TASKS)
def test_pictures_are_within_the_limits_grow_with_difficulty_and_are_annotated(task):
    mean_areas = []
    for difficulty in (0.0, 0.5, 1.0):
        pictures = [picture for seed in SEEDS for picture in make_sample(task, seed, difficulty).pictures]
        for image, characters, regions in pictures:
            assert image.mode == "RGB" and 64 <= min(image.size) and max(image.size) <= 1024
            assert max(image.size) <= 4 * min(image.size)
            assert characters or task in ("chart", DESCRIBE)  # matplotlib's charts are not annotated
            for left, top, right, bottom in (annotation.box for annotation in (*characters, *regions)):
                assert 0 <= (left + right) / 2 <= image.width and 0 <= (top + bottom) / 2 <= image.height
        mean_areas.append(np.mean([image.width * image.height for image, *_ in pictures]))
    assert task == PAGE or mean_areas[0] <= 160 * 160 and mean_areas[0] < mean_areas[1] < mean_areas[2]


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_its_images_and_asks_all_its_questions(task):
    held_out = [make_sample(task, seed, split="heldout") for seed in range(10)]
    assert all(len(sample.turns) == (2 if task == "two_turns" else 1) for sample in held_out)
    samples = [make_sample(task, seed, 0.9) for seed in SEEDS]
    for sample in (*held_out, *samples):
        assert sample.task == task and len(sample.images) == {"two_images": 2, "text_only": 0}.get(task, 1)
        assert len(sample.turns) == len(sample.accepted) <= tasks.MAX_QUESTIONS
        assert len({frozenset(re.findall(r"\w+", q)) for q, _ in sample.turns}) == len(sample.turns)  # all different
    most = max(len(sample.turns) for sample in samples)
    assert most == {"text": 1, "text_only": 1, "two_turns": 2}.get(task, most) and (most > 2 or task in SHORT_TASKS)
    prefixes = ("scene.", "receipt.") if task == "two_turns" else (f"{task}.",)
    asked = {question_kind(question) for sample in samples for question, _ in sample.turns}
    assert asked == {kind for kind in words.WORDINGS if kind.startswith(prefixes)}


def test_descriptions_tell_what_was_drawn():
    kinds = set()
    for seed in range(60):
        sample = make_sample(DESCRIBE, seed, 0.3)
        [(question, answer)], [picture] = sample.turns, sample.pictures
        kind = question_kind(question)
        kinds.add(kind)
        if kind == "describe.chart":
            drawn = [f"{region.text}={region.value}" for region in picture.regions if region.value is not None]
        elif kind == "describe.scene":
            shapes = zip(picture.annotations[::2], picture.annotations[1::2], strict=True)
            from_left = sorted(shapes, key=lambda shape: shape[0].box[0] + shape[0].box[2])
            drawn = [f"{color.text} {kind.text}" for color, kind in from_left]
        else:
            drawn = sorted("".join(one.text for one in picture.annotations).lower())
            answer = "\n".join(sorted("".join(answer.lower().split())))
        assert answer == "\n".join(drawn)
    assert kinds == {kind for kind in words.WORDINGS if kind.startswith("describe.")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("poem", 0), "'poem'"),
        (("text", 0, 1.0, "test"), "'test'"),
        (("text", 0, -0.1), "-0.1"),
        (("text", 0, 1.5), "1.5"),
        ((TEXT_PRETRAINING, 0, float("nan")), "nan"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_sample(*arguments)


# ------------------------------------------------------------------------------------------------------------- answers


def test_arithmetic_is_right():
    operators = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    seen = set()
    for seed in range(200):
        question, answer = make_sample("text_only", seed).turns[0]
        a, operator, b = re.search(r"(\d+) ([-+*]) (\d+)", question).groups()
        seen.add(operator)
        assert int(answer) == operators[operator](int(a), int(b)) >= 0
        assert max(int(a), int(b)) <= (12 if operator == "*" else 99)
    assert seen == set(operators)


def test_receipts_add_up_and_prices_are_those_listed():
    for description, question, answer in described("Receipt"):
        prices = {name: Decimal(price) for name, price in (entry.split() for entry in description.split(", "))}
        total = prices.pop("TOTAL")
        assert sum(prices.values()) == total
        assert 1 <= len(prices) <= 5 and all(Decimal("0.5") <= price <= Decimal("99.99") for price in prices.values())
        expected = {"receipt.total": f"{total:.2f}", "receipt.count": str(len(prices))}
        kind = question_kind(question)
        if kind == "receipt.price":
            (item,) = [name for name in prices if name in question.rstrip("?.").split()]
            expected[kind] = f"{prices[item]:.2f}"
        assert answer == expected[kind]


def test_described_charts_have_one_highest_and_one_lowest_value():
    for description, question, answer in described("Chart"):
        values = {label: int(value) for label, value in (entry.split("=") for entry in description.split(", "))}
        assert 3 <= len(values) <= 6 and all(1 <= value <= 99 for value in values.values())
        kind = question_kind(question)
        if kind == "chart.value":
            assert answer == str(values[re.search(r"\b[A-F]\b", question)[0]])
        else:
            extreme = (max if kind == "chart.highest" else min)(values.values())
            assert [label for label, value in values.items() if value == extreme] == [answer]


def test_described_scenes_are_answered_by_the_list():
    plural = {f"{kind}s": kind for kind in SHAPE_KINDS}
    for description, question, answer in described("Shapes"):
        kind, shapes = question_kind(question), description.split(", ")
        if kind == "grounding.box":
            name, box = re.fullmatch(r"<ref>(.*)</ref><box>\[\[(.*)\]\]</box>", answer).groups()
            entries = dict.fromkeys(entry for entry in shapes if entry.startswith(name))
            assert name in question and list(entries) == [f"{name} at {box.replace(',', '')}"]
            continue
        asked = [plural.get(word, word) for word in question.rstrip("?.").split()]
        kinds = [word for word in asked if word in SHAPE_KINDS]
        colors = [word for word in asked if word in SHADES]
        matching = [shape for shape in shapes if all(word in shape.split() for word in kinds + colors)]
        expected = {"scene.count": str(len(matching)), "scene.exists": "yes" if matching else "no"}
        if kind == "scene.color":
            assert matching == [f"{answer} {kinds[0]}"]
        else:
            assert answer == expected[kind]


def test_described_pairs_of_images_are_compared_right():
    for description, question, answer in described("First image"):
        first, second = (part.split(", ") for part in description.split(". Second image: "))
        (thing,) = [kind for kind in (*SHAPE_KINDS, "shape") if re.search(rf"\b{kind}s?\b", question)]
        counts = [len(part) if thing == "shape" else sum(s.endswith(thing) for s in part) for part in (first, second)]
        if question_kind(question) == "two_images.both":
            assert answer == ("yes" if all(counts) else "no")
        else:
            assert answer == ("first", "same", "second")[1 - int(np.sign(counts[0] - counts[1]))]


# ---------------------------------------------------------------------------------------------------------------- text


def test_texts_are_short_and_their_alphabet_grows():
    alphabets = []
    for level in (0.0, 0.1, 0.2, 0.4, 0.7, 1.0):
        rng = random.Random(0)
        texts = [questions.make_text(rng, level) for _ in range(3000)]
        assert all(re.fullmatch(r"[A-Za-z0-9.,:/$%-]{1,10}", text) for text in texts)
        alphabets.append(set("".join(texts)))
    assert len(alphabets[0]) == 4 and all(map(set.__le__, alphabets, alphabets[1:]))
    assert alphabets[-1] == set(words.ALPHABET) and {len(text) for text in texts} == set(range(1, 11))


def test_easy_text_is_black_on_white_and_not_cut_off():
    for seed in SEEDS:
        sample = make_sample("text", seed, 0.0)
        left, top, right, bottom = ink_box(sample.images[0])
        assert sample.images[0].size == (64, 64) and len(sample.turns[0][1]) == 1
        assert min(left, top, 64 - right, 64 - bottom) >= 2


@pytest.mark.parametrize("angle", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("in_columns", [False, True])
def test_annotations_are_where_the_characters_are(angle, in_columns):
    lines = ["Hi 7", "tea 12.40"]
    style = TextStyle("DejaVuSans.ttf", 40, angle)
    picture = drawing.draw_lines(random.Random(3), 0.1, lines, style, (400, 200), in_columns)
    assert sorted(one.text for one in picture.annotations) == sorted("".join(lines).replace(" ", ""))
    by_text = {one.text: one for one in picture.annotations}
    positions = {"H": (0, 3), "7": (3, 0), "4": (7, 1)} if not in_columns else {"H": (0, 1), "7": (0, 0), "4": (3, 1)}
    assert {text: by_text[text].position for text in positions} == positions
    assert by_text["H"].box[0] < by_text["i"].box[0] < by_text["7"].box[0]
    assert by_text["H"].box[1] < by_text["t"].box[1]
    rows, columns = np.nonzero(pixels(picture.image, "L") < 128)
    inside = np.zeros(len(rows), dtype=bool)
    for left, top, right, bottom in (one.box for one in by_text.values()):
        # Boxes are upright, so a letter rotated by 5 degrees leaves its box by a tenth of its height.
        here = (left - 4 <= columns) & (columns <= right + 4) & (top - 4 <= rows) & (rows <= bottom + 4)
        assert here.any()
        inside |= here
    assert inside.all()


@pytest.mark.parametrize("in_columns", [False, True])
def test_each_line_with_a_name_is_the_region_of_its_characters(in_columns):
    lines, names = ["Milk 0.75", "EGG 12.40", "TOTAL 13.15"], ["milk", "egg", "total"]
    style = TextStyle("DejaVuSans.ttf", 30)
    picture = drawing.draw_lines(random.Random(3), 0.1, lines, style, (400, 200), in_columns, names)
    assert [region.text for region in picture.regions] == names
    for one in picture.annotations:
        x, y = (one.box[0] + one.box[2]) / 2, (one.box[1] + one.box[3]) / 2
        boxes = [region.box for region in picture.regions]
        around = [i for i, box in enumerate(boxes) if box[0] <= x <= box[2] and box[1] <= y <= box[3]]
        assert len(around) == 1 and one.text in lines[around[0]]


def test_receipts_name_their_lines_as_questions_do():
    for seed in SEEDS:
        sample = make_sample("receipt", seed, 1.0)
        *items, total = [region.text for region in sample.pictures[0].regions]
        asked = [q.rstrip("?").split() for q, _ in sample.turns if question_kind(q) == "receipt.price"]
        assert total == "total" and all(sum(item in question for item in items) == 1 for question in asked)


def test_a_page_asks_nothing_and_is_full_of_characters():
    samples = [make_sample(PAGE, seed) for seed in range(50)]
    assert all(sample.turns == [] and len(sample.pictures[0].annotations) >= 1 for sample in samples)
    assert np.mean([len(sample.pictures[0].annotations) for sample in samples]) > 10


# -------------------------------------------------------------------------------------------------------------- shapes


def test_shapes_are_inside_their_area_and_apart():
    rng, counts = random.Random(0), set()
    for _ in range(300):
        size = drawing.canvas_size(rng, 1.0, 96)
        shapes = questions.make_scene(rng, 1.0, size, (0, 0, *size), tuple(SHADES)).shapes
        counts.add(len(shapes))
        taken = np.zeros((size[1], size[0]), dtype=int)
        for left, top, right, bottom in (shape.box for shape in shapes):
            assert 0 <= left and 0 <= top and right <= size[0] and bottom <= size[1]
            assert 20 <= min(right - left, bottom - top) and max(right - left, bottom - top) <= 200
            taken[top:bottom, left:right] += 1
        assert taken.max() == 1
    assert counts == set(range(1, 7))


@pytest.mark.parametrize("kind", SHAPE_KINDS)
def test_a_shape_touches_all_sides_of_its_box(kind):
    for level, seed in [(0.0, 0), *((1.0, seed) for seed in range(8))]:
        background = Background(Image.new("RGB", (100, 80), "white"), ((255, 255, 255),))
        drawing.draw_shapes(random.Random(seed), level, background, (Shape("red", kind, (11, 7, 73, 61)),))
        assert np.abs(np.subtract(ink_box(background.image), (11, 7, 73, 61))).max() <= 1


def test_grounding_answers_are_the_boxes_of_the_shapes():
    for seed in SEEDS:
        sample = make_sample("grounding", seed, 0.5)
        [picture] = sample.pictures
        for (question, answer), accepted in zip(sample.turns, sample.accepted, strict=True):
            name = re.search(f"({_COLORS}) ({_KINDS})", question)[0]
            assert answer == f"<ref>{name}</ref><box>[{list(accepted.box)}]</box>"
            box = accepted.box * np.tile(picture.image.size, 2) / 1000
            assert {one.text for one in picture.annotations if np.abs(one.box - box).max() <= 1} == set(name.split())


# -------------------------------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize(
    ("difficulty", "split", "share"), [(0.3, "train", (0, 0)), (0.3, "heldout", (1, 1)), (1.0, "train", (0.05, 0.5))]
)
def test_heldout_charts_are_drawn_by_matplotlib_and_easy_training_charts_are_not(difficulty, split, share):
    pictures = [make_sample("chart", seed, difficulty, split).pictures[0] for seed in SEEDS]
    assert share[0] <= sum(not picture.annotations for picture in pictures) / len(SEEDS) <= share[1]


@pytest.mark.parametrize("draw", [charts.draw_chart, charts.draw_chart_with_matplotlib])
def test_bars_are_as_high_as_their_values(draw):
    for seed in range(10):
        rng = random.Random(seed)
        chart = charts.Chart("bar", {label: rng.randint(5, 99) for label in "ABC"}, has_value_labels=False)
        image = draw(rng, 0.0, (301, 240), chart).image
        assert image.size == (301, 240)
        is_bar = np.abs(pixels(image) - charts.TAB_COLORS[0]).sum(-1) < 30
        columns = np.nonzero(is_bar.sum(0) > 0.5 * is_bar.sum(0)[is_bar.any(0)].min())[0]
        parts = np.split(columns, np.nonzero(np.diff(columns) > 2)[0] + 1)
        heights = np.array([np.median(is_bar[:, part].sum(0)) for part in parts])
        expected = np.array(list(chart.values.values()))
        assert np.abs(heights / max(heights) * expected.max() - expected).max() <= 1.5


@pytest.mark.parametrize("kind", ["bar", "line"])
def test_charts_are_annotated_and_their_columns_are_regions_of_label_and_tens(kind):
    chart = charts.Chart(kind, {"A": 35, "B": 7, "D": 81}, has_value_labels=True)
    picture = charts.draw_chart(random.Random(0), 0.0, (240, 200), chart)
    boxes = {one.text: one.box for one in picture.annotations}
    assert set("ABD35781") <= boxes.keys()
    shown = pixels(picture.image).min(-1)
    for left, top, right, bottom in boxes.values():
        assert shown[round(top) : round(bottom) + 1, round(left) : round(right) + 1].min() < 100
    assert [region.text for region in picture.regions] == ["A", "3", "B", "0", "D", "8"]
    for region in picture.regions[::2]:
        left, _, right, bottom = boxes[region.text]
        assert region.box[0] <= left < right <= region.box[2] and region.box[3] <= bottom


# ------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_itself_is_correct_whatever_its_case_and_blanks(task):
    for seed in SEEDS:
        sample = make_sample(task, seed, 0.7)
        for (_, answer), accepted in zip(sample.turns, sample.accepted, strict=True):
            assert all(is_correct(a, answer, accepted) for a in (answer, f" {answer.upper()}\n", answer.lower()))
            assert not any(is_correct(a, answer, accepted) for a in ("", f"{answer[:-1]}?"))


BOX = Accepted(box=(100, 100, 300, 300))


@pytest.mark.parametrize(
    ("expected", "accepted", "right", "wrong"),
    [
        ("12.40", Accepted(), "12.40", "12.4|12.41|1240|12.40 euros"),
        ("40", Accepted(tolerance=2), "38|40|42| 41.5 ", "37|43|4|B|40 or 41|-40"),
        ("", BOX, "[[100, 100, 300, 300]]|[[100,100,300,200]]", "[[100, 100, 300, 199]]|[[100, 100, 300, 501]]"),
        ("", BOX, "<ref>red star</ref>[[100, 100, 300, 300]]", "[[500, 500, 700, 700]]|[[300, 300, 100, 100]]"),
        ("", BOX, "[[100, 100, 300, 300]]", "[[100, 100, 300]]|100, 100, 300, 300"),
    ],
)
def test_only_estimates_have_a_tolerance_and_boxes_need_an_iou_of_a_half(expected, accepted, right, wrong):
    for answers, is_right in ((right, True), (wrong, False)):
        for answer in answers.replace("[[", "<box>[[").replace("]]", "]]</box>").split("|"):
            assert is_correct(answer, expected, accepted) is is_right


def test_only_drawn_values_without_labels_are_estimates():
    rng = random.Random(0)
    for has_labels, is_drawn, expected in [(False, True, {0, 2}), (True, True, {0}), (False, False, {0})]:
        chart = charts.Chart("bar", {"A": 10, "B": 20, "C": 30}, has_labels)
        asked = [questions.ask_chart(rng, chart, is_drawn) for _ in range(50)]
        assert {question.accepted.tolerance for question in asked} == expected
        assert {question.kind for question in asked if question.accepted.tolerance} <= {"chart.value"}
