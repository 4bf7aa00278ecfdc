"""What the runs of an observation say: numbers, a plot, and whether their direction agrees with the paper."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from conversion.configs import auto_vision_size

from .observations import DECODERS, ENCODERS, EXPERTS, SHAPES

Result = dict[str, Any]
Setting = Callable[[Result], Any]

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Half of a 95 % interval of a mean of n runs, in standard errors (Student's t)."""
EARLY = 0.46  # share of the samples
TARGET = (
    0.4  # loss that the numbers of needed pictures are for: half-way down from the form of answers to their content
)
GAIN = 0.01  # of a doubled encoder, in shares of the smallest encoder's loss (the paper's criterion)


def half_interval(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % interval of the mean over seeds (S, ...); not a number for one seed."""
    if len(values) == 1:
        return np.full(values.shape[1:], np.nan)
    return T_95[min(len(values), max(T_95))] * values.std(0, ddof=1) / math.sqrt(len(values))


def with_interval(mean: float, error: float, form: str = ".3f") -> str:
    return f"{mean:{form}} (one seed)" if math.isnan(error) else f"{mean:{form}} ± {error:{form}}"


def whole_pictures(count: float) -> str:
    return f"{count:.0f}" if math.isfinite(count) else "more than all"


@dataclass
class Finding:
    """An observation's outcome: a plot, rows of numbers, and what they say about the paper's claims."""

    figure: Figure
    rows: list[str] = field(default_factory=list)
    claims: dict[str, str] = field(default_factory=dict)

    def check(self, claim: str, margins: Any, is_lower_bound: bool = False) -> None:
        """`margins` (S,), one for each seed, are above 0 where the runs agree with the claim."""
        margins = np.asarray(margins, dtype=float)
        mean, error = margins.mean(), half_interval(margins)
        is_contrary = mean < -error and not is_lower_bound
        outcome = "agrees" if mean > error else "does not agree" if is_contrary else "undecided"
        self.claims[claim] = f"{outcome}: margin {with_interval(mean, error, '.3g')}"

    @property
    def lines(self) -> list[str]:
        return [*self.rows, *(f"{claim}: {outcome}" for claim, outcome in self.claims.items())]


@dataclass
class Curve:
    """Held-out loss of the same settings with several seeds, at the same numbers of samples."""

    samples: np.ndarray  # (M,)
    losses: np.ndarray  # (S, M)

    @property
    def mean(self) -> np.ndarray:
        return self.losses.mean(0)

    @property
    def error(self) -> np.ndarray:
        return half_interval(self.losses)

    @property
    def final(self) -> str:
        return with_interval(self.mean[-1], self.error[-1])

    def samples_to_reach(self, loss: float) -> np.ndarray:
        """(S,) where each run first comes down to this loss, interpolated in log(samples); infinity if nowhere."""
        return np.array([self._reach(losses, loss) for losses in self.losses])

    def log_samples(self, loss: float = TARGET) -> np.ndarray:
        """(S,) log of `samples_to_reach`; where the loss is not reached, of all samples: fewer than needed."""
        return np.log(np.minimum(self.samples_to_reach(loss), self.samples[-1]))

    def _reach(self, losses: np.ndarray, loss: float) -> float:
        below = np.flatnonzero(losses <= loss)
        if not len(below):
            return math.inf
        end = below[0]
        if end == 0:
            return float(self.samples[0])
        share = (losses[end - 1] - loss) / (losses[end - 1] - losses[end])
        return float(self.samples[end - 1] * (self.samples[end] / self.samples[end - 1]) ** share)

    def draw(self, axes: Axes, label: str) -> None:
        [line] = axes.plot(self.samples, self.mean, label=label, marker=".")
        low, high = self.mean - self.error, self.mean + self.error
        axes.fill_between(self.samples, np.maximum(low, self.losses.min() / 2), high, color=line.get_color(), alpha=0.2)


def setting(name: str) -> Setting:
    """Reads a field of a result's run; sizes as tuples."""

    def read(result: Result) -> Any:
        value = result["run"][name]
        return tuple(value) if isinstance(value, list | tuple) else value

    return read


def curves(results: Sequence[Result], key: Setting) -> dict[Any, Curve]:
    """Curves by a property of their runs."""
    groups = defaultdict(list)
    for result in results:
        groups[key(result)].append(result["measured"])
    return {
        name: Curve(
            np.array([row["samples"] for row in runs[0]]),
            np.array([[row["loss"]["all"] for row in rows] for rows in runs]),
        )
        for name, runs in groups.items()
    }


def panels(count: int, **settings: Any) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(5 * count, 3.8), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, **settings)[0]


