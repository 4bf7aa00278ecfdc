"""The processor gives inputs that go straight into `generate` and agree with `chat`."""

import base64
import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import recorded_image
from transformers import AutoProcessor

HELLO = [{"role": "user", "content": "Hello?"}]
TRAINING_EXAMPLE = {"messages": [*HELLO, {"role": "assistant", "content": "Hi."}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_images_and_text(recording):
    processor = recording.processor
    images = [recorded_image(90, 60, 0), recorded_image(60, 90, 1), recorded_image(64, 64, 2)]
    inputs = processor(
        images=[images[:1], images[1:]], text=["<image> a", "b <image><image>"], return_tensors="pt", padding=True
    )
    assert type(processor).__name__ == "NaViLProcessor"
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "num_scales"}
    cells = inputs["image_grid_thw"].prod(-1).sum() // 4
    assert (inputs["input_ids"] == recording.model.config.image_token_id).sum() == cells
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].tolist() == [1, 1]  # left padding
    expected = processor.image_processor(images, multi_scale=True)
    assert np.array_equal(inputs["pixel_values"], expected["pixel_values"])
    assert inputs["num_scales"].tolist() == expected["num_scales"].tolist()


def test_settings_reach_the_image_processor(recording):
    image = recorded_image(90, 60, 0)
    one = recording.processor(images=image, text="<image>", multi_scale=False)
    assert one["num_scales"].tolist() == [1]
    small = recording.processor(images=image, text="<image>", min_pixels=256, max_pixels=1024)
    assert small["image_grid_thw"].tolist() == [[1, 2, 4]]
    assert (
        small["image_grid_thw"].tolist()
        == recording.processor.image_processor(image, min_pixels=256, max_pixels=1024, multi_scale=True)[
            "image_grid_thw"
        ].tolist()
    )


def test_one_scale_may_be_the_processors_default(recording, tmp_path):
    image = recorded_image(300, 200, 0)
    processor = AutoProcessor.from_pretrained(recording.folder, trust_remote_code=True, multi_scale=False)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    scales = [
        len(one(images=image, text="<image>", **options)["image_grid_thw"])
        for one, options in ((recording.processor, {}), (processor, {}), (again, {}), (again, {"multi_scale": True}))
    ]
    assert scales[0] == scales[3] > scales[1] == scales[2] == 1


@pytest.mark.parametrize("keyword", ["multi_scal", "add_generation_promt", "paddin"])
@pytest.mark.parametrize("value", [False, 0, True, "x"])
def test_a_misspelt_keyword_is_an_error_whatever_its_value(recording, keyword, value):
    with pytest.raises(ValueError, match=f"unknown keyword {keyword}"):
        recording.processor(text="a", **{keyword: value})
    for template in (recording.processor.apply_chat_template, recording.tokenizer.apply_chat_template):
        with pytest.raises(ValueError, match=f"unknown keyword {keyword}"):
            template([{"role": "user", "content": "a"}], **{keyword: value})


def test_a_prompt_without_images_may_have_none(recording):
    image, prompts = recorded_image(60, 40, 0), ["<image>a", "b", "<image><image>c"]
    rows = recording.processor(images=[[image], None, [image, image]], text=prompts, padding=True)
    assert rows["num_scales"].tolist() == recording.processor(images=[image] * 3, text=prompts)["num_scales"].tolist()


def test_chat_messages_generate_what_chat_answers(recording, tmp_path):
    image = recorded_image(200, 130, 0)
    image.save(tmp_path / "image.png")
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = recording.model.chat(recording.tokenizer, image, "What is it?", settings)
    for source in ({"image": image}, {"path": str(tmp_path / "image.png")}, {"image": np.asarray(image)}):
        messages = [{"role": "user", "content": [{"type": "image", **source}, {"type": "text", "text": "What is it?"}]}]
        inputs = recording.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        output = recording.model.generate(**inputs, **settings)
        new_ids = output[:, inputs["input_ids"].shape[1] :]
        assert recording.processor.post_process_image_text_to_text(new_ids)[0].strip() == expected
        assert isinstance(messages[0]["content"], list) and len(messages[0]["content"][0]) == 2  # left as it was


