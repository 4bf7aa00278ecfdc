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

from conversion.files import WEIGHTS_NAME, new_folder, write_json  # noqa: E402
from conversion.names import Rule  # noqa: E402
from conversion.plan import Plan  # noqa: E402
from conversion.read import Tensors  # noqa: E402
from conversion.write import safetensors_header, write_weights  # noqa: E402

FIXTURES = ROOT / "tests" / "fixtures"
TOKENIZERS = {"2b": "internlm2", "9b": "qwen3"}
"""Recordings whose tokenizers serve: small, with the image tokens, and with ids inside the real vocabularies."""


def write(size: str, folder: Path, is_sparse: bool, max_shard_size: str) -> None:
    layout = json.loads((FIXTURES / f"official_layout_{size}.json").read_text())
    recording = FIXTURES / TOKENIZERS[size]
    write_json(folder / "config.json", layout["config"])
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(recording / name, folder)
    shapes = {name: tuple(shape) for name, shape in layout["tensors"].items()}
    rules = [Rule({name: shape}, {}, partial(noise, name, shape)) for name, shape in shapes.items()]
    plan = Plan(rules, Tensors(), torch.bfloat16)
    if not is_sparse:
        write_weights(plan, folder, max_shard_size)
        return
    header = safetensors_header(plan.shapes, plan.dtype)
    with open(folder / WEIGHTS_NAME, "wb") as file:
        file.write(header)
        file.truncate(len(header) + plan.num_bytes)


def noise(name: str, shape: Sequence[int]) -> list[torch.Tensor]:
    """Small normal numbers, around one for what multiplies channels."""
    center = 1.0 if len(shape) == 1 and not name.endswith("bias") else 0.0
    return [torch.empty(*shape, dtype=torch.bfloat16).normal_(center, 0.02)]


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
