"""Roofline: the machine's measured peak rates, a model's analytic FLOPs and bytes, and what a model size needs.

    python -m benchmarks.roofline                             # this machine's peak rates, and decoding speed at them
    python -m benchmarks.roofline --bandwidth 50 2908 4296    # decoding speed at given memory bandwidths, in GB/s

A multiply-add counts as two FLOPs. Norms, activation functions, rotary embeddings and softmax are not counted, so a
time computed from these counts is a lower bound.
"""

import argparse
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from navil.configuration_navil import NaViLConfig, NaViLTextConfig
from navil.image_processing_navil import NaViLImageProcessor, count_slot_tokens
from navil.modeling_navil import NaViLForConditionalGeneration

from .workloads import SIZES, Size, on_device

# -- Measured peaks ----------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, its kernels included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


@dataclass(frozen=True)
class PeakProbe:
    """A call of a known amount of work (FLOPs or bytes) that runs at the machine's peak rate."""

    amount: float
    call: Callable[[], object]

    def rate(self, device: torch.device) -> float:
        """Amount per second, the median of five calls."""
        self.call()
        return self.amount / statistics.median(elapsed(self.call, device) for _ in range(5))


def matmul_probe(device: torch.device, dtype: torch.dtype) -> PeakProbe:
    """Large matrix products, of the side that runs at the higher rate; the amount is in FLOPs."""
    sides = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    return max((square_matmul(side, device, dtype) for side in sides), key=lambda probe: probe.rate(device))


def square_matmul(side: int, device: torch.device, dtype: torch.dtype) -> PeakProbe:
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    repeats = max(1, round((2e13 if device.type == "cuda" else 5e10) / (2 * side**3)))

    def call() -> None:
        for _ in range(repeats):
            a @ b

    return PeakProbe(2 * side**3 * repeats, call)


