"""Times NaViL beside plain baselines and transformers' own models, and against what the machine can do at best.

    python -m benchmarks.run --size small
    python -m benchmarks.run --device cuda --dtype bfloat16 --size 2b

Random weights: nothing here depends on their values. Everything that is compared runs in turns in one process. A row's
`floor` is the time implied by the operations it needs (its bytes, for decoding) at the rate of a large matrix product
(of a read of memory), which takes its turns with the rest.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import DynamicCache, StaticCache

from navil import configuration_navil as configuration
from navil import image_processing_navil as image_processing
from navil import modeling_navil as modeling

from . import baselines, limits
from .timing import alternate, median_ratio

ROOT = Path(__file__).resolve().parent.parent
PHOTO_SIZES = ((640, 480), (1024, 768), (1920, 1080), (4000, 3000))
VISION_CASES = ((1, PHOTO_SIZES[0]), (1, PHOTO_SIZES[1]), (4, PHOTO_SIZES[0]), (1, PHOTO_SIZES[2]), (1, PHOTO_SIZES[3]))


def small_config() -> Any:
    """A size that a laptop's CPU runs in seconds, with the proportions of the released models."""
    return configuration.NaViLConfig(
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 3,
            "num_attention_heads": 12,
        },
        text_config={
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 6,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "qk_norm": True,
            "max_position_embeddings": 32768,
        },
    )


SIZES: dict[str, Callable[[], Any]] = {
    "small": small_config,
    "2b": configuration.NaViLConfig.navil_2b,
    "9b": configuration.NaViLConfig.navil_9b,
}


@dataclass
class Row:
    """One measurement: seconds are medians, `speedups` how many times as long the others took, round by round."""

    part: str
    case: str
    seconds: float
    speedups: dict[str, float]
    floor: float | None = None
    share_of_limit: float | None = None


