"""What a conversion costs beside a plain copy of the same files: time, and memory above an interpreter with torch.

python -m benchmarks.conversion_cost weights/random-2b --runs 5

Copy and conversion take turns, each in a process of its own, the one first in every other run. The copy is what `cp -r`
does, followed by `sync` as the conversion syncs its files too. Needs a POSIX system with `sh`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .timing import median_ratio

ROOT = Path(__file__).resolve().parent.parent


class Cost(NamedTuple):
    wall: float  # seconds
    cpu: float  # seconds of all cores, user and system
    memory: float  # peak resident, MB


def measure(*command: str) -> Cost:
    """What a command costs that must succeed."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def show(cost: Cost) -> str:
    return f"{cost.wall:.1f} s (CPU {cost.cpu:.1f} s)"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time and memory of a conversion beside those of a copy.")
    parser.add_argument("source", type=Path, metavar="SRC", help="folder in the released layout")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch_memory = measure(sys.executable, "-c", "import torch").memory
    print(f"interpreter with torch: {torch_memory:.0f} MB")
    copies: list[Cost] = []
    conversions: list[Cost] = []
    with tempfile.TemporaryDirectory(dir=options.source.resolve().parent) as scratch:
        copy, converted = Path(scratch) / "copy", Path(scratch) / "converted"
        for run in range(options.runs):
            steps = [
                ("sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(options.source), str(copy)),
                (sys.executable, str(ROOT / "convert_checkpoint.py"), "official", str(options.source), str(converted)),
            ]
            costs = {}
            for command in steps if run % 2 == 0 else reversed(steps):
                costs[command[-1]] = measure(*command)
                shutil.rmtree(command[-1])
            copies.append(costs[str(copy)])
            conversions.append(costs[str(converted)])
            print(f"run {run}: copy {show(copies[-1])}; conversion {show(conversions[-1])}", flush=True)
    ratio = median_ratio([cost.wall for cost in conversions], [cost.wall for cost in copies])
    print(f"conversion took {ratio:.2f} times as long (median of {options.runs} pairs)")
    memory = max(cost.memory for cost in conversions) - torch_memory
    print(f"peak memory above the interpreter with torch: {memory:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
