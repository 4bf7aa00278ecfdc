"""Samples to training batches.

    Sample -> chat template, ids, labels of answers and visual tokens -> several samples per row -> batch

Packed samples do not attend to each other: rows have the offsets of their samples, and positions restart at 0.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset

from navil.processing_navil import IGNORE_INDEX, Conversation, NaViLProcessor, document_inputs, join_rows
from navil.tokenization_navil import IMAGE_START_TOKEN, IMAGE_TOKEN

from .crops import crop_sample
from .labels import NATIVE_SIZE, NUM_TARGETS, dense_labels, regression_targets
from .tasks import ALL_TASKS, PAGE, Sample, make_sample


class Encoded(NamedTuple):
    """One sample, ready for packing."""

    task: int  # index in ALL_TASKS
    num_answers: int
    conversation: Conversation
    dense_labels: Tensor  # (L,) label of the visual token before; -100 elsewhere
    dense_weight: Tensor  # (L,)
    regression_targets: Tensor  # (L, NUM_TARGETS) at visual tokens; NaN elsewhere

    @property
    def num_tokens(self) -> int:
        return len(self.conversation.input_ids)

    @property
    def num_patches(self) -> int:
        return len(self.conversation.images.get("pixel_values", ()))


def messages(turns: Sequence[tuple[str, str | None]], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """(question, answer) turns for a chat template, with the images before the first question.

    The last answer may be None: it is still to be generated.
    """
    image_parts = [{"type": "image", "image": image} for image in images]
    conversation = []
    for question, answer in turns:
        conversation.append({"role": "user", "content": [*image_parts, {"type": "text", "text": question}]})
        image_parts = []
        if answer is not None:
            conversation.append({"role": "assistant", "content": answer})
    return conversation


def encode(sample: Sample, processor: NaViLProcessor) -> Encoded:
    """Ids of the whole conversation, labels of all answers with their end tokens, and targets of visual tokens."""
    turns = sample.turns or [("", "")]
    settings = NATIVE_SIZE if sample.native_size else {}
    conversation = processor.encode_conversation({"messages": messages(turns, sample.images)}, **settings)
    if not sample.turns:
        conversation.labels.fill_(IGNORE_INDEX)
    length = len(conversation.labels)
    classes, weight = torch.full((length,), IGNORE_INDEX), torch.zeros(length)
    numbers = torch.full((length, NUM_TARGETS), torch.nan)
    if sample.pictures:
        is_visual = conversation.input_ids == processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        places = is_visual.nonzero()[:, 0]
        dense = [dense_labels(picture, processor, sample.native_size) for picture in sample.pictures]
        classes[places + 1] = torch.cat([ids for ids, _ in dense])
        weight[places + 1] = torch.cat([weights for _, weights in dense])
        numbers[places] = torch.cat(
            [regression_targets(picture, processor, sample.native_size) for picture in sample.pictures]
        )
    return Encoded(ALL_TASKS.index(sample.task), len(sample.turns), conversation, classes, weight, numbers)


def answer_index(labels: Tensor) -> Tensor:
    """(B, L) labels -> (B, L) index of the answer that a label belongs to, counted over the batch; -1 elsewhere.

    An answer is a run of labels.
    """
    is_label = labels != IGNORE_INDEX
    starts = is_label.clone()
    starts[:, 1:] &= ~is_label[:, :-1]
    return torch.where(is_label, starts.flatten().cumsum(0).view_as(starts) - 1, -1)


def pack(rows: Sequence[Sequence[Encoded]], pad_id: int) -> dict[str, Tensor]:
    """Rows of samples -> one batch.

    Returns:
        `input_ids`, `labels`, `position_ids`, `dense_labels` (B, L); `regression_targets` (B, L, NUM_TARGETS);
        `loss_weight` (B, L), 1 / sqrt(length of the answer), so that neither long nor short answers dominate, and the
        dense weights; `cu_seq_lens_q` and the like, as in `document_inputs`; the inputs of the images, if any;
        `task_index` (answers,), the task of each answer.
    """
    conversations = [[sample.conversation for sample in row] for row in rows]
    batch = join_rows(conversations, pad_id) | document_inputs(conversations)
    batch["dense_labels"] = _pad([[sample.dense_labels for sample in row] for row in rows], IGNORE_INDEX)
    batch["regression_targets"] = _pad([[sample.regression_targets for sample in row] for row in rows], torch.nan)
    batch["loss_weight"] = _pad([[sample.dense_weight for sample in row] for row in rows], 0.0)
    answer = answer_index(batch["labels"])
    is_answer = answer >= 0
    batch["loss_weight"][is_answer] = answer[is_answer].bincount()[answer[is_answer]] ** -0.5
    samples = [sample for row in rows for sample in row]
    batch["task_index"] = torch.tensor([sample.task for sample in samples for _ in range(sample.num_answers)])
    return batch


def _pad(rows: list[list[Tensor]], value: float) -> Tensor:
    return pad_sequence([torch.cat(row) for row in rows], batch_first=True, padding_value=value)


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of `forward` for a packed batch, with `labels` of answers and visual tokens."""
    inputs = {name: x for name, x in batch.items() if name not in ("task_index", "dense_labels", "regression_targets")}
    labels = torch.where(batch["dense_labels"] < 0, batch["labels"], batch["dense_labels"])
    return inputs | {"labels": labels, "output_logits": True}


# ------------------------------------------------------------------------------------------------------- rounded sizes

CELL_STEP = 128
IMAGE_STEP = 16
ROW_STEP = 128


