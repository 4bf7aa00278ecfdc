"""The runs that each of the paper's observations needs (arXiv 2510.08565, section 3; sizes are (depth, width))."""

from collections.abc import Callable, Sequence
from itertools import product

from .run import Run

DECODERS = ((3, 32), (3, 64), (3, 96), (3, 160))
ENCODERS = ((2, 16), (2, 32), (2, 48), (2, 80), (2, 128))
SHAPES = ((1, 96), (2, 64), (4, 48), (8, 32), (32, 16))  # encoders of about 100,000 parameters
EXPERTS = ((), ("ffn",), ("attention", "ffn"))
MIDDLE = {"decoder": (3, 96), "encoder": (2, 48)}


def llm_initialization(seeds: Sequence[int]) -> list[Run]:
    return [Run(**MIDDLE, from_text=from_text, seed=seed) for seed in seeds for from_text in (True, False)]


def modality_experts(seeds: Sequence[int]) -> list[Run]:
    return [Run(**MIDDLE, experts=experts, seed=seed) for seed in seeds for experts in EXPERTS]


def encoder_shape(seeds: Sequence[int]) -> list[Run]:
    return [Run(decoder=(3, 64), encoder=shape, seed=seed) for seed in seeds for shape in SHAPES]


def grid_of_sizes(seeds: Sequence[int]) -> list[Run]:
    return [Run(*sizes, seed=seed) for seed in seeds for sizes in product(DECODERS, ENCODERS)]


RUNS: dict[str, Callable[[Sequence[int]], list[Run]]] = {
    "initialization": llm_initialization,
    "experts": modality_experts,
    "shape": encoder_shape,
    "scaling": grid_of_sizes,
    "encoder-size": grid_of_sizes,
}
"""By observation, in the paper's order. The last two share their runs."""
