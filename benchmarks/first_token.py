"""From a JPEG file to the first token, stage by stage, and pictures per second of `generate` in batches.

    python -m benchmarks.first_token --size small
    python -m benchmarks.first_token --size 2b --device cuda --part throughput

Rows differ by the image processor (exact: Pillow; fast: torch) and by what crosses to the device: float32 patches, or
bytes. `--optimize` adds rows after `model.optimize_for_inference()`. *Bound* is decoding the JPEG + encoder + prefill:
what no image processor can avoid. Weights are random.
"""

import argparse
import dataclasses
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO

import torch

from navil.image_processing_navil import NaViLImageProcessor, NaViLImageProcessorFast, count_slot_tokens, decode_image
from navil.modeling_navil import NaViLForConditionalGeneration

from .roofline import elapsed
from .workloads import Setup, Size, add_setup_options, photo

PHOTO_SIZES = ((1024, 768), (1920, 1080), (4000, 3000))
QUESTION_LENGTH = 24  # tokens around an image
VARIANTS: dict[str, tuple[type[NaViLImageProcessor], bool]] = {
    "exact, float32 crosses": (NaViLImageProcessor, False),
    "exact, bytes cross": (NaViLImageProcessor, True),
    "fast, bytes cross": (NaViLImageProcessorFast, True),
}
"""Image processor, and whether it packs on the model's device."""

STAGES = ("plan", "decode", "resize", "upload", "encoder", "prefill")


def jpeg_file(size: Size) -> bytes:
    file = BytesIO()
    photo(size).save(file, "JPEG", quality=90)
    return file.getvalue()


