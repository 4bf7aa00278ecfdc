"""What Muon saves over AdamW in the training recipe: the same batches, from the same checkpoint, with either.

python -m benchmarks.optimizers tiny --steps 60
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_wsd_schedule

from recipes.curriculum import Curriculum
from recipes.hardware import faster_dtype
from recipes.model import load
from recipes.optimizer import MuonWithAdamW
from recipes.packing import PackedSamples, model_inputs
from recipes.stages import STAGES
from recipes.tasks import ALL_TASKS

PART = 0.2  # of the steps: rows of the table


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.95), fused=True)


def muon(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return MuonWithAdamW(model, learning_rate, weight_decay, faster_dtype("cpu"))


OPTIMIZERS = {"AdamW": adamw, "Muon": muon}


def draw_batches(folder: Path, processor: Any, steps: int) -> list[dict[str, Tensor]]:
    """Batches of stage s2 at the folder's curriculum difficulty, with seeds that its training has not used."""
    curriculum = Curriculum()
    curriculum.load(folder)
    mix = STAGES["s2"].mix
    weights = torch.tensor([mix.get(task, 0.0) for task in ALL_TASKS])
    stream = PackedSamples(processor, weights, curriculum.difficulty, first_seed=10**9)
    return list(tqdm(itertools.islice(stream, steps), total=steps, desc="batches", disable=None))


def train_on(folder: Path, batches: Sequence[dict[str, Tensor]], name: str) -> tuple[list[float], float]:
    """The loss of every batch before its step, and the seconds that all took."""
    model, _ = load(folder)
    model.train()
    stage = STAGES["s2"]
    optimizer = OPTIMIZERS[name](model, stage.learning_rate, stage.weight_decay)
    warmup, decay = len(batches) // 10, len(batches) // 4
    schedule = get_wsd_schedule(optimizer, warmup, decay, num_training_steps=len(batches))
    in_bf16 = faster_dtype("cpu") == torch.bfloat16
    losses, start = [], time.perf_counter()
    for batch in tqdm(batches, desc=name, disable=None):
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            loss = model(**model_inputs(batch)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train a checkpoint on the same batches with AdamW and with Muon, on the CPU.",
        epilog="example: python -m benchmarks.optimizers tiny --steps 60",
    )
    parser.add_argument("model", type=Path, help="folder of a model that the recipe trained, with its curriculum.json")
    parser.add_argument("--steps", type=int, default=60, help="batches (%(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 10:
        raise ValueError(f"--steps must be at least 10, got {options.steps}")
    _, processor = load(options.model)
    batches = draw_batches(options.model, processor, options.steps)
    results = {name: train_on(options.model, batches, name) for name in OPTIMIZERS}
    print(f"| steps | {' | '.join(OPTIMIZERS)} |", f"|---{'|---' * len(OPTIMIZERS)}|", sep="\n")
    size = round(PART * options.steps)
    for first in range(0, options.steps - size + 1, size):
        means = [sum(losses[first : first + size]) / size for losses, _ in results.values()]
        print(f"| {first + 1} to {first + size} | {' | '.join(f'{mean:.4f}' for mean in means)} |")
    (_, adamw_seconds), (_, muon_seconds) = results.values()
    print(f"A step with Muon takes {muon_seconds / adamw_seconds:.2f} times as long.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
