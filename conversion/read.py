"""Reads tensors one at a time, from safetensors files or, where allowed, from pickles."""

import json
import pickle
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conversion.files import INDEX_NAME, PICKLE_INDEX_NAME, PICKLE_NAME, WEIGHTS_NAME, preview, read_json

Shape = tuple[int, ...]

SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TORCH_DTYPES = {word: dtype for dtype, word in SAFETENSORS_DTYPES.items()}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_DTYPES}
"""Dtypes of weights, by the name they have in a config."""


class Tensors:
    """Tensors by name. Shapes and dtypes are known from file headers; data is read when a tensor is asked for.

    A tensor may share memory with its file or its model and must not be changed.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}  # safetensors' own word for a dtype that weights never have
        self._readers: dict[str, Callable[[], Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def add(self, name: str, shape: Shape, dtype: torch.dtype | str, reader: Callable[[], Tensor]) -> None:
        if name in self.shapes:
            raise ValueError(f"the source has {name} twice")
        self.shapes[name], self.dtypes[name], self._readers[name] = shape, dtype, reader

    def add_state(self, state: Mapping[str, Tensor]) -> None:
        """Adds tensors that are in memory or mapped."""
        for name, tensor in state.items():
            self.add(name, tuple(tensor.shape), tensor.dtype, partial(state.__getitem__, name))

    def remove(self, name: str) -> tuple[Shape, torch.dtype | str, Callable[[], Tensor]]:
        """Takes a tensor out; returns what `add` takes."""
        return self.shapes.pop(name), self.dtypes.pop(name), self._readers.pop(name)


def open_tensors(folder: Path, allow_pickle: bool = False) -> Tensors:
    """The weights of a folder: one safetensors file, or shards and their index.

    Args:
        allow_pickle: whether a folder without safetensors may have pickled weights. `torch.load` reads them with
            `weights_only`, which runs no code from the pickle.

    Raises:
        ValueError: no weights, an index that disagrees with its shards or names a file elsewhere, or a file that cannot
            be read.
    """
    tensors = Tensors()
    add_file, weights_name, index_name = _add_safetensors, WEIGHTS_NAME, INDEX_NAME
    if not any((folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        if not any((folder / name).is_file() for name in (PICKLE_NAME, PICKLE_INDEX_NAME)):
            raise ValueError(f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}")
        if not allow_pickle:
            raise ValueError(f"{folder} has pickled weights only; they are read only with --allow-pickle")
        add_file, weights_name, index_name = _add_pickle, PICKLE_NAME, PICKLE_INDEX_NAME
    if not (folder / index_name).is_file():
        add_file(tensors, folder / weights_name)
        return tensors
    weight_map = read_json(folder / index_name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{folder / index_name} has no weight_map of file names")
    found: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ValueError(f"{index_name} names {shard!r}, which is not a file in {folder}")
        known = set(tensors.shapes)
        add_file(tensors, folder / shard)
        found |= dict.fromkeys(tensors.shapes.keys() - known, shard)
    wrong = {name for name, _ in found.items() ^ weight_map.items()}
    if wrong:
        raise ValueError(f"{index_name} and its shards disagree about {preview(wrong)}")
    return tensors


def _add_pickle(tensors: Tensors, path: Path) -> None:
    tensors.add_state(read_pickle(path))


def _add_safetensors(tensors: Tensors, path: Path) -> None:
    for name, entry in read_safetensors_header(path).items():
        if name != "__metadata__":
            shape, dtype = tuple(entry["shape"]), TORCH_DTYPES.get(entry["dtype"], entry["dtype"])
            tensors.add(name, shape, dtype, partial(read_safetensor, path, entry["data_offsets"][0], shape, dtype))


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Dtype, shape and `data_offsets` of each tensor, the offsets from the beginning of the file."""
    try:
        with safe_open(path, framework="np"):  # the library checks the whole header
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


def read_safetensor(path: Path, offset: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    """One tensor, read and not mapped: a mapping counts the whole file as the process's memory."""
    tensor = torch.empty(shape, dtype=dtype)
    with open(path, "rb") as file:
        file.seek(offset)
        num_read = file.readinto(tensor_bytes(tensor))
    if num_read != tensor.nbytes:
        raise ValueError(f"cannot read {path}: it ends before its tensors do")
    return tensor


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors in a file that `torch.save` wrote, mapped into memory."""
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


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def bounds(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest value; both are NaN if there is a NaN."""
    lowest, highest = tensor.aminmax() if tensor.numel() else (0.0, 0.0)
    return float(lowest), float(highest)
