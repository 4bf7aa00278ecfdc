"""Draws how NaViL works, examples/architecture.svg.

python examples/architecture.py
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TEXT, VISUAL, SHARED = "#dbe9f9", "#fde3c8", "#eeeeee"  # text experts, visual experts, both
INK = "#333333"


def box(axes: Axes, x: float, y: float, width: float, height: float, label: str, color: str, size: float = 8.5) -> None:
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=0.9))
    axes.text(
        x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=size, color=INK, linespacing=1.35
    )


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=INK, linewidth=0.9))


def draw_input(axes: Axes) -> None:
    for index, side in enumerate((1.3, 0.92, 0.65)):  # scales, each 0.7071 times the one before
        x = (0.3, 1.9, 3.1)[index]
        axes.add_patch(plt.Rectangle((x, 0.3), side, side, facecolor=VISUAL, edgecolor=INK, linewidth=0.9))
        for line in range(1, round(side / 0.325)):
            axes.plot([x, x + side], [0.3 + line * 0.325] * 2, color=INK, linewidth=0.4)
            axes.plot([x + line * 0.325] * 2, [0.3, 0.3 + side], color=INK, linewidth=0.4)
    axes.text(2.0, 0.05, "picture at several scales, 16 x 16 patches", ha="center", va="top", fontsize=8, color=INK)
    arrow(axes, (2.0, 1.75), (2.0, 2.2))
    box(axes, 0.3, 2.2, 3.4, 1.1, "vision encoder\nViT, 2D RoPE, attention\ninside each scale", VISUAL)
    arrow(axes, (2.0, 3.3), (2.0, 3.7))
    box(axes, 0.3, 3.7, 3.4, 0.8, "connector:\n2 x 2 patches, one token", VISUAL)
    axes.text(5.6, 0.05, "question", ha="center", va="top", fontsize=8, color=INK)
    box(axes, 4.7, 0.3, 1.8, 0.7, "<img> ... </img>\nWhat is it?", TEXT, 8)
    arrow(axes, (5.6, 1.0), (5.6, 3.7))
    box(axes, 4.7, 3.7, 1.8, 0.8, "embedding", TEXT)


def draw_tokens(axes: Axes) -> None:
    arrow(axes, (2.0, 4.5), (2.5, 5.0))
    arrow(axes, (5.6, 4.5), (4.7, 5.0))
    colors = [TEXT, *[VISUAL] * 6, TEXT, *[VISUAL] * 3, TEXT, TEXT, TEXT, TEXT]
    for index, color in enumerate(colors):
        box(axes, 0.55 + index * 0.4, 5.0, 0.34, 0.34, "", color)
    axes.text(3.55, 5.55, "one sequence, text and visual tokens", ha="center", va="bottom", fontsize=8, color=INK)
    arrow(axes, (6.65, 5.17), (7.6, 5.17))


def draw_decoder(axes: Axes) -> None:
    axes.add_patch(
        FancyBboxPatch(
            *((7.6, 0.1), 5.6, 6.5),
            boxstyle="round,pad=0,rounding_size=0.15",
            facecolor="white",
            edgecolor=INK,
            linewidth=1.2,
        )
    )
    axes.text(10.4, 6.35, "decoder layer, repeated", ha="center", va="center", fontsize=9, color=INK)
    rows = [
        (5.55, "RMSNorm", None),
        (4.45, "q, k, v of\ntext tokens", "q, k, v of\nvisual tokens"),
        (3.45, "causal attention over all tokens, 1D RoPE", None),
        (2.45, "output projection\nof text", "output projection\nof visual"),
        (1.55, "RMSNorm", None),
        (0.4, "FFN of text", "FFN of visual"),
    ]
    for y, left, right in rows:
        height = 0.5 if right is None else 0.72
        if right is None:
            box(axes, 7.95, y, 4.9, height, left, SHARED)
        else:
            box(axes, 7.95, y, 2.3, height, left, TEXT)
            box(axes, 10.55, y, 2.3, height, right, VISUAL)
    bottoms = [row[0] for row in rows]
    tops = [y + (0.5 if right is None else 0.72) for y, _, right in rows]
    for bottom, top in zip(bottoms, tops[1:], strict=False):
        for x in (9.1, 11.7):
            arrow(axes, (x, bottom), (x, top))
    arrow(axes, (13.2, 0.76), (13.75, 0.76))
    box(axes, 13.75, 0.4, 1.2, 0.72, "norm,\nlm_head", SHARED)
    arrow(axes, (14.35, 1.12), (14.35, 1.9))
    axes.text(14.35, 2.05, "answer", ha="center", va="bottom", fontsize=9, color=INK)
    for y, color, label in ((5.9, TEXT, "text"), (5.4, VISUAL, "visual"), (4.9, SHARED, "shared")):
        box(axes, 13.45, y, 0.3, 0.3, "", color)
        axes.text(13.9, y + 0.15, label, va="center", fontsize=8, color=INK)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Draw the architecture figure.", epilog="example: python examples/architecture.py --output a.png"
    )
    output = Path(__file__).with_suffix(".svg")
    parser.add_argument("--output", type=Path, default=output, metavar="FILE", help="an .svg or .png (default: beside)")
    options = parser.parse_args(arguments)
    matplotlib.rcParams["svg.hashsalt"] = "navil"  # the same file every time
    figure, axes = plt.subplots(figsize=(11, 5))
    draw_input(axes)
    draw_tokens(axes)
    draw_decoder(axes)
    axes.set_xlim(0, 15.2)
    axes.set_ylim(-0.35, 6.75)
    axes.axis("off")
    metadata = {"Date": None} if options.output.suffix == ".svg" else None
    figure.savefig(options.output, bbox_inches="tight", facecolor="white", metadata=metadata, dpi=90)
    return 0


if __name__ == "__main__":
    sys.exit(main())
