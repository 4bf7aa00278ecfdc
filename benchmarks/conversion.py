"""Writes full-size random checkpoints in the released layout, and compares a conversion with a copy of the same files.

    python -m benchmarks.conversion write 2b weights/random-2b        # 8.1 GB of random bf16 numbers
    python -m benchmarks.conversion time weights/random-2b --runs 5

Copies and conversions are interleaved, so drift affects both equally, and each runs in its own process (POSIX). A copy
is `cp -r` and `sync`, as a conversion syncs its files too.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from navil import ROOT

from .run import median_ratio

FIXTURES = ROOT / "tests" / "fixtures"
TOKENIZERS = {"2b": "internlm2", "9b": "qwen3"}
"""Test fixtures with small tokenizers: they have the image tokens, and ids within the released vocabularies."""

# -- Random checkpoints ------------------------------------------------------------------------------------------------


def write_random_checkpoint(size: str, folder: Path, shard_size: str = "1GB") -> None:
    """Writes a new folder in the released layout, one shard in memory at a time.

    Raises:
        FileExistsError: the folder exists.
    """
    layout = json.loads((FIXTURES / f"official_layout_{size}.json").read_text())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(layout["config"], indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(FIXTURES / TOKENIZERS[size] / name, folder)
    shapes = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in layout["tensors"].items()
    }
    shards = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_size)
    for filename, names in tqdm(shards.filename_to_tensors.items(), desc="shards", disable=None):
        save_file({name: random_tensor(name, shapes[name]) for name in names}, folder / filename, {"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def random_tensor(name: str, like: Tensor) -> Tensor:
    """Normal with standard deviation 0.02, around 1 for the scales of channels and around 0 for everything else."""
    is_scale = like.ndim == 1 and not name.endswith("bias")
    return torch.empty_like(like, device="cpu").normal_(float(is_scale), 0.02)


# -- Cost of a conversion ----------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    wall: float  # seconds
    cpu: float  # seconds of all cores, user and system
    memory: float  # peak resident, MB

    def __str__(self) -> str:
        return f"{self.wall:.1f} s (CPU {self.cpu:.1f} s)"


def measure(*command: str) -> Cost:
    """Runs a command.

    Raises:
        SystemExit: the command failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def time_conversion(source: Path, runs: int) -> None:
    """Prints time and memory of conversions and copies of a folder in the released layout."""
    base_memory = measure(sys.executable, "-c", "import torch").memory
    print(f"interpreter with torch: {base_memory:.0f} MB")
    costs: dict[str, list[Cost]] = {"copy": [], "conversion": []}
    with tempfile.TemporaryDirectory(dir=source.resolve().parent) as scratch:
        commands = {
            "copy": ("sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(source)),
            "conversion": (sys.executable, str(ROOT / "convert_checkpoint.py"), "official", str(source)),
        }
        for run in range(runs):
            for name in commands if run % 2 == 0 else reversed(commands):
                destination = Path(scratch) / name
                costs[name].append(measure(*commands[name], str(destination)))
                shutil.rmtree(destination)
            print(f"run {run}: copy {costs['copy'][-1]}; conversion {costs['conversion'][-1]}", flush=True)
    ratio = median_ratio(*([cost.wall for cost in costs[name]] for name in ("conversion", "copy")))
    print(f"A conversion takes {ratio:.2f} times as long as a copy (median of {runs} pairs).")
    memory = max(cost.memory for cost in costs["conversion"]) - base_memory
    print(f"Its peak memory is {memory:.0f} MB above an interpreter with torch.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write a random checkpoint of a released size, or compare a conversion with a copy."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="write a random checkpoint in the released layout")
    write.add_argument("size", choices=TOKENIZERS)
    write.add_argument("destination", type=Path, metavar="DST", help="new folder")
    timing = commands.add_parser("time", help="compare a conversion with a copy of the same files")
    timing.add_argument("source", type=Path, metavar="SRC", help="folder in the released layout")
    timing.add_argument("--runs", type=int, default=3, metavar="N", help="(%(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "write":
        torch.manual_seed(0)
        write_random_checkpoint(options.size, options.destination)
    else:
        time_conversion(options.source, options.runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
