"""Training on packed rows: time and memory against row length, and the FLOP rate of a step.

    python -m benchmarks.training --size tiny
    python -m benchmarks.training --part step --size 2b --device cuda --lengths 16384 --checkpointing

The first part trains the decoder on rows of eight equal documents of text: one packed row against the eight documents
one after another, each of them with its own backward pass. The second runs whole training steps of all parameters
(S2, AdamW) on a row whose documents are an image, three tokens in four, and text; FLOPs are those of the model, three
times a forward pass, without what checkpointing computes again.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from navil.modeling_navil import NaViLForConditionalGeneration

from . import roofline
from .memory import MIB, Peak, in_fresh_process
from .run import median_ratio, time_interleaved
from .workloads import Setup, add_setup_options, free_memory, text_only

NUM_DOCUMENTS = 8
VISUAL_SHARE = 0.75  # of a document's tokens, as in the paper's training data


def packed_inputs(lengths: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """What `forward` needs to keep the documents of one row apart."""
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return {
        "cu_seq_lens_q": offsets,
        "position_ids": torch.cat([torch.arange(n, device=device) for n in lengths])[None],
    }


def text_step(model: NaViLForConditionalGeneration, ids: Tensor, num_documents: int) -> Callable[[], None]:
    """A forward and backward pass of a row (1, L) of equal documents."""
    lengths = [ids.shape[1] // num_documents] * num_documents
    inputs = {"input_ids": ids, "labels": ids, **packed_inputs(lengths, ids.device)}

    def step() -> None:
        model.zero_grad()
        model(**inputs).loss.backward()

    return step


def text_steps(setup: Setup, length: int, checkpointing: bool) -> dict[str, Callable[[], None]]:
    """The same documents packed into one row, and apart."""
    model = setup.build(text_only(setup.config)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(setup.config.text_config.vocab_size, (1, length), device=setup.device)
    alone = [text_step(model, part, 1) for part in ids.split(length // NUM_DOCUMENTS, dim=1)]

    def apart() -> None:
        for step in alone:
            step()

    return {"packed": text_step(model, ids, NUM_DOCUMENTS), "apart": apart}


def step_memory(setup: Setup, length: int, checkpointing: bool, name: str) -> tuple[float, float]:
    """Bytes per token and MiB of a step above the model and its gradients."""
    step = text_steps(setup, length, checkpointing)[name]
    text_steps(setup, NUM_DOCUMENTS * 8, checkpointing)[name]()  # libraries allocate in their first call
    step()  # gradients
    free_memory(setup.device)
    peak = Peak(setup.device)
    step()
    return peak.mib() * MIB / length, peak.mib()


def packed_rows(setup: Setup, options: argparse.Namespace) -> Iterator[str]:
    yield "| row, tokens | packed | apart | packed / apart | peak above the model, packed | per token |"
    yield "|---|---|---|---|---|---|"
    for length in options.lengths:
        per_token, peak = in_fresh_process(step_memory, setup, length, options.checkpointing, "packed")
        steps = text_steps(setup, length, options.checkpointing)
        times = time_interleaved(steps, options.rounds, setup.device)
        seconds = [statistics.median(times[name]) for name in ("packed", "apart")]
        ratio = median_ratio(times["packed"], times["apart"])
        cells = f"{seconds[0]:.2f} s | {seconds[1]:.2f} s | {ratio:.2f} | {peak:.0f} MiB | {per_token / 1024:.1f} KiB"
        yield f"| {length:,} | {cells} |"


# -- Whole steps -------------------------------------------------------------------------------------------------------


def mixed_row(setup: Setup, length: int) -> tuple[dict[str, Tensor], float]:
    """A row of documents with an image each, and the FLOPs of a forward pass and its backward pass."""
    config, merge = setup.config, setup.config.vision_config.spatial_merge_size
    document = length // NUM_DOCUMENTS
    rows = 32  # merged cells; an image is a grid of 32 x n cells
    grid = [1, merge * rows, merge * int(VISUAL_SHARE * document / rows)]
    cells = grid[1] * grid[2] // merge**2
    ids = torch.full((NUM_DOCUMENTS, document), 5)
    ids[:, 0], ids[:, 1 : 1 + cells] = config.image_start_token_id, config.image_token_id
    labels = ids.clone()
    labels[:, : 1 + cells] = -100
    num_patches = NUM_DOCUMENTS * grid[1] * grid[2]
    inputs = {
        "input_ids": ids.view(1, -1),
        "labels": labels.view(1, -1),
        "pixel_values": torch.randn(num_patches, config.vision_config.patch_dim, dtype=setup.dtype),
        "image_grid_thw": torch.tensor([grid] * NUM_DOCUMENTS),
        **packed_inputs([document] * NUM_DOCUMENTS, torch.device("cpu")),
    }
    num_labels = NUM_DOCUMENTS * (document - cells - 1)
    forward = roofline.vision_flops(config, [grid] * NUM_DOCUMENTS)
    forward += NUM_DOCUMENTS * roofline.prefill_flops(config.text_config, document, num_labels / NUM_DOCUMENTS)
    return {name: value.to(setup.device) for name, value in inputs.items()}, 3 * forward


def step_rows(setup: Setup, options: argparse.Namespace) -> Iterator[str]:
    setup.config.image_token_id, setup.config.image_start_token_id = 1, 2
    model = setup.build(setup.config).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=setup.device.type == "cuda")
    probe = roofline.matmul_probe(setup.device, setup.dtype)
    yield "| row, tokens | step | tokens/s | model FLOPs, % of the product rate | peak |\n|---|---|---|---|---|"
    for length in options.lengths:
        inputs, flops = mixed_row(setup, length)

        def step(inputs: dict[str, Tensor]) -> None:
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        peak = Peak(setup.device)
        times = time_interleaved({"step": partial(step, inputs), "FLOPs": probe.call}, options.rounds, setup.device)
        seconds = statistics.median(times["step"])
        share = median_ratio(times["FLOPs"], times["step"]) * flops / probe.amount
        held = torch.cuda.max_memory_allocated() / MIB if setup.device.type == "cuda" else peak.mib()
        yield f"| {length:,} | {seconds:.2f} s | {length / seconds:.0f} | {100 * share:.0f} % | {held:.0f} MiB |"


PARTS = {"packed": packed_rows, "step": step_rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Time training steps on packed rows, and measure their memory.",
        epilog="example: python -m benchmarks.training --size tiny --lengths 2048 16384",
    )
    add_setup_options(parser)
    parser.add_argument("--part", choices=PARTS, default="packed", help="(%(default)s)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="of rows, tokens (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are printed (%(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    options = parser.parse_args(arguments)
    for line in PARTS[options.part](Setup.from_options(options), options):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