def test_batch_of_conversations(recording):
    image = recorded_image(90, 60, 0)
    with_image = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a?"}]}]
    without = [{"role": "user", "content": "What about a longer question without any picture?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = recording.processor.apply_chat_template([with_image, without], padding=True, **options)
    together = recording.model.generate(**batch, max_new_tokens=5)
    for row, messages in enumerate((with_image, without)):
        single = recording.processor.apply_chat_template(messages, **options)
        alone = recording.model.generate(**single, max_new_tokens=5)[0, -5:]
        assert torch.equal(together[row, -5:], alone)


def test_generation_prompt_follows_who_speaks_last(recording):
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    template = recording.processor.apply_chat_template
    assert template([user], tokenize=False) == template([user], tokenize=False, add_generation_prompt=True)
    finished = template([user, assistant], tokenize=False)
    assert finished.endswith("b<|im_end|>")


def test_control_tokens_pass_when_they_may(recording):
    messages = [{"role": "user", "content": "<|im_end|>"}]
    assert "<|im_end|><|im_end|>" in recording.processor.apply_chat_template(messages, allow_control_tokens=True)


def test_template_variables_and_settings_are_told_apart(recording):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | length }}{{ documents }}{{ mood }}"
    variables = {"tools": TOOLS, "documents": [{"text": "d"}], "mood": "glad"}
    for owner in (recording.processor, recording.tokenizer):
        prompt = owner.apply_chat_template(HELLO, chat_template=template, tokenize=False, **variables)
        assert prompt == "Hello?1[{'text': 'd'}]glad"
    batch = [HELLO, [{"role": "user", "content": "A longer question?"}]]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    padded = recording.processor.apply_chat_template(batch, padding=True, system_message="Hi.", **options)
    same = recording.processor.apply_chat_template(
        batch, processor_kwargs={"padding": True}, system_message="Hi.", enable_thinking=False, tools=None, **options
    )
    assert torch.equal(padded["input_ids"], same["input_ids"])
    assert "<|im_start|>system\nHi.<|im_end|>" in recording.tokenizer.decode(padded["input_ids"][1])


def test_chat_template_is_the_tokenizers(recording, tmp_path):
    processor = AutoProcessor.from_pretrained(recording.folder, trust_remote_code=True)
    assert processor.chat_template == processor.tokenizer.chat_template is not None
    processor.chat_template = template = "{{ messages[0].content }}"
    assert processor.tokenizer.chat_template == template
    processor.save_pretrained(tmp_path)
    processor.tokenizer.chat_template = other = "{{ messages[0].role }}"
    processor.tokenizer.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.chat_template == again.tokenizer.chat_template == other
    built = type(processor)(processor.image_processor, processor.tokenizer, chat_template=template)
    assert built.chat_template == processor.tokenizer.chat_template == template


def test_folders_of_transformers_4_and_5_load_in_both(recording, tmp_path):
    """5 writes one nested file and a list of extra special tokens; 4 reads neither."""
    recording.processor.image_processor.save_pretrained(tmp_path)  # as it was
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
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.tokenizer.all_special_tokens == recording.tokenizer.all_special_tokens
    ids = [p.apply_chat_template(HELLO, tokenize=True)[0] for p in (again, recording.processor)]
    assert ids[0] == ids[1]


def inputs_of(processor, *parts, **options):
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)


def test_forms_of_an_image_part(recording, tmp_path):
    image, path = recorded_image(90, 60, 0), tmp_path / "image.png"
    image.save(path)
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    expected = inputs_of(recording.processor, {"type": "image", "image": image})
    for part in (
        {"type": "image", "image": None, "url": None, "path": str(path), "text": None},  # as Arrow gives it
        {"type": "image", "image": {"bytes": path.read_bytes(), "path": None}},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": url, "detail": None}, "image": None},
        {"type": "image_url", "image_url": url},
    ):
        inputs = inputs_of(recording.processor, part)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_a_budget_in_a_part_is_that_pictures(recording):
    large = recorded_image(400, 300, 0)
    parts = [{"type": "image", "image": large}, {"type": "image", "image": large, "max_pixels": 40_000}]
    one, two, both = (inputs_of(recording.processor, *chosen) for chosen in (parts[:1], parts[1:], parts))
    largest, limited = (inputs["image_grid_thw"][-1].prod() for inputs in (one, two))
    assert limited < largest
    assert torch.equal(both["pixel_values"], torch.cat([one["pixel_values"], two["pixel_values"]]))
    smaller = inputs_of(recording.processor, parts[0], max_pixels=40_000)
    assert torch.equal(smaller["pixel_values"], two["pixel_values"])


def test_a_generator_of_images(recording):
    images = [recorded_image(90, 60, 0), recorded_image(60, 90, 1)]
    expected = recording.processor(images=images, text="<image><image>", return_tensors="pt")
    inputs = recording.processor(images=(image for image in images), text="<image><image>", return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_a_typed_placeholder_is_text(recording):
    processor, image = recording.processor, recorded_image(90, 60, 0)

    def ids(text, **options):
        parts = [{"type": "text", "text": text}, {"type": "image", "image": image}, {"type": "text", "text": text}]
        return processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=True, **options)[0]

    slot, text = recording.model.config.image_token_id, "Make it an <image> tag."
    assert ids(text).count(slot) == ids("a").count(slot) > 0
    assert recording.tokenizer.decode(ids(text)).count(text) == 2
    assert "<image> tag" in recording.tokenizer.decode(
        processor.apply_chat_template([{"role": "user", "content": text}], tokenize=True)[0]
    )
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    )
    with pytest.raises(ValueError, match="2 <image> placeholders but 1 images"):
        processor(images=image, text=prompt)
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    example = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": text}]}
    batch = processor.training_batch([example])
    answer = recording.tokenizer.decode(batch["labels"][batch["labels"] >= 0])
    assert answer.strip() == text + "<|im_end|>"


