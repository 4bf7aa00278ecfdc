"""Files of checkpoints: tensors read and written one at a time, and folders that are whole or not there at all."""

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
CHECKSUMS_NAME = "SHA256SUMS"

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Dtypes of weights, by the name they have in a config."""

SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TORCH_DTYPES = {word: dtype for dtype, word in SAFETENSORS_DTYPES.items()}


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {content!r:.80}")
    return content


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Turns whatever a parser raises about a file into a ValueError that names it."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:  # tokenizers and protobuf have no exception class of their own to catch
        raise ValueError(f"cannot read {path}: {type(error).__name__}: {error}") from error


def check_links(folder: Path) -> None:
    """Raises a ValueError for a link that leads out of the folder: its target might be copied and published.

    Links from a snapshot of a Hub cache to the cache's `blobs` are followed.
    """
    home = folder.resolve()
    caches = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    for path in home.iterdir():
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in (home, *caches)):
            raise ValueError(f"{folder / path.name} is a link to {target}, out of the folder")


def preview(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


class Tensors:
    """Tensors by name, read one at a time; their shapes and dtypes are known without reading them.

    A tensor is read from its file whenever it is asked for, so that it takes memory only while it is in use. It may be
    a window on what is stored, and must not be changed.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}  # a file's own word where no weights should have it
        self._readers: dict[str, Callable[[], Tensor]] = {}

    @classmethod
    def in_memory(cls, state: Mapping[str, Tensor]) -> "Tensors":
        tensors = cls()
        for name, tensor in state.items():
            tensors._add(name, tuple(tensor.shape), tensor.dtype, partial(state.__getitem__, name))
        return tensors

    @classmethod
    def in_folder(cls, folder: Path, allow_pickle: bool = False) -> "Tensors":
        """The weights of a folder: one safetensors file, or shards and an index.

        Args:
            allow_pickle: whether a folder without safetensors may have pickled weights instead. They are read without
                running what the pickle asks for (`weights_only`).

        Raises:
            ValueError: no weights, an index that disagrees with its shards or leads out of the folder, or a file that
                cannot be read.
        """
        if not any((folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
            if any((folder / name).is_file() for name in (PICKLE_NAME, PICKLE_INDEX_NAME)):
                if not allow_pickle:
                    raise ValueError(f"{folder} has pickled weights only, which are read with --allow-pickle alone")
                return cls()._add_files(folder, PICKLE_NAME, PICKLE_INDEX_NAME)
            raise ValueError(f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}")
        return cls()._add_files(folder, WEIGHTS_NAME, INDEX_NAME)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def _add_files(self, folder: Path, weights_name: str, index_name: str) -> "Tensors":
        if not (folder / index_name).is_file():
            self._add_file(folder, weights_name, weights_name)
            return self
        weight_map = read_json(folder / index_name).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{folder / index_name} has no weight_map of file names")
        found: set[tuple[str, str]] = set()
        for shard in sorted(set(weight_map.values())):
            before = set(self.shapes)
            self._add_file(folder, shard, index_name)
            found |= {(name, shard) for name in self.shapes.keys() - before}
        if found != weight_map.items():
            names = {name for name, _ in found ^ weight_map.items()}
            raise ValueError(f"{index_name} and its shards disagree about {preview(names)}")
        return self

    def _add_file(self, folder: Path, name: str, named_by: str) -> None:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{named_by} names {name!r}, which is not a file in {folder}")
        if path.suffix == ".bin":
            for tensor_name, tensor in read_pickle(path).items():
                shape, dtype = tuple(tensor.shape), tensor.dtype
                self._add(tensor_name, shape, dtype, partial(pickled_tensor, path, tensor_name))
            return
        header = read_safetensors_header(path)
        header.pop("__metadata__", None)
        for tensor_name, entry in header.items():
            shape = tuple(entry["shape"])
            dtype = TORCH_DTYPES.get(entry["dtype"], entry["dtype"])
            reader = partial(read_safetensor, path, entry["data_offsets"][0], shape, dtype)
            self._add(tensor_name, shape, dtype, reader)

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | str, reader: Callable[[], Tensor]) -> None:
        if name in self.shapes:
            raise ValueError(f"the source has {name} twice")
        self.shapes[name], self.dtypes[name], self._readers[name] = shape, dtype, reader


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Dtype, shape and `data_offsets` of each tensor; these are counted from the beginning of the file here."""
    try:
        with safe_open(path, framework="np"):  # the library checks the file as a whole
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return header


def read_safetensor(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One tensor, read rather than mapped: a mapping of the file would need memory of the file's size to be free."""
    tensor = torch.empty(shape, dtype=dtype)
    with open(path, "rb") as file:
        file.seek(offset)
        num_read = file.readinto(tensor_bytes(tensor))
    if num_read != tensor.nbytes:
        raise ValueError(f"cannot read {path}: it ends before its tensors do")
    return tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, mapped rather than read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    is_state = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )
    if not is_state:
        raise ValueError(f"{path} must hold tensors by name, got {content!r:.80}")
    return content


