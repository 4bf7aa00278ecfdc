"""transformers' own pipeline, given the model's folder and nothing else."""

import base64
import json
import logging
import subprocess
import sys

import pytest
from conftest import ROOT, recorded_image
from transformers import pipeline

ANSWERS = json.loads((ROOT / "examples" / "answers.json").read_text())
TASK = "image-text-to-text"


def ask(question: str, *images) -> list[dict]:
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


@pytest.fixture
def pipe(recording):
    return pipeline(TASK, model=str(recording.folder), trust_remote_code=True)


def test_model_alone_is_enough(recording, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pipe = pipeline(TASK, model=str(recording.folder), trust_remote_code=True)
    assert type(pipe.processor).__name__ == "NaViLProcessor"
    assert "is not supported" not in caplog.text
    image = recorded_image(90, 60, 0)
    [record] = pipe(text=ask("What is it?", image), max_new_tokens=8, return_full_text=False)
    expected = recording.model.chat(recording.tokenizer, image, "What is it?", {"max_new_tokens": 8})
    assert record["generated_text"].strip() == expected


FRESH = """
import sys
from transformers import AutoProcessor, pipeline
root, image, question = sys.argv[1:]
options = {"subfolder": "tiny"}
AutoProcessor.from_pretrained(root, trust_remote_code=True, **options)  # its code comes before the config's
pipe = pipeline("image-text-to-text", model=root, trust_remote_code=True, model_kwargs=options)
messages = [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": question}]}]
print(pipe(text=messages, return_full_text=False)[0]["generated_text"])
"""


def test_embedded_checkpoint_answers_in_a_fresh_process(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    example = ANSWERS[0]
    command = [sys.executable, "-c", FRESH, str(ROOT), str(ROOT / example["image"]), example["question"]]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.stdout.splitlines()[-1:] == [example["answer"]], finished.stderr


def test_batches_of_chats_with_different_numbers_of_images(pipe):
    images = [recorded_image(90, 60, 0), recorded_image(60, 90, 1), recorded_image(64, 64, 2)]
    chats = [ask("One?", images[0]), ask("Three, in a longer question?", *images), ask("Two?", *images[1:])]
    options = {"max_new_tokens": 6, "return_full_text": False}
    together = [record["generated_text"] for [record] in pipe(text=chats, batch_size=3, **options)]
    assert together == [pipe(text=chat, **options)[0]["generated_text"] for chat in chats]


def test_full_text_is_the_conversation_and_goes_on(pipe):
    messages = ask("What is it?", recorded_image(90, 60, 0))
    [record] = pipe(text=messages, max_new_tokens=6)
    assert record["generated_text"][:-1] == record["input_text"] == messages
    answer = record["generated_text"][-1]
    assert answer["role"] == "assistant" and answer["content"]
    [record] = pipe(text=[*record["generated_text"], *ask("And now?")], max_new_tokens=6)
    assert [message["role"] for message in record["generated_text"]] == ["user", "assistant"] * 2


def test_begun_answer_is_continued(recording, pipe):
    image = recorded_image(90, 60, 0)
    messages = [*ask("What is it?", image), {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    [record] = pipe(text=messages, max_new_tokens=6, return_full_text=False)
    prompt = recording.processor.apply_chat_template(messages, continue_final_message=True)
    inputs = recording.processor(images=image, text=prompt, return_tensors="pt")
    assert prompt.endswith("It is")
    expected = recording.model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    assert record["generated_text"] == recording.processor.post_process_image_text_to_text(expected)[0]


def test_prompts_outside_of_a_chat(recording, pipe):
    image, options = recorded_image(90, 60, 0), {"max_new_tokens": 6, "return_full_text": False}
    records = pipe(images=[[image], []], text=["<image> A picture of", "Once upon a time"], **options)
    for record, images, text in zip(records, [image, None], ["<image> A picture of", "Once upon a time"], strict=True):
        inputs = recording.processor(images=images, text=text, return_tensors="pt")
        expected = recording.model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
        assert record["generated_text"] == recording.processor.post_process_image_text_to_text(expected)[0]


def test_openais_parts(pipe, tmp_path):
    image, options = recorded_image(90, 60, 0), {"max_new_tokens": 6, "return_full_text": False}
    image.save(tmp_path / "image.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    assert (
        pipe(text=[{"role": "user", "content": parts}], **options)[0]["generated_text"]
        == (pipe(text=ask("What is it?", image), **options)[0]["generated_text"])
    )


def test_settings_of_generate_reach_it(recording, pipe):
    messages = ask("What is it?", recorded_image(90, 60, 0))
    settings = {"num_beams": 3, "max_new_tokens": 6}
    [record] = pipe(text=messages, generate_kwargs=settings, return_tensors=True)
    inputs = recording.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    expected = recording.model.generate(**inputs, **settings)[0]
    assert record["generated_token_ids"].tolist() == expected.tolist()
