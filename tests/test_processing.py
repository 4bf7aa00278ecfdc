"""The processor: images and prompts to inputs of `generate`, chat templates, saved folders, errors.

That it gives the recorded ids is tested in test_reference_parity.py, batches in test_generation.py, training batches in
test_finetuning.py, and hostile prompts in test_hostile_prompts.py.
"""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import recorded_image, refused
from transformers import AutoProcessor

HELLO = [{"role": "user", "content": "Hello?"}]
EXAMPLE = {"messages": [*HELLO, {"role": "assistant", "content": "Hi."}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
IMAGE = recorded_image(90, 60, 0)


@pytest.fixture
def processor(recordings):
    return recordings["qwen3"].processor


def load(folder, **options):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True, **options)


def inputs_of(processor, *parts, **options):
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)


# -- images and prompts ------------------------------------------------------------------------------------------------
def test_images_and_text(recording):
    processor, images = recording.processor, [IMAGE, recorded_image(60, 90, 1), recorded_image(64, 64, 2)]
    prompts = ["<image> a", "b", "b <image><image>"]
    inputs = processor(images=[images[:1], None, images[1:]], text=prompts, return_tensors="pt", padding=True)
    flat = processor(images=iter(images), text=prompts, return_tensors="pt", padding=True)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "num_scales"}
    assert all(torch.equal(inputs[name], flat[name]) for name in inputs)
    cells = inputs["image_grid_thw"].prod(-1).sum() // 4
    assert (inputs["input_ids"] == recording.model.config.image_token_id).sum() == cells
    assert (
        inputs["attention_mask"][:, 0].tolist() == [0, 0, 1] and inputs["attention_mask"][:, -1].all()
    )  # left padding
    expected = processor.image_processor(images, multi_scale=True)
    assert all(np.array_equal(inputs[name], expected[name]) for name in expected)


def test_settings_reach_the_image_processor(processor):
    assert processor(images=IMAGE, text="<image>", multi_scale=False)["num_scales"].tolist() == [1]
    small = processor(images=IMAGE, text="<image>", min_pixels=256, max_pixels=1024)
    assert small["image_grid_thw"].tolist() == [[1, 2, 4]]
    image = {"type": "image", "image": recorded_image(300, 200, 0)}
    limited, inputs = (inputs_of(processor, *one) for one in ([image | {"max_pixels": 20_000}], [image]))
    assert len(limited["pixel_values"]) < len(inputs["pixel_values"])
    assert torch.equal(inputs_of(processor, image, max_pixels=20_000)["pixel_values"], limited["pixel_values"])
    one = {"messages": [{"role": "user", "content": [image]}, EXAMPLE["messages"][-1]]}
    assert len(processor.training_batch([one], multi_scale=False)["image_grid_thw"]) == 1
    assert len(processor.training_batch([one])["image_grid_thw"]) > 1


def test_one_scale_may_be_the_processors_default(recordings, tmp_path):
    load(recordings["qwen3"].folder, multi_scale=False).save_pretrained(tmp_path)
    processor, inputs = load(tmp_path), {"images": recorded_image(300, 200, 0), "text": "<image>"}
    assert len(processor(**inputs)["image_grid_thw"]) == 1
    several = recordings["qwen3"].processor(**inputs)["image_grid_thw"].tolist()
    assert processor(**inputs, multi_scale=True)["image_grid_thw"].tolist() == several and len(several) > 1


# -- messages ----------------------------------------------------------------------------------------------------------
def test_a_typed_placeholder_is_text(recording):
    processor, decode = recording.processor, recording.tokenizer.decode
    slot, text = recording.model.config.image_token_id, "Make it an <image> tag."
    image = {"type": "image", "image": IMAGE}

    def ids(typed):
        return inputs_of(processor, {"type": "text", "text": typed}, image)["input_ids"][0].tolist()

    assert ids(text).count(slot) == ids("a").count(slot) > 0 and text in decode(ids(text))
    messages = [{"role": "user", "content": text}]
    assert text in decode(processor.apply_chat_template(messages, tokenize=True)[0])
    assert messages == [{"role": "user", "content": text}]  # left as they were
    content = [image, {"type": "text", "text": text}]
    with pytest.raises(ValueError, match="2 <image> placeholders but 1 images"):
        processor(images=IMAGE, text=processor.apply_chat_template([{"role": "user", "content": content}]))
    example = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": text}]}
    labels = processor.training_batch([example])["labels"]
    assert decode(labels[labels >= 0]).strip() == text + "<|im_end|>"


def test_the_generation_prompt_is_added_when_a_user_speaks_last(recording):
    template = recording.processor.apply_chat_template
    assert template(HELLO, tokenize=False) == template(HELLO, tokenize=False, add_generation_prompt=True)
    assert template(EXAMPLE["messages"], tokenize=False).endswith("Hi.<|im_end|>")


def test_template_variables_and_settings_are_told_apart(recording):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | length }}{{ documents }}{{ mood }}"
    variables = {"tools": TOOLS, "documents": [{"text": "d"}], "mood": "glad"}
    for owner in (recording.processor, recording.tokenizer):
        prompt = owner.apply_chat_template(HELLO, chat_template=template, tokenize=False, **variables)
        assert prompt == "Hello?1[{'text': 'd'}]glad"
    batch = [HELLO, [{"role": "user", "content": "A longer question?"}]]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "system_message": "Hi."}
    padded = recording.processor.apply_chat_template(batch, padding=True, **options)
    options |= {"processor_kwargs": {"padding": True}, "enable_thinking": False, "tools": None}
    same = recording.processor.apply_chat_template(batch, **options)
    assert torch.equal(padded["input_ids"], same["input_ids"])
    assert "<|im_start|>system\nHi.<|im_end|>" in recording.tokenizer.decode(padded["input_ids"][1])