def pickled_tensor(path: Path, name: str) -> Tensor:
    return read_pickle(path)[name]


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class TensorPlan:
    """A tensor to be written, and how to get it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(plans: Mapping[str, TensorPlan], folder: Path, max_shard_size: str) -> list[str]:
    """Writes safetensors files, and their index where there are several, holding one tensor at a time.

    Returns:
        The files' lines for `write_checksums`.

    Raises:
        ValueError: a tensor has NaN or infinite numbers, in the source or as the planned dtype.
    """
    layout = split_state_dict_into_shards_factory(
        {name: plan.num_bytes for name, plan in plans.items()},
        get_storage_size=lambda size: size,
        get_storage_id=lambda size: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    total = sum(plan.num_bytes for plan in plans.values())
    lines = []
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {folder.name}", disable=None) as progress:
        for filename, names in layout.filename_to_tensors.items():
            lines += write_safetensors(folder / filename, {name: plans[name] for name in names}, progress.update)
    if layout.is_sharded:
        write_json(folder / INDEX_NAME, {"metadata": layout.metadata, "weight_map": layout.tensor_to_filename})
    return lines


def write_safetensors(path: Path, plans: Mapping[str, TensorPlan], progress: Callable[[int], Any]) -> list[str]:
    """One safetensors file: the length of a JSON header, the header, and the tensors' bytes one after the other.

    The library's own writer wants all tensors of a file in memory.
    """
    names, header = safetensors_header(plans)
    whole, lines = hashlib.sha256(header), []
    with open(path, "wb") as file:
        file.write(header)
        for name in names:
            data = tensor_bytes(make_finite(name, plans[name]))
            file.write(data)
            whole.update(data)
            lines.append(f"# crc32 {zlib.crc32(data):08x}  {name}")
            progress(len(data))
        file.flush()
        os.fsync(file.fileno())
    return [f"{whole.hexdigest()}  {path.name}", *lines]


def bounds(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest number; NaN, if there is one, is both."""
    lowest, highest = tensor.aminmax() if tensor.numel() else (0.0, 0.0)
    return float(lowest), float(highest)


def make_finite(name: str, plan: TensorPlan) -> Tensor:
    tensor = plan.make().to(plan.dtype).contiguous()
    if tuple(tensor.shape) != plan.shape:
        raise AssertionError(f"{name} came out as {tuple(tensor.shape)}, planned as {plan.shape}")
    lowest, highest = bounds(tensor)
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError(f"{name} is not finite as {plan.dtype}: its numbers go from {lowest} to {highest}")
    return tensor


def safetensors_header(plans: Mapping[str, TensorPlan]) -> tuple[list[str], bytes]:
    """The order of the tensors in a file, and the bytes in front of them."""
    # Wide numbers first, so that every tensor begins at a multiple of its own size.
    names = sorted(plans, key=lambda name: -plans[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "checksums": CHECKSUMS_NAME}}
    end = 0
    for name in names:
        plan = plans[name]
        begin, end = end, end + plan.num_bytes
        header[name] = {"dtype": SAFETENSORS_DTYPES[plan.dtype], "shape": plan.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return names, struct.pack("<Q", len(encoded)) + encoded


# ----------------------------------------------------------------------------------------------------------------------
# Checksums
# ----------------------------------------------------------------------------------------------------------------------

CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  ([^/]+)|# crc32 ([0-9a-f]{8})  (.+)")


def sha256(path: Path) -> str:
    """Empty for a file that is not there."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_checksums(folder: Path, weight_lines: list[str]) -> None:
    """Writes what `sha256sum --check SHA256SUMS` reads: a line per file, and in comments a CRC-32 per tensor."""
    known = {line.split("  ", 1)[1] for line in weight_lines}
    others = [f"{sha256(path)}  {path.name}" for path in sorted(folder.iterdir()) if path.name not in known]
    (folder / CHECKSUMS_NAME).write_text("\n".join([*others, *weight_lines]) + "\n", encoding="utf-8")


def read_checksums(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """SHA-256 by file and CRC-32 by tensor; none for a folder that no conversion wrote.

    Raises:
        ValueError: the conversion's `SHA256SUMS` is gone or damaged.
    """
    path, files, tensors = folder / CHECKSUMS_NAME, {}, {}
    if not path.is_file():
        for weights in folder.glob("*.safetensors"):
            if "checksums" in read_safetensors_header(weights).get("__metadata__", {}):
                raise ValueError(f"{path} is missing; it was written with {weights.name}")
        return files, tensors
    for line in path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n"):
        match = CHECKSUM_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{path} has a line that is no checksum: {line!r:.80}")
        if match[1]:
            files[match[2]] = match[1]
        else:
            tensors[match[4]] = int(match[3], 16)
    return files, tensors


# ----------------------------------------------------------------------------------------------------------------------
# Folders
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` that takes its name when all went well, and is removed otherwise.

    Whoever is killed on the way leaves that folder behind, under a name with a dot in front; the next to make the same
    destination removes it.

    Raises:
        ValueError: the destination exists and is not an empty folder, or another process is making it.
    """
    destination = destination.resolve()
    destination.parent.mkdir(parents=True, exist_ok=True)
    building = destination.with_name(f".{destination.name}.unfinished")
    lock = FileLock(destination.with_name(f".{destination.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"another process is writing {destination}") from error
    try:
        if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
            raise ValueError(f"{destination} exists already; choose another destination or remove it")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        yield building
        if destination.exists():
            destination.rmdir()  # Windows replaces no folder, not even an empty one
        os.replace(building, destination)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        lock.release()
        with suppress(OSError):  # Windows removes no open file: another process may have taken the lock by now
            os.unlink(lock.lock_file)
