"""The package's own answers, and what it means that vLLM's equal them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor

TOLERANCE = 1e-4  # of a logprob
NUM_NEW = 8  # tokens of each answer, which goes on behind an end of turn


@torch.inference_mode()
def answers(model: Any, folder: Path, chats: dict[str, list[dict]], **settings: Any) -> dict[str, dict]:
    """Greedy: `prompt_ids`, `ids`, and `logprobs` (NUM_NEW, vocabulary) float32, of each conversation by itself.

    Args:
        settings: of `generate`.
    """
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    answers = {}
    for name, messages in chats.items():
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        output = model.generate(
            **inputs,
            max_new_tokens=NUM_NEW,
            eos_token_id=model.config.vocab_size,  # none
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
        prompt_ids = inputs["input_ids"][0].tolist()
        answers[name] = {
            "prompt_ids": prompt_ids,
            "ids": output.sequences[0, len(prompt_ids) :].tolist(),
            "logprobs": torch.cat(output.logits).float().log_softmax(-1),
        }
    return answers


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """The model of a folder, float32 unless stated otherwise."""
    return AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype, **settings).eval()


def largest_error(expected: dict, actual: dict) -> float:
    """Largest difference of logprobs; infinite if any prompt or greedy answer differs."""
    errors = []
    for name, answer in actual.items():
        reference = expected[name]
        if any(answer[key] != reference[key] for key in ("prompt_ids", "ids")):
            return float("inf")
        for step, logprobs in enumerate(answer["logprobs"]):
            errors += [abs(reference["logprobs"][step, id].item() - logprob) for id, logprob in logprobs.items()]
    return max(errors)


def check(expected: dict, actual: dict) -> None:
    assert len(actual) >= 40
    for name, answer in actual.items():
        error = largest_error(expected, {name: answer})
        assert error < TOLERANCE, (name, error, answer["ids"], expected[name]["ids"])
