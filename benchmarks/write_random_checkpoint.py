"""Writes a random checkpoint in the released layout, of the full shape of NaViL-2B or NaViL-9B.

python benchmarks/write_random_checkpoint.py 2b weights/random-2b            # 8.1 GB of bf16 noise
python benchmarks/write_random_checkpoint.py 9b weights/random-9b --sparse   # 33 GB of zeros that take no space on disk
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint_files import (  # noqa: E402
    WEIGHTS_NAME,
    TensorPlan,
    new_folder,
    safetensors_header,
    write_json,
    write_weights,
)

FIXTURES = ROOT / "tests" / "fixtures"
TOKENIZERS = {"2b": "internlm2", "9b": "qwen3"}
"""Recordings whose tokenizers serve: small, with the image tokens, and with ids inside the real vocabularies."""


def write(size: str, folder: Path, is_sparse: bool, max_shard_size: str) -> None:
    layout = json.loads((FIXTURES / f"official_layout_{size}.json").read_text())
    recording = FIXTURES / TOKENIZERS[size]
    write_json(folder / "config.json", layout["config"])
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(recording / name, folder)
    plans = {
        name: TensorPlan(torch.bfloat16, tuple(shape), partial(noise, name, shape))
        for name, shape in layout["tensors"].items()
    }
    if not is_sparse:
        write_weights(plans, folder, max_shard_size)
        return
    _, header = safetensors_header(plans)
    with open(folder / WEIGHTS_NAME, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(plan.num_bytes for plan in plans.values()))


def noise(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Small normal numbers, around one for what multiplies channels."""
    centre = 1.0 if len(shape) == 1 and not name.endswith("bias") else 0.0
    return torch.empty(*shape, dtype=torch.bfloat16).normal_(centre, 0.02)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a random checkpoint of a released model's full shape.")
    parser.add_argument("size", choices=sorted(TOKENIZERS))
    parser.add_argument("destination", type=Path, metavar="DST", help="new folder")
    parser.add_argument("--sparse", action="store_true", help="zeros that take no space on disk, for dry runs")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with new_folder(options.destination) as folder:
        write(options.size, folder, options.sparse, options.max_shard_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
