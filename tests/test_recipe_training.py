"""The training recipe: its tokenizer, its packing, its dials, and a step that learns."""

import copy
import itertools
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import relative_error

pytest.importorskip("matplotlib")

from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from navil import modeling_navil as modeling  # noqa: E402
from navil import processing_navil as processing
from recipes import blueprint, cells, close_ups, data, deepen, drawing, optimizer, plot, publish, train  # noqa: E402
from recipes.drawing import Mark, Picture  # noqa: E402
from recipes.tasks import DESCRIBE, PAGE, TASKS, Accepted, Sample, is_correct, make_sample, thousandths  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return blueprint.build_tokenizer(blueprint.question_words())


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return blueprint.build_model(tokenizer).eval()


@pytest.fixture(scope="module")
def processor(tokenizer, model):
    return blueprint.build_processor(tokenizer, model.config)


def drawn(processor, *tasks):
    return [data.encode(data.draw(task, seed, 0.3), processor) for seed, task in enumerate(tasks)]


def test_blueprint_size(model):
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 5e6 < parameters < 20e6  # at most 40 MB in bf16
    assert model.config.vision_config.visual_token_order == "raster"


def test_tokenizer_reads_words_and_spells_answers(tokenizer):
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is there a star?"}, {"role": "assistant", "content": "the text 12.40"}]
    )
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert "Ġthere" in tokens and "assistant\n" in tokens
    answer = tokens[tokens.index("assistant\n") + 1 :]
    assert answer == ["t", "h", "e", "Ġtext", "Ġ", "1", "2", ".", "4", "0", "<|im_end|>"]
    grounded = "<ref>red star</ref><box>[[1, 2, 3, 4]]</box>"
    assert tokenizer.decode(tokenizer(grounded)["input_ids"], skip_special_tokens=True) == grounded


@pytest.mark.parametrize("task", data.ALL_TASKS)
def test_labels_are_the_answers(processor, task):
    sample = data.draw(task, 3, 0.5)
    encoded = data.encode(sample, processor)
    labels = encoded.conversation.labels[encoded.conversation.labels != processing.IGNORE_INDEX]
    assert processor.tokenizer.decode(labels) == "".join(f"{answer}<|im_end|>" for _, answer in sample.turns)
    assert len(encoded.conversation.labels) == encoded.num_tokens
    assert bool(sample.images) == bool(encoded.conversation.images)


def test_training_ids_begin_like_the_ids_that_chat_sees(model, processor, monkeypatch):
    sample = make_sample("scene", 1, 0.3)
    conversation = data.encode(sample, processor).conversation
    prompt = int((conversation.labels != processing.IGNORE_INDEX).nonzero()[0])
    seen = []
    monkeypatch.setattr(model, "generate", lambda **inputs: seen.append(inputs) or inputs["input_ids"])
    model.chat(processor.tokenizer, sample.images, sample.turns[0][0])
    assert torch.equal(seen[0]["input_ids"][0], conversation.input_ids[:prompt])
    assert torch.equal(seen[0]["pixel_values"], conversation.images["pixel_values"])


def test_packed_samples_do_not_see_each_other(model, processor):
    samples = drawn(processor, "text", "text_only", "scene", "two_images", "two_turns")
    batch = data.pack([samples[:2], samples[2:]], processor.tokenizer.pad_token_id)
    with torch.no_grad():
        packed = model(**train.model_inputs(batch)).logits
        for row, in_row in enumerate((samples[:2], samples[2:])):
            start = 0
            for sample in in_row:
                alone = model(sample.conversation.input_ids[None], **sample.conversation.images).logits[0]
                assert relative_error(packed[row, start : start + sample.num_tokens], alone) < 1e-5
                start += sample.num_tokens
    tasks = [sample.task for sample in samples for _ in range(sample.num_answers)]
    assert batch["task_index"].tolist() == tasks and len(tasks) > len(samples)


def test_stream_fills_batches_within_their_limits(processor):
    weights = torch.tensor([1.0 if task in ("text", "text_only") else 0.0 for task in data.ALL_TASKS])
    difficulty = torch.zeros(len(data.ALL_TASKS))
    settings = {"rows": 3, "row_length": 640, "patches_per_row": 1365}
    stream = iter(data.PackedSamples(processor, weights, difficulty, first_seed=5, **settings))
    batches = [next(stream) for _ in range(3)]
    for batch in batches:
        rows, length = batch["input_ids"].shape
        assert rows <= 3 + 1 and length == 640
        image_ids = processor.tokenizer.convert_tokens_to_ids(["<img>", "<IMG_CONTEXT>"])
        starts, cells = (int((batch["input_ids"] == token_id).sum()) for token_id in image_ids)
        assert starts == data.IMAGE_STEP and cells % data.CELL_STEP == 0
        assert 0 < 4 * cells == len(batch["pixel_values"]) <= 4096
        assert data.answer_index(batch["labels"]).max() + 1 == len(batch["task_index"])
        assert len(batch["task_index"]) > rows
        assert set(batch["task_index"].tolist()) <= {data.ALL_TASKS.index("text"), data.ALL_TASKS.index("text_only")}
    again = next(iter(data.PackedSamples(processor, weights, difficulty, first_seed=5, **settings)))
    torch.testing.assert_close(again, batches[0], rtol=0, atol=0, equal_nan=True)
    longer = next(iter(data.PackedSamples(processor, weights, difficulty, rows=3, row_length=32, patches_per_row=1365)))
    assert longer["input_ids"].shape[1] % data.ROW_STEP == 0


