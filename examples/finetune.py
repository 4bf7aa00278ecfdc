"""Fine-tunes NaViL on conversations with `Trainer`: all parameters, those of a stage or part, or adapters.

    python examples/finetune.py --model . --subfolder tiny --output runs/finetuned
    python examples/finetune.py --model . --subfolder tiny --output runs/lora --lora both
    torchrun --nproc-per-node 2 examples/finetune.py --model . --subfolder tiny --output runs/finetuned
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/finetune.py --model DIR --output runs/large

It prints answers before and after, and writes a model folder. Without `--data` it teaches eight conversations that
`tiny/` does not know. Data: docs/data.md; everything else: docs/training.md.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoModel,
    AutoProcessor,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training import FineTuner, Source, StreamOptions, TrainingLoader, attach_loader  # noqa: E402
from training.evaluation import TOLERANCES, checked_examples, expected_answer, split_sources, text_of  # noqa: E402
from training.loader import add_data_arguments  # noqa: E402
from training.parts import (  # noqa: E402
    LORA_TARGETS,
    PARTS,
    add_adapters,
    four_bit_settings,
    freeze,
    import_peft,
    read_rates,
)
from training.trainer import last_checkpoint  # noqa: E402

EXAMPLE_DATA = Path(__file__).with_name("finetune.jsonl")
"""Conversations about the pictures next to it."""

LAST = "last"
DEFAULT_STEPS = 60
EVALUATIONS = 0.25  # of the steps between two

# -- options -----------------------------------------------------------------------------------------------------------

ALIASES = {
    "--steps": ("max_steps", int),
    "--batch-size": ("per_device_train_batch_size", int),
    "--accumulate": ("gradient_accumulation_steps", int),
    "--workers": ("dataloader_num_workers", int),
}
"""Short names of arguments of `TrainingArguments`."""

DEFAULTS = {
    **{"per_device_train_batch_size": 2, "learning_rate": 2e-4, "adam_beta2": 0.95, "lr_scheduler_type": "cosine"},
    **{"gradient_checkpointing_kwargs": {"use_reentrant": False}, "save_total_limit": 2, "logging_steps": 1, "seed": 0},
    **{"remove_unused_columns": False, "label_names": ["labels"], "report_to": ["none"]},
    "ignore_data_skip": True,  # the loader moves to its position itself
    "ddp_find_unused_parameters": False,  # without images, visual parameters get gradients of 0
}
"""Our defaults of `TrainingArguments`. Those in UNSETTLED depend on the device and on other options: `settle`."""

UNSETTLED = ("max_steps", "num_train_epochs", "use_cpu", "bf16", "average_tokens_across_devices", "eval_strategy")
UNSETTLED += ("save_strategy", "eval_steps", "save_steps", "load_best_model_at_end", "metric_for_best_model")


def build_parser() -> argparse.ArgumentParser:
    parser = HfArgumentParser(
        TrainingArguments,
        description="Fine-tune NaViL on images and conversations. All arguments of transformers' TrainingArguments are "
        "options; those of this script are at the end.",
        epilog="example: python examples/finetune.py --model . --subfolder tiny --output runs/lora --lora visual",
        conflict_handler="resolve",
        allow_abbrev=False,
    )
    warmup = "warmup_ratio" if "warmup_ratio" in argument_names() else "warmup_steps"  # since transformers 5.24
    parser.set_defaults(**DEFAULTS, **dict.fromkeys(UNSETTLED), **{warmup: 0.05})
    add_model_arguments(parser.add_argument_group("model and data"))
    add_training_arguments(parser.add_argument_group("training"))
    add_evaluation_arguments(parser.add_argument_group("evaluation (needs --eval-data or --eval-fraction)"))
    return parser


def argument_names() -> list[str]:
    return [field.name for field in fields(TrainingArguments) if field.init]


def add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", required=True, metavar="DIR", help="model folder or name on the Hub")
    group.add_argument("--subfolder", default="", metavar="NAME", help="folder of the weights in it, if not itself")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    add_data_arguments(group, required=False)
    group.add_argument("--row-length", type=int, metavar="TOKENS", help="pack conversations into rows of this length")
    names = ("--output", "--output_dir", "--output-dir")
    group.add_argument(*names, required=True, metavar="DIR", help="folder to write the model and checkpoints to")


def add_training_arguments(group: argparse._ArgumentGroup) -> None:
    for name, (argument, kind) in ALIASES.items():
        text = f"short for --{argument}"
        group.add_argument(name, dest=argument, type=kind, default=argparse.SUPPRESS, metavar="N", help=text)
    checkpointing = {"dest": "gradient_checkpointing", "action": "store_true", "default": argparse.SUPPRESS}
    group.add_argument("--checkpointing", **checkpointing, help="short for --gradient_checkpointing")
    names = ("--resume_from_checkpoint", "--resume-from-checkpoint")
    text = "go on from this checkpoint; without DIR, from the last complete one of --output, if there is one"
    group.add_argument(*names, nargs="?", const=LAST, metavar="DIR", help=text)
    group.add_argument("--stage", choices=("s1.1", "s1.2", "s2"), default="s2", help="what trains, s2: all")
    text = "freeze the parameters whose names contain this regular expression"
    group.add_argument("--freeze", nargs="+", default=[], metavar="PATTERN", help=text)
    text = f"learning rates of parts ({', '.join(PARTS)}); the others have --learning-rate"
    group.add_argument("--lr", nargs="+", default=[], metavar="PART=X", help=text)
    group.add_argument("--lora", choices=LORA_TARGETS, help="train adapters of these experts only (needs peft)")
    group.add_argument("--lora-rank", type=int, default=16, metavar="N", help="of the adapters")
    group.add_argument("--dora", action="store_true", help="with --lora: adapters that separate length and direction")
    group.add_argument("--qlora", action="store_true", help="with --lora: a 4-bit decoder (GPU, needs bitsandbytes)")


def add_evaluation_arguments(group: argparse._ArgumentGroup) -> None:
    text = "data to evaluate on, as --data takes it"
    group.add_argument("--eval-data", nargs="+", action="append", metavar=("PATH", "KEY=VALUE"), help=text)
    group.add_argument("--eval-fraction", type=float, metavar="X", help="or: a random fraction of --data, held out")
    text = "of generated answers: equal, or numbers within 5 %%; none evaluates the loss alone"
    group.add_argument("--metric", choices=(*TOLERANCES, "none"), default="exact", help=text)
    group.add_argument("--answer-tokens", type=int, default=64, metavar="N", help="the most that an answer may have")
    text = "stop after N evaluations that were not better than the best"
    group.add_argument("--early-stop", type=int, metavar="N", help=text)
    group.add_argument("--show", type=int, default=8, metavar="N", help="examples to answer before and after training")


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """The options, with the defaults that depend on the device and on other options.

    Raises:
        ValueError: options that exclude or need each other.
    """
    check_options(options)

    def default(name: str, value: Any) -> None:
        if getattr(options, name) is None:
            setattr(options, name, value)

    default("max_steps", DEFAULT_STEPS if options.num_train_epochs is None else -1)
    default("num_train_epochs", 1.0)
    default("use_cpu", not (torch.cuda.is_available() or torch.backends.mps.is_available()))
    default("bf16", torch.cuda.is_available() and not options.use_cpu and not options.fp16)  # not on Apple's GPUs
    # The loss is the mean over the labels of all processes.
    default("average_tokens_across_devices", PartialState(cpu=options.use_cpu).num_processes > 1)
    evaluates = is_evaluated(options)
    default("save_strategy", (options.eval_strategy or "steps") if evaluates or options.save_steps else "no")
    default("eval_strategy", "steps" if evaluates else "no")
    default("eval_steps", (options.save_steps or EVALUATIONS) if evaluates else None)
    default("save_steps", options.eval_steps if evaluates else 500)
    default("load_best_model_at_end", evaluates)
    default("metric_for_best_model", ("loss" if options.metric == "none" else "accuracy") if evaluates else None)
    return options


def is_evaluated(options: argparse.Namespace) -> bool:
    return bool(options.eval_data or options.eval_fraction is not None)


def check_options(options: argparse.Namespace) -> None:
    if options.eval_data and options.eval_fraction is not None:
        raise ValueError("--eval-data and --eval-fraction exclude each other")
    if (options.dora or options.qlora) and options.lora is None:
        raise ValueError("--dora and --qlora need --lora text, visual or both")
    for name in ("eval_steps", "eval_strategy", "early_stop", "load_best_model_at_end", "metric_for_best_model"):
        if getattr(options, name) and getattr(options, name) != "no" and not is_evaluated(options):
            raise ValueError(f"--{name.replace('_', '-')} needs --eval-data or --eval-fraction")


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    settled = vars(options) | {"output_dir": str(options.output), "resume_from_checkpoint": None}
    return TrainingArguments(**{name: settled[name] for name in argument_names()})


# -- data --------------------------------------------------------------------------------------------------------------


class Data:
    """The sources to train on, the examples to evaluate on (None without), and those to show.

    Raises:
        ValueError: a bad record in the examples, with `--on-error stop`; or a source that cannot be read.
    """

    def __init__(self, options: argparse.Namespace, processor: Any, max_tokens: int):
        self.sources = [Source.parse(words) for words in options.data or [[str(EXAMPLE_DATA)]]]
        held_out = [Source.parse(words) for words in options.eval_data or []]
        if options.eval_fraction is not None:
            self.sources, held_out = split_sources(self.sources, options.eval_fraction, options.seed)
        bad_records = {"on_error": options.on_error, "max_errors": options.max_errors}
        encode = processor.encode_conversation
        self.evaluated = checked_examples(held_out, encode, max_tokens, **bad_records) if held_out else None
        self.shown = (self.evaluated or first_examples(self.sources, options.show))[: options.show]


def first_examples(sources: Sequence[Source], count: int) -> list[dict[str, Any]]:
    """The first good examples of the sources that have their rows at hand."""

    def read() -> Any:
        for rows in (source.open() for source in sources):
            for index in range(len(rows) if hasattr(rows, "row") else 0):
                try:
                    yield rows.row(index).read()
                except ValueError:  # the loader names it
                    continue

    return list(islice(read(), count))


def training_loader(
    options: argparse.Namespace, args: TrainingArguments, processor: Any, sources: Sequence[Source], max_tokens: int
) -> TrainingLoader:
    """The data to train on, each conversation with at most a row's tokens, or else `max_tokens`."""
    limits = {"batch_size": args.per_device_train_batch_size, "max_tokens": options.row_length or max_tokens}
    return TrainingLoader(
        sources,
        processor.encode_conversation,
        partial(processor.training_batch, row_length=options.row_length),
        StreamOptions(**limits, seed=args.seed),
        on_error=options.on_error,
        max_errors=options.max_errors,
        folder=Path(args.output_dir),
        num_workers=args.dataloader_num_workers,
        accumulate=args.gradient_accumulation_steps,
    )


