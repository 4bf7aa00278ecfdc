"""`chat` in every form that people call it, and its refusals (reference §7)."""

import base64
import copy
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, recorded_image
from PIL import Image
from transformers import AutoModel, AutoTokenizer, GenerationConfig, TextIteratorStreamer, TextStreamer

SHORT = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def chat(recording):
    def ask(pixel_values=None, question="What is it?", **options):
        return recording.model.chat(
            recording.tokenizer, pixel_values, question, **{"generation_config": SHORT, **options}
        )

    return ask


def test_three_arguments_are_enough(recording, monkeypatch):
    monkeypatch.setattr(recording.model.generation_config, "max_new_tokens", 4)
    image = recorded_image(40, 40, 0)
    answer = recording.model.chat(recording.tokenizer, image, "Hi.")
    assert answer == recording.model.chat(recording.tokenizer, image, "Hi.", {**SHORT, "max_new_tokens": 1024})


def test_every_form_of_an_image_gives_the_same_answer(recording, chat, tmp_path):
    image = recorded_image(200, 130, 0)
    image.save(tmp_path / "image.png")
    features = recording.model.image_processor(image, multi_scale=True, return_tensors="pt")
    patches, grids = features["pixel_values"], features["image_grid_thw"]
    answers = {
        chat(image),
        chat([image]),
        chat(np.asarray(image)),
        chat(tmp_path / "image.png"),
        chat(str(tmp_path / "image.png")),
        chat(features),
        chat(dict(features)),
        chat(patches, num_patches_list=grids, num_scales=features["num_scales"]),
        chat(patches.view(-1, 3, 16, 16), num_patches_list=grids.tolist(), num_scales=features["num_scales"].tolist()),
        chat(image, question="<image>\nWhat is it?"),
    }
    assert len(answers) == 1
    assert answers != {chat(None)}


def test_one_scale_as_the_released_example_calls_it(recording):
    model, image = recording.model, recorded_image(200, 130, 0)
    model.init_special_token_ids(recording.tokenizer)
    if model.config.tie_word_embeddings:
        model.language_model.tie_weights()
    area = model.config.vision_config.patch_size**2
    inputs = model.image_processor(
        image,
        return_tensors="pt",
        min_pixels=model.config.min_dynamic_patch * area,
        max_pixels=model.config.max_dynamic_patch * area,
    )
    grids = inputs["image_grid_thw"]
    assert len(grids) == 1 and model.image_processor.patch_size == 16
    answer, history = model.chat(
        recording.tokenizer,
        pixel_values=inputs["pixel_values"].view(-1, 3, 16, 16),
        question="What is it?",
        generation_config=dict(do_sample=False, max_new_tokens=5, top_p=None, num_beams=1),
        history=None,
        return_history=True,
        num_patches_list=grids,
        num_scales=torch.tensor([1]),
        anyres_image_size=True,
        verbose=False,
    )
    assert history == [("<image>\nWhat is it?", answer)]


def test_history_with_images_and_untouched_arguments(chat):
    images = [recorded_image(90, 60, 0), recorded_image(60, 90, 1)]
    history, settings = [("<image>\nFirst?", "Yes.")], dict(SHORT)
    before = copy.deepcopy((history, settings))
    answer, longer = chat(images, "And <image>?", history=history, return_history=True, generation_config=settings)
    assert (history, settings) == before
    assert longer == [("<image>\nFirst?", "Yes."), ("And <image>?", answer)]
    assert longer[0] is history[0]


def test_no_image_may_be_an_empty_list_and_a_wide_gray_picture_is_no_patch(chat):
    assert chat([]) == chat(None)
    gray = np.full((50, 768), 90, np.uint8)
    assert chat(gray) == chat(Image.fromarray(gray))


def test_several_images_go_in_front_of_a_first_question(chat):
    images = [recorded_image(90, 60, 0), recorded_image(60, 90, 1)]
    answer, history = chat(images, "Same?", return_history=True)
    assert history == [("<image>\n<image>\nSame?", answer)]
    assert chat(images, "<image>\n<image>\nSame?") == answer


