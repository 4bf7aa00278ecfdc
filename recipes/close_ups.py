"""Training pictures as small as they can still be read.

A picture costs what its patches cost, and most patches of a large one are empty. A close-up is what the model would get
of the picture's largest scale, reduced until its letters or shapes are as small as any that the model is asked about,
and where no answer is a place, no more than what lies around them. Its answers are the same, and a line of text costs a
twentieth.
"""

import random
from dataclasses import replace
from typing import Any

from PIL import Image

from navil_modules import image_processing

from .drawing import Box, Mark, Picture, log_uniform, shifted
from .tasks import PAGE, Sample

SHARE, SHARES = 0.8, {"text": 0.98}  # of the training pictures; the others are as the model gets them in use
LETTERS, SHAPES = (9, 36), (16, 64)  # pixels: heights of lines, sides of shapes; log-uniform, never enlarged for it
CUT_OUT = ("text", "receipt", "scene", "two_images", "two_turns", PAGE)  # whose answers do not depend on places
MARGIN = 1.5  # merged cells, at most, around what is cut out


def close_up(rng: random.Random, sample: Sample, processor: Any) -> Sample:
    """The sample with smaller pictures, `as_is`; itself where it has no picture or one without marks."""
    if not sample.pictures or not all(picture.marks for picture in sample.pictures):
        return sample
    sight, is_cut_out = processor.image_processor, sample.task in CUT_OUT
    pictures = [_reduced(rng, picture, is_cut_out, sight) for picture in sample.pictures]
    return replace(sample, pictures=pictures, as_is=True)


def _reduced(rng: random.Random, picture: Picture, is_cut_out: bool, sight: Any) -> Picture:
    cell = sight.patch_size * sight.merge_size
    width, height = picture.image.size
    _, seen_width = image_processing.plan_scales(height, width, cell, sight.min_pixels, sight.max_pixels, None)[0]
    shows_letters = all(len(mark.text) == 1 for mark in picture.marks)
    heights, widths = zip(*((box[3] - box[1], box[2] - box[0]) for _, box in picture.marks), strict=True)
    smallest = min(heights) if shows_letters else min(*heights, *widths)
    wanted = log_uniform(rng, *(LETTERS if shows_letters else SHAPES))
    scale = min(seen_width / width, wanted / max(1, smallest))
    window = _around(rng, picture, MARGIN * cell / scale) if is_cut_out else (0, 0, width, height)
    left, top, right, bottom = window
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    image = picture.image.resize(size, Image.Resampling.BICUBIC, box=window)
    return Picture(image, *(_scaled(shifted(marks, -left, -top), scale) for marks in (picture.marks, picture.areas)))


def _around(rng: random.Random, picture: Picture, margin: float) -> Box:
    """The part of the picture that holds its marks, and up to `margin` pixels more on each side."""
    lefts, tops, rights, bottoms = zip(*(mark.box for mark in picture.marks), strict=True)
    left, top = (max(0, int(min(starts) - rng.uniform(0, margin))) for starts in (lefts, tops))
    right = min(picture.image.width, int(max(rights) + rng.uniform(0, margin)) + 1)
    bottom = min(picture.image.height, int(max(bottoms) + rng.uniform(0, margin)) + 1)
    return left, top, right, bottom


def _scaled(marks: tuple[Mark, ...], scale: float) -> tuple[Mark, ...]:
    return tuple(Mark(text, tuple(side * scale for side in box)) for text, box in marks)
