"""Draws small benchmarks with this repository's generator, in the formats of both kits.

    python -m navil_evaluation.drawn runs/drawn --count 24 --curriculum tiny/curriculum.json

OUT/NAME.tsv are VLMEvalKit's, under the names of the paper's benchmarks (SETS), for $LMUData=OUT;
OUT/drawn_chartqa.yaml is a task of lmms-eval, which scores the same charts, for --include_path OUT.
Run it from the root of the repository, where `recipes` is.
"""

import argparse
import base64
import csv
import io
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from . import make_torchvision_importable

make_torchvision_importable()  # transformers, which `recipes` needs, imports it

from recipes.curriculum import read_difficulty  # noqa: E402
from recipes.drawing import SHADES  # noqa: E402
from recipes.tasks import Sample, make_sample  # noqa: E402

LMMS_TASK = """\
include: {chartqa}
task: drawn_chartqa
dataset_path: parquet
dataset_name: null
dataset_kwargs:
  data_files:
    test: {data}
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: ""
"""


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------- rows of VLMEvalKit's sets
# One dictionary for each row: question, answer, and what the kit's scoring of that set reads besides.

Row = dict[str, str]


def plain(sample: Sample, number: int) -> list[Row]:
    [(question, answer)] = sample.turns
    return [{"question": question, "answer": answer}]


def list_of_one(sample: Sample, number: int) -> list[Row]:
    [(question, answer)] = sample.turns
    return [{"question": question, "answer": str([answer])}]


def ten_annotators(sample: Sample, number: int) -> list[Row]:
    [(question, answer)] = sample.turns
    return [{"question": question, "answer": str([answer] * 10)}]


def text_recognition(sample: Sample, number: int) -> list[Row]:
    return [row | {"category": "Regular Text Recognition"} for row in list_of_one(sample, number)]


def yes_and_no(sample: Sample, number: int) -> list[Row]:
    """Two questions about a picture, answered by yes or no."""
    extra = {"category": "existence", "image_path": f"{number}.png"}
    return [{"question": question, "answer": answer.capitalize(), **extra} for question, answer in sample.turns]


def choices(sample: Sample, number: int) -> list[Row]:
    """The answer among others of its kind, in a random order, as A, B, ..."""
    [(question, answer)] = sample.turns
    rng = random.Random(number)
    kind = next(words for words in KINDS_OF_ANSWERS if answer in words)
    options = [answer, *rng.sample([word for word in kind if word != answer], k=min(3, len(kind) - 1))]
    rng.shuffle(options)
    letters = "ABCD"[: len(options)]
    row = {"question": question, "answer": letters[options.index(answer)], "category": "drawn"}
    return [row | dict.fromkeys("ABCD", "") | dict(zip(letters, options, strict=True))]


def validation_choices(sample: Sample, number: int) -> list[Row]:
    return [row | {"split": "validation"} for row in choices(sample, number)]


def rotations(sample: Sample, number: int) -> list[Row]:
    """The options in every rotation; the kit finds the rows of a question by their index, 1,000,000 apart."""
    [row] = choices(sample, number)
    letters = [letter for letter in "ABCD" if row[letter]]
    turned = []
    for shift in range(len(letters)):
        options = {letter: row[letters[position - shift]] for position, letter in enumerate(letters)}
        answer = letters[(letters.index(row["answer"]) + shift) % len(letters)]
        turned.append(row | options | {"answer": answer, "index": str(number + 1_000_000 * shift)})
    return turned


def graded(sample: Sample, number: int) -> list[Row]:
    """For a judge; the kit's report needs questions of all six abilities."""
    return [row | {"category": ("rec,know,gen", "ocr,spat,math")[number % 2]} for row in plain(sample, number)]


def numbers(sample: Sample, number: int) -> list[Row]:
    [(question, answer)] = sample.turns
    kind = {"question_type": "free_form", "answer_type": "integer" if answer.isdigit() else "float"}
    rest = {"answer_option": "", "choices": "[]", "task": "drawn", "skills": "['arithmetic']"}
    return [{"question": question, "answer": answer, **kind, **rest}]


KINDS_OF_ANSWERS = (tuple(SHADES), ("yes", "no"), ("first", "second", "same"))


def has_words(sample: Sample) -> bool:
    return any(sample.turns[0][1] in words for words in KINDS_OF_ANSWERS)