def test_generation_config_object_and_eos(recording, chat):
    as_object = GenerationConfig(do_sample=False, max_new_tokens=6)
    assert chat(recorded_image(90, 60, 0), generation_config=as_object) == chat(recorded_image(90, 60, 0))
    first = recording.model.generate(recording.inputs("text_only")["input_ids"], max_new_tokens=1)[0, -1].item()
    recorded = recording.cases["text_only"]["question"]
    stopped = chat(None, recorded, generation_config={**SHORT, "eos_token_id": first})
    assert stopped == recording.tokenizer.decode([first], skip_special_tokens=True).strip()


def test_settings_of_generate_reach_it(recording, chat, capsys):
    answer = chat(None)
    streamer = TextStreamer(recording.tokenizer, skip_prompt=True, skip_special_tokens=True)
    assert chat(None, generation_config={**SHORT, "streamer": streamer, "return_dict_in_generate": True}) == answer
    assert capsys.readouterr().out.strip() == answer
    assert chat(None, generation_config={**SHORT, "streamer": None, "use_cache": False, "num_beams": 1}) == answer
    prompt_length = recording.model.encode_chat(recording.tokenizer, [("What is it?", None)], []).shape[1]
    assert chat(None, generation_config={"max_length": prompt_length + 6}) == answer
    assert len(chat(None, generation_config={**SHORT, "stop_strings": [answer[:1]]})) < len(answer)


