"""Data for training, from what people have to batches (docs/data.md).

sources.py   JSON files, Hugging Face data sets and WebDataset shards, as named rows
records.py   a row's content -> a conversation for `processor.training_batch`; `BadRecord`
streams.py   rows in a seeded order -> batches; positions, processes and workers
loader.py    the batches for a `Trainer`, bad records, resuming
check.py     reads all data once and names every bad record
"""

from .loader import TrainingLoader, attach_loader
from .records import BadRecord
from .sources import DataError, Source, read_examples
from .streams import StreamOptions

__all__ = ["BadRecord", "DataError", "Source", "StreamOptions", "TrainingLoader", "attach_loader", "read_examples"]
