"""What the fast image processor saves, and what it changes: speed, levels, logits, and answers of a trained model.

python -m benchmarks.fast_images --part speed --part levels --part logits
python -m benchmarks.fast_images --part answers --count 24
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from io import BytesIO
from pathlib import Path
from time import process_time

import numpy as np
import torch
from PIL import Image

from navil import ROOT
from navil.image_processing_navil import (
    NaViLImageProcessor,
    NaViLImageProcessorFast,
    resize_by_torch,
    resize_exactly,
)
from recipes.evaluate import answer_all, grade, held_out
from recipes.model import load
from recipes.tasks import TASKS

from .baselines import qwen2_vl_patches
from .run import median_ratio, time_interleaved
from .workloads import photo

PHOTO_SIZES = ((1024, 768), (1920, 1080), (4000, 3000))
TABLE = "| {} | {} | {} | {} |"


# -- Speed -------------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> Iterator[str]:
    """Times, and ratios to the fast one; Qwen2-VL's processor resizes by Pillow, as in `baselines`."""
    exact, fast = NaViLImageProcessor(multi_scale=True), NaViLImageProcessorFast(multi_scale=True)
    settings = {"return_tensors": "pt", "device": options.device}
    yield TABLE.format("picture", "fast", "exact takes", "transformers' Qwen2-VL takes")
    yield "|---|---|---|---|"
    for width, height in PHOTO_SIZES:
        file = BytesIO()
        photo((width, height)).save(file, "JPEG", quality=90)
        decoded = Image.open(file)
        decoded.load()
        for kind, picture in (("decoded", decoded), ("JPEG file", file.getvalue())):
            candidates = {
                "fast": lambda picture=picture: fast(picture, **settings),
                "exact": lambda picture=picture: exact(picture, **settings),
                "stock": lambda picture=picture: qwen2_vl_patches(exact, opened(picture)),
            }
            times = time_interleaved(candidates, options.rounds, torch.device(options.device))
            ratios = [f"{median_ratio(times[name], times['fast']):.1f}x" for name in ("exact", "stock")]
            time = f"{1000 * statistics.median(times['fast']):.1f} ms, CPU {1000 * cpu_time(candidates['fast']):.1f} ms"
            yield TABLE.format(f"{width}x{height}, {kind}", time, *ratios)


def cpu_time(call: Callable[[], object], repeats: int = 5) -> float:
    """The least seconds of a call, of all its threads; other processes change it less than its duration."""
    times = []
    for _ in range(repeats):
        start = process_time()
        call()
        times.append(process_time() - start)
    return min(times)


def opened(picture: Image.Image | bytes) -> Image.Image:
    return Image.open(BytesIO(picture)) if isinstance(picture, bytes) else picture


# -- Levels ------------------------------------------------------------------------------------------------------------


def sample_pictures(count: int = 40) -> dict[str, list[np.ndarray]]:
    """(H, W, 3) uint8 arrays by kind; sizes from 1 to 1500 pixels, every fourth one with a side ratio up to 200."""
    rng = np.random.default_rng(0)
    sides = rng.integers(1, 1500, (count, 2))
    for pair in sides[::4]:
        pair[rng.integers(2)] = max(1, round(pair.max() / rng.uniform(2, 200)))
    sides = [(h, w) for h, w in sides.tolist() if max(h, w) <= 200 * min(h, w)]
    return {
        "examples/": [
            np.array(Image.open(path).convert("RGB")) for path in sorted((ROOT / "examples").glob("*.[jp][pn]g"))
        ],
        "photo, resized": [np.array(photo((width, height))) for height, width in sides],
        "noise": [rng.integers(0, 256, (*side, 3), np.uint8) for side in sides],
        "black and white noise": [255 * rng.integers(0, 2, (*side, 3), np.uint8) for side in sides],
    }


def levels(options: argparse.Namespace) -> Iterator[str]:
    """Differences of all scales from Pillow's levels, 0 to 255; float32 is how a GPU resizes."""
    processor = NaViLImageProcessor(min_pixels=64 * 64, max_pixels=1024 * 1024, multi_scale=True)
    yield TABLE.format("pictures", "resized as", "largest difference", "mean difference")
    yield "|---|---|---|---|"
    for kind, pictures in sample_pictures().items():
        for dtype in (torch.uint8, torch.float32):
            largest, total, count = 0, 0, 0
            for picture in pictures:
                [plan] = processor.plan(picture)
                pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].to(options.device, dtype)
                for size in plan.scales:
                    expected = torch.from_numpy(np.asarray(resize_exactly(plan.source, size), np.int16))
                    difference = (resize_by_torch(pixels, size).cpu() - expected).abs()
                    largest, total = max(largest, int(difference.max())), total + int(difference.sum())
                    count += difference.numel()
            yield TABLE.format(f"{len(pictures)}, {kind}", str(dtype)[6:], largest, f"{total / count:.4f}")


# -- Logits and answers ------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(options: argparse.Namespace) -> Iterator[str]:
    """Largest difference of the logits over their largest magnitude, on the recordings of the released code."""
    from tests.conftest import BACKBONES, Recording  # sets a module cache of its own

    yield TABLE.format("recording", "case", "logits differ by", "other first choices")
    yield "|---|---|---|---|"
    for name in BACKBONES:
        with tempfile.TemporaryDirectory() as folder:
            with redirect_stdout(sys.stderr):  # the converter's report
                recording = Recording(name, Path(folder, name))
            fast = NaViLImageProcessorFast.from_pretrained(recording.folder)
        for case in recording.cases:
            if images := recording.images(case):
                inputs = recording.inputs(case)
                exact = recording.model(**inputs).logits
                packed = fast(images, multi_scale=True, return_tensors="pt")
                other = recording.model(**inputs | {"pixel_values": packed["pixel_values"]}).logits
                choices = int((other.argmax(-1) != exact.argmax(-1)).sum())
                error = ((other - exact).abs().max() / exact.abs().max()).item()
                yield TABLE.format(name, case, f"{error:.1e}", f"{choices} of {exact.shape[1]}")


def answers(options: argparse.Namespace) -> Iterator[str]:
    """Held-out answers of `tiny/` with both image processors."""
    model, processor = load(ROOT / "tiny")
    model.eval()
    samples = {task: held_out(task, options.count) for task in TASKS}
    given = {}
    yield TABLE.format("image processor", "right", "of", "answers unlike the exact one's")
    yield "|---|---|---|---|"
    for name, cls in (("exact", NaViLImageProcessor), ("fast", NaViLImageProcessorFast)):
        processor.image_processor = cls.from_pretrained(ROOT / "tiny")
        given[name] = {task: answer_all(model, processor, drawn, f"{name}, {task}") for task, drawn in samples.items()}
        marks = [right for task, drawn in samples.items() for _, right in grade(drawn, given[name][task])]
        pairs = [(a, b) for task in samples for a, b in zip(given[name][task], given["exact"][task], strict=True)]
        changed = sum(a != b for one, other in pairs for a, b in zip(one, other, strict=True))
        yield TABLE.format(name, sum(marks), len(marks), changed)


PARTS = {"speed": speed, "levels": levels, "logits": logits, "answers": answers}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compare the fast image processor with the exact one.",
        epilog="example: python -m benchmarks.fast_images --part speed --part levels --part logits",
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="one part only; repeatable")
    parser.add_argument("--device", default="cpu", help="of speed and levels (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs (%(default)s)")
    parser.add_argument("--count", type=int, default=24, help="held-out samples per task (%(default)s)")
    options = parser.parse_args(arguments)
    for part in options.part or PARTS:
        for line in PARTS[part](options):
            print(line, flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
