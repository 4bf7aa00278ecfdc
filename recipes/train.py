"""Trains the small NaViL by the paper's stages (paper, section 4.2; reference §8), from nothing but this repository.

    python -m recipes.train --runs runs                # every stage, resumed where an earlier call stopped
    python -m recipes.train --runs runs --minutes 10   # one piece of it

Each task has a difficulty dial that the model's own progress opens: pictures start tiny and uniform and widen to the
full distribution. One process trains; others draw and pack samples, one beside a CPU, one per core beside a GPU.
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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils import benchmark
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, set_seed

from navil import modeling_navil as modeling

from .blueprint import build_model, build_processor, build_tokenizer, load, question_words
from .cells import EMPTY, NUMBER_GROUPS, number_errors, token_of
from .data import ALL_TASKS, TEXT_PRETRAINING, PackedSamples, answer_index
from .optimizer import MuonWithAdamW
from .tasks import DESCRIBE, PAGE

DIALS_FILE = "dials.json"
LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class Stage:
    """One stage: on which mix of tasks, how long and how fast."""

    mix: dict[str, float]
    steps: int
    learning_rate: float
    weight_decay: float
    decay: float = 0.0  # share of the steps, the last ones, over which the learning rate falls to 0
    close_ups: dict[str, float] = field(default_factory=dict)  # share of each task's pictures that come so
    start_share: float = 0.0  # of the weights it started from, in those it ends with
    rows: int = 4  # of a batch
    needs_gpu: bool = False


PICTURES = {"text": 0.32, "receipt": 0.2, "chart": 0.14, "scene": 0.1, "grounding": 0.26}
PICTURES |= {"two_images": 0.14, "two_turns": 0.08, DESCRIBE: 0.06, PAGE: 0.22}
WITH_TEXT = PICTURES | {"text_only": 0.14, TEXT_PRETRAINING: 0.05}
# A text as a close-up costs a third or less of what other pictures cost, and what it teaches is what most of them lack.
CLOSE_UPS = {"text": 0.55, "receipt": 0.11, "chart": 0.04, "scene": 0.035, "grounding": 0.13, "two_images": 0.05}
CLOSE_UPS |= {"two_turns": 0.01, DESCRIBE: 0.005, PAGE: 0.02, "text_only": 0.04, TEXT_PRETRAINING: 0.01}
MOSTLY_CLOSE = dict.fromkeys(ALL_TASKS, 0.8) | {"text": 0.93, "grounding": 0.55}
# On a GPU it is the cores that draw that count, and to them a whole picture costs twice what a close-up does.
LARGE = {"text": 0.36, "receipt": 0.14, "chart": 0.1, "scene": 0.06, "grounding": 0.16, "two_images": 0.07}
LARGE |= {"two_turns": 0.02, DESCRIBE: 0.01, PAGE: 0.03, "text_only": 0.04, TEXT_PRETRAINING: 0.01}
HALF_CLOSE = dict.fromkeys(ALL_TASKS, 0.5) | {"text": 0.7}
# What a model that reads texts lacks most: comparisons, counts, prices of goods that it has no token for.
PAIRS = {"text": 0.27, "receipt": 0.24, "chart": 0.03, "scene": 0.12, "grounding": 0.05, "two_images": 0.22}
PAIRS |= {"two_turns": 0.03, DESCRIBE: 0.005, PAGE: 0.005, "text_only": 0.025, TEXT_PRETRAINING: 0.005}

STAGES = {
    # The base LLM: formats, arithmetic and copying, from text alone.
    "text": Stage({TEXT_PRETRAINING: 0.5, "text_only": 0.5}, 3000, 1e-3, 0.05),
    "s1.1": Stage(PICTURES, 1000, 1e-3, 0.05),
    "s1.2": Stage(WITH_TEXT, 500, 1e-3, 0.1),
    "s2": Stage(WITH_TEXT, 60000, 7e-4, 0.01, decay=0.3),
    "s2.close": Stage(CLOSE_UPS, 10000, 7e-4, 0.01, decay=0.5, close_ups=MOSTLY_CLOSE, start_share=0.5),
    "s2.large": Stage(
        LARGE, 1500, 1.5e-3, 0.01, decay=0.5, close_ups=HALF_CLOSE, start_share=0.25, rows=64, needs_gpu=True
    ),
    # Batches of 4 rows at a higher rate would bring back the noise that those of 64 took out.
    "s2.pairs": Stage(PAIRS, 1200, 1.5e-4, 0.01, decay=0.7, close_ups=MOSTLY_CLOSE, start_share=0.25),
}
WARMUP_STEPS = 100
NO_END = 10**6  # steps, where the clock ends a stage
NUMBER_ERROR_WEIGHT = 0.5  # of each, against the loss on labels; of sides alone the gradient is then as large as theirs

# A dial opens when the running score of its task is at least this, and closes when it is far below. The score is the
# share of answers that are right as a whole; of long answers it is the share of tokens, and of boxes that of the first
# digits of their four numbers, which place a side within a tenth of the picture. Unlabelled chart values are estimates;
# half of the answers about shapes can be guessed.
BY_TOKEN = ("grounding", DESCRIBE)
OPEN_AT = dict.fromkeys(ALL_TASKS, 0.5) | {"grounding": 0.55, DESCRIBE: 0.65, "chart": 0.45, "text_only": 0.85}
OPEN_AT |= dict.fromkeys(("scene", "two_images", "two_turns"), 0.7)


def closed_dials() -> Tensor:
    """(tasks,) zeros; a task without questions has no score to open its dial, and is whole from the start."""
    return torch.tensor([float(task == PAGE) for task in ALL_TASKS])


@dataclass
class Dials:
    """Difficulty of each task, opened step by step as the model gets its samples right, and closed as it fails.

    Where they are not `moving`, they stay as they are, and only scores are kept.
    """

    difficulty: Tensor = field(default_factory=lambda: closed_dials().share_memory_())
    score: list[float] = field(default_factory=lambda: [0.0] * len(ALL_TASKS))
    since_change: list[int] = field(default_factory=lambda: [0] * len(ALL_TASKS))
    num_answers: int = 0
    cell_score: float = 0.0  # running share of the cells with something in them whose label is the most likely token
    number_errors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NUMBER_GROUPS, 0.0))  # running means
    moving: bool = True

    SMOOTHING = 0.02
    STEP = 0.01
    ANSWERS_PER_STEP = 48
    CLOSE_BELOW = 0.2  # under the score that opens: the noise of a running score is a quarter of this

    def record(self, tasks: Tensor, scores: Tensor) -> None:
        """Counts one answer each."""
        for task, score in zip(tasks.tolist(), scores.tolist(), strict=True):
            self.num_answers += 1
            self.score[task] += self.SMOOTHING * (score - self.score[task])
            self.since_change[task] += 1
            if not self.moving or self.since_change[task] < self.ANSWERS_PER_STEP:
                continue
            opens_at, difficulty = OPEN_AT[ALL_TASKS[task]], float(self.difficulty[task])
            if self.score[task] >= opens_at:
                changed = min(1.0, round(difficulty + self.STEP, 4))  # float32 would drift
            elif self.score[task] < opens_at - self.CLOSE_BELOW:
                changed = max(0.0, round(difficulty - self.STEP, 4))
            else:
                continue
            self.difficulty[task], self.since_change[task] = changed, 0

    def record_cells(self, share: float, errors: Tensor) -> None:
        """Counts one batch."""
        self.cell_score += self.SMOOTHING * (share - self.cell_score)
        for name, group in zip(NUMBER_GROUPS, errors.split([*NUMBER_GROUPS.values()]), strict=True):
            if group.any():  # else no cell of the batch was asked for it
                self.number_errors[name] += self.SMOOTHING * (float(group.mean()) - self.number_errors[name])

    def save(self, folder: Path) -> None:
        """Writes the file whole or not at all: a checkpoint that has it is complete."""
        state = {
            "num_answers": self.num_answers,
            "difficulty": dict(zip(ALL_TASKS, self.difficulty.tolist(), strict=True)),
            "score": dict(zip(ALL_TASKS, self.score, strict=True)),
            "cell_score": self.cell_score,
            "number_errors": self.number_errors,
        }
        part = folder / f"{DIALS_FILE}.part"
        part.write_text(json.dumps(state, indent=2) + "\n")
        part.replace(folder / DIALS_FILE)

    def load(self, folder: Path) -> None:
        state = json.loads((folder / DIALS_FILE).read_text())
        self.num_answers = state["num_answers"]
        self.cell_score = state.get("cell_score", 0.0)
        self.number_errors |= state.get("number_errors", {})
        for index, task in enumerate(ALL_TASKS):
            if task in state["difficulty"]:  # else a task that the saved run did not have
                self.difficulty[index], self.score[index] = state["difficulty"][task], state["score"][task]


def answer_scores(logits: Tensor, labels: Tensor, tasks: Tensor, digit_ids: Tensor) -> Tensor:
    """(answers,) 1 where every label is the most likely token; for `BY_TOKEN` tasks the share of such labels, of boxes
    among the first digits of their numbers."""
    labels = labels[:, 1:]
    answer = answer_index(labels)
    task = F.pad(tasks, (0, 1), value=-1)[answer]  # -1 where there is no answer
    is_digit = torch.isin(labels, digit_ids)
    begins_number = is_digit & ~F.pad(is_digit[:, :-1], (1, 0))
    counted = (task >= 0) & (begins_number | (task != ALL_TASKS.index("grounding")))
    right = (logits[:, :-1].argmax(-1) == labels)[counted].float()
    total, hits = torch.zeros(2, len(tasks), device=right.device)
    share = hits.index_add(0, answer[counted], right) / total.index_add(0, answer[counted], torch.ones_like(right))
    by_token = torch.isin(tasks, torch.tensor([ALL_TASKS.index(task) for task in BY_TOKEN], device=tasks.device))
    return torch.where(by_token, share, (share == 1).float())


def cell_score(logits: Tensor, labels: Tensor, empty_id: int) -> float:
    """Share of the cells with something in them whose label is the most likely token; 0 without such cells."""
    labels = labels[:, 1:]
    is_marked = (labels >= 0) & (labels != empty_id)
    right = logits[:, :-1].argmax(-1) == labels
    return float((right & is_marked).sum() / is_marked.sum().clamp(min=1))


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    """What the model takes of a packed batch, the labels of answers and of cells in one."""
    inputs = {name: x for name, x in batch.items() if name not in ("task_index", "cell_labels", "cell_numbers")}
    labels = torch.where(batch["cell_labels"] < 0, batch["labels"], batch["cell_labels"])
    return inputs | {"labels": labels, "use_cache": False}


@dataclass
class Clock:
    """A learning rate that falls by the clock, where the hours are known and not how many steps they hold."""

    minutes: float
    decay: float  # share of the minutes, the last ones, over which the rate falls to 0
    start: float = field(default_factory=time.monotonic)

    @property
    def end(self) -> float:
        return self.start + 60 * self.minutes

    def share_of_rate(self, step: int) -> float:
        left = max(0.0, self.end - time.monotonic()) / (60 * self.minutes)
        return min(1.0, step / WARMUP_STEPS, left / self.decay if self.decay else 1.0)


class PackedTrainer(Trainer):
    """Trainer over `PackedSamples`, which come as whole batches and tell their tasks' progress to the dials."""

    def __init__(self, *args: Any, dials: Dials, dtype: torch.dtype, clock: Clock | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.dials = dials
        self.dtype = dtype  # of a step's arithmetic; weights, gradients and optimizer stay float32
        self.clock = clock  # that sets the learning rate, instead of the number of steps
        self.empty_id = token_of(EMPTY, self.processing_class.tokenizer)
        self.digit_ids = torch.tensor([token_of(digit, self.processing_class.tokenizer) for digit in "0123456789"])
        self.model_accepts_loss_kwargs = False  # one packed batch per step: its own mean is the loss

    def create_optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = MuonWithAdamW(self.model, self.args.learning_rate, self.args.weight_decay, self.dtype)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.clock is None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.clock.share_of_rate)
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        # On a CPU training itself needs the cores; a GPU waits for samples unless all of them draw.
        on_gpu = not self.args.use_cpu
        num_workers = max(1, (os.cpu_count() or 1) - 1) if on_gpu else 1
        ahead = 2 if on_gpu else 8  # batches that a process draws beforehand: a large one has 100 MB of patches
        settings = {"num_workers": num_workers, "prefetch_factor": ahead, "pin_memory": on_gpu}
        return DataLoader(self.train_dataset, batch_size=None, **settings)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        tasks, answers, cells = (inputs[name] for name in ("task_index", "labels", "cell_labels"))
        # Autocast keeps the residual stream in float32 and casts around every layer; one cast of the weights does not.
        weights = {name: parameter.to(self.dtype) for name, parameter in model.named_parameters()}
        settings = model_inputs(inputs) | {"output_hidden_states": True}
        outputs = torch.func.functional_call(model, weights, kwargs=settings)
        half_way = outputs.hidden_states[model.config.text_config.num_hidden_layers // 2]
        errors = number_errors(half_way, inputs["cell_numbers"])
        with torch.no_grad():
            digit_ids = self.digit_ids.to(tasks.device)
            self.dials.record(tasks, answer_scores(outputs.logits, answers, tasks, digit_ids))
            self.dials.record_cells(cell_score(outputs.logits, cells, self.empty_id), errors)
        loss = outputs.loss + NUMBER_ERROR_WEIGHT * errors.sum()
        return (loss, outputs) if return_outputs else loss


class Progress(TrainerCallback):
    """Logs losses and dials, saves the dials with every checkpoint, and ends a piece when its minutes are over."""

    def __init__(self, dials: Dials, folder: Path, deadline: float | None):
        self.dials = dials
        self.folder = folder
        self.deadline = deadline

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            tasks = {
                task: [round(float(difficulty), 3), round(score, 3)]
                for task, difficulty, score in zip(ALL_TASKS, self.dials.difficulty, self.dials.score, strict=True)
            }
            row = {
                "step": state.global_step,
                "answers": self.dials.num_answers,
                **logs,
                "cells": round(self.dials.cell_score, 3),
                **{name: round(error, 4) for name, error in self.dials.number_errors.items()},
                "tasks": tasks,
            }
            with (self.folder / LOG_FILE).open("a") as log:
                log.write(json.dumps(row) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.dials.save(self.folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def copy_text_experts(model: nn.Module) -> None:
    """Visual experts start as copies of the text experts (the paper's LLM initialization)."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".visual." in name:
                parameter.copy_(parameters[name.replace(".visual.", ".text.")])


def choose_trained(model: nn.Module, stage: str) -> None:
    """Lets a stage's parameters train; the text experts and the embeddings alone in the stage before the paper's."""
    if stage != "text":
        model.set_training_stage("s2" if stage.startswith("s2.") else stage)
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("model.language_model.", "lm_head.")) and ".visual." not in name)


def faster_dtype(device: str) -> torch.dtype:
    """Of bf16 and float32, whose matrix products are faster here; many CPUs do float32's a hundred times as fast."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        timer = benchmark.Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
        seconds[dtype] = timer.timeit(5).median
    return min(seconds, key=seconds.get)


def training_arguments(stage: Stage, folder: Path, steps: int, save_steps: int) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(stage.decay * steps)},
        warmup_steps=WARMUP_STEPS,
        weight_decay=stage.weight_decay,
        use_cpu=not on_gpu,
        logging_steps=min(20, steps),
        save_steps=save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        ignore_data_skip=True,  # a resumed stream starts at fresh seeds instead of drawing the old ones again
        report_to=[],
    )


# On a CPU with bf16 units the backward pass of torch's fused attention takes several times as long as plain matrix
# products, and oneDNN takes milliseconds to prepare a product of a shape that it has not seen: so this attention works
# on runs of 2**n segments, whose shapes come again, and many prepared products are kept. In float32 the fused one wins.
PLAIN_ATTENTION = "plain"
ONEDNN_CAPACITY = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "5000")


