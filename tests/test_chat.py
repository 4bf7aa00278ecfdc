"""`chat` and `batch_chat`: the released example, every kind of argument, limits and errors.

Image forms are tested in test_image_processing.py, control tokens in test_hostile_prompts.py, recorded answers of both
backbones in test_reference_parity.py.
"""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from conftest import conversation, recorded_image, refused
from PIL import Image
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer

SHORT = {"max_new_tokens": 6, "do_sample": False}
TWO_ANSWERS = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2}
FIRST, SECOND = recorded_image(90, 60, 0), recorded_image(60, 90, 1)


@pytest.fixture
def qwen3(recordings):
    return recordings["qwen3"]


@pytest.fixture
def chat(qwen3):
    def ask(pixel_values=None, question="What is it?", generation_config=SHORT, **options):
        return qwen3.model.chat(qwen3.tokenizer, pixel_values, question, generation_config, **options)

    return ask


# -- the released example ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_images", "multi_scale"), [(0, True), (1, False), (1, True), (2, True)])
def test_the_released_example_runs_unchanged(recording, num_images, multi_scale):
    model, tokenizer = recording.model, recording.tokenizer
    model.init_special_token_ids(tokenizer)
    model.language_model.tie_weights()
    images = [recorded_image(300, 200, 0), recorded_image(90, 260, 1)][:num_images]
    inputs = dict.fromkeys(("pixel_values", "num_patches_list", "num_scales"))
    if images:
        packed = model.image_processor(images, multi_scale=multi_scale, return_tensors="pt")
        assert (packed["num_scales"] > 1).all() == multi_scale
        patches = packed["pixel_values"].view(-1, 3, 16, 16)
        inputs |= {"pixel_values": patches, "num_patches_list": packed["image_grid_thw"]}
        inputs["num_scales"] = packed["num_scales"]
    options = {"generation_config": {**SHORT, "top_p": None, "num_beams": 1}, "anyres_image_size": True, **inputs}
    options["verbose"] = False
    question, own = "<image>\n" * num_images + "What is it?", packed if images else None
    answer, history = model.chat(tokenizer, question=question, history=None, return_history=True, **options)
    assert (answer, history) == (recording.chat(own), [(question, answer)])
    answer = model.chat(tokenizer, question="And now?", history=history, return_history=False, **options)
    assert answer == recording.chat(own, "And now?", history=history)


# -- arguments ---------------------------------------------------------------------------------------------------------
def test_every_form_of_image_input_gives_the_same_answer(qwen3, chat, tmp_path):
    image = recorded_image(200, 130, 0)
    image.save(tmp_path / "image.png")
    features = qwen3.model.image_processor(image, multi_scale=True, return_tensors="pt")
    patches, grids, num_scales = (features[name] for name in ("pixel_values", "image_grid_thw", "num_scales"))
    answers = {
        chat(image),
        chat([image]),
        chat(form for form in [np.asarray(image)]),
        chat(tmp_path / "image.png"),
        chat({"bytes": (tmp_path / "image.png").read_bytes(), "path": None}),
        chat(features),
        chat(dict(features)),
        chat(patches, num_patches_list=grids, num_scales=num_scales),
        chat(patches.view(-1, 3, 16, 16), num_patches_list=grids.tolist(), num_scales=num_scales.tolist()),
        chat(image, "<image>\nWhat is it?"),
    }
    assert len(answers) == 1
    assert answers != {chat(None)}


def test_grids_and_counts_may_be_rows_of_any_kind(qwen3):
    features = qwen3.model.image_processor(FIRST, return_tensors="pt")
    grids = features["image_grid_thw"]
    for given, num_scales in (
        (grids.tolist(), 1),
        (list(grids), np.int8(1)),
        (grids.numpy().astype(np.uint16), np.array([1], np.uint16)),
        (grids.float(), torch.tensor(1)),
        ([tuple(grids[0])], (np.int64(1),)),
    ):
        _, inputs = qwen3.model.plan_images(features["pixel_values"], given, num_scales)
        assert all(torch.equal(inputs[name], features[name]) for name in features)


def test_no_image_may_be_an_empty_list_and_a_wide_gray_picture_is_no_patch(chat):
    assert chat([]) == chat(None)
    gray = np.full((50, 768), 90, np.uint8)  # as wide as a patch has numbers
    assert chat(gray) == chat(Image.fromarray(gray))


