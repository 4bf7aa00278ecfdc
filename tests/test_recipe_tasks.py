"""The recipe's samples: reproducible, within the stated ranges, and with answers that follow from what is shown."""

import random
import re
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from PIL import Image, ImageChops

from recipes import drawing, tasks
from recipes.tasks import TASKS, Accepted, Sample, is_correct, make_sample, make_text_sample

VISUAL_TASKS = tuple(task for task in TASKS if task != "text_only")
SEEDS = range(40)
RECORDED_ANSWERS = ["20", "96", "8", "110", "95", "80"]


_KINDS = "|".join(drawing.SHAPE_KINDS)
_COLORS = "|".join(drawing.SHADES)
FIELDS = {
    "item": "|".join(tasks.GOODS + tasks.OTHER_NAMES + tasks.OTHER_GOODS),
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
    for kind, wordings in tasks.WORDINGS.items()
    for wording in wordings
]


def question_kind(question: str) -> str:
    """The entry of WORDINGS that the question was worded by."""
    return next(kind for kind, pattern in WORDING_PATTERNS if re.fullmatch(pattern, question))


def described(kind: str, count: int = 400) -> list[tuple[str, str, str]]:
    """(description, question, answer) of the described samples of one kind, such as "Chart"."""
    found = []
    for seed in range(count):
        sample = make_text_sample(seed)
        match = re.fullmatch(rf"{kind}: (.*)\. (.*)", sample.turns[0][0])
        if match:
            questions = [match[2], *(question for question, _ in sample.turns[1:])]
            found += [(match[1], q, answer) for q, (_, answer) in zip(questions, sample.turns, strict=True)]
    assert len(found) > 10
    return found


def ink_box(image: Image.Image) -> tuple[int, int, int, int]:
    """The bounding box of everything that is not white."""
    return ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("difficulty", [0.0, 0.4, 1.0])
def test_same_arguments_give_the_same_sample(task, difficulty):
    for seed in range(8):
        first = make_sample(task, seed, difficulty)
        random.seed(seed)
        np.random.seed(seed)
        second = make_sample(task, seed, difficulty)
        assert first.turns == second.turns and first.accepted == second.accepted
        assert [image.tobytes() for image in first.images] == [image.tobytes() for image in second.images]


def test_seeding_does_not_depend_on_the_process():
    """Python salts its own hash() in each process; these answers were recorded in another one."""
    assert [make_sample("text_only", seed).turns[0][1] for seed in range(6)] == RECORDED_ANSWERS


@pytest.mark.parametrize("task", TASKS)
def test_train_and_heldout_differ(task):
    pairs = [(make_sample(task, seed), make_sample(task, seed, split="heldout")) for seed in range(8)]
    assert sum(train.turns != heldout.turns for train, heldout in pairs) >= 6


@pytest.mark.parametrize("task", VISUAL_TASKS)
@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
def test_pictures_are_rgb_and_within_the_limits(task, difficulty):
    for seed in SEEDS:
        for image in make_sample(task, seed, difficulty).images:
            assert image.mode == "RGB"
            assert 64 <= min(image.size) and max(image.size) <= 1024
            assert max(image.size) <= 4 * min(image.size)


def test_sizes_cover_the_whole_range():
    rng = random.Random(0)
    sizes = [drawing.canvas_size(rng, 1.0, 96) for _ in range(3000)]
    assert min(min(size) for size in sizes) < 70 and max(max(size) for size in sizes) > 1000
    assert max(width / height for width, height in sizes) > 3.7
    assert max(height / width for width, height in sizes) > 3.7
    assert np.median([width * height for width, height in sizes]) < 300 * 300


@pytest.mark.parametrize("task", VISUAL_TASKS)
def test_pictures_grow_with_difficulty(task):
    def mean_area(difficulty: float) -> float:
        images = [image for seed in SEEDS for image in make_sample(task, seed, difficulty).images]
        return float(np.mean([image.width * image.height for image in images]))

    assert mean_area(0.0) <= 160 * 160
    assert mean_area(0.0) < mean_area(0.5) < mean_area(1.0)


