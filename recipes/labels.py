"""Auxiliary dense labels: training targets for every visual token. Inference does not use them.

An answer of a few characters says little about an image of hundreds of patches, but the generator knows what it drew
where. A visual token stands for one merged cell of one scale and gets two kinds of targets.

Classes (`dense_labels`): one token of the vocabulary, predicted like a next token by the same output layer.
- A cell with content: its character, or the color or kind of its shape. Half of these cells are labelled instead with
  what the content belongs to: the item of a receipt's line, the label or the tens digit of a chart's column, one digit
  of one side of the shape's box.
- An empty cell: EMPTY; in a picture of shapes one digit of its own column or row.
- Coordinates have two digits, tenths and hundredths of the picture's width or height. Each has an alphabet of its own,
  so that a label also says which digit of which side it is.

Numbers (`regression_targets`): digits do not tell how near a wrong one is, so some cells also have numbers of 0 to 1.
Hidden states hold them half-way through the decoder, where answers can still read them, along fixed directions: no
weights are added.
"""

from collections import defaultdict
from functools import cache
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from navil.processing_navil import IGNORE_INDEX, NaViLProcessor
from navil.tokenization_navil import NaViLTokenizer

from .drawing import Annotation, Box, Picture

EMPTY = " "
# Of a shape's left, upper, right and lower side: the digits of the tenths and of the hundredths.
SIDE_ALPHABETS = (("0123456789", "UVWXYZuvwx"), ("ABCDEFGHIJ", "yz!#$%&()*"))
SIDE_ALPHABETS += (("abcdefghij", "klmnopqrst"), ("KLMNOPQRST", "+,-./:;<=>"))
CELL_ALPHABET = "".join(tenths + hundredths for tenths, hundredths in SIDE_ALPHABETS[:2])  # an empty cell's column, row
REGION_SHARE = 0.5  # of the cells with content: labelled with what the content belongs to
DENSE_WEIGHT = 0.5  # loss weight of a picture's cells with content, relative to an answer of as many tokens
EMPTY_WEIGHT = 0.1  # the same for empty cells, which are many and easy
COORDINATE_WEIGHT = 0.3  # the same for empty cells that are labelled with their column or row

NATIVE_SIZE = {"multi_scale": False, "min_pixels": 1, "max_pixels": 10**9}
"""Settings of the image processor that keep a picture's size."""

TARGET_GROUPS = {"box_sides": 4, "counts": 3, "text_position": 2, "chart_value": 1}
"""Numbers of a cell, in this order: `shape_targets`, `position_targets`, and the value of a chart's column."""
NUM_TARGETS = sum(TARGET_GROUPS.values())
MAX_SHAPES, MAX_CHARACTERS, MAX_VALUE = 6, 10, 100  # what 1.0 stands for


