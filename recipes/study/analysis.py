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
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Half of a 95 % interval of a mean of n runs, in standard errors (Student's t)."""
EARLY = 0.22  # share of the samples
GAIN = 0.01  # of a doubled encoder, in shares of the smallest encoder's loss (the paper's criterion)


@dataclass
class Finding:
    """An observation's outcome; `checks` are sentences about directions, with whether the runs agree with them."""

    figure: Figure
    rows: list[str] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        return [*self.rows, *(f"{'agrees' if ok else 'DOES NOT AGREE'}: {claim}" for claim, ok in self.checks.items())]


@dataclass
class Curve:
    """Held-out loss of the same settings with several seeds, at the same numbers of samples."""

    samples: np.ndarray  # (M,)
    losses: np.ndarray  # (seeds, M)

    @property
    def mean(self) -> np.ndarray:
        return self.losses.mean(0)

    @property
    def error(self) -> np.ndarray:
        """(M,) half of the 95 % interval of the mean; not a number with one seed."""
        count = len(self.losses)
        if count == 1:
            return np.full(len(self.samples), np.nan)
        return T_95.get(count, 1.96) * self.losses.std(0, ddof=1) / math.sqrt(count)

    @property
    def final(self) -> str:
        return f"{self.mean[-1]:.3f} ± {self.error[-1]:.3f}"

    def samples_to_reach(self, loss: float) -> float:
        """Where the mean first comes down to this loss, interpolated in log(samples); infinity if nowhere."""
        below = np.flatnonzero(self.mean <= loss)
        if not len(below):
            return math.inf
        end = below[0]
        if end == 0:
            return float(self.samples[0])
        high, low = self.mean[end - 1], self.mean[end]
        x = np.log(self.samples[end - 1 : end + 1])
        return float(np.exp(x[0] + (high - loss) / (high - low) * (x[1] - x[0])))

    def draw(self, axes: Axes, label: str) -> None:
        [line] = axes.plot(self.samples, self.mean, label=label, marker=".")
        axes.fill_between(
            self.samples, self.mean - self.error, self.mean + self.error, color=line.get_color(), alpha=0.2
        )


def curves(results: Sequence[Result], key: Callable[[Result], Any]) -> dict[Any, Curve]:
    """Curves by a property of their runs."""
    groups = defaultdict(list)
    for result in results:
        groups[key(result)].append(result["measured"])
    return {
        name: Curve(
            np.array([row["samples"] for row in runs[0]]), np.array([[r["loss"]["all"] for r in m] for m in runs])
        )
        for name, runs in groups.items()
    }


def setting(name: str) -> Callable[[Result], Any]:
    def read(result: Result) -> Any:
        value = result["run"][name]
        return tuple(value) if isinstance(value, list) else value

    return read


def panels(count: int, **settings: Any) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(5 * count, 3.8), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, **settings)[0]


def label_curves(axes: Axes) -> None:
    axes.set(xlabel="training pictures", ylabel="loss on held-out pictures", xscale="log", yscale="log")
    axes.legend()


def compare_initialization(results: Sequence[Result]) -> Finding:
    by_start = curves(results, setting("from_text"))
    scratch, from_text = by_start[False], by_start[True]
    figure, [axes] = panels(1)
    scratch.draw(axes, "LLM from scratch")
    from_text.draw(axes, "LLM from text")
    label_curves(axes)
    needed = from_text.samples_to_reach(scratch.mean[-1])
    factor = scratch.samples[-1] / needed
    rows = [f"final loss: from text {from_text.final}, from scratch {scratch.final}"]
    rows += [f"the LLM from text needs {needed:.0f} pictures for the final loss from scratch: 1 / {factor:.2f}"]
    return Finding(
        figure,
        rows,
        {
            "a text-pretrained LLM needs less multimodal data": factor > 1,
            "by a factor of more than 10": factor > 10,
        },
    )


def name_experts(experts: Sequence[str]) -> str:
    return " and ".join(experts) or "none"


def feature_gap(results: Sequence[Result]) -> np.ndarray:
    """(layers + 1,) visual features' scale over text features', of each layer's input; geometric mean over runs."""
    scales = [result["feature_scale"] for result in results]
    return np.exp(np.mean([np.log(scale["visual"]) - np.log(scale["text"]) for scale in scales], 0))