def test_matplotlib_charts_have_the_size_asked_for():
    rng = random.Random(0)
    chart = tasks.make_chart(rng, 1.0)
    for size in [(96, 384), (101, 97), (333, 257), (1023, 256)]:
        assert drawing.draw_chart_with_matplotlib(rng, 1.0, size, chart).image.size == size


def test_heldout_charts_are_drawn_by_matplotlib_and_easy_training_charts_are_not(monkeypatch):
    calls = []
    draw = drawing.draw_chart_with_matplotlib
    monkeypatch.setattr(drawing, "draw_chart_with_matplotlib", lambda *args: calls.append(args) or draw(*args))
    for seed in range(6):
        make_sample("chart", seed, 0.3)
    assert not calls
    for seed in range(6):
        make_sample("chart", seed, 0.3, split="heldout")
    assert len(calls) == 6
    for seed in SEEDS:
        make_sample("chart", seed, 1.0)
    assert 6 < len(calls) < 6 + len(SEEDS) / 2


@pytest.mark.parametrize("task", TASKS)
def test_each_image_has_a_marker_at_the_start_of_the_first_question(task):
    count = {"two_images": 2, "text_only": 0}.get(task, 1)
    for seed in range(10):
        sample = make_sample(task, seed, split="heldout")
        assert sample.task == task and len(sample.images) == count
        assert len(sample.turns) == len(sample.accepted) == (2 if task == "two_turns" else 1)
        sample = make_sample(task, seed)
        assert len(sample.images) == count and len(sample.turns) == len(sample.accepted)


@pytest.mark.parametrize("task", TASKS)
def test_every_question_of_a_task_occurs(task):
    asked = {question_kind(q) for seed in SEEDS for q, _ in make_sample(task, seed, 0.9).turns}
    prefixes = ("scene.", "receipt.") if task == "two_turns" else (f"{task}.",)
    assert asked == {kind for kind in tasks.WORDINGS if kind.startswith(prefixes)}


@pytest.mark.parametrize("task", TASKS)
def test_training_pictures_get_several_different_questions_where_they_can(task):
    samples = [make_sample(task, seed, 0.5) for seed in SEEDS]
    for sample in samples:
        assert len({frozenset(re.findall(r"\w+", q)) for q, _ in sample.turns}) == len(sample.turns)
    most = max(len(sample.turns) for sample in samples)
    assert most == {"text": 1, "text_only": 1, "two_turns": 2}.get(task, most)
    assert task not in ("receipt", "chart", "scene", "grounding", "two_images") or 2 < most <= tasks.MOST_QUESTIONS


def test_descriptions_tell_what_was_drawn(monkeypatch):
    drawn = {}

    def record(name):
        draw = getattr(drawing, name)
        monkeypatch.setattr(drawing, name, lambda *args, **more: drawn.update({name: args}) or draw(*args, **more))

    for name in ("draw_lines", "draw_chart", "draw_shapes"):
        record(name)
    kinds = set()
    for seed in range(60):
        drawn.clear()
        [(question, answer)] = make_sample(tasks.DESCRIBE, seed, 0.3).turns
        kind = question_kind(question)
        kinds.add(kind)
        if kind in ("describe.lines", "describe.receipt"):
            expected = "\n".join(drawn["draw_lines"][2]).lower().replace("total", "TOTAL")
            assert answer == expected or kind == "describe.lines" and answer.lower() == expected.lower()
        elif kind == "describe.chart":
            assert answer == "\n".join(f"{label}={value}" for label, value in drawn["draw_chart"][3].values.items())
        else:
            shapes = sorted(drawn["draw_shapes"][3], key=lambda shape: shape.box[0] + shape.box[2])
            assert answer == "\n".join(shape.name for shape in shapes)
    assert kinds == {kind for kind in tasks.WORDINGS if kind.startswith("describe.")}