@dataclass
class Bench:
    """What all rows need."""

    config: Any
    device: torch.device
    dtype: torch.dtype
    rounds: int
    compiles: bool = False

    @cached_property
    def products(self) -> limits.Yardstick:
        return limits.products(self.device, self.dtype)

    @cached_property
    def reads(self) -> limits.Yardstick:
        return limits.reads(self.device)

    def build(self, model_class: type, config: Any) -> torch.nn.Module:
        return baselines.on_device(lambda: model_class._from_config(config, torch_dtype=self.dtype), self.device)

    def row(
        self,
        part: str,
        case: str,
        ours: Callable[[], Any],
        others: dict[str, Callable[[], Any]],
        operations: float = 0,
        bytes_read: float = 0,
        repeats: int = 1,
    ) -> Row:
        """`operations` and `bytes_read` are what one of the `repeats` that every call makes needs at least."""
        needs = {"products": operations, "reads": bytes_read}
        yardsticks = {name: getattr(self, name) for name, amount in needs.items() if amount}
        contestants = {"navil": ours} | others | {name: yardstick.work for name, yardstick in yardsticks.items()}
        times = alternate(contestants, self.rounds, self.device)
        seconds = statistics.median(times["navil"]) / repeats
        row = Row(part, case, seconds, {name: median_ratio(times[name], times["navil"]) for name in others})
        if yardsticks:
            floors = [
                max(needs[name] / yardstick.amount * times[name][number] for name, yardstick in yardsticks.items())
                for number in range(self.rounds)
            ]
            row.floor = statistics.median(floors)
            row.share_of_limit = repeats * median_ratio(floors, times["navil"])
        return row

    def image_processor(self) -> Any:
        area = self.config.vision_config.patch_size**2
        return image_processing.NaViLImageProcessor(
            patch_size=self.config.vision_config.patch_size,
            merge_size=self.config.vision_config.spatial_merge_size,
            min_pixels=self.config.min_dynamic_patch * area,
            max_pixels=self.config.max_dynamic_patch * area,
            multi_scale=True,
        )

    def patches(self, size: tuple[int, int], count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        packed = self.image_processor()([photo(size)] * count, return_tensors="pt")
        return packed["pixel_values"].to(self.device, self.dtype), packed["image_grid_thw"].to(self.device)


def photo(size: tuple[int, int]) -> Image.Image:
    """The repository's photograph at another size."""
    return Image.open(ROOT / "examples" / "cat.jpg").convert("RGB").resize(size)


def within(context: Callable[[], AbstractContextManager], work: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with context():
            return work()

    return run


# ---------------------------------------------------------------------------------------------------------------- rows


def image_rows(bench: Bench, sizes: Sequence[tuple[int, int]]) -> Iterator[Row]:
    processor = bench.image_processor()
    for size in sizes:
        image = photo(size)
        packed = processor(image, return_tensors="np")["pixel_values"]
        stock = baselines.stock_image_processing(processor, image)
        if np.abs(packed - stock).max() > 1e-5:
            raise RuntimeError("the stock path gives other patches: nothing to compare")
        others = {
            "Qwen2-VL helpers": lambda image=image: baselines.stock_image_processing(processor, image),
            "Pillow's resizes alone": lambda image=image: baselines.resized_scales(processor, image),
        }
        ours = lambda image=image: processor(image, return_tensors="pt")  # noqa: E731
        yield bench.row("images", f"{size[0]}x{size[1]}, {len(packed)} patches", ours, others)


def vision_rows(bench: Bench, cases: Sequence[tuple[int, tuple[int, int]]]) -> Iterator[Row]:
    """Each case is so many photos of a size in one batch."""
    model = bench.build(modeling.NaViLForConditionalGeneration, vision_only(bench.config))
    if bench.compiles:
        compile_encoder(model)
    else:
        qwen = baselines.qwen_vision(bench.config, bench.device, bench.dtype)
    for count, size in cases:
        patches, grids = bench.patches(size, count)
        ours = partial(model.get_image_features, patches, grids)
        if bench.compiles:
            others = {"not compiled": within(not_compiled, ours)}
        else:
            others = vision_baselines(ours, partial(qwen, patches, grids), len(patches))
        operations = limits.vision_operations(bench.config, grids.tolist())
        case = f"{count} x {size[0]}x{size[1]}, {len(patches)} patches{', compiled' * bench.compiles}"
        yield bench.row("vision", case, ours, others, operations)


def vision_baselines(
    ours: Callable[[], Any], qwen: Callable[[], Any], num_patches: int
) -> dict[str, Callable[[], Any]]:
    """Those that so many patches leave memory for."""
    others = {}
    if num_patches <= 32768:  # for more, the mask alone takes gigabytes
        others["dense mask"] = within(baselines.dense_mask, ours)
    if num_patches <= 10_000:  # for more, the weights of all heads do, which Qwen2.5-VL's holds on a CPU too
        others["dense mask, not fused"] = within(partial(baselines.dense_mask, baselines.dense_mask_equations), ours)
        others["Qwen2.5-VL vision"] = qwen
    return others


def vision_only(config: Any) -> Any:
    """The config with a decoder of no layers and hardly any vocabulary."""
    config = configuration.NaViLConfig.from_dict(config.to_dict())
    config.text_config.num_hidden_layers, config.text_config.vocab_size = 0, 8
    return config


def text_only(config: Any) -> Any:
    """The config with a vision encoder of no blocks."""
    config = configuration.NaViLConfig.from_dict(config.to_dict())
    config.vision_config.num_hidden_layers = 0
    return config


def prefill_rows(bench: Bench, lengths: Sequence[int]) -> Iterator[Row]:
    config = bench.config.text_config
    model = bench.build(modeling.NaViLForConditionalGeneration, text_only(bench.config))
    if bench.compiles:
        compile_prefill(model)
    else:
        llm = baselines.plain_llm(config, bench.device, bench.dtype)
    for length in lengths:
        ids, visual = mixed_tokens(bench, length)
        mixed = partial(model, ids, visual_token_mask=visual, logits_to_keep=1)
        if bench.compiles:
            others = {"not compiled": within(not_compiled, mixed)}
        else:
            both_experts = within(baselines.both_experts, mixed)
            others = {"both experts": both_experts, "Qwen3ForCausalLM": partial(llm, ids, logits_to_keep=1)}
        case = f"{length} tokens, three in four visual{', compiled' * bench.compiles}"
        yield bench.row("prefill", case, mixed, others, limits.prefill_operations(config, length))


def mixed_tokens(bench: Bench, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (1, length) and which of them are visual, (1, length) bool: three in four, in one stretch."""
    ids = torch.randint(bench.config.text_config.vocab_size, (1, length), device=bench.device)
    visual = torch.zeros(1, length, dtype=torch.bool, device=bench.device)
    visual[:, length // 8 : length // 8 + 3 * length // 4] = True
    return ids, visual


def decode_rows(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    config = bench.config.text_config
    models = {"navil": bench.build(modeling.NaViLForConditionalGeneration, text_only(bench.config))}
    if not options.alone:
        models["Qwen3ForCausalLM"] = baselines.plain_llm(config, bench.device, bench.dtype)
    compiled = ", compiled and tuned" if options.tune else ", compiled"
    repeats = TOKENS_PER_TIMING[bench.device.type]
    for kind in ("dynamic", "static"):
        is_compiled = kind == "static" and (bench.compiles or bench.device.type == "cuda")
        for batch in options.batches:
            for context in options.contexts:
                steps = {}
                for name, decoder in models.items():
                    if is_compiled:
                        decoder = compile_decoder(decoder, options.tune)
                    steps[name] = decode_step(bench, decoder, config, kind, batch, context)
                operations = limits.decode_operations(config, batch, context)
                bytes_read = limits.decode_bytes(config, batch, context, bench.dtype)
                case = f"batch {batch}, context {context}, {kind} cache{compiled * is_compiled}"
                yield bench.row("decode", case, steps.pop("navil"), steps, operations, bytes_read, repeats)
                del steps
                release(bench.device)


# A GPU works while its host prepares the next token: all but for the first of them.
TOKENS_PER_TIMING = {"cpu": 4, "cuda": 16}


def decode_step(bench: Bench, model: Any, config: Any, kind: str, batch: int, context: int) -> Callable[[], None]:
    """Decodes a few tokens, always at the same context: random keys and values fill the cache."""
    num_cached = context - TOKENS_PER_TIMING[bench.device.type]
    shape = (batch, config.num_key_value_heads, num_cached, config.head_dim)
    token = torch.ones(batch, 1, dtype=torch.long, device=bench.device)

    def filled() -> Any:
        cache = DynamicCache()
        if kind == "static":
            settings = {"max_cache_len": context, "device": bench.device, "dtype": bench.dtype}
            cache = StaticCache(config, max_batch_size=batch, **settings)
        places = torch.arange(num_cached, device=bench.device)
        for layer in range(config.num_hidden_layers):
            keys, values = torch.randn(2, *shape, device=bench.device, dtype=bench.dtype)
            cache.update(keys, values, layer, {"cache_position": places})
        return cache

    cache = filled()
    positions = [torch.tensor([place], device=bench.device) for place in range(num_cached, context)]

    @torch.no_grad()
    def step() -> None:
        if kind == "dynamic":
            cache.crop(num_cached)
        for position in positions:
            model(token, past_key_values=cache, cache_position=position, position_ids=position[None])

    return step


def end_to_end_rows(bench: Bench) -> Iterator[Row]:
    model = bench.build(modeling.NaViLForConditionalGeneration, with_image_tokens(bench.config))
    file = ROOT / "examples" / "cat.jpg"
    processor = bench.image_processor()

    def answer(new_tokens: int) -> None:
        packed = processor(file, return_tensors="pt").to(bench.device)
        slots = int(packed["image_grid_thw"].prod(-1).sum()) // bench.config.vision_config.spatial_merge_size**2
        ids = torch.tensor([[2, *[1] * slots, 3, 4, 5, 6]], device=bench.device)
        packed["pixel_values"] = packed["pixel_values"].to(bench.dtype)
        model.generate(ids, **packed, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

    for new_tokens in (1, 64):
        case = f"{file.name} to {new_tokens} token{'s' * (new_tokens > 1)}"
        yield bench.row("end to end", case, lambda new_tokens=new_tokens: answer(new_tokens), {})


def with_image_tokens(config: Any) -> Any:
    config = configuration.NaViLConfig.from_dict(config.to_dict())
    config.image_token_id, config.image_start_token_id = 1, 2
    return config


# Torch makes kernels of its own of products with a single row only where it may tune them. Then it can start kernels
# that do not wait for each other as one, and let one begin while the last blocks of the kernel before it run. On a CPU,
# calling them one by one from Python is what is left to save.
TUNED = {
    "cuda": {
        "triton.cudagraphs": True,
        "coordinate_descent_tuning": True,
        "max_autotune_pointwise": True,
        "combo_kernels": True,
        "triton.enable_pdl": True,
    },
    "cpu": {"cpp_wrapper": True},
}


def compile_decoder(model: torch.nn.Module, tuned: bool) -> torch.nn.Module:
    how = {"options": TUNED[model.device.type]} if tuned else {"mode": "reduce-overhead"}
    return torch.compile(model, fullgraph=True, **how)


def compile_encoder(model: modeling.NaViLForConditionalGeneration) -> None:
    """One graph for all blocks and pictures."""
    for block in model.vision_model.blocks:
        block.compile(dynamic=True)


def compile_prefill(model: modeling.NaViLForConditionalGeneration) -> None:
    """All layers as one graph: compiled one by one, each would be another because of its place in the cache."""
    model.language_model.compile(dynamic=True)


not_compiled = partial(torch.compiler.set_stance, "force_eager")


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------------------------- report


def circumstances(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    name = cpu_name() if bench.device.type == "cpu" else torch.cuda.get_device_name(bench.device)
    allocator = os.environ.get("GLIBC_TUNABLES")
    return {
        "command": f"{f'GLIBC_TUNABLES={allocator} ' if allocator else ''}python -m benchmarks.run "
        + " ".join(options.arguments),
        "hardware": f"{name}, {torch.get_num_threads()} threads" if bench.device.type == "cpu" else name,
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "size": options.size,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "rounds": bench.rounds,
        "matmul, 1e9 operations/s": bench.products.rate(bench.device) / 1e9,
        "memory, 1e9 bytes/s": bench.reads.rate(bench.device) / 1e9,
    }


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def as_markdown(facts: dict[str, Any], rows: Sequence[Row]) -> str:
    lines = [
        f"- {name}: {value:.1f}" if isinstance(value, float) else f"- {name}: {value}" for name, value in facts.items()
    ]
    lines += ["", "| part | case | time | as long as ours | floor | share of the limit |", "|---|---|---|---|---|---|"]
    for row in rows:
        others = ", ".join(f"{name} {speedup:.2f}x" for name, speedup in row.speedups.items()) or "-"
        floor, share = ("-", "-") if row.floor is None else (duration(row.floor), f"{100 * row.share_of_limit:.0f} %")
        lines.append(f"| {row.part} | {row.case} | {duration(row.seconds)} | {others} | {floor} | {share} |")
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


PARTS: dict[str, Callable[[Bench, argparse.Namespace], Iterator[Row]]] = {
    "images": lambda bench, options: image_rows(bench, PHOTO_SIZES),
    "vision": lambda bench, options: vision_rows(bench, VISION_CASES[: options.vision_cases]),
    "prefill": lambda bench, options: prefill_rows(bench, options.lengths),
    "decode": decode_rows,
    "end to end": lambda bench, options: end_to_end_rows(bench),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time NaViL beside baselines and against the machine's limits.",
        epilog="example: python -m benchmarks.run --size small --part vision --output benchmarks/results/laptop",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--size", choices=SIZES, default="small", help="(%(default)s)")
    parser.add_argument("--part", choices=PARTS, action="append", help="one part only; repeatable")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, of which the median counts (%(default)s)")
    parser.add_argument("--vision-cases", type=int, default=3, help="how many of them, smallest first (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="prefill, tokens (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="decoding (%(default)s)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192], help="decoding, tokens (%(default)s)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the encoder, the decoder's prefill, and decoding on static caches, this on a GPU always",
    )
    parser.add_argument(
        "--tune", action="store_true", help="compile decoding with more options; on a GPU, minutes of trials"
    )
    parser.add_argument("--alone", action="store_true", help="decode without the baseline, whose tuning takes as long")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md too")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    torch.manual_seed(0)
    bench = Bench(
        config=SIZES[options.size](),
        device=device,
        dtype=dtype,
        rounds=options.rounds,
        compiles=options.compile,
    )
    rows = []
    with torch.no_grad():
        for part in tqdm(options.part or PARTS, desc="parts", disable=None):
            for row in PARTS[part](bench, options):
                rows.append(row)
                tqdm.write(as_markdown({}, [row]).splitlines()[-1])
            release(device)
    facts = circumstances(bench, options)
    report = as_markdown(facts, rows)
    print(report)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(
            json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
        )
        options.output.with_suffix(".md").write_text(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
