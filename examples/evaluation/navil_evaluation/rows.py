"""The published rows, and tables of them in Markdown, with the row of a model beside them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .benchmarks import AVERAGED, OTHERS, Benchmark, mean_normalized

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))["models"]
WHOLE = {"MME", "OCRBench"}  # published without decimals


def published_table(model: str | None = None, metrics: Mapping[str, float] | None = None) -> str:
    """The paper's table; with `metrics` (by benchmark, in the table's units) the row of `model` at its end."""
    header = ["model", "activated", "avg", *(benchmark.name for benchmark in AVERAGED)]
    rows: list[list[str]] = []
    for group in dict.fromkeys(row["group"] for row in PUBLISHED):
        rows.append([f"*{group}*", *[""] * (len(header) - 1)])
        rows += [_published_cells(row) for row in PUBLISHED if row["group"] == group]
    if metrics is not None:
        complete = all(benchmark.name in metrics for benchmark in AVERAGED)
        average = f"{mean_normalized(metrics):.1f}" if complete else "-"
        rows.append([str(model), "-", average, *_cells(metrics, AVERAGED)])
    return markdown_table(header, rows)


def other_table(model: str, metrics: Mapping[str, float]) -> str:
    """The benchmarks outside the average: the models that have published them, and `model`."""
    published = [row for row in PUBLISHED if OTHERS[0].name in row["metrics"]]
    rows = [[row["model"], *_cells(row["metrics"], OTHERS)] for row in published]
    return markdown_table(
        ["model", *(benchmark.name for benchmark in OTHERS)], [*rows, [model, *_cells(metrics, OTHERS)]]
    )


def average_sentence(metrics: Mapping[str, float]) -> str:
    """What the average is over; a part of the benchmarks gives a mean that is not comparable with the paper's."""
    present = [benchmark for benchmark in AVERAGED if benchmark.name in metrics]
    if not present:
        return "None of the 11 benchmarks of the average has a score."
    if len(present) == len(AVERAGED):
        return f"Average over the 11 benchmarks, MME / 28 and OCRBench / 10: {mean_normalized(metrics):.1f}."
    names = ", ".join(benchmark.name for benchmark in present)
    mean = mean_normalized(metrics, present)
    return f"Mean over {len(present)} of the 11 ({names}): {mean:.1f}. Not comparable with the avg column."


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines).replace(
        "| --- ", "|---"
    )


def _published_cells(row: Mapping[str, Any]) -> list[str]:
    by_authors = row.get("evaluated_by_the_authors", ())
    cells = _cells(row["metrics"], AVERAGED)
    marked = [cell + r"\*" * (benchmark.name in by_authors) for cell, benchmark in zip(cells, AVERAGED, strict=True)]
    return [row["model"], row["activated"], str(row["average"]), *marked]


def _cells(metrics: Mapping[str, float], benchmarks: Iterable[Benchmark]) -> list[str]:
    return [_cell(benchmark.name, metrics.get(benchmark.name)) for benchmark in benchmarks]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if name in WHOLE else f"{value:.1f}"
