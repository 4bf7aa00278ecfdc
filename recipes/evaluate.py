"""Scores a model on the held-out set, beside baselines that do not see.

    python -m recipes.evaluate tiny --output runs/evaluation

Exact match for answers (case and outer blanks aside; chart values that are not written on top within 2), IoU of at
least 0.5 for boxes. `majority` always gives a task's
most frequent answer; `blind` is the same model given blank images of the same sizes; `one scale` is the model without
multi-scale packing.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from .blueprint import load
from .cells import seen_scales
from .data import messages
from .drawing import Picture
from .tasks import TASKS, Sample, is_correct, make_sample

SIZE_GROUPS = {
    "small (up to 256 x 256)": lambda width, height: width * height <= 256 * 256,
    "large (over 512 x 512)": lambda width, height: width * height > 512 * 512,
    "extreme aspect (over 2.5 : 1)": lambda width, height: max(width, height) > 2.5 * min(width, height),
}


def held_out(task: str, count: int, difficulty: float = 1.0) -> list[Sample]:
    return [make_sample(task, seed, difficulty, split="heldout") for seed in range(count)]


def blanked(sample: Sample) -> Sample:
    return replace(sample, pictures=[Picture(Image.new("RGB", image.size, "white")) for image in sample.images])


@torch.no_grad()
def answer_batch(
    model: Any, processor: Any, conversations: list[tuple[list, list]], **image_settings: Any
) -> list[str]:
    """Answers to the last question of each (turns so far, images); turns are (question, answer or None)."""
    inputs = processor.apply_chat_template(
        [messages(turns, images) for turns, images in conversations],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        padding=True,
        return_tensors="pt",
        **image_settings,
    ).to(model.device)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    new_ids = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new_ids, skip_special_tokens=True)]


def answer_all(
    model: Any, processor: Any, samples: Sequence[Sample], title: str, **image_settings: Any
) -> list[list[str]]:
    """Every turn's answer of every sample, a later turn after the model's own earlier answers."""
    answers: list[list[str]] = [[] for _ in samples]
    # Batches of like-sized pictures waste little on padding.
    order = sorted(range(len(samples)), key=lambda i: sum(x.width * x.height for x in samples[i].images))
    progress = tqdm(total=sum(len(sample.turns) for sample in samples), desc=title, disable=None)
    for turn in range(max(len(sample.turns) for sample in samples)):
        pending = [i for i in order if len(samples[i].turns) > turn]
        for start in range(0, len(pending), 8):
            batch = pending[start : start + 8]
            conversations = []
            for i in batch:
                questions = [question for question, _ in samples[i].turns[: turn + 1]]
                turns = list(zip(questions, [*answers[i], None], strict=True))
                conversations.append((turns, samples[i].images))
            for i, answer in zip(batch, answer_batch(model, processor, conversations, **image_settings), strict=True):
                answers[i].append(answer)
            progress.update(len(batch))
    progress.close()
    return answers


def one_scale_answers(
    model: Any, processor: Any, samples: Sequence[Sample], answers: Sequence[list[str]], title: str
) -> list[list[str]]:
    """Answers without multi-scale packing; given anew only where a picture of the sample has several scales with it."""
    changed = [
        index
        for index, sample in enumerate(samples)
        if any(len(seen_scales(picture, processor, as_is=False)[0]) > 1 for picture in sample.pictures)
    ]
    others = list(answers)
    if changed:
        again = answer_all(model, processor, [samples[i] for i in changed], f"{title}, one scale", multi_scale=False)
        for index, answer in zip(changed, again, strict=True):
            others[index] = answer
    return others


def marks(samples: Sequence[Sample], answers: Sequence[Sequence[str]]) -> list[tuple[Sample, bool]]:
    return [
        (sample, is_correct(sample, turn, answer))
        for sample, given in zip(samples, answers, strict=True)
        for turn, answer in enumerate(given)
    ]


def accuracy(marked: Sequence[tuple[Sample, bool]]) -> float | None:
    return sum(right for _, right in marked) / len(marked) if marked else None


def majority(samples: Sequence[Sample]) -> float:
    counts = Counter(answer.lower() for sample in samples for _, answer in sample.turns)
    [(answer, _)] = counts.most_common(1)
    return accuracy(marks(samples, [[answer] * len(sample.turns) for sample in samples]))


def evaluate(
    model: Any,
    processor: Any,
    count: int,
    tasks: Sequence[str] = TASKS,
    difficulty: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Any]:
    """Table rows by task: `score`, `majority`, `blind`, `one scale`, and sizes apart; on the GPU if there is one.

    `difficulty` makes tasks easier than the full distribution, for a model that is still in training.
    """
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {}
    for task in tasks:
        samples = held_out(task, count, difficulty.get(task, 1.0))
        answers = answer_all(model, processor, samples, task)
        marked = marks(samples, answers)
        row: dict[str, Any] = {"questions": len(marked), "score": accuracy(marked), "majority": majority(samples)}
        if samples[0].images:
            blind = [blanked(sample) for sample in samples]
            row["blind"] = accuracy(marks(blind, answer_all(model, processor, blind, f"{task}, blind")))
            row["one scale"] = accuracy(marks(samples, one_scale_answers(model, processor, samples, answers, task)))
            for group, belongs in SIZE_GROUPS.items():
                inside = [(s, right) for s, right in marked if all(belongs(*image.size) for image in s.images)]
                row[group] = accuracy(inside)
        report[task] = row
    return report


def as_markdown(report: dict[str, Any]) -> str:
    columns = ["questions", "score", "majority", "blind", "one scale", *SIZE_GROUPS]
    lines = ["| task | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for task, row in report.items():
        cells = [
            "-" if row.get(name) is None else str(row[name]) if name == "questions" else f"{100 * row[name]:.1f} %"
            for name in columns
        ]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Score a model on the recipe's held-out set.",
        epilog="example: python -m recipes.evaluate tiny --count 300 --output runs/evaluation",
    )
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--count", type=int, default=300, help="samples per task (%(default)s)")
    parser.add_argument("--task", action="append", choices=TASKS, help="one task only; repeatable")
    parser.add_argument("--dials", type=Path, metavar="FILE", help="a dials.json: score at its difficulty, not in full")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md too")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    difficulty = json.loads(options.dials.read_text())["difficulty"] if options.dials else {}
    model, processor = load(options.model)
    report = evaluate(model, processor, options.count, options.task or TASKS, difficulty)
    table = as_markdown(report)
    print(table)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{options.output}.json").write_text(json.dumps(report, indent=2) + "\n")
        Path(f"{options.output}.md").write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