def compare_experts(results: Sequence[Result]) -> Finding:
    by_experts = curves(results, setting("experts"))
    figure, [loss_axes, gap_axes] = panels(2)
    finding = Finding(figure)
    shared, gaps = by_experts[()], {}
    for experts in EXPERTS:
        curve = by_experts[experts]
        curve.draw(loss_axes, f"visual experts: {name_experts(experts)}")
        gaps[experts] = feature_gap([result for result in results if setting("experts")(result) == experts])[:-1]
        gap_axes.plot(gaps[experts], marker=".", label=f"visual experts: {name_experts(experts)}")
        factor = curve.samples[-1] / curve.samples_to_reach(shared.mean[-1])
        ratios = " ".join(f"{gap:.2f}" for gap in gaps[experts])
        finding.rows.append(
            f"{name_experts(experts)}: final loss {curve.final}, that of none with 1 / {factor:.2f} of the pictures; "
            f"visual / text feature scale by layer: {ratios}"
        )
    label_curves(loss_axes)
    gap_axes.axhline(1, color="gray", linewidth=0.5)
    gap_axes.set(xlabel="decoder layer", ylabel="scale of visual / text features", yscale="log")
    gap_axes.legend()
    none, ffn, both = (by_experts[experts].mean[-1] for experts in EXPERTS)
    distance = {experts: float(np.abs(np.log(gap)).mean()) for experts, gap in gaps.items()}
    finding.checks = {
        "attention and FFN experts reach a lower loss than none": bool(both < none),
        "attention and FFN experts reach a lower loss than FFN experts alone": bool(both < ffn),
        "the feature scales of the modalities differ more with FFN experts alone": distance[EXPERTS[1]]
        > distance[EXPERTS[2]],
    }
    return finding


def compare_shapes(results: Sequence[Result]) -> Finding:
    by_shape = curves(results, setting("encoder"))
    figure, axes = panels(2)
    depths = [depth for depth, _ in SHAPES]
    finding, means = Finding(figure), {}
    for axis, (when, share) in zip(axes, (("early", EARLY), ("late", 1.0)), strict=True):
        column = int(np.abs(by_shape[SHAPES[0]].samples / by_shape[SHAPES[0]].samples[-1] - share).argmin())
        mean, error = (np.array([getattr(by_shape[s], name)[column] for s in SHAPES]) for name in ("mean", "error"))
        means[when] = mean
        samples = by_shape[SHAPES[0]].samples[column]
        axis.errorbar(depths, mean, error, marker="o", capsize=3)
        axis.set(
            title=f"{when}: {samples:,} pictures", xlabel="depth", ylabel="loss on held-out pictures", xscale="log"
        )
        axis.set_xticks(depths, [f"{depth} x {width}" for depth, width in SHAPES])
        values = ", ".join(f"{d}x{w} {m:.3f} ± {e:.3f}" for (d, w), m, e in zip(SHAPES, mean, error, strict=True))
        finding.rows.append(f"{when}, {samples} pictures: {values}")
    late = means["late"]
    middle = late[1:-1]
    finding.checks = {
        "late, the best shape is not the shallowest or the deepest": bool(0 < late.argmin() < len(SHAPES) - 1),
        "late, both extremes are farther from the best shape than the middle shapes are from each other": bool(
            np.ptp(middle) < min(late[0], late[-1]) - late.min()
        ),
        "early, shallow encoders are ahead of deep ones": bool(means["early"][0] < means["early"][-1]),
    }
    return finding


@dataclass
class Grid:
    """Final losses by size; parameters of the decoders, as activated, and of the encoders' blocks."""

    decoders: np.ndarray  # (D,)
    encoders: np.ndarray  # (E,)
    losses: np.ndarray  # (D, E)
    errors: np.ndarray  # (D, E)

    @classmethod
    def read(cls, results: Sequence[Result]) -> "Grid":
        by_size = curves(results, lambda result: (setting("decoder")(result), setting("encoder")(result)))
        parameters = {
            (part, setting(part)(result)): result["parameters"][part]
            for result in results
            for part in ("decoder", "encoder")
        }
        last = [[by_size[decoder, encoder] for encoder in ENCODERS] for decoder in DECODERS]
        return cls(
            np.array([parameters["decoder", size] for size in DECODERS]),
            np.array([parameters["encoder", size] for size in ENCODERS]),
            np.array([[curve.mean[-1] for curve in row] for row in last]),
            np.array([[curve.error[-1] for curve in row] for row in last]),
        )

    @property
    def rows(self) -> list[str]:
        head = "final loss, LLM by encoder parameters: " + ", ".join(f"{count:,}" for count in self.encoders)
        return [head] + [
            f"{count:,}: " + ", ".join(f"{m:.3f} ± {e:.3f}" for m, e in zip(means, errors, strict=True))
            for count, means, errors in zip(self.decoders, self.losses, self.errors, strict=True)
        ]


