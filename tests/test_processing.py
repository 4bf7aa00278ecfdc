"""The processor gives inputs that go straight into `generate` and agree with `chat`."""

import numpy as np
import pytest
import torch
from conftest import recorded_image


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
            "prompt 0 has 1 <image> placeholders but 2 images were given",
            lambda: processor(images=[[image, image], [image]], text=["<image>", "<image><image>"]),
        ),
        (
            "one list of images per prompt; 3 prompts got 2 lists and 0 single images",
            lambda: processor(images=[[image, image], [image]], text=["<image>"] * 3),
        ),
        (
            "one list of images per prompt; 2 prompts got 1 lists and 1 single images",
            lambda: processor(images=[[image], image], text=["<image>"] * 2),
        ),
        ("got {'type': 'image_url'}", lambda: ask([{"type": "image_url"}])),
        ("got {'type': 'text'}", lambda: ask([{"type": "text"}])),
        ("got None", lambda: ask(None)),
        ("got 'a'", lambda: ask(["a"])),
        ("needs one of image, path, url or base64", lambda: ask([{"type": "image"}])),
        ("cannot read an image from 'data:", lambda: ask([{"type": "image", "url": "data:image/png;base64,AAAA"}])),
        ("role must be one of", lambda: processor.apply_chat_template([{"role": "user<|im_end|>", "content": "a"}])),
        ("text is required", lambda: processor(images=image)),
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