def test_every_wording_and_every_kind_of_text_sample_occurs():
    openings = {make_text_sample(seed).turns[0][0].split()[0] for seed in range(200)}
    assert {"Text:", "Receipt:", "Chart:", "Shapes:", "First", "Repeat:", "Copy:", "What"} <= openings
    rng = random.Random(0)
    turn = tasks.Turn("text.read", "x")
    assert {tasks.phrase(rng, 1.0, turn) for _ in range(200)} == set(tasks.WORDINGS["text.read"])
    assert {tasks.phrase(rng, 0.0, turn) for _ in range(50)} == {tasks.WORDINGS["text.read"][0]}


def test_text_samples_are_reproducible_and_have_no_images():
    for seed in SEEDS:
        sample = make_text_sample(seed)
        assert sample == make_text_sample(seed)
        assert sample.task == "pretrain_text" and sample.images == []


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


def test_texts_are_one_line_of_the_allowed_characters_and_all_occur():
    rng = random.Random(0)
    texts = [tasks.make_text(rng, 1.0) for _ in range(3000)]
    assert all(re.fullmatch(r"[A-Za-z0-9.,:/$%-]{1,10}", text) for text in texts)
    assert set("".join(texts)) == set(tasks.ALPHABET)
    assert {len(text) for text in texts} == set(range(1, 11))
    assert any(text.lower() in tasks.WORDS for text in texts)


def test_the_alphabet_grows_gradually():
    def symbols(level: float) -> int:
        rng = random.Random(0)
        return len(set("".join(tasks.make_text(rng, level) for _ in range(2000))))

    counts = [symbols(level) for level in (0.0, 0.1, 0.2, 0.4, 0.7)]
    assert counts[0] == 4 and counts[-1] == len(tasks.ALPHABET)
    assert all(low < high for low, high in zip(counts, counts[1:], strict=False))


@pytest.mark.parametrize("font", drawing.FONT_FILES)
def test_lines_stay_inside_the_canvas_at_the_largest_font_size(font):
    for text in ("j", "WWWWW", "Wg,$%jy"):
        for angle in (-5.0, 0.0, 5.0):
            size = drawing.largest_font_size([text], font, angle, (200, 120))
            mask = drawing.text_mask([text], drawing.Lettering(font, size, angle)).image
            assert mask.width <= 196 and mask.height <= 116
            assert mask.width > 150 or mask.height > 60
        size = drawing.largest_font_size([text] * 3, font, 0.0, (400, 120), pitch=2.0)
        mask = drawing.text_mask([text] * 3, drawing.Lettering(font, size, pitch=2.0)).image
        assert mask.width <= 396 and 90 < mask.height <= 116


def test_easy_text_is_black_on_white_and_not_cut_off():
    for seed in SEEDS:
        sample = make_sample("text", seed, 0.0)
        left, top, right, bottom = ink_box(sample.images[0])
        assert sample.images[0].size == (64, 64) and len(sample.turns[0][1]) == 1
        assert min(left, top, 64 - right, 64 - bottom) >= 2


def test_training_texts_are_mostly_small_and_heldout_ones_are_not():
    def small_share(split: str) -> float:
        heights = []
        for seed in range(100):
            [picture] = make_sample("text", seed, 1.0, split).pictures
            heights.append(min(mark.box[3] - mark.box[1] for mark in picture.marks))
        assert min(heights) < 16 and max(heights) > 64  # all sizes occur in both
        return sum(height < 24 for height in heights) / len(heights)

    assert small_share("train") > 0.62 > small_share("heldout") > 0.4


def test_text_contrasts_with_its_backdrop():
    rng = random.Random(0)
    for _ in range(300):
        backdrop = drawing.make_backdrop(rng, 1.0, (64, 64))
        color = drawing.text_color(rng, 1.0, backdrop.tones)
        assert min(abs(drawing.luma(color) - drawing.luma(tone)) for tone in backdrop.tones) >= 50