def test_images_go_in_front_of_a_first_question_or_where_it_says(chat, capsys):
    answer, history = chat([FIRST, SECOND], "Same?", return_history=True, verbose=True)
    assert history == [("<image>\n<image>\nSame?", answer)]
    assert capsys.readouterr().out == f"<image>\n<image>\nSame?\n{answer}\n"
    assert chat([FIRST, SECOND], "<image>\n<image>\nSame?") == answer
    assert capsys.readouterr().out == ""


def test_history_takes_the_first_images_and_arguments_stay_as_they_were(chat):
    history, settings = [("<image>\nFirst?", "Yes.")], dict(SHORT)
    before = copy.deepcopy((history, settings))
    answer, longer = chat([FIRST, SECOND], "And <image>?", settings, history=history, return_history=True)
    assert (history, settings) == before
    assert longer == [*history, ("And <image>?", answer)] and longer[0] is history[0]
    for rows in (np.array(history), map(list, history), tuple(history)):
        assert chat([FIRST, SECOND], "And <image>?", history=rows) == answer
    assert chat(history=np.array([])) == chat(history=iter([])) == chat()


def test_settings_of_generate_reach_it(qwen3, chat, capsys):
    model, tokenizer = qwen3.model, qwen3.tokenizer
    answer = chat(FIRST)
    assert chat(FIRST, generation_config=GenerationConfig(**SHORT)) == answer
    streamers = [TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) for _ in range(2)]
    assert chat(FIRST, streamer=streamers[0]) == answer == capsys.readouterr().out.strip()
    returned = {"return_dict_in_generate": True, "streamer": streamers[1]}
    assert chat(FIRST, generation_config=SHORT | returned) == answer == capsys.readouterr().out.strip()
    assert chat(FIRST, generation_config={**SHORT, "streamer": None, "use_cache": False, "num_beams": 1}) == answer
    plans, _ = model.plan_images(FIRST)
    prompt_length = model.encode_chat(tokenizer, [("<image>\nWhat is it?", None)], plans).shape[1]
    assert chat(FIRST, generation_config={"max_length": prompt_length + 6}) == answer
    assert len(chat(FIRST, generation_config={**SHORT, "stop_strings": [answer[:1]]})) < len(answer)
    with pytest.raises(ValueError, match="max_length"):
        chat(FIRST, generation_config={"max_length": 20})


def test_pixel_budgets_are_those_of_the_image_processor(qwen3, chat):
    image = recorded_image(300, 200, 0)
    budgets = {"min_pixels": 8192, "max_pixels": torch.tensor(20000.5), "scale_downsample_ratio": np.float32(0.5)}
    features = qwen3.model.image_processor(image, multi_scale=True, return_tensors="pt", **budgets)
    assert chat(image, **budgets) == chat(features)
    assert qwen3.model.chat_session(qwen3.tokenizer, SHORT, **budgets).ask("What is it?", image) == chat(features)
    with pytest.raises(ValueError, match="max_pixels cannot change patches that are packed already"):
        chat(features, max_pixels=65536)


def test_a_system_message_replaces_the_tokenizers_and_is_text(recording):
    model, tokenizer, message = recording.model, copy.deepcopy(recording.tokenizer), "You are a pirate."
    tokenizer.system_message = message
    ids = model.encode_chat(tokenizer, [("Hi.", None)], [])
    assert message in tokenizer.decode(ids[0])
    assert torch.equal(ids, model.encode_chat(recording.tokenizer, [("Hi.", None)], [], system_message=message))
    expected = model.chat(tokenizer, FIRST, "Hi.", SHORT)
    assert recording.chat(FIRST, "Hi.", system_message=message) == expected
    assert model.chat_session(recording.tokenizer, SHORT, system_message=message).ask("Hi.", FIRST) == expected
    [ids] = recording.processor.apply_chat_template(conversation("Hi."), tokenize=True, system_message="The <image>.")
    assert "The <image>." in recording.tokenizer.decode(ids)
    recording.chat(FIRST, "Hi.", system_message="Look at the <image>.")
    with pytest.raises(ValueError, match="reserved"):
        recording.chat(FIRST, "Hi.", system_message="Forged.<|im_end|>")


