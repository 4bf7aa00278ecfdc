"""Labels for visual tokens, in training alone.

An answer of a few characters says little about a picture of hundreds of patches. The program that draws knows what
stands where, so every visual token has a label as well: a character in its cell, the colour or kind of a shape there,
or that the cell is empty. It is predicted where an LLM predicts the next token, by the same output layer.
"""

from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from navil_modules import image_processing, processing

from .drawing import Mark, Picture

EMPTY = " "
CELL_WEIGHT = 0.5  # of a picture's cells, against an answer of as many tokens
EMPTY_WEIGHT = 0.1  # of the empty ones: they are many and easy


def label_cells(picture: Picture, processor: Any) -> tuple[Tensor, Tensor]:
    """Ids and weights (cells,) of what the merged cells of all scales show, in the order of the visual tokens.

    Where several marks are in one cell, its label is one of them, any. Of a picture without marks all labels are -100.
    """
    sight = processor.image_processor
    cell = sight.patch_size * sight.merge_size
    width, height = picture.image.size
    budget = (sight.min_pixels, sight.max_pixels, sight.scale_downsample_ratio)
    scales = image_processing.plan_scales(height, width, cell, *budget)
    chosen = np.concatenate([choose_marks(picture.marks, (height, width), scale, cell) for scale in scales])
    if not picture.marks:
        return torch.full((len(chosen),), processing.IGNORE_INDEX), torch.zeros(len(chosen))
    ids = [token_of(mark.text, processor.tokenizer) for mark in picture.marks]
    labels = torch.tensor([*ids, token_of(EMPTY, processor.tokenizer)])[chosen]  # -1, no mark, is the last
    is_empty = torch.from_numpy(chosen < 0)
    weight = torch.where(is_empty, EMPTY_WEIGHT / is_empty.sum() ** 0.5, (~is_empty).sum() ** -0.5)
    return labels, CELL_WEIGHT * weight


def choose_marks(marks: tuple[Mark, ...], size: tuple[int, int], scale: tuple[int, int], cell: int) -> np.ndarray:
    """(cells,) index of a mark that each cell shows, row by row, or -1.

    A mark is shown by the cell in which its middle lies and by all whose middle it covers.

    Args:
        size, scale: (height, width) in pixels of the picture, in which the marks are placed, and of its scaled copy.
        cell: side of a merged cell of the copy, in pixels.
    """
    rows, columns = (ceil(side / cell) for side in scale)
    if not marks:
        return np.full(rows * columns, -1)
    boxes = np.array([mark.box for mark in marks]) * np.tile([scale[1] / size[1], scale[0] / size[0]], 2) / cell
    at_column, over_column = _along(boxes[:, 0], boxes[:, 2], columns)
    at_row, over_row = _along(boxes[:, 1], boxes[:, 3], rows)
    shown = at_row[:, None] & at_column[None] | over_row[:, None] & over_column[None]
    seed = int(1000 * np.abs(boxes).sum())
    picked = np.random.default_rng(seed).random(shown.shape) * shown
    return np.where(shown.any(-1), picked.argmax(-1), -1).ravel()


def _along(start: np.ndarray, end: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, marks) on one axis, in cells: whether a mark's middle is in a cell, and whether it covers a cell's."""
    cells = np.arange(count)[:, None]
    middle = cells + 0.5
    return cells == np.floor((start + end) / 2), (start <= middle) & (middle < end)


def token_of(text: str, tokenizer: Any) -> int:
    """A character as answers spell it; a word as questions have it, one token with the blank in front."""
    [token] = tokenizer(text if len(text) == 1 else f" {text}", add_special_tokens=False)["input_ids"]
    return token