def test_shapes_contrast_with_their_backdrop():
    rng = random.Random(0)
    for _ in range(300):
        backdrop = drawing.make_backdrop(rng, 1.0, (64, 64))
        for name in drawing.fill_colors(tuple(drawing.SHADES), backdrop.tones):
            color = drawing.fill_color(rng, name, 1.0, backdrop.tones)
            assert min(drawing.color_distance(color, tone) for tone in backdrop.tones) >= drawing.MIN_COLOR_DISTANCE


def test_receipts_add_up_and_prices_are_those_listed():
    for description, question, answer in described("Receipt", 1200):
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
    for description, question, answer in described("Chart", 1200):
        values = {label: int(value) for label, value in (entry.split("=") for entry in description.split(", "))}
        assert 3 <= len(values) <= 6 and all(1 <= value <= 99 for value in values.values())
        kind = question_kind(question)
        if kind == "chart.value":
            assert answer == str(values[re.search(r"\b[A-F]\b", question)[0]])
        else:
            extreme = (max if kind == "chart.highest" else min)(values.values())
            assert [label for label, value in values.items() if value == extreme] == [answer]


def test_described_scenes_are_answered_by_the_list():
    plural = {f"{kind}s": kind for kind in drawing.SHAPE_KINDS}
    for description, question, answer in described("Shapes", 1200):
        kind = question_kind(question)
        if kind == "grounding.box":
            name, box = re.fullmatch(r"<ref>(.*)</ref><box>\[\[(.*)\]\]</box>", answer).groups()
            entries = dict.fromkeys(entry for entry in description.split(", ") if entry.startswith(name))
            assert name in question and list(entries) == [f"{name} at {box.replace(',', '')}"]
            continue
        shapes = description.split(", ")
        words = [plural.get(word, word) for word in question.rstrip("?.").split()]
        kinds = [word for word in words if word in drawing.SHAPE_KINDS]
        colors = [word for word in words if word in drawing.SHADES]
        matching = [shape for shape in shapes if all(word in shape.split() for word in kinds + colors)]
        if kind == "scene.count":
            assert answer == str(len(matching))
        elif kind == "scene.exists":
            assert answer == ("yes" if matching else "no")
        else:
            assert matching == [f"{answer} {kinds[0]}"]


def test_described_pairs_of_images_are_compared_right():
    for description, question, answer in described("First image", 1200):
        first, second = (part.split(", ") for part in description.split(". Second image: "))
        (thing,) = [kind for kind in (*drawing.SHAPE_KINDS, "shape") if re.search(rf"\b{kind}s?\b", question)]
        counts = [len(part) if thing == "shape" else sum(s.endswith(thing) for s in part) for part in (first, second)]
        if question_kind(question) == "two_images.both":
            assert answer == ("yes" if all(counts) else "no")
        else:
            assert answer == ("first", "same", "second")[1 - int(np.sign(counts[0] - counts[1]))]


@pytest.mark.parametrize("task, kind", [("scene", "scene.exists"), ("two_images", "two_images.both")])
def test_yes_and_no_are_about_equally_frequent(task, kind):
    answers = [a for seed in range(300) for q, a in make_sample(task, seed, 0.5).turns if question_kind(q) == kind]
    assert 0.35 < answers.count("yes") / len(answers) < 0.65 and set(answers) == {"yes", "no"}


def test_shapes_are_inside_their_area_and_apart():
    rng = random.Random(0)
    colors = tuple(drawing.SHADES)
    counts = set()
    for _ in range(300):
        size = drawing.canvas_size(rng, 1.0, 96)
        shapes = tasks.make_scene(rng, 1.0, size, (0, 0, *size), colors).shapes
        counts.add(len(shapes))
        taken = np.zeros((size[1], size[0]), dtype=int)
        for shape in shapes:
            left, top, right, bottom = shape.box
            assert 0 <= left and 0 <= top and right <= size[0] and bottom <= size[1]
            assert 20 <= min(right - left, bottom - top) and max(right - left, bottom - top) <= 200
            taken[top:bottom, left:right] += 1
        assert taken.max() == 1
    assert counts == set(range(1, 7))


