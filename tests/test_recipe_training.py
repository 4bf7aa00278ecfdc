"""The training recipe: model, labels, crops, packing, curriculum, optimizer, and a run of all its stages."""

import copy
import itertools
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, recorded_image

pytest.importorskip("matplotlib")

from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402

from navil import CODE_FILES  # noqa: E402
from navil.configuration_navil import NaViLConfig  # noqa: E402
from navil.modeling_navil import Segments  # noqa: E402
from navil.processing_navil import IGNORE_INDEX  # noqa: E402
from recipes import charts, crops, labels, packing, plot, publish, train  # noqa: E402
from recipes.crops import crop_sample  # noqa: E402
from recipes.curriculum import Curriculum, answer_scores  # noqa: E402
from recipes.drawing import Annotation, Picture  # noqa: E402
from recipes.hardware import CPU_BF16_ATTENTION  # noqa: E402
from recipes.labels import NUM_TARGETS, TARGET_GROUPS, dense_labels, regression_errors, regression_targets  # noqa: E402
from recipes.model import build_config, build_model, build_processor, build_tokenizer, load  # noqa: E402
from recipes.optimizer import Muon, MuonWithAdamW, orthogonalize  # noqa: E402
from recipes.packing import PackedSamples, answer_index, encode, pack  # noqa: E402
from recipes.questions import Accepted, is_correct, thousandths  # noqa: E402
from recipes.stages import STAGES, available_stages, set_trainable  # noqa: E402
from recipes.tasks import ALL_TASKS, DESCRIBE, PAGE, TASKS, Sample, make_sample  # noqa: E402

CONTEXT = "<IMG_CONTEXT>"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """Two layers: the recipe's model in small."""
    torch.manual_seed(0)
    return build_model(build_config(tokenizer, **train.SMOKE_TEST_SIZE)).eval()


@pytest.fixture(scope="module")
def processor(tokenizer, model):
    return build_processor(tokenizer, model.config)


@pytest.fixture
def small_scales(processor, monkeypatch):
    """Pictures down to 128 x 128 are not enlarged."""
    monkeypatch.setattr(processor.image_processor, "min_pixels", 128 * 128)


def encoded(processor, *tasks):
    return [encode(make_sample(task, seed, 0.3), processor) for seed, task in enumerate(tasks)]


def only(*tasks: str) -> torch.Tensor:
    return torch.tensor([float(task in tasks) for task in ALL_TASKS])


# --------------------------------------------------------------------------------------------------------------- model


def test_the_recipe_makes_what_is_published(tokenizer):
    processor = load(ROOT / "tiny")[1]
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    config, published = build_config(tokenizer), NaViLConfig.from_pretrained(ROOT / "tiny")
    for part in ("vision_config", "text_config"):
        made, expected = (getattr(one, part).to_diff_dict() for one in (config, published))
        assert made | {"torch_dtype": "float32"} == expected
    image_processor = build_processor(tokenizer, config).image_processor
    for name in ("patch_size", "merge_size", "min_pixels", "max_pixels", "scale_downsample_ratio"):
        assert getattr(image_processor, name) == getattr(processor.image_processor, name)


def test_tokenizer_has_the_words_of_questions_and_spells_answers(tokenizer):
    turns = [{"role": "user", "content": "Is there a star?"}, {"role": "assistant", "content": "the text 12.40"}]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.apply_chat_template(turns))
    answer = tokens[tokens.index("assistant\n") + 1 :]
    assert "Ġthere" in tokens and answer == ["t", "h", "e", "Ġtext", "Ġ", "1", "2", ".", "4", "0", "<|im_end|>"]
    grounded = "<ref>red star</ref><box>[[1, 2, 3, 4]]</box>"
    assert tokenizer.decode(tokenizer(grounded)["input_ids"], skip_special_tokens=True) == grounded


