"""Training pictures cropped to what is asked about, and reduced.

A picture costs what its patches cost, and most patches of a large one are empty. A crop is the part of the picture with
the content, reduced to letters or shapes of the sizes that the model has to read. Answers stay the same, except that
boxes are relative to the crop. A line of text costs an eighteenth of its whole picture.
"""

import random
from dataclasses import replace
from operator import sub

from PIL import Image

from navil.processing_navil import NaViLProcessor

from .drawing import Annotation, Box, Picture, log_uniform, shifted
from .labels import is_shape, planned_scales
from .questions import Accepted, thousandths
from .tasks import PAGE, Sample

# Pixels after reduction, log-uniform; never enlarged to get there.
LINE_HEIGHTS = (14, 96)
SHAPE_SIDES = (16, 64)
MARGIN = 1.5  # merged cells, at most, around the content
CROPPED_TO_CONTENT = ("text", "receipt", "scene", "two_images", "two_turns", PAGE)
"""Tasks whose answers do not depend on what surrounds the content. Pictures of other tasks are reduced only."""
GROUNDING = "grounding"
"""Answers are places, so margins vary from none to the whole picture."""


def crop_sample(rng: random.Random, sample: Sample, processor: NaViLProcessor) -> Sample:
    """The sample with cropped pictures, at `native_size`; unchanged without pictures or without annotations."""
    if not sample.pictures or not all(picture.annotations for picture in sample.pictures):
        return sample
    pictures = []
    for picture in sample.pictures:
        _, largest_width = planned_scales(picture, processor)[-1]
        factor = _reduction(rng, picture, largest_width)
        window = _window(rng, sample.task, picture, MARGIN * processor.image_processor.cell / factor)
        pictures.append(_crop(picture, window, factor))
        if sample.task == GROUNDING:
            sample = _move_boxes(sample, window)
    return replace(sample, pictures=pictures, native_size=True)


def _reduction(rng: random.Random, picture: Picture, largest_width: int) -> float:
    """Factor of the side lengths: as at the largest scale, or the smallest line or shape within its range."""
    has_letters = not any(is_shape(annotation) for annotation in picture.annotations)
    lefts, tops, rights, bottoms = zip(*(annotation.box for annotation in picture.annotations), strict=True)
    heights, widths = map(sub, bottoms, tops), map(sub, rights, lefts)
    smallest = min(heights) if has_letters else min(*heights, *widths)
    wanted = log_uniform(rng, *(LINE_HEIGHTS if has_letters else SHAPE_SIDES))
    return min(largest_width / picture.image.width, wanted / max(1, smallest))


def _window(rng: random.Random, task: str, picture: Picture, margin: float) -> Box:
    """The part of the picture to keep: its content and a margin of at most `margin` pixels on each side."""
    width, height = picture.image.size
    if task not in (*CROPPED_TO_CONTENT, GROUNDING):
        return 0, 0, width, height
    lefts, tops, rights, bottoms = zip(*(annotation.box for annotation in picture.annotations), strict=True)
    available = (min(lefts), min(tops), width - max(rights), height - max(bottoms))
    left, top, right, bottom = (
        max(0, int(space - (space * rng.random() if task == GROUNDING else rng.uniform(0, margin))))
        for space in available
    )
    return left, top, width - right, height - bottom


def _crop(picture: Picture, window: Box, factor: float) -> Picture:
    left, top, right, bottom = window
    size = (max(1, round((right - left) * factor)), max(1, round((bottom - top) * factor)))
    image = picture.image.resize(size, Image.Resampling.BICUBIC, box=window)
    moved = (shifted(annotations, -left, -top) for annotations in (picture.annotations, picture.regions))
    return Picture(image, *(_scaled(annotations, factor) for annotations in moved))


def _scaled(annotations: tuple[Annotation, ...], factor: float) -> tuple[Annotation, ...]:
    return tuple(a._replace(box=tuple(side * factor for side in a.box)) for a in annotations)


def _move_boxes(sample: Sample, window: Box) -> Sample:
    """The sample with its boxes in thousandths of the window."""
    [picture] = sample.pictures
    left, top, right, bottom = window
    moved = {
        thousandths(before.box, picture.image.size): thousandths(after.box, (right - left, bottom - top))
        for before, after in zip(picture.annotations, shifted(picture.annotations, -left, -top), strict=True)
    }
    turns = [
        (question, answer.replace(str(list(accepted.box)), str(list(moved[accepted.box]))))
        for (question, answer), accepted in zip(sample.turns, sample.accepted, strict=True)
    ]
    return replace(sample, turns=turns, accepted=[Accepted(box=moved[accepted.box]) for accepted in sample.accepted])
