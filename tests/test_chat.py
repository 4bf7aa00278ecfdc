"""`chat` in every form that people call it, and its refusals (reference §7)."""

import copy

import numpy as np
import pytest
import torch
from conftest import ROOT, recorded_image
from PIL import Image
from transformers import GenerationConfig, TextStreamer

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
    prompt_length = recording.model._encode_chat(recording.tokenizer, [("What is it?", None)], {}).shape[1]
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
        ("must be (scales, 3) whole numbers, got (3,)", dict(pixel_values=patches, num_patches_list=[1, 10, 14])),
        (
            "must be (scales, 3) whole numbers, got (1, 3) torch.float32",
            dict(pixel_values=patches, num_patches_list=grids.float()),
        ),
        ("at least 1 per image, got [0, 5]", dict(pixel_values=patches, num_patches_list=grids, num_scales=[0, 5])),
        ("at least 1 per image, got 5", dict(pixel_values=patches, num_patches_list=grids, num_scales=5)),
        ("output lacks image_grid_thw", dict(pixel_values={"pixel_values": patches})),
        ("must be tensors or numbers", dict(pixel_values=image, num_patches_list=grids)),
        ("patches must be (N, 3*p*p)", dict(pixel_values=patches[0], num_patches_list=grids)),
        ("history must be (question, answer) pairs", dict(history=[{"role": "user", "content": "a"}])),
        ("history must be (question, answer) pairs", dict(history=[("a", None)])),
        ("contains </s>" if recording.tokenizer.bos_token else "contains <|endoftext|>", dict(question=special)),
        ("anyres_image_size must be True", dict(anyres_image_size=False)),
    ]
    for message, arguments in refusals:
        with pytest.raises(ValueError) as raised:
            chat(**arguments)
        assert message in str(raised.value), arguments
