"""Batches of `--data` for a `Trainer`, with a record of what was skipped, resuming exactly where a run stopped."""

import argparse
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .sources import USAGE, DataError, Source
from .streams import Batch, ExampleStreams, Skipped, StreamOptions, StreamState, make_orders

logger = logging.getLogger(__name__)

STATE_KEY = "training_data"  # in the `stateful_callbacks` of trainer_state.json
ORDER_OPTIONS = ("seed", "shuffle", "shuffle_buffer")
NAMES_PER_KIND = 3


def add_data_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds `--data` (words of `Source.parse`, or None if not required), `--on-error` and `--max-errors`."""
    parser.add_argument(
        "--data",
        nargs="+",
        action="append",
        required=required,
        metavar=("PATH", "KEY=VALUE"),
        help=f"repeatable: {USAGE}",
    )
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="what a bad record does (%(default)s)"
    )
    parser.add_argument("--max-errors", type=int, metavar="N", help="with skip: stop after more bad records than this")


class BadRecords:
    """The bad records of a process, each once, also in a JSON Lines file as soon as it is known.

    Args:
        file: None keeps them in memory alone.
    """

    def __init__(self, file: Path | None):
        self.file = file
        self.found: dict[str, Skipped] = {}

    def begin(self, resumes: bool) -> None:
        """Reads the file of the run that is resumed, or empties it."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text(encoding="utf-8").splitlines() if resumes and self.file.exists() else []
        whole = [line for line in lines if line.endswith("}")]  # a killed run may have written a part of its last one
        self.found = {bad.name: bad for bad in (Skipped(**json.loads(line)) for line in whole)}
        self.file.write_text("".join(map(json_line, self.found.values())), encoding="utf-8")

    def add(self, skipped: Sequence[Skipped]) -> None:
        new = [bad for bad in skipped if bad.name not in self.found]
        self.found |= {bad.name: bad for bad in new}
        for bad in new:
            logger.warning("skipped %s: %s: %s", *bad)
        if new and self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(map(json_line, new))


def json_line(bad: Skipped) -> str:
    return json.dumps(bad._asdict()) + "\n"


def summarize(found: Sequence[Skipped]) -> str:
    """Counts by kind, the most frequent first, with the first names of each."""
    counts = Counter(bad.kind for bad in found)
    lines = [f"{len(found):,} bad records"]
    for kind, count in counts.most_common():
        names = [bad.name for bad in found if bad.kind == kind]
        more = ", ..." if count > NAMES_PER_KIND else ""
        lines.append(f"{count:>9,}  {kind}: {', '.join(names[:NAMES_PER_KIND])}{more}")
    return "\n".join(lines)