def test_a_dial_is_open_after_all_its_steps():
    dials = train.Dials()
    text = data.ALL_TASKS.index("text")
    dials.score[text] = 1.0
    answers = round(1 / dials.STEP) * dials.ANSWERS_PER_STEP
    dials.record(torch.full((answers,), text), torch.ones(answers))
    assert dials.difficulty[text] == 1
    still = train.Dials(moving=False)
    still.record(torch.full((answers,), text), torch.ones(answers))
    assert still.difficulty[text] == 0 and still.score[text] > 0.9 and still.num_answers == answers


def test_dials_open_with_progress_close_with_failure_and_survive_saving(tmp_path):
    dials = train.Dials()
    text, scene = data.ALL_TASKS.index("text"), data.ALL_TASKS.index("scene")
    for _ in range(40):
        dials.record(torch.full((8,), text), torch.ones(8))
        dials.record(torch.full((8,), scene), torch.tensor([1.0, 0.0] * 4))
    opened = float(dials.difficulty[text])
    assert 0 < opened < 1 and dials.difficulty[scene] == 0
    for _ in range(40):
        dials.record(torch.full((8,), text), torch.zeros(8))
    assert 0 < dials.difficulty[text] < opened
    dials.record_cells(0.5, torch.tensor([0.25] * 4 + [0.125] * 3 + [0.0, 0.0, 0.5]))
    dials.save(tmp_path)
    loaded = train.Dials()
    loaded.load(tmp_path)
    assert torch.equal(loaded.difficulty, dials.difficulty) and loaded.num_answers == dials.num_answers == 960
    assert loaded.score == dials.score and loaded.cell_score == dials.cell_score > 0
    assert loaded.number_errors == dials.number_errors
    assert [round(error / dials.SMOOTHING, 6) for error in dials.number_errors.values()] == [0.25, 0.125, 0, 0.5]
    dials.record_cells(0.5, torch.zeros(cells.NUMBERS))  # nothing was asked for
    assert loaded.number_errors == dials.number_errors


def test_answer_scores(processor):
    """Answers right as a whole; descriptions by the token; boxes by the first digits of their numbers."""
    samples = [make_sample("two_turns", 0, 0.3), make_sample("grounding", 0, 0.0), make_sample("describe", 0, 0.0)]
    samples = [data.encode(sample, processor) for sample in samples]
    assert [sample.num_answers for sample in samples] == [2, 1, 1]
    batch = data.pack([samples], processor.tokenizer.pad_token_id)
    labels, tasks = batch["labels"], batch["task_index"]
    digit_ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list("0123456789")))
    places = [(data.answer_index(labels)[0] == index).nonzero()[:, 0].tolist() for index in range(4)]

    def scores_without(*missed: int) -> list[float]:
        predicted = torch.nn.functional.one_hot(labels[0, 1:].clamp(min=0), len(processor.tokenizer)).float()
        predicted[[place - 1 for place in missed]] = 0
        logits = torch.nn.functional.pad(predicted, (0, 0, 0, 1))[None]
        return train.answer_scores(logits, labels, tasks, digit_ids).tolist()

    assert scores_without() == [1, 1, 1, 1]
    wrong = scores_without(*(answer[-1] for answer in places))
    assert wrong[:3] == [0, 0, 1] and 0.5 < wrong[3] < 1
    digits = [place for place in places[2] if labels[0, place] in digit_ids]
    first = [place for place in digits if place - 1 not in digits]
    assert len(first) == 4 < len(digits)
    assert scores_without(*(place for place in digits if place not in first))[2] == 1
    assert all(scores_without(place)[2] == 0.75 for place in first)
    unlabelled = torch.full_like(labels, -100)
    assert train.answer_scores(torch.zeros(*labels.shape, 9), unlabelled, tasks[:0], digit_ids).tolist() == []


def test_answers_weigh_alike_whatever_their_length(processor):
    batch = data.pack([drawn(processor, "grounding", "text_only", "receipt")], processor.tokenizer.pad_token_id)
    answer = data.answer_index(batch["labels"])
    assert (batch["loss_weight"] > 0).equal((answer >= 0) | (batch["cell_labels"] >= 0))
    assert not ((answer >= 0) & (batch["cell_labels"] >= 0)).any()
    for index in range(len(batch["task_index"])):
        weight = batch["loss_weight"][answer == index]
        assert torch.allclose(weight, torch.full_like(weight, len(weight) ** -0.5))