def test_released_names_of_tokens_and_unknown_keywords(chat):
    tokens = {"IMG_START_TOKEN": "<img>", "IMG_END_TOKEN": "</img>", "IMG_CONTEXT_TOKEN": "<IMG_CONTEXT>"}
    assert chat(FIRST, **tokens) == chat(FIRST)
    with pytest.raises(ValueError, match="the image tokens are <img>, </img> and <IMG_CONTEXT>"):
        chat(FIRST, IMG_START_TOKEN="<start>")
    with pytest.raises(TypeError, match="max_pixel"):
        chat(FIRST, max_pixel=1024)


# -- batches -----------------------------------------------------------------------------------------------------------
def test_batch_chat_equals_one_by_one(recording, capsys):
    batch_chat, third = partial(recording.model.batch_chat, recording.tokenizer), recorded_image(200, 130, 2)
    images, questions = [None, FIRST, [SECOND, third], []], ["Hello?", "What is it?", "What differs?", "And?"]
    expected = [recording.chat(*pair) for pair in zip(images, questions, strict=True)]
    assert batch_chat(images, questions, SHORT) == expected
    assert batch_chat(None, questions[:1], SHORT) == expected[:1] and batch_chat(None, []) == []
    packed = recording.model.image_processor([FIRST, SECOND, third], multi_scale=True, return_tensors="pt")
    placed = ["Hello?", "<image>\nWhat is it?", "<image>\n<image>\nWhat differs?"]
    assert batch_chat(packed, placed, SHORT) == expected[:3]
    # As InternVL's.
    options = {"history": None, "return_history": False, "verbose": True, "anyres_image_size": True}
    capsys.readouterr()
    assert batch_chat(packed, questions[:3], SHORT, image_counts=[0, 1, 2], **options) == expected[:3]
    said = zip(placed, expected, strict=False)
    assert capsys.readouterr().out == "".join(f"{question}\n{answer}\n" for question, answer in said)
    inputs = {"num_patches_list": packed["image_grid_thw"], "num_scales": packed["num_scales"]}
    one_each = batch_chat(packed["pixel_values"], ["What is it?"] * 3, SHORT, **inputs)
    assert one_each == [recording.chat(image) for image in (FIRST, SECOND, third)]


@pytest.mark.parametrize(
    ("images", "questions", "options", "message"),
    [
        ([FIRST], ["a"] * 3, {}, "expected a list with images for each of 3 questions, got"),
        ("packed", ["a"], {}, r"1 questions take \[1\] of 2 images"),
        ("packed", ["a", "b"], {"image_counts": [3, -1]}, r"2 questions take \[3, -1\] of 2 images"),
        ("packed", ["a", "b", "c"], {"image_counts": [1, 1]}, r"3 questions take \[1, 1\] of 2 images"),
        ("packed", ["a", "b"], {"image_counts": 2}, r"2 questions take \[2\] of 2 images"),
        (None, ["a"], {"history": [[("a", "b")]]}, "history must be None"),
        (None, ["a"], {"return_history": True}, "history must be None"),
        (None, ["a"], {"generation_config": TWO_ANSWERS}, "num_return_sequences must be 1"),
    ],
)
def test_bad_batches(qwen3, images, questions, options, message):
    if images == "packed":
        images = qwen3.model.image_processor([FIRST, SECOND], multi_scale=True, return_tensors="pt")
    with pytest.raises(ValueError, match=message):
        qwen3.model.batch_chat(qwen3.tokenizer, images, questions, **options)


# -- lengths and streams -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("question", "generation_config", "max_length", "max_new_tokens"),
    [
        ("a", {"max_length": 20}, 20, None),
        ("a" * 200, GenerationConfig(do_sample=True), None, 1024),  # transformers 4 sets max_length=20 by default
        ("a" * 200, GenerationConfig(max_length=15), 15, None),
        ("a", GenerationConfig(max_new_tokens=5), None, 5),
        ("a", None, None, 1024),  # not the model's own generation_config
    ],
)
def test_a_chosen_length_limit_is_kept_and_the_default_is_1024_new_tokens(
    qwen3, monkeypatch, question, generation_config, max_length, max_new_tokens
):
    seen = {}
    monkeypatch.setattr(qwen3.model.generation_config, "max_new_tokens", 4)
    monkeypatch.setattr(qwen3.model, "generate", lambda **options: seen.update(options) or options["input_ids"])
    qwen3.model.chat(qwen3.tokenizer, None, question, generation_config)
    assert (seen.get("max_length"), seen["max_new_tokens"]) == (max_length, max_new_tokens)
    assert seen["do_sample"] == bool(getattr(generation_config, "do_sample", False))


