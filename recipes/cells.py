"""Labels for visual tokens, in training alone.

An answer of a few characters says little about a picture of hundreds of patches. The program that draws knows what
stands where, so every visual token has a label as well: a character in its cell, the colour or kind of a shape there,
or that the cell is empty; or what questions look for and answers take from there: the thing on a receipt's line, the
letter and the tens of a chart's column, the sides of a shape. An empty cell beside shapes is labelled as on a
chessboard, by its column or its row, which boxes are made of. Places have two digits, the tenth and the hundredth of
the picture's width or height; a label is one of them, and its alphabet tells which. A label is predicted where an LLM
predicts the next token, by the same output layer.

Digits tell nothing of how near a wrong one is. So cells are also asked for numbers, half-way through the decoder, where
answers can still read them: those of a shape for its sides, and for how many shapes of the picture are like it; those
of a character for its place in its text; those of a chart's column for its value. Each number has a fixed direction of
the hidden states, for which the model has no weights of its own.
"""

from collections import defaultdict
from functools import cache
from math import ceil
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from navil import image_processing_navil as image_processing
from navil import processing_navil as processing

from .drawing import Box, Mark, Picture

EMPTY = " "
# The ten digits of a tenth and of a hundredth, for a shape's left, upper, right and lower side.
SIDES = (("0123456789", "UVWXYZuvwx"), ("ABCDEFGHIJ", "yz!#$%&()*"))
SIDES += (("abcdefghij", "klmnopqrst"), ("KLMNOPQRST", "+,-./:;<=>"))
PLACES = "".join(tenths + hundredths for tenths, hundredths in SIDES[:2])  # of an empty cell: its column and its row
AREA_SHARE = 0.5  # of the cells that show something: labelled with what they belong to instead
CELL_WEIGHT = 0.5  # of a picture's cells, against an answer of as many tokens
EMPTY_WEIGHT = 0.1  # of the empty ones: they are many and easy
PLACE_WEIGHT = 0.3  # of those that are asked where they are
NUMBER_GROUPS = {"places": 4, "counts": 3, "orders": 2, "values": 1}  # that cells are asked for, in this order
NUMBERS = sum(NUMBER_GROUPS.values())
MOST_SHAPES, MOST_CHARACTERS, MOST_VALUE = 6, 10, 100  # in a picture, on one side of a character, of a column