def test_a_compiled_block_is_one_graph_for_any_number_of_segments(model):
    with torch._dynamo.config.patch(error_on_recompile=True):
        block = copy.deepcopy(model.vision_model.blocks[0])
        block.attn.config = copy.deepcopy(block.attn.config)
        block.attn.config._attn_implementation = CPU_BF16_ATTENTION
        plain = copy.deepcopy(block)
        block.compile(dynamic=True, backend="eager")
        for lengths in ([4, 8], [4, 4, 8, 16, 12], [12, 12, 20]):
            segments = Segments.of_lengths(lengths, torch.device("cpu"))
            x = torch.randn(sum(lengths), block.ls1.shape[0])
            cos, sin = torch.randn(2, sum(lengths), 1, block.attn.head_dim // 2)
            torch.testing.assert_close(block(x, cos, sin, segments), plain(x, cos, sin, segments))


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("task", ALL_TASKS)
def test_answers_and_visual_tokens_have_labels(processor, task):
    sample = make_sample(task, 3, 0.5)
    one = encode(sample, processor)
    conversation = one.conversation
    answers = processor.tokenizer.decode(conversation.labels[conversation.labels != IGNORE_INDEX])
    assert answers == "".join(f"{answer}<|im_end|>" for _, answer in sample.turns)
    assert one.num_answers == len(sample.turns) and bool(sample.images) == bool(conversation.images)
    if not sample.images or not sample.pictures[0].annotations:
        return
    is_visual = conversation.input_ids == processor.tokenizer.convert_tokens_to_ids(CONTEXT)
    assert ((one.dense_labels[1:] >= 0) == is_visual[:-1]).all() and one.dense_labels[0] < 0
    expected = torch.cat([dense_labels(picture, processor)[0] for picture in sample.pictures])
    assert one.dense_labels[1:][is_visual[:-1]].equal(expected)
    numbers = torch.cat([regression_targets(picture, processor) for picture in sample.pictures])
    assert torch.equal(one.regression_targets[is_visual].nan_to_num(-1), numbers.nan_to_num(-1))
    assert one.regression_targets[~is_visual].isnan().all()


def test_answers_weigh_alike_whatever_their_length_and_pages_have_none(processor):
    batch = pack([encoded(processor, "grounding", PAGE, "text_only", "receipt")], processor.tokenizer.pad_token_id)
    answer, is_dense = answer_index(batch["labels"]), batch["dense_labels"] >= 0
    assert (batch["loss_weight"] > 0).equal((answer >= 0) | is_dense) and not ((answer >= 0) & is_dense).any()
    tasks = [ALL_TASKS[task] for task in batch["task_index"]]
    assert tasks == ["grounding"] * tasks.count("grounding") + ["text_only"] + ["receipt"] * tasks.count("receipt")
    for index in range(len(batch["task_index"])):
        weight = batch["loss_weight"][answer == index]
        assert torch.allclose(weight, torch.full_like(weight, len(weight) ** -0.5))


def test_stream_fills_batches_within_their_limits(processor):
    settings = {"rows": 3, "row_length": 640, "patches_per_row": 1365}
    arguments = (processor, only("text", "text_only"), torch.zeros(len(ALL_TASKS)))
    batches = list(itertools.islice(PackedSamples(*arguments, first_seed=5, **settings), 3))
    for batch in batches:
        rows, length = batch["input_ids"].shape
        assert rows <= 3 + 1 and length == 640
        image_ids = processor.tokenizer.convert_tokens_to_ids(["<img>", CONTEXT])
        starts, cells = (int((batch["input_ids"] == token_id).sum()) for token_id in image_ids)
        assert starts == packing.IMAGE_STEP and cells % packing.CELL_STEP == 0
        assert 0 < 4 * cells == len(batch["pixel_values"]) <= 4096
        assert answer_index(batch["labels"]).max() + 1 == len(batch["task_index"]) > rows
        assert set(batch["task_index"].tolist()) <= {ALL_TASKS.index("text"), ALL_TASKS.index("text_only")}
    again = next(iter(PackedSamples(*arguments, first_seed=5, **settings)))
    torch.testing.assert_close(again, batches[0], rtol=0, atol=0, equal_nan=True)
    longer = next(iter(PackedSamples(*arguments, **settings | {"row_length": 32})))
    assert longer["input_ids"].shape[1] % packing.ROW_STEP == 0


def test_each_task_has_its_share_of_crops(processor):
    def patches_per_answer(crop_share: dict[str, float]) -> float:
        settings = {"crop_share": crop_share, "dtype": torch.bfloat16}
        batch = next(iter(PackedSamples(processor, only("text", "scene"), torch.ones(len(ALL_TASKS)), **settings)))
        assert batch["pixel_values"].dtype == torch.bfloat16
        return len(batch["pixel_values"]) / len(batch["task_index"])

    whole, some, most = map(patches_per_answer, ({}, {"text": 1.0}, {"text": 1.0, "scene": 1.0}))
    assert whole > 1.2 * some > 1.4 * most


# ---------------------------------------------------------------------------------------------------- auxiliary labels


def grid(processor, picture: Picture, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weights of the largest scale, as (rows, columns) of merged cells."""
    ids, weight = dense_labels(picture, processor)
    tokens = np.array(processor.tokenizer.convert_ids_to_tokens(ids), dtype=object)
    return tuple(x[-rows * columns :].reshape(rows, columns) for x in (tokens, weight.numpy()))


def test_cells_are_labelled_with_what_they_show(processor, small_scales):
    """A picture of 5 x 8 cells, and its smaller copy of 4 x 6, in which 32 pixels are 45 of the picture."""
    boxes = {"7": (4, 4, 20, 28), "x": (40, 70, 52, 90), "M": (128, 0, 256, 160)}
    picture = Picture(Image.new("RGB", (256, 160)), tuple(Annotation(text, box) for text, box in boxes.items()))
    ids, weight = dense_labels(picture, processor)
    assert len(ids) == len(weight) == 4 * 6 + 5 * 8
    large, _ = grid(processor, picture, 5, 8)
    expected = np.full((5, 8), "Ġ", dtype=object)
    expected[0, 0], expected[2, 1], expected[:, 4:] = "7", "x", "M"
    assert (large == expected).all()
    small = np.array(processor.tokenizer.convert_ids_to_tokens(ids[:24])).reshape(4, 6)
    assert small[0, 0] == "7" and small[1, 1] == "x" and (small[:, 3:] == "M").all()
    is_empty = ids == labels.label_id(labels.EMPTY, processor.tokenizer)
    assert weight[is_empty].max() < weight[~is_empty].min()
    ids, weight = dense_labels(Picture(picture.image), processor)
    assert (ids == IGNORE_INDEX).all() and not weight.any()


def test_empty_cells_beside_shapes_are_labelled_with_a_digit_of_their_column_or_row(processor, small_scales):
    """A picture of 5 x 20 cells, with centers at 2.5, 7.5, ... hundredths of its width, 10, 30, ... of its height."""
    picture = Picture(Image.new("RGB", (640, 160)), (Annotation("red", (0, 0, 320, 160)),))
    tokens, weight = grid(processor, picture, 5, 20)
    assert (tokens[:, :10] == "Ġred").sum() > 10
    for row, column in np.ndindex(5, 10):
        of_column = (str(5 + column // 2), "W" if column % 2 == 0 else "v")
        assert tokens[row, 10 + column] in (*of_column, "BDFHJ"[row], "y")
    assert {*"56789WvBDFHJy"} == set(tokens[:, 10:].ravel())
    assert 0 < weight[:, 10:].max() < weight[:, :10].min()


def test_half_of_the_cells_are_labelled_with_their_region(processor, small_scales):
    """A picture of 8 x 8 cells: a line of text over three rows of them, and nothing below it."""
    line, at_character = (Annotation("milk", (0, 0, 256, 96)),), []
    for shift in range(40):
        character = Annotation("7", (32 + shift / 8, 32, 64 + shift / 8, 64))
        tokens, _ = grid(processor, Picture(Image.new("RGB", (256, 256)), (character,), line), 8, 8)
        at_character.append(tokens[1, 1])
        tokens[1, 1] = "Ġmilk"
        assert (tokens[:3] == "Ġmilk").all() and (tokens[3:] == "Ġ").all()
    assert set(at_character) == {"7", "Ġmilk"} and 0.4 < np.mean([token == "7" for token in at_character]) < 0.8


def test_shapes_are_regions_of_the_two_digits_of_their_four_sides():
    """In a picture of 640 x 160: at 0.10, 0.12, 0.99 and 1."""
    box, image = (70, 20, 639, 160), Image.new("RGB", (640, 160))
    regions = labels.side_regions(Picture(image, (Annotation("red", box), Annotation("star", box))))
    assert [region.text for region in regions] == ["1", "U", "B", "!", "j", "t", "T", ">"]
    assert {region.box for region in regions} == {box}
    assert labels.side_regions(Picture(image, (Annotation("7", (0, 0, 9, 9)),))) == []


def target_grid(processor, picture: Picture, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Regression targets by group, (rows, columns, size of the group), with -1 where a cell has none."""
    targets = regression_targets(picture, processor, native_size=True).view(rows, columns, NUM_TARGETS).nan_to_num(-1)
    return dict(zip(TARGET_GROUPS, targets.split([*TARGET_GROUPS.values()], dim=-1), strict=True))


def test_cells_of_a_shape_hold_its_sides_and_counts(processor):
    """A red star over 2 x 3 of 4 x 8 cells, and a blue one over the first."""
    red, blue = (64, 32, 160, 96), (0, 0, 32, 32)
    named = (("red", red), ("star", red), ("blue", blue), ("star", blue))
    picture = Picture(Image.new("RGB", (256, 128)), tuple(Annotation(*one) for one in named))
    targets = target_grid(processor, picture, 4, 8)
    sides, counts = torch.full((4, 8, 4), -1.0), torch.full((4, 8, 3), -1.0)
    sides[1:3, 2:5], sides[0, 0] = torch.tensor([0.25, 0.25, 0.625, 0.75]), torch.tensor([0, 0, 0.125, 0.25])
    counts[1:3, 2:5] = counts[0, 0] = torch.tensor([1, 2, 2]) / 6
    assert torch.equal(targets.pop("box_sides"), sides) and torch.equal(targets.pop("counts"), counts)
    assert len(targets) == 2 and all((others == -1).all() for others in targets.values())


def test_cells_of_a_character_hold_its_position_in_its_text(processor):
    """Two texts, a character to a cell: of three with a blank between them, and of 14, of which ten count."""
    characters = tuple(
        Annotation(character, (32 * place, 32 * row, 32 * place + 32, 32 * row + 32), (place, len(text) - 1 - place))
        for row, text in enumerate(("a 7", "abcdefghijklmn"))
        for place, character in enumerate(text)
        if character != " "
    )
    targets = target_grid(processor, Picture(Image.new("RGB", (512, 64)), characters), 2, 16)
    positions = targets.pop("text_position")
    assert torch.equal(positions[0, [0, 2]], torch.tensor([[0, 0.2], [0.2, 0]]))
    assert torch.equal(positions[1, [0, 3, 12]], torch.tensor([[0, 1], [0.3, 1], [1, 0.1]]))
    assert (positions >= 0).all(-1).sum() == 16 and all((others == -1).all() for others in targets.values())


def test_cells_of_a_chart_hold_the_value_of_their_column(processor):
    chart = charts.Chart("bar", {"A": 35, "B": 7, "D": 81}, has_value_labels=True)
    picture = charts.draw_chart(random.Random(0), 0.0, (320, 192), chart)
    targets = target_grid(processor, picture, 6, 10)
    values = targets["chart_value"][..., 0]
    [row] = {tuple(row) for row in values[1:4].tolist()}
    assert [value for value, _ in itertools.groupby(row)] == pytest.approx([-1, 0.35, 0.07, 0.81])
    assert (targets["text_position"][values == -1] >= 0).any()  # labels outside the frame


def test_regression_errors_are_mean_distances_from_the_targets():
    directions, nan = labels.regression_directions(16), torch.nan
    assert torch.allclose(directions.T @ directions, torch.eye(NUM_TARGETS), atol=1e-6)
    targets = torch.tensor(
        [[[0.1, 0.2, 0.5, 0.9, 0.2, 0.4, 0.6, *[nan] * 3], [nan] * 10, [0, 0, 1, 1, 0.5, 0.5, 0.5, 0.1, 0, 0.8]]]
    )
    hidden = 2 * (targets.nan_to_num(0.5) - 0.5) @ directions.T
    orthogonal = torch.ones(16) - directions @ directions.sum(0)
    norm = (16 - hidden.pow(2).sum(-1, keepdim=True)).clamp(min=0).sqrt()  # to a mean square of 1
    hidden = hidden + norm * orthogonal / orthogonal.norm()
    nothing, off = torch.zeros(NUM_TARGETS), torch.tensor([0.25, 0, 0, 0, 0, 0, 0.125, 0, 0, 0.375])
    for given, expected in ((targets, nothing), (targets + off, off), (targets * nan, nothing)):
        torch.testing.assert_close(regression_errors(7 * hidden, given), expected, atol=1e-6, rtol=0)
    regression_errors(hidden.requires_grad_(), targets + 0.25).sum().backward()
    assert [bool(gradient.any()) for gradient in hidden.grad[0]] == [True, False, True]


def test_dense_accuracy_counts_cells_with_content():
    truth = torch.tensor([[-100, 3, 4, 0, 4]])
    logits = F.one_hot(torch.tensor([[3, 4, 5, 5, 5]]), 6).float()
    assert labels.dense_accuracy(logits, truth, empty_id=0) == pytest.approx(2 / 3)
    assert labels.dense_accuracy(logits, torch.full((1, 5), -100), empty_id=0) == 0


# --------------------------------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("task", [task for task in ALL_TASKS if task not in ("text_only", "pretrain_text")])
def test_crops_are_smaller_and_ask_the_same(processor, task):
    patches = {"crop": 0, "whole": 0}
    for seed in range(6):
        sample = make_sample(task, seed, 1.0)
        crop = crop_sample(random.Random(seed), sample, processor)
        if not all(picture.annotations for picture in sample.pictures):  # a chart by matplotlib
            assert crop is sample
            continue
        if task == "grounding":
            assert_boxes_moved(sample, crop)
        else:
            assert (crop.turns, crop.accepted) == (sample.turns, sample.accepted)
        for before, after in zip(sample.pictures, crop.pictures, strict=True):
            assert_cropped_to_content(task, before, after)
        one = encode(crop, processor)
        assert len(one.conversation.images["image_grid_thw"]) == len(crop.images)  # one scale each
        is_visual = one.conversation.input_ids == processor.tokenizer.convert_tokens_to_ids(CONTEXT)
        assert ((one.dense_labels[1:] >= 0) == is_visual[:-1]).all()
        patches["crop"] += one.num_patches
        patches["whole"] += encode(sample, processor).num_patches
    assert patches["crop"] < patches["whole"] * (0.2 if task in ("text", PAGE) else 1)


def assert_cropped_to_content(task: str, before: Picture, after: Picture) -> None:
    """All annotations are inside; a picture whose surroundings matter keeps its aspect ratio."""
    assert [one.text for one in after.annotations] == [one.text for one in before.annotations]
    assert len(after.regions) == len(before.regions)
    width, height = after.image.size
    lefts, tops, rights, bottoms = np.array([one.box for one in after.annotations]).T
    assert min(*lefts, *tops) > -8 and max(rights) < width + 8 and max(bottoms) < height + 8
    if task in ("chart", DESCRIBE):
        assert width / height == pytest.approx(before.image.width / before.image.height, rel=0.05)


def assert_boxes_moved(sample: Sample, crop: Sample) -> None:
    """Every answer is the box of the same shape, in thousandths of the crop."""
    [before], [after] = sample.pictures, crop.pictures
    boxes = [thousandths(one.box, before.image.size) for one in before.annotations]
    for old, new, accepted, moved in zip(sample.turns, crop.turns, sample.accepted, crop.accepted, strict=True):
        expected = thousandths(after.annotations[boxes.index(accepted.box)].box, after.image.size)
        # A crop has whole pixels, so its sides are up to half a pixel off.
        assert moved.box == pytest.approx(expected, abs=600 / min(after.image.size))
        assert new == (old[0], old[1].replace(str(list(accepted.box)), str(list(moved.box))))
        assert is_correct(new[1], new[1], moved)


def test_a_crop_shows_the_pixels_under_its_annotations(processor):
    """A black square of 80 pixels on white, reduced and cropped."""
    image, box = Image.new("RGB", (640, 320), "white"), (320, 160, 400, 240)
    image.paste("black", box)
    sample = Sample("text", [Picture(image, (Annotation("x", box),))], [("?", "x")], [Accepted()])
    for seed in range(8):
        [picture] = crop_sample(random.Random(seed), sample, processor).pictures
        left, top, right, bottom = picture.annotations[0].box
        assert crops.LINE_HEIGHTS[0] <= bottom - top <= crops.LINE_HEIGHTS[1]
        assert right - left == pytest.approx(bottom - top)
        shown = np.asarray(picture.image.convert("L")) < 128
        rows, columns = (np.flatnonzero(shown.any(axis)) for axis in (1, 0))
        assert (columns[0], rows[0]) == pytest.approx((left, top), abs=1)
        assert (columns[-1] + 1, rows[-1] + 1) == pytest.approx((right, bottom), abs=1)
        assert max(picture.image.size) <= bottom - top + 2 * (crops.MARGIN * 32 + 1)


# ---------------------------------------------------------------------------------------------------------- curriculum


def test_difficulty_rises_with_success_falls_with_failure_and_survives_saving(tmp_path):
    reached, text, scene = Curriculum(), ALL_TASKS.index("text"), ALL_TASKS.index("scene")
    for _ in range(40):
        reached.record(torch.full((8,), text), torch.ones(8))
        reached.record(torch.full((8,), scene), torch.tensor([1.0, 0.0] * 4))
    raised = float(reached.difficulty[text])
    assert 0 < raised < 1 and reached.difficulty[scene] == 0
    for _ in range(40):
        reached.record(torch.full((8,), text), torch.zeros(8))
    assert 0 < reached.difficulty[text] < raised
    reached.record_auxiliary(0.5, torch.tensor([0.25] * 4 + [0.125] * 3 + [0.0, 0.0, 0.5]))
    reached.record_auxiliary(0.5, torch.zeros(NUM_TARGETS))  # a batch without targets
    errors = [round(error / Curriculum.SMOOTHING, 6) for error in reached.regression_errors.values()]
    assert errors == [0.25, 0.125, 0, 0.5]
    reached.save(tmp_path)
    loaded = Curriculum()
    loaded.load(tmp_path)
    assert torch.equal(loaded.difficulty, reached.difficulty) and loaded.num_answers == reached.num_answers == 960
    assert loaded.score == reached.score and loaded.dense_accuracy == reached.dense_accuracy > 0


@pytest.mark.parametrize("is_fixed", [False, True])
def test_difficulty_is_full_after_all_its_steps_unless_it_is_fixed(is_fixed):
    reached, text = Curriculum(is_fixed=is_fixed), ALL_TASKS.index("text")
    reached.score[text] = 1.0
    answers = round(1 / Curriculum.STEP) * Curriculum.ANSWERS_PER_STEP
    reached.record(torch.full((answers,), text), torch.ones(answers))
    assert reached.difficulty[text] == (not is_fixed)
    assert reached.score[text] > 0.9 and reached.num_answers == answers


def test_answer_scores(processor):
    """Answers right as a whole; descriptions by the token; boxes by the first digits of their numbers."""
    samples = [make_sample("two_turns", 0, 0.3), make_sample("grounding", 0, 0.0), make_sample(DESCRIBE, 0, 0.0)]
    batch = pack([[encode(sample, processor) for sample in samples]], processor.tokenizer.pad_token_id)
    truth, tasks = batch["labels"], batch["task_index"]
    digit_ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list("0123456789")))
    places = [(answer_index(truth)[0] == index).nonzero()[:, 0].tolist() for index in range(4)]

    def scores_without(*missed: int) -> list[float]:
        predicted = F.one_hot(truth[0, 1:].clamp(min=0), len(processor.tokenizer)).float()
        predicted[[place - 1 for place in missed]] = 0
        return answer_scores(F.pad(predicted, (0, 0, 0, 1))[None], truth, tasks, digit_ids).tolist()

    assert scores_without() == [1, 1, 1, 1]
    wrong = scores_without(*(answer[-1] for answer in places))
    assert wrong[:3] == [0, 0, 1] and 0.5 < wrong[3] < 1
    digits = [place for place in places[2] if truth[0, place] in digit_ids]
    first = [place for place in digits if place - 1 not in digits]
    assert len(first) == 4 < len(digits)
    assert scores_without(*(place for place in digits if place not in first))[2] == 1
    assert all(scores_without(place)[2] == 0.75 for place in first)
    nothing = torch.full_like(truth, -100)
    assert answer_scores(torch.zeros(*truth.shape, 9), nothing, tasks[:0], digit_ids).tolist() == []


