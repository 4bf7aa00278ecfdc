"""What weight-only quantization of the decoder costs: KL divergence of the logits, and held-out answers.

    python -m benchmarks.quantization tiny --count 24

torchao quantizes the decoder's linear layers on loading; vision encoder, connector and output head stay in full
precision. The KL divergence compares next-token distributions, full precision against quantized, in nats per label of
the held-out answers.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchao.core.config import AOBaseConfig
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from tqdm import tqdm
from transformers import BatchFeature, TorchAoConfig

from navil.modeling_navil import NaViLForConditionalGeneration
from navil.processing_navil import IGNORE_INDEX, NaViLProcessor
from recipes.evaluate import answer_all, grade, held_out
from recipes.model import load
from recipes.packing import messages
from recipes.tasks import TASKS, Sample

FULL_PRECISION = ("model.vision_model", "model.connector", "lm_head")
"""Modules that are not quantized."""

SCHEMES: dict[str, Callable[[int], AOBaseConfig]] = {
    "int8": lambda group: Int8WeightOnlyConfig(),  # one scale per output channel
    "int4": lambda group: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group)),
}


def load_quantized(folder: Path, scheme: str, group: int) -> NaViLForConditionalGeneration:
    config = TorchAoConfig(SCHEMES[scheme](group), modules_to_not_convert=list(FULL_PRECISION))
    return NaViLForConditionalGeneration.from_pretrained(folder, quantization_config=config).eval()


@torch.no_grad()
def answer_log_probabilities(model: NaViLForConditionalGeneration, batch: BatchFeature) -> Tensor:
    """(labels, vocabulary) at the positions that predict a label."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return logits[batch["labels"][:, 1:] != IGNORE_INDEX].float().log_softmax(-1)


def mean_kl(
    exact: NaViLForConditionalGeneration, quantized: NaViLForConditionalGeneration, batches: Iterable[BatchFeature]
) -> float:
    """Nats per label."""
    divergences = []
    for batch in tqdm(batches, desc="KL", disable=None):
        target, actual = (answer_log_probabilities(model, batch) for model in (exact, quantized))
        divergences.append((target.exp() * (target - actual)).sum(-1))
    return torch.cat(divergences).mean().item()


def correct_answers(
    model: NaViLForConditionalGeneration, processor: NaViLProcessor, samples: dict[str, list[Sample]], title: str
) -> str:
    """How many answers are correct, of how many."""
    marked = [
        is_correct
        for task, drawn in samples.items()
        for _, is_correct in grade(drawn, answer_all(model, processor, drawn, f"{title}, {task}"))
    ]
    return f"{sum(marked)} of {len(marked)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure what weight-only int8 and int4 of the decoder cost (needs torchao).",
        epilog="example: python -m benchmarks.quantization tiny --count 24",
    )
    parser.add_argument("model", type=Path, help="folder of a model that the recipe trained")
    parser.add_argument("--count", type=int, default=24, help="held-out samples per task (%(default)s)")
    parser.add_argument("--difficulty", type=float, default=1.0, help="of the samples, 0 to 1 (%(default)s)")
    parser.add_argument("--group", type=int, default=32, help="weights that share an int4 scale (%(default)s)")
    options = parser.parse_args(arguments)
    exact, processor = load(options.model)
    exact.eval()
    samples = {task: held_out(task, options.count, options.difficulty) for task in TASKS}
    batches = [
        processor.training_batch([{"messages": messages(sample.turns, sample.images)}])
        for drawn in samples.values()
        for sample in drawn
    ]
    lines = ["| weights | KL, nats per label | correct answers |", "|---|---|---|"]
    lines.append(f"| float32 | - | {correct_answers(exact, processor, samples, 'exact')} |")
    for scheme in SCHEMES:
        quantized = load_quantized(options.model, scheme, options.group)
        kl = mean_kl(exact, quantized, batches)
        lines.append(f"| {scheme} | {kl:.6f} | {correct_answers(quantized, processor, samples, scheme)} |")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
