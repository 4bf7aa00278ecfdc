"""Samples of `tasks.py` to packed training batches.

    sample -> chat template, image slots, ids, labels on answers and cells -> several samples per row -> batch

Packed samples do not see each other: every row carries a block-diagonal causal mask and positions that start anew.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset

from navil import processing_navil as processing
from navil import tokenization_navil as tokenization

from .cells import NUMBERS, label_cells, label_numbers
from .close_ups import close_up
from .tasks import DESCRIBE, PAGE, TASKS, Sample, make_sample, make_text_sample

TEXT_PRETRAINING = "pretrain_text"
ALL_TASKS = (*TASKS, DESCRIBE, TEXT_PRETRAINING, PAGE)
"""Every kind of sample; a task's place in it is its index in batches and dials."""


AS_IS = {"multi_scale": False, "min_pixels": 1, "max_pixels": 10**9}
"""Settings of the image processor that keep a picture's size."""


def draw(task: str, seed: int, difficulty: float) -> Sample:
    if task == TEXT_PRETRAINING:
        return make_text_sample(seed, difficulty)
    return make_sample(task, seed, difficulty)


class Encoded(NamedTuple):
    """One sample, ready for packing."""

    task: int
    num_answers: int
    conversation: processing.Conversation
    cell_labels: Tensor  # (L,): id of what the token before shows; -100 where that is no visual token
    cell_weight: Tensor  # (L,)
    cell_numbers: Tensor  # (L, NUMBERS) that visual tokens are asked for; NaN elsewhere

    @property
    def num_tokens(self) -> int:
        return len(self.conversation.input_ids)

    @property
    def num_patches(self) -> int:
        return len(self.conversation.images.get("pixel_values", ()))


def num_tokens(row: Sequence[Encoded]) -> int:
    return sum(sample.num_tokens for sample in row)


