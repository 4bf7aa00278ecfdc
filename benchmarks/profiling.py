"""Profiles of forward passes: kernel time, number of kernels, and host syncs.

    python -m benchmarks.profiling --device cuda --dtype bfloat16 --size 2b

A pass whose kernels run for much less than its wall time is bound by the host that launches them.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from navil import modeling_navil

from . import baselines
from .roofline import elapsed, synchronize
from .run import Call, duration
from .workloads import (
    DECODE_TOKENS,
    Setup,
    add_setup_options,
    compile_decoder,
    compile_encoder,
    compile_prefill,
    decode_step,
    free_memory,
    text_only,
    vision_only,
)

GRAPH_LAUNCH = "cudaGraphLaunch"
HOST_SYNC = {"cuda": "cudaStreamSynchronize", "cpu": "aten::_local_scalar_dense"}
WARMUPS, ROUNDS = 3, 5
PHOTO = (1920, 1080)
LENGTH, CONTEXT = 4096, 1024  # tokens of prefill, of decoding


@dataclass
class Profile:
    """One call. Times are in seconds; `longest` has the kernels that took the most time."""

    wall_time: float
    kernel_time: float
    num_kernels: int
    num_graphs: int
    num_syncs: int
    longest: list[tuple[str, float]]


def measure(call: Call, device: torch.device, top: int = 3) -> Profile:
    """Profiles a call; on a CPU, torch's operators count as kernels."""
    for _ in range(WARMUPS):
        call()
    wall_time = statistics.median(elapsed(call, device) for _ in range(ROUNDS))
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        call()
        synchronize(device)
    events = profiler.key_averages()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = [event for event in events if event.device_type == kind and not event.is_user_annotation]
    times = [
        (event.key, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6) for event in kernels
    ]
    return Profile(
        wall_time=wall_time,
        kernel_time=sum(seconds for _, seconds in times),
        num_kernels=sum(event.count for event in kernels),
        num_graphs=sum(event.count for event in events if event.key == GRAPH_LAUNCH),
        num_syncs=sum(event.count for event in events if event.key == HOST_SYNC[device.type]),
        longest=sorted(times, key=lambda kernel: -kernel[1])[:top],
    )


# -- Cases -------------------------------------------------------------------------------------------------------------


def attention_cases(setup: Setup) -> Iterator[tuple[str, Call]]:
    """The encoder's attention over a photo's segments, by each of torch's kernels."""
    vision = setup.config.vision_config
    patches, grids = setup.patches(PHOTO)
    segments = modeling_navil.PackedLayout.build(grids.tolist(), vision, setup.device).segments
    shape = (3, len(patches), vision.num_attention_heads, vision.head_dim)
    heads = torch.randn(shape, device=setup.device, dtype=setup.dtype)

    def attend(function: Callable[..., Tensor]) -> Tensor:
        return function(*heads, segments, vision.head_dim**-0.5)

    def attend_by(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return attend(modeling_navil.segment_attention_sdpa)

    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if setup.device.type == "cuda":
        backends["cuDNN"] = SDPBackend.CUDNN_ATTENTION
        if modeling_navil.varlen_attn is not None:
            yield "attention, varlen", partial(attend, modeling_navil.segment_attention_varlen)
    for name, backend in backends.items():
        yield f"attention, {name}, batched by length", partial(attend_by, backend)


def vision_cases(setup: Setup) -> Iterator[tuple[str, Call]]:
    model = setup.build(vision_only(setup.config))
    call = partial(model.get_image_features, *setup.patches(PHOTO))
    yield "vision", call
    compile_encoder(model)
    yield "vision, compiled", call


def prefill_cases(setup: Setup) -> Iterator[tuple[str, Call]]:
    model = setup.build(text_only(setup.config))
    ids, visual = setup.mixed_tokens(LENGTH)
    call = partial(model, ids, visual_token_mask=visual, logits_to_keep=1)
    yield "prefill", call
    compile_prefill(model)
    yield "prefill, compiled", call


def decode_cases(setup: Setup) -> Iterator[tuple[str, Call]]:
    builders = {
        "NaViL": lambda: setup.build(text_only(setup.config)),
        "Qwen3": lambda: baselines.plain_llm(setup.config.text_config, setup.device, setup.dtype),
    }
    num_tokens = DECODE_TOKENS[setup.device.type]
    for (name, build), tuned in product(builders.items(), (False, True)):
        model = compile_decoder(build(), tuned)
        case = f"decode {num_tokens} tokens, {name}, compiled{' and tuned' * tuned}"
        yield case, decode_step(setup, model, "static", 1, CONTEXT)


CASES = {"attention": attention_cases, "vision": vision_cases, "prefill": prefill_cases, "decode": decode_cases}

# -- Report ------------------------------------------------------------------------------------------------------------

HEADER = "| case | wall time | kernel time | kernels | graphs | host syncs | longest |\n|---|---|---|---|---|---|---|"


def as_table_row(case: str, row: Profile) -> str:
    longest = ", ".join(f"{name[:60]} {duration(seconds)}" for name, seconds in row.longest).replace("|", "/")
    times = f"{duration(row.wall_time)} | {duration(row.kernel_time)}"
    return f"| {case} | {times} | {row.num_kernels} | {row.num_graphs} | {row.num_syncs} | {longest} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Profile forward passes: kernel time, number of kernels, and host syncs.",
        epilog="example: python -m benchmarks.profiling --size small --case vision",
    )
    add_setup_options(parser)
    parser.add_argument("--case", choices=CASES, action="append", help="one case only; repeatable")
    options = parser.parse_args(arguments)
    setup = Setup.from_options(options)
    print(HEADER)
    with torch.no_grad():
        for name in options.case or CASES:
            for case, call in CASES[name](setup):
                print(as_table_row(case, measure(call, setup.device)), flush=True)
            free_memory(setup.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