# -- training ----------------------------------------------------------------------------------------------------------


def load_model(options: argparse.Namespace, **settings: Any) -> PreTrainedModel:
    source = {"subfolder": options.subfolder, "torch_dtype": getattr(torch, options.dtype), "trust_remote_code": True}
    return AutoModel.from_pretrained(options.model, **source, **settings)


def prepare_model(options: argparse.Namespace, args: TrainingArguments) -> PreTrainedModel:
    """The model with what shall train."""
    model = load_model(options, **(four_bit_settings(args.local_process_index) if options.qlora else {}))
    if options.lora:
        model = add_adapters(model, options.lora, options.lora_rank, options.dora)
    else:
        model.set_training_stage(options.stage)
    freeze(model, options.freeze)
    return model


def checkpoint_to_resume(options: argparse.Namespace) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` stands for.

    Raises:
        ValueError: a new run in a folder that has checkpoints.
    """
    last = last_checkpoint(Path(options.output))
    if options.resume_from_checkpoint == LAST:
        return last and str(last)
    if options.resume_from_checkpoint is None and last is not None:
        raise ValueError(f"{last} is of an earlier run: --resume_from_checkpoint goes on; or choose another --output")
    return options.resume_from_checkpoint


def print_answers(
    trainer: FineTuner, examples: Sequence[dict[str, Any]], before: Sequence[str], after: Sequence[str]
) -> None:
    """Questions, expected answers, and those before and after training."""
    for example, first, second in zip(examples, before, after, strict=True):
        expected = expected_answer(example, trainer.processor)
        print(f"\n{text_of(example['messages'][-2])}")
        print(f"    expected  {expected}\n    before    {first}\n    after     {second}")
    counts = [sum(map(trainer.is_right, examples, answers)) for answers in (before, after)]
    print(f"\nright answers: {counts[0]} of {len(examples)} before, {counts[1]} of {len(examples)} after")


def without_logits(collate: Any, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch for the loss of an evaluation."""
    return {**collate(examples), "output_logits": False}


def make_trainer(options: argparse.Namespace, args: TrainingArguments, processor: Any) -> tuple[FineTuner, Data]:
    model = prepare_model(options, args)
    max_tokens = model.config.text_config.max_position_embeddings
    data = Data(options, processor, max_tokens)
    callbacks = [] if options.early_stop is None else [EarlyStoppingCallback(options.early_stop)]
    trainer = FineTuner(
        processor,
        read_rates(options.lr),
        options.metric,
        options.answer_tokens,
        model=model,
        args=args,
        data_collator=partial(without_logits, processor.training_batch),
        eval_dataset=data.evaluated,
        callbacks=callbacks,
    )
    if options.lora and trainer.is_sharded:
        raise ValueError("--lora merges the adapters into the weights, which FSDP and DeepSpeed shard: use DDP")
    attach_loader(trainer, training_loader(options, args, processor, data.sources, max_tokens))
    return trainer, data


def save(trainer: FineTuner, options: argparse.Namespace) -> None:
    """Writes a model folder, and with LoRA the adapters in `adapter`."""
    output = Path(options.output)
    trainer.save_state()
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if options.lora is None:
        trainer.save_model()
    elif trainer.is_world_process_zero():
        # No token was added. PEFT would compare with the config of --model, which --subfolder's may differ from.
        trainer.model.save_pretrained(output / "adapter", save_embedding_layers=False)
        adapted = import_peft().PeftModel.from_pretrained(load_model(options), output / "adapter")
        adapted.merge_and_unload().save_pretrained(output)
    if trainer.is_world_process_zero():
        trainer.processor.save_pretrained(output)


def finetune(options: argparse.Namespace) -> None:
    """Trains and saves the model.

    Raises:
        ValueError, OSError, ImportError: options that exclude each other, a bad data file or model, or a package that
            is not installed.
    """
    args = training_arguments(settle(options))
    checkpoint = checkpoint_to_resume(options)
    source = {"pretrained_model_name_or_path": options.model, "subfolder": options.subfolder, "trust_remote_code": True}
    trainer, data = make_trainer(options, args, AutoProcessor.from_pretrained(**source))
    shown = [] if trainer.is_sharded else data.shown  # before training, weights are not at hand
    before = trainer.answers(shown)
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.answers(shown)
    save(trainer, options)
    if shown and trainer.is_world_process_zero():
        print_answers(trainer, shown, before, after)


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
