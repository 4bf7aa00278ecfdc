"""Fine-tunes NaViL on conversations with `Trainer`: all parameters, those of a stage of the paper, or LoRA adapters.

    python examples/finetune.py --model . --subfolder tiny --output runs/finetuned
    python examples/finetune.py --model . --subfolder tiny --output runs/lora --lora both
    torchrun --nproc-per-node 2 examples/finetune.py --model . --subfolder tiny --output runs/finetuned

The data is what docs/data.md lists: JSON files of conversations, Hugging Face data sets, WebDataset shards.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModel, AutoProcessor, PreTrainedModel, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training import Source, StreamOptions, TrainingLoader, attach_loader  # noqa: E402
from training.loader import add_data_arguments  # noqa: E402

EXAMPLE_DATA = Path(__file__).with_name("finetune.jsonl")
"""Six conversations about the pictures next to it."""

LORA_TARGETS = {
    "text": r".*\.text\.\w+_proj",
    "visual": r".*\.visual\.\w+_proj",
    "both": r".*\.(text|visual)\.\w+_proj",
}
"""`target_modules` for PEFT: the linear layers of the decoder's attention and FFN experts, by modality."""


def add_lora(model: PreTrainedModel, experts: str, rank: int) -> Any:
    """The model as a `peft.PeftModel` with adapters on the experts of a key of LORA_TARGETS.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"--lora needs peft: pip install peft ({error})") from error

    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=LORA_TARGETS[experts])
    return get_peft_model(model, config)


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        gradient_checkpointing=options.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_ratio=0.05,
        adam_beta2=0.95,
        bf16=torch.cuda.is_available(),  # Apple GPUs train in float32
        use_cpu=on_cpu,
        ignore_data_skip=True,  # the loader moves to its position itself
        label_names=["labels"],
        # The loss is the mean over the labels of all processes.
        average_tokens_across_devices=PartialState(cpu=on_cpu).num_processes > 1,
        ddp_find_unused_parameters=False,  # without images, visual parameters get gradients of 0
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=0,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune NaViL on images and conversations (default: six of examples/).",
        epilog="example: python examples/finetune.py --model . --subfolder tiny --output runs/lora --lora visual",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder or name on the Hub")
    parser.add_argument("--subfolder", default="", metavar="NAME", help="folder of the weights in it, if not itself")
    add_data_arguments(parser, required=False)
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read data (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write the model to")
    parser.add_argument("--stage", choices=("s1.1", "s1.2", "s2"), default="s2", help="what trains (%(default)s: all)")
    parser.add_argument("--lora", choices=LORA_TARGETS, help="train adapters of these experts only (needs peft)")
    parser.add_argument("--lora-rank", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="optimizer steps (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, metavar="N", help="conversations per device (%(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches per step (%(default)s)")
    parser.add_argument("--row-length", type=int, metavar="TOKENS", help="pack conversations into rows of this length")
    parser.add_argument("--learning-rate", type=float, default=2e-4, metavar="X", help="default: %(default)s")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations to save memory")
    return parser


def training_loader(options: argparse.Namespace, processor: Any, max_tokens: int) -> TrainingLoader:
    """The data of `--data`, each conversation with at most a row's tokens, or else `max_tokens`."""
    return TrainingLoader(
        [Source.parse(words) for words in options.data or [[str(EXAMPLE_DATA)]]],
        processor.encode_conversation,
        partial(processor.training_batch, row_length=options.row_length),
        StreamOptions(batch_size=options.batch_size, max_tokens=options.row_length or max_tokens),
        on_error=options.on_error,
        max_errors=options.max_errors,
        folder=options.output,
        num_workers=options.workers,
        accumulate=options.accumulate,
    )


def finetune(options: argparse.Namespace) -> None:
    """Trains and saves the model.

    Raises:
        ValueError, OSError, ImportError: options that exclude each other, a bad data file or model, or a package that
            is not installed.
    """
    source = {"pretrained_model_name_or_path": options.model, "subfolder": options.subfolder, "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(**source)
    model = AutoModel.from_pretrained(**source)
    model.set_training_stage(options.stage)
    model = model if options.lora is None else add_lora(model, options.lora, options.lora_rank)
    trainer = Trainer(
        model=model,
        args=training_arguments(options),
    )
    context = model.config.text_config.max_position_embeddings
    attach_loader(trainer, training_loader(options, processor, context))
    if options.lora and trainer.is_fsdp_enabled:
        raise ValueError("--lora merges the adapters into the weights, which FSDP shards: run it without FSDP")
    trainer.train()
    trainer.save_state()
    if options.lora is None:
        trainer.save_model()
    elif trainer.is_world_process_zero():
        # No token was added. PEFT would compare with the config of --model, which --subfolder's may differ from.
        model.save_pretrained(options.output / "adapter", save_embedding_layers=False)
        model.merge_and_unload().save_pretrained(options.output)
    if trainer.is_world_process_zero():
        processor.save_pretrained(options.output)


def close_process_group() -> None:
    """Waits for the other processes, whose connections an exit would abort, and closes this one's."""
    state = PartialState()
    state.wait_for_everyone()
    gc.collect()  # a DDP wrapper that outlives the process group can deadlock at exit
    state.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        finetune(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    close_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