@torch.compiler.disable
def segment_attention_plain(
    query: Tensor, key: Tensor, value: Tensor, segments: modeling.Segments, scaling: float
) -> Tensor:
    """As `modeling.segment_attention_eager`, outside compiled graphs, which would be specialised to these lengths."""
    runs = [
        (1 << bit, length) for count, length in segments.runs for bit in range(count.bit_length()) if count >> bit & 1
    ]
    return modeling.segment_attention_eager(query, key, value, replace(segments, runs=runs), scaling)


ALL_ATTENTION_FUNCTIONS[PLAIN_ATTENTION] = torch.compiler.disable(modeling.decoder_attention_eager)
modeling.SEGMENT_ATTENTION_FUNCTIONS[PLAIN_ATTENTION] = segment_attention_plain


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint; one whose saving was cut off, which ends with the dials, is removed."""
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not (checkpoint / DIALS_FILE).is_file():
            shutil.rmtree(checkpoint)
    checkpoint = get_last_checkpoint(str(folder))
    return None if checkpoint is None else Path(checkpoint)


def run_stage(
    name: str,
    folder: Path,
    start: Path,
    steps: int,
    deadline: float | None,
    save_steps: int,
    compiled: bool = False,
    finish_in: float | None = None,
) -> bool:
    """Trains one stage from the model folder `start`, or from the stage's own last checkpoint; True when complete.

    With `finish_in` it is complete after so many minutes from now, in however many steps.
    """
    stage = STAGES[name]
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = last_checkpoint(folder)
    source = checkpoint or start
    print(f"{name}: from {source}")
    dials = Dials(moving=not stage.close_ups)  # a close-up is harder than its dial tells
    if (source / DIALS_FILE).is_file():  # an untrained model has none
        dials.load(source)
    on_gpu = torch.cuda.is_available()
    dtype = faster_dtype("cuda" if on_gpu else "cpu")
    is_plain_faster = not on_gpu and dtype == torch.bfloat16
    model, processor = load(source, attn_implementation=PLAIN_ATTENTION if is_plain_faster else "sdpa")
    if name == "s1.1" and checkpoint is None:
        copy_text_experts(model)
    choose_trained(model, name)
    if compiled:
        for layer in (*model.vision_model.blocks, *model.language_model.layers):
            layer.compile(dynamic=True)
    weights = torch.tensor([stage.mix.get(task, 0.0) for task in ALL_TASKS])
    clock = None
    if finish_in is not None:
        clock = Clock(finish_in, stage.decay)
        deadline, steps = clock.end, NO_END
    trainer = PackedTrainer(
        model=model,
        args=training_arguments(stage, folder, steps, save_steps),
        train_dataset=PackedSamples(
            processor,
            weights,
            dials.difficulty,
            first_seed=dials.num_answers,
            rows=stage.rows,
            close_ups=stage.close_ups,
            dtype=dtype,
        ),
        processing_class=processor,
        dials=dials,
        dtype=dtype,
        clock=clock,
        callbacks=[Progress(dials, folder, deadline)],
    )
    steps_done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if steps_done < steps:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        steps_done = trainer.state.global_step
    is_complete = steps_done >= steps or clock is not None
    if is_complete:
        if stage.start_share:
            mix_in(model, start, stage.start_share)
        finish(trainer, dials, folder)
    return is_complete


def mix_in(model: nn.Module, folder: Path, share: float) -> None:
    """Moves every weight by `share` of its way to the folder's (Wortsman et al. 2022, arXiv 2109.01903)."""
    others = dict(load(folder)[0].named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.lerp_(others[name].to(parameter.device), share)


def finish(trainer: Trainer, dials: Dials, folder: Path) -> None:
    """Writes `final` under another name first, so that it is whole whenever it is there."""
    building = folder / "building"
    trainer.save_model(str(building))
    dials.save(building)
    shutil.rmtree(folder / "final", ignore_errors=True)
    building.rename(folder / "final")


def build_start(folder: Path) -> Path:
    """An untrained model with its tokenizer."""
    start = folder / "start"
    if not start.is_dir():
        set_seed(0)
        tokenizer = build_tokenizer(question_words())
        model = build_model(tokenizer)
        building = folder / "start-building"
        model.save_pretrained(building)
        build_processor(tokenizer, model.config).save_pretrained(building)
        building.rename(start)
    return start


def stages_here() -> list[str]:
    """Names of the stages, in order; without those that need a GPU where there is none."""
    return [name for name, stage in STAGES.items() if torch.cuda.is_available() or not stage.needs_gpu]


def build_parser() -> argparse.ArgumentParser:
    names = stages_here()
    parser = argparse.ArgumentParser(
        description=f"Train the small NaViL: {', '.join(names)}. Run again to resume.",
        epilog="example: python -m recipes.train --runs runs --minutes 10 --steps s2=20000",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of checkpoints and logs (%(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes, with a checkpoint")
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
        "--finish-in", type=float, metavar="MINUTES", help="end the last stage by then, its rate falling by the clock"
    )
    parser.add_argument("--init", type=Path, metavar="DIR", help="train one stage alone, from a published model folder")
    parser.add_argument("--stage", choices=names, help=f"the one that --init trains ({names[-1]})")
    return parser


def stage_lengths(overrides: Sequence[str]) -> dict[str, int]:
    lengths = {name: stage.steps for name, stage in STAGES.items()}
    for override in overrides:
        name, _, steps = override.partition("=")
        if name not in STAGES or not steps.isdigit():
            raise ValueError(f"--steps takes STAGE=N with a stage of {list(STAGES)}, got {override!r}")
        lengths[name] = int(steps)
    return lengths


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    if options.finish_in is not None and not options.finish_in > 0:
        raise ValueError(f"--finish-in takes minutes, more than 0, got {options.finish_in}")
    if options.finish_in is not None and options.minutes is not None:
        raise ValueError("--finish-in and --minutes both tell when to stop: give one of them")
    if options.stage is not None and options.init is None:
        raise ValueError(f"--stage {options.stage} needs --init, the model folder that it starts from")
    os.environ.setdefault(*ONEDNN_CAPACITY)
    lengths = stage_lengths(options.steps)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    options.runs.mkdir(parents=True, exist_ok=True)
    stages = stages_here()
    if options.init is not None:
        stages = [options.stage or stages[-1]]
        if (options.runs / stages[0] / "final").is_dir():
            raise ValueError(
                f"{options.runs / stages[0]} is trained already: another --runs is needed to go on from {options.init}"
            )
    start = options.init or build_start(options.runs)
    for name in stages:
        folder = options.runs / name
        finish_in = options.finish_in if name == stages[-1] else None
        if not (folder / "final").is_dir() and not run_stage(
            name, folder, start, lengths[name], deadline, options.save_steps, options.compile, finish_in
        ):
            print(f"stopped in {name}; run again to resume")
            return 0
        start = folder / "final"
    print(f"trained: {start}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