def label_curves(axes: Axes) -> None:
    axes.set(xlabel="training pictures", ylabel="loss on held-out pictures", xscale="log", yscale="log")
    axes.legend()


# ------------------------------------------------------------------------------------------------------ initialization


def compare_initialization(results: Sequence[Result]) -> Finding:
    by_start = curves(results, setting("from_text"))
    scratch, from_text = by_start[False], by_start[True]
    figure, [axes] = panels(1)
    scratch.draw(axes, "LLM from scratch")
    from_text.draw(axes, "LLM from text")
    label_curves(axes)
    finding = Finding(figure, [f"final loss: LLM from text {from_text.final}, from scratch {scratch.final}"])
    for loss in (1.0, 0.6, TARGET):
        with_text, without = (curve.samples_to_reach(loss).mean() for curve in (from_text, scratch))
        counts = f"{whole_pictures(with_text)} from text, {whole_pictures(without)} from scratch"
        finding.rows.append(f"pictures for a loss of {loss}: {counts}")
    factors = scratch.log_samples() - from_text.log_samples()
    finding.check(f"an LLM from text needs fewer pictures for a loss of {TARGET} (log factor)", factors)
    is_reached = np.isfinite(scratch.samples_to_reach(TARGET)).all()
    finding.check("the factor is more than 10 (log factor, minus log 10)", factors - math.log(10), not is_reached)
    return finding


# ------------------------------------------------------------------------------------------------------------- experts


def name_experts(experts: Sequence[str]) -> str:
    return " and ".join(experts) or "none"


def feature_gaps(results: Sequence[Result]) -> np.ndarray:
    """(S, layers) log of the visual features' scale over the text features', at the input of each layer."""
    scales = [result["feature_scale"] for result in results]
    return np.array([np.log(scale["visual"]) - np.log(scale["text"]) for scale in scales])[:, :-1]


def compare_experts(results: Sequence[Result]) -> Finding:
    by_experts = curves(results, setting("experts"))
    figure, [loss_axes, gap_axes] = panels(2)
    finding, gaps = Finding(figure), {}
    for experts in EXPERTS:
        curve, name = by_experts[experts], name_experts(experts)
        curve.draw(loss_axes, f"visual experts: {name}")
        gaps[experts] = feature_gaps([result for result in results if setting("experts")(result) == experts])
        ratios = np.exp(gaps[experts].mean(0))
        gap_axes.plot(ratios, marker=".", label=f"visual experts: {name}")
        needed = curve.samples_to_reach(TARGET).mean()
        finding.rows.append(
            f"{name}: final loss {curve.final}, {whole_pictures(needed)} pictures for a loss of {TARGET}"
        )
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        finding.rows.append(f"{name}: scale of visual over text features at the input of each layer {listed}")
    label_curves(loss_axes)
    gap_axes.axhline(1, color="gray", linewidth=0.5)
    gap_axes.set(xlabel="decoder layer", ylabel="scale of visual over text features")
    gap_axes.set_xticks(range(len(ratios)))
    gap_axes.legend()
    none, ffn, both = (by_experts[experts] for experts in EXPERTS)
    for other, name in ((none, "none"), (ffn, "FFN experts alone")):
        claim = f"attention and FFN experts reach a lower final loss than {name}"
        finding.check(claim, other.losses[:, -1] - both.losses[:, -1])
        claim = f"they need fewer pictures for a loss of {TARGET} than {name} (log factor)"
        finding.check(claim, other.log_samples() - both.log_samples())
    distances = [np.abs(gaps[experts]).mean(1) for experts in EXPERTS[1:]]
    finding.check("FFN experts alone leave a wider gap in feature scale (mean log)", distances[0] - distances[1])
    return finding


# --------------------------------------------------------------------------------------------------------------- shape


