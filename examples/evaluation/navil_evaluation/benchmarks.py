"""The paper's benchmarks: their data sets in VLMEvalKit, where the kit reports each metric, and the normalized average.

The paper does not name all splits: `choice` says what is taken here where there is more than one. Facts about the kit
are those of `ms-vlmeval` 0.0.20.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

OVERALL = r"(split=[^|]+\|)?Overall"  # of a multiple-choice set: one row for each split
GPT_MINI = "gpt-4o-mini"


@dataclass(frozen=True)
class Benchmark:
    """One column of the table.

    name: as in the paper.
    dataset: VLMEvalKit's name.
    questions: rows of the data set, as its authors state; not counted here.
    metrics: patterns of the kit's metrics, whose sum is the metric of the table.
    factor: from the kit's unit to the table's.
    scale: from the table's unit to 0-100.
    judge: the kit's default judge model; "" if it scores without one.
    judge_required: the kit cannot score without a judge. Otherwise exact matching takes its place.
    choice: what was chosen, and why.
    """

    name: str
    dataset: str
    questions: int
    metrics: tuple[str, ...] = ("Overall",)
    factor: float = 1.0
    scale: float = 1.0
    judge: str = ""
    judge_required: bool = False
    choice: str = ""

    def value(self, reported: Mapping[str, float]) -> float:
        """The metric in the table's unit, from what the kit reports of a data set.

        Raises:
            ValueError: a metric is not there exactly once.
        """
        found = [[key for key in reported if re.fullmatch(pattern, key)] for pattern in self.metrics]
        if any(len(keys) != 1 for keys in found):
            raise ValueError(f"{self.dataset}: the kit must report {self.metrics} once each, got {sorted(reported)}")
        return self.factor * sum(reported[key] for [key] in found)


def multiple_choice(name: str, dataset: str, questions: int, choice: str = "", metric: str = OVERALL) -> Benchmark:
    return Benchmark(name, dataset, questions, (metric,), factor=100, judge=GPT_MINI, choice=choice)


AVERAGED = (
    Benchmark(
        "MMVet",
        "MMVet",
        218,
        (r"Category=Overall\|acc",),
        judge="gpt-4-turbo",
        judge_required=True,
        choice="the judge grades every answer from 0 to 1, so the score depends on it",
    ),
    multiple_choice(
        "MMMU",
        "MMMU_DEV_VAL",
        1050,
        "the validation split (900 questions); the test split has no public answers",
        r"split=validation\|Overall",
    ),
    multiple_choice(
        "MMBench",
        "MMBench_DEV_EN",
        4329,
        "English dev split of version 1.0, every rotation of a question must be answered right; the test split "
        "(MMBench_TEST_EN) has no public answers; the kit also has a version 1.1 (MMBench_DEV_EN_V11)",
    ),
    Benchmark(
        "MME",
        "MME",
        2374,
        ("perception", "reasoning"),
        scale=28,
        judge=GPT_MINI,
        choice="perception and reasoning together, at most 2800",
    ),
    Benchmark(
        "MathVista",
        "MathVista_MINI",
        1000,
        (r"Task&Skill=Overall\|acc",),
        judge=GPT_MINI,
        judge_required=True,
        choice="testmini; the judge extracts an answer that is not a bare number or option",
    ),
    Benchmark("OCRBench", "OCRBench", 1000, ("Final Score",), scale=10, choice="correct answers of 1000"),
    Benchmark("TextVQA", "TextVQA_VAL", 5000, choice="validation split"),
    Benchmark("DocVQA", "DocVQA_VAL", 5349, choice="validation split; the test split has no public answers"),
    multiple_choice("AI2D", "AI2D_TEST", 3088, "with masked labels; the kit also has AI2D_TEST_NO_MASK"),
    Benchmark("ChartQA", "ChartQA_TEST", 2500, choice="human and augmented questions together"),
    Benchmark("InfoVQA", "InfoVQA_VAL", 2801, choice="validation split; the test split has no public answers"),
)
OTHERS = (
    multiple_choice("CCBench", "CCBench", 2040, "every rotation of a question must be answered right"),
    multiple_choice("ScienceQA", "ScienceQA_TEST", 2017, "questions with an image (ScienceQA-IMG)"),
    Benchmark("GQA", "GQA_TestDev_Balanced", 12578, choice="balanced test-dev split, exact match"),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in AVERAGED + OTHERS}


def mean_normalized(metrics: Mapping[str, float], benchmarks: Iterable[Benchmark] = AVERAGED) -> float:
    """Mean over `benchmarks` of the metrics scaled to 0-100 (paper: MME / 28, OCRBench / 10)."""
    normalized = [metrics[benchmark.name] / benchmark.scale for benchmark in benchmarks]
    return sum(normalized) / len(normalized)
