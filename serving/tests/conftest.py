"""Model folders, and the package's own answers, which those of vLLM are compared with."""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NUM_NEW = 8  # tokens of each answer

os.environ |= {
    "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="navil-serving-modules-"),
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, for tests that change it
    "TORCH_COMPILE_DISABLE": "1",
}
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
from cases import conversations  # noqa: E402
from transformers import AutoModel, AutoProcessor  # noqa: E402

import convert_checkpoint  # noqa: E402


@dataclass
class Answer:
    """A greedy answer of `NUM_NEW` tokens that goes on behind an end of turn."""

    prompt_ids: list[int]
    ids: list[int]
    logprobs: torch.Tensor  # (NUM_NEW, vocabulary) float32


@torch.inference_mode()
def answers_of_package(folder: Path) -> dict[str, Answer]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    answers = {}
    for name, messages in conversations().items():
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        output = model.generate(
            **inputs,
            max_new_tokens=NUM_NEW,
            eos_token_id=model.config.vocab_size,  # none
            output_logits=True,
            return_dict_in_generate=True,
        )
        prompt_ids = inputs["input_ids"][0].tolist()
        logprobs = torch.cat(output.logits).float().log_softmax(-1)
        answers[name] = Answer(prompt_ids, output.sequences[0, len(prompt_ids) :].tolist(), logprobs)
    return answers


@dataclass
class Checkpoint:
    folder: Path
    answers: dict[str, Answer]


def make_checkpoint(folder: Path, command: str, source: Path) -> Checkpoint:
    """A model folder that keeps small pictures small: more scales, and less work."""
    assert convert_checkpoint.main([command, str(source), str(folder)]) == 0
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"min_pixels": 16 * 16**2, "max_pixels": 1024 * 16**2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return Checkpoint(folder, answers_of_package(folder))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "navil-tiny-served", "bundle", ROOT / "tiny")


@pytest.fixture(scope="session")
def window(tmp_path_factory) -> Checkpoint:
    """Random weights of a released layout, whose visual tokens are in window order."""
    folder = tmp_path_factory.mktemp("window") / "navil-window-served"
    return make_checkpoint(folder, "official", ROOT / "tests" / "fixtures" / "internlm2")
