"""Where the time of a forward goes on a GPU: how long kernels run, how many, and how often the host waits for them.

    python -m benchmarks.profiling --device cuda --dtype bfloat16 --size 2b

A forward whose kernels run for much less than it takes is bound by the host that starts them.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from navil import modeling_navil as modeling

from . import baselines, run
from .timing import seconds, synchronize

GRAPH_START = "cudaGraphLaunch"
WAIT = {"cuda": "cudaStreamSynchronize", "cpu": "aten::_local_scalar_dense"}
WARMUPS, ROUNDS = 3, 5
PHOTO = (1920, 1080)
LENGTH, CONTEXT = 4096, 1024  # tokens of prefill, of decoding

Work = Callable[[], Any]


@dataclass
class Profile:
    """One call: seconds in all, seconds that its kernels ran, their number, CUDA graphs started as one, host waits, and
    the kernels that took most."""

    wall: float
    busy: float
    num_kernels: int
    num_graphs: int
    num_waits: int
    longest: list[tuple[str, float]]


def measure(work: Work, device: torch.device, top: int = 3) -> Profile:
    """On a CPU, torch's operations stand for kernels."""
    for _ in range(WARMUPS):
        work()
    wall = statistics.median(seconds(work, device) for _ in range(ROUNDS))
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities) as profiler:
        work()
        synchronize(device)
    rows = profiler.key_averages()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = [
        (row.key, (row.self_device_time_total if on_gpu else row.self_cpu_time_total) / 1e6, row.count)
        for row in rows
        if row.device_type == kind and not row.is_user_annotation
    ]
    return Profile(
        wall=wall,
        busy=sum(time for _, time, _ in kernels),
        num_kernels=sum(count for *_, count in kernels),
        num_graphs=sum(row.count for row in rows if row.key == GRAPH_START),
        num_waits=sum(row.count for row in rows if row.key == WAIT[device.type]),
        longest=[(name, time) for name, time, _ in sorted(kernels, key=lambda kernel: -kernel[1])[:top]],
    )


def attention_cases(bench: run.Bench) -> Iterator[tuple[str, Work]]:
    """The encoder's attention alone, on a photo's segments, by each of torch's kernels."""
    vision = bench.config.vision_config
    patches, grids = bench.patches(PHOTO)
    layout = modeling.PackedLayout.build(grids.tolist(), vision, bench.device)
    shape = (3, len(patches), vision.num_attention_heads, vision.head_dim)
    heads = torch.randn(shape, device=bench.device, dtype=bench.dtype)

    def attend(function: Callable) -> Any:
        return function(*heads, layout.segments, vision.head_dim**-0.5)

    def by_backend(backend: SDPBackend) -> Any:
        with sdpa_kernel(backend):
            return attend(modeling.segment_attention_sdpa)

    if modeling.varlen_attn is not None and bench.device.type == "cuda":
        yield "attention, varlen", partial(attend, modeling.segment_attention_varlen)
    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if bench.device.type == "cuda":
        backends["cuDNN"] = SDPBackend.CUDNN_ATTENTION
    for name, backend in backends.items():
        yield f"attention, {name} by run", partial(by_backend, backend)


def vision_cases(bench: run.Bench) -> Iterator[tuple[str, Work]]:
    model = bench.build(modeling.NaViLForConditionalGeneration, run.vision_only(bench.config))
    patches, grids = bench.patches(PHOTO)
    work = partial(model.get_image_features, patches, grids)
    yield "vision", work
    run.compile_encoder(model)
    yield "vision, compiled", work


def prefill_cases(bench: run.Bench) -> Iterator[tuple[str, Work]]:
    model = bench.build(modeling.NaViLForConditionalGeneration, run.text_only(bench.config))
    ids, visual = run.mixed_tokens(bench, LENGTH)
    work = partial(model, ids, visual_token_mask=visual, logits_to_keep=1)
    yield "prefill", work
    run.compile_prefill(model)
    yield "prefill, compiled", work


def decode_cases(bench: run.Bench) -> Iterator[tuple[str, Work]]:
    config = bench.config.text_config
    builders = {
        "NaViL": lambda: bench.build(modeling.NaViLForConditionalGeneration, run.text_only(bench.config)),
        "Qwen3": lambda: baselines.plain_llm(config, bench.device, bench.dtype),
    }
    for (name, build), tuned in product(builders.items(), (False, True)):
        model = run.compile_decoder(build(), tuned)
        case = f"decode {run.TOKENS_PER_TIMING[bench.device.type]} tokens, {name}, compiled{' and tuned' * tuned}"
        yield case, run.decode_step(bench, model, config, "static", 1, CONTEXT)


CASES = {"attention": attention_cases, "vision": vision_cases, "prefill": prefill_cases, "decode": decode_cases}


def as_markdown(name: str, row: Profile) -> str:
    longest = ", ".join(f"{key[:60]} {run.duration(time)}" for key, time in row.longest).replace("|", "/")
    times = f"{run.duration(row.wall)} | {run.duration(row.busy)}"
    return f"| {name} | {times} | {row.num_kernels} | {row.num_graphs} | {row.num_waits} | {longest} |"


HEADER = "| case | time | kernels run | kernels | graphs | host waits | longest |\n|---|---|---|---|---|---|---|"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Profile forwards: kernels, their time, and what the host waits for.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--size", choices=run.SIZES, default="small", help="(%(default)s)")
    parser.add_argument("--case", choices=CASES, action="append", help="these alone; repeatable")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    bench = run.Bench(run.SIZES[options.size](), device, dtype, ROUNDS)
    print(HEADER)
    with torch.no_grad():
        for case in options.case or CASES:
            for name, work in CASES[case](bench):
                print(as_markdown(name, measure(work, device)), flush=True)
            run.release(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