def round_up_sizes(rows: list[list[Encoded]], row_length: int, processor: NaViLProcessor) -> None:
    """Adds a padding sample without labels, so that tensor shapes repeat from batch to batch.

    oneDNN takes milliseconds to prepare a matrix product of a new shape and caches it. A blank image brings the merged
    cells to a multiple of CELL_STEP, `<img>` tokens bring those to a multiple of IMAGE_STEP, and pad tokens bring the
    row to `row_length`, or to a multiple of ROW_STEP if a sample is longer.
    """
    tokenizer = processor.tokenizer
    image_ids = tokenizer.convert_tokens_to_ids([IMAGE_START_TOKEN, IMAGE_TOKEN])
    ids = torch.cat([sample.conversation.input_ids for row in rows for sample in row])
    starts, cells = (int((ids == token_id).sum()) for token_id in image_ids)
    missing = [-starts % IMAGE_STEP, -cells % CELL_STEP]
    lengths = [_row_tokens(row) for row in rows]
    length = row_length if max(lengths) <= row_length else max(lengths) + -max(lengths) % ROW_STEP
    shortest = lengths.index(min(lengths))
    if lengths[shortest] + sum(missing) > length:
        shortest = len(rows)
        rows.append([])
    new_ids = torch.full((max(sum(missing), length - _row_tokens(rows[shortest])),), tokenizer.pad_token_id)
    new_ids[: sum(missing)] = torch.tensor(image_ids).repeat_interleave(torch.tensor(missing))
    rows[shortest].append(_padding_sample(new_ids, missing[1], processor))


def _row_tokens(row: Sequence[Encoded]) -> int:
    return sum(sample.num_tokens for sample in row)


def _padding_sample(ids: Tensor, cells: int, processor: NaViLProcessor) -> Encoded:
    """A sample without labels: these ids and a blank image of `cells` merged cells."""
    images = {}
    if cells:
        image_processor = processor.image_processor
        height, width = image_processor.merge_size, image_processor.merge_size * cells
        images = {
            "pixel_values": torch.zeros(height * width, 3 * image_processor.patch_size**2),
            "image_grid_thw": torch.tensor([[1, height, width]]),
            "num_scales": torch.tensor([1]),
        }
    no_labels = torch.full_like(ids, IGNORE_INDEX)
    no_targets = torch.full((len(ids), NUM_TARGETS), torch.nan)
    conversation = Conversation(ids, no_labels, images)
    return Encoded(ALL_TASKS.index(PAGE), 0, conversation, no_labels, torch.zeros(len(ids)), no_targets)


# -------------------------------------------------------------------------------------------------------------- stream


class PackedSamples(IterableDataset):
    """An endless stream of packed batches at the difficulty that the curriculum has reached.

    Args:
        processor: turns samples into ids and patches.
        weights: (tasks,) share of each task in the stream.
        difficulty: (tasks,) in shared memory: the training process changes it while this one draws.
        first_seed: seed of the first sample.
        rows, row_length: shape of a batch in tokens, plus one row if the padding sample needs it. A sample longer than
            `row_length` has a row of its own.
        patches_per_row: a batch has at most `rows` times as many patches, the padding sample aside. A larger picture
            has a batch of its own.
        crop_share: share of each task's samples whose pictures are cropped.
        dtype: of the patches.
    """

    def __init__(
        self,
        processor: NaViLProcessor,
        weights: Tensor,
        difficulty: Tensor,
        first_seed: int = 0,
        rows: int = 4,
        row_length: int = 768,
        patches_per_row: int = 2048,
        crop_share: Mapping[str, float] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.processor = processor
        self.weights = weights
        self.difficulty = difficulty
        self.first_seed = first_seed
        self.rows = rows
        self.row_length = row_length
        self.max_patches = rows * patches_per_row
        self.crop_share = crop_share or {}
        self.dtype = dtype

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        pad_id = self.processor.tokenizer.pad_token_id
        rows: list[list[Encoded]] = []
        for sample in self._samples():
            if self._place(rows, sample):
                continue
            if any(other.num_patches for row in rows for other in row):
                round_up_sizes(rows, self.row_length, self.processor)
            batch = pack(rows, pad_id)
            if "pixel_values" in batch:
                batch["pixel_values"] = batch["pixel_values"].to(self.dtype)
            yield batch
            rows = [[sample]]

    def _samples(self) -> Iterator[Encoded]:
        """Of several worker processes each draws every n-th seed."""
        worker = torch.utils.data.get_worker_info()
        step, offset = (worker.num_workers, worker.id) if worker else (1, 0)
        generator = torch.Generator().manual_seed(self.first_seed + offset)
        seed = self.first_seed + offset
        while True:
            task = ALL_TASKS[int(torch.multinomial(self.weights, 1, generator=generator))]
            sample = make_sample(task, seed, float(self.difficulty[ALL_TASKS.index(task)]))
            rng = random.Random(seed)
            if rng.random() < self.crop_share.get(task, 0.0):
                sample = crop_sample(rng, sample, self.processor)
            yield encode(sample, self.processor)
            seed += step

    def _place(self, rows: list[list[Encoded]], sample: Encoded) -> bool:
        """Puts the sample into the first row with room; False if the batch is full."""
        num_patches = sum(other.num_patches for row in rows for other in row)
        if rows and num_patches + sample.num_patches > self.max_patches:
            return False
        for row in rows:
            if _row_tokens(row) + sample.num_tokens <= self.row_length:
                row.append(sample)
                return True
        if len(rows) < self.rows:
            rows.append([sample])
            return True
        return False
