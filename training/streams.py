"""Rows of sources in a seeded order, as batches that resume exactly where they stopped.

The order is a function of the seed, the epoch and a position; nothing of it is kept in memory that a position does not
say. It has `num_streams` streams, one for each worker of each process. In an epoch each record belongs to one stream.
Batch number g of the run, counted over all processes, comes from stream g modulo `num_streams`.

    source of rows   shuffled by                        a stream takes
    at hand          a permutation of all               every num_streams-th record
    streamed         the shards, then blocks of rows    every num_streams-th shard, or a share of a shard's records
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .records import BadRecord
from .sources import DataError, Row, Source

MAX_EPOCHS_WITHOUT_EXAMPLE = 10
DRAWS_PER_BLOCK = 1024
ORDER, SHARDS, BLOCK, CHOICE = range(4)  # what a random generator is for
KINDS = (
    ("cannot read an image", "unreadable image"),
    ("aspect ratio", "aspect ratio"),
    ("reserved for", "control token"),
    ("surrogates not allowed", "lone surrogate"),
)
"""Kind of bad record by what the processor's error says."""

Position = dict[str, Any]


@dataclass(frozen=True)
class StreamOptions:
    """What determines the examples and their order.

    Args:
        batch_size: conversations in a batch of one process.
        batch_tokens: a batch also ends before its conversations have more tokens than this.
        max_tokens: a conversation of more tokens is a bad record.
        seed: of the order and of the choice between weighted sources.
        shuffle: False keeps the order of the records, also that of the shards.
        shuffle_buffer: rows of a streamed source that are shuffled at once, in memory.
        epochs: None repeats the data for ever, as training needs.
    """

    batch_size: int = 1
    batch_tokens: int | None = None
    max_tokens: int | None = None
    seed: int = 0
    shuffle: bool = True
    shuffle_buffer: int = 1000
    epochs: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_tokens", "max_tokens", "shuffle_buffer", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class Step(NamedTuple):
    """A row, and the position behind it."""

    row: Row
    position: Position


class Skipped(NamedTuple):
    """A bad record: its name, what it is, and why."""

    name: str
    kind: str
    reason: str


class Delivery(NamedTuple):
    """An encoded example (None at the end of the data), and the bad records in front of it."""

    name: str
    example: Any
    position: Position
    skipped: list[Skipped]


class Batch(NamedTuple):
    """A batch of one stream (inputs are None if it has no example), and the stream's position behind it."""

    inputs: Any
    names: list[str]
    skipped: list[Skipped]
    stream: int
    position: Position


@dataclass
class StreamState:
    """Where a run is: `batches` is counted over all processes, positions are those of streams that were read."""

    num_streams: int
    batches: int = 0
    positions: dict[int, Position] = field(default_factory=dict)


def generator(seed: int, *numbers: int) -> np.random.Generator:
    return np.random.default_rng([seed, *numbers])


# -- the order of one epoch --------------------------------------------------------------------------------------------