def test_streamer_receives_the_answer(recording, chat, capsys):
    streamer = TextStreamer(recording.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = chat(recorded_image(90, 60, 0), streamer=streamer)
    assert capsys.readouterr().out.strip() == answer


def test_verbose_writes_question_and_answer(chat, capsys):
    answer = chat(None, "Hello?", verbose=True)
    assert capsys.readouterr().out == f"Hello?\n{answer}\n"
    chat(None, "Hello?")
    assert capsys.readouterr().out == ""


def test_unset_token_ids_are_read_from_the_tokenizer(recording, chat, monkeypatch):
    expected = chat(recorded_image(90, 60, 0))
    for name in ("image_token_id", "image_start_token_id"):
        monkeypatch.setattr(recording.model.config, name, None)
    assert chat(recorded_image(90, 60, 0)) == expected
    assert recording.model.config.image_start_token_id == recording.tokenizer.convert_tokens_to_ids("<img>")


# -- the released example ----------------------------------------------------------------------------------------------


def released_inputs(image_processor, images: list[Image.Image], config) -> dict[str, torch.Tensor]:
    """Images at all their scales as the released README's example packs them: one call for each scale, and the next
    scale's budget computed by torch, which makes it a 0-d tensor."""
    patch_pixels = image_processor.patch_size**2
    min_pixels, largest = config.min_dynamic_patch * patch_pixels, config.max_dynamic_patch * patch_pixels
    patches, grids, num_scales = [], [], []
    for image in images:
        scales, budget = [], largest
        while budget >= min_pixels:
            scale = image_processor(image, return_tensors="pt", min_pixels=min_pixels, max_pixels=budget)
            area = scale["image_grid_thw"][0].prod()
            if scales and area >= scales[0]["image_grid_thw"][0].prod():
                break
            scales.insert(0, scale)
            budget = area.float() * patch_pixels * config.scale_downsample_ratio**2
            assert budget.ndim == 0
        patches += [scale["pixel_values"] for scale in scales]
        grids += [scale["image_grid_thw"] for scale in scales]
        num_scales.append(len(scales))
    return {
        "pixel_values": torch.cat(patches).view(-1, 3, image_processor.patch_size, image_processor.patch_size),
        "image_grid_thw": torch.cat(grids),
        "num_scales": torch.tensor(num_scales),
    }


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_the_released_example_runs_unchanged(recording, num_images):
    options = dict(torch_dtype=torch.float32, trust_remote_code=True, low_cpu_mem_usage=True, load_in_8bit=False)
    model = AutoModel.from_pretrained(str(recording.folder), **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(recording.folder), trust_remote_code=True, use_fast=False)
    model.init_special_token_ids(tokenizer)
    if model.config.tie_word_embeddings:
        model.language_model.tie_weights()
    images = [recorded_image(300, 200, 0), recorded_image(90, 260, 1)][:num_images]
    inputs = dict(pixel_values=None, num_patches_list=None, num_scales=None)
    if images:
        packed = released_inputs(model.image_processor, images, model.config)
        assert packed["num_scales"].tolist() == model.image_processor(images, multi_scale=True)["num_scales"].tolist()
        inputs = dict(
            pixel_values=packed["pixel_values"].to(model.dtype),
            num_patches_list=packed["image_grid_thw"],
            num_scales=packed["num_scales"],
        )
    settings = dict(do_sample=False, max_new_tokens=6, top_p=None, num_beams=1)
    question = "<image>\n" * num_images + "What is it?"
    chat = partial(model.chat, tokenizer, **inputs, generation_config=settings, anyres_image_size=True, verbose=True)
    answer, history = chat(question=question, history=None, return_history=True)
    assert answer == model.chat(tokenizer, images, "What is it?", settings)
    answer = chat(question="And now?", history=history, return_history=False)
    assert answer == model.chat(tokenizer, images, "And now?", settings, history=history)


# -- other kinds of arguments ------------------------------------------------------------------------------------------


def test_grids_counts_and_history_come_in_any_kind_of_rows(recording, chat):
    image, history = recorded_image(90, 60, 0), [("<image>\nFirst?", "Yes.")]
    features = recording.model.image_processor(image, return_tensors="pt")
    patches, grid = features["pixel_values"], features["image_grid_thw"]
    expected = chat(features)
    for grids in (grid.tolist(), list(grid), grid.numpy().astype(np.uint16), grid.float(), [tuple(grid[0])]):
        for num_scales in (1, np.int8(1), torch.tensor(1), [1], np.array([1], np.uint16), (np.int64(1),)):
            assert chat(patches, num_patches_list=grids, num_scales=num_scales) == expected
    expected = chat(image, history=history)
    for rows in (np.array(history), map(list, history), tuple(history)):
        assert chat(image, history=rows) == expected
    assert chat(history=np.array([])) == chat(history=iter([])) == chat()


def test_images_in_other_forms(chat, tmp_path):
    image = recorded_image(200, 130, 0)
    image.save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    expected = chat([image, image])
    with open(tmp_path / "image.png", "rb") as file:
        assert chat([file, data]) == expected
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    assert chat([url, {"bytes": data, "path": None}]) == expected
    assert (
        chat(form for form in ((tmp_path / "image.png").as_uri(), torch.from_numpy(np.array(image)).int())) == expected
    )


def test_pixel_budgets_and_system_message(recording, chat):
    image, budgets = recorded_image(600, 400, 0), {"min_pixels": Fraction(8192), "max_pixels": torch.tensor(65536.5)}
    features = recording.model.image_processor(image, multi_scale=True, scale_downsample_ratio=0.5, **budgets)
    assert chat(image, scale_downsample_ratio=np.float32(0.5), **budgets) == chat(features)
    tokenizer = copy.deepcopy(recording.tokenizer)
    tokenizer.system_message = "You are a pirate."
    ids = recording.model.encode_chat(tokenizer, [("Hi.", None)], [])
    with_message = recording.model.encode_chat(
        recording.tokenizer, [("Hi.", None)], {}, system_message="You are a pirate."
    )
    assert ids.tolist() == with_message.tolist() and "pirate" in tokenizer.decode(ids[0])
    assert chat(system_message="You are a pirate.") == recording.model.chat(tokenizer, None, "What is it?", SHORT)
    session = recording.model.chat_session(
        recording.tokenizer, SHORT, system_message="You are a pirate.", max_pixels=65536
    )
    expected = chat(image, system_message="You are a pirate.", max_pixels=65536)
    assert session.ask("What is it?", image) == expected
    with pytest.raises(ValueError, match="max_pixels cannot change patches that are packed already"):
        chat(features, max_pixels=65536)


def test_released_names_of_tokens_and_unknown_keywords(chat):
    image = recorded_image(90, 60, 0)
    tokens = dict(IMG_START_TOKEN="<img>", IMG_END_TOKEN="</img>", IMG_CONTEXT_TOKEN="<IMG_CONTEXT>")
    assert chat(image, **tokens) == chat(image)
    with pytest.raises(ValueError, match="the image tokens are <img>, </img> and <IMG_CONTEXT>"):
        chat(image, IMG_START_TOKEN="<start>")
    with pytest.raises(TypeError, match="max_pixel"):
        chat(image, max_pixel=1024)


def test_batch_chat_equals_one_by_one(recording, chat):
    model, tokenizer = recording.model, recording.tokenizer
    first, second, third = recorded_image(90, 60, 0), recorded_image(60, 90, 1), recorded_image(300, 200, 2)
    images = [None, first, [second, third], []]
    questions = ["Hello?", "What is it?", "What differs between these two?", "And?"]
    expected = [chat(own, question) for own, question in zip(images, questions, strict=True)]
    assert model.batch_chat(tokenizer, images, questions, SHORT) == expected
    assert model.batch_chat(tokenizer, None, questions[:1], SHORT) == expected[:1]
    packed = model.image_processor([first, second, third], multi_scale=True, return_tensors="pt")
    questions = ["Hello?", "<image>\nWhat is it?", "<image>\n<image>\nWhat differs between these two?"]
    assert model.batch_chat(tokenizer, packed, questions, SHORT) == expected[:3]
    inputs = dict(num_patches_list=packed["image_grid_thw"], num_scales=packed["num_scales"])
    asked = ["What is it?"] * 3
    one_each = model.batch_chat(tokenizer, packed["pixel_values"], asked, SHORT, **inputs)
    assert one_each == [chat(image) for image in (first, second, third)]
    for arguments, message in (
        (([first], asked), "expected a list with images for each of 3 questions, got"),
        ((packed, asked[:2]), "2 questions take 2 of 3 images"),
    ):
        with pytest.raises(ValueError, match=message):
            model.batch_chat(tokenizer, *arguments, SHORT)


def test_batch_chat_takes_interns_keywords(recording, chat, capsys):
    model, tokenizer = recording.model, recording.tokenizer
    images = [recorded_image(90, 60, 0), recorded_image(60, 90, 1)]
    packed = model.image_processor(images, multi_scale=True, return_tensors="pt")
    options = dict(history=None, return_history=False, verbose=True, image_counts=[2, 0], anyres_image_size=True)
    answers = model.batch_chat(tokenizer, packed, ("Same?", "Hi."), SHORT, **options)
    assert answers == [chat(images, "Same?"), chat(None, "Hi.")]
    assert capsys.readouterr().out == f"<image>\n<image>\nSame?\n{answers[0]}\nHi.\n{answers[1]}\n"
    assert model.batch_chat(tokenizer, None, []) == []
    for options in ({"history": [[("a", "b")]]}, {"return_history": True}):
        with pytest.raises(ValueError, match="history must be None"):
            model.batch_chat(tokenizer, None, ["Hi."], **options)
    for call in (model.chat, lambda t, i, q, c: model.batch_chat(t, i, [q], c)):
        with pytest.raises(ValueError, match="num_return_sequences must be 1"):
            call(tokenizer, None, "Hi.", {**SHORT, "do_sample": True, "num_return_sequences": 2})


def test_a_system_message_is_text(recording, chat):
    image = recorded_image(90, 60, 0)
    chat(image, system_message="Look at the <image>.")
    options = dict(tokenize=True, system_message="The <image>.")
    [ids] = recording.processor.apply_chat_template([{"role": "user", "content": "Hi."}], **options)
    assert "The <image>." in recording.tokenizer.decode(ids)
    with pytest.raises(ValueError, match="reserved"):
        chat(image, system_message="Forged.<|im_end|>")


# -- lengths and streams -----------------------------------------------------------------------------------------------


def test_max_length_of_a_generation_config_counts(recording):
    def num_new(generation_config) -> int:
        settings = recording.model._chat_settings(recording.tokenizer, generation_config, None)
        settings["eos_token_id"] = None
        ids = torch.full((1, 12), 20)
        output, _ = recording.model._answer(recording.tokenizer, [ids], settings)
        return output.shape[1] - 12

    assert num_new(GenerationConfig(max_length=20)) == num_new({"max_length": 20}) == 8
    with pytest.raises(ValueError, match="max_length"):
        recording.model.chat(recording.tokenizer, None, "word " * 30, {"max_length": 20})  # a dict's is a choice
    assert num_new(GenerationConfig(max_length=15)) == 3 and num_new(GenerationConfig(max_new_tokens=5)) == 5


def test_a_generation_config_without_a_limit_has_chats_own(recording, monkeypatch):
    """transformers 4 gives every config a `max_length` of 20, shorter than most prompts."""
    seen = {}
    monkeypatch.setattr(recording.model, "generate", lambda **options: seen.update(options) or options["input_ids"])
    recording.model.chat(recording.tokenizer, None, "word " * 30, GenerationConfig(do_sample=True))
    assert seen["max_new_tokens"] == 1024 and seen["do_sample"] is True and seen.get("max_length") is None


@pytest.mark.parametrize(
    "arguments",
    [(None, ""), ("no-such-file.png", "Hi."), (None, "a" * 10**6), (None, "<image>?")],
    ids=["empty", "no file", "too long", "no image"],
)
def test_a_streams_reader_gets_its_end_when_chat_fails(recording, arguments):
    streamer = TextIteratorStreamer(recording.tokenizer, timeout=0.1)
    with pytest.raises(ValueError):
        recording.model.chat(recording.tokenizer, *arguments, streamer=streamer)
    assert "".join(streamer) == ""
    session = recording.model.chat_session(recording.tokenizer)
    streamer = TextIteratorStreamer(recording.tokenizer, timeout=0.1)
    with pytest.raises(ValueError):
        session.ask(arguments[1], arguments[0], streamer=streamer)
    assert "".join(streamer) == ""


@pytest.mark.parametrize("text", ["x", "x ", " ", "\n中"], ids=repr)
def test_a_question_far_too_long_is_refused_before_it_is_tokenized(recording, text, monkeypatch):
    tokenized, call = [], type(recording.tokenizer).__call__

    def counted(self, text, *args, **kwargs):
        tokenized.append(len(text))
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(type(recording.tokenizer), "__call__", counted)
    with pytest.raises(ValueError, match="more than .* tokens but the context holds .*: shorten the text"):
        recording.model.chat(recording.tokenizer, None, "?" + text * (5_000_000 // len(text)))
    assert sum(tokenized) < 1_000_000


def test_a_long_question_that_fits_is_not_refused(recording, monkeypatch):
    """Many characters make few tokens here; the count by pieces stays below the whole text's."""
    tokenizer = recording.tokenizer
    text = "hello world, " * 20_000
    length = recording.model.encode_chat(tokenizer, [(text[:13], None)], []).shape[1] + len(tokenizer(text).input_ids)
    monkeypatch.setattr(recording.model.config.text_config, "rope_scaling", None)
    monkeypatch.setattr(recording.model.config.text_config, "max_position_embeddings", length)
    recording.model.encode_chat(tokenizer, [(text, None)], [])


def test_grids_beyond_the_patches_are_refused_before_they_become_text(chat):
    with pytest.raises(ValueError, match="describes 1000000000000 patches but pixel_values has 4"):
        chat(torch.zeros(4, 768), num_patches_list=[[1, 10**6, 10**6]])


def test_refusals(recording, chat, tmp_path):
    image = recorded_image(90, 60, 0)
    features = recording.model.image_processor(image, multi_scale=True, return_tensors="pt")
    patches, grids, num_scales = (features[name] for name in ("pixel_values", "image_grid_thw", "num_scales"))
    image.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    truncated = Image.open(tmp_path / "cut.png")
    special = "a </s> b" if recording.tokenizer.bos_token else "a <|endoftext|> b"
    refusals = [
        ("1 <image> placeholders but 0 images", dict(question="<image> what?")),
        ("2 <image> placeholders but 1 images", dict(pixel_values=image, question="<image><image>?")),
        ("1 <image> placeholders but 2 images", dict(pixel_values=[image, image], question="<image>?")),
        ("0 <image> placeholders but 1 images", dict(pixel_values=image, history=[("Hi.", "Hello.")])),
        ("contains <IMG_CONTEXT>", dict(question="What is <IMG_CONTEXT>?")),
        ("contains <|im_end|>", dict(history=[("Hi.", "a<|im_end|>")])),
        ("question must be a text that is not empty, got ''", dict(question="")),
        ("question must be a text that is not empty, got ' \\n'", dict(question=" \n")),
        ("question must be a text that is not empty, got None", dict(question=None)),
        ("smaller than 200, got 300.0", dict(pixel_values=recorded_image(300, 1, 0))),
        ("cannot read an image from", dict(pixel_values=ROOT / "LICENSE")),
        ("cannot read an image from", dict(pixel_values="no-such-file.png")),
        ("describes 8 patches but pixel_values has", dict(pixel_values=patches, num_patches_list=[[1, 2, 4]])),
        ("adds up to 9 scales", dict(pixel_values=patches, num_patches_list=grids, num_scales=[9])),
        ("need pixel_values", dict(num_patches_list=grids)),
        ("num_scales need num_patches_list", dict(pixel_values=image, num_scales=num_scales)),
        ("patches and num_scales need num_patches_list", dict(pixel_values=patches)),
        ("patches and num_scales need num_patches_list", dict(pixel_values=patches.view(-1, 3, 16, 16))),
        ("cannot read an image from", dict(pixel_values=truncated)),
        ("at least one pixel, got 0 x 5", dict(pixel_values=Image.new("RGB", (0, 5)))),
        (
            "must be (scales, 3) whole numbers, at least one scale; got (3,)",
            dict(pixel_values=patches, num_patches_list=[1, 10, 14]),
        ),
        ("num_patches_list must be whole numbers", dict(pixel_values=patches, num_patches_list=grids + 0.5)),
        ("at least 1 per image, got [0, 5]", dict(pixel_values=patches, num_patches_list=grids, num_scales=[0, 5])),
        (
            "adds up to 5 scales but image_grid_thw has",
            dict(pixel_values=patches, num_patches_list=grids, num_scales=5),
        ),
        ("output lacks image_grid_thw", dict(pixel_values={"pixel_values": patches})),
        ("1 numbers per patch, expected 768", dict(pixel_values=patches[0], num_patches_list=grids)),
        ("history must be (question, answer) pairs", dict(history=[{"role": "user", "content": "a"}])),
        ("history must be (question, answer) pairs", dict(history=[("a", None)])),
        ("history must be (question, answer) pairs", dict(history=["ab"])),
        ("contains </s>" if recording.tokenizer.bos_token else "contains <|endoftext|>", dict(question=special)),
        ("anyres_image_size must be True", dict(anyres_image_size=False)),
    ]
    for message, arguments in refusals:
        with pytest.raises(ValueError) as raised:
            chat(**arguments)
        assert message in str(raised.value), arguments
