"""The embedded checkpoint: it loads from this repository, answers as it did, and goes on learning."""

import json

import pytest
import torch
from conftest import ROOT
from transformers import AutoModel, AutoProcessor, AutoTokenizer

OPTIONS = {"subfolder": "tiny", "trust_remote_code": True}
ANSWERS = json.loads((ROOT / "examples" / "answers.json").read_text())


@pytest.fixture(scope="module")
def tiny():
    return AutoModel.from_pretrained(ROOT, **OPTIONS).eval(), AutoTokenizer.from_pretrained(ROOT, **OPTIONS)


@pytest.mark.parametrize("example", ANSWERS, ids=lambda example: example["image"])
def test_examples_are_answered_as_recorded(tiny, example):
    model, tokenizer = tiny
    assert model.chat(tokenizer, ROOT / example["image"], example["question"]) == example["answer"]


def test_some_recorded_answers_are_true():
    assert sum(example["answer"] == example["true"] for example in ANSWERS) >= 3


def test_size_and_settings(tiny):
    model, _ = tiny
    assert 5e6 < sum(parameter.numel() for parameter in model.parameters()) < 20e6
    assert (ROOT / "tiny" / "model.safetensors").stat().st_size <= 40 * 2**20
    assert model.config.vision_config.visual_token_order == "raster" and model.config.text_config.qk_norm


def test_one_step_lowers_the_loss_of_its_batch():
    model = AutoModel.from_pretrained(ROOT, **OPTIONS).train()
    processor = AutoProcessor.from_pretrained(ROOT, **OPTIONS)
    image = ROOT / ANSWERS[0]["image"]
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "path": str(image)}, {"type": "text", "text": "Read the text."}],
        },
        {"role": "assistant", "content": "unheard-of"},
    ]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
