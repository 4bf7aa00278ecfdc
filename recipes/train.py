"""Trains the small NaViL from scratch, stage by stage (`stages.py`).

    python -m recipes.train --runs runs                # every stage; run again to resume
    python -m recipes.train --runs runs --minutes 10   # stop after ten minutes, with a checkpoint
    python -m recipes.train --runs runs --smoke-test   # every stage with a tiny model and two steps

One process trains. Others draw and pack samples: one on a CPU, one per core on a GPU machine.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, set_seed

from navil.modeling_navil import NaViLForConditionalGeneration

from .curriculum import CURRICULUM_FILE, Curriculum, answer_scores
from .hardware import ONEDNN_CACHE, faster_attention, faster_dtype
from .labels import EMPTY, dense_accuracy, label_id, regression_errors
from .model import build_config, build_model, build_processor, build_tokenizer, load
from .optimizer import MuonWithAdamW
from .packing import PackedSamples, model_inputs
from .stages import STAGES, Stage, available_stages, copy_text_experts, set_trainable, shrink
from .tasks import ALL_TASKS

LOG_FILE = "log.jsonl"
WARMUP_STEPS = 100
UNLIMITED_STEPS = 10**6  # with --finish-in, time ends the stage
REGRESSION_WEIGHT = 0.5  # of each number's error, relative to the loss on labels


@dataclass
class TimedSchedule:
    """A learning rate that follows the time left instead of the number of steps."""

    minutes: float
    lr_decay: float  # share of the minutes, the last ones, over which the rate falls to 0
    start: float = field(default_factory=time.monotonic)

    @property
    def end(self) -> float:
        return self.start + 60 * self.minutes

    def rate(self, step: int) -> float:
        """Share of the full learning rate."""
        left = max(0.0, self.end - time.monotonic()) / (60 * self.minutes)
        return min(1.0, step / WARMUP_STEPS, left / self.lr_decay if self.lr_decay else 1.0)


class PackedTrainer(Trainer):
    """Trainer over `PackedSamples`: adds the auxiliary losses and reports scores to the curriculum.

    Args:
        curriculum: what answers are recorded in.
        dtype: of a step's arithmetic; weights, gradients and optimizer state stay float32.
        schedule: sets the learning rate by time; None: by steps.
    """

    def __init__(
        self, *args: Any, curriculum: Curriculum, dtype: torch.dtype, schedule: TimedSchedule | None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.curriculum = curriculum
        self.dtype = dtype
        self.schedule = schedule
        self.empty_id = label_id(EMPTY, self.processing_class.tokenizer)
        self.digit_ids = torch.tensor([label_id(digit, self.processing_class.tokenizer) for digit in "0123456789"])
        self.model_accepts_loss_kwargs = False  # a step is one packed batch: the mean over it is the loss

    def create_optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = MuonWithAdamW(self.model, self.args.learning_rate, self.args.weight_decay, self.dtype)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.schedule.rate)
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        # On a CPU training needs the cores; a GPU waits for samples unless all cores draw.
        on_gpu = not self.args.use_cpu
        num_workers = max(1, (os.cpu_count() or 1) - 1) if on_gpu else 1
        prefetch = 2 if on_gpu else 8  # batches per worker; a large one has 100 MB of patches
        settings = {"num_workers": num_workers, "prefetch_factor": prefetch, "pin_memory": on_gpu}
        return DataLoader(self.train_dataset, batch_size=None, **settings)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        tasks = inputs["task_index"]
        # One cast of all weights: autocast would keep the residual stream in float32 and cast around every layer.
        weights = {name: parameter.to(self.dtype) for name, parameter in model.named_parameters()}
        settings = model_inputs(inputs) | {"output_hidden_states": True}
        outputs = torch.func.functional_call(model, weights, kwargs=settings)
        middle = outputs.hidden_states[model.config.text_config.num_hidden_layers // 2]
        errors = regression_errors(middle, inputs["regression_targets"])
        with torch.no_grad():
            scores = answer_scores(outputs.logits, inputs["labels"], tasks, self.digit_ids.to(tasks.device))
            self.curriculum.record(tasks, scores)
            accuracy = dense_accuracy(outputs.logits, inputs["dense_labels"], self.empty_id)
            self.curriculum.record_auxiliary(accuracy, errors)
        loss = outputs.loss + REGRESSION_WEIGHT * errors.sum()
        return (loss, outputs) if return_outputs else loss


class Progress(TrainerCallback):
    """Logs losses and difficulties, saves the curriculum with every checkpoint, and stops at the deadline."""

    def __init__(self, curriculum: Curriculum, folder: Path, deadline: float | None):
        self.curriculum = curriculum
        self.folder = folder
        self.deadline = deadline

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        reached = self.curriculum
        row = {
            "step": state.global_step,
            "answers": reached.num_answers,
            **logs,
            "dense_accuracy": round(reached.dense_accuracy, 3),
            **{name: round(error, 4) for name, error in reached.regression_errors.items()},
            "tasks": {
                task: [round(float(difficulty), 3), round(score, 3)]
                for task, difficulty, score in zip(ALL_TASKS, reached.difficulty, reached.score, strict=True)
            },
        }
        with (self.folder / LOG_FILE).open("a") as log:
            log.write(json.dumps(row) + "\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.curriculum.save(self.folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def training_arguments(stage: Stage, folder: Path, save_steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(stage.lr_decay * stage.steps)},
        warmup_steps=WARMUP_STEPS,
        weight_decay=stage.weight_decay,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=min(20, stage.steps),
        save_steps=save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        ignore_data_skip=True,  # a resumed stream continues with new seeds
        report_to=[],
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones, which lack the file that is saved last, are removed."""
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not (checkpoint / CURRICULUM_FILE).is_file():
            shutil.rmtree(checkpoint)
    checkpoint = get_last_checkpoint(str(folder))
    return None if checkpoint is None else Path(checkpoint)