class IndexedOrder:
    """Sources with all rows at hand, as one."""

    def __init__(self, sources: Sequence[Any], options: StreamOptions):
        self.sources, self.options = list(sources), options
        self.ends = list(accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self.ends[-1]

    def epoch(self, epoch: int, stream: int, num_streams: int, position: Position) -> Iterator[Step]:
        """A stream's rows of an epoch, from a position in it on."""
        order = self.permutation(epoch)[stream::num_streams]
        for index in range(position.get("taken", 0), len(order)):
            yield Step(self.row(int(order[index])), {"taken": index + 1})

    def permutation(self, epoch: int) -> np.ndarray:
        size = len(self)
        return generator(self.options.seed, ORDER, epoch).permutation(size) if self.options.shuffle else np.arange(size)

    def row(self, index: int) -> Row:
        number = bisect_right(self.ends, index)
        return self.sources[number].row(index - (self.ends[number - 1] if number else 0))


class Share(NamedTuple):
    """The records of a shard whose number is `part` modulo `parts`."""

    source: int
    shard: int
    part: int
    parts: int


class Located(NamedTuple):
    """A row, and where it is: a share's number in the stream's list, and the record's number in its shard."""

    share: int
    record: int
    row: Row


class ShardedOrder:
    """Streamed sources, as one."""

    def __init__(self, sources: Sequence[Any], options: StreamOptions):
        self.sources, self.options = list(sources), options
        self.shards = [(index, shard) for index, source in enumerate(sources) for shard in range(len(source.shards))]

    def epoch(self, epoch: int, stream: int, num_streams: int, position: Position) -> Iterator[Step]:
        """As `IndexedOrder.epoch`. A position says where a block of rows begins and how many of it were taken."""
        number, taken = position.get("block", 0), position.get("taken", 0)
        start = position.get("share", 0), position.get("record", 0)
        rows = self._rows(self.shares(epoch, stream, num_streams), *start)
        while block := list(islice(rows, self.options.shuffle_buffer if self.options.shuffle else 1)):
            order = generator(self.options.seed, BLOCK, epoch, stream, number).permutation(len(block))
            begin = {"share": block[0].share, "record": block[0].record, "block": number}
            for index in range(taken, len(block)):
                yield Step(block[order[index]].row, {**begin, "taken": index + 1})
            number, taken = number + 1, 0

    def shares(self, epoch: int, stream: int, num_streams: int) -> list[Share]:
        """What a stream reads in an epoch: whole shards, or a part of one if there are fewer shards than streams."""
        size = len(self.shards)
        order = generator(self.options.seed, SHARDS, epoch).permutation(size) if self.options.shuffle else range(size)
        if size >= num_streams:
            return [Share(*self.shards[index], 0, 1) for index in order[stream::num_streams]]
        parts = len(range(stream % size, num_streams, size))
        return [Share(*self.shards[order[stream % size]], stream // size, parts)]

    def _rows(self, shares: Sequence[Share], first: int, record: int) -> Iterator[Located]:
        for number in range(first, len(shares)):
            source, shard, part, parts = shares[number]
            for index, row in enumerate(self.sources[source].rows(shard, record), record):
                if index % parts == part:
                    yield Located(number, index, row)
            record = 0


def make_orders(sources: Sequence[Source], options: StreamOptions) -> tuple[list[Any], list[float]]:
    """Opens sources: those without weights as one order, each with a weight as one of its own, and the shares of them.

    Raises:
        DataError, ImportError: as `Source.open`.
        ValueError: no source, weights of some sources only, or files and streams together without weights.
    """
    weights = [source.weight for source in sources]
    if not sources or None in weights and any(weight is not None for weight in weights):
        raise ValueError(f"expected sources with a weight each or with none, got the weights {weights}")
    opened = [source.open() for source in sources]
    groups = {
        IndexedOrder: [source for source in opened if hasattr(source, "row")],
        ShardedOrder: [source for source in opened if not hasattr(source, "row")],
    }
    if None not in weights:
        if options.epochs is not None:
            raise ValueError("weighted sources repeat at different times: they have no epochs")
        kinds = [IndexedOrder if hasattr(source, "row") else ShardedOrder for source in opened]
        total = sum(weights)
        return [kind([source], options) for kind, source in zip(kinds, opened, strict=True)], [
            w / total for w in weights
        ]
    orders = [order(group, options) for order, group in groups.items() if group]
    if len(orders) > 1 and options.epochs is None:
        raise ValueError("files and streams can be mixed with weights only: give each --data weight=NUMBER")
    return orders, [1 / len(orders)] * len(orders)


# -- batches -----------------------------------------------------------------------------------------------------------


class ExampleStreams(IterableDataset):
    """Batches of the streams that belong to a process, or in a worker to this worker.

    Args:
        orders, shares: of `make_orders`.
        encode: an example, `{"messages": ...}`, to an encoded one with `input_ids`: `processor.encode_conversation`.
        collate: encoded examples to a batch: `processor.training_batch`.
        stops: whether a bad record ends the stream, after a `Batch` that names it.
        state: where to begin.
        rank, world_size: of the process.
    """

    def __init__(
        self,
        orders: Sequence[Any],
        shares: Sequence[float],
        options: StreamOptions,
        encode: Callable[[dict[str, Any]], Any],
        collate: Callable[[list[Any]], Any],
        stops: bool,
        state: StreamState,
        rank: int,
        world_size: int,
    ):
        self.orders, self.shares, self.options = list(orders), list(shares), options
        self.encode, self.collate, self.stops = encode, collate, stops
        self.state, self.rank, self.world_size = state, rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        """Streams take turns; the data loader takes turns with the workers."""
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        first = self.state.batches + worker * self.world_size + self.rank
        turns = range(first, first + self.state.num_streams, num_workers * self.world_size)
        streams = [number % self.state.num_streams for number in turns]
        batches = {stream: self._batches(stream) for stream in streams}
        while batches:
            for stream in [*batches]:
                batch = next(batches[stream], None)
                if batch is None:
                    del batches[stream]
                else:
                    yield batch

    def _batches(self, stream: int) -> Iterator[Batch]:
        group: list[Delivery] = []
        for delivery in self._deliveries(stream):
            if group and not self._has_room(group, delivery):
                yield self._pack(group, stream)
                group = []
            group.append(delivery)
            if len(group) == self.options.batch_size or delivery.example is None:
                yield self._pack(group, stream)
                group = []
        if group:
            yield self._pack(group, stream)

    def _has_room(self, group: Sequence[Delivery], delivery: Delivery) -> bool:
        if self.options.batch_tokens is None or delivery.example is None:
            return True
        return sum(len(one.example.input_ids) for one in (*group, delivery)) <= self.options.batch_tokens

    def _pack(self, group: Sequence[Delivery], stream: int) -> Batch:
        examples = [one.example for one in group if one.example is not None]
        inputs = dict(self.collate(examples)) if examples else None
        names = [one.name for one in group if one.example is not None]
        skipped = [bad for one in group for bad in one.skipped]
        return Batch(inputs, names, skipped, stream, group[-1].position)

    def _deliveries(self, stream: int) -> Iterator[Delivery]:
        """A stream's examples from all orders. A position counts them and has the position in each order."""
        position = self.state.positions.get(stream, {})
        draws, inside = position.get("draws", 0), list(position.get("orders", [{}] * len(self.orders)))
        walks = [self._walk(order, stream, start) for order, start in zip(self.orders, inside, strict=True)]
        remaining = list(range(len(walks)))
        while remaining:
            index = self._choose(stream, draws) if self.options.epochs is None else remaining[0]
            delivery = next(walks[index], None)
            if delivery is None:
                remaining.remove(index)
                continue
            draws, inside[index] = draws + 1, delivery.position
            yield delivery._replace(position={"draws": draws, "orders": [*inside]})
            if self.stops and delivery.example is None:
                break

    def _choose(self, stream: int, draws: int) -> int:
        if len(self.orders) == 1:
            return 0
        block, index = divmod(draws, DRAWS_PER_BLOCK)
        number = uniform_numbers(self.options.seed, stream, block)[index]
        return min(bisect_right([*accumulate(self.shares)], number), len(self.shares) - 1)

    def _walk(self, order: Any, stream: int, position: Position) -> Iterator[Delivery]:
        """A stream's examples of one order, epoch after epoch."""
        skipped: list[Skipped] = []
        last_good = position.get("epoch", 0)
        for step in self._steps(order, stream, position):
            if step.position["epoch"] - last_good > MAX_EPOCHS_WITHOUT_EXAMPLE:
                raise DataError(f"no usable record in {MAX_EPOCHS_WITHOUT_EXAMPLE} epochs; the last was {skipped[-1]}")
            try:
                example = self._prepare(step.row)
            except BadRecord as error:
                skipped.append(Skipped(step.row.name, error.kind, error.reason))
                if self.stops:
                    break
                continue
            last_good = step.position["epoch"]
            yield Delivery(step.row.name, example, step.position, skipped)
            skipped = []
        if skipped:
            yield Delivery("", None, step.position, skipped)

    def _steps(self, order: Any, stream: int, position: Position) -> Iterator[Step]:
        epoch, inside = position.get("epoch", 0), position
        while self.options.epochs is None or epoch < self.options.epochs:
            step = None
            for step in order.epoch(epoch, stream, self.state.num_streams, inside):
                yield step._replace(position={"epoch": epoch, **step.position})
            if step is None and not inside and self.options.epochs is None:
                raise DataError(f"stream {stream} of {self.state.num_streams} has no record: use fewer workers")
            epoch, inside = epoch + 1, {}

    def _prepare(self, row: Row) -> Any:
        """The encoded example. Whatever a record makes fail makes it a bad one."""
        try:
            encoded = self.encode(row.read())
        except BadRecord:
            raise
        except Exception as error:
            reason = str(error) or type(error).__name__
            kind = next((kind for text, kind in KINDS if text in reason), "other")
            raise BadRecord(kind, reason) from error
        length, limit = len(encoded.input_ids), self.options.max_tokens
        if limit is not None and length > limit:
            raise BadRecord("too long", f"{length} tokens, and at most {limit} are allowed")
        return encoded


@lru_cache(maxsize=64)
def uniform_numbers(seed: int, stream: int, block: int) -> list[float]:
    return generator(seed, CHOICE, stream, block).random(DRAWS_PER_BLOCK).tolist()
