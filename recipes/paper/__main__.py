"""Trains a stage of the paper (arXiv 2510.08565, section 4.2) at any scale.

    python -m recipes.paper s1.1 --model weights/navil-qwen3 --data 'pairs/{00000..09999}.tar' --output runs/paper-s11
    python -m recipes.paper s1.2 --model runs/paper-s11 --data 'better/{0000..1999}.tar' --output runs/paper-s12
    python -m recipes.paper s2 --model runs/paper-s12 --data instructions.json --output runs/paper-s2

Any flag of transformers' TrainingArguments may follow, such as `--gradient_checkpointing true`. Run it again to resume
from the last checkpoint. Several devices: `accelerate launch -m recipes.paper ...`.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import AutoModel, AutoProcessor, HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from examples.finetune import close_process_group
from training import Source, StreamOptions, TrainingLoader, attach_loader
from training.check import count_tokens
from training.loader import add_data_arguments

STAGE_FILES = {name: Path(__file__).with_name(f"{name}.yaml") for name in ("s1.1", "s1.2", "s2")}
GLOBAL_BATCH = 256  # rows of a step: 4 million tokens. The paper's number is not known to us.
MEASURED_RECORDS = 256


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "recipes.paper", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("stage", choices=STAGE_FILES, help="what trains, and the settings in recipes/paper/STAGE.yaml")
    parser.add_argument("--model", required=True, metavar="DIR", help="from-llm's for s1.1, then the stage before")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="model folder to write")
    add_data_arguments(parser, required=True)
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read data (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="share of the paper's samples (1)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: as many as --scale takes)")
    parser.add_argument(
        "--global-batch", type=int, default=GLOBAL_BATCH, metavar="N", help="rows of a step, all devices (%(default)s)"
    )
    for name in ("row-length", "max-patches"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="instead of the stage's")
    return parser


def read_stage(options: argparse.Namespace) -> dict[str, Any]:
    """The stage's file, with what the options replace."""
    stage = yaml.safe_load(STAGE_FILES[options.stage].read_text(encoding="utf-8"))
    given = {name: getattr(options, name) for name in ("row_length", "max_patches")}
    return stage | {name: value for name, value in given.items() if value is not None}


def load(folder: str, stage: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """Model, in float32 as the optimizer needs it, and processor, with the stage's limit of patches."""
    model = AutoModel.from_pretrained(folder, torch_dtype=torch.float32, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    smallest, largest = model.config.min_dynamic_patch, stage["max_patches"]
    if largest < smallest:
        raise ValueError(f"an image has at least {smallest} patches in {folder}, but max_patches is {largest}")
    model.config.max_dynamic_patch = largest
    processor.image_processor.max_pixels = largest * processor.image_processor.patch_size**2
    model.set_training_stage(stage["stage"])
    return model, processor


def mean_tokens(sources: Sequence[Source], processor: Any, max_tokens: int) -> float:
    """Tokens of a conversation, by the first of the training order; the same on all processes."""
    options = StreamOptions(max_tokens=max_tokens, epochs=1)
    encode = processor.encode_conversation
    loader = TrainingLoader(sources, encode, count_tokens, options, on_error="skip", rank=0, world_size=1)
    return fmean(batch["tokens"] for batch in islice(loader, MEASURED_RECORDS))


def count_steps(samples: float, tokens: float, rows: int, row_length: int) -> int:
    """Optimizer steps of `rows` rows each that train on the samples, of `tokens` tokens each, once."""
    return max(1, round(samples * tokens / (rows * row_length)))


def training_arguments(
    options: argparse.Namespace, settings: dict[str, Any], flags: Sequence[str], steps: int
) -> TrainingArguments:
    """The stage's settings, which the flags replace, with what the loader and the global batch need.

    Raises:
        ValueError: the processes cannot share the rows of a step evenly.
    """
    on_cpu = not torch.cuda.is_available()
    processes = PartialState(cpu=on_cpu).num_processes
    if options.global_batch < 1 or options.global_batch % processes:
        raise ValueError(f"--global-batch must be a multiple of {processes} processes, got {options.global_batch}")
    needed = {
        "output_dir": options.output,
        "max_steps": steps,
        "per_device_train_batch_size": 1,  # a row
        "gradient_accumulation_steps": options.global_batch // processes,
        "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
        "use_cpu": on_cpu,
        "ignore_data_skip": True,  # the loader moves to its position itself
        "average_tokens_across_devices": processes > 1,
        "ddp_find_unused_parameters": False,  # without images, visual parameters get gradients of 0
        "label_names": "labels",
    }
    words = [word for name, value in ({"report_to": "none"} | settings).items() for word in (f"--{name}", str(value))]
    fixed = [word for name, value in needed.items() for word in (f"--{name}", str(value))]
    [arguments] = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*words, *flags, *fixed])
    return arguments


def train(options: argparse.Namespace, flags: Sequence[str]) -> None:
    """Trains the stage and saves the model; each row is filled with conversations up to its length."""
    stage = read_stage(options)
    model, processor = load(options.model, stage)
    sources, length = [Source.parse(words) for words in options.data], stage["row_length"]
    max_tokens = min(length, model.config.text_config.max_position_embeddings)
    tokens = mean_tokens(sources, processor, max_tokens) if options.steps is None else 0
    steps = options.steps or count_steps(stage["samples"] * options.scale, tokens, options.global_batch, length)
    trainer = Trainer(model, training_arguments(options, stage["arguments"], flags, steps))
    loader = TrainingLoader(
        sources,
        processor.encode_conversation,
        partial(processor.training_batch, row_length=length),
        StreamOptions(batch_size=length, batch_tokens=length, max_tokens=max_tokens),
        on_error=options.on_error,
        max_errors=options.max_errors,
        folder=options.output,
        num_workers=options.workers,
        accumulate=trainer.args.gradient_accumulation_steps,
    )
    attach_loader(trainer, loader)
    print(f"{options.stage}: {steps:,} steps of {options.global_batch} rows of {length:,} tokens")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(options.output) if options.output.is_dir() else None)
    trainer.save_state()
    trainer.save_model()
    if trainer.is_world_process_zero():
        processor.save_pretrained(options.output)


def main(arguments: Sequence[str] | None = None) -> int:
    options, flags = build_parser().parse_known_args(arguments)
    try:
        train(options, flags)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    close_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
