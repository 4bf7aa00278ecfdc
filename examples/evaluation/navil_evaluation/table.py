"""Runs VLMEvalKit over the paper's benchmarks and prints the row of a model beside the published ones.

    python -m navil_evaluation.table --model-path weights/navil-2b --work-dir runs/table --download

It first prints what is done, what is to run, and what is missing: a judge's key, a download. If something is missing,
it stops before it loads the model. Run it again with the same --work-dir to continue: finished benchmarks keep their
score, and the kit continues within a benchmark.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .benchmarks import AVERAGED, BENCHMARKS, Benchmark, mean_normalized
from .kit import (
    EXACT_MATCHING,
    Kit,
    evaluate,
    failure,
    forget_score_of_another_judge,
    is_scored,
    judge_of,
    read_status,
)
from .plan import KEY, SERVER, Step, describe, judge_problem, make_steps, runnable
from .rows import PUBLISHED, average_sentence, other_table, published_table

KIT = "ms-vlmeval"


def positive(text: str) -> int:
    """
    Raises:
        ValueError: not a whole number above 0.
    """
    number = int(text)
    if number < 1:
        raise ValueError(f"must be at least 1, got {number}")
    return number


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Evaluate a model folder on the paper's benchmarks with VLMEvalKit, and print its row.",
        epilog="example: python -m navil_evaluation.table --model-path weights/navil-2b --work-dir runs/table",
        allow_abbrev=False,
    )
    parser.add_argument("--model-path", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument("--work-dir", type=Path, required=True, metavar="DIR", help="answers, scores and the table")
    parser.add_argument(
        "--benchmarks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME", help="default: all 14"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--download", action="store_true", help="fetch missing data sets before the model is loaded")
    parser.add_argument("--leave-out-missing", action="store_true", help="run the benchmarks that miss nothing")
    parser.add_argument(
        "--exact-matching",
        action="store_true",
        help="score without a judge where that is possible: an answer without a clear option counts as wrong",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N questions of each: a trial")
    parser.add_argument("--subfolder", default="", metavar="NAME", help="of the model, where its weights are")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="default: %(default)s")
    parser.add_argument("--plain-prompt", action="store_true", help="ask the questions without the kit's additions")
    parser.add_argument("--own-data", action="store_true", help="take the TSV files under $LMUData for what they are")
    return parser


# ------------------------------------------------------------------------------------------------------------- settings


def read_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the answers depend on.

    Raises:
        ValueError: the model folder has no config.json, or own data have no folder.
    """
    folder = (options.model_path / options.subfolder).resolve()
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model-path must be a model folder; there is no {folder / 'config.json'}")
    weights = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in folder.glob("*.safetensors")}
    if options.own_data and "LMUData" not in os.environ:
        raise ValueError("--own-data takes the TSV files of the folder in the variable LMUData: set it")
    names = ("max_new_tokens", "plain_prompt", "limit")
    return {
        "model": str(folder),
        "weights": dict(sorted(weights.items())),  # bytes, time of change in ns
        "kit": f"{KIT} {version(KIT)}",
        "own_data": str(Path(os.environ["LMUData"]).resolve()) if options.own_data else None,
        **{name: getattr(options, name) for name in names},
    }


def check_settings(settings: Mapping[str, Any], work_dir: Path) -> None:
    """
    Raises:
        ValueError: the work folder has answers under other settings.
    """
    file = work_dir / "settings.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else settings
    changed = [
        f"{name} {earlier.get(name)} -> {value}" for name, value in settings.items() if earlier.get(name) != value
    ]
    if changed:
        raise ValueError(f"{work_dir} has answers under other settings ({'; '.join(changed)}): take another --work-dir")


def check_environment(environment: Mapping[str, str]) -> None:
    """
    Raises:
        ValueError: a variable of the kit would take it to another folder.
    """
    if "MMEVAL_ROOT" in environment:
        raise ValueError("MMEVAL_ROOT is set and would replace --work-dir: unset it")
    data = environment.get("LMUData")
    if data is not None and not Path(data).is_dir():
        raise ValueError(f"LMUData must be a folder, got {data!r}; the kit would take ~/LMUData instead")


# --------------------------------------------------------------------------------------------------------------- report


def caveats(settings: Mapping[str, Any], exact_matching: bool) -> list[str]:
    """What sets a row apart from the published ones."""
    limit = settings["limit"]
    texts = {
        "Own data, not the benchmarks' questions: not comparable with the published rows.": settings["own_data"],
        f"The first {limit} questions of each benchmark: not comparable with the published rows.": limit,
        "Asked without the kit's prompts.": settings["plain_prompt"],
        "Scored by exact matching instead of a judge where that is possible.": exact_matching,
    }
    return [text for text, applies in texts.items() if applies]


