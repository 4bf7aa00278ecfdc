"""One run of the study: trains a small NaViL on every sample once and measures its loss on held-out pictures."""

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from transformers.trainer_utils import set_seed

from navil.modeling_navil import NaViLForConditionalGeneration
from navil.processing_navil import Conversation, NaViLProcessor

from ..optimizer import MuonWithAdamW
from ..stages import copy_text_experts, set_trainable
from .data import NUM_HELDOUT, build_study_processor, collate, load_samples, study_config

BATCH = 32  # samples of a step
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS, MAX_GRAD_NORM = 1e-3, 0.01, 20, 1.0
AVERAGE = 0.95  # decay of the running average of weights that is measured: about 20 steps, less at the start
MEASURED = (0.02, 0.04, 0.06, 0.1, 0.15, 0.22, 0.32, 0.46, 0.68, 0.84, 1.0)  # shares of the samples

SMALLEST_ENCODER = (1, 32)  # of a decoder that reads texts alone
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Run:
    """Sizes are (depth, width)."""

    decoder: tuple[int, int]
    encoder: tuple[int, int]
    experts: tuple[str, ...] = ("attention", "ffn")
    from_text: bool = True  # the decoder was trained on as many texts before
    seed: int = 0

    @property
    def name(self) -> str:
        sizes = [f"{part}-{depth}x{width}" for part, (depth, width) in (("llm", self.decoder), ("vit", self.encoder))]
        start = "text" if self.from_text else "scratch"
        return "_".join([*sizes, "+".join(self.experts) or "shared", start, f"seed-{self.seed}"])


def batches(samples: Sequence[Conversation], seed: int) -> Iterator[Sequence[Conversation]]:
    shuffled = random.Random(seed).sample(samples, len(samples))
    return (shuffled[start : start + BATCH] for start in range(0, len(shuffled) - BATCH + 1, BATCH))