def compare_shapes(results: Sequence[Result]) -> Finding:
    by_shape = curves(results, setting("encoder"))
    samples = by_shape[SHAPES[0]].samples
    figure, axes = panels(2)
    finding, losses = Finding(figure), {}
    for axis, (when, share) in zip(axes, (("early", EARLY), ("late", 1.0)), strict=True):
        column = int(np.abs(samples / samples[-1] - share).argmin())
        losses[when] = np.stack([by_shape[shape].losses[:, column] for shape in SHAPES], 1)  # (S, shapes)
        mean, error = losses[when].mean(0), half_interval(losses[when])
        axis.errorbar(range(len(SHAPES)), mean, error, marker="o", capsize=3)
        axis.set(title=f"{when}: {samples[column]:,} pictures", xlabel="depth x width of the encoder")
        axis.set(ylabel="loss on held-out pictures")
        names = [f"{depth} x {width}" for depth, width in SHAPES]
        axis.set_xticks(range(len(SHAPES)), names)
        values = (f"{name}: {with_interval(m, e)}" for name, m, e in zip(names, mean, error, strict=True))
        finding.rows.append(f"{when}, {samples[column]} pictures: {', '.join(values)}")
    late, early = losses["late"], losses["early"]
    middle = late[:, 1:-1].mean(1)  # not the best of them, which has noise on its side
    finding.check("late, the shallowest encoder loses to the mean of the middle shapes", late[:, 0] - middle)
    finding.check("late, the deepest encoder loses to the mean of the middle shapes", late[:, -1] - middle)
    finding.check("early, the shallowest encoder is ahead of the deepest", early[:, -1] - early[:, 0])
    return finding


# --------------------------------------------------------------------------------------------------------------- sizes


@dataclass
class Grid:
    """Results by size; parameters of the decoders, as activated, and of the encoders' blocks."""

    decoders: np.ndarray  # (D,)
    encoders: np.ndarray  # (E,)
    losses: np.ndarray  # (S, D, E), at the end
    needed: np.ndarray  # (S, D, E), pictures for a loss of TARGET

    @classmethod
    def read(cls, results: Sequence[Result]) -> "Grid":
        by_size = curves(results, lambda result: (setting("decoder")(result), setting("encoder")(result)))
        grid = [[by_size[decoder, encoder] for encoder in ENCODERS] for decoder in DECODERS]
        return cls(
            np.array([parameters_of(results, "decoder", size) for size in DECODERS]),
            np.array([parameters_of(results, "encoder", size) for size in ENCODERS]),
            np.moveaxis(np.array([[curve.losses[:, -1] for curve in row] for row in grid]), -1, 0),
            np.moveaxis(np.array([[curve.samples_to_reach(TARGET) for curve in row] for row in grid]), -1, 0),
        )

    @property
    def rows(self) -> list[str]:
        mean, error, needed = self.losses.mean(0), half_interval(self.losses), self.needed.mean(0)
        rows = ["columns, parameters of the encoder: " + ", ".join(f"{count:,}" for count in self.encoders)]
        for index, count in enumerate(self.decoders):
            values = map(with_interval, mean[index], error[index])
            rows.append(f"final loss, LLM of {count:,}: {', '.join(values)}")
        for index, count in enumerate(self.decoders):
            rows.append(
                f"pictures for a loss of {TARGET}, LLM of {count:,}: {', '.join(map(whole_pictures, needed[index]))}"
            )
        return rows


def parameters_of(results: Sequence[Result], part: str, size: tuple[int, int]) -> int:
    return next(result["parameters"][part] for result in results if setting(part)(result) == size)