def write_report(name: str, metrics: Mapping[str, float], notes: Sequence[str], settings: Any, work_dir: Path) -> str:
    """Writes table.md and table.json; returns the text of the former."""
    parts = [published_table(name, metrics), average_sentence(metrics), other_table(name, metrics), "\n".join(notes)]
    text = "\n\n".join(filter(None, parts)) + "\n"
    is_complete = all(benchmark.name in metrics for benchmark in AVERAGED)
    average = mean_normalized(metrics) if is_complete else None
    result = {"model": name, "average": average, "metrics": metrics, "notes": notes, "settings": settings}
    result["published"] = PUBLISHED
    (work_dir / "table.md").write_text(text, encoding="utf-8")
    (work_dir / "table.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return text


# ------------------------------------------------------------------------------------------------------------------ run


def find_scored(options: argparse.Namespace) -> list[Benchmark]:
    status = read_status(options.work_dir)
    return [
        benchmark
        for benchmark in BENCHMARKS.values()
        if is_scored(benchmark, status.get(benchmark.dataset, {}), options.exact_matching)
    ]


def make_plan(kit: Kit, options: argparse.Namespace) -> list[Step]:
    return make_steps(
        [BENCHMARKS[name] for name in options.benchmarks],
        find_scored(options),
        kit.data_problem,
        lambda benchmark: judge_problem(benchmark, options.exact_matching, os.environ),
        may_download=options.download and not options.own_data,
    )


def prepare(kit: Kit, steps: Sequence[Step], options: argparse.Namespace) -> None:
    """Downloads, and asks each judge for a word.

    Raises:
        ValueError: a download or a judge failed.
    """
    for step in steps:
        if step.download:
            kit.download(step.benchmark)
    judges = {judge_of(step.benchmark, options.exact_matching) for step in steps}
    for judge in sorted(judges - {"", EXACT_MATCHING}):
        kit.check_judge(judge)


def evaluate_steps(steps: Sequence[Step], settings: Mapping[str, Any], options: argparse.Namespace) -> None:
    options.work_dir.mkdir(parents=True, exist_ok=True)
    (options.work_dir / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for step in steps:
        forget_score_of_another_judge(step.benchmark, options.exact_matching, options.work_dir)
    arguments = ["--model-path", str(options.model_path), "--subfolder", options.subfolder]
    arguments += ["--max-new-tokens", str(options.max_new_tokens)]
    arguments += ["--plain-prompt"] if options.plain_prompt else []
    arguments += ["--own-data"] if options.own_data else []
    arguments += ["--limit", str(options.limit)] if options.limit else []
    arguments += ["--judge", EXACT_MATCHING] if options.exact_matching else []
    evaluate([step.benchmark for step in steps], options.work_dir, arguments)


def report(kit: Kit, steps: Sequence[Step], settings: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Prints the table of all scores in the work folder; returns 1 if a benchmark has failed."""
    status, metrics, failed = read_status(options.work_dir), {}, []
    for benchmark in find_scored(options):
        try:
            metrics[benchmark.name] = benchmark.value(status[benchmark.dataset]["metrics"])
        except ValueError as error:
            failed.append(str(error))
    scored = {benchmark.name for benchmark in find_scored(options)}
    open_steps = [step.benchmark for step in steps if step.benchmark.name not in scored]
    failed += [f"{benchmark.name}: {failure(status.get(benchmark.dataset, {}))}" for benchmark in open_steps]
    notes = caveats(settings, options.exact_matching) + kit.failed_answers(options.work_dir)
    name = Path(settings["model"]).name
    print("\n" + write_report(name, metrics, notes, settings, options.work_dir))
    print(f"wrote {options.work_dir / 'table.md'} and table.json")
    for text in failed:
        print(f"no score: {text}", file=sys.stderr)
    return 1 if failed else 0


def run(options: argparse.Namespace) -> int:
    """
    Raises:
        ValueError: a setting is wrong, or something is missing.
    """
    check_environment(os.environ)
    settings = read_settings(options)
    check_settings(settings, options.work_dir)
    kit = Kit(options.own_data)
    steps = make_plan(kit, options)
    print(f"{settings['kit']}; data: {kit.root}; judge: key in {KEY}, another server in {SERVER}\n")
    print(describe(steps, options.exact_matching), flush=True)
    if options.dry_run:
        return 0
    steps = runnable(steps, options.leave_out_missing)
    prepare(kit, steps, options)
    if steps:
        evaluate_steps(steps, settings, options)
    return report(kit, steps, settings, options)


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        return run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    except PackageNotFoundError:
        print(f"error: {KIT} is not installed: see examples/evaluation/README.md", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
