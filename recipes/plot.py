"""Plots the log of a training run: loss and difficulty of every stage.

python -m recipes.plot runs --output runs/training.png
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .stages import STAGES
from .train import LOG_FILE


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows by step; of a step that was repeated after an interruption, the last row."""
    rows = {row["step"]: row for row in map(json.loads, path.read_text().splitlines())}
    return [rows[step] for step in sorted(rows)]


def draw_run(runs: Path) -> Figure:
    """Two panels for each stage that has a log.

    Raises:
        ValueError: the folder has no log.
    """
    logs = {name: read_log(runs / name / LOG_FILE) for name in STAGES if (runs / name / LOG_FILE).is_file()}
    if not logs:
        raise ValueError(f"{runs} has no {LOG_FILE} in any of its stages {list(STAGES)}")
    figure = Figure(figsize=(12, 3 * len(logs)), layout="constrained")
    panels = figure.subplots(len(logs), 2, squeeze=False)
    for (name, rows), (loss_panel, difficulty_panel) in zip(logs.items(), panels, strict=True):
        steps = [row["step"] for row in rows]
        loss_panel.plot(steps, [row["loss"] for row in rows], color="black")
        loss_panel.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        for task in STAGES[name].mix:
            difficulty_panel.plot(steps, [row["tasks"][task][0] for row in rows], label=task)
        difficulty_panel.set(title=name, xlabel="step", ylabel="difficulty", ylim=(0, 1))
        difficulty_panel.legend(fontsize=7)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Plot losses and difficulties of a training run.",
        epilog="example: python -m recipes.plot runs --output runs/training.png",
    )
    parser.add_argument("runs", type=Path, help="folder that recipes.train wrote")
    parser.add_argument("--output", type=Path, default=Path("training.png"), help="PNG to write (%(default)s)")
    options = parser.parse_args(arguments)
    figure = draw_run(options.runs)
    FigureCanvasAgg(figure).print_png(options.output)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
