"""What weight-only quantization of the decoder costs: a table of logit KL and held-out answers.

    python -m benchmarks.quantization tiny --count 24

The decoder's linear layers are quantized by torchao on loading; the vision encoder, the connector and the output head
are left alone. KL is that of the next-token distributions, full precision against quantized, in nats per label of the
held-out answers; `answers` are right answers at the difficulty of the model's own curriculum.json.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from tqdm import tqdm
from transformers import TorchAoConfig

from navil import modeling_navil as modeling
from recipes.curriculum import CURRICULUM_FILE, read_difficulty
from recipes.evaluate import answer_all, grade, held_out
from recipes.model import load
from recipes.packing import answer_index, encode, pack
from recipes.tasks import TASKS, Sample

KEPT = ("vision_model", "connector", "lm_head")
"""Modules that stay in full precision."""

SCHEMES: dict[str, Callable[[int], Any]] = {
    "int8": lambda group: Int8WeightOnlyConfig(),  # a scale per output channel
    "int4": lambda group: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group)),
}


def load_quantized(folder: Path, scheme: str, group: int) -> nn.Module:
    config = TorchAoConfig(SCHEMES[scheme](group), modules_to_not_convert=list(KEPT))
    return modeling.NaViLForConditionalGeneration.from_pretrained(folder, quantization_config=config).eval()


@torch.no_grad()
def answer_log_probabilities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(labels, vocabulary) of the positions that predict an answer's tokens."""
    targets = ("labels", "loss_weight", "task_index", "dense_labels", "regression_targets")
    inputs = {name: batch[name] for name in batch if name not in targets}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return logits[answer_index(batch["labels"][:, 1:]) >= 0].float().log_softmax(-1)


def mean_kl(exact: nn.Module, quantized: nn.Module, batches: Sequence[dict[str, Tensor]]) -> float:
    """Nats per label."""
    divergences = []
    for batch in tqdm(batches, desc="KL", disable=None):
        target, actual = (answer_log_probabilities(model, batch) for model in (exact, quantized))
        divergences.append((target.exp() * (target - actual)).sum(-1))
    return torch.cat(divergences).mean().item()


def right_answers(model: nn.Module, processor: Any, samples: dict[str, list[Sample]], title: str) -> tuple[int, int]:
    """How many answers are right, of how many."""
    marked = [
        right
        for task, drawn in samples.items()
        for _, right in grade(drawn, answer_all(model, processor, drawn, f"{title}, {task}"))
    ]
    return sum(marked), len(marked)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure what weight-only int8 and int4 of the decoder cost (needs torchao).",
        epilog="example: python -m benchmarks.quantization tiny --count 24",
    )
    parser.add_argument("model", type=Path, help="folder of a model that the recipe trained, with its curriculum.json")
    parser.add_argument("--count", type=int, default=24, help="held-out samples per task (%(default)s)")
    parser.add_argument("--group", type=int, default=32, help="weights that share an int4 scale (%(default)s)")
    options = parser.parse_args(arguments)
    exact, processor = load(options.model)
    exact.eval()
    difficulty = read_difficulty(options.model / CURRICULUM_FILE)
    samples = {task: held_out(task, options.count, difficulty[task]) for task in TASKS}
    pad_id = processor.tokenizer.pad_token_id
    batches = [pack([[encode(sample, processor)]], pad_id) for drawn in samples.values() for sample in drawn]
    right, questions = right_answers(exact, processor, samples, "exact")
    lines = ["| weights | KL, nats per label | right answers |", "|---|---|---|"]
    lines.append(f"| {str(exact.dtype).removeprefix('torch.')} | - | {right} of {questions} |")
    for scheme in SCHEMES:
        quantized = load_quantized(options.model, scheme, options.group)
        kl = mean_kl(exact, quantized, batches)
        right, _ = right_answers(quantized, processor, samples, scheme)
        lines.append(f"| {scheme} | {kl:.6f} | {right} of {questions} |")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