def messages(turns: Sequence[tuple[str, str | None]], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """(question, answer) turns as a chat template takes them, the images in front of the first question.

    An answer of None is still to come.
    """
    image_parts = [{"type": "image", "image": image} for image in images]
    told = []
    for question, answer in turns:
        told.append({"role": "user", "content": [*image_parts, {"type": "text", "text": question}]})
        image_parts = []
        if answer is not None:
            told.append({"role": "assistant", "content": answer})
    return told


def encode(sample: Sample, processor: Any) -> Encoded:
    """Ids of the whole conversation, with labels on every answer and the token that ends it, and on the cells."""
    turns = sample.turns or [("", "")]
    settings = AS_IS if sample.as_is else {}
    conversation = processor.encode_conversation({"messages": messages(turns, sample.images)}, **settings)
    if not sample.turns:
        conversation.labels.fill_(processing.IGNORE_INDEX)
    cell_labels = torch.full_like(conversation.labels, processing.IGNORE_INDEX)
    cell_weight = torch.zeros(cell_labels.shape)
    cell_numbers = torch.full((len(cell_labels), NUMBERS), torch.nan)
    if sample.pictures:
        image_token_id = processor.tokenizer.convert_tokens_to_ids(tokenization.IMAGE_TOKEN)
        places = (conversation.input_ids == image_token_id).nonzero()[:, 0]
        labels, weights = zip(
            *(label_cells(picture, processor, sample.as_is) for picture in sample.pictures), strict=True
        )
        cell_labels[places + 1], cell_weight[places + 1] = torch.cat(labels), torch.cat(weights)
        cell_numbers[places] = torch.cat(
            [label_numbers(picture, processor, sample.as_is) for picture in sample.pictures]
        )
    task, num_answers = ALL_TASKS.index(sample.task), len(sample.turns)
    return Encoded(task, num_answers, conversation, cell_labels, cell_weight, cell_numbers)


def answer_index(labels: Tensor) -> Tensor:
    """(B, L) labels -> (B, L) which answer, counted over the batch, a label belongs to; -1 where there is none.

    An answer is a stretch of labels.
    """
    counted = labels != processing.IGNORE_INDEX
    starts = counted.clone()
    starts[:, 1:] &= ~counted[:, :-1]
    return torch.where(counted, starts.flatten().cumsum(0).view_as(starts) - 1, -1)


def pack(rows: Sequence[Sequence[Encoded]], pad_id: int) -> dict[str, Tensor]:
    """Rows of samples -> one batch.

    Returns:
        `input_ids`, `labels`, `position_ids` (B, L); `cell_labels` (B, L), what visual tokens show, each at the place
        after; `cell_numbers` (B, L, NUMBERS), that they are asked for; `loss_weight` (B, L) of labels,
        1 / sqrt(labels of the answer), so that neither long answers nor short ones make up all the loss;
        `attention_mask` (B, 1, L, L) bool, block-diagonal and causal; the images' inputs if there are any; `task_index`
        (answers,), the task of each stretch of labels.
    """
    batch = processing.join_rows([[sample.conversation for sample in row] for row in rows], pad_id)
    batch["attention_mask"] = processing.block_diagonal_mask(batch.pop("sample_index"))
    answer = answer_index(batch["labels"])
    is_answer = answer >= 0
    paddings = {"cell_labels": processing.IGNORE_INDEX, "cell_weight": 0.0, "cell_numbers": torch.nan}
    batch["cell_labels"], batch["loss_weight"], batch["cell_numbers"] = (
        pad_sequence([torch.cat([getattr(sample, name) for sample in row]) for row in rows], True, padding)
        for name, padding in paddings.items()
    )
    batch["loss_weight"][is_answer] = answer[is_answer].bincount()[answer[is_answer]] ** -0.5
    samples = [sample for row in rows for sample in row]
    batch["task_index"] = torch.tensor([sample.task for sample in samples for _ in range(sample.num_answers)])
    return batch


CELL_STEP = 128
IMAGE_STEP = 16
ROW_STEP = 128


def add_filler(rows: list[list[Encoded]], row_length: int, processor: Any) -> None:
    """Adds a sample without labels that rounds a batch's sizes up, so that the shapes of its products come again.

    A blank picture brings the cells to a multiple of CELL_STEP, `<img>` tokens bring these to one of IMAGE_STEP, and
    padding brings the row to the length of all rows: `row_length`, or where a sample is longer a multiple of ROW_STEP.
    oneDNN takes milliseconds to prepare a product of a shape that it has not seen, and keeps what it has prepared.
    """
    tokenizer, sight = processor.tokenizer, processor.image_processor
    image_ids = tokenizer.convert_tokens_to_ids([tokenization.IMAGE_START_TOKEN, tokenization.IMAGE_TOKEN])
    ids = torch.cat([sample.conversation.input_ids for row in rows for sample in row])
    starts, cells = (int((ids == token_id).sum()) for token_id in image_ids)
    missing = [-starts % IMAGE_STEP, -cells % CELL_STEP]
    lengths = [num_tokens(row) for row in rows]
    length = row_length if max(lengths) <= row_length else max(lengths) + -max(lengths) % ROW_STEP
    emptiest = lengths.index(min(lengths))
    if lengths[emptiest] + sum(missing) > length:
        emptiest = len(rows)
        rows.append([])
    room = max(sum(missing), length - num_tokens(rows[emptiest]))
    new_ids = torch.full((room,), tokenizer.pad_token_id)
    new_ids[: sum(missing)] = torch.tensor(image_ids).repeat_interleave(torch.tensor(missing))
    images = {}
    if missing[1]:
        height, width = sight.merge_size, sight.merge_size * missing[1]
        images = {
            "pixel_values": torch.zeros(height * width, 3 * sight.patch_size**2),
            "image_grid_thw": torch.tensor([[1, height, width]]),
            "num_scales": torch.tensor([1]),
        }
    no_labels = torch.full_like(new_ids, processing.IGNORE_INDEX)
    conversation = processing.Conversation(new_ids, no_labels, images)
    no_numbers = torch.full((room, NUMBERS), torch.nan)
    rows[emptiest].append(Encoded(ALL_TASKS.index(PAGE), 0, conversation, no_labels, torch.zeros(room), no_numbers))


class PackedSamples(IterableDataset):
    """An endless stream of packed batches, drawn at the difficulty that the dials show.

    Args:
        processor: turns samples into ids and patches.
        weights: (tasks,) share of each task in the stream.
        difficulty: (tasks,) shared memory; the training process opens the dials while this one draws.
        first_seed: seed of the first sample; a resumed run starts where the last one stopped.
        rows, row_length: shape of a batch, in tokens, but for a row that its filler may need; a longer sample has a
            longer row of its own.
        patches_per_row: so many times the rows are the patches of a batch, its filler aside; a larger picture comes
            alone.
        close_ups: of each task, the share of samples whose pictures come as close-ups.
        dtype: of the patches.
    """

    def __init__(
        self,
        processor: Any,
        weights: Tensor,
        difficulty: Tensor,
        first_seed: int = 0,
        rows: int = 4,
        row_length: int = 768,
        patches_per_row: int = 2048,
        close_ups: Mapping[str, float] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.processor = processor
        self.weights = weights
        self.difficulty = difficulty
        self.first_seed = first_seed
        self.rows = rows
        self.row_length = row_length
        self.max_patches = rows * patches_per_row
        self.close_ups = close_ups or {}
        self.dtype = dtype

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        pad_id = self.processor.tokenizer.pad_token_id
        rows: list[list[Encoded]] = []
        for sample in self._samples():
            if not self._place(rows, sample):
                if any(other.num_patches for row in rows for other in row):
                    add_filler(rows, self.row_length, self.processor)
                batch = pack(rows, pad_id)
                if "pixel_values" in batch:
                    batch["pixel_values"] = batch["pixel_values"].to(self.dtype)
                yield batch
                rows = [[sample]]

    def _samples(self) -> Iterator[Encoded]:
        worker = torch.utils.data.get_worker_info()
        step, offset = (worker.num_workers, worker.id) if worker else (1, 0)
        generator = torch.Generator().manual_seed(self.first_seed + offset)
        seed = self.first_seed + offset
        while True:
            task = ALL_TASKS[int(torch.multinomial(self.weights, 1, generator=generator))]
            sample = draw(task, seed, float(self.difficulty[ALL_TASKS.index(task)]))
            rng = random.Random(seed)
            if rng.random() < self.close_ups.get(task, 0.0):
                sample = close_up(rng, sample, self.processor)
            yield encode(sample, self.processor)
            seed += step

    def _place(self, rows: list[list[Encoded]], sample: Encoded) -> bool:
        """Puts the sample into the first row with room; False when the batch is full."""
        num_patches = sum(other.num_patches for row in rows for other in row)
        if rows and num_patches + sample.num_patches > self.max_patches:
            return False
        for row in rows:
            if num_tokens(row) + sample.num_tokens <= self.row_length:
                row.append(sample)
                return True
        if len(rows) < self.rows:
            rows.append([sample])
            return True
        return False
