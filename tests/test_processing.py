"""The processor gives inputs that go straight into `generate` and agree with `chat`."""

import base64
import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import conversation, recorded_image, refused
from transformers import AutoProcessor

IMAGES = [recorded_image(90, 60, 0), recorded_image(60, 90, 1), recorded_image(64, 64, 2)]
HELLO = [{"role": "user", "content": "Hello?"}]
TRAINING_EXAMPLE = {"messages": [*HELLO, {"role": "assistant", "content": "Hi."}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def ask(content) -> list[dict]:
    return [{"role": "user", "content": content}]


# -- images ------------------------------------------------------------------------------------------------------------


def test_images_and_text(recording):
    processor, images = recording.processor, [IMAGES[:1], IMAGES[1:]]
    inputs = processor(images=images, text=["<image> a", "b <image><image>"], return_tensors="pt", padding=True)
    assert type(processor).__name__ == "NaViLProcessor"
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "num_scales"}
    cells = inputs["image_grid_thw"].prod(-1).sum() // 4
    assert (inputs["input_ids"] == recording.model.config.image_token_id).sum() == cells
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].tolist() == [1, 1]  # left padding
    expected = processor.image_processor(IMAGES, multi_scale=True)
    assert np.array_equal(inputs["pixel_values"], expected["pixel_values"])
    assert inputs["num_scales"].tolist() == expected["num_scales"].tolist()


def test_images_may_be_a_generator_and_a_prompt_may_have_none(recording):
    prompts, images = ["<image>a", "b", "<image><image>c"], [IMAGES[:1], None, IMAGES[1:]]
    rows = recording.processor(images=images, text=prompts, padding=True)
    flat = recording.processor(images=(image for image in IMAGES), text=prompts, padding=True)
    for name in rows:
        assert np.array_equal(rows[name], flat[name])


def test_settings_reach_the_image_processor(recording):
    processor, settings = recording.processor, {"min_pixels": 256, "max_pixels": 1024}
    assert processor(images=IMAGES[0], text="<image>", multi_scale=False)["num_scales"].tolist() == [1]
    grids = processor(images=IMAGES[0], text="<image>", **settings)["image_grid_thw"].tolist()
    expected = processor.image_processor(IMAGES[0], **settings, multi_scale=True)["image_grid_thw"].tolist()
    assert grids == expected == [[1, 2, 4]]


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


def test_a_budget_in_a_part_is_that_pictures(recording):
    large = recorded_image(400, 300, 0)
    [plain], [limited] = conversation("What?", large), conversation("What?", large, max_pixels=40_000)
    both = {"role": "user", "content": [plain["content"][0], *limited["content"]]}
    one, two, together = (recording.encode([message]) for message in (plain, limited, both))
    assert two["image_grid_thw"][-1].prod() < one["image_grid_thw"][-1].prod()
    assert torch.equal(together["pixel_values"], torch.cat([one["pixel_values"], two["pixel_values"]]))
    assert torch.equal(recording.encode([plain], max_pixels=40_000)["pixel_values"], two["pixel_values"])


def test_every_form_of_an_image_part_generates_what_chat_answers(recording, tmp_path):
    path = tmp_path / "image.png"
    IMAGES[0].save(path)
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    expected = recording.encode(conversation("What?", IMAGES[0]))
    answer = recording.processor.post_process_image_text_to_text(recording.generate(expected))[0]
    assert answer.strip() == recording.model.chat(recording.tokenizer, IMAGES[0], "What?", {"max_new_tokens": 8})
    for part in (
        {"type": "image", "image": np.asarray(IMAGES[0])},
        {"type": "image", "path": str(path)},
        {"type": "image", "image": None, "url": None, "path": str(path), "text": None},  # as Arrow gives it
        {"type": "image", "image": {"bytes": path.read_bytes(), "path": None}},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": url, "detail": None}, "image": None},
        {"type": "image_url", "image_url": url},
    ):
        messages = ask([part, {"type": "text", "text": "What?"}])
        before = copy.deepcopy(messages)
        inputs = recording.encode(messages)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        assert repr(messages) == repr(before)


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", ["multi_scal", "add_generation_promt", "paddin"])
@pytest.mark.parametrize("value", [False, 0, True, "x"])
def test_a_misspelled_keyword_is_an_error_whatever_its_value(recording, keyword, value):
    with refused(f"unknown keyword {keyword}"):
        recording.processor(text="a", **{keyword: value})
    for template in (recording.processor.apply_chat_template, recording.tokenizer.apply_chat_template):
        with refused(f"unknown keyword {keyword}"):
            template(HELLO, **{keyword: value})