def test_cells_are_labelled_with_what_they_show(processor, monkeypatch):
    """A picture of 5 x 8 cells, and its smaller copy of 4 x 6, in which 32 pixels are 45 of the picture."""
    monkeypatch.setattr(processor.image_processor, "min_pixels", 128 * 128)
    marks = [Mark("7", (4, 4, 20, 28)), Mark("x", (40, 70, 52, 90)), Mark("M", (128, 0, 256, 160))]
    picture = Picture(Image.new("RGB", (256, 160)), tuple(marks))
    labels, weight = cells.label_cells(picture, processor)
    tokens = processor.tokenizer.convert_ids_to_tokens(labels)
    assert len(tokens) == len(weight) == 4 * 6 + 5 * 8
    small, large = np.array(tokens[:24]).reshape(4, 6), np.array(tokens[24:]).reshape(5, 8)
    expected = np.full((5, 8), "Ġ", dtype=object)
    expected[0, 0], expected[2, 1], expected[:, 4:] = "7", "x", "M"
    assert (large == expected).all()
    assert small[0, 0] == "7" and small[1, 1] == "x" and (small[:, 3:] == "M").all()
    is_empty = labels == cells.token_of(cells.EMPTY, processor.tokenizer)
    assert weight[is_empty].max() < weight[~is_empty].min()