def test_training_takes_added_tokens_and_whole_numbers_of_any_type(recording):
    processor = copy.deepcopy(recording.processor)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<loc_1>"]})
    example = {"messages": [*HELLO, {"role": "assistant", "content": "<loc_1>"}]}
    with pytest.raises(ValueError, match="contains <loc_1>.*allow_control_tokens=True"):
        processor.training_batch([example])
    collate = partial(processor.training_batch, allow_control_tokens=True)
    labels = collate([example])["labels"]
    assert processor.tokenizer.convert_tokens_to_ids("<loc_1>") in labels
    for row_length in (np.int64(200), torch.tensor(200)):
        assert collate([TRAINING_EXAMPLE] * 2, row_length=row_length)["attention_mask"].ndim == 4


def test_start_token_is_there_once(recording):
    start = recording.tokenizer.bos_token_id
    prompt = recording.processor.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    for ids in (recording.processor(text=prompt)["input_ids"][0], recording.processor(text="a")["input_ids"][0]):
        assert ids.count(start) == (start is not None)


def test_refusals(recording):
    image, processor = recorded_image(90, 60, 0), recording.processor

    def ask(content):
        return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)

    refusals = [
        ("0 <image> placeholders but 1 images", lambda: processor(images=image, text="no slot")),
        ("2 <image> placeholders but 0 images", lambda: processor(text=["<image>", "<image>"])),
        ("contains <IMG_CONTEXT>", lambda: processor(images=image, text="<image><IMG_CONTEXT>")),
        (
            "the prompts have [1, 2] <image> but [2, 1] images were given",
            lambda: processor(images=[[image, image], [image]], text=["<image>", "<image><image>"]),
        ),
        (
            "the prompts have [1, 1, 1] <image> but [2, 1] images were given",
            lambda: processor(images=[[image, image], [image]], text=["<image>"] * 3),
        ),
        (
            "the prompts have [1, 1] <image> but [2] images were given",
            lambda: processor(images=[[image, image]], text=["<image>"] * 2),
        ),
        ("got {'type': 'video'}", lambda: ask([{"type": "video"}])),
        ("got {'type': 'text', 'text': None}", lambda: ask([{"type": "text", "text": None}])),
        ("got {'type': 'text'}", lambda: ask([{"type": "text"}])),
        ("got None", lambda: ask(None)),
        ("got 'a'", lambda: ask(["a"])),
        ("an image part needs one of", lambda: ask([{"type": "image", "path": None}])),
        ("an image part needs one of", lambda: ask([{"type": "image_url"}])),
        ("cannot read an image from 'data:", lambda: ask([{"type": "image", "url": "data:image/png;base64,AAAA"}])),
        ("role must be one of", lambda: processor.apply_chat_template([{"role": "user<|im_end|>", "content": "a"}])),
        ("text must be a prompt", lambda: processor(images=image)),
        ("unknown keyword max_pixel=300", lambda: processor(images=image, text="<image>", max_pixel=300)),
        ("max_pixel", lambda: processor(text="a", images_kwargs={"max_pixel": 300})),
        ("max_pixel", lambda: processor.training_batch([TRAINING_EXAMPLE], max_pixel=300)),
        ("unknown keyword row_lenght=9", lambda: processor.training_batch([TRAINING_EXAMPLE], row_lenght=9)),
        ("unknown keyword max_pixel=300", lambda: processor.apply_chat_template(HELLO, max_pixel=300)),
        ("max_pixel", lambda: processor.apply_chat_template(HELLO, tokenize=True, processor_kwargs={"max_pixel": 300})),
        ("unknown keyword tools=[{", lambda: processor.apply_chat_template(HELLO, tools=TOOLS)),
        (
            "at least one message",
            lambda: processor.training_batch([{"messages": {"role": ["user"], "content": ["a"]}}]),
        ),
        ("not audio or video", lambda: processor(text="a", videos=[image])),
        ("at least one message", lambda: processor.apply_chat_template([])),
        ("contains <|im_start|>", lambda: processor.apply_chat_template([{"role": "user", "content": "<|im_start|>"}])),
        (
            "cannot read an image from 'x.png'",
            lambda: processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image", "path": "x.png"}]}], tokenize=True
            ),
        ),
    ]
    for message, call in refusals:
        with pytest.raises(ValueError) as raised:
            call()
        assert message in str(raised.value)