def bandwidth_probe(device: torch.device) -> PeakProbe:
    """The dot product of two vectors far larger than any cache; the amount is in bytes read."""
    x, y = torch.ones(2, 2**28 // (1 if device.type == "cuda" else 2), device=device)
    return PeakProbe(2 * x.nbytes, lambda: x @ y)


def device_name(device: torch.device) -> str:
    """The GPU, or the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {torch.get_num_threads()} threads"


# -- Analytic FLOPs and bytes ------------------------------------------------------------------------------------------


def vision_flops(config: NaViLConfig, grids: Sequence[Sequence[int]]) -> float:
    """Encoder (every block attends over whole segments) and connector.

    Args:
        grids: (frames, rows, columns) of each scale of each image, in patches.
    """
    vision = config.vision_config
    lengths = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
    width, hidden = vision.hidden_size, config.text_config.hidden_size
    per_block = 4 * width**2 + 2 * width * vision.intermediate_size
    per_patch = vision.patch_dim * width + vision.num_hidden_layers * per_block
    attention = vision.num_hidden_layers * 2 * width * sum(length**2 for length in lengths)
    per_cell = vision.merged_dim * hidden + hidden**2
    return 2 * (sum(lengths) * (per_patch + per_cell / vision.spatial_merge_size**2) + attention)


def expert_weights(config: NaViLTextConfig) -> int:
    """Matrix parameters of all layers that one token uses: those of one modality."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.num_hidden_layers * config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def head_weights(config: NaViLTextConfig) -> int:
    return config.vocab_size * config.hidden_size


def prefill_flops(config: NaViLTextConfig, length: int, logits: int = 1) -> float:
    """The decoder on `length` tokens of either modality, causal, with logits of `logits` of them."""
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length**2  # half of 2 * L^2
    return 2 * (expert_weights(config) * length + attention + head_weights(config) * logits)


def decode_flops(config: NaViLTextConfig, batch: int, context: int) -> float:
    """One decoding step."""
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
    return 2 * batch * (expert_weights(config) + head_weights(config) + attention)


def decode_bytes(config: NaViLTextConfig, batch: int, context: int, dtype: torch.dtype) -> float:
    """Bytes that one decoding step reads: text experts, output head, keys and values."""
    weights = (expert_weights(config) + head_weights(config)) * dtype.itemsize
    return weights + batch * cache_bytes(config, context, dtype)


def cache_bytes(config: NaViLTextConfig, tokens: int, dtype: torch.dtype) -> int:
    """Keys and values of one sequence."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens * dtype.itemsize


def vision_activation_bytes(config: NaViLConfig, patches: int, dtype: torch.dtype) -> int:
    """Least memory of an encoder's forward pass, in its widest layer.

    That is the pixels, the residual stream, and input and output of the activation function.
    """
    vision = config.vision_config
    return patches * (vision.patch_dim + vision.hidden_size + 2 * vision.intermediate_size) * dtype.itemsize


def count_parameters(config: NaViLConfig) -> tuple[int, int]:
    """Parameters in total, and activated: those that a token of either modality and the encoder use."""
    model = on_device(lambda: NaViLForConditionalGeneration._from_config(config), torch.device("meta"))
    total = sum(parameter.numel() for parameter in model.parameters())
    visual = sum(parameter.numel() for name, parameter in model.named_parameters() if ".visual." in name)
    return total, total - visual


# -- What a model size needs -------------------------------------------------------------------------------------------

CONTEXT, TEXT_TOKENS = 4096, 60
PHOTOS = ((451, 300), (640, 480), (1024, 768), (1920, 1080), (4000, 3000))
ACTIVATION_FACTOR = 2.5
"""The encoder's peak memory over `vision_activation_bytes`, at most: `benchmarks.memory` measures 1.2 to 2.2."""


@dataclass(frozen=True)
class PhotoWork:
    """What a photo and 60 tokens of text cost up to the first token of the answer, in bf16."""

    patches: int  # of all scales
    tokens: int  # of the prompt
    encoder_flops: float
    prefill_flops: float
    activation_bytes: float  # of the encoder, which needs more than the decoder

    @classmethod
    def of(cls, config: NaViLConfig, photo: Size) -> "PhotoWork":
        processor = NaViLImageProcessor.from_config(config)
        [plan] = processor.plan(Image.new("1", photo), multi_scale=True)
        grids = [
            [1, *(processor.merge_size * math.ceil(side / processor.cell) for side in scale)] for scale in plan.scales
        ]
        patches = sum(math.prod(grid) for grid in grids)
        tokens = count_slot_tokens(plan.scales, processor.cell) + TEXT_TOKENS
        return cls(
            patches=patches,
            tokens=tokens,
            encoder_flops=vision_flops(config, grids),
            prefill_flops=prefill_flops(config.text_config, tokens),
            activation_bytes=ACTIVATION_FACTOR * vision_activation_bytes(config, patches, torch.bfloat16),
        )


def requirements(config: NaViLConfig, bandwidths: Sequence[float]) -> dict[str, str]:
    """Label to value: parameters and memory in bf16, and the decoding speed that bandwidths, in GB/s, allow."""
    text, dtype = config.text_config, torch.bfloat16
    total, activated = count_parameters(config)
    weights = total * dtype.itemsize
    memory = weights + cache_bytes(text, CONTEXT, dtype) + PhotoWork.of(config, (1024, 768)).activation_bytes
    bytes_per_token = decode_bytes(text, 1, CONTEXT, dtype)
    rows = {
        "parameters": f"{total / 1e9:.2f} B",
        "activated parameters": f"{activated / 1e9:.2f} B",
        "weights, on disk and in memory": f"{weights / 1e9:.1f} GB",
        "KV cache of 1,000 tokens": f"{cache_bytes(text, 1000, dtype) / 1e6:.0f} MB",
        f"memory with {CONTEXT} tokens, one 1024x768 photo": f"{memory / 1e9:.1f} GB",
        f"bytes read per decoded token, {CONTEXT} tokens": f"{bytes_per_token / 1e9:.2f} GB",
    }
    speeds = {
        f"decoding at {bandwidth:g} GB/s, at most": f"{1e9 * bandwidth / bytes_per_token:.1f} tokens/s"
        for bandwidth in bandwidths
    }
    return rows | speeds


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def size_table(sizes: Sequence[str], bandwidths: Sequence[float]) -> str:
    columns = [requirements(SIZES[size](), bandwidths) for size in sizes]
    return as_markdown(
        ["computed, bf16", *sizes], [[label, *(column[label] for column in columns)] for label in columns[0]]
    )


def photo_table(sizes: Sequence[str]) -> str:
    header = ["photo", "patches", "prompt tokens"]
    header += [f"{size}: {what}" for size in sizes for what in ("encoder + prefill FLOPs", "activations")]
    rows = []
    for photo in PHOTOS:
        works = [PhotoWork.of(SIZES[size](), photo) for size in sizes]
        row = [f"{photo[0]}x{photo[1]}", str(works[0].patches), str(works[0].tokens)]
        for work in works:
            row.append(f"{work.encoder_flops / 1e12:.1f}e12 + {work.prefill_flops / 1e12:.1f}e12")
            row.append(f"{work.activation_bytes / 1e9:.2f} GB")
        rows.append(row)
    return as_markdown(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure peak rates; print what model sizes need, and the decoding speed that bandwidth allows.",
        epilog="example: python -m benchmarks.roofline --bandwidth 50 2908 4296",
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["2b", "9b"], help="(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument(
        "--bandwidth", type=float, nargs="+", metavar="GB/S", help="memory bandwidths; without it, this machine's"
    )
    options = parser.parse_args(arguments)
    bandwidths = options.bandwidth
    if bandwidths is None:
        device = torch.device(options.device)
        print(f"{device_name(device)}:")
        for dtype in (torch.float32, torch.bfloat16):
            rate = matmul_probe(device, dtype).rate(device)
            print(f"- matmul, {str(dtype).removeprefix('torch.')}: {rate / 1e9:.0f} GFLOP/s")
        bandwidths = [round(bandwidth_probe(device).rate(device) / 1e9, 1)]
        print(f"- memory: {bandwidths[0]} GB/s\n")
    print(size_table(options.sizes, bandwidths), photo_table(options.sizes), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