def test_generation_prompt_follows_who_speaks_last(recording):
    template = recording.processor.apply_chat_template
    assert template(HELLO, tokenize=False) == template(HELLO, tokenize=False, add_generation_prompt=True)
    assert template(TRAINING_EXAMPLE["messages"], tokenize=False).endswith("Hi.<|im_end|>")


def test_template_variables_and_settings_are_told_apart(recording):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | length }}{{ documents }}{{ mood }}"
    variables = {"tools": TOOLS, "documents": [{"text": "d"}], "mood": "glad"}
    for owner in (recording.processor, recording.tokenizer):
        prompt = owner.apply_chat_template(HELLO, chat_template=template, tokenize=False, **variables)
        assert prompt == "Hello?1[{'text': 'd'}]glad"
    batch, system = [HELLO, ask("A longer question?")], {"system_message": "Hi."}
    padded = recording.encode(*batch, **system)
    options = {"processor_kwargs": {"padding": True}, "enable_thinking": False, "tools": None, **system}
    options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    same = recording.processor.apply_chat_template(batch, **options)
    assert torch.equal(padded["input_ids"], same["input_ids"])
    assert "<|im_start|>system\nHi.<|im_end|>" in recording.tokenizer.decode(padded["input_ids"][1])


def test_a_typed_placeholder_is_text(recording):
    processor, slot, text = recording.processor, recording.model.config.image_token_id, "Make it an <image> tag."

    def ids(typed):
        [message] = conversation(typed, IMAGES[0])
        message["content"].insert(0, message["content"][1])
        return processor.apply_chat_template([message], tokenize=True)[0]

    assert ids(text).count(slot) == ids("a").count(slot) > 0
    assert recording.tokenizer.decode(ids(text)).count(text) == 2
    without_image = processor.apply_chat_template(ask(text), tokenize=True)[0]
    assert "<image> tag" in recording.tokenizer.decode(without_image)
    prompt = processor.apply_chat_template(ask([{"type": "image"}, {"type": "text", "text": text}]))
    with refused("2 <image> placeholders but 1 images"):
        processor(images=IMAGES[0], text=prompt)
    messages = [*conversation(text, IMAGES[0]), {"role": "assistant", "content": text}]
    batch = processor.training_batch([{"messages": messages}])
    answer = recording.tokenizer.decode(batch["labels"][batch["labels"] >= 0])
    assert answer.strip() == text + "<|im_end|>"


def test_training_takes_added_tokens_and_whole_numbers_of_any_type(recording):
    processor = copy.deepcopy(recording.processor)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<loc_1>"]})
    example = {"messages": [*HELLO, {"role": "assistant", "content": "<loc_1>"}]}
    with pytest.raises(ValueError, match="contains <loc_1>.*allow_control_tokens=True"):
        processor.training_batch([example])
    collate = partial(processor.training_batch, allow_control_tokens=True)
    assert processor.tokenizer.convert_tokens_to_ids("<loc_1>") in collate([example])["labels"]
    for row_length in (np.int64(200), torch.tensor(200)):
        assert collate([TRAINING_EXAMPLE] * 2, row_length=row_length)["attention_mask"].ndim == 4