def test_empty_cells_beside_shapes_are_labelled_with_a_digit_of_their_place(processor, monkeypatch):
    """A picture of 5 x 20 cells, with middles at 2.5, 7.5, ... hundredths of its width, 10, 30, ... of its height."""
    monkeypatch.setattr(processor.image_processor, "min_pixels", 128 * 128)
    picture = Picture(Image.new("RGB", (640, 160)), (Mark("red", (0, 0, 320, 160)),))
    labels, weight = cells.label_cells(picture, processor)
    large = np.array(processor.tokenizer.convert_ids_to_tokens(labels[-100:])).reshape(5, 20)
    assert (large[:, :10] == "Ġred").sum() > 10
    for row, column in np.ndindex(5, 10):
        of_column = (str(5 + column // 2), "W" if column % 2 == 0 else "v")
        assert large[row, 10 + column] in (*of_column, "BDFHJ"[row], "y")
    assert {*"56789WvBDFHJy"} == set(large[:, 10:].ravel())
    weight = weight[-100:].numpy().reshape(5, 20)
    assert 0 < weight[:, 10:].max() < weight[:, :10].min()


def test_cells_are_labelled_with_what_they_belong_to(processor, monkeypatch):
    """A picture of 8 x 8 cells: a line of text over three rows of them, and below it nothing."""
    monkeypatch.setattr(processor.image_processor, "min_pixels", 128 * 128)
    areas = (Mark("milk", (0, 0, 256, 96)),)
    tokens = []
    for shift in range(40):
        moved = (Mark("7", (32 + shift / 8, 32, 64 + shift / 8, 64)),)
        picture = Picture(Image.new("RGB", (256, 256)), moved, areas)
        labels, _ = cells.label_cells(picture, processor)
        tokens.append(np.array(processor.tokenizer.convert_ids_to_tokens(labels[-64:])).reshape(8, 8))
    at_mark = [grid[1, 1] for grid in tokens]
    assert set(at_mark) == {"7", "Ġmilk"} and 0.4 < np.mean([token == "7" for token in at_mark]) < 0.8
    for grid in tokens:
        grid[1, 1] = "Ġmilk"
        assert (grid[:3] == "Ġmilk").all() and (grid[3:] == "Ġ").all()


def test_shapes_are_areas_of_the_two_digits_of_their_four_sides():
    """In a picture of 640 x 160: at 0.10, 0.12, 0.99 and 1."""
    picture = Picture(Image.new("RGB", (640, 160)), (Mark("red", (70, 20, 639, 160)), Mark("star", (70, 20, 639, 160))))
    areas = cells.side_areas(picture)
    assert [area.text for area in areas] == ["1", "U", "B", "!", "j", "t", "T", ">"]
    assert {area.box for area in areas} == {(70, 20, 639, 160)}
    assert cells.side_areas(Picture(picture.image, (Mark("7", (0, 0, 9, 9)),))) == []


def test_cells_of_a_shape_are_asked_for_its_sides_and_for_counts(processor):
    """A red star over 2 x 3 of 4 x 8 cells, a blue one over the first, in one scale."""
    red, blue = (64, 32, 160, 96), (0, 0, 32, 32)
    marks = (Mark("red", red), Mark("star", red), Mark("blue", blue), Mark("star", blue))
    picture = Picture(Image.new("RGB", (256, 128)), marks)
    numbers = cells.label_numbers(picture, processor, as_is=True).view(4, 8, cells.NUMBERS)
    expected = torch.full((4, 8, cells.NUMBERS), torch.nan)
    of_shape = cells.NUMBER_GROUPS["places"] + cells.NUMBER_GROUPS["counts"]
    expected[1:3, 2:5, :of_shape] = torch.tensor([0.25, 0.25, 0.625, 0.75, 1 / 6, 2 / 6, 2 / 6])
    expected[0, 0, :of_shape] = torch.tensor([0, 0, 0.125, 0.25, 1 / 6, 2 / 6, 2 / 6])
    assert torch.equal(numbers.nan_to_num(-1), expected.nan_to_num(-1))
    sample = data.draw("two_images", 0, 1.0)
    encoded = data.encode(sample, processor)
    is_visual = encoded.conversation.input_ids == processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    expected = torch.cat([cells.label_numbers(picture, processor) for picture in sample.pictures])
    assert torch.equal(encoded.cell_numbers[is_visual].nan_to_num(-1), expected.nan_to_num(-1))
    assert encoded.cell_numbers[~is_visual].isnan().all() and not expected.isnan().all()


def test_cells_of_a_character_are_asked_for_its_place_in_its_text(processor):
    """Two texts, a character to a cell: of three with a blank between them, and of 14, of which ten count."""
    lines = ("a 7", "abcdefghijklmn")
    marks = tuple(
        Mark(character, (32 * place, 32 * row, 32 * place + 32, 32 * row + 32), (place, len(text) - 1 - place))
        for row, text in enumerate(lines)
        for place, character in enumerate(text)
        if character != " "
    )
    picture = Picture(Image.new("RGB", (512, 64)), marks)
    numbers = cells.label_numbers(picture, processor, as_is=True).view(2, 16, cells.NUMBERS)
    *of_shapes, orders, values = numbers.split([*cells.NUMBER_GROUPS.values()], dim=-1)
    assert torch.equal(orders[0, [0, 2]], torch.tensor([[0, 0.2], [0.2, 0]]))
    assert torch.equal(orders[1, [0, 3, 12]], torch.tensor([[0, 1], [0.3, 1], [1, 0.1]]))
    assert orders.isnan().all(-1).sum() == 2 * 16 - 16
    assert all(others.isnan().all() for others in (*of_shapes, values))


def test_cells_of_a_chart_are_asked_for_the_value_of_their_column(processor):
    chart = drawing.Chart("bar", {"A": 35, "B": 7, "D": 81}, annotated=True)
    picture = drawing.draw_chart(random.Random(0), 0.0, (320, 192), chart)
    numbers = cells.label_numbers(picture, processor, as_is=True).view(6, 10, cells.NUMBERS)
    *_, orders, values = numbers.split([*cells.NUMBER_GROUPS.values()], dim=-1)
    [row] = {tuple(row) for row in values[1:4, :, 0].nan_to_num(-1).tolist()}
    assert [value for value, _ in itertools.groupby(row)] == pytest.approx([-1, 0.35, 0.07, 0.81])
    assert not orders[values[..., 0].isnan()].isnan().all()  # of labels outside the frame


def test_counts_asked_for_are_answers_to_questions():
    """Of the shapes that a question names: in all, of a kind, of a colour and kind."""
    checked = [0, 0, 0]
    for seed in range(90):
        sample = data.draw("scene", seed, 1.0)
        [picture] = sample.pictures
        colors, kinds = ({mark.box: mark.text for mark in picture.marks[start::2]} for start in (0, 1))
        for box, numbers in cells.shape_numbers(picture).items():
            names = (f"{colors[box]} {kinds[box]}s", f"{kinds[box]}s", "shapes")
            for place, (name, number) in enumerate(zip(names, numbers[cells.NUMBER_GROUPS["places"] :], strict=True)):
                for question, answer in sample.turns:
                    if question.startswith((f"How many {name} ", f"Count the {name}.")):
                        assert round(number * cells.MOST_SHAPES) == int(answer)
                        checked[place] += 1
    assert min(checked) > 10


def test_number_errors_are_mean_distances_from_what_is_asked_for():
    directions = cells.number_directions(16)
    assert torch.allclose(directions.T @ directions, torch.eye(cells.NUMBERS), atol=1e-6)
    asked = [[0.1, 0.2, 0.5, 0.9, 0.2, 0.4, 0.6], [torch.nan] * 7, [0.0, 0.0, 1.0, 1.0, 0.5, 0.5, 0.5]]
    others = [[torch.nan] * 3, [torch.nan] * 3, [0.1, 0.0, 0.8]]  # of one cell alone
    numbers = torch.cat([torch.tensor([asked]), torch.tensor([others])], dim=-1)
    hidden = 2 * (numbers.nan_to_num(0.5) - 0.5) @ directions.T
    hidden = hidden + (16 - hidden.pow(2).sum(-1, keepdim=True)).clamp(min=0).sqrt() * orthogonal_to(directions)
    nothing = torch.zeros(cells.NUMBERS)
    torch.testing.assert_close(cells.number_errors(7 * hidden, numbers), nothing, atol=1e-6, rtol=0)
    off = torch.tensor([0.25, 0, 0, 0, 0, 0, 0.125, 0, 0, 0.375])
    torch.testing.assert_close(cells.number_errors(hidden, numbers + off), off, atol=1e-6, rtol=0)
    assert torch.equal(cells.number_errors(hidden.requires_grad_(), numbers * torch.nan), nothing)
    cells.number_errors(hidden, numbers + 0.25).sum().backward()
    assert hidden.grad[0, 0].any() and hidden.grad[0, 2].any() and not hidden.grad[0, 1].any()


def orthogonal_to(directions):
    other = torch.ones(len(directions)) - directions @ directions.sum(0)
    return other / other.norm()


def test_cells_of_a_picture_without_marks_are_not_labelled(processor):
    labels, weight = cells.label_cells(Picture(Image.new("RGB", (256, 128))), processor)
    assert (labels == processing.IGNORE_INDEX).all() and not weight.any()


def test_cell_labels_follow_their_visual_tokens(processor):
    sample = make_sample("two_images", 0, 0.5)
    encoded = data.encode(sample, processor)
    ids = encoded.conversation.input_ids
    is_visual = ids == processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert ((encoded.cell_labels[1:] >= 0) == is_visual[:-1]).all() and encoded.cell_labels[0] < 0
    expected = torch.cat([cells.label_cells(picture, processor)[0] for picture in sample.pictures])
    assert encoded.cell_labels[1:][is_visual[:-1]].equal(expected)


def test_a_page_trains_its_cells_alone(processor):
    encoded = data.encode(data.draw(PAGE, 0, 1.0), processor)
    assert encoded.num_answers == 0 and (encoded.conversation.labels < 0).all() and (encoded.cell_labels >= 0).any()
    batch = data.pack([[encoded, *drawn(processor, "text")]], processor.tokenizer.pad_token_id)
    assert batch["task_index"].tolist() == [data.ALL_TASKS.index("text")]
    assert (batch["loss_weight"] > 0).equal((batch["labels"] >= 0) | (batch["cell_labels"] >= 0))


@pytest.mark.parametrize("task", [task for task in data.ALL_TASKS if task not in ("text_only", data.TEXT_PRETRAINING)])
def test_close_ups_are_smaller_and_ask_the_same(processor, task):
    patches = {"close": 0, "whole": 0}
    for seed in range(6):
        sample = data.draw(task, seed, 1.0)
        close = close_ups.close_up(random.Random(seed), sample, processor)
        if not all(picture.marks for picture in sample.pictures):  # a chart by matplotlib itself
            assert close is sample
            continue
        assert close.as_is
        if task == "grounding":
            assert_boxes_moved(sample, close)
        else:
            assert (close.turns, close.accepted) == (sample.turns, sample.accepted)
        for before, after in zip(sample.pictures, close.pictures, strict=True):
            assert [mark.text for mark in after.marks] == [mark.text for mark in before.marks]
            assert len(after.areas) == len(before.areas)
            width, height = after.image.size
            for left, top, right, bottom in (mark.box for mark in after.marks):
                assert -8 < left < right < width + 8 and -8 < top < bottom < height + 8
            if task in ("chart", DESCRIBE):  # answers take what is beside the marks
                assert width / height == pytest.approx(before.image.width / before.image.height, rel=0.05)
            elif task != "grounding":
                lefts, tops, rights, bottoms = zip(*(mark.box for mark in after.marks), strict=True)
                room = 2 * (close_ups.MARGIN * 32 + 1)
                assert width <= max(rights) - min(lefts) + room and height <= max(bottoms) - min(tops) + room
            shows_letters = all(len(mark.text) == 1 for mark in after.marks)
            sides = [
                side
                for left, top, right, bottom in (mark.box for mark in after.marks)
                for side in (bottom - top, right - left)[: 2 - shows_letters]
            ]
            assert min(sides) <= (close_ups.LETTERS if shows_letters else close_ups.SHAPES)[1] + 1e-6
        encoded = data.encode(close, processor)
        assert len(encoded.conversation.images["image_grid_thw"]) == len(close.images)  # one scale each
        ids = encoded.conversation.input_ids
        is_visual = ids == processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        assert ((encoded.cell_labels[1:] >= 0) == is_visual[:-1]).all()
        patches["close"] += encoded.num_patches
        patches["whole"] += data.encode(sample, processor).num_patches
    assert patches["close"] < patches["whole"] * (0.2 if task in ("text", PAGE) else 1)


def assert_boxes_moved(sample, close):
    """Every box is that of the same mark, in thousandths of what is left of the picture."""
    [before], [after] = sample.pictures, close.pictures
    marks = [mark.box for mark in before.marks]
    for turn, (question, answer) in enumerate(sample.turns):
        index = [thousandths(box, before.image.size) for box in marks].index(sample.accepted[turn].box)
        moved = close.accepted[turn].box
        # A close-up has whole pixels, so its sides are up to half a pixel off.
        assert thousandths(after.marks[index].box, after.image.size) == pytest.approx(
            moved, abs=600 / min(after.image.size)
        )
        assert close.turns[turn] == (question, answer.replace(str(list(sample.accepted[turn].box)), str(list(moved))))
        assert is_correct(close, turn, close.turns[turn][1])


def test_close_ups_of_boxes_have_margins_of_all_sizes(processor):
    shares = []
    for seed in range(40):
        sample = data.draw("grounding", seed, 1.0)
        close = close_ups.close_up(random.Random(seed), sample, processor)
        before, after = (one.pictures[0].marks[0].box for one in (sample, close))
        scale = (after[2] - after[0]) / (before[2] - before[0])
        shares.append(close.images[0].width / scale / sample.images[0].width)
    assert min(shares) < 0.6 and max(shares) > 0.9 and max(shares) < 1.02


def test_a_close_up_shows_the_pixels_under_its_marks(processor):
    """A black square of 80 pixels on white, seen at less than half of its size and cut out."""
    image = Image.new("RGB", (640, 320), "white")
    image.paste("black", (320, 160, 400, 240))
    sample = Sample("text", [Picture(image, (Mark("x", (320, 160, 400, 240)),))], [("?", "x")], [Accepted()])
    for seed in range(8):
        [picture] = close_ups.close_up(random.Random(seed), sample, processor).pictures
        left, top, right, bottom = picture.marks[0].box
        assert close_ups.LETTERS[0] <= bottom - top <= close_ups.LETTERS[1]
        assert right - left == pytest.approx(bottom - top)
        shown = np.asarray(picture.image.convert("L")) < 128
        rows, columns = (np.flatnonzero(shown.any(axis)) for axis in (1, 0))
        assert (columns[0], rows[0]) == pytest.approx((left, top), abs=1)
        assert (columns[-1] + 1, rows[-1] + 1) == pytest.approx((right, bottom), abs=1)
        assert max(picture.image.size) <= bottom - top + 2 * (close_ups.MARGIN * 32 + 1)


def test_a_deeper_model_answers_the_same_and_learns(tmp_path, processor, model):
    shallow = copy.deepcopy(model)
    shallow.language_model.norm.weight.data.uniform_(0.5, 2)
    shallow.save_pretrained(tmp_path / "shallow")
    processor.save_pretrained(tmp_path / "shallow")
    train.Dials(num_answers=7).save(tmp_path / "shallow")
    folders = [str(tmp_path / "shallow"), str(tmp_path / "deeper")]
    assert deepen.main([*folders, "--vision", "10", "--text", "9"]) == 0
    deeper, _ = blueprint.load(tmp_path / "deeper")
    assert (len(deeper.vision_model.blocks), len(deeper.language_model.layers)) == (10, 9)
    assert json.loads((tmp_path / "deeper" / "dials.json").read_text())["num_answers"] == 7
    batch = data.pack([drawn(processor, "text", "text_only")], 0)
    inputs = train.model_inputs(batch)
    with torch.no_grad():
        assert torch.allclose(deeper(**inputs).logits, shallow(**inputs).logits, atol=1e-5)
    deeper.train()(**inputs).loss.backward()
    for layer in (*deeper.vision_model.blocks, *deeper.language_model.layers):  # also those that add nothing yet
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())
    with pytest.raises(ValueError, match="8 layers can be given 8 or more, got 5"):
        deepen.main([*folders, "--vision", "5", "--text", "9"])


def test_a_deeper_encoder_attends_in_full_where_it_did(model):
    windowed = copy.deepcopy(model)
    windowed.config.vision_config.fullatt_block_indexes = [0, 7]
    deeper = deepen.deepen(windowed, 12, 8).config.vision_config
    assert deeper.fullatt_block_indexes == [0, 1, 11]
    assert windowed.config.vision_config.num_hidden_layers == 8


def test_cell_score_counts_what_is_not_empty():
    labels = torch.tensor([[-100, 3, 4, 0, 4]])
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 4, 5, 5, 5]]), 6).float()
    assert train.cell_score(logits, labels, empty_id=0) == pytest.approx(2 / 3)
    assert train.cell_score(logits, torch.full((1, 5), -100), empty_id=0) == 0