# ----------------------------------------------------------------------------------------------------------- optimizer


def test_optimizer_takes_every_parameter_once_and_survives_saving(model):
    model = copy.deepcopy(model)
    set_trainable(model, "s2")
    original = MuonWithAdamW(model, 1e-3, 0.01, torch.float32)
    scheduler = torch.optim.lr_scheduler.LambdaLR(original, lambda step: 1 / (step + 1))
    taken = [parameter for group in original.param_groups for parameter in group["params"]]
    assert sorted(map(id, taken)) == sorted(map(id, model.parameters()))

    def step(model, optimizer):
        optimizer.zero_grad()
        model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
        optimizer.step()

    step(model, original)
    scheduler.step()
    twin = copy.deepcopy(model)
    resumed = MuonWithAdamW(twin, 1.0, 0.5, torch.float32)
    resumed.load_state_dict(copy.deepcopy(original.state_dict()))
    assert {group["lr"] for group in resumed.param_groups} == {5e-4}
    step(model, original)
    step(twin, resumed)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_muon_is_torchs_in_any_dtype_and_takes_matrices_of_all_shapes():
    shapes = [(96, 64), (64, 96), (96, 64), (64, 64)]
    starts = [torch.randn(shape) for shape in shapes]
    gradients = [[scale * torch.randn(shape) for scale, shape in enumerate(shapes, start=1)] for _ in range(3)]

    def trained(make) -> list[torch.Tensor]:
        matrices, idle = [torch.nn.Parameter(start.clone()) for start in starts], torch.nn.Parameter(torch.ones(64, 64))
        muon = make([*matrices, idle])
        for step in gradients:
            for matrix, gradient in zip(matrices, step, strict=True):
                matrix.grad = gradient.clone()
            muon.step()
        assert torch.equal(idle, torch.ones(64, 64))  # without a gradient
        return [matrix.detach() for matrix in matrices]

    torchs = trained(lambda matrices: torch.optim.Muon(matrices, 1e-2, 0.1, adjust_lr_fn="match_rms_adamw"))
    own = [trained(lambda matrices, d=dtype: Muon(matrices, 1e-2, 0.1, d)) for dtype in (torch.bfloat16, torch.float32)]
    for start, expected, in_bf16, in_float32 in zip(starts, torchs, *own, strict=True):
        moved = (expected - start).abs().max()
        assert (in_bf16 - expected).abs().max() < 1e-3 * moved
        assert 0 < (in_float32 - expected).abs().max() < 0.02 * moved
    for matrices in (torch.randn(2, 96, 64), torch.randn(2, 64, 96)):
        assert torch.linalg.svdvals(orthogonalize(matrices, torch.float32)).sub(1).abs().max() < 0.4


