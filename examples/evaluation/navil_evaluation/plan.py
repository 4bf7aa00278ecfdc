"""What a table still needs, before anything is downloaded or loaded."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .benchmarks import Benchmark
from .rows import markdown_table

KEY, SERVER = "OPENAI_API_KEY", "OPENAI_API_BASE"  # the kit's variables for its judges


@dataclass(frozen=True)
class Step:
    """One benchmark: `missing` is what it needs and cannot get, `download` the data that will be fetched."""

    benchmark: Benchmark
    is_done: bool = False
    missing: tuple[str, ...] = ()
    download: str = ""

    @property
    def state(self) -> str:
        return "done" if self.is_done else "cannot run" if self.missing else "to run"


def judge_problem(benchmark: Benchmark, exact_matching: bool, environment: Mapping[str, str]) -> str:
    """Why the kit could not ask the judge it needs; "" if nothing is in its way."""
    if exact_matching:
        return "no score without a judge, which --exact-matching excludes" if benchmark.judge_required else ""
    if not benchmark.judge or environment.get(KEY):
        return ""
    instead = "" if benchmark.judge_required else "; --exact-matching does without"
    return f"{KEY} is not set, for the judge {benchmark.judge}{instead}"


def make_steps(
    benchmarks: Iterable[Benchmark],
    done: Collection[Benchmark],
    find_data_problem: Callable[[Benchmark], str],
    find_judge_problem: Callable[[Benchmark], str],
    may_download: bool,
) -> list[Step]:
    """A step for each benchmark. What is done needs neither data nor a judge."""
    steps = []
    for benchmark in benchmarks:
        if benchmark in done:
            steps.append(Step(benchmark, is_done=True))
            continue
        data, judge = find_data_problem(benchmark), find_judge_problem(benchmark)
        missing = (judge, "" if may_download else data)
        steps.append(Step(benchmark, False, tuple(filter(None, missing)), data if may_download else ""))
    return steps


def runnable(steps: Sequence[Step], leave_out_missing: bool) -> list[Step]:
    """The steps to run.

    Raises:
        ValueError: something is missing, and the benchmarks that miss it are not to be left out, or none would remain.
    """
    incomplete = [step for step in steps if step.missing]
    if incomplete and (not leave_out_missing or len(incomplete) == len(steps)):
        lines = [f"  {step.benchmark.name}: {'; '.join(step.missing)}" for step in incomplete]
        raise ValueError(
            "something is missing, so nothing was run:\n" + "\n".join(lines) + "\n"
            "provide it (--download fetches data); --leave-out-missing runs the other benchmarks"
        )
    return [step for step in steps if step.state == "to run"]


def describe(steps: Iterable[Step], exact_matching: bool) -> str:
    """The plan as a table in Markdown."""
    header = ["benchmark", "data set", "questions", "state", "judge", "needs"]
    return markdown_table(header, [_cells(step, exact_matching) for step in steps])


def _cells(step: Step, exact_matching: bool) -> list[str]:
    benchmark = step.benchmark
    judge = benchmark.judge
    if judge and not benchmark.judge_required:
        judge = "exact matching" if exact_matching else f"{judge} for unclear answers"
    needs = [*step.missing, f"download: {step.download}" if step.download else ""]
    described = "; ".join(filter(None, needs))
    return [benchmark.name, benchmark.dataset, str(benchmark.questions), step.state, judge or "-", described or "-"]
