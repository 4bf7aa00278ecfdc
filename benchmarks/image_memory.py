"""Peak memory of the image processor on pictures far above its pixel budget (Linux).

python -m benchmarks.image_memory

Each case runs in a process of its own with Pillow's decompression-bomb guard lifted. Printed is the process's peak
resident memory above what it holds once everything is imported, and the size of the patches that come out.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

CASES = {
    # name: (mode, width, height, file format)
    "JPEG 20000 x 20000 grey": ("L", 20_000, 20_000, "JPEG"),
    "PNG 20000 x 20000 grey": ("L", 20_000, 20_000, "PNG"),
    "JPEG 8000 x 6000 RGB": ("RGB", 8_000, 6_000, "JPEG"),
    "PNG 8000 x 6000 RGBA": ("RGBA", 8_000, 6_000, "PNG"),
    "PNG 2500 x 2500 RGB": ("RGB", 2_500, 2_500, "PNG"),
}
BUDGETS = (65_536, 1_048_576, 6_291_456)
MIB = 2**20


def memory(field: str) -> float:
    """A field of /proc/self/status, in MiB."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 2**10


def measure(path: str, max_pixels: int) -> None:
    from image_processing_navil import NaViLImageProcessor

    Image.MAX_IMAGE_PIXELS = None
    Image.init()
    before = memory("VmRSS")
    features = NaViLImageProcessor(multi_scale=True)(path, min_pixels=65_536, max_pixels=max_pixels)
    print(f"{memory('VmHWM') - before:.0f} {features['pixel_values'].nbytes / MIB:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("FILE", "MAX_PIXELS"), help="measure one picture in this process")
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], int(options.one[1]))
        return
    print("| picture | max_pixels | peak MiB | patches MiB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (mode, width, height, file_format) in CASES.items():
            path = Path(folder) / "picture"
            Image.new(mode, (width, height), 90).save(path, file_format)
            for budget in BUDGETS:
                command = [sys.executable, "-m", "benchmarks.image_memory", "--one", str(path), str(budget)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                peak, patches = done.stdout.split()
                print(f"| {name} | {budget} | {peak} | {patches} |", flush=True)


if __name__ == "__main__":
    main()
