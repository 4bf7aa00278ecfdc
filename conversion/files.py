"""JSON files, links, checksums, and a new folder that is complete or absent."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
CHECKSUMS_NAME = "SHA256SUMS"


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {content!r:.80}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def preview(names: Iterable[str]) -> str:
    """The first five names in alphabetical order, and the number of the others."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def describe_problems(problems: Mapping[str, Collection[str]]) -> str:
    """The number and a preview of the names of each kind of problem; empty if there is none."""
    return "; ".join(f"{len(names)} {kind}: {preview(names)}" for kind, names in problems.items() if names)


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Turns any exception that a parser raises about a file into a ValueError that names the file."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:  # tokenizers and protobuf have no exception class of their own to catch
        raise ValueError(f"cannot read {path}: {type(error).__name__}: {error}") from error


def check_links(folder: Path) -> None:
    """Raises a ValueError for a link out of the folder: a conversion might publish what it points to.

    Links from a snapshot of a Hub cache to the cache's `blobs` are allowed.
    """
    home = folder.resolve()
    caches = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    for path in home.iterdir():
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in (home, *caches)):
            raise ValueError(f"{folder / path.name} is a link to {target}, out of the folder")


CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  ([^/]+)|# crc32 ([0-9a-f]{8})  (.+)")


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal; empty if there is no such file."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_checksums(folder: Path, weight_lines: list[str]) -> None:
    """Writes `SHA256SUMS` for `sha256sum --check`: a line for each file, and each tensor's CRC-32 in a comment.

    Args:
        weight_lines: the lines of the weight files and their tensors, as `write_weights` returns them.
    """
    known = {line.split("  ", 1)[1] for line in weight_lines}
    others = [f"{sha256(path)}  {path.name}" for path in sorted(folder.iterdir()) if path.name not in known]
    (folder / CHECKSUMS_NAME).write_text("\n".join([*others, *weight_lines]) + "\n", encoding="utf-8")


def read_checksums(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """SHA-256 by file name and CRC-32 by tensor name; both are empty if the folder has no `SHA256SUMS`.

    Raises:
        ValueError: a line that is no checksum.
    """
    path, files, tensors = folder / CHECKSUMS_NAME, {}, {}
    if not path.is_file():
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


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder beside `destination`, renamed to it at the end, or removed after an exception.

    A killed process leaves its temporary folder, whose name begins with a dot. The next run with the same destination
    removes it.

    Raises:
        ValueError: the destination exists and is not an empty folder, or another process is writing it.
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
            destination.rmdir()  # Windows cannot replace a folder, not even an empty one
        os.replace(building, destination)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        lock.release()
        with suppress(OSError):  # Windows cannot remove an open file: another process may hold the lock by now
            os.unlink(lock.lock_file)
