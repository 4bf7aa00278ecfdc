"""What is fast on this machine: the dtype of training, and an attention for CPUs with bf16 units."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import benchmark
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from navil.modeling_navil import (
    SEGMENT_ATTENTION_FUNCTIONS,
    Segments,
    decoder_attention_eager,
    segment_attention_eager,
)

# On a CPU with bf16 units the backward pass of torch's fused attention takes several times as long as plain matrix
# products. oneDNN takes milliseconds to prepare a product of a new shape, so this attention batches segments in powers
# of two, whose shapes repeat, and the cache of prepared products is large. In float32 fused attention is faster.
CPU_BF16_ATTENTION = "cpu_bf16"
ONEDNN_CACHE = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "5000")


@torch.compiler.disable  # a compiled graph would be specialized to these lengths
def segment_attention_cpu_bf16(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *settings: Any, **options: Any
) -> Tensor:
    """As `segment_attention_eager`, with runs of equal segments split into runs of 2**n."""
    runs = [
        (1 << bit, length) for count, length in segments.runs for bit in range(count.bit_length()) if count >> bit & 1
    ]
    return segment_attention_eager(query, key, value, replace(segments, runs=runs), *settings, **options)


ALL_ATTENTION_FUNCTIONS[CPU_BF16_ATTENTION] = torch.compiler.disable(decoder_attention_eager)
SEGMENT_ATTENTION_FUNCTIONS[CPU_BF16_ATTENTION] = segment_attention_cpu_bf16


def faster_dtype(device: str) -> torch.dtype:
    """bf16 or float32, whichever multiplies matrices faster: without bf16 units bf16 can be a hundred times slower."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        timer = benchmark.Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
        seconds[dtype] = timer.timeit(5).median
    return min(seconds, key=seconds.get)


def faster_attention(device: str, dtype: torch.dtype) -> str:
    """The `attn_implementation` for training."""
    return CPU_BF16_ATTENTION if device == "cpu" and dtype == torch.bfloat16 else "sdpa"
