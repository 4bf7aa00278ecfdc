"""Measures the paper's five observations in miniature; each writes NAME.png and NAME.json.

    python -m recipes.study initialization     # an LLM from text against one from scratch
    python -m recipes.study experts            # visual experts: none, FFN, attention and FFN
    python -m recipes.study shape              # depth against width of the encoder
    python -m recipes.study scaling            # sizes of the LLM and of the encoder
    python -m recipes.study encoder-size       # the best encoder for each LLM, from the runs of `scaling`
    python -m recipes.study all                # all five

A run that has its result in OUTPUT/runs is not repeated, so an interrupted command goes on where it stopped.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from .analysis import ANALYSES, Result
from .data import NUM_HELDOUT, load_samples
from .observations import RUNS
from .run import BATCH, Run, execute, pretrain


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure the paper's five observations with small models on the recipe's pictures.",
        epilog="example: python -m recipes.study experts --samples 4000 --seeds 1",
    )
    parser.add_argument("observation", choices=[*RUNS, "all"])
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="data, runs and models (%(default)s)")
    parser.add_argument("--results", type=Path, help="folder of the plots and their JSON files (OUTPUT)")
    parser.add_argument("--samples", type=int, default=12000, help="training pictures of a run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="runs at once (as many as cores; one on a GPU)")
    return parser


def run_all(runs: Sequence[Run], folder: Path, num_samples: int, workers: int) -> list[Result]:
    """Results of the runs, each in a process with one thread; or one after the other on a GPU."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    names = ["heldout", "pictures", *(["texts"] if any(run.from_text for run in runs) else [])]
    for name in names:  # drawn once, before the processes read them
        load_samples(folder, name, NUM_HELDOUT if name == "heldout" else num_samples)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"folder": folder, "num_samples": num_samples, "device": device}
    workers = workers or (1 if device == "cuda" else multiprocessing.cpu_count())
    context = multiprocessing.get_context("spawn")
    results = []
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        decoders = dict.fromkeys((run.decoder, run.seed) for run in runs if run.from_text)
        for pretrained in [pool.submit(pretrain, *decoder, **settings) for decoder in decoders]:
            pretrained.result()
        for run, result in zip(runs, pool.map(partial(execute, **settings), runs), strict=True):
            results.append(result)
            print(
                f"[{len(results)}/{len(runs)}] {run.name}: loss {result['measured'][-1]['loss']['all']:.3f}", flush=True
            )
    return results


def report(name: str, results: Sequence[Result], folder: Path) -> None:
    finding = ANALYSES[name](results)
    folder.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(finding.figure).print_png(folder / f"{name}.png")
    content = {"claims": finding.claims, "numbers": finding.rows, "runs": results}
    (folder / f"{name}.json").write_text(json.dumps(content) + "\n")
    print(f"{name}:", *finding.lines, sep="\n  ")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    for name, least in (("samples", BATCH), ("seeds", 1), ("workers", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    names = [*RUNS] if options.observation == "all" else [options.observation]
    wanted = {name: RUNS[name](range(options.seeds)) for name in names}
    runs = sorted(dict.fromkeys(run for name in names for run in wanted[name]), key=lambda run: run.seed)
    results = dict(zip(runs, run_all(runs, options.output, options.samples, options.workers), strict=True))
    for name in names:
        report(name, [results[run] for run in wanted[name]], options.results or options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
