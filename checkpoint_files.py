"""Files of checkpoints: tensors read and written one at a time, and folders that are whole or not there at all."""

import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Dtypes of weights, by the name they have in a config."""

SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {content!r:.80}")
    return content


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def preview(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


class Tensors:
    """Tensors by name, read one at a time; their shapes and dtypes are known without reading them.

    A tensor that came from a file is a window on it: it takes memory only while it is in use, and must not be changed.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}  # a file's own word where no weights should have it
        self._readers: dict[str, Callable[[str], Tensor]] = {}

    @classmethod
    def in_memory(cls, state: Mapping[str, Tensor]) -> "Tensors":
        tensors = cls()
        for name, tensor in state.items():
            tensors._add(name, tuple(tensor.shape), tensor.dtype, state.__getitem__)
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
        return self._readers[name](name)

    def _add_files(self, folder: Path, weights_name: str, index_name: str) -> "Tensors":
        if not (folder / index_name).is_file():
            self._add_file(folder, weights_name, weights_name)
            return self
        weight_map = read_json(folder / index_name).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{folder / index_name} has no weight_map of file names")
        for shard in sorted(set(weight_map.values())):
            self._add_file(folder, shard, index_name)
        listed, found = set(weight_map), set(self.shapes)
        if listed != found:
            raise ValueError(f"{index_name} and its shards disagree about {preview(listed ^ found)}")
        return self

    def _add_file(self, folder: Path, name: str, named_by: str) -> None:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{named_by} names {name!r}, which is not a file in {folder}")
        if not is_inside(path, folder):
            raise ValueError(f"{path} is a link to {path.resolve()}, out of the folder")
        # The file is opened anew for each tensor: what was read stays mapped, and counts as memory, until it is closed.
        if path.suffix == ".bin":
            for tensor_name, tensor in read_pickle(path).items():
                shape, dtype = tuple(tensor.shape), tensor.dtype
                self._add(tensor_name, shape, dtype, lambda wanted: read_pickle(path)[wanted])
            return
        dtypes = {word: dtype for dtype, word in SAFETENSORS_DTYPES.items()}
        with open_safetensors(path) as file:
            for tensor_name in file.keys():  # noqa: SIM118
                part = file.get_slice(tensor_name)
                dtype = dtypes.get(part.get_dtype(), part.get_dtype())
                self._add(tensor_name, tuple(part.get_shape()), dtype, lambda wanted: read_safetensor(path, wanted))

    def _add(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | str, reader: Callable[[str], Tensor]
    ) -> None:
        if name in self.shapes:
            raise ValueError(f"the source has {name} twice")
        self.shapes[name], self.dtypes[name], self._readers[name] = shape, dtype, reader


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file's bytes lie in the folder, or where a Hub cache keeps those of its snapshots."""
    real, home = path.resolve().parent, folder.resolve()
    return real == home or home.parent.name == "snapshots" and real == home.parent.parent / "blobs"


def open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def read_safetensor(path: Path, name: str) -> Tensor:
    with open_safetensors(path) as file:
        return file.get_tensor(name)


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


def write_weights(plans: Mapping[str, TensorPlan], folder: Path, max_shard_size: str) -> None:
    """Writes safetensors files, and their index where there are several, holding one tensor at a time."""
    layout = split_state_dict_into_shards_factory(
        {name: plan.num_bytes for name, plan in plans.items()},
        get_storage_size=lambda size: size,
        get_storage_id=lambda size: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    total = sum(plan.num_bytes for plan in plans.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {folder.name}", disable=None) as progress:
        for filename, names in layout.filename_to_tensors.items():
            write_safetensors(folder / filename, {name: plans[name] for name in names}, progress.update)
    if layout.is_sharded:
        write_json(folder / INDEX_NAME, {"metadata": layout.metadata, "weight_map": layout.tensor_to_filename})


def write_safetensors(path: Path, plans: Mapping[str, TensorPlan], progress: Callable[[int], Any]) -> None:
    """One safetensors file: the length of a JSON header, the header, and the tensors' bytes one after the other.

    The library's own writer wants all tensors of a file in memory.
    """
    # Wide numbers first, so that every tensor begins at a multiple of its own size.
    names = sorted(plans, key=lambda name: -plans[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        plan = plans[name]
        begin, end = end, end + plan.num_bytes
        header[name] = {"dtype": SAFETENSORS_DTYPES[plan.dtype], "shape": plan.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            plan = plans[name]
            tensor = plan.make().to(plan.dtype).contiguous()
            if tuple(tensor.shape) != plan.shape:
                raise AssertionError(f"{name} came out as {tuple(tensor.shape)}, planned as {plan.shape}")
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            progress(plan.num_bytes)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` that takes its name when all went well, and is removed otherwise.

    Whoever is killed on the way leaves that folder behind, under a name with a dot in front; the next to make the same
    destination removes it.

    Raises:
        ValueError: the destination exists and is not an empty folder, or another process is making it.
    """
    destination = destination.resolve()
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ValueError(f"{destination} exists already; choose another destination or remove it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    building = destination.with_name(f".{destination.name}.unfinished")
    lock_path = destination.with_name(f".{destination.name}.lock")
    try:
        with FileLock(lock_path, timeout=0):
            try:
                shutil.rmtree(building, ignore_errors=True)
                building.mkdir()
                yield building
                os.replace(building, destination)
            finally:
                shutil.rmtree(building, ignore_errors=True)
                lock_path.unlink(missing_ok=True)
    except Timeout as error:
        raise ValueError(f"another process is writing {destination}") from error