@pytest.mark.parametrize("kind", drawing.SHAPE_KINDS)
def test_a_shape_touches_all_sides_of_its_box(kind):
    for level, seed in [(0.0, 0), *((1.0, seed) for seed in range(8))]:
        backdrop = drawing.Backdrop(Image.new("RGB", (100, 80), "white"), ((255, 255, 255),))
        shape = drawing.Shape("red", kind, (11, 7, 73, 61))
        drawing.draw_shapes(random.Random(seed), level, backdrop, (shape,))
        assert np.abs(np.subtract(ink_box(backdrop.image), shape.box)).max() <= 1


def test_easy_grounding_answers_are_the_boxes_of_the_ink():
    checked = 0
    for seed in SEEDS:
        sample = make_sample("grounding", seed, 0.0)
        question, answer = sample.turns[0]
        name = re.search(r"(red|blue) (circle|square)", question)[0]
        pixels = np.asarray(sample.images[0])
        red, blue = pixels[..., 0] > pixels[..., 2], pixels[..., 2] > pixels[..., 0]
        if (red.any() and blue.any()) or not answer.startswith(f"<ref>{name}</ref>"):
            rows, columns = np.nonzero(red if name.startswith("red") else blue)
        else:
            rows, columns = np.nonzero(red | blue)
        ink = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * 1000 / 96
        if len(np.unique(pixels.reshape(-1, 3), axis=0)) == 3:  # white and two colours: one shape of each
            checked += 1
            assert np.abs(ink - sample.accepted[0].box).max() <= 12
        assert answer == f"<ref>{name}</ref><box>[{list(sample.accepted[0].box)}]</box>"
    assert checked >= 3


@pytest.mark.parametrize("inset", [0, 1, 2, 5, 12])
def test_no_corner_of_what_is_on_a_patch_is_left_on_the_photograph(inset):
    patch, tone = (7, 5, 93, 74), (250, 240, 10)
    for seed in range(12):
        backdrop = drawing.Backdrop(Image.new("RGB", (100, 80), "navy"), (tone,), needs_patch=True)
        drawing.paint_patch(random.Random(seed), backdrop, patch, inset)
        inside = backdrop.image.crop((patch[0] + inset, patch[1] + inset, patch[2] - inset, patch[3] - inset))
        assert inside.getcolors() == [(inside.width * inside.height, tone)]
        assert backdrop.image.getpixel((3, 40)) != tone


def test_a_patch_that_its_content_sticks_out_of_has_sharp_corners():
    for seed in range(6):
        backdrop = drawing.Backdrop(Image.new("RGB", (100, 80), "navy"), ((250, 240, 10),), needs_patch=True)
        drawing.paint_patch(random.Random(seed), backdrop, (7, 5, 93, 74), -9)
        assert backdrop.image.crop((7, 5, 93, 74)).getcolors() == [(86 * 69, (250, 240, 10))]


@pytest.mark.parametrize("draw", [drawing.draw_chart, drawing.draw_chart_with_matplotlib])
def test_bars_are_as_high_as_their_values(draw):
    for seed in range(10):
        rng = random.Random(seed)
        chart = drawing.Chart("bar", {label: rng.randint(5, 99) for label in "ABC"}, annotated=False)
        pixels = np.asarray(draw(rng, 0.0, (300, 240), chart).image).astype(int)
        bar = np.abs(pixels - drawing.TAB_COLORS[0]).sum(-1) < 30
        columns = np.nonzero(bar.sum(0) > 0.5 * bar.sum(0)[bar.any(0)].min())[0]
        parts = np.split(columns, np.nonzero(np.diff(columns) > 2)[0] + 1)
        heights = [np.median(bar[:, part].sum(0)) for part in parts]
        expected = np.array(list(chart.values.values()))
        assert np.abs(np.array(heights) / max(heights) * expected.max() - expected).max() <= 1.5


# --------------------------------------------------------------------------------------------------------------- marks