def asks_yes_or_no(sample: Sample) -> bool:
    return all(answer in ("yes", "no") for _, answer in sample.turns)


def any_sample(sample: Sample) -> bool:
    return True


SETS: dict[str, tuple[str, Callable[[Sample], bool], Callable[[Sample, int], list[Row]]]] = {
    "MMVet": ("chart", any_sample, graded),
    "MMMU_DEV_VAL": ("two_images", has_words, validation_choices),
    "MMBench_DEV_EN": ("scene", has_words, rotations),
    "MME": ("two_turns", asks_yes_or_no, yes_and_no),
    "MathVista_MINI": ("receipt", any_sample, numbers),
    "OCRBench": ("text", any_sample, text_recognition),
    "TextVQA_VAL": ("text", any_sample, ten_annotators),
    "DocVQA_VAL": ("two_images", any_sample, plain),
    "AI2D_TEST": ("scene", has_words, choices),
    "ChartQA_TEST": ("chart", any_sample, plain),
    "InfoVQA_VAL": ("chart", any_sample, list_of_one),
    "CCBench": ("scene", has_words, rotations),
    "ScienceQA_TEST": ("scene", has_words, choices),
    "GQA_TestDev_Balanced": ("scene", any_sample, plain),
}
"""Of each data set: the task it is drawn from, which of its samples fit, and their rows.

Where the kit compares texts, no set has numbers alone: it reads its answers back by pandas, which would turn a column
of `24.40` into floats.
"""


def samples_of(
    task: str, count: int, difficulty: float, fits: Callable[[Sample], bool] = any_sample
) -> Iterator[Sample]:
    """The first `count` held-out samples that fit."""
    samples = (make_sample(task, seed, difficulty, split="heldout") for seed in itertools.count())
    return itertools.islice(filter(fits, samples), count)


def write_tsv(samples: Sequence[Sample], make_rows: Callable[[Sample, int], list[Row]], path: Path) -> None:
    """VLMEvalKit's format: index, image in base64 (a list of them for several), question, answer and more."""
    rows = []
    for number, sample in enumerate(samples):
        images = [base64.b64encode(png(image)).decode() for image in sample.images]
        image = images[0] if len(images) == 1 else str(images)
        for row in make_rows(sample, number):
            rows.append({"index": str(len(rows)), "image": image} | row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def write_lmms_task(samples: Sequence[Sample], folder: Path) -> None:
    """lmms-eval's own ChartQA task over these samples; needs lmms-eval and datasets."""
    import datasets
    import lmms_eval

    rows = [
        {"question": sample.turns[0][0], "answer": sample.turns[0][1], "type": "drawn", "image": sample.images[0]}
        for sample in samples
    ]
    data = (folder / "drawn_chartqa.parquet").resolve()
    datasets.Dataset.from_list(rows).to_parquet(str(data))
    chartqa = Path(lmms_eval.__file__).parent / "tasks" / "chartqa" / "chartqa.yaml"
    (folder / "drawn_chartqa.yaml").write_text(LMMS_TASK.format(chartqa=chartqa, data=data))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Draw a small benchmark for VLMEvalKit or lmms-eval.",
        epilog="example: python -m navil_evaluation.drawn runs/drawn --count 24 --curriculum tiny/curriculum.json",
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder to write, for $LMUData or --include_path")
    parser.add_argument("--count", type=int, default=24, metavar="N", help="questions of each kind (%(default)s)")
    parser.add_argument(
        "--curriculum", type=Path, metavar="FILE", help="a curriculum.json: draw at its difficulty, not in full"
    )
    parser.add_argument("--lmms-eval", action="store_true", help="write the task of lmms-eval instead of the TSV files")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    difficulty = read_difficulty(options.curriculum) if options.curriculum else {}
    if (options.folder / "images").exists():
        print(f"error: {options.folder} has a kit's copies of other pictures (images/): take another", file=sys.stderr)
        return 1
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.lmms_eval:
        write_lmms_task(list(samples_of("chart", options.count, difficulty.get("chart", 1.0))), options.folder)
    else:
        for name, (task, fits, make_rows) in tqdm(SETS.items(), desc="data sets", disable=None):
            samples = list(samples_of(task, options.count, difficulty.get(task, 1.0), fits))
            write_tsv(samples, make_rows, options.folder / f"{name}.tsv")
    print(f"wrote {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
