"""Sources of training data as named rows: JSON files, Hugging Face data sets, and WebDataset shards.

A source either has all its rows at hand (`FileRows`, `TableRows`: `len(source)`, `source.row(index)`) or streams them
shard by shard (`TarShards`, `StreamShards`: `source.shards`, `source.rows(shard)`).
"""

import glob
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np

from .records import ALIASES, BadRecord, Fields, parse_json, read_conversation

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTION_SUFFIXES = ("txt", "caption", "text")
SCAN_BYTES = 1 << 26
STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)
"""Strings, brackets and commas of JSON text."""

OPTIONS = ("weight", "image_folder", "split", "config", "streaming", "prompt")
USAGE = f"""PATH [KEY=VALUE ...]: a .json or .jsonl file; .parquet, .arrow or .csv files; a folder; a data set's name on
the Hub; or .tar shards. Paths may have * and {{00..99}}. Keys: {", ".join(OPTIONS)}, and columns of other names by what
they hold: {", ".join(ALIASES)}"""


class DataError(ValueError):
    """Training data that cannot be read at all, or that has bad records where none is allowed."""


class Row(NamedTuple):
    """A record: its name, for messages and logs, and a function that reads it or raises a `BadRecord`."""

    name: str
    read: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """One `--data`.

    Args:
        path: of a file, of several with `*` and `{00..99}`, or of a folder; or the name of a data set on the Hub.
        weight: share of the examples that are drawn from it, relative to the other sources; all or none have one.
        fields: how to read its records. If `image_folder` is empty, paths are relative to the JSON file.
        split, config: of a Hugging Face data set.
        streaming: whether to stream a Hugging Face data set instead of loading it first.

    Raises:
        ValueError: a weight that is not a positive number.
    """

    path: str
    weight: float | None = None
    fields: Fields = Fields()
    split: str = "train"
    config: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"the weight of {self.path} must be a positive number, got {self.weight}")

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Source":
        """The source of `--data PATH [KEY=VALUE ...]`.

        Raises:
            ValueError: an unknown key, or a value of another form.
        """
        path, *settings = words
        pairs = dict(setting.partition("=")[::2] for setting in settings)
        unknown = [setting for setting in settings if setting.partition("=")[0] not in (*OPTIONS, *ALIASES)]
        if unknown:
            raise ValueError(
                f"--data takes KEY=VALUE with the keys {', '.join((*OPTIONS, *ALIASES))}; got {unknown[0]!r}"
            )
        if pairs.get("streaming", "true") not in ("true", "false"):
            raise ValueError(f"streaming must be true or false, got {pairs['streaming']!r}")
        columns = {name: pairs[name] for name in ALIASES if name in pairs}
        return cls(
            path,
            read_weight(path, pairs["weight"]) if "weight" in pairs else None,
            Fields(columns, pairs.get("image_folder", ""), pairs.get("prompt")),
            pairs.get("split", "train"),
            pairs.get("config"),
            pairs.get("streaming") == "true",
        )

    def open(self) -> "FileRows | TableRows | TarShards | StreamShards":
        """Finds the data and, unless it is streamed, counts its records.

        Raises:
            DataError: no such file, no record, or a data set that cannot be loaded.
            ImportError: `datasets` is needed and not installed.
        """
        files = expand_paths(self.path)
        if files and files[0].lower().endswith(TAR_SUFFIXES):
            return TarShards(files, self.fields)
        if self.path.lower().endswith(JSON_SUFFIXES):
            return FileRows(only_file(self.path, files), self.fields)
        return open_table(self, files)


