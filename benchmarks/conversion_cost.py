"""What a conversion costs beside a plain copy of the same files: time, and memory above an interpreter with torch.

python benchmarks/conversion_cost.py weights/random-2b --runs 3

Copy and conversion take turns, each in a process of its own. The copy is what `cp -r` does, followed by `sync` as the
conversion syncs its files too.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measure(*command: str) -> tuple[float, float]:
    """Seconds and peak resident memory, in MB, of a command that must succeed."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return seconds, usage.ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time and memory of a conversion beside those of a copy.")
    parser.add_argument("source", type=Path, metavar="SRC", help="folder in the released layout")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    _, torch_memory = measure(sys.executable, "-c", "import torch")
    print(f"interpreter with torch: {torch_memory:.0f} MB")
    copies, conversions, memories = [], [], []
    with tempfile.TemporaryDirectory(dir=options.source.resolve().parent) as scratch:
        for run in range(options.runs):
            target = Path(scratch) / "copy"
            copies.append(measure("sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(options.source), str(target))[0])
            shutil.rmtree(target)
            target = Path(scratch) / "converted"
            command = (
                sys.executable,
                str(ROOT / "convert_checkpoint.py"),
                "official",
                str(options.source),
                str(target),
            )
            seconds, memory = measure(*command)
            conversions.append(seconds)
            memories.append(memory - torch_memory)
            shutil.rmtree(target)
            print(f"run {run}: copy {copies[-1]:.1f} s, conversion {seconds:.1f} s, +{memories[-1]:.0f} MB")
    copy, conversion = statistics.median(copies), statistics.median(conversions)
    print(f"median: copy {copy:.1f} s, conversion {conversion:.1f} s, ratio {conversion / copy:.2f}")
    print(f"peak memory above the interpreter with torch: {max(memories):.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
