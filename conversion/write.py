"""Writes folders: safetensors files with one tensor in memory at a time, and all that goes with them."""

import hashlib
import json
import math
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from conversion.files import CHECKSUMS_NAME, INDEX_NAME, WEIGHTS_NAME, preview, write_checksums, write_json
from conversion.plan import Conversion, Export, Plan, dtype_name, read_config
from conversion.read import SAFETENSORS_DTYPES, Shape, bounds, tensor_bytes
from conversion.tokenizers import export_tokenizer
from navil import CODE_FILES, ROOT
from navil.image_processing_navil import NaViLImageProcessor
from navil.processing_navil import NaViLProcessor

MODEL_CARD = Path(__file__).with_name("model_card.md")
SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def write_model(conversion: Conversion, folder: Path, max_shard_size: str) -> None:
    """Fills a folder with a complete model: weights, configs, tokenizer, code, card and checksums."""
    weight_lines = write_weights(conversion.plan, folder, max_shard_size)
    write_settings(conversion, folder)
    shutil.copy(license_file(), folder / "LICENSE")
    if conversion.sentencepiece is not None:
        shutil.copy(conversion.sentencepiece, folder)
    (folder / "README.md").write_text(model_card(conversion), encoding="utf-8")
    write_checksums(folder, weight_lines)


def write_settings(conversion: Conversion, folder: Path) -> None:
    """Writes all that a model folder has besides its weights, its license and its card."""
    config = conversion.config
    NaViLProcessor(NaViLImageProcessor.from_config(config), conversion.tokenizer).save_pretrained(folder)
    config.torch_dtype = conversion.plan.dtype
    config.save_pretrained(folder)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(do_sample=False, max_new_tokens=1024, **ids).save_pretrained(folder)
    copy_code(folder)


def copy_code(folder: Path) -> None:
    for name in CODE_FILES:
        shutil.copy(ROOT / name, folder)


def bundle_files(source: Path) -> list[Path]:
    """The files of a model folder without code; a ValueError for another folder, or one that has its code."""
    read_config(source)
    files = [path for path in sorted(source.iterdir()) if path.is_file()]
    code = [path.name for path in files if path.suffix == ".py"]
    if code:
        raise ValueError(f"{source} has its code already ({preview(code)}): copy the folder")
    return files


def write_bundle(files: Iterable[Path], folder: Path) -> None:
    """Fills a folder with files and this package's code."""
    for path in files:
        shutil.copy(path, folder)
    copy_code(folder)


def license_file() -> Path:
    """This package's license, in the repository or in an installed package's metadata."""
    path = ROOT / "LICENSE"
    if path.is_file():
        return path
    return next(Path(file.locate()) for file in metadata.files("navil") if file.name == "LICENSE")


def model_card(conversion: Conversion) -> str:
    config, plan = conversion.config, conversion.plan
    return MODEL_CARD.read_text(encoding="utf-8").format(
        license=conversion.license,
        origin=conversion.origin,
        parameters=plan.num_parameters,
        dtype=dtype_name(plan.dtype),
        config=config,
        vision=config.vision_config,
        text=config.text_config,
        cell=config.vision_config.patch_size * config.vision_config.spatial_merge_size,
    )


def write_export(export: Export, folder: Path, max_shard_size: str) -> None:
    """Fills a folder in the released layout."""
    weight_lines = write_weights(export.plan, folder, max_shard_size)
    write_json(folder / "config.json", export.config)
    export_tokenizer(export.tokenizer, export.backbone, export.sentencepiece, folder)
    write_checksums(folder, weight_lines)


def write_weights(plan: Plan, folder: Path, max_shard_size: str) -> list[str]:
    """Writes safetensors files, and their index if there are several.

    Args:
        max_shard_size: of a file's tensors, like `5GB`. A larger tensor has a file of its own.

    Returns:
        The files' lines for `write_checksums`.

    Raises:
        ValueError: a tensor has NaN or infinite values, in the source or as the plan's dtype.
    """
    shards = split_into_shards(plan, parse_size(max_shard_size))
    tensors, lines = plan.make(), []
    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc=f"writing {folder.name}", disable=None) as progress:
        for filename, shapes in shards.items():
            shard = islice(tensors, len(shapes))
            lines += write_safetensors(folder / filename, shard, shapes, plan.dtype, progress.update)
    if len(shards) > 1:
        weight_map = {name: filename for filename, shapes in shards.items() for name in shapes}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map})
    return lines


def parse_size(text: str) -> int:
    """`5GB` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]B)", text.strip().upper())
    if match is None:
        raise ValueError(f"--max-shard-size must be a number with KB, MB, GB or TB, like 5GB; got {text!r}")
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def split_into_shards(plan: Plan, max_size: int) -> dict[str, dict[str, Shape]]:
    """Shapes by tensor name by file name, in the plan's order."""
    shards: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in plan.shapes.items():
        num_bytes = math.prod(shape) * plan.dtype.itemsize
        if shards[-1] and size + num_bytes > max_size:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
    if len(shards) == 1:
        return {WEIGHTS_NAME: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    progress: Callable[[int], object],
) -> list[str]:
    """One safetensors file: the length of a JSON header, the header, and the tensors' bytes one after the other.

    The library's own writer needs all tensors of a file in memory. A second thread computes the checksums of a tensor
    while it is written.
    """
    header = safetensors_header(shapes, dtype)
    digest, lines = hashlib.sha256(header), []

    def checksum(data: memoryview) -> int:
        digest.update(data)
        return zlib.crc32(data)

    with open(path, "wb") as file, ThreadPoolExecutor(1) as hasher:
        file.write(header)
        for name, tensor in tensors:
            data = tensor_bytes(checked(name, tensor, shapes[name], dtype))
            crc32 = hasher.submit(checksum, data)
            file.write(data)
            lines.append(f"# crc32 {crc32.result():08x}  {name}")
            progress(len(data))
            del tensor, data  # free the memory before the next tensor is made
        file.flush()
        os.fsync(file.fileno())
    return [f"{digest.hexdigest()}  {path.name}", *lines]


def safetensors_header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", "checksums": CHECKSUMS_NAME}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def checked(name: str, tensor: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The tensor as it is written; a ValueError if it has NaN or infinite values then."""
    tensor = tensor.to(dtype).contiguous()
    if tuple(tensor.shape) != shape:
        raise AssertionError(f"{name} came out as {tuple(tensor.shape)}, planned as {shape}")
    lowest, highest = bounds(tensor)
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError(f"{name} is not finite as {dtype}: its values go from {lowest} to {highest}")
    return tensor