def slopes(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Loss per doubling of the size, between neighbors."""
    return np.diff(losses) / np.diff(np.log2(sizes))


def compare_scaling(results: Sequence[Result]) -> Finding:
    grid = Grid.read(results)
    figure, [llm_axes, encoder_axes] = panels(2, sharey=True)
    for column, size in enumerate(grid.encoders):
        llm_axes.errorbar(
            grid.decoders,
            grid.losses[:, column],
            grid.errors[:, column],
            label=f"encoder {size:,}",
            marker=".",
            capsize=2,
        )
    for row, size in enumerate(grid.decoders):
        encoder_axes.errorbar(
            grid.encoders, grid.losses[row], grid.errors[row], label=f"LLM {size:,}", marker=".", capsize=2
        )
    llm_axes.set(xlabel="activated parameters of the LLM", ylabel="loss on held-out pictures", xscale="log")
    encoder_axes.set(xlabel="parameters of the encoder", xscale="log")
    llm_axes.legend()
    encoder_axes.legend()
    llm = slopes(grid.decoders, grid.losses.mean(1))
    encoder = slopes(grid.encoders, grid.losses.mean(0))
    rows = [*grid.rows]
    rows.append("change of loss per doubling of the LLM, mean of the encoders: " + ", ".join(f"{x:+.3f}" for x in llm))
    rows.append(
        "change of loss per doubling of the encoder, mean of the LLMs: " + ", ".join(f"{x:+.3f}" for x in encoder)
    )
    checks = {
        "a larger LLM lowers the loss at every step": bool((llm < 0).all()),
        "log-linearly: the last doubling of the LLM gains at least half as much as the first": bool(
            llm[-1] < llm[0] / 2
        ),
        "a larger encoder saturates: its last doubling gains less than half of its first": bool(
            encoder[-1] > encoder[0] / 2
        ),
    }
    return Finding(figure, rows, checks)


def optimal_encoder(sizes: np.ndarray, losses: np.ndarray) -> float:
    """The smallest size whose doubling gains less than GAIN of the smallest encoder's loss; the largest, if none.

    Losses between the measured sizes are interpolated in log(size); the size is one of 200 between them.
    """
    x = np.log2(sizes)
    candidates = np.linspace(x[0], x[-1] - 1, 200)
    gains = np.interp(candidates, x, losses) - np.interp(candidates + 1, x, losses)
    good = np.flatnonzero(gains < GAIN * losses[0])
    return float(2 ** candidates[good[0]]) if len(good) else math.inf


def compare_encoder_sizes(results: Sequence[Result]) -> Finding:
    grid = Grid.read(results)
    best = np.array([optimal_encoder(grid.encoders, losses) for losses in grid.losses])
    figure, [axes] = panels(1)
    rows = [f"LLM {llm:,}: encoder {size:,.0f}" for llm, size in zip(grid.decoders, best, strict=True)]
    found = np.isfinite(best)
    axes.plot(grid.decoders[found], best[found], "o", label="smallest whose doubling gains < 1 %")
    law = np.array([auto_vision_size(count) for count in grid.decoders])
    law_slope = float(np.polyfit(np.log(grid.decoders), np.log(law), 1)[0])
    slope = math.nan
    if found.sum() > 1:
        slope, offset = np.polyfit(np.log(grid.decoders[found]), np.log(best[found]), 1)
        axes.plot(grid.decoders, np.exp(offset) * grid.decoders**slope, "--", label=f"fit, slope {slope:.2f}")
    axes.plot(grid.decoders, law, ":", label=f"--vision-size auto, slope {law_slope:.2f}")
    axes.set(
        xlabel="activated parameters of the LLM", ylabel="parameters of the optimal encoder", xscale="log", yscale="log"
    )
    axes.legend()
    rows.append(f"slope on logarithmic axes: {slope:.2f}; of --vision-size auto: {law_slope:.2f}")
    return Finding(figure, rows, {"the optimal encoder grows with the LLM": bool(slope > 0)})


ANALYSES: dict[str, Callable[[Sequence[Result]], Finding]] = {
    "initialization": compare_initialization,
    "experts": compare_experts,
    "shape": compare_shapes,
    "scaling": compare_scaling,
    "encoder-size": compare_encoder_sizes,
}