@pytest.mark.parametrize("angle", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("in_columns", [False, True])
def test_marks_are_where_the_characters_are(angle, in_columns):
    lines = ["Hi 7", "tea 12.40"]
    picture = drawing.draw_lines(
        random.Random(3), 0.1, lines, drawing.Lettering("DejaVuSans.ttf", 40, angle), (400, 200), in_columns
    )
    assert sorted(mark.text for mark in picture.marks) == sorted("".join(lines).replace(" ", ""))
    by_text = {mark.text: mark.box for mark in picture.marks}
    orders = {mark.text: mark.order for mark in picture.marks}
    assert (orders["H"], orders["7"], orders["4"]) == (
        (0, 1 if in_columns else 3),
        (0 if in_columns else 3, 0),
        (3 if in_columns else 7, 1),
    )
    assert by_text["H"][0] < by_text["i"][0] < by_text["7"][0] and by_text["H"][1] < by_text["t"][1]
    ink = np.asarray(picture.image.convert("L")) < 128
    rows, columns = np.nonzero(ink)
    inside = np.zeros(len(rows), dtype=bool)
    for left, top, right, bottom in by_text.values():
        # Upright boxes of letters that lean by 5 degrees leave a margin of a tenth of their height.
        here = (left - 4 <= columns) & (columns <= right + 4) & (top - 4 <= rows) & (rows <= bottom + 4)
        assert here.any()
        inside |= here
    assert inside.all()


def test_marks_of_a_chart_are_its_numbers_and_letters():
    chart = drawing.Chart("bar", {"A": 35, "B": 62, "C": 81}, annotated=True)
    picture = drawing.draw_chart(random.Random(0), 0.0, (240, 200), chart)
    texts = "".join(mark.text for mark in picture.marks)
    assert all(character in texts for character in "ABC3562810")
    pixels = np.asarray(picture.image).min(-1)
    for left, top, right, bottom in (mark.box for mark in picture.marks):
        assert pixels[round(top) : round(bottom) + 1, round(left) : round(right) + 1].min() < 100


@pytest.mark.parametrize("task", [task for task in VISUAL_TASKS if task not in ("chart", "two_turns")])
@pytest.mark.parametrize("difficulty", [0.0, 1.0])
def test_every_training_picture_but_matplotlibs_has_marks_inside_it(task, difficulty):
    for seed in SEEDS:
        for image, marks, areas in make_sample(task, seed, difficulty).pictures:
            assert marks
            for left, top, right, bottom in (mark.box for mark in (*marks, *areas)):
                assert 0 <= (left + right) / 2 <= image.width and 0 <= (top + bottom) / 2 <= image.height


@pytest.mark.parametrize("in_columns", [False, True])
def test_lines_with_names_have_areas_around_their_characters(in_columns):
    lines, names = ["Milk 0.75", "EGG 12.40", "TOTAL 13.15"], ["milk", "egg", "total"]
    lettering = drawing.Lettering("DejaVuSans.ttf", 30)
    picture = drawing.draw_lines(random.Random(3), 0.1, lines, lettering, (400, 200), in_columns, names)
    assert [area.text for area in picture.areas] == names
    for mark in picture.marks:
        x, y = (mark.box[0] + mark.box[2]) / 2, (mark.box[1] + mark.box[3]) / 2
        boxes = [area.box for area in picture.areas]
        around = [i for i, box in enumerate(boxes) if box[0] <= x <= box[2] and box[1] <= y <= box[3]]
        assert len(around) == 1 and mark.text in lines[around[0]]


def test_receipts_name_their_lines_as_questions_do():
    for seed in SEEDS:
        sample = make_sample("receipt", seed, 0.5)
        names = [area.text for area in sample.pictures[0].areas]
        assert names[-1] == "total" and set(names[:-1]) <= set(tasks.GOODS)
        asked = [name for question, _ in sample.turns for name in names[:-1] if f" the {name}" in question]
        assert len(asked) == sum("." in answer for _, answer in sample.turns) - sum(
            "total" in question or "sum" in question or "together" in question for question, _ in sample.turns
        )


def test_some_names_on_full_receipts_are_on_no_list():
    samples = [make_sample("receipt", seed, 1.0) for seed in SEEDS]
    names = [area.text for sample in samples for area in sample.pictures[0].areas if area.text != "total"]
    others = [name for name in names if name not in tasks.GOODS]
    assert 0.2 * len(names) < len(others) < 0.6 * len(names)
    assert set(others) & set(tasks.OTHER_GOODS) and set(others) - set(tasks.OTHER_GOODS) <= set(tasks.OTHER_NAMES)
    assert not set(tasks.OTHER_GOODS) & set(tasks.GOODS)


def test_dots_lead_to_the_prices_of_some_training_receipts():
    receipt = tasks.Receipt({"tea": 250, "sandwich": 1199})

    def count_dots(leader_share: float, seed: int) -> int:
        picture = tasks.draw_receipt(random.Random(seed), 1.0, receipt, leader_share)
        return sum(mark.text == "." for mark in picture.marks) if picture else 0

    assert all(count_dots(0.0, seed) in (0, 3) for seed in SEEDS)
    assert sum(count_dots(1.0, seed) > 9 for seed in SEEDS) > len(SEEDS) / 2
    assert all(
        sum(mark.text == "." for mark in make_sample("receipt", seed, split="heldout").pictures[0].marks)
        == len(make_sample("receipt", seed, split="heldout").pictures[0].areas)
        for seed in range(8)
    )


def test_shapes_of_a_colour_are_counted():
    box = (0, 0, 9, 9)
    shapes = [drawing.Shape(*name.split(), box) for name in ("red circle", "red star", "blue star")]
    scene = tasks.Scene((64, 64), tuple(shapes))
    asked = {
        turn.fields["things"]: turn.answer for turn in (tasks._ask_count(random.Random(i), 1.0, scene) for i in SEEDS)
    }
    assert asked["red shapes"] == "2" and asked["blue shapes"] == "1" and asked["shapes"] == "3"


def test_close_calls_ask_for_what_both_images_have():
    def scene(*names: str) -> tasks.Scene:
        return tasks.Scene((64, 64), tuple(drawing.Shape(*name.split(), (0, 0, 9, 9)) for name in names))

    scenes = [scene("red circle", "blue circle", "red star"), scene("red circle", "red square", "blue square")]
    for seed in range(20):
        turn = tasks.compare_scenes(random.Random(seed), scenes, "two_images.more", "first", close_call=True)
        assert turn.fields == {"things": "circles"}
    assert tasks.compare_scenes(random.Random(0), scenes, "two_images.more", "second", close_call=True) is None
    rng = random.Random(0)
    asked = [tasks._comparison_wanted(rng, 1.0) for _ in range(400)]
    assert 50 < sum(close_call for *_, close_call in asked) < 150
    assert {kind for kind, _, close_call in asked if close_call} == {"two_images.more"}


def test_charts_with_wide_margins_keep_a_tenth_of_each_side_clear():
    rng, chart = random.Random(0), drawing.Chart("bar", {"A": 35, "B": 62, "C": 99}, annotated=True)
    style = replace(drawing.chart_style(rng, 0.0, (400, 300), chart), wide_margins=True, title="")
    left, top, right, bottom = drawing._plot_box(style, (400, 300), mark=4)
    assert left >= 40 and top >= 2 * style.font_size and right <= 360 and bottom <= 270
    low, high = drawing.axis_limits(chart, style, bottom - top)
    assert low == 0 and high == pytest.approx(1.05 * 99)  # the number over the highest bar stands above the frame


def test_columns_of_a_chart_are_areas_of_their_letter_and_tens():
    chart = drawing.Chart("line", {"A": 35, "B": 7, "D": 81}, annotated=False)
    picture = drawing.draw_chart(random.Random(0), 0.0, (240, 200), chart)
    assert [area.text for area in picture.areas] == ["A", "3", "B", "0", "D", "8"]
    letters = {mark.text: mark.box for mark in picture.marks if mark.text in "ABD"}
    for area in picture.areas[::2]:
        left, _, right, bottom = letters[area.text]
        assert area.box[0] <= left < right <= area.box[2] and area.box[3] <= bottom


def test_a_page_asks_nothing_and_is_full_of_characters():
    samples = [make_sample(tasks.PAGE, seed) for seed in range(200)]
    assert all(sample.turns == [] and len(sample.pictures[0].marks) >= 1 for sample in samples)
    heights = [mark.box[3] - mark.box[1] for sample in samples for mark in sample.pictures[0].marks]
    assert min(heights) < 16 and max(heights) > 48
    assert np.mean([len(sample.pictures[0].marks) for sample in samples]) > 10


def test_shapes_are_marked_with_their_colour_and_kind():
    for seed in SEEDS:
        sample = make_sample("grounding", seed, 0.5)
        name = re.search(r"<ref>(.*)</ref>", sample.turns[0][1])[1]
        box = sample.accepted[0].box
        picture = sample.pictures[0]
        scale = np.tile(picture.image.size, 2) / 1000
        found = {mark.text for mark in picture.marks if np.abs(np.array(mark.box) - box * scale).max() <= 1}
        assert found == set(name.split())


# ------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_itself_is_correct_whatever_its_case_and_blanks(task):
    for seed in SEEDS:
        sample = make_sample(task, seed, 0.7)
        for turn, (_, answer) in enumerate(sample.turns):
            assert is_correct(sample, turn, answer)
            assert is_correct(sample, turn, f" {answer.upper()}\n") and is_correct(sample, turn, answer.lower())
            assert not is_correct(sample, turn, "") and not is_correct(sample, turn, f"{answer[:-1]}?")


def test_exact_answers_have_no_tolerance():
    sample = Sample("receipt", [], [("How much is the tea?", "12.40")], [Accepted()])
    assert not any(is_correct(sample, 0, answer) for answer in ("12.4", "12.41", "1240", "12.40 euros"))


def test_values_read_off_an_axis_may_differ_by_two():
    sample = Sample("chart", [], [("What is the value of B?", "40")], [Accepted(tolerance=2)])
    assert all(is_correct(sample, 0, answer) for answer in ("38", "40", "42", " 41.5 "))
    assert not any(is_correct(sample, 0, answer) for answer in ("37", "43", "4", "B", "40 or 41", "-40"))


def test_only_values_that_are_not_written_are_tolerant():
    chart = drawing.Chart("bar", {"A": 10, "B": 20, "C": 30}, annotated=False)
    rng = random.Random(0)
    for annotated, read_off, expected in [(False, True, {0, 2}), (True, True, {0}), (False, False, {0})]:
        shown = drawing.Chart(chart.kind, chart.values, annotated)
        turns = [tasks.ask_chart(rng, shown, read_off) for _ in range(50)]
        assert {turn.accepted.tolerance for turn in turns} == expected
        assert {turn.kind for turn in turns if turn.accepted.tolerance} <= {"chart.value"}


def test_boxes_need_half_of_the_union():
    sample = Sample("grounding", [], [("Where is it?", "")], [Accepted(box=(100, 100, 300, 300))])
    for box, expected in [
        ("100, 100, 300, 300", True),
        ("100,100,300,200", True),  # exactly half
        ("100, 100, 300, 199", False),
        ("100, 100, 300, 501", False),
        ("500, 500, 700, 700", False),
        ("300, 300, 100, 100", False),
    ]:
        assert is_correct(sample, 0, f"<ref>red star</ref><box>[[{box}]]</box>") is expected
    assert not is_correct(sample, 0, "100, 100, 300, 300")
    assert not is_correct(sample, 0, "<box>[[100, 100, 300]]</box>")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'poem'"):
        make_sample("poem", 0)
    with pytest.raises(ValueError, match="'test'"):
        make_sample("text", 0, split="test")
    for difficulty in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=str(difficulty)):
            make_sample("text", 0, difficulty)
        with pytest.raises(ValueError, match=str(difficulty)):
            make_text_sample(0, difficulty)
