"""Times NaViL, baselines and the machine's peak rates, in interleaved rounds.

    python -m benchmarks.run --size small
    python -m benchmarks.run --device cuda --dtype bfloat16 --size 2b

Runs are interleaved in one process, so drift affects all equally, and medians of the ratios within a round are printed.
The roofline time of a row is its FLOPs (for decoding: its bytes) over the peak rate measured in the same round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

from navil import ROOT
from navil.configuration_navil import NaViLConfig
from navil.image_processing_navil import NaViLImageProcessor

from . import baselines, roofline
from .workloads import (
    DECODE_TOKENS,
    EXAMPLE_PHOTO,
    Setup,
    add_setup_options,
    compile_decoder,
    compile_encoder,
    compile_prefill,
    decode_step,
    free_memory,
    not_compiled,
    photo,
    text_only,
    vision_only,
)

PHOTO_SIZES = ((640, 480), (1024, 768), (1920, 1080), (4000, 3000))
VISION_CASES = ((1, PHOTO_SIZES[0]), (1, PHOTO_SIZES[1]), (4, PHOTO_SIZES[0]), (1, PHOTO_SIZES[2]), (1, PHOTO_SIZES[3]))
"""Photos in a batch, and their size."""

Call = Callable[[], object]


@dataclass
class Row:
    """One measurement.

    `seconds` is a median. `speedups` are each baseline's time over NaViL's, `roofline_fraction` is the roofline time
    over NaViL's; both are medians over rounds.
    """

    part: str
    case: str
    seconds: float
    speedups: dict[str, float]
    roofline_seconds: float | None = None
    roofline_fraction: float | None = None


# -- Timing ------------------------------------------------------------------------------------------------------------


def time_interleaved(candidates: Mapping[str, Call], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one warm-up round.

    Every second round runs them in reverse order, so that none always follows the same other one.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name in list(candidates) if number % 2 else reversed(candidates):
            seconds = roofline.elapsed(candidates[name], device)
            if number > 0:
                times[name].append(seconds)
    return times


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


@dataclass
class Benchmark(Setup):
    """A setup, and how its rows are measured."""

    rounds: int = 5
    compiles: bool = False

    @cached_property
    def probes(self) -> dict[str, roofline.PeakProbe]:
        return {
            "FLOPs": roofline.matmul_probe(self.device, self.dtype),
            "bytes": roofline.bandwidth_probe(self.device),
        }

    def measure(
        self,
        part: str,
        case: str,
        candidate: Call,
        others: Mapping[str, Call] | None = None,
        work: Mapping[str, float] | None = None,
        repeats: int = 1,
    ) -> Row:
        """Times a candidate, its baselines and the probes of what it is bound by.

        Args:
            others: baselines by name.
            work: least number of "FLOPs" and "bytes" of one of the `repeats` that a call makes.
        """
        others, work = others or {}, work or {}
        probes = {name: self.probes[name] for name in work}
        candidates = {"navil": candidate, **others, **{name: probe.call for name, probe in probes.items()}}
        times = time_interleaved(candidates, self.rounds, self.device)
        ours = times["navil"]
        speedups = {name: median_ratio(times[name], ours) for name in others}
        row = Row(part, case, statistics.median(ours) / repeats, speedups)
        if work:
            lower_bounds = [
                max(work[name] / probe.amount * times[name][number] for name, probe in probes.items())
                for number in range(self.rounds)
            ]
            row.roofline_seconds = statistics.median(lower_bounds)
            row.roofline_fraction = repeats * median_ratio(lower_bounds, ours)
        return row


def within(context: Callable[[], AbstractContextManager], call: Call) -> Call:
    """The call, made inside a context."""

    def run() -> object:
        with context():
            return call()

    return run


# -- Parts -------------------------------------------------------------------------------------------------------------


def image_rows(benchmark: Benchmark, options: argparse.Namespace) -> Iterator[Row]:
    processor = NaViLImageProcessor.from_config(benchmark.config)
    for size in PHOTO_SIZES:
        image = photo(size)
        packed = processor(image, multi_scale=True, return_tensors="np")["pixel_values"]
        if np.abs(packed - baselines.qwen2_vl_patches(processor, image)).max() > 1e-5:
            raise RuntimeError("the Qwen2-VL image processor gives other patches, so times cannot be compared")
        others = {
            "Qwen2-VL image processor": partial(baselines.qwen2_vl_patches, processor, image),
            "Pillow resize only": partial(baselines.resized_scales, processor, image),
        }
        candidate = partial(processor, image, multi_scale=True, return_tensors="pt")
        yield benchmark.measure("images", f"{size[0]}x{size[1]}, {len(packed)} patches", candidate, others)


def vision_rows(benchmark: Benchmark, options: argparse.Namespace) -> Iterator[Row]:
    model = benchmark.build(vision_only(benchmark.config))
    if benchmark.compiles:
        compile_encoder(model)
    else:
        qwen = baselines.qwen_vision(benchmark.config, benchmark.device, benchmark.dtype)
    for count, size in VISION_CASES[: options.vision_cases]:
        patches, grids = benchmark.patches(size, count)
        candidate = partial(model.get_image_features, patches, grids)
        if benchmark.compiles:
            others = {"not compiled": within(not_compiled, candidate)}
        else:
            others = vision_baselines(candidate, partial(qwen, patches, grids), len(patches))
        case = f"{count} x {size[0]}x{size[1]}, {len(patches)} patches{', compiled' * benchmark.compiles}"
        work = {"FLOPs": roofline.vision_flops(benchmark.config, grids.tolist())}
        yield benchmark.measure("vision", case, candidate, others, work)


def vision_baselines(candidate: Call, qwen: Call, num_patches: int) -> dict[str, Call]:
    """The baselines that fit in memory for a number of patches."""
    others = {}
    if num_patches <= 32768:  # the mask of more takes gigabytes
        others["dense mask"] = within(baselines.dense_mask, candidate)
    if num_patches <= 10_000:  # so do the attention weights of all heads, which Qwen2.5-VL holds on a CPU too
        eager = partial(baselines.dense_mask, baselines.dense_mask_eager)
        others |= {"dense mask, eager": within(eager, candidate), "Qwen2.5-VL vision": qwen}
    return others


def prefill_rows(benchmark: Benchmark, options: argparse.Namespace) -> Iterator[Row]:
    config = benchmark.config.text_config
    model = benchmark.build(text_only(benchmark.config))
    if benchmark.compiles:
        compile_prefill(model)
    else:
        llm = baselines.plain_llm(config, benchmark.device, benchmark.dtype)
    for length in options.lengths:
        ids, visual = benchmark.mixed_tokens(length)
        candidate = partial(model, ids, visual_token_mask=visual, logits_to_keep=1)
        if benchmark.compiles:
            others = {"not compiled": within(not_compiled, candidate)}
        else:
            others = {
                "both experts on all tokens": within(baselines.both_experts, candidate),
                "Qwen3ForCausalLM": partial(llm, ids, logits_to_keep=1),
            }
        case = f"{length} tokens, 75 % visual{', compiled' * benchmark.compiles}"
        yield benchmark.measure("prefill", case, candidate, others, {"FLOPs": roofline.prefill_flops(config, length)})


def decode_rows(benchmark: Benchmark, options: argparse.Namespace) -> Iterator[Row]:
    models = {"navil": benchmark.build(text_only(benchmark.config))}
    for layer in models["navil"].language_model.layers:
        layer.self_attn.flash_decoding = options.flash_decoding
    if not options.skip_baseline:
        llm = baselines.plain_llm(benchmark.config.text_config, benchmark.device, benchmark.dtype)
        models["Qwen3ForCausalLM"] = llm
    for cache_kind in ("dynamic", "static"):
        for batch in options.batches:
            for context in options.contexts:
                yield decode_row(benchmark, models, cache_kind, batch, context, options.tune)
                free_memory(benchmark.device)


def decode_row(
    benchmark: Benchmark,
    models: Mapping[str, torch.nn.Module],
    cache_kind: str,
    batch: int,
    context: int,
    tuned: bool,
) -> Row:
    config, is_compiled = benchmark.config.text_config, False
    if cache_kind == "static" and (benchmark.compiles or benchmark.device.type == "cuda"):
        models, is_compiled = {name: compile_decoder(model, tuned) for name, model in models.items()}, True
    steps = {name: decode_step(benchmark, model, cache_kind, batch, context) for name, model in models.items()}
    work = {
        "FLOPs": roofline.decode_flops(config, batch, context),
        "bytes": roofline.decode_bytes(config, batch, context, benchmark.dtype),
    }
    case = f"batch {batch}, context {context}, {cache_kind} cache"
    case += f", compiled{' and tuned' * tuned}" * is_compiled
    return benchmark.measure("decode", case, steps.pop("navil"), steps, work, DECODE_TOKENS[benchmark.device.type])


def end_to_end_rows(benchmark: Benchmark, options: argparse.Namespace) -> Iterator[Row]:
    config = NaViLConfig.from_dict(benchmark.config.to_dict())
    config.image_token_id, config.image_start_token_id = 1, 2
    model, processor = benchmark.build(config), NaViLImageProcessor.from_config(config)

    def answer(new_tokens: int) -> None:
        packed = processor(EXAMPLE_PHOTO, multi_scale=True, return_tensors="pt").to(benchmark.device)
        slots = int(packed["image_grid_thw"].prod(-1).sum()) // config.vision_config.spatial_merge_size**2
        ids = torch.tensor([[2, *[1] * slots, 3, 4, 5, 6]], device=benchmark.device)
        packed["pixel_values"] = packed["pixel_values"].to(benchmark.dtype)
        model.generate(ids, **packed, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

    for new_tokens in (1, 64):
        case = f"{EXAMPLE_PHOTO.name} to {new_tokens} token{'s' * (new_tokens > 1)}"
        yield benchmark.measure("end-to-end", case, partial(answer, new_tokens))


PARTS: dict[str, Callable[[Benchmark, argparse.Namespace], Iterator[Row]]] = {
    "images": image_rows,
    "vision": vision_rows,
    "prefill": prefill_rows,
    "decode": decode_rows,
    "end-to-end": end_to_end_rows,
}

# -- Report ------------------------------------------------------------------------------------------------------------


def environment(benchmark: Benchmark, options: argparse.Namespace) -> dict[str, str | int | float]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    tunables = os.environ.get("GLIBC_TUNABLES")
    prefix = f"GLIBC_TUNABLES={tunables} " if tunables else ""
    return {
        "command": f"{prefix}python -m benchmarks.run {' '.join(options.arguments)}",
        "hardware": roofline.device_name(benchmark.device),
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "size": options.size,
        "dtype": str(benchmark.dtype).removeprefix("torch."),
        "rounds": benchmark.rounds,
        "peak matmul, GFLOP/s": benchmark.probes["FLOPs"].rate(benchmark.device) / 1e9,
        "peak memory bandwidth, GB/s": benchmark.probes["bytes"].rate(benchmark.device) / 1e9,
    }


HEADER = "| part | case | time | speedup over | roofline time | % of roofline |\n|---|---|---|---|---|---|"


def as_markdown(facts: Mapping[str, str | int | float], rows: Sequence[Row]) -> str:
    listed = [
        f"- {name}: {value:.1f}" if isinstance(value, float) else f"- {name}: {value}" for name, value in facts.items()
    ]
    return "\n".join([*listed, "", HEADER, *map(as_table_row, rows)]) + "\n"


def as_table_row(row: Row) -> str:
    others = ", ".join(f"{name} {speedup:.2f}x" for name, speedup in row.speedups.items()) or "-"
    bound = "- | -"
    if row.roofline_seconds is not None:
        bound = f"{duration(row.roofline_seconds)} | {100 * row.roofline_fraction:.0f} %"
    return f"| {row.part} | {row.case} | {duration(row.seconds)} | {others} | {bound} |"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time NaViL, baselines and the machine's peak rates.",
        epilog="example: python -m benchmarks.run --size small --part vision --output benchmarks/results/laptop",
    )
    add_setup_options(parser)
    parser.add_argument("--part", choices=PARTS, action="append", help="one part only; repeatable")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; medians are printed (%(default)s)")
    parser.add_argument("--vision-cases", type=int, default=3, help="number of cases, smallest first (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="prefill, tokens (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="decoding (%(default)s)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192], help="decoding, tokens (%(default)s)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile encoder, prefill, and decoding on static caches; the last is always compiled on a GPU",
    )
    parser.add_argument("--tune", action="store_true", help="compile decoding with tuned options (minutes on a GPU)")
    parser.add_argument("--flash-decoding", action="store_true", help="compiled decoding with FlexAttention's kernel")
    parser.add_argument("--skip-baseline", action="store_true", help="decode without Qwen3, which is tuned as long")
    parser.add_argument("--output", type=Path, help="also write OUTPUT.json and OUTPUT.md")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    torch.manual_seed(0)
    benchmark = Benchmark.from_options(options)
    benchmark.rounds, benchmark.compiles = options.rounds, options.compile
    rows = []
    with torch.no_grad():
        for part in tqdm(options.part or PARTS, desc="parts", disable=None):
            for row in PARTS[part](benchmark, options):
                rows.append(row)
                tqdm.write(as_table_row(row))
            free_memory(benchmark.device)
    facts = environment(benchmark, options)
    report = as_markdown(facts, rows)
    print(report)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        results = {**facts, "rows": [asdict(row) for row in rows]}
        options.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        options.output.with_suffix(".md").write_text(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