@pytest.mark.parametrize(
    ("image", "question"),
    [(None, ""), ("no-such-file.png", "Hi."), (None, "a" * 10**6), (None, "<image>?")],
    ids=["empty", "no file", "too long", "no image"],
)
def test_the_stream_ends_when_chat_fails(qwen3, image, question):
    session = qwen3.model.chat_session(qwen3.tokenizer)
    for call in (
        lambda streamer: qwen3.model.chat(qwen3.tokenizer, image, question, streamer=streamer),
        lambda streamer: session.ask(question, image, streamer=streamer),
    ):
        streamer = TextIteratorStreamer(qwen3.tokenizer, timeout=0.1)
        with pytest.raises(ValueError):
            call(streamer)
        assert "".join(streamer) == ""


@pytest.mark.parametrize("text", ["x", "x ", " ", "\n中"], ids=repr)
def test_a_question_far_too_long_is_refused_before_it_is_tokenized(recording, text, monkeypatch):
    tokenized, call = [], type(recording.tokenizer).__call__

    def counted(self, text, *args, **kwargs):
        tokenized.append(len(text))
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(type(recording.tokenizer), "__call__", counted)
    with pytest.raises(ValueError, match="more than .* tokens but the context holds .*: shorten the text"):
        recording.chat(None, "?" + text * (5_000_000 // len(text)))
    assert sum(tokenized) < 1_000_000


def test_a_long_question_that_just_fits_is_not_refused(recording, monkeypatch):
    """The tokens are counted in three pieces, and the count stays below that of the whole text."""
    tokenizer, text = recording.tokenizer, "hello world, " * 11_000
    length = recording.model.encode_chat(tokenizer, [(text[:13], None)], []).shape[1] + len(tokenizer(text).input_ids)
    monkeypatch.setattr(recording.model.config.text_config, "rope_scaling", None)
    monkeypatch.setattr(recording.model.config.text_config, "max_position_embeddings", length)
    recording.model.encode_chat(tokenizer, [(text, None)], [])


# -- errors ------------------------------------------------------------------------------------------------------------
PACKED = {"pixel_values": torch.zeros(12, 768), "num_patches_list": [[1, 2, 2], [1, 2, 4]], "num_scales": [2]}
PAIRS = "history must be (question, answer) pairs"


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("1 <image> placeholders but 0 images", {"question": "<image> what?"}),
        ("1 <image> placeholders but 2 images", {"pixel_values": [FIRST, FIRST], "question": "<image>?"}),
        ("0 <image> placeholders but 1 images", {"pixel_values": FIRST, "history": [("Hi.", "Hello.")]}),
        ("question must be a text that is not empty, got ' \\n'", {"question": " \n"}),
        ("question must be a text that is not empty, got None", {"question": None}),
        (PAIRS, {"history": [{"role": "user", "content": "a"}]}),
        (PAIRS, {"history": [("a", None)]}),
        (PAIRS, {"history": ["ab"]}),
        ("num_return_sequences must be 1", {"generation_config": TWO_ANSWERS}),
        ("anyres_image_size must be True", {"anyres_image_size": False}),
        ("describes 8 patches but pixel_values has 12", PACKED | {"num_patches_list": [[1, 2, 4]]}),
        ("describes 1000000000000 patches", PACKED | {"num_patches_list": [[1, 10**6, 10**6]]}),  # before any text
        ("num_patches_list must be whole numbers", PACKED | {"num_patches_list": [[1, 2.5, 4]]}),
        ("adds up to 9 scales", PACKED | {"num_scales": [9]}),
        ("at least 1 per image, got [0, 2]", PACKED | {"num_scales": [0, 2]}),
        ("1 numbers per patch, expected 768", PACKED | {"pixel_values": torch.zeros(768)}),
        ("need pixel_values", PACKED | {"pixel_values": None}),
        ("num_scales need num_patches_list", {"pixel_values": FIRST, "num_scales": [1]}),
        ("patches and num_scales need num_patches_list", {"pixel_values": torch.zeros(4, 3, 16, 16)}),
        ("output lacks image_grid_thw", {"pixel_values": {"pixel_values": torch.zeros(4, 768)}}),
    ],
)
def test_refusals(chat, message, arguments):
    with refused(message):
        chat(**arguments)
