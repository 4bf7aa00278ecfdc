"""What the table asks VLMEvalKit: where its data are, whether a judge answers, what a run has reported."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import make_torchvision_importable
from .benchmarks import Benchmark
from .vlmevalkit import main as run_kit

RUN = "NaViL"  # the kit's name of the model, and so of its folder in a work folder
EXACT_MATCHING = "exact_matching"


class Kit:
    """The installed kit. With `own_data` any TSV file of a data set's name is taken for what it is."""

    def __init__(self, own_data: bool):
        make_torchvision_importable()
        from vlmeval.smp import LMUDataRoot

        self.own_data = own_data
        self.root = Path(LMUDataRoot())

    def data_problem(self, benchmark: Benchmark) -> str:
        """Why the data set must be downloaded; "" if it is there. Without `own_data` it reads the whole file."""
        from vlmeval.smp import md5

        file = self.root / f"{benchmark.dataset}.tsv"
        url, checksum = self._source(benchmark.dataset)
        if not file.is_file():
            return f"{file.name} is missing" + ("" if self.own_data else f" ({url})")
        if self.own_data or checksum is None or md5(str(file)) == checksum:
            return ""
        return f"{file.name} has another checksum ({url})"

    def download(self, benchmark: Benchmark) -> None:
        """
        Raises:
            ValueError: the download failed, or its checksum is not the kit's.
        """
        from vlmeval.smp import download_file

        url, _ = self._source(benchmark.dataset)
        try:
            download_file(url, str(self.root / f"{benchmark.dataset}.tsv"))
        except Exception as error:  # the kit raises no narrower one
            raise ValueError(f"{benchmark.name}: {error}") from error
        if problem := self.data_problem(benchmark):
            raise ValueError(f"{benchmark.name}: after the download {problem}")

    def check_judge(self, model: str) -> None:
        """
        Raises:
            ValueError: the judge model does not answer.
        """
        from vlmeval.dataset.utils import build_judge

        if not build_judge(model=model, retry=1).working():
            raise ValueError(f"the judge {model} does not answer: check its key and its server")

    def failed_answers(self, work_dir: Path) -> list[str]:
        """A sentence for each data set whose judge failed on some answers, which then have a wrong score."""
        from vlmeval.smp import collect_run_benchmark_report

        rows = collect_run_benchmark_report(work_dir / RUN)
        return [
            f"{row['benchmark']}: the judge failed on {row['judge_failed']} of {row['judge_total']} answers."
            for row in rows
            if row["judge_failed"]
        ]

    def _source(self, dataset: str) -> tuple[str, str | None]:
        from vlmeval.dataset import DATASET_CLASSES

        found = next(kind for kind in DATASET_CLASSES if dataset in kind.supported_datasets())
        return found.DATASET_URL[dataset], found.DATASET_MD5.get(dataset)


def evaluate(benchmarks: Iterable[Benchmark], work_dir: Path, arguments: Sequence[str]) -> None:
    """Runs the kit once over all `benchmarks`, so that the model is loaded once; `arguments` as for `vlmevalkit`."""
    datasets = [benchmark.dataset for benchmark in benchmarks]
    run_kit([*arguments, "--work-dir", str(work_dir), "--data", *datasets])


def read_status(work_dir: Path) -> dict[str, dict[str, Any]]:
    """What the kit has written about each data set."""
    return _read(work_dir / RUN / "status.json").get("datasets", {})


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def judge_of(benchmark: Benchmark, exact_matching: bool) -> str:
    """The judge that a score must come from."""
    return EXACT_MATCHING if exact_matching and not benchmark.judge_required else benchmark.judge


def is_scored(benchmark: Benchmark, entry: Mapping[str, Any], exact_matching: bool) -> bool:
    """Whether the kit has evaluated all answers to the end, by the judge that is wanted."""
    is_complete = entry.get("status") == "done" and bool(entry.get("metrics")) and "error_message" not in entry
    return is_complete and not _has_other_judge(benchmark, entry, exact_matching)


def forget_score_of_another_judge(benchmark: Benchmark, exact_matching: bool, work_dir: Path) -> None:
    """Deletes what the kit has kept of a scoring, which it would take up whatever the judge. The answers stay."""
    file = work_dir / RUN / "status.json"
    status = _read(file)
    if not _has_other_judge(benchmark, status.get("datasets", {}).get(benchmark.dataset, {}), exact_matching):
        return
    del status["datasets"][benchmark.dataset]
    file.write_text(json.dumps(status, indent=2), encoding="utf-8")
    for kept in file.parent.glob(f"{RUN}_{benchmark.dataset}_*"):
        kept.unlink()


def _has_other_judge(benchmark: Benchmark, entry: Mapping[str, Any], exact_matching: bool) -> bool:
    judge = entry.get("judge_model")
    return bool(benchmark.judge and judge) and judge != judge_of(benchmark, exact_matching)


def failure(entry: Mapping[str, Any]) -> str:
    """Why a data set has no score."""
    return entry.get("error_message") or entry.get("skip_reason") or f"stopped at {entry.get('status', 'the start')}"
