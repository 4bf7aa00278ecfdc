"""Scores a model on the held-out set, next to baselines.

    python -m recipes.evaluate tiny --output runs/evaluation

Answers count by exact match but for case; chart values without labels may differ by 2; boxes need an IoU of at least
0.5. Baselines: `majority` always gives a task's most frequent answer, `blind` is the same model on blank images of the
same sizes, `one scale` is the model without multi-scale packing.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from navil.modeling_navil import NaViLForConditionalGeneration
from navil.processing_navil import NaViLProcessor

from .curriculum import read_difficulty
from .drawing import Picture
from .labels import planned_scales
from .model import MAX_NEW_TOKENS, load
from .packing import messages
from .questions import is_correct
from .tasks import TASKS, Sample, make_sample

BATCH_SIZE = 8
SIZE_GROUPS: dict[str, Callable[[int, int], bool]] = {
    "small (up to 256 x 256)": lambda width, height: width * height <= 256 * 256,
    "large (over 512 x 512)": lambda width, height: width * height > 512 * 512,
    "extreme aspect (over 2.5 : 1)": lambda width, height: max(width, height) > 2.5 * min(width, height),
}
"""Scores of these pictures have columns of their own."""

NO_DIFFICULTY: Mapping[str, float] = MappingProxyType({})


def held_out(task: str, count: int, difficulty: float = 1.0) -> list[Sample]:
    return [make_sample(task, seed, difficulty, split="heldout") for seed in range(count)]


def with_blank_images(sample: Sample) -> Sample:
    return replace(sample, pictures=[Picture(Image.new("RGB", image.size, "white")) for image in sample.images])


@torch.no_grad()
def answer_batch(
    model: NaViLForConditionalGeneration,
    processor: NaViLProcessor,
    conversations: list[tuple[list, list]],
    **image_settings: Any,
) -> list[str]:
    """Answers to the last question of each conversation, (turns, images) as `packing.messages` takes them."""
    inputs = processor.apply_chat_template(
        [messages(turns, images) for turns, images in conversations],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        padding=True,
        return_tensors="pt",
        **image_settings,
    ).to(model.device)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    new_ids = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new_ids, skip_special_tokens=True)]


def answer_all(
    model: NaViLForConditionalGeneration,
    processor: NaViLProcessor,
    samples: Sequence[Sample],
    title: str,
    **image_settings: Any,
) -> list[list[str]]:
    """Answers to all turns of all samples; a later turn follows the model's own earlier answers."""
    answers: list[list[str]] = [[] for _ in samples]
    # Sorted by size: batches of similar pictures need little padding.
    order = sorted(range(len(samples)), key=lambda i: sum(x.width * x.height for x in samples[i].images))
    progress = tqdm(total=sum(len(sample.turns) for sample in samples), desc=title, disable=None)
    for turn in range(max(len(sample.turns) for sample in samples)):
        pending = [i for i in order if len(samples[i].turns) > turn]
        for start in range(0, len(pending), BATCH_SIZE):
            batch = pending[start : start + BATCH_SIZE]
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
    model: NaViLForConditionalGeneration,
    processor: NaViLProcessor,
    samples: Sequence[Sample],
    answers: Sequence[list[str]],
    title: str,
) -> list[list[str]]:
    """Answers without multi-scale packing; samples whose pictures all have one scale keep their `answers`."""
    changed = [
        index
        for index, sample in enumerate(samples)
        if any(len(planned_scales(picture, processor)) > 1 for picture in sample.pictures)
    ]
    result = list(answers)
    if changed:
        again = answer_all(model, processor, [samples[i] for i in changed], f"{title}, one scale", multi_scale=False)
        for index, answer in zip(changed, again, strict=True):
            result[index] = answer
    return result


def grade(samples: Sequence[Sample], answers: Sequence[Sequence[str]]) -> list[tuple[Sample, bool]]:
    """Each answer's sample, and whether the answer is right."""
    return [
        (sample, is_correct(answer, sample.turns[turn][1], sample.accepted[turn]))
        for sample, given in zip(samples, answers, strict=True)
        for turn, answer in enumerate(given)
    ]


def accuracy(grades: Sequence[tuple[Sample, bool]]) -> float | None:
    return sum(right for _, right in grades) / len(grades) if grades else None


def majority(samples: Sequence[Sample]) -> float:
    """Accuracy of the most frequent answer."""
    counts = Counter(answer.lower() for sample in samples for _, answer in sample.turns)
    [(answer, _)] = counts.most_common(1)
    return accuracy(grade(samples, [[answer] * len(sample.turns) for sample in samples]))


def evaluate(
    model: NaViLForConditionalGeneration,
    processor: NaViLProcessor,
    count: int,
    tasks: Sequence[str] = TASKS,
    difficulty: Mapping[str, float] = NO_DIFFICULTY,
) -> dict[str, dict[str, float | None]]:
    """Rows of the table by task: `questions`, `score`, the baselines and SIZE_GROUPS. Uses the GPU if there is one.

    Args:
        count: held-out samples per task.
        difficulty: of tasks that are not scored at full difficulty.
    """
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    report = {}
    for task in tasks:
        samples = held_out(task, count, difficulty.get(task, 1.0))
        answers = answer_all(model, processor, samples, task)
        grades = grade(samples, answers)
        row = {"questions": len(grades), "score": accuracy(grades), "majority": majority(samples)}
        if samples[0].images:
            blind = [with_blank_images(sample) for sample in samples]
            row["blind"] = accuracy(grade(blind, answer_all(model, processor, blind, f"{task}, blind")))
            row["one scale"] = accuracy(grade(samples, one_scale_answers(model, processor, samples, answers, task)))
            for group, belongs in SIZE_GROUPS.items():
                inside = [(s, right) for s, right in grades if all(belongs(*image.size) for image in s.images)]
                row[group] = accuracy(inside)
        report[task] = row
    return report


def as_markdown(report: Mapping[str, Mapping[str, float | None]]) -> str:
    columns = ["questions", "score", "majority", "blind", "one scale", *SIZE_GROUPS]
    lines = ["| task | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for task, row in report.items():
        entries = [
            "-" if row.get(name) is None else str(row[name]) if name == "questions" else f"{100 * row[name]:.1f} %"
            for name in columns
        ]
        lines.append(f"| {task} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Score a model on the recipe's held-out set.",
        epilog="example: python -m recipes.evaluate tiny --count 300 --output runs/evaluation",
    )
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--count", type=int, default=300, help="samples per task (%(default)s)")
    parser.add_argument("--task", action="append", choices=TASKS, help="one task only; repeatable")
    parser.add_argument(
        "--curriculum", type=Path, metavar="FILE", help="a curriculum.json: score at its difficulty, not in full"
    )
    parser.add_argument("--output", type=Path, help="also write OUTPUT.json and OUTPUT.md")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    difficulty = read_difficulty(options.curriculum) if options.curriculum else {}
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