def test_start_token_is_there_once(recording):
    start = recording.tokenizer.bos_token_id
    prompt = recording.processor.apply_chat_template(HELLO, tokenize=False)
    for text in (prompt, "a"):
        assert recording.processor(text=text)["input_ids"][0].count(start) == (start is not None)


# -- saving ------------------------------------------------------------------------------------------------------------


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
    ids = [processor.apply_chat_template(HELLO, tokenize=True)[0] for processor in (again, recording.processor)]
    assert ids[0] == ids[1]


# -- refusals ----------------------------------------------------------------------------------------------------------

A, B = IMAGES[:2]
CALLS = [
    ("0 <image> placeholders but 1 images", {"images": A, "text": "no slot"}),
    ("2 <image> placeholders but 0 images", {"text": ["<image>", "<image>"]}),
    ("contains <IMG_CONTEXT>", {"images": A, "text": "<image><IMG_CONTEXT>"}),
    ("have [1, 2] <image> but [2, 1] images were given", {"images": [[A, B], [A]], "text": ["<image>", "<image>" * 2]}),
    ("have [1, 1, 1] <image> but [2, 1] images were given", {"images": [[A, B], [A]], "text": ["<image>"] * 3}),
    ("have [1, 1] <image> but [2] images were given", {"images": [[A, B]], "text": ["<image>"] * 2}),
    ("text must be a prompt", {"images": A}),
    ("unknown keyword max_pixel=300", {"images": A, "text": "<image>", "max_pixel": 300}),
    ("max_pixel", {"text": "a", "images_kwargs": {"max_pixel": 300}}),
    ("not audio or video", {"text": "a", "videos": [A]}),
]
CONVERSATIONS = [
    ("got {'type': 'video'}", ask([{"type": "video"}])),
    ("got {'type': 'text', 'text': None}", ask([{"type": "text", "text": None}])),
    ("got {'type': 'text'}", ask([{"type": "text"}])),
    ("got None", ask(None)),
    ("got 'a'", ask(["a"])),
    ("an image part needs one of", ask([{"type": "image", "path": None}])),
    ("an image part needs one of", ask([{"type": "image_url"}])),
    ("cannot read an image from 'data:", ask([{"type": "image", "url": "data:image/png;base64,AAAA"}])),
    ("cannot read an image from 'x.png'", ask([{"type": "image", "path": "x.png"}])),
    ("role must be one of", [{"role": "user<|im_end|>", "content": "a"}]),
    ("contains <|im_start|>", ask("<|im_start|>")),
    ("at least one message", []),
]
KEYWORDS = [
    ("unknown keyword max_pixel=300", lambda p: p.apply_chat_template(HELLO, max_pixel=300)),
    ("max_pixel", lambda p: p.apply_chat_template(HELLO, tokenize=True, processor_kwargs={"max_pixel": 300})),
    ("unknown keyword tools=[{", lambda p: p.apply_chat_template(HELLO, tools=TOOLS)),
    ("max_pixel", lambda p: p.training_batch([TRAINING_EXAMPLE], max_pixel=300)),
    ("unknown keyword row_lenght=9", lambda p: p.training_batch([TRAINING_EXAMPLE], row_lenght=9)),
    ("at least one message", lambda p: p.training_batch([{"messages": {"role": ["user"], "content": ["a"]}}])),
]


@pytest.mark.parametrize(("message", "arguments"), CALLS, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_calls_are_refused(recording, message, arguments):
    with refused(message):
        recording.processor(**arguments)


@pytest.mark.parametrize(("message", "messages"), CONVERSATIONS, ids=str)
def test_bad_conversations_are_refused(recording, message, messages):
    with refused(message):
        recording.processor.apply_chat_template(messages, tokenize=True)


@pytest.mark.parametrize(("message", "call"), KEYWORDS)
def test_bad_keywords_and_training_examples_are_refused(recording, message, call):
    with refused(message):
        call(recording.processor)
