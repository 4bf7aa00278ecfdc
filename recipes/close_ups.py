"""Training pictures cut down to what is asked about, and reduced.

A picture costs what its patches cost, and most patches of a large one are empty. A close-up is what the model would get
of the picture's largest scale, reduced to letters or shapes of the sizes that the model is to read, and without most of
what lies around them. Its answers are the same, but boxes are told in what is left of the picture. A line of text costs
an eighteenth.
"""

import random
from dataclasses import replace
from operator import sub
from typing import Any

from PIL import Image

from .cells import seen_scales
from .drawing import Box, Mark, Picture, log_uniform, shifted
from .tasks import PAGE, Accepted, Sample, thousandths

LETTERS, SHAPES = (14, 96), (16, 64)  # pixels: heights of lines, sides of shapes; log-uniform, never enlarged for it
CUT_OUT = ("text", "receipt", "scene", "two_images", "two_turns", PAGE)  # whose answers do not depend on places
MARGIN = 1.5  # merged cells, at most, around what is cut out
BOXES = "grounding"  # where places are asked for, margins are of all sizes: up to the whole picture


def close_up(rng: random.Random, sample: Sample, processor: Any) -> Sample:
    """The sample with smaller pictures, `as_is`; itself where it has no picture or one without marks."""
    if not sample.pictures or not all(picture.marks for picture in sample.pictures):
        return sample
    pictures = []
    for picture in sample.pictures:
        scales, cell = seen_scales(picture, processor, as_is=False)
        scale = _scale(rng, picture, scales[-1][1])
        window = _window(rng, sample.task, picture, MARGIN * cell / scale)
        pictures.append(_seen(picture, window, scale))
        if sample.task == BOXES:
            sample = _told_in(window, sample)
    return replace(sample, pictures=pictures, as_is=True)


def _scale(rng: random.Random, picture: Picture, seen_width: int) -> float:
    """How much smaller the picture is seen: at its largest scale, and its smallest mark within LETTERS or SHAPES."""
    shows_letters = all(len(mark.text) == 1 for mark in picture.marks)
    lefts, tops, rights, bottoms = zip(*(mark.box for mark in picture.marks), strict=True)
    heights, widths = map(sub, bottoms, tops), map(sub, rights, lefts)
    smallest = min(heights) if shows_letters else min(*heights, *widths)
    wanted = log_uniform(rng, *(LETTERS if shows_letters else SHAPES))
    return min(seen_width / picture.image.width, wanted / max(1, smallest))


def _window(rng: random.Random, task: str, picture: Picture, margin: float) -> Box:
    """The part of the picture that is left: its marks and at most `margin` pixels on each side, or as BOXES."""
    width, height = picture.image.size
    if task not in (*CUT_OUT, BOXES):
        return 0, 0, width, height
    lefts, tops, rights, bottoms = zip(*(mark.box for mark in picture.marks), strict=True)
    ends = (min(lefts), min(tops), width - max(rights), height - max(bottoms))
    left, top, right, bottom = (
        max(0, int(end - (end * rng.random() if task == BOXES else rng.uniform(0, margin)))) for end in ends
    )
    return left, top, width - right, height - bottom


def _seen(picture: Picture, window: Box, scale: float) -> Picture:
    left, top, right, bottom = window
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    image = picture.image.resize(size, Image.Resampling.BICUBIC, box=window)
    return Picture(image, *(_scaled(shifted(marks, -left, -top), scale) for marks in (picture.marks, picture.areas)))


def _told_in(window: Box, sample: Sample) -> Sample:
    """The sample with its boxes in thousandths of the window."""
    [picture] = sample.pictures
    left, top, right, bottom = window
    told = {
        thousandths(mark.box, picture.image.size): thousandths(moved.box, (right - left, bottom - top))
        for mark, moved in zip(picture.marks, shifted(picture.marks, -left, -top), strict=True)
    }
    turns = [
        (question, answer.replace(str(list(accepted.box)), str(list(told[accepted.box]))))
        for (question, answer), accepted in zip(sample.turns, sample.accepted, strict=True)
    ]
    return replace(sample, turns=turns, accepted=[Accepted(box=told[accepted.box]) for accepted in sample.accepted])


def _scaled(marks: tuple[Mark, ...], scale: float) -> tuple[Mark, ...]:
    return tuple(mark._replace(box=tuple(side * scale for side in mark.box)) for mark in marks)
