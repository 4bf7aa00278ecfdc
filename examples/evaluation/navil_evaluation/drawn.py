"""Draws a small benchmark with this repository's generator, in the formats of both kits.

    python -m navil_evaluation.drawn runs/drawn --count 24 --curriculum tiny/curriculum.json

OUT/ChartQA_TEST.tsv (charts) and OUT/DocVQA_VAL.tsv (two images a question) are VLMEvalKit's, for $LMUData=OUT;
OUT/drawn_chartqa.yaml is a task of lmms-eval, which scores the same charts, for --include_path OUT.
Run it from the root of the repository, where `recipes` is.
"""

import argparse
import base64
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from recipes.curriculum import read_difficulty
from recipes.tasks import Sample, make_sample

TSV_OF_TASK = {"chart": "ChartQA_TEST", "two_images": "DocVQA_VAL"}

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


def write_tsv(samples: Sequence[Sample], path: Path) -> None:
    """VLMEvalKit's format: index, image in base64 (a list of them for several), question, answer."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "image", "question", "answer"])
        for index, sample in enumerate(samples):
            images = [base64.b64encode(png(image)).decode() for image in sample.images]
            image = images[0] if len(images) == 1 else str(images)
            writer.writerow([index, image, *sample.turns[0]])


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
    options.folder.mkdir(parents=True, exist_ok=True)
    for task, name in TSV_OF_TASK.items():
        seeds = tqdm(range(options.count), desc=task, disable=None)
        samples = [make_sample(task, seed, difficulty.get(task, 1.0), split="heldout") for seed in seeds]
        if not options.lmms_eval:
            write_tsv(samples, options.folder / f"{name}.tsv")
        elif task == "chart":
            write_lmms_task(samples, options.folder)
    print(f"wrote {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
