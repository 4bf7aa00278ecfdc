"""What a machine can do at best, measured, and how much a model asks of it, counted from its config.

A multiplication with its addition counts as two operations. Norms, activations, rotations and softmax are not counted:
a time implied by these counts is a floor, not a forecast.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from navil import configuration_navil as configuration

from .timing import seconds


@dataclass(frozen=True)
class Yardstick:
    """Work of a known amount (operations or bytes) that a machine does as fast as it can."""

    amount: float
    work: Callable[[], object]

    def rate(self, device: torch.device) -> float:
        """Amount per second, the median of several runs."""
        self.work()
        return self.amount / statistics.median(seconds(self.work, device) for _ in range(5))


def products(device: torch.device, dtype: torch.dtype) -> Yardstick:
    """Operations of large matrix products, of the size that runs at the higher rate."""
    sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    return max((_products(size, device, dtype) for size in sizes), key=lambda yardstick: yardstick.rate(device))


def _products(size: int, device: torch.device, dtype: torch.dtype) -> Yardstick:
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    repeats = max(1, round((2e13 if device.type == "cuda" else 5e10) / (2 * size**3)))

    def work() -> None:
        for _ in range(repeats):
            a @ b

    return Yardstick(2 * size**3 * repeats, work)


def reads(device: torch.device) -> Yardstick:
    """Bytes read by the dot product of two vectors far larger than any cache."""
    x, y = torch.ones(2, 2**28 // (1 if device.type == "cuda" else 2), device=device)
    return Yardstick(2 * x.nbytes, lambda: x @ y)


def vision_operations(config: configuration.NaViLConfig, grids: Sequence[Sequence[int]]) -> float:
    """Encoder (every block over whole segments) and connector on grids of (frames, rows, columns) patches."""
    vision = config.vision_config
    lengths = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
    width, hidden = vision.hidden_size, config.text_config.hidden_size
    per_patch = vision.patch_dim * width + vision.num_hidden_layers * (
        4 * width**2 + 2 * width * vision.intermediate_size
    )
    attention = vision.num_hidden_layers * 2 * width * sum(length**2 for length in lengths)
    per_cell = vision.merged_dim * hidden + hidden**2
    return 2 * (sum(lengths) * (per_patch + per_cell / vision.spatial_merge_size**2) + attention)


def _layer_parameters(config: configuration.NaViLTextConfig) -> int:
    """Matrix parameters of one layer that one token meets."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def prefill_operations(config: configuration.NaViLTextConfig, length: int, logits: int = 1) -> float:
    """The decoder on `length` tokens of whatever modality, causal, with logits of `logits` of them."""
    linear = config.num_hidden_layers * _layer_parameters(config) * length
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length**2  # half of 2 * L^2
    return 2 * (linear + attention + config.vocab_size * config.hidden_size * logits)


def decode_bytes(config: configuration.NaViLTextConfig, batch: int, context: int, dtype: torch.dtype) -> float:
    """Bytes that one decoding step has to read: the text experts, the head, the keys and values."""
    weights = config.num_hidden_layers * _layer_parameters(config) + config.vocab_size * config.hidden_size
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * batch * context
    return (weights + cache) * dtype.itemsize


def decode_operations(config: configuration.NaViLTextConfig, batch: int, context: int) -> float:
    weights = config.num_hidden_layers * _layer_parameters(config) + config.vocab_size * config.hidden_size
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
    return 2 * batch * (weights + attention)
