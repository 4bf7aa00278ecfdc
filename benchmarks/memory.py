"""Peak memory of loading and of the vision encoder, beside the least that they need.

    python -m benchmarks.memory --size small

Every measurement is a process of its own: the peak of what the operating system gave it (on a GPU: of what torch
allocated), less what it held before. `weights` are what the model's parameters take; `floor` of a forward is the
widest layer in flight: the patches, the residual stream, and the input and output of one activation function.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from navil import modeling_navil as modeling

from . import baselines
from .run import SIZES, vision_only

MIB = 2**20


class Peak:
    """Most memory held since this object was made, in MiB over what was held then. On a CPU: needs Linux's /proc."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self.start = self._highest()

    def _highest(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])

    def mib(self) -> float:
        return (self._highest() - self.start) / MIB


def measure_loading(folder: Path, device: torch.device) -> dict[str, float]:
    peak = Peak(device)
    model = modeling.NaViLForConditionalGeneration.from_pretrained(folder, torch_dtype="auto", device_map=str(device))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    sum(parameter.sum() for parameter in model.parameters())  # pages of a mapped file count when they are read
    return {"weights": weights / MIB, "peak": peak.mib()}


def measure_forward(size: str, patches: int, dense: bool, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """One square picture at one scale, of `patches` patches."""
    config = vision_only(SIZES[size]())
    model = baselines.on_device(
        lambda: modeling.NaViLForConditionalGeneration._from_config(config, torch_dtype=dtype), device
    )
    side = 2 * round(patches**0.5 / 2)
    vision = config.vision_config
    pixels = torch.zeros(side**2, vision.patch_dim, device=device, dtype=dtype)
    grid = torch.tensor([[1, side, side]], device=device)
    peak = Peak(device)
    with torch.no_grad(), baselines.dense_mask() if dense else nullcontext():
        model.get_image_features(pixels, grid)
    floor = side**2 * (vision.patch_dim + vision.hidden_size + 2 * vision.intermediate_size) * dtype.itemsize
    return {"patches": side**2, "floor": floor / MIB, "peak": peak.mib() + pixels.nbytes / MIB}


def in_a_fresh_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Peak memory of loading and of the vision encoder.",
        epilog="example: python -m benchmarks.memory --size small --patches 1536 6144 24576",
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(%(default)s)")
    parser.add_argument("--patches", type=int, nargs="+", default=[1536, 6144, 24576], help="(%(default)s)")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--forward", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dense", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if options.load:
        print(json.dumps(measure_loading(options.load, device)))
        return 0
    if options.forward:
        print(json.dumps(measure_forward(options.size, options.forward, options.dense, device, dtype)))
        return 0
    settings = ["--size", options.size, "--device", options.device, "--dtype", options.dtype]
    print("| what | least, MiB | peak, MiB | dense mask, peak, MiB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        modeling.NaViLForConditionalGeneration._from_config(SIZES[options.size](), torch_dtype=dtype).save_pretrained(
            folder
        )
        loaded = in_a_fresh_process("--load", folder, *settings)
    print(f"| loading | {loaded['weights']:.0f} | {loaded['peak']:.0f} | - |")
    for patches in options.patches:
        ours = in_a_fresh_process("--forward", str(patches), *settings)
        dense = "-"
        if patches <= 8192:
            dense = f"{in_a_fresh_process('--forward', str(patches), '--dense', *settings)['peak']:.0f}"
        print(f"| {ours['patches']} patches | {ours['floor']:.0f} | {ours['peak']:.0f} | {dense} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