def update_average(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
    """The averages move towards the current weights, by nine tenths at first."""
    torch._foreach_lerp_(averaged, current, max(1 - AVERAGE, 9 / (10 + int(num_averaged))))


def train_once(
    model: NaViLForConditionalGeneration, samples: Sequence[Conversation], processor: NaViLProcessor, seed: int
) -> Iterator[tuple[int, int, AveragedModel]]:
    """Sees every sample once; after each step the number of samples, of tokens, and the averaged model."""
    optimizer = MuonWithAdamW(model, LEARNING_RATE, WEIGHT_DECAY, torch.float32)
    averaged = AveragedModel(model, multi_avg_fn=update_average)
    model.train()
    tokens = 0
    for step, chosen in enumerate(batches(samples, seed), 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
        model(**collate(chosen, processor, model.device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        tokens += sum(len(one.input_ids) for one in chosen)
        yield step * BATCH, tokens, averaged


@torch.no_grad()
def heldout_losses(model: NaViLForConditionalGeneration, heldout: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
    """Mean loss of a label, by task, and the mean of the tasks as `all`."""
    model.eval()
    losses = {}
    for task, parts in heldout.items():
        numbers = [int((batch["labels"][:, 1:] >= 0).sum()) for batch in parts]
        total = sum(float(model(**batch).loss) * number for batch, number in zip(parts, numbers, strict=True))
        losses[task] = total / sum(numbers)
    return losses | {"all": sum(losses.values()) / len(losses)}


@torch.no_grad()
def feature_scales(model: NaViLForConditionalGeneration, batch: Batch) -> dict[str, list[float]]:
    """Root mean square of the features that enter each decoder layer, and of the last, by modality."""
    states = model(**batch, output_hidden_states=True).hidden_states
    is_visual = model.model.get_visual_token_mask(batch["input_ids"])
    is_text = ~is_visual & (batch["input_ids"] != model.config.pad_token_id)
    masks = {"text": is_text, "visual": is_visual}
    return {name: [float(x[mask].float().pow(2).mean().sqrt()) for x in states] for name, mask in masks.items()}


def count_parameters(model: NaViLForConditionalGeneration) -> dict[str, int]:
    """Of the encoder, the decoder as one modality activates it (without the embedding table), and everything."""
    layers = model.language_model.layers.named_parameters()
    return {
        "encoder": sum(x.numel() for x in model.vision_model.blocks.parameters()),
        "decoder": sum(x.numel() for name, x in layers if ".visual." not in name),
        "all": sum(x.numel() for x in model.parameters()),
    }


def flatten(samples: Mapping[str, Sequence[Conversation]]) -> list[Conversation]:
    return [one for task in samples.values() for one in task]


@cache
def load_heldout(folder: Path, device: str) -> tuple[NaViLProcessor, dict[str, list[Batch]]]:
    """The study's processor, and batches of held-out pictures."""
    processor = build_study_processor()
    samples = load_samples(folder, "heldout", NUM_HELDOUT)
    parts = {task: [some[start : start + 64] for start in range(0, len(some), 64)] for task, some in samples.items()}
    return processor, {task: [collate(part, processor, device) for part in some] for task, some in parts.items()}


@cache
def load_training(folder: Path, name: str, count: int) -> list[Conversation]:
    return flatten(load_samples(folder, name, count))


def execute(run: Run, folder: Path, num_samples: int, device: str = "cpu") -> dict[str, Any]:
    """Trains the run's model, unless `folder` has its result, and writes both to `folder/runs`.

    Returns:
        `run` and its `name`; `parameters`; `measured`, a list of `samples`, `tokens` and `loss` (by task and `all`);
        `feature_scale` by modality; `seconds`; `pretraining` for a decoder from text.
    """
    path = folder / "runs" / f"{run.name}_{num_samples}.json"
    if path.is_file():
        return json.loads(path.read_text())
    start = time.monotonic()
    processor, heldout = load_heldout(folder, device)
    set_seed(run.seed)
    model = NaViLForConditionalGeneration(study_config(processor, run.decoder, run.encoder, run.experts)).to(device)
    result: dict[str, Any] = {"name": run.name, "run": asdict(run), "parameters": count_parameters(model)}
    if run.from_text:
        pretrained = pretrain(run.decoder, run.seed, folder, num_samples, device)
        start_from_text(model, pretrained.pop("weights"))
        result["pretraining"] = pretrained
    measured = {BATCH * math.ceil(share * (num_samples // BATCH)) for share in MEASURED}
    rows = []
    for seen, tokens, averaged in train_once(
        model, load_training(folder, "pictures", num_samples), processor, run.seed
    ):
        if seen in measured:
            rows.append({"samples": seen, "tokens": tokens, "loss": heldout_losses(averaged.module, heldout)})
            model.train()
    model = averaged.module
    result["measured"] = rows
    result["feature_scale"] = feature_scales(model, heldout["grounding"][0])
    result["seconds"] = round(time.monotonic() - start, 1)
    model.save_pretrained(path.with_suffix(""))
    processor.save_pretrained(path.with_suffix(""))
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".part").replace(path)
    return result


def pretrain(decoder: tuple[int, int], seed: int, folder: Path, num_samples: int, device: str) -> dict[str, Any]:
    """A decoder's text experts and embeddings after as many texts, from `folder/texts` or trained there.

    Returns:
        `weights` by name, and the numbers of `samples` and `tokens`.
    """
    path = folder / "texts" / f"llm-{decoder[0]}x{decoder[1]}_seed-{seed}_{num_samples}.pt"
    if path.is_file():
        return torch.load(path, map_location=device)
    processor = build_study_processor()
    set_seed(seed)
    model = NaViLForConditionalGeneration(study_config(processor, decoder, SMALLEST_ENCODER, ())).to(device)
    set_trainable(model, "text")
    texts = load_training(folder, "texts", num_samples)
    *_, (samples, tokens, averaged) = train_once(model, texts, processor, seed)
    weights = {name: p.detach().cpu() for name, p in averaged.module.named_parameters() if p.requires_grad}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": weights, "samples": samples, "tokens": tokens}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return torch.load(path, map_location=device)


def start_from_text(model: NaViLForConditionalGeneration, weights: Mapping[str, Tensor]) -> None:
    """The model's text experts and embeddings become those of `pretrain`, its visual experts their copies."""
    model.load_state_dict(weights, strict=False)
    copy_text_experts(model)