def label_cells(picture: Picture, processor: Any, as_is: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and weights (cells,) of what the merged cells of all scales show, in the order of the visual tokens.

    Where several marks are in one cell, its label is one of them, any, or of the areas around it. Of a picture without
    marks all labels are -100. `as_is`: the picture has one scale, its own size.
    """
    width, height = picture.image.size
    scales, cell = seen_scales(picture, processor, as_is)
    areas = (*picture.areas, *side_areas(picture))
    shown, around = (
        np.concatenate([choose_marks(marks, (height, width), scale, cell) for scale in scales])
        for marks in (picture.marks, areas)
    )
    if not picture.marks:
        return torch.full((len(shown),), processing.IGNORE_INDEX), torch.zeros(len(shown))
    seed = int(np.abs([mark.box for mark in picture.marks]).sum())
    by_area = (around >= 0) & ((shown < 0) | (np.random.default_rng(seed).random(len(shown)) < AREA_SHARE))
    chosen = np.where(by_area, len(picture.marks) + around, shown)
    ids = [token_of(mark.text, processor.tokenizer) for mark in (*picture.marks, *areas)]
    labels = torch.tensor([*ids, token_of(EMPTY, processor.tokenizer)])[chosen]  # -1, no mark, is the last
    is_empty = torch.from_numpy(chosen < 0)
    shows_shapes = any(len(mark.text) > 1 for mark in picture.marks)
    if shows_shapes:
        names = torch.tensor([token_of(name, processor.tokenizer) for name in PLACES])
        places = np.concatenate([choose_places(scale, cell) for scale in scales])
        labels = torch.where(is_empty, names[places], labels)
    empty_weight = PLACE_WEIGHT if shows_shapes else EMPTY_WEIGHT
    weight = torch.where(is_empty, empty_weight / is_empty.sum() ** 0.5, (~is_empty).sum() ** -0.5)
    return labels, CELL_WEIGHT * weight


def label_numbers(picture: Picture, processor: Any, as_is: bool = False) -> Tensor:
    """(cells, NUMBERS) of 0 to 1, in the order of the visual tokens: `shape_numbers` of the shape that each merged cell
    shows, `order_numbers` of the character, and the value of the column that it is in. NaN where there is none.
    """
    scales, cell = seen_scales(picture, processor, as_is)
    letters = tuple(mark for mark in picture.marks if mark.order is not None)
    columns = tuple(area for area in picture.areas if area.value is not None)
    shapes = shape_numbers(picture)
    asked = (
        (tuple(Mark("", box) for box in shapes), [*shapes.values()]),
        (letters, [order_numbers(letter) for letter in letters]),
        (columns, [[column.value / MOST_VALUE] for column in columns]),
    )
    widths = (NUMBER_GROUPS["places"] + NUMBER_GROUPS["counts"], NUMBER_GROUPS["orders"], NUMBER_GROUPS["values"])
    numbers = []
    for (marks, told), width in zip(asked, widths, strict=True):
        shown = np.concatenate([choose_marks(marks, picture.image.size[::-1], scale, cell) for scale in scales])
        numbers.append(torch.tensor([*told, [torch.nan] * width])[shown])  # -1, none, is the last
    return torch.cat(numbers, dim=1)


def shape_numbers(picture: Picture) -> dict[Box, list[float]]:
    """By the box of each of the picture's shapes, seven numbers of 0 to 1.

    Its left, upper, right and lower side, in shares of the picture's width and height. Then how many of the picture's
    shapes have its colour and kind, how many its kind, and how many there are, in shares of MOST_SHAPES.
    """
    words = defaultdict(list)  # of a shape: its colour and its kind
    for mark in picture.marks:
        if len(mark.text) > 1:
            words[mark.box].append(mark.text)
    likenesses = list(words.values())
    kinds = [kind for _, kind in likenesses]
    numbers = {}
    for box, (color, kind) in words.items():
        sides = [side / length for side, length in zip(box, 2 * picture.image.size, strict=True)]
        counts = (likenesses.count([color, kind]), kinds.count(kind), len(kinds))
        numbers[box] = sides + [count / MOST_SHAPES for count in counts]
    return numbers


def order_numbers(letter: Mark) -> list[float]:
    """How many characters of its text stand before the letter and after it, in shares of MOST_CHARACTERS; 1 of more."""
    return [min(1.0, count / MOST_CHARACTERS) for count in letter.order]


def seen_scales(picture: Picture, processor: Any, as_is: bool) -> tuple[list[tuple[int, int]], int]:
    """(height, width) of the picture's scales, smallest first, and the side of a merged cell, in pixels."""
    sight = processor.image_processor
    cell = sight.patch_size * sight.merge_size
    width, height = picture.image.size
    budget = (sight.min_pixels, sight.max_pixels, sight.scale_downsample_ratio)
    scales = [(height, width)] if as_is else image_processing.plan_scales(height, width, cell, *budget)
    return scales, cell


def side_areas(picture: Picture) -> list[Mark]:
    """Eight for each shape of the picture, all of its size: the two digits of each of its sides."""
    size = 2 * picture.image.size
    boxes = {mark.box for mark in picture.marks if len(mark.text) > 1}
    return [
        Mark(alphabet[digit], box)
        for box in sorted(boxes)
        for alphabets, side, length in zip(SIDES, box, size, strict=True)
        for alphabet, digit in zip(alphabets, divmod(min(99, int(100 * side / length)), 10), strict=True)
    ]


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


def choose_places(scale: tuple[int, int], cell: int) -> np.ndarray:
    """(cells,) index into PLACES, row by row: one digit, any, of where the cell's middle is."""
    middles = [(np.arange(ceil(side / cell)) + 0.5) / ceil(side / cell) for side in scale]
    [row_tenth, row_hundredth], [column_tenth, column_hundredth] = (divmod((100 * m).astype(int), 10) for m in middles)
    digits = (column_tenth[None], column_hundredth[None], row_tenth[:, None], row_hundredth[:, None])
    shape = (len(middles[0]), len(middles[1]))
    named = np.stack([np.broadcast_to(10 * i + digit, shape) for i, digit in enumerate(digits)])
    picked = np.random.default_rng(sum(scale)).integers(len(named), size=shape)
    return np.take_along_axis(named, picked[None], 0).ravel()


def _along(start: np.ndarray, end: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, marks) on one axis, in cells: whether a mark's middle is in a cell, and whether it covers a cell's."""
    cells = np.arange(count)[:, None]
    middle = cells + 0.5
    return cells == np.floor((start + end) / 2), (start <= middle) & (middle < end)


def number_directions(hidden_size: int) -> Tensor:
    """(hidden_size, NUMBERS) orthonormal: the directions along which hidden states hold the numbers of their cells."""
    generator = torch.Generator().manual_seed(0)
    # One group after the other: directions that models have learned do not depend on what else is asked for.
    drawn = [torch.randn(hidden_size, count, generator=generator) for count in NUMBER_GROUPS.values()]
    return torch.linalg.qr(torch.cat(drawn, dim=1))[0]


def number_errors(hidden_states: Tensor, numbers: Tensor) -> Tensor:
    """(NUMBERS,) mean distance of each number that hidden states (B, L, D) hold from `numbers` (B, L, NUMBERS).

    Where these are NaN, nothing is asked for; 0 where all are.
    """
    asked = ~numbers.isnan()
    counted = asked.any(-1)
    normed = F.rms_norm(hidden_states[counted].float(), hidden_states.shape[-1:])
    held = 0.5 + 0.5 * normed @ number_directions(hidden_states.shape[-1]).to(normed.device)
    distances = torch.where(asked[counted], held - numbers[counted].nan_to_num(), 0.0).abs()
    return distances.sum(0) / asked.sum((0, 1)).clamp(min=1)


@cache
def token_of(text: str, tokenizer: Any) -> int:
    """A character as answers spell it; of a word as questions have it, with the blank in front, the first token."""
    return tokenizer(text if len(text) == 1 else f" {text}", add_special_tokens=False)["input_ids"][0]
