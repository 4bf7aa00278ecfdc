"""The study's pictures and texts: drawn once, at a fixed difficulty, and the same for all runs."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from navil.configuration_navil import NaViLConfig
from navil.processing_navil import Conversation, NaViLProcessor

from ..model import build_config, build_processor, build_tokenizer
from ..packing import messages
from ..tasks import TEXT_PRETRAINING, make_sample

DIFFICULTY = 0.1
PICTURES = {"text": 0.4, "scene": 0.3, "grounding": 0.3}  # share of each task
TEXTS = {TEXT_PRETRAINING: 0.5, "text_only": 0.5}
HELDOUT_SEED = 10**8  # of the first held-out sample
NUM_HELDOUT = 384
MAX_PATCHES = 1024  # of a picture; all are smaller, so they keep their size
ROW_LENGTH = 512  # tokens of a packed row


def build_study_processor() -> NaViLProcessor:
    """Pictures keep their size and have one scale."""
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    config.min_dynamic_patch, config.max_dynamic_patch = 1, MAX_PATCHES
    processor = build_processor(tokenizer, config)
    processor.multi_scale = False
    return processor


def draw(mix: Mapping[str, float], count: int, first_seed: int, processor: NaViLProcessor) -> dict[str, list[Any]]:
    """Encoded samples, by task; patches are bytes."""
    rng = random.Random(first_seed)
    samples: dict[str, list[Any]] = {task: [] for task in mix}
    for seed in range(first_seed, first_seed + count):
        [task] = rng.choices([*mix], [*mix.values()])
        sample = make_sample(task, seed, DIFFICULTY)
        conversation = processor.encode_conversation({"messages": messages(sample.turns, sample.images)})
        if conversation.images:
            patches = conversation.images["pixel_values"]
            conversation.images["pixel_values"] = ((patches + 1) * 127.5).round().to(torch.uint8)
        samples[task].append(tuple(conversation))
    return samples


def load_samples(folder: Path, name: str, count: int) -> dict[str, list[Conversation]]:
    """Samples by task: `pictures`, `texts` or the `heldout` pictures; drawn at the first call."""
    path = folder / f"{name}-{count}.pt"
    if not path.is_file():
        first_seed = HELDOUT_SEED if name == "heldout" else 0
        drawn = draw(TEXTS if name == "texts" else PICTURES, count, first_seed, build_study_processor())
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(drawn, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return {task: [Conversation(*parts) for parts in samples] for task, samples in torch.load(path).items()}


def collate(samples: Sequence[Conversation], processor: NaViLProcessor, device: str) -> dict[str, Tensor]:
    """A packed training batch."""
    batch = processor.training_batch(samples, row_length=ROW_LENGTH).to(device)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].float() / 127.5 - 1
    return dict(batch)


def study_config(
    processor: NaViLProcessor, decoder: tuple[int, int], encoder: tuple[int, int], experts: Sequence[str]
) -> NaViLConfig:
    """A decoder and an encoder of (depth, width) each, with heads of 32 and 16 features."""
    config = build_config(processor.tokenizer)
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    text |= {"num_hidden_layers": decoder[0], "hidden_size": decoder[1], "intermediate_size": 5 * decoder[1] // 2}
    text |= {"num_attention_heads": decoder[1] // 32, "num_key_value_heads": decoder[1] // 32, "head_dim": 32}
    vision |= {"num_hidden_layers": encoder[0], "hidden_size": encoder[1], "intermediate_size": 4 * encoder[1]}
    vision |= {"num_attention_heads": encoder[1] // 16, "fullatt_block_indexes": None}
    settings = {"min_dynamic_patch": 1, "max_dynamic_patch": MAX_PATCHES}
    names = ("image_token_id", "image_start_token_id", "eos_token_id", "pad_token_id")
    settings |= {name: getattr(config, name) for name in names}
    return NaViLConfig(vision_config=vision, text_config=text | {"visual_experts": list(experts)}, **settings)
