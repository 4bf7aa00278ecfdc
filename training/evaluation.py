"""Evaluation on examples with generated answers: which examples, the answers, and whether they are right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from navil.tokenization_navil import END_OF_TURN

from .loader import TrainingLoader
from .sources import DataError, Row, Source
from .streams import StreamOptions

TOLERANCES = {"exact": 0.0, "relaxed": 0.05}
"""Metrics, by the relative error that an answered number may have."""


# -- examples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartOfSource(Source):
    """A random fraction of a source, held out for evaluation, or the rest of it, for training.

    Args:
        fraction: of the records that are held out.
        seed: of the choice.
        is_held_out: whether this is the held-out part.
    """

    fraction: float = 0.1
    seed: int = 0
    is_held_out: bool = False

    def open(self) -> "SomeRows":
        """As `Source.open`.

        Raises:
            DataError: also if the source is streamed, or if a part would be empty.
        """
        rows = super().open()
        if not hasattr(rows, "row"):
            raise DataError(f"{self.path} is streamed: a fraction cannot be held out; name other data for evaluation")
        count = round(len(rows) * self.fraction)
        if not 0 < count < len(rows):
            raise DataError(f"a fraction of {self.fraction} of the {len(rows)} records of {self.path} is {count}")
        order = np.random.default_rng(self.seed).permutation(len(rows))
        return SomeRows(rows, np.sort(order[:count] if self.is_held_out else order[count:]))


class SomeRows:
    """The rows of a source at some indices."""

    def __init__(self, rows: Any, indices: np.ndarray):
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, index: int) -> Row:
        return self.rows.row(int(self.indices[index]))


def split_sources(sources: Sequence[Source], fraction: float, seed: int) -> tuple[list[Source], list[Source]]:
    """The sources without a random fraction of their records, and that fraction."""
    parts = [
        [PartOfSource(**vars(source), fraction=fraction, seed=seed, is_held_out=held_out) for source in sources]
        for held_out in (False, True)
    ]
    return parts[0], parts[1]


class Checked(NamedTuple):
    """An example, and its tokens, which the loader counts."""

    input_ids: Tensor
    example: dict[str, Any]


def check_example(encode: Callable[[dict[str, Any]], Any], example: dict[str, Any]) -> Checked:
    return Checked(encode(example).input_ids, example)


def only_examples(checked: Sequence[Checked]) -> dict[str, list[dict[str, Any]]]:
    return {"examples": [one.example for one in checked]}


def checked_examples(
    sources: Sequence[Source], encode: Callable[[dict[str, Any]], Any], max_tokens: int, **bad_records: Any
) -> list[dict[str, Any]]:
    """All examples of sources, each encoded once, so that evaluation meets no bad record later.

    Args:
        encode, max_tokens: as in `TrainingLoader` and `StreamOptions`.
        bad_records: `on_error` and `max_errors` of `TrainingLoader`.

    Raises:
        DataError: as `TrainingLoader`, or no record is good.
    """
    unweighted = [replace(source, weight=None) for source in sources]
    options = StreamOptions(max_tokens=max_tokens, shuffle=False, epochs=1)
    check = partial(check_example, encode)
    loader = TrainingLoader(unweighted, check, only_examples, options, rank=0, world_size=1, **bad_records)
    examples = [example for batch in loader for example in batch["examples"]]
    if not examples:
        raise DataError(f"no good record in {', '.join(source.path for source in sources)}")
    return examples


# -- answers -----------------------------------------------------------------------------------------------------------


def text_of(message: dict[str, Any]) -> str:
    """The text of a message, without its images."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def expected_answer(example: dict[str, Any], processor: Any) -> str:
    """The last answer of a conversation, without special tokens, as generated answers are."""
    ids = processor.tokenizer(text_of(example["messages"][-1]), add_special_tokens=False).input_ids
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


@torch.no_grad()
def generate_answers(
    model: Any, processor: Any, examples: Sequence[dict[str, Any]], batch_size: int, max_new_tokens: int
) -> list[str]:
    """Greedy answers to the last question of each conversation, with its earlier turns."""
    tokenizer, answers = processor.tokenizer, []
    ends = {"eos_token_id": tokenizer.convert_tokens_to_ids(END_OF_TURN), "pad_token_id": tokenizer.pad_token_id}
    encoding = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True, "padding_side": "left"}
    for start in range(0, len(examples), batch_size):
        prompts = [example["messages"][:-1] for example in examples[start : start + batch_size]]
        inputs = processor.apply_chat_template(prompts, add_generation_prompt=True, **encoding).to(model.device)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, **ends)
        answers += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def is_correct(answer: str, expected: str, tolerance: float = 0.0) -> bool:
    """Whether texts are equal but for case and blanks, or numbers equal up to a relative error.

    With a tolerance of 0.05 it is the relaxed accuracy of ChartQA (arXiv 2203.10244).
    """
    number, true = read_number(answer), read_number(expected)
    if tolerance and number is not None and true:
        return abs(number - true) <= tolerance * abs(true)
    return answer.casefold().split() == expected.casefold().split()


def read_number(text: str) -> float | None:
    try:
        return float(text.strip().removesuffix("%").replace(",", ""))
    except ValueError:
        return None
