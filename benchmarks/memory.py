"""Peak memory of loading, of the vision encoder, and of reading large images, next to the theoretical minimum.

    python -m benchmarks.memory --size small
    python -m benchmarks.memory --part images

Each measurement runs in a fresh process (Linux). A peak is resident memory (on a GPU: what torch allocated) above what
the process held before. The minimum is the weights for loading, the widest layer for the encoder, the patches for
images.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image

from navil.image_processing_navil import NaViLImageProcessor
from navil.modeling_navil import NaViLForConditionalGeneration

from . import baselines
from .roofline import vision_activation_bytes
from .workloads import Setup, add_setup_options, vision_only

MIB = 2**20
CPU = torch.device("cpu")
DENSE_MASK_LIMIT = 90  # patches a side; the mask of more takes gigabytes
IMAGES = {
    # name: (mode, size, file format); far above any pixel budget
    "JPEG 20000 x 20000 gray": ("L", (20_000, 20_000), "JPEG"),
    "PNG 20000 x 20000 gray": ("L", (20_000, 20_000), "PNG"),
    "JPEG 8000 x 6000 RGB": ("RGB", (8_000, 6_000), "JPEG"),
    "PNG 8000 x 6000 RGBA": ("RGBA", (8_000, 6_000), "PNG"),
    "PNG 2500 x 2500 RGB": ("RGB", (2_500, 2_500), "PNG"),
}
PIXEL_BUDGETS = (65_536, 1_048_576, 6_291_456)


class Peak:
    """The most memory held since this object was made, in MiB above what was held then."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is held now
        self.start = self._peak_bytes()

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])

    def mib(self) -> float:
        return (self._peak_bytes() - self.start) / MIB


def in_fresh_process(measure: Callable[..., tuple[float, float]], *arguments: object) -> tuple[float, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


# -- Measurements: minimum and peak, in MiB ----------------------------------------------------------------------------


def measure_loading(folder: str, device: torch.device) -> tuple[float, float]:
    peak = Peak(device)
    model = NaViLForConditionalGeneration.from_pretrained(folder, torch_dtype="auto", device_map=str(device))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    sum(parameter.sum() for parameter in model.parameters())  # pages of a memory-mapped file count once they are read
    return weights / MIB, peak.mib()


@torch.no_grad()
def measure_vision(setup: Setup, side: int, dense: bool) -> tuple[float, float]:
    """One square image at one scale; `side` is in patches and even."""
    model = setup.build(vision_only(setup.config))
    pixels = torch.zeros(side**2, setup.config.vision_config.patch_dim, device=setup.device, dtype=setup.dtype)
    grid = torch.tensor([[1, side, side]], device=setup.device)
    peak = Peak(setup.device)
    with baselines.dense_mask() if dense else nullcontext():
        model.get_image_features(pixels, grid)
    minimum = vision_activation_bytes(setup.config, side**2, setup.dtype)
    return minimum / MIB, peak.mib() + pixels.nbytes / MIB


def measure_image(path: str, max_pixels: int) -> tuple[float, float]:
    """Reads an image of any size: Pillow's decompression-bomb guard is off."""
    Image.MAX_IMAGE_PIXELS = None
    Image.init()
    peak = Peak(CPU)
    features = NaViLImageProcessor(multi_scale=True)(path, min_pixels=PIXEL_BUDGETS[0], max_pixels=max_pixels)
    return features["pixel_values"].nbytes / MIB, peak.mib()


# -- Tables ------------------------------------------------------------------------------------------------------------


def model_rows(setup: Setup, sides: Sequence[int]) -> Iterator[tuple[str, float, float]]:
    """Label, minimum and peak of loading and of the vision encoder."""
    with tempfile.TemporaryDirectory() as folder:
        setup.build(setup.config).save_pretrained(folder)
        yield ("loading", *in_fresh_process(measure_loading, folder, setup.device))
    for side in sides:
        label = f"vision, {side}x{side} patches"
        yield (label, *in_fresh_process(measure_vision, setup, side, False))
        if side <= DENSE_MASK_LIMIT:
            yield (f"{label}, dense mask", *in_fresh_process(measure_vision, setup, side, True))


def image_rows() -> Iterator[tuple[str, float, float]]:
    """Label, minimum and peak of the image processor on large images."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        for name, (mode, size, file_format) in IMAGES.items():
            Image.new(mode, size, 90).save(path, file_format)
            for max_pixels in PIXEL_BUDGETS:
                yield (f"{name}, max_pixels {max_pixels}", *in_fresh_process(measure_image, str(path), max_pixels))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure the peak memory of loading, of the vision encoder, and of reading large images.",
        epilog="example: python -m benchmarks.memory --size small --part model --sides 40 78",
    )
    add_setup_options(parser)
    parser.add_argument("--part", choices=("model", "images"), action="append", help="one part only; repeatable")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[40, 78, 156], help="of square images, in patches, even (%(default)s)"
    )
    options = parser.parse_args(arguments)
    setup, parts = Setup.from_options(options), options.part or ("model", "images")
    print("| measured | minimum, MiB | peak, MiB |\n|---|---|---|")
    for part in parts:
        for label, minimum, peak in model_rows(setup, options.sides) if part == "model" else image_rows():
            print(f"| {label} | {minimum:.0f} | {peak:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