class FirstToken:
    """The way of a JPEG file to the first token, as a whole and in stages."""

    def __init__(self, setup: Setup, model: NaViLForConditionalGeneration, variant: str, file: bytes):
        self.setup, self.model, self.file = setup, model, file
        processor_class, self.packs_on_device = VARIANTS[variant]
        self.processor = processor_class.from_config(setup.config)

    def pack(self, plans: Sequence) -> dict[str, torch.Tensor]:
        device = self.setup.device if self.packs_on_device else None
        return dict(self.processor.pack(plans, "pt", device))

    def whole(self) -> None:
        plans = self.processor.plan(self.file, multi_scale=True)
        slots = count_slot_tokens(plans[0].scales, self.processor.cell)
        ids = self.prompt(plans)
        images = {name: x.to(self.setup.device) for name, x in self.pack(plans).items()}
        assert ids.shape[1] == slots + QUESTION_LENGTH
        self.model.generate(ids, **images, max_new_tokens=1, do_sample=False)

    def prompt(self, plans: Sequence) -> torch.Tensor:
        """(1, L) ids; the tokens that end scales count as text here."""
        config, cell = self.setup.config, self.processor.cell
        cells = sum(-(-height // cell) * -(-width // cell) for height, width in plans[0].scales)
        num_others = count_slot_tokens(plans[0].scales, cell) - cells + QUESTION_LENGTH
        ids = [config.image_token_id] * cells + [5] * num_others
        return torch.tensor([ids], device=self.setup.device)

    def stages(self) -> dict[str, float]:
        """Seconds of each stage, with a wait for the device after each."""
        seconds, time = {}, partial(elapsed, device=self.setup.device)
        results: dict[str, object] = {}

        def run(stage: str, call: Callable[[], object]) -> None:
            seconds[stage] = time(lambda: results.update({stage: call()}))

        run("plan", lambda: self.processor.plan(self.file, multi_scale=True))
        [plan] = results["plan"]
        run("decode", lambda: decode_image(plan.source, plan.max_pixels))
        decoded = dataclasses.replace(plan, source=results["decode"])
        run("resize", lambda: self.pack([decoded]))
        run("upload", lambda: {name: x.to(self.setup.device) for name, x in results["resize"].items()})
        images = results["upload"]
        run("encoder", lambda: self.model.get_image_features(images["pixel_values"], images["image_grid_thw"]))
        ids = self.prompt([plan])
        mask = ids == self.setup.config.image_token_id
        run("prefill", lambda: self.model(ids, visual_token_mask=mask, logits_to_keep=1))
        return seconds


def stage_rows(setup: Setup, options: argparse.Namespace) -> Iterator[str]:
    yield "| photo | way | " + " | ".join(STAGES) + " | whole | whole / bound |"
    yield "|---" * (len(STAGES) + 4) + "|"
    setup.config.image_token_id, setup.config.image_start_token_id = 1, 2
    model = setup.build(setup.config)
    for is_optimized in (False, True)[: 1 + options.optimize]:
        if is_optimized:
            model.optimize_for_inference()
        for size in PHOTO_SIZES:
            ways = {name: FirstToken(setup, model, name, jpeg_file(size)) for name in VARIANTS}
            times = timed(ways, options.rounds)
            for name, seconds in times.items():
                bound = seconds["decode"] + seconds["encoder"] + seconds["prefill"]
                cells = [f"{1000 * seconds[stage]:.1f}" for stage in (*STAGES, "whole")]
                way = f"{name}{', optimized' * is_optimized}"
                ratio = f"{seconds['whole'] / bound:.2f}"
                yield f"| {size[0]}x{size[1]} | {way} | {' | '.join(cells)} | {ratio} |"


def timed(ways: dict[str, FirstToken], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each way's stages and of its whole; the ways alternate, after a warm-up round."""
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            seconds = way.stages() | {"whole": elapsed(way.whole, way.setup.device)}
            for stage, value in seconds.items() if number else ():
                times[name][stage].append(value)
    return {name: {stage: statistics.median(of) for stage, of in stages.items()} for name, stages in times.items()}


def throughput_rows(setup: Setup, options: argparse.Namespace) -> Iterator[str]:
    yield "| pictures of 1024x768 | way | seconds | pictures/s | new tokens/s |\n|---|---|---|---|---|"
    setup.config.image_token_id, setup.config.image_start_token_id = 1, 2
    model, file = setup.build(setup.config), jpeg_file(PHOTO_SIZES[0])
    for is_optimized in (False, True)[: 1 + options.optimize]:
        if is_optimized:
            model.optimize_for_inference()
        for batch in options.batches:
            way = FirstToken(setup, model, "fast, bytes cross", file)
            seconds = statistics.median(
                elapsed(partial(answer_batch, way, batch, options.new_tokens), setup.device)
                for _ in range(options.rounds)
            )
            name = "optimized" if is_optimized else "as loaded"
            rates = f"{batch / seconds:.2f} | {batch * options.new_tokens / seconds:.0f}"
            yield f"| {batch} | {name} | {seconds:.2f} | {rates} |"


def answer_batch(way: FirstToken, batch: int, new_tokens: int) -> None:
    plans = way.processor.plan([way.file] * batch, multi_scale=True)
    images = {name: x.to(way.setup.device) for name, x in way.pack(plans).items()}
    ids = way.prompt(plans).repeat(batch, 1)
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    way.model.generate(ids, attention_mask=torch.ones_like(ids), **images, **settings)


PARTS = {"stages": stage_rows, "throughput": throughput_rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Time the way from a JPEG file to the first token, in milliseconds, and answers in batches.",
        epilog="example: python -m benchmarks.first_token --size 2b --device cuda --optimize",
    )
    add_setup_options(parser)
    parser.add_argument("--part", choices=PARTS, default="stages", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are printed (%(default)s)")
    parser.add_argument("--optimize", action="store_true", help="also after model.optimize_for_inference()")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="throughput, pictures (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="throughput, per picture (%(default)s)")
    options = parser.parse_args(arguments)
    with torch.no_grad():
        for row in PARTS[options.part](Setup.from_options(options), options):
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
