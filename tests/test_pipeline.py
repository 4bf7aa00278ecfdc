"""transformers' own pipelines, given the model's folder and nothing else."""

import base64
import logging
from functools import lru_cache

import pytest
from conftest import conversation, recorded_image
from transformers import pipeline

IMAGE = recorded_image(90, 60, 0)
SHORT = {"max_new_tokens": 6, "return_full_text": False}


@lru_cache
def load(task: str, folder):
    return pipeline(task, model=str(folder), trust_remote_code=True)


@pytest.fixture
def pipe(recording):
    return load("image-text-to-text", recording.folder)


def test_a_pipeline_answers_as_chat_does_for_both_forms_of_an_image_part(recording, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    load.cache_clear()
    pipe = load("image-text-to-text", recording.folder)
    assert type(pipe.processor).__name__ == "NaViLProcessor" and "is not supported" not in caplog.text
    IMAGE.save(tmp_path / "image.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    openai = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    chats = [
        conversation("Two, in a longer question?", IMAGE, recorded_image(64, 64, 2)),
        conversation("What is it?", IMAGE),
        [{"role": "user", "content": openai}],
    ]
    expected = [recording.chat([IMAGE, recorded_image(64, 64, 2)], "Two, in a longer question?")]
    expected += [recording.chat(IMAGE, "What is it?")] * 2
    for answers in (pipe(text=chats, batch_size=3, **SHORT), [pipe(text=chat, **SHORT) for chat in chats]):
        assert [record["generated_text"].strip() for [record] in answers] == expected


def test_text_generation_pipeline_answers_as_the_model_does(recording):
    chat = [{"role": "user", "content": "Hello?"}]
    pipe = load("text-generation", recording.folder)
    answer = pipe(chat, max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]["content"]
    ids = recording.generate(recording.encode(chat), max_new_tokens=4)
    assert answer == recording.tokenizer.decode(ids[0], skip_special_tokens=True)


def test_full_text_is_the_conversation_and_goes_on(pipe):
    messages = conversation("What is it?", IMAGE)
    [record] = pipe(text=messages, max_new_tokens=6)
    assert record["generated_text"][:-1] == record["input_text"] == messages
    answer = record["generated_text"][-1]
    assert answer["role"] == "assistant" and answer["content"]
    [record] = pipe(text=[*record["generated_text"], *conversation("And now?")], max_new_tokens=6)
    assert [message["role"] for message in record["generated_text"]] == ["user", "assistant"] * 2


def test_a_started_answer_is_continued_and_prompts_outside_of_a_chat(recording, pipe):
    started = {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}
    messages = [*conversation("What is it?", IMAGE), started]
    [record] = pipe(text=messages, **SHORT)
    prompt = recording.processor.apply_chat_template(messages, continue_final_message=True)
    assert prompt.endswith("It is")
    prompts = {"<image> A picture of": [IMAGE], "Once upon a time": []}
    records = [record, *pipe(images=list(prompts.values()), text=list(prompts), **SHORT)]
    for record, text, images in zip(records, [prompt, *prompts], [[IMAGE], [IMAGE], None], strict=True):
        inputs = recording.processor(images=images, text=text, return_tensors="pt")
        new_ids = recording.generate(inputs, max_new_tokens=6)
        assert record["generated_text"] == recording.processor.post_process_image_text_to_text(new_ids)[0]


def test_settings_of_generate_reach_it(recording, pipe):
    messages, settings = conversation("What is it?", IMAGE), {"num_beams": 3, "max_new_tokens": 6}
    [record] = pipe(text=messages, generate_kwargs=settings, return_tensors=True)
    expected = recording.model.generate(**recording.encode(messages), **settings)[0]
    assert record["generated_token_ids"].tolist() == expected.tolist()
