"""Samples of `tasks.py` to packed training batches.

    sample -> chat template, image slots, ids, labels on the answers -> several samples per row -> batch

Packed samples do not see each other: every row carries a block-diagonal causal mask and positions that start anew.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from navil_modules import tokenization

from .tasks import DESCRIBE, TASKS, Sample, make_sample, make_text_sample

IGNORE_INDEX = -100
TEXT_PRETRAINING = "pretrain_text"
ALL_TASKS = (*TASKS, DESCRIBE, TEXT_PRETRAINING)
"""Every kind of sample; a task's place in it is its index in batches and dials."""

ANSWER_START = "<|im_start|>assistant\n"


def draw(task: str, seed: int, difficulty: float) -> Sample:
    if task == TEXT_PRETRAINING:
        return make_text_sample(seed, difficulty)
    return make_sample(task, seed, difficulty)


@dataclass
class Encoded:
    """One sample, ready for packing."""

    task: int
    num_answers: int
    input_ids: list[int]
    labels: list[int]
    loss_weight: list[float]  # 1 / sqrt(labels of the answer): neither long answers nor short ones make up all the loss
    images: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_patches(self) -> int:
        return len(self.images["pixel_values"]) if self.images else 0


def conversation(sample: Sample) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in sample.turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def encode(sample: Sample, processor: Any) -> Encoded:
    """Ids of the whole conversation, with labels on every answer and the token that ends it."""
    tokenizer = processor.tokenizer
    images = {}
    if sample.images:
        images = dict(processor.image_processor(sample.images, multi_scale=True, return_tensors="pt"))
    text = tokenizer.apply_chat_template(conversation(sample), tokenize=False)
    [text] = tokenization.expand_image_slots(
        [text],
        images["image_grid_thw"].tolist() if images else [],
        images["num_scales"].tolist() if images else [],
        processor.image_processor.merge_size,
    )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    labels, loss_weight = [IGNORE_INDEX] * len(input_ids), [0.0] * len(input_ids)
    stop = 0
    for _, answer in sample.turns:
        start = text.index(ANSWER_START, stop) + len(ANSWER_START)
        stop = start + len(answer) + len(tokenization.END_OF_TURN)
        inside = [index for index, (left, right) in enumerate(offsets) if start <= left and right <= stop]
        for index in inside:
            labels[index], loss_weight[index] = input_ids[index], len(inside) ** -0.5
    return Encoded(ALL_TASKS.index(sample.task), len(sample.turns), input_ids, labels, loss_weight, images)


def pack(rows: Sequence[Sequence[Encoded]], pad_id: int) -> dict[str, Tensor]:
    """Rows of samples -> one batch.

    Returns:
        `input_ids`, `labels`, `loss_weight`, `position_ids` (B, L); `attention_mask` (B, 1, L, L) bool, block-diagonal
        and causal; the images' inputs if there are any; `sample_index` (B, L), each token's sample or -1;
        `task_index` (answers,), the task of each stretch of labels.
    """
    length = max(sum(len(sample.input_ids) for sample in row) for row in rows)
    shape = (len(rows), length)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "labels": torch.full(shape, IGNORE_INDEX),
        "loss_weight": torch.zeros(shape),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "sample_index": torch.full(shape, -1),
    }
    samples: list[Encoded] = []
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            place = (number, slice(start, start + len(sample.input_ids)))
            batch["input_ids"][place] = torch.tensor(sample.input_ids)
            batch["labels"][place] = torch.tensor(sample.labels)
            batch["loss_weight"][place] = torch.tensor(sample.loss_weight)
            batch["position_ids"][place] = torch.arange(len(sample.input_ids))
            batch["sample_index"][place] = len(samples)
            samples.append(sample)
            start += len(sample.input_ids)
    same_sample = batch["sample_index"][:, :, None] == batch["sample_index"][:, None]
    batch["attention_mask"] = (same_sample & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    batch["task_index"] = torch.tensor([sample.task for sample in samples for _ in range(sample.num_answers)])
    with_images = [sample.images for sample in samples if sample.images]
    if with_images:
        for name in ("pixel_values", "image_grid_thw", "num_scales"):
            batch[name] = torch.cat([images[name] for images in with_images])
    return batch


class PackedSamples(IterableDataset):
    """An endless stream of packed batches, drawn at the difficulty that the dials show.

    Args:
        processor: turns samples into ids and patches.
        weights: (tasks,) share of each task in the stream.
        difficulty: (tasks,) shared memory; the training process opens the dials while this one draws.
        first_seed: seed of the first sample; a resumed run starts where the last one stopped.
        rows, row_length: shape of a batch, in tokens; a longer sample has a longer row of its own.
        max_patches: patches of a batch; a larger picture comes alone.
    """

    def __init__(
        self,
        processor: Any,
        weights: Tensor,
        difficulty: Tensor,
        first_seed: int = 0,
        rows: int = 8,
        row_length: int = 256,
        max_patches: int = 4096,
    ):
        self.processor = processor
        self.weights = weights
        self.difficulty = difficulty
        self.first_seed = first_seed
        self.rows = rows
        self.row_length = row_length
        self.max_patches = max_patches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        pad_id = self.processor.tokenizer.pad_token_id
        rows: list[list[Encoded]] = []
        for sample in self._samples():
            if not self._place(rows, sample):
                yield pack(rows, pad_id)
                rows = [[sample]]

    def _samples(self) -> Iterator[Encoded]:
        worker = torch.utils.data.get_worker_info()
        step, offset = (worker.num_workers, worker.id) if worker else (1, 0)
        generator = torch.Generator().manual_seed(self.first_seed + offset)
        seed = self.first_seed + offset
        while True:
            task = ALL_TASKS[int(torch.multinomial(self.weights, 1, generator=generator))]
            yield encode(draw(task, seed, float(self.difficulty[ALL_TASKS.index(task)])), self.processor)
            seed += step

    def _place(self, rows: list[list[Encoded]], sample: Encoded) -> bool:
        """Puts the sample into the first row with room; False when the batch is full."""
        num_patches = sum(other.num_patches for row in rows for other in row)
        if rows and num_patches + sample.num_patches > self.max_patches:
            return False
        for row in rows:
            if sum(len(other.input_ids) for other in row) + len(sample.input_ids) <= self.row_length:
                row.append(sample)
                return True
        if len(rows) < self.rows:
            rows.append([sample])
            return True
        return False