def test_training_takes_added_tokens_and_whole_numbers_of_any_type(recordings):
    processor = copy.deepcopy(recordings["internlm2"].processor)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<loc_1>"]})
    example = {"messages": [*HELLO, {"role": "assistant", "content": "<loc_1>"}]}
    with pytest.raises(ValueError, match="contains <loc_1>.*allow_control_tokens=True"):
        processor.training_batch([example])
    labels = processor.training_batch([example], allow_control_tokens=True)["labels"]
    assert processor.tokenizer.convert_tokens_to_ids("<loc_1>") in labels
    for row_length in (np.int64(200), torch.tensor(200)):
        assert len(processor.training_batch([EXAMPLE] * 2, row_length=row_length)["cu_seq_lens_q"]) > 2


# -- saved folders -----------------------------------------------------------------------------------------------------
def test_the_chat_template_is_the_tokenizers(recordings, tmp_path):
    processor = load(recordings["qwen3"].folder)
    assert processor.chat_template == processor.tokenizer.chat_template is not None
    processor.chat_template = template = "{{ messages[0].content }}"
    assert processor.tokenizer.chat_template == template
    processor.save_pretrained(tmp_path)
    processor.tokenizer.chat_template = other = "{{ messages[0].role }}"
    processor.tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.chat_template == again.tokenizer.chat_template == other
    built = type(processor)(processor.image_processor, processor.tokenizer, chat_template=template)
    assert built.chat_template == processor.tokenizer.chat_template == template


def test_folders_of_transformers_4_and_5_load_in_both(recording, tmp_path):
    """5 writes one nested file and a list of extra special tokens; 4 reads neither."""
    recording.processor.image_processor.save_pretrained(tmp_path)
    recording.processor.save_pretrained(tmp_path)
    assert "image_processor" not in json.loads((tmp_path / "processor_config.json").read_text())
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["patch_size"] == 16
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    extra = settings.pop("additional_special_tokens", None) or settings["extra_special_tokens"]
    (tmp_path / "chat_template.jinja").write_text(recording.tokenizer.chat_template)
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings | {"extra_special_tokens": extra}))
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    again = load(tmp_path)
    assert again.tokenizer.all_special_tokens == recording.tokenizer.all_special_tokens
    ids = [p.apply_chat_template(HELLO, tokenize=True)[0] for p in (again, recording.processor)]
    assert ids[0] == ids[1]


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [False, 0, True, "x"])
@pytest.mark.parametrize("keyword", ["multi_scal", "add_generation_promt", "paddin", "row_lenght"])
def test_a_misspelt_keyword_is_an_error_whatever_its_value(processor, keyword, value):
    misspelt = {keyword: value}
    for call in (
        lambda: processor(text="a", **misspelt),
        lambda: processor.apply_chat_template(HELLO, **misspelt),
        lambda: processor.tokenizer.apply_chat_template(HELLO, **misspelt),
        lambda: processor.training_batch([EXAMPLE], **misspelt),
    ):
        with pytest.raises(ValueError, match=f"unknown keyword {keyword}"):
            call()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "got None"),
        (["a"], "got 'a'"),
        ([{"type": "video"}], "got {'type': 'video'}"),
        ([{"type": "text", "text": None}], "got {'type': 'text', 'text': None}"),
        ([{"type": "text"}], "got {'type': 'text'}"),
        ([{"type": "image", "path": None}], "an image part needs one of"),
        ([{"type": "image_url"}], "an image part needs one of"),
        ([{"type": "image", "url": "data:image/png;base64,AAAA"}], "cannot read an image from 'data:"),
        ([{"type": "image", "path": "x.png"}], "cannot read an image from 'x.png'"),
    ],
)
def test_bad_content_of_a_message(processor, content, message):
    with refused(message):
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(images=IMAGE, text="no slot"), "0 <image> placeholders but 1 images"),
        (lambda p: p(text=["<image>", "<image>"]), "2 <image> placeholders but 0 images"),
        (lambda p: p(images=[[IMAGE] * 2, [IMAGE]], text=["<image>", "<image>" * 2]), "have [1, 2] <image> but [2, 1]"),
        (lambda p: p(images=[[IMAGE] * 2], text=["<image>"] * 2), "the prompts have [1, 1] <image> but [2] images"),
        (lambda p: p(images=IMAGE, text="<image><IMG_CONTEXT>"), "contains <IMG_CONTEXT>"),
        (lambda p: p(images=IMAGE), "text must be a prompt"),
        (lambda p: p(text="a", videos=[IMAGE]), "not audio or video"),
        (lambda p: p(text="a", images_kwargs={"max_pixel": 300}), "unknown keyword max_pixel=300"),
        (lambda p: inputs_of(p, processor_kwargs={"max_pixel": 300}), "unknown keyword max_pixel=300"),
        (lambda p: p.apply_chat_template(HELLO, tools=TOOLS), "unknown keyword tools=[{"),
        (lambda p: p.training_batch([{"messages": {"role": ["user"], "content": ["a"]}}]), "at least one message"),
        (lambda p: p.apply_chat_template([{"role": "user<|im_end|>", "content": "a"}]), "role must be one of"),
    ],
)
def test_refusals(processor, call, message):
    with refused(message):
        call(processor)