def test_timed_learning_rate_rises_stays_and_falls(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(train.time, "monotonic", lambda: now.seconds)
    schedule = train.TimedSchedule(minutes=10, lr_decay=0.5, start=1000.0)
    assert schedule.end == 1600 and [schedule.rate(step) for step in (0, 50, 100, 5000)] == [0, 0.5, 1, 1]
    for now.seconds, share in {1299: 1, 1300: 1, 1450: 0.5, 1599: 1 / 300, 1600: 0, 1700: 0}.items():
        assert schedule.rate(5000) == pytest.approx(share)
    now.seconds = 1599.0
    assert train.TimedSchedule(minutes=10, lr_decay=0.0, start=1000.0).rate(100) == 1


# -------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("stage", [*(stage for stage in STAGES if stage.startswith("s2.")), "s1.1", "text"])
def test_stages_train_those_of_the_paper_or_the_language_model(model, stage):
    set_trainable(model, stage)
    for name, parameter in model.named_parameters():
        is_visual = any(part in name for part in (".visual.", "vision_model.", "connector."))
        assert parameter.requires_grad == (stage.startswith("s2") or is_visual == (stage == "s1.1"))


@pytest.mark.parametrize("has_gpu", [False, True])
def test_large_batches_need_a_gpu(monkeypatch, has_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert list(available_stages()) == [name for name in STAGES if has_gpu or name != "s2.large_batch"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--finish-in", "0"], "more than 0 minutes, got 0.0"),
        (["--finish-in", "3", "--minutes", "3"], "give one of them"),
        (["--stage", "s2.crops"], "--stage s2.crops needs --init"),
        (["--steps", "s3=1"], "'s3=1'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train.main(["--runs", str(tmp_path / "runs"), *options])
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def one_thread():
    """A small model is slower on several threads, which also compete with the process that draws."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_whole_recipe_from_scratch(one_thread, tmp_path, monkeypatch):
    """All stages at small size, interrupted and resumed; then evaluation, publishing, loading, and training further."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(train, "available_stages", lambda: dict(STAGES))  # also the one that needs a GPU
    options = ["--runs", str(tmp_path), "--smoke-test"]
    assert train.main([*options, "--minutes", "0", "--save-steps", "1"]) == 0
    runs = tmp_path / "smoke-test"
    assert (runs / "text" / "checkpoint-1" / "curriculum.json").is_file()
    cut_off = runs / "text" / "checkpoint-2"  # killed while it was being saved
    cut_off.mkdir()
    (cut_off / "model.safetensors").write_bytes(b"half")
    assert train.main([*options, "--save-steps", "2"]) == 0
    assert json.loads((cut_off / "trainer_state.json").read_text())["global_step"] == 2
    *_, previous, last = STAGES
    final = runs / last / "final"
    needed = {"model.safetensors", "modeling_navil.py", "tokenizer.json", "curriculum.json"}
    assert needed <= {path.name for path in final.iterdir()}
    folders = (final, runs / previous / "final", runs / last / "checkpoint-2")
    ended, before, after = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(ended[name], after[name].lerp(before[name], STAGES[last].start_weight)) for name in ended)
    assert any(not torch.equal(before[name], after[name]) for name in ended)
    assert plot.main([str(runs), "--output", str(tmp_path / "training.png")]) == 0
    assert Image.open(tmp_path / "training.png").size == (1200, 300 * len(STAGES))

    root = tmp_path / "repository"
    root.mkdir()
    for name in (*CODE_FILES, "config.json"):
        shutil.copyfile(ROOT / name, root / name)
    published = root / "tiny"
    assert publish.main([str(final), str(published), "--count", "1"]) == 0
    weights = load_file(published / "model.safetensors")
    assert all(torch.equal(weights[name], weight.bfloat16()) for name, weight in ended.items())
    report = json.loads((published / "evaluation.json").read_text())
    assert list(report["full"]) == list(report["at curriculum difficulty"]) == list(TASKS)
    assert report["full"]["two_turns"]["questions"] == 2
    assert (published / "README.md").read_text().count("| text |") == 2
    loaded = AutoModel.from_pretrained(root, subfolder="tiny", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(root, subfolder="tiny", trust_remote_code=True)
    assert isinstance(loaded.chat(tokenizer, recorded_image(64, 64, 0), "What is it?"), str)

    more = ["--runs", str(tmp_path / "more"), "--smoke-test", "--init", str(published)]
    assert train.main([*more, "--stage", "s2.crops"]) == 0
    state = json.loads((tmp_path / "more" / "smoke-test" / "s2.crops" / "final" / "curriculum.json").read_text())
    assert state["num_answers"] > json.loads((published / "curriculum.json").read_text())["num_answers"]
    with pytest.raises(ValueError, match="already trained"):
        train.main([*more, "--stage", "s2.crops"])
    assert train.main([*more, "--finish-in", "0.02"]) == 0
    assert (tmp_path / "more" / "smoke-test" / last / "final" / "model.safetensors").is_file()


def test_the_published_card_is_that_of_its_scores(tmp_path, monkeypatch):
    """At full difficulty everywhere there is one table; weights and card come out as they are in the repository."""
    scores = json.loads((ROOT / "tiny" / "evaluation.json").read_text())
    monkeypatch.setattr(publish, "evaluate", lambda model, processor, count: scores["full"])
    publish.publish(ROOT / "tiny", tmp_path, 300)
    for name in ("README.md", "evaluation.json", "curriculum.json"):
        assert (tmp_path / name).read_text() == (ROOT / "tiny" / name).read_text()
    published, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, ROOT / "tiny"))
    assert published.keys() == original.keys() and all(torch.equal(published[n], original[n]) for n in original)
    (tmp_path / "curriculum.json").unlink()
    with pytest.raises(ValueError, match="lacks curriculum.json"):
        publish.publish(tmp_path, tmp_path / "again", 300)