def dense_labels(picture: Picture, processor: NaViLProcessor, native_size: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and loss weights (cells,) of the merged cells of all scales, in the order of the visual tokens.

    A cell with several annotations gets one of them at random. A picture without annotations gets -100 everywhere.
    `native_size`: the picture has one scale, its own size.
    """
    width, height = picture.image.size
    scales, cell = planned_scales(picture, processor, native_size), processor.image_processor.cell
    regions = (*picture.regions, *side_regions(picture))
    content, around = (
        np.concatenate([assign(annotations, (height, width), scale, cell) for scale in scales])
        for annotations in (picture.annotations, regions)
    )
    if not picture.annotations:
        return torch.full((len(content),), IGNORE_INDEX), torch.zeros(len(content))
    seed = int(np.abs([annotation.box for annotation in picture.annotations]).sum())
    by_region = (around >= 0) & ((content < 0) | (np.random.default_rng(seed).random(len(content)) < REGION_SHARE))
    chosen = np.where(by_region, len(picture.annotations) + around, content)
    texts = [annotation.text for annotation in (*picture.annotations, *regions)]
    ids = [label_id(text, processor.tokenizer) for text in (*texts, EMPTY)]
    labels = torch.tensor(ids)[chosen]  # an empty cell is -1, the last
    is_empty = torch.from_numpy(chosen < 0)
    has_shapes = any(is_shape(annotation) for annotation in picture.annotations)
    if has_shapes:
        names = torch.tensor([label_id(name, processor.tokenizer) for name in CELL_ALPHABET])
        labels = torch.where(is_empty, names[np.concatenate([coordinates(scale, cell) for scale in scales])], labels)
    empty_weight = COORDINATE_WEIGHT if has_shapes else EMPTY_WEIGHT
    weight = torch.where(is_empty, empty_weight / is_empty.sum() ** 0.5, (~is_empty).sum() ** -0.5)
    return labels, DENSE_WEIGHT * weight


def regression_targets(picture: Picture, processor: NaViLProcessor, native_size: bool = False) -> Tensor:
    """(cells, NUM_TARGETS) numbers of 0 to 1 in the order of the visual tokens; NaN where a cell has none."""
    scales, cell = planned_scales(picture, processor, native_size), processor.image_processor.cell
    letters = tuple(annotation for annotation in picture.annotations if annotation.position is not None)
    columns = tuple(region for region in picture.regions if region.value is not None)
    shapes = shape_targets(picture)
    groups = (
        (tuple(Annotation("", box) for box in shapes), [*shapes.values()]),
        (letters, [position_targets(letter) for letter in letters]),
        (columns, [[column.value / MAX_VALUE] for column in columns]),
    )
    sizes = TARGET_GROUPS
    widths = (sizes["box_sides"] + sizes["counts"], sizes["text_position"], sizes["chart_value"])
    targets = []
    for (annotations, numbers), width in zip(groups, widths, strict=True):
        shown = np.concatenate([assign(annotations, picture.image.size[::-1], scale, cell) for scale in scales])
        targets.append(torch.tensor([*numbers, [torch.nan] * width])[shown])  # a cell without any is -1, the last
    return torch.cat(targets, dim=1)


def is_shape(annotation: Annotation) -> bool:
    """Whether it is a shape's color or kind; characters are single."""
    return len(annotation.text) > 1


def shape_targets(picture: Picture) -> dict[Box, list[float]]:
    """By the box of each shape, seven numbers of 0 to 1.

    Its left, upper, right and lower side in shares of the picture's width and height; then, in shares of MAX_SHAPES,
    how many of the picture's shapes have its color and kind, how many have its kind, and how many there are.
    """
    words = defaultdict(list)  # box: color, kind
    for annotation in picture.annotations:
        if is_shape(annotation):
            words[annotation.box].append(annotation.text)
    names = list(words.values())
    kinds = [kind for _, kind in names]
    targets = {}
    for box, (color, kind) in words.items():
        sides = [side / length for side, length in zip(box, 2 * picture.image.size, strict=True)]
        counts = (names.count([color, kind]), kinds.count(kind), len(kinds))
        targets[box] = sides + [count / MAX_SHAPES for count in counts]
    return targets


def position_targets(letter: Annotation) -> list[float]:
    """How many characters of its text precede and follow a letter, in shares of MAX_CHARACTERS, at most 1."""
    return [min(1.0, count / MAX_CHARACTERS) for count in letter.position]


def planned_scales(picture: Picture, processor: NaViLProcessor, native_size: bool = False) -> list[tuple[int, int]]:
    """(height, width) in pixels of the picture's scales, smallest first."""
    settings = NATIVE_SIZE if native_size else {"multi_scale": True}
    [plan] = processor.image_processor.plan(picture.image, **settings)
    return plan.scales


def side_regions(picture: Picture) -> list[Annotation]:
    """Eight regions for each shape, all with its box: the two digits of each of its sides."""
    size = 2 * picture.image.size
    boxes = {annotation.box for annotation in picture.annotations if is_shape(annotation)}
    return [
        Annotation(alphabet[digit], box)
        for box in sorted(boxes)
        for alphabets, side, length in zip(SIDE_ALPHABETS, box, size, strict=True)
        for alphabet, digit in zip(alphabets, divmod(min(99, int(100 * side / length)), 10), strict=True)
    ]


def assign(annotations: tuple[Annotation, ...], size: tuple[int, int], scale: tuple[int, int], cell: int) -> np.ndarray:
    """(cells,) index of one annotation that each cell shows, row by row, or -1.

    A cell shows the annotations whose center it contains and those that cover its center.

    Args:
        size, scale: (height, width) in pixels of the picture, in which the boxes are, and of its scaled copy.
        cell: side of a merged cell of the copy, in pixels.
    """
    rows, columns = (ceil(side / cell) for side in scale)
    if not annotations:
        return np.full(rows * columns, -1)
    boxes = np.array([annotation.box for annotation in annotations])
    boxes = boxes * np.tile([scale[1] / size[1], scale[0] / size[0]], 2) / cell
    has_center_x, is_covered_x = _overlap(boxes[:, 0], boxes[:, 2], columns)
    has_center_y, is_covered_y = _overlap(boxes[:, 1], boxes[:, 3], rows)
    shown = has_center_y[:, None] & has_center_x[None] | is_covered_y[:, None] & is_covered_x[None]
    seed = int(1000 * np.abs(boxes).sum())
    picked = np.random.default_rng(seed).random(shown.shape) * shown
    return np.where(shown.any(-1), picked.argmax(-1), -1).ravel()


def _overlap(start: np.ndarray, end: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """On one axis, (count, annotations): whether a cell contains the center, and whether the cell's own is covered."""
    cells = np.arange(count)[:, None]
    center = cells + 0.5
    return cells == np.floor((start + end) / 2), (start <= center) & (center < end)


def coordinates(scale: tuple[int, int], cell: int) -> np.ndarray:
    """(cells,) index into CELL_ALPHABET, row by row: one digit, at random, of a cell's column or row."""
    centers = [(np.arange(ceil(side / cell)) + 0.5) / ceil(side / cell) for side in scale]
    [row_tenth, row_hundredth], [column_tenth, column_hundredth] = (divmod((100 * c).astype(int), 10) for c in centers)
    digits = (column_tenth[None], column_hundredth[None], row_tenth[:, None], row_hundredth[:, None])
    shape = (len(centers[0]), len(centers[1]))
    named = np.stack([np.broadcast_to(10 * i + digit, shape) for i, digit in enumerate(digits)])
    picked = np.random.default_rng(sum(scale)).integers(len(named), size=shape)
    return np.take_along_axis(named, picked[None], 0).ravel()


@cache
def label_id(text: str, tokenizer: NaViLTokenizer) -> int:
    """Id of a character as in answers, or of a word's first token as in questions, where a blank precedes it."""
    return tokenizer(text if len(text) == 1 else f" {text}", add_special_tokens=False)["input_ids"][0]


# ---------------------------------------------------------------------------------------------------- loss and metrics


def dense_accuracy(logits: Tensor, labels: Tensor, empty_id: int) -> float:
    """Share of the labels (B, L), EMPTY aside, that are the most likely token; 0 if there are none."""
    labels = labels[:, 1:]
    counted = (labels >= 0) & (labels != empty_id)
    right = logits[:, :-1].argmax(-1) == labels
    return float((right & counted).sum() / counted.sum().clamp(min=1))


def regression_directions(hidden_size: int) -> Tensor:
    """(hidden_size, NUM_TARGETS) orthonormal directions along which hidden states hold the numbers of their cells."""
    generator = torch.Generator().manual_seed(0)
    # Drawn group by group, so that adding a group leaves those that a model has learned as they are.
    drawn = [torch.randn(hidden_size, count, generator=generator) for count in TARGET_GROUPS.values()]
    return torch.linalg.qr(torch.cat(drawn, dim=1))[0]


def regression_errors(hidden_states: Tensor, targets: Tensor) -> Tensor:
    """(NUM_TARGETS,) mean absolute error of hidden states (B, L, D) against targets (B, L, NUM_TARGETS).

    NaN targets do not count; a number without any target has error 0.
    """
    has_target = ~targets.isnan()
    counted = has_target.any(-1)
    normed = F.rms_norm(hidden_states[counted].float(), hidden_states.shape[-1:])
    predicted = 0.5 + 0.5 * normed @ regression_directions(hidden_states.shape[-1]).to(normed.device)
    distances = torch.where(has_target[counted], predicted - targets[counted].nan_to_num(), 0.0).abs()
    return distances.sum(0) / has_target.sum((0, 1)).clamp(min=1)