class TrainingLoader:
    """Iterates over the batches of this process, an epoch at a time, prepared in workers.

    Args:
        sources: what to read.
        encode, collate: as in `ExampleStreams`; `processor.encode_conversation` and `processor.training_batch`, with
            settings set by `functools.partial`.
        options: what determines the examples and their order.
        on_error: `stop` raises at the first bad record, `skip` goes on without it.
        max_errors: with `skip`, the number of bad records of one process beyond which it raises.
        folder: where `bad_records.rank*.jsonl` and `bad_records.txt` are written; None writes none.
        num_workers: processes that read and encode; 0 does so in this one.
        accumulate: batches of a step; an epoch has whole steps.
        rank, world_size: of this process; None asks accelerate.

    Attributes:
        names: of the records in the last batch.

    Raises:
        ValueError, DataError, ImportError: as `make_orders`; or there are fewer records than streams.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Callable[[dict[str, Any]], Any],
        collate: Callable[[list[Any]], Any],
        options: StreamOptions,
        on_error: str = "stop",
        max_errors: int | None = None,
        folder: Path | None = None,
        num_workers: int = 0,
        accumulate: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        if on_error not in ("stop", "skip") or on_error == "stop" and max_errors is not None:
            raise ValueError(f"on_error is stop, or skip with max_errors; got {on_error!r} with {max_errors}")
        self.sources, self.encode, self.collate, self.options = list(sources), encode, collate, options
        self.on_error, self.max_errors, self.folder = on_error, max_errors, folder
        self.num_workers, self.accumulate = num_workers, accumulate
        self.rank = PartialState().process_index if rank is None else rank
        self.world_size = PartialState().num_processes if world_size is None else world_size
        self.orders, self.shares = make_orders(sources, options)
        self.state = StreamState(self.num_processes)
        self._check_streams()
        self.bad_records = BadRecords(folder and folder / f"bad_records.rank{self.rank}.jsonl")
        self.names: list[str] = []
        self._batches: Iterator[Batch] | None = None

    @property
    def num_processes(self) -> int:
        """Processes that read data, workers of all ranks."""
        return self.world_size * max(self.num_workers, 1)

    @property
    def num_records(self) -> int | None:
        """Records of an epoch, good or bad; None if the sources have no epoch or are streamed."""
        is_known = len(self.orders) == 1 and self.sources[0].weight is None and hasattr(self.orders[0], "row")
        return len(self.orders[0]) if is_known else None

    def __len__(self) -> int:
        """Batches of an epoch of this process: enough for all records, in whole steps.

        Raises:
            TypeError: their number is not known, for sources that are streamed or weighted and with `batch_tokens` or
                `epochs`; `Trainer` then needs `max_steps`.
        """
        if self.num_records is None or self.options.batch_tokens is not None or self.options.epochs is not None:
            raise TypeError("the number of batches in an epoch is not known: set max_steps")
        per_step = self.options.batch_size * self.accumulate * self.world_size
        return -(-self.num_records // per_step) * self.accumulate

    @property
    def epoch(self) -> float | None:
        """Epochs delivered so far, if their length is known."""
        try:
            return self.state.batches / self.world_size / len(self)
        except TypeError:
            return None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rest of the current epoch; without end if its length is not known."""
        if self._batches is None:
            self._batches = self._start()
        for batch in self._batches:
            self._count(batch)
            if batch.inputs is not None:
                yield batch.inputs
            if self.epoch is not None and self.epoch.is_integer():
                return

    def _start(self) -> Iterator[Batch]:
        self.bad_records.begin(resumes=self.state.batches > 0)
        streams = ExampleStreams(
            self.orders,
            self.shares,
            self.options,
            self.encode,
            self.collate,
            self.on_error == "stop",
            self.state,
            self.rank,
            self.world_size,
        )
        if self.num_workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or each worker prints a warning
        pinned = torch.cuda.is_available()
        # A generator of its own: a resumed run draws as many numbers from torch's as one that was not interrupted.
        return iter(
            DataLoader(streams, None, num_workers=self.num_workers, pin_memory=pinned, generator=torch.Generator())
        )

    def _count(self, batch: Batch) -> None:
        """Moves to the position behind a batch, and raises if its bad records are too many."""
        self.state.positions[batch.stream] = batch.position
        self.state.batches += self.world_size  # each process takes one
        self.names = batch.names
        self.bad_records.add(batch.skipped)
        if self.on_error == "stop" and batch.skipped:
            name, kind, reason = batch.skipped[0]
            raise DataError(f"{name}: {kind}: {reason} (--on-error skip goes on without bad records)")
        if self.max_errors is not None and len(self.bad_records.found) > self.max_errors:
            raise DataError(
                f"more than {self.max_errors} bad records:\n{summarize([*self.bad_records.found.values()])}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The position of the run, as JSON can hold it. All processes must call it at once."""
        positions = gather_object([self.state.positions])
        merged = {str(stream): position for own in positions for stream, position in own.items()}
        return {
            "num_streams": self.state.num_streams,
            "batches": self.state.batches,
            "positions": merged,
            "data": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a position of `state_dict`, before the first batch.

        Raises:
            ValueError: the data or its order differ from those of the position, or the number of processes does not
                divide that of the streams.
            RuntimeError: batches were delivered already.
        """
        if self._batches is not None:
            raise RuntimeError("a position can only be loaded before the first batch")
        saved = state["data"]
        changed = [
            f"{name} {saved.get(name)} -> {v}" for name, v in self._fingerprint().items() if saved.get(name) != v
        ]
        if changed:
            raise ValueError(f"the checkpoint's position does not fit the data: {'; '.join(changed)}")
        positions = {int(stream): position for stream, position in state["positions"].items()}
        own = {stream: one for stream, one in positions.items() if stream % self.world_size == self.rank}
        self.state = StreamState(state["num_streams"], state["batches"], own)
        self._check_streams()

    def _fingerprint(self) -> dict[str, Any]:
        sizes = [len(order) if hasattr(order, "row") else len(order.shards) for order in self.orders]
        sources = [[source.path, source.split, source.config, source.weight] for source in self.sources]
        options = asdict(self.options)
        return {"sources": sources, "sizes": sizes} | {name: options[name] for name in ORDER_OPTIONS}

    def _check_streams(self) -> None:
        if self.state.num_streams % self.num_processes:
            raise ValueError(
                f"the run began with {self.state.num_streams} streams of data, which {self.world_size} processes with "
                f"{self.num_workers} workers each cannot share evenly"
            )
        if self.state.batches % self.world_size:
            raise ValueError(f"{self.state.batches} batches were delivered, no multiple of {self.world_size} processes")
        short = [order for order in self.orders if hasattr(order, "row") and len(order) < self.state.num_streams]
        if short and self.options.epochs is None:
            raise ValueError(
                f"{len(short[0])} records cannot feed {self.state.num_streams} streams, one for each worker of each "
                "process: use fewer workers"
            )

    def report(self) -> str:
        """A summary of the bad records of all processes, which must all call it; also written to the folder."""
        found = gather_object([*self.bad_records.found.values()])
        text = summarize([*{bad.name: bad for bad in found}.values()])  # in later epochs another process has a record
        if self.folder is not None and self.rank == 0:
            (self.folder / "bad_records.txt").write_text(text + "\n", encoding="utf-8")
        return text


# -- Trainer -----------------------------------------------------------------------------------------------------------


class DataPosition(TrainerCallback):
    """Saves the loader's position in `trainer_state.json`, and moves there when training resumes.

    It follows all callbacks that ask for a checkpoint.
    """

    def __init__(self, loader: TrainingLoader):
        self.loader = loader

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step == 0:
            return
        saved = state.stateful_callbacks.get(STATE_KEY)
        if saved is None or saved["step"] != state.global_step:
            raise ValueError(f"the checkpoint of step {state.global_step} has no position in the training data")
        self.loader.load_state_dict(saved)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        # Trainer counts from the step at which it resumed.
        state.epoch = state.global_step / state.max_steps if self.loader.epoch is None else self.loader.epoch
        if control.should_save or control.should_evaluate:  # an evaluation may ask for a checkpoint
            self._save(state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if control.should_save or control.should_evaluate:
            self._save(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        report = self.loader.report()
        if state.is_world_process_zero:
            logger.warning(report)

    def _save(self, state: TrainerState) -> None:
        state.stateful_callbacks[STATE_KEY] = {"step": state.global_step, **self.loader.state_dict()}


def attach_loader(trainer: Trainer, loader: TrainingLoader) -> None:
    """Lets a `Trainer`, of transformers or TRL, train on a loader's batches. Call it after adding other callbacks.

    Raises:
        ValueError: an argument of the trainer or an option of the loader does not allow it.
    """
    if not trainer.args.ignore_data_skip:
        raise ValueError("the loader needs ignore_data_skip=True: it moves to the checkpoint's position itself")
    if loader.options.epochs is not None:
        raise ValueError(f"to train, the loader repeats its data: epochs must be None, got {loader.options.epochs}")
    trainer.get_train_dataloader = lambda: loader
    trainer.add_callback(DataPosition(loader))