def test_optimizer_takes_every_parameter_once_and_survives_saving(model):
    train.choose_trained(model, "s2")
    original = optimizer.MuonWithAdamW(model, 1e-3, 0.01, torch.float32)
    scheduler = torch.optim.lr_scheduler.LambdaLR(original, lambda step: 1 / (step + 1))
    taken = [parameter for group in original.param_groups for parameter in group["params"]]
    assert sorted(map(id, taken)) == sorted(map(id, model.parameters()))
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}

    def step(model, optimizer):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()

    step(model, original)
    scheduler.step()
    twin = copy.deepcopy(model)
    resumed = optimizer.MuonWithAdamW(twin, 1.0, 0.5, torch.float32)
    resumed.load_state_dict(copy.deepcopy(original.state_dict()))
    assert {group["lr"] for group in resumed.param_groups} == {5e-4}
    step(model, original)
    step(twin, resumed)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_muon_is_torchs_in_any_dtype_and_takes_matrices_of_all_shapes():
    torch.manual_seed(0)
    shapes = [(96, 64), (64, 96), (96, 64), (64, 64)]
    starts = [torch.randn(shape) for shape in shapes]
    gradients = [[scale * torch.randn(shape) for scale, shape in enumerate(shapes, start=1)] for _ in range(3)]
    makers = {
        "torch": lambda matrices: torch.optim.Muon(matrices, 1e-2, 0.1, adjust_lr_fn="match_rms_adamw"),
        "bf16": lambda matrices: optimizer.Muon(matrices, 1e-2, 0.1, torch.bfloat16),
        "float32": lambda matrices: optimizer.Muon(matrices, 1e-2, 0.1, torch.float32),
    }
    ends = {}
    for name, make in makers.items():
        matrices = [torch.nn.Parameter(start.clone()) for start in starts]
        idle = torch.nn.Parameter(torch.ones(64, 64))  # it gets no gradient
        muon = make([*matrices, idle])
        for step in gradients:
            for matrix, gradient in zip(matrices, step, strict=True):
                matrix.grad = gradient.clone()
            muon.step()
        assert torch.equal(idle, torch.ones(64, 64))
        ends[name] = [matrix.detach() for matrix in matrices]
    for start, expected, in_bf16, in_float32 in zip(starts, *ends.values(), strict=True):
        moved = (expected - start).abs().max()
        assert (in_bf16 - expected).abs().max() < 1e-3 * moved
        assert 0 < (in_float32 - expected).abs().max() < 0.02 * moved
    for matrices in (torch.randn(2, 96, 64), torch.randn(2, 64, 96)):
        assert torch.linalg.svdvals(optimizer.orthogonalize(matrices, torch.float32)).sub(1).abs().max() < 0.4