def prepare_model(model: NaViLForConditionalGeneration, name: str, is_new: bool, compiled: bool) -> None:
    """Lets a stage's parameters train; the first stage begins with copies of the text experts as visual experts."""
    if name == "s1.1" and is_new:
        copy_text_experts(model)
    set_trainable(model, name)
    if compiled:
        for layer in (*model.vision_model.blocks, *model.language_model.layers):
            layer.compile(dynamic=True)


def run_stage(
    name: str,
    stage: Stage,
    folder: Path,
    start: Path,
    save_steps: int = 250,
    compiled: bool = False,
    deadline: float | None = None,
    finish_in: float | None = None,
) -> bool:
    """Trains one stage; True when it is complete and `folder/final` is written.

    Args:
        start: model folder to start from, unless the stage has a checkpoint of its own.
        deadline: `time.monotonic()` at which to stop with a checkpoint.
        finish_in: minutes from now in which to complete the stage, instead of its number of steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = last_checkpoint(folder)
    source = checkpoint or start
    print(f"{name}: from {source}")
    schedule = None
    if finish_in is not None:
        schedule = TimedSchedule(finish_in, stage.lr_decay)
        deadline, stage = schedule.end, replace(stage, steps=UNLIMITED_STEPS)
    curriculum = Curriculum(is_fixed=bool(stage.crop_share))  # a crop is harder than its difficulty says
    if (source / CURRICULUM_FILE).is_file():  # an untrained model has none
        curriculum.load(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = faster_dtype(device)
    model, processor = load(source, attn_implementation=faster_attention(device, dtype))
    prepare_model(model, name, is_new=checkpoint is None, compiled=compiled)
    samples = PackedSamples(
        processor,
        torch.tensor([stage.mix.get(task, 0.0) for task in ALL_TASKS]),
        curriculum.difficulty,
        first_seed=curriculum.num_answers,
        rows=stage.rows,
        row_length=stage.row_length,
        patches_per_row=stage.patches_per_row,
        crop_share=stage.crop_share,
        dtype=dtype,
    )
    trainer = PackedTrainer(
        model=model,
        args=training_arguments(stage, folder, save_steps),
        train_dataset=samples,
        processing_class=processor,
        curriculum=curriculum,
        dtype=dtype,
        schedule=schedule,
        callbacks=[Progress(curriculum, folder, deadline)],
    )
    steps_done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if steps_done < stage.steps:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        steps_done = trainer.state.global_step
    is_complete = steps_done >= stage.steps or schedule is not None
    if is_complete:
        if stage.start_weight:
            average_weights(model, start, stage.start_weight)
        save_final(trainer, curriculum, folder)
    return is_complete


def average_weights(model: nn.Module, folder: Path, weight: float) -> None:
    """Interpolates all parameters with the folder's, which get this weight (Wortsman et al. 2022, arXiv 2109.01903)."""
    others = dict(load(folder)[0].named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.lerp_(others[name].to(parameter.device), weight)


def save_final(trainer: Trainer, curriculum: Curriculum, folder: Path) -> None:
    """Writes `final` atomically, by renaming a complete folder."""
    building = folder / "building"
    trainer.save_model(str(building))
    curriculum.save(building)
    shutil.rmtree(folder / "final", ignore_errors=True)
    building.rename(folder / "final")


def build_start(folder: Path, **size: int) -> Path:
    """An untrained model with its processor; `size` as in `build_config`."""
    start = folder / "start"
    if not start.is_dir():
        set_seed(0)
        tokenizer = build_tokenizer()
        model = build_model(build_config(tokenizer, **size))
        building = folder / "start-building"
        model.save_pretrained(building)
        build_processor(tokenizer, model.config).save_pretrained(building)
        building.rename(start)
    return start


SMOKE_TEST_SIZE = {"width": 128, "num_layers": 2}


def build_parser() -> argparse.ArgumentParser:
    names = list(available_stages())
    parser = argparse.ArgumentParser(
        description=f"Train the small NaViL: {', '.join(names)}. Run again to resume.",
        epilog="example: python -m recipes.train --runs runs --minutes 10 --steps s2=20000",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of checkpoints and logs (%(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after this time, with a checkpoint")
    parser.add_argument(
        "--steps",
        action="append",
        default=[],
        metavar="STAGE=N",
        help="length of a stage, in steps; repeatable (" + ", ".join(f"{n}={s.steps}" for n, s in STAGES.items()) + ")",
    )
    parser.add_argument("--save-steps", type=int, default=250, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the layers; needs a C++ compiler")
    parser.add_argument(
        "--finish-in",
        type=float,
        metavar="MINUTES",
        help="complete the last stage in this time; its learning rate follows the time left",
    )
    parser.add_argument("--init", type=Path, metavar="DIR", help="train one stage only, from a published model folder")
    parser.add_argument("--stage", choices=names, help=f"the stage that --init trains ({names[-1]})")
    parser.add_argument(
        "--smoke-test",
        action="store_true",
        help="two steps of small batches per stage with a model of two layers, in RUNS/smoke-test",
    )
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for options that exclude each other or a time that is not positive."""
    if options.finish_in is not None and not options.finish_in > 0:
        raise ValueError(f"--finish-in must be more than 0 minutes, got {options.finish_in}")
    if options.finish_in is not None and options.minutes is not None:
        raise ValueError("--finish-in and --minutes both set when to stop: give one of them")
    if options.stage is not None and options.init is None:
        raise ValueError(f"--stage {options.stage} needs --init, the model folder to start from")


def stages_to_run(options: argparse.Namespace) -> dict[str, Stage]:
    """The stages in their order, with the lengths of --steps; with --init one of them.

    Raises:
        ValueError: --steps that is not a stage and a number.
    """
    stages = available_stages()
    if options.init is not None:
        name = options.stage or list(stages)[-1]
        stages = {name: stages[name]}
    if options.smoke_test:
        stages = {name: shrink(stage) for name, stage in stages.items()}
    for override in options.steps:
        name, _, steps = override.partition("=")
        if name not in STAGES or not steps.isdigit():
            raise ValueError(f"--steps must be STAGE=N with a stage of {list(STAGES)}, got {override!r}")
        if name in stages:
            stages[name] = replace(stages[name], steps=int(steps))
    return stages


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    check_options(options)
    os.environ.setdefault(*ONEDNN_CACHE)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes that draw are forked
    stages = stages_to_run(options)
    last = list(stages)[-1]
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    runs = options.runs / "smoke-test" if options.smoke_test else options.runs
    if options.init is not None and (runs / last / "final").is_dir():
        raise ValueError(f"{runs / last} is already trained: choose another --runs to start from {options.init}")
    runs.mkdir(parents=True, exist_ok=True)
    start = options.init or build_start(runs, **(SMOKE_TEST_SIZE if options.smoke_test else {}))
    for name, stage in stages.items():
        folder = runs / name
        finish_in = options.finish_in if name == last else None
        if not (folder / "final").is_dir() and not run_stage(
            name, stage, folder, start, options.save_steps, options.compile, deadline, finish_in
        ):
            print(f"stopped in {name}; run again to resume")
            return 0
        start = folder / "final"
    print(f"trained: {start}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
