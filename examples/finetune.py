"""Fine-tunes NaViL on conversations with `Trainer`: all parameters, those of a stage of the paper, or LoRA adapters.

    python examples/finetune.py --model . --subfolder tiny --output runs/finetuned
    python examples/finetune.py --model . --subfolder tiny --output runs/lora --lora both
    torchrun --nproc-per-node 2 examples/finetune.py --model . --subfolder tiny --output runs/finetuned

The data is a JSONL file with `{"messages": [...]}` on each line, a conversation for `processor.apply_chat_template`.
Image paths are relative to the file.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModel, AutoProcessor, PreTrainedModel, Trainer, TrainingArguments

LORA_TARGETS = {
    "text": r".*\.text\.\w+_proj",
    "visual": r".*\.visual\.\w+_proj",
    "both": r".*\.(text|visual)\.\w+_proj",
}
"""`target_modules` for PEFT: the linear layers of the decoder's attention and FFN experts, by modality."""


def load_conversations(path: Path) -> list[dict[str, Any]]:
    """One example per line; relative image paths are resolved against the file's folder."""
    examples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for example in examples:
        parts = [part for message in example["messages"] for part in message["content"] if isinstance(part, dict)]
        for part in parts:
            for key in ("path", "image"):
                if key in part and not part[key].startswith(("http://", "https://", "data:")):
                    part[key] = str(path.parent / part[key])
    return examples


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
        remove_unused_columns=False,  # the collator needs the messages
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
        description="Fine-tune NaViL on conversations in a JSONL file.",
        epilog="example: python examples/finetune.py --model . --subfolder tiny --output runs/lora --lora visual",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder or name on the Hub")
    parser.add_argument("--subfolder", default="", metavar="NAME", help="folder of the weights in it, if not itself")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(__file__).with_name("finetune.jsonl"),
        metavar="FILE",
        help='lines of {"messages": [...]} (default: six conversations about examples/*.png)',
    )
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


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    source = {"pretrained_model_name_or_path": options.model, "subfolder": options.subfolder, "trust_remote_code": True}
    try:
        processor = AutoProcessor.from_pretrained(**source)
        model = AutoModel.from_pretrained(**source)
        model.set_training_stage(options.stage)
        model = model if options.lora is None else add_lora(model, options.lora, options.lora_rank)
        trainer = Trainer(
            model=model,
            args=training_arguments(options),
            train_dataset=load_conversations(options.data),
            data_collator=partial(processor.training_batch, row_length=options.row_length),
        )
        if options.lora and trainer.is_fsdp_enabled:
            raise ValueError("--lora merges the adapters into the weights, which FSDP shards: run it without FSDP")
        trainer.train()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    trainer.save_state()
    if options.lora is None:
        trainer.save_model()
    elif trainer.is_world_process_zero():
        # No token was added. PEFT would compare with the config of --model, which --subfolder's may differ from.
        model.save_pretrained(options.output / "adapter", save_embedding_layers=False)
        model.merge_and_unload().save_pretrained(options.output)
    if trainer.is_world_process_zero():
        processor.save_pretrained(options.output)
    # Gloo aborts a process that exits while another still uses its connections.
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