def test_the_clock_lets_the_learning_rate_rise_stay_and_fall(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(train.time, "monotonic", lambda: now.seconds)
    clock = train.Clock(minutes=10, decay=0.5, start=1000.0)
    assert clock.end == 1600
    assert [clock.share_of_rate(step) for step in (0, 50, 100, 5000)] == [0, 0.5, 1, 1]
    shares = {1299.0: 1.0, 1300.0: 1.0, 1450.0: 0.5, 1599.0: 1 / 300, 1600.0: 0.0, 1700.0: 0.0}
    for now.seconds, share in shares.items():
        assert clock.share_of_rate(5000) == pytest.approx(share)
    now.seconds = 1599.0
    assert train.Clock(minutes=10, decay=0.0, start=1000.0).share_of_rate(100) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--finish-in", "0"], "more than 0, got 0.0"),
        (["--finish-in", "3", "--minutes", "3"], "give one of them"),
        (["--stage", "s2.close"], "--stage s2.close needs --init"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train.main(["--runs", str(tmp_path / "runs"), *options])
    assert not (tmp_path / "runs").exists()


def test_each_task_has_its_share_of_close_ups(processor):
    weights = torch.tensor([1.0 if task in ("text", "scene") else 0.0 for task in data.ALL_TASKS])
    difficulty = torch.ones(len(data.ALL_TASKS))

    def patches_per_answer(close: dict[str, float]) -> dict[str, float]:
        batch = next(iter(data.PackedSamples(processor, weights, difficulty, close_ups=close, dtype=torch.bfloat16)))
        assert batch["pixel_values"].dtype == torch.bfloat16
        return len(batch["pixel_values"]) / len(batch["task_index"])

    whole = patches_per_answer({})
    some = patches_per_answer({"text": 1.0})
    most = patches_per_answer({"text": 1.0, "scene": 1.0})
    assert whole > 1.2 * some > 1.4 * most


def test_a_compiled_block_is_one_graph_for_any_number_of_segments(model):
    with torch._dynamo.config.patch(error_on_recompile=True):
        block = copy.deepcopy(model.vision_model.blocks[0])
        block.attn.config = copy.deepcopy(block.attn.config)
        block.attn.config._attn_implementation = train.PLAIN_ATTENTION
        plain = copy.deepcopy(block)
        block.compile(dynamic=True, backend="eager")
        for lengths in ([4, 8], [4, 4, 8, 16, 12], [12, 12, 20]):
            segments = modeling.Segments.of_lengths(lengths, torch.device("cpu"))
            x = torch.randn(sum(lengths), block.ls1.shape[0])
            cos, sin = torch.randn(2, sum(lengths), 1, block.attn.head_dim // 2)
            torch.testing.assert_close(block(x, cos, sin, segments), plain(x, cos, sin, segments))


@pytest.mark.parametrize("stage", train.STAGES)
def test_stages_train_what_the_paper_says(model, stage):
    names = [name for name, _ in model.named_parameters()]
    train.choose_trained(model, stage)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    text_attention = {name for name in names if ".self_attn.text." in name}
    parts = (".visual.", "vision_model.", "connector.")
    visual = {name for name in names if any(part in name for part in parts)}
    expected = {
        "text": {name for name in names if name not in visual},
        "s1.1": visual,
        "s1.2": visual | text_attention,
        "s2": set(names),
        "s2.close": set(names),
        "s2.large": set(names),
        "s2.pairs": set(names),
    }[stage]
    assert trained == expected and text_attention and visual


def test_killed_training_resumes_where_it_was(tmp_path, monkeypatch):
    runs = str(tmp_path / "runs")
    lengths = [f"--steps={stage}=4" for stage in train.STAGES]
    monkeypatch.setattr(data.PackedSamples.__init__, "__defaults__", (0, 1, 64, 256, None, torch.float32))  # small
    for name, stage in train.STAGES.items():
        monkeypatch.setitem(train.STAGES, name, replace(stage, rows=1))
    share = 0.25  # not a half, which would not tell the two apart
    monkeypatch.setitem(train.STAGES, "s2.close", replace(train.STAGES["s2.close"], start_share=share))
    assert train.main(["--runs", runs, "--minutes", "0", "--save-steps", "1", *lengths]) == 0
    assert (tmp_path / "runs" / "text" / "checkpoint-1" / "dials.json").is_file()
    cut_off = tmp_path / "runs" / "text" / "checkpoint-2"  # killed while it was being saved
    cut_off.mkdir()
    (cut_off / "model.safetensors").write_bytes(b"half")
    assert train.main(["--runs", runs, "--save-steps", "4", *lengths]) == 0
    final = tmp_path / "runs" / "s2.close" / "final"
    assert {"model.safetensors", "modeling_navil.py", "tokenizer.json", "dials.json"} <= {
        p.name for p in final.iterdir()
    }
    folders = (final, tmp_path / "runs" / "s2" / "final", final.parent / "checkpoint-4")
    ended, before, after = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.allclose(ended[name], after[name].lerp(before[name], share), atol=1e-6) for name in ended)
    assert any(not torch.equal(before[name], after[name]) for name in ended)
    state = json.loads((tmp_path / "runs" / "text" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert plot.main([runs, "--output", str(tmp_path / "training.png")]) == 0
    assert Image.open(tmp_path / "training.png").size == (1200, 300 * len(train.stages_here()))
    assert publish.main([str(final), str(tmp_path / "published"), "--count", "2"]) == 0
    published = load_file(tmp_path / "published" / "model.safetensors")
    assert all(torch.equal(published[name], weight.bfloat16()) for name, weight in ended.items())
    report = json.loads((tmp_path / "published" / "evaluation.json").read_text())
    assert list(report["full"]) == list(report["at dials"]) == list(TASKS)
    assert report["full"]["two_turns"]["questions"] == 4
    assert (tmp_path / "published" / "README.md").read_text().count("| text |") == 2
    state = json.loads((final / "dials.json").read_text())
    state["difficulty"] = dict.fromkeys(state["difficulty"], 1.0)
    (final / "dials.json").write_text(json.dumps(state))
    assert publish.main([str(final), str(tmp_path / "open"), "--count", "1"]) == 0
    assert list(json.loads((tmp_path / "open" / "evaluation.json").read_text())) == ["full"]
    assert (tmp_path / "open" / "README.md").read_text().count("| text |") == 1
    more = ["--runs", str(tmp_path / "more"), "--init", str(tmp_path / "published"), "--steps", "s2.close=2"]
    more += ["--stage", "s2.close"]
    assert train.main(more) == 0  # training goes on from what was published
    with pytest.raises(ValueError, match="trained already"):
        train.main(more)
    dials = json.loads((tmp_path / "more" / "s2.close" / "final" / "dials.json").read_text())
    assert dials["num_answers"] > json.loads((tmp_path / "published" / "dials.json").read_text())["num_answers"]
    minutes = ["--runs", str(tmp_path / "minutes"), "--init", str(tmp_path / "published"), "--finish-in", "0.02"]
    assert train.main(minutes) == 0
    assert (tmp_path / "minutes" / "s2.pairs" / "final" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="'s3=1'"):
        train.main(["--runs", runs, "--steps", "s3=1"])