def read_weight(path: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the weight of {path} must be a positive number, got {text!r}") from None


def read_examples(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """All examples of sources that have their rows at hand, in order, for evaluation.

    Raises:
        DataError: the first bad record, by name; or a streamed source.
    """
    examples = []
    for source in sources:
        opened = source.open()
        if not hasattr(opened, "row"):
            raise DataError(f"{source.path} is streamed; only files and loaded data sets can be read as a list")
        for index in range(len(opened)):
            row = opened.row(index)
            try:
                examples.append(row.read())
            except BadRecord as error:
                raise DataError(f"{row.name}: {error}") from None
    return examples


# -- paths -------------------------------------------------------------------------------------------------------------


def expand_paths(path: str) -> list[str]:
    """The files that a path with `{00..99}`, `*`, or a folder of .tar files stands for; empty for other names.

    Raises:
        DataError: a file of a range does not exist.
    """
    expanded = expand_ranges(path)
    if any("://" in name for name in expanded):
        return expanded
    if os.path.isdir(path):
        return sorted(str(file) for file in Path(path).iterdir() if file.name.lower().endswith(TAR_SUFFIXES))
    files = [file for name in expanded for file in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    missing = [file for file in files if not os.path.exists(file)]
    if missing and expanded != [path]:
        raise DataError(f"{path}: {len(missing)} of its files do not exist, the first is {missing[0]}")
    return [] if missing else files


def expand_ranges(path: str) -> list[str]:
    """`{008..010}` -> 008, 009, 010, as in a shell, for every range of a path."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if found is None:
        return [path]
    start, end = found.groups()
    numbers = [f"{number:0{len(start)}}" for number in range(int(start), int(end) + 1)]
    return [name for number in numbers for name in expand_ranges(path[: found.start()] + number + path[found.end() :])]


def only_file(path: str, files: Sequence[str]) -> str:
    if len(files) != 1 or not os.path.isfile(files[0]):
        raise DataError(f"{path} must be one file on this machine, found {list(files) or 'none'}")
    return files[0]


# -- JSON --------------------------------------------------------------------------------------------------------------


class FileRows:
    """Records of a JSON array (`.json`) or of JSON Lines.

    24 bytes of memory per record; the file is read at each access.

    Raises:
        DataError: no record, or an array that does not end.
    """

    def __init__(self, path: str, fields: Fields):
        self.path = path
        self.fields = fields if fields.image_folder else Fields(fields.columns, os.path.dirname(path), fields.prompt)
        newlines = find_newlines(path)
        spans = array_spans(path) if begins_array(path) else line_spans(path, newlines)
        if not len(spans):
            raise DataError(f"{path} has no record")
        self.starts, self.ends = spans.T
        self.lines = np.searchsorted(newlines, self.starts) + 1
        self.shares_lines = bool((np.diff(self.lines) == 0).any())  # as in an array that `json.dump` wrote

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, index: int) -> Row:
        number = f" (record {index + 1})" if self.shares_lines else ""
        return Row(f"{self.path}:{self.lines[index]}{number}", partial(self._read, index))

    def _read(self, index: int) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            content = file.read(self.ends[index] - self.starts[index])
        return read_conversation(parse_json(content), self.fields)


def find_newlines(path: str) -> np.ndarray:
    """Offsets in bytes of all line ends, and the file's size if its last line has none."""
    found, offset, last = [], 0, b"\n"
    with open(path, "rb") as file:
        while chunk := file.read(SCAN_BYTES):
            found.append(offset + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))
            offset, last = offset + len(chunk), chunk[-1:]
    return np.concatenate([*found, np.array([offset] if last != b"\n" else [], int)])


def line_spans(path: str, newlines: np.ndarray) -> np.ndarray:
    """(records, 2): start and end in bytes of each line that is not blank."""
    spans = np.stack([np.concatenate([[0], newlines[:-1] + 1])[: len(newlines)], newlines], 1).astype(int)
    with open(path, "rb") as file:

        def is_blank(start: int, end: int) -> bool:
            file.seek(start)
            return not file.read(end - start).strip()

        short = np.flatnonzero(spans[:, 1] - spans[:, 0] < 8)
        blank = [index for index in short if is_blank(*spans[index].tolist())]
    return np.delete(spans, blank, axis=0)


def begins_array(path: str) -> bool:
    if not path.lower().endswith(".json"):
        return False
    with open(path, "rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def array_spans(path: str) -> np.ndarray:
    """(records, 2): start and end in bytes of each element of the file's JSON array, found by its brackets alone."""
    depth, start, spans = 0, 0, []
    with open(path, "rb") as file:
        content = file.read()
    for token in STRUCTURE.finditer(content):
        kind = token.group()
        depth += (kind in (b"[", b"{")) - (kind in (b"]", b"}"))
        if depth == 1 and kind == b",":
            spans.append(trim(content, start, token.start()))
        if depth == 1 and kind in (b"[", b","):
            start = token.end()
        if depth == 0:
            break
    if depth or content[token.end() :].strip():
        line = content.count(b"\n", 0, trim(content, start, len(content))[0]) + 1
        raise DataError(
            f"{path}: the JSON array does not end with the file; look for a bracket or quote from line {line}"
        )
    last = trim(content, start, token.start())
    return np.array(spans + [last] * bool(spans or last[0] < last[1]), int).reshape(-1, 2)


def trim(content: bytes, start: int, end: int) -> tuple[int, int]:
    """The span without blanks in front."""
    return end - len(content[start:end].lstrip()), end


# -- Hugging Face data sets --------------------------------------------------------------------------------------------


class TableRows:
    """Rows of a loaded `datasets.Dataset`; images stay encoded."""

    def __init__(self, name: str, dataset: Any, fields: Fields):
        self.name, self.dataset, self.fields = name, dataset.with_format("arrow"), fields
        if not len(dataset):
            raise DataError(f"{name} has no row")

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> Row:
        return Row(f"{self.name} row {index}", partial(self._read, int(index)))

    def _read(self, index: int) -> dict[str, Any]:
        return read_conversation(self.dataset[index].to_pylist()[0], self.fields)


class StreamShards:
    """Shards of a streamed `datasets.IterableDataset`; images stay encoded."""

    def __init__(self, name: str, dataset: Any, fields: Fields):
        self.name, self.dataset, self.fields = name, dataset.with_format("arrow"), fields
        self.shards = [f"{name} shard {number}" for number in range(dataset.num_shards)]

    def rows(self, shard: int, start: int = 0) -> Iterator[Row]:
        """The shard's rows from number `start` on."""
        rows = self.dataset.shard(num_shards=len(self.shards), index=shard).skip(start)
        number = start
        try:
            for table in rows.iter(1):  # `__iter__` would leave out rows in a worker, for another one to read
                yield Row(f"{self.shards[shard]} row {number}", partial(self._read, table))
                number += 1
        except Exception as error:  # of any storage or decoder: the rest of the shard is lost
            yield broken_shard(f"{self.shards[shard]} row {number}", error)

    def _read(self, table: Any) -> dict[str, Any]:
        return read_conversation(table.to_pylist()[0], self.fields)


def open_table(source: Source, files: Sequence[str]) -> TableRows | StreamShards:
    """A Hugging Face data set: of files, saved by `save_to_disk`, in a folder, or on the Hub."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source.path} needs datasets: pip install 'datasets>=3' ({error})") from error

    name, arguments = f"{source.path} {source.split}", table_arguments(source, files)
    try:
        if os.path.exists(os.path.join(source.path, "state.json")):
            return TableRows(source.path, datasets.load_from_disk(source.path), source.fields)
        dataset = datasets.load_dataset(**arguments, split=source.split, streaming=source.streaming)
    except Exception as error:  # `datasets` raises errors of many types
        raise DataError(f"cannot load {name}: {str(error) or type(error).__name__}") from error
    return (StreamShards if source.streaming else TableRows)(name, dataset, source.fields)


def table_arguments(source: Source, files: Sequence[str]) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset`: the builder and the files, or the name of a folder or data set."""
    suffix = Path(source.path).suffix.lower()
    if not files and suffix not in (*TABLE_BUILDERS, *TAR_SUFFIXES):
        return {"path": source.path, "name": source.config}
    if not files:
        raise DataError(f"{source.path}: no such file")
    if suffix not in TABLE_BUILDERS:
        raise DataError(f"{source.path} is none of {', '.join((*JSON_SUFFIXES, *TABLE_BUILDERS, *TAR_SUFFIXES))}")
    return {"path": TABLE_BUILDERS[suffix], "data_files": {source.split: list(files)}}


# -- WebDataset --------------------------------------------------------------------------------------------------------


class StrictTarInfo(tarfile.TarInfo):
    """A member whose header must be whole: `tarfile` takes a damaged one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(str(error)) from error


class TarShards:
    """WebDataset shards, local or at any address that fsspec opens: files of one name are one record.

    A record's image is its .jpg, .png, ...; its caption the .txt, .caption or .text; a .json adds fields of its own.
    """

    def __init__(self, shards: Sequence[str], fields: Fields):
        self.shards, self.fields = list(shards), fields

    def rows(self, shard: int, start: int = 0) -> Iterator[Row]:
        """The shard's records from number `start` on.

        Where a shard is damaged, the record in front may lack files; a bad record named after it takes its place.
        """
        path, key = self.shards[shard], None
        try:
            with ExitStack() as stack:
                is_local = os.path.exists(path)  # then skipped members are not read
                file = stack.enter_context(fsspec.open(path, "rb"))
                mode = "r:*" if is_local else "r|*"
                archive = stack.enter_context(tarfile.open(fileobj=file, mode=mode, tarinfo=StrictTarInfo))
                for number, (key, members) in enumerate(groupby(regular_members(archive), key=record_key)):
                    if number >= start:
                        files = [(suffix(member), archive.extractfile(member).read()) for member in members]
                        yield Row(f"{path} {key}", partial(read_sample, files, self.fields))
        except Exception as error:  # of any storage or compression: the rest of the shard is lost
            yield broken_shard(f"{path} at {key}" if key else path, error)


def regular_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        if member.isreg() and "." in os.path.basename(member.name):
            yield member
        archive.members = []  # or a large archive fills the memory


def record_key(member: tarfile.TarInfo) -> str:
    """The member's path up to the first dot of its file name."""
    folder, name = os.path.split(member.name)
    return os.path.join(folder, name.partition(".")[0])


def suffix(member: tarfile.TarInfo) -> str:
    return os.path.basename(member.name).partition(".")[2].lower()


def read_sample(files: Sequence[tuple[str, bytes]], fields: Fields) -> dict[str, Any]:
    record: dict[str, Any] = {}
    images = sorted((name, content) for name, content in files if name.rpartition(".")[2] in IMAGE_SUFFIXES)
    for name, content in files:
        if name == "json":
            values = parse_json(content)
            if not isinstance(values, dict):
                raise BadRecord("wrong type", f"its .json must be an object, got {values!r:.80}")
            record = {**values, **record}
        elif name in CAPTION_SUFFIXES:
            record["caption"] = read_text(content)
    return read_conversation({**record, "images": [content for _, content in images]}, fields)


def read_text(content: bytes) -> str:
    try:
        return content.decode().strip()
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"byte {error.object[error.start]:#04x} at {error.start}") from None


def broken_shard(name: str, error: Exception) -> Row:
    def fail() -> dict[str, Any]:
        raise BadRecord("broken shard", f"nothing can be read from here on: {str(error) or type(error).__name__}")

    return Row(name, fail)
