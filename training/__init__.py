"""Training: data, from what people have to batches (docs/data.md), and what `Trainer` lacks (docs/training.md).

sources.py   JSON files, Hugging Face data sets and WebDataset shards, as named rows
records.py   a row's content -> a conversation for `processor.training_batch`; `BadRecord`
streams.py   rows in a seeded order -> batches; positions, processes and workers
loader.py    the batches for a `Trainer`, bad records, resuming
check.py     reads all data once and names every bad record

parts.py       frozen parameters, adapters, learning rates of parts
evaluation.py  examples that are held out, generated answers, whether they are right
trainer.py     `FineTuner`, a `Trainer` with both; the last complete checkpoint
"""

from .loader import TrainingLoader, attach_loader
from .records import BadRecord
from .sources import DataError, Source, read_examples
from .streams import StreamOptions
from .trainer import FineTuner

__all__ = ["BadRecord", "DataError", "FineTuner", "Source", "StreamOptions", "TrainingLoader", "attach_loader"]
__all__ += ["read_examples"]