def slopes(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Losses (S, N) of N sizes -> (S, N - 1) change per doubling of the size, between neighbors."""
    return np.diff(losses, axis=1) / np.diff(np.log2(sizes))


def compare_scaling(results: Sequence[Result]) -> Finding:
    grid = Grid.read(results)
    mean, error = grid.losses.mean(0), half_interval(grid.losses)
    figure, [llm_axes, encoder_axes] = panels(2, sharey=True)
    style = {"marker": ".", "capsize": 2}
    for column, size in enumerate(grid.encoders):
        llm_axes.errorbar(grid.decoders, mean[:, column], error[:, column], label=f"encoder of {size:,}", **style)
    for row, size in enumerate(grid.decoders):
        encoder_axes.errorbar(grid.encoders, mean[row], error[row], label=f"LLM of {size:,}", **style)
    llm_axes.set(xlabel="activated parameters of the LLM", ylabel="loss on held-out pictures", xscale="log")
    encoder_axes.set(xlabel="parameters of the encoder", xscale="log", yscale="log")  # the axes share y
    llm_axes.legend()
    encoder_axes.legend()
    llm, encoder = slopes(grid.decoders, grid.losses.mean(2)), slopes(grid.encoders, grid.losses.mean(1))
    finding = Finding(figure, grid.rows)
    for name, steps in (("LLM, mean of the encoders", llm), ("encoder, mean of the LLMs", encoder)):
        finding.rows.append(f"loss per doubling of the {name}: " + ", ".join(f"{step:+.4f}" for step in steps.mean(0)))
    finding.check("a larger LLM lowers the loss at every step", -llm.max(1))
    finding.check(
        "log-linearly: the last doubling gains at least half as much as the first", llm[:, 0] / 2 - llm[:, -1]
    )
    finding.check(
        "the largest encoder is better than the smallest", (grid.losses[..., 0] - grid.losses[..., -1]).mean(1)
    )
    finding.check(
        "it saturates: the last doubling gains less than half of the first", encoder[:, -1] - encoder[:, 0] / 2
    )
    return finding


def optimal_encoder(sizes: np.ndarray, losses: np.ndarray) -> float:
    """The smallest size whose doubling gains less than GAIN of the smallest encoder's loss.

    Losses between the measured sizes are interpolated in log(size), at 200 sizes. Half of the largest, if no size fits.
    """
    x = np.log2(sizes)
    candidates = np.linspace(x[0], x[-1] - 1, 200)
    gains = np.interp(candidates, x, losses) - np.interp(candidates + 1, x, losses)
    good = np.flatnonzero(gains < GAIN * losses[0])
    return float(2 ** candidates[good[0] if len(good) else -1])


def compare_encoder_sizes(results: Sequence[Result]) -> Finding:
    grid = Grid.read(results)
    of_means = np.array([optimal_encoder(grid.encoders, losses) for losses in grid.losses.mean(0)])
    of_seeds = np.array([[optimal_encoder(grid.encoders, losses) for losses in seed] for seed in grid.losses])
    law = np.array([auto_vision_size(count) for count in grid.decoders])
    sizes = np.log(grid.decoders)
    slope, offset = np.polyfit(sizes, np.log(of_means), 1)
    law_slope = float(np.polyfit(sizes, np.log(law), 1)[0])
    figure, [axes] = panels(1)
    axes.plot(grid.decoders, of_means, "o", label="smallest whose doubling gains < 1 %")
    axes.plot(grid.decoders, np.exp(offset) * grid.decoders**slope, "--", label=f"fit, slope {slope:.2f}")
    axes.plot(grid.decoders, law, ":", label=f"--vision-size auto, slope {law_slope:.2f}")
    axes.set(xlabel="activated parameters of the LLM", ylabel="parameters of the optimal encoder")
    axes.set(xscale="log", yscale="log")
    axes.legend()
    largest = grid.encoders[-1] / 2  # what can be doubled within the measured sizes
    rows = [
        f"LLM of {llm:,}: encoder of {'at least ' * bool(size > 0.99 * largest)}{size:,.0f}"
        for llm, size in zip(grid.decoders, of_means, strict=True)
    ]
    rows.append(f"slope on logarithmic axes: {slope:.2f}; that of --vision-size auto: {law_slope:.2f}")
    finding = Finding(figure, rows)
    seed_slopes = np.polyfit(sizes, np.log(of_seeds).T, 1)[0]
    finding.check("the optimal encoder grows with the LLM (slope, fitted for each seed)", seed_slopes)
    return finding


ANALYSES: dict[str, Callable[[Sequence[Result]], Finding]] = {
    "initialization": compare_initialization,
    "experts": compare_experts,
    "shape": compare_shapes,
    "scaling": compare_scaling,
    "encoder-size": compare_encoder_sizes,
}
