"""Images of any resolution to packed patches for NaViL (reference §5).

    image -> scales (largest first, each tau times the side of the one before)
          -> resize, pad to whole merged cells, split into patches, normalise
          -> packed smallest scale first: pixel_values (patches, 3 * p * p), image_grid_thw (scales, 3)

Inside a scale, patches keep their merge groups together: row-major over merged cells, row-major inside a cell.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

MAX_ASPECT_RATIO = 200
MAX_PATCH_SIZE = 1024
ORIENTATION_TAG = 0x0112  # of EXIF
DRAFT_MARGIN = 2
"""A JPEG is decoded at a fraction of its size only while its sides stay this many times those of the largest scale."""
PATCHES_AT_ONCE = 64
"""As many are normalised at a time that what lies in between stays in a processor's cache."""

RELEASED_SETTINGS = {
    "do_convert_rgb": True,
    "do_resize": False,
    "do_pad": True,
    "do_rescale": True,
    "do_normalize": True,
}
"""What transformers' usual switches say about NaViL, the only way it sees pictures: `do_resize` would distort a picture
to whole cells, `do_pad` fills them up; either way it is fitted into the pixel budget first."""


class Picture(NamedTuple):
    """An upright RGB picture and its full size in pixels, of which the pixels may be a draft."""

    pixels: Image.Image
    height: int
    width: int


def load_image(image: Any, input_data_format: str | None = None) -> Image.Image:
    """Any image a caller may hold, as an upright RGB picture.

    Args:
        image: a PIL image, the path of an image file, or an array or tensor, (H, W), (H, W, C) or (C, H, W) with
            1, 3 or 4 channels, either uint8 or floating point between 0 and 1.
        input_data_format: `channels_first` or `channels_last` of an array; None finds out, channels last where both
            fit.

    An EXIF orientation is applied, so that a phone's photo is seen the way people see it. Transparency is dropped, as
    the released model does: a pixel has the colour that is stored for it. Of an animated file the first frame is
    taken, of an opened one the current frame. 16-bit grey is brought to 8 bits; Pillow's modes I and F count from 0 to
    255 (and a picture of mode F not from 0 to 1, which would be black).

    Raises:
        ValueError: not an image, an unreadable file, Pillow's decompression-bomb error, or an array of another kind.
    """
    return load_picture(image, None, input_data_format).pixels


def load_picture(image: Any, max_pixels: float | None = None, input_data_format: str | None = None) -> Picture:
    """As `load_image`; a JPEG file far above `max_pixels` is decoded at a half, a quarter or an eighth of its size."""
    if isinstance(image, str | os.PathLike):
        path = os.fspath(image)
        with _reading(path), Image.open(path) as file:
            return _upright_rgb(file, max_pixels)
    if isinstance(image, Image.Image):
        with _reading(image):
            return _upright_rgb(image, None)
    if hasattr(image, "__array__"):
        pixels = _image_from_array(image, input_data_format)
        return Picture(pixels, pixels.height, pixels.width)
    raise ValueError(f"expected a PIL image, a path or an array, got {type(image).__name__}")


@contextmanager
def _reading(source: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Pillow's decoders raise whatever they run into
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot read an image from {source!r:.200}: {reason}") from error


def _upright_rgb(image: Image.Image, max_pixels: float | None) -> Picture:
    width, height = image.size
    if 0 in image.size:
        raise ValueError(f"an image must have at least one pixel, got {width} x {height}")
    if max_pixels is not None:
        shrink = math.sqrt(height * width / max_pixels) / DRAFT_MARGIN
        if shrink >= 2:
            image.draft(None, (math.ceil(width / shrink), math.ceil(height / shrink)))
    drafted = image.size != (width, height)
    image.load()
    orientation = image.getexif().get(ORIENTATION_TAG, 1)  # a TIFF has turned itself by now
    upright = image if orientation == 1 else ImageOps.exif_transpose(image)
    if not drafted:
        width, height = upright.size
    elif orientation in (5, 6, 7, 8):
        width, height = height, width
    return Picture(_to_rgb(upright), height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    """As Pillow converts, but where that would saturate or guess."""
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I;16"):
        table = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)
        image = Image.fromarray(table[np.asarray(image)])
    elif mode in ("I", "F"):
        array = np.asarray(image)
        low, high = array.min(), array.max()
        if not (0 <= low and high <= 255) or mode == "F" and 0 < high <= 1:  # NaN fails too
            raise ValueError(f"mode {mode} must count from 0 to 255 here, got values from {low} to {high}")
        image = Image.fromarray(np.round(array).astype(np.uint8))
    elif mode == "La":
        image = image.convert("LA")
    elif mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # to RGB at once, Pillow warns
    return image.convert("RGB")


def _image_from_array(image: Any, input_data_format: str | None) -> Image.Image:
    try:
        array = np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor that NumPy has no kind for, or on another device
        raise ValueError(f"cannot read an image from a {type(image).__name__}: {error}") from error
    shape = array.shape
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(f"input_data_format must be channels_first or channels_last, got {input_data_format!r}")
    if array.ndim == 3 and input_data_format is None:
        is_first = shape[-1] not in (1, 3, 4) and shape[0] in (1, 3, 4)
        input_data_format = "channels_first" if is_first else "channels_last"
    if array.ndim == 3 and input_data_format == "channels_first":
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise ValueError(f"an image array must be (H, W), (H, W, C) or (C, H, W), C 1, 3 or 4; got {shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # NaN fails too
            raise ValueError("a floating-point image array must hold finite numbers between 0 and 1")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an image array must be uint8, or floating point between 0 and 1; got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def fit_to_budget(height: int, width: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Largest (height, width) in pixels of the same aspect ratio within [min_pixels, max_pixels].

    A size already within is kept. Sides are rounded down (up) when shrinking (growing), but never below 1: only a grown
    size, or one with a side of 1, may have more than `max_pixels`.

    Raises:
        ValueError: an aspect ratio over 200.
    """
    aspect_ratio = max(height, width) / min(height, width)
    if aspect_ratio > MAX_ASPECT_RATIO:
        raise ValueError(f"absolute aspect ratio must be smaller than {MAX_ASPECT_RATIO}, got {aspect_ratio}")
    area = height * width
    if area > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        return max(1, math.floor(height / shrink)), max(1, math.floor(width / shrink))
    if area < min_pixels:
        grow = math.sqrt(min_pixels / area)
        return math.ceil(height * grow), math.ceil(width * grow)
    return height, width


def plan_scales(
    height: int, width: int, cell: int, min_pixels: int, max_pixels: int, tau: float | None
) -> list[tuple[int, int]]:
    """Sizes (height, width) in pixels, before padding, to which an image is resized; smallest first.

    Args:
        cell: side of a merged cell, in pixels.
        tau: side ratio of consecutive scales; `None` plans the largest scale only.
    """
    sizes: list[tuple[int, int]] = []
    smallest_area = math.inf
    budget = max_pixels
    while budget >= min_pixels:
        size = fit_to_budget(height, width, min_pixels, budget)
        padded_area = math.prod(math.ceil(side / cell) * cell for side in size)
        if padded_area >= smallest_area:
            break
        sizes.append(size)
        if tau is None:
            break
        smallest_area = padded_area
        # The released helper rounds the next budget to float32, which decides ties.
        budget = float(np.float32(padded_area) * np.float32(tau**2))
    return sizes[::-1]


def count_grid_tokens(grids: Sequence[Sequence[int]], merge: int) -> int:
    """Tokens of an image's slot in a prompt (reference §6): `<img>`, its scales and `</img>`.

    Args:
        grids: (frames, rows, columns) of each scale, in patches. A frame has a token for each merged cell, one at the
            end of each row of them and one at its own.
        merge: side of a merged cell, in patches.
    """
    return 2 + sum(frames * (rows // merge * (columns // merge + 1) + 1) for frames, rows, columns in grids)


def count_slot_tokens(*plans: Sequence[tuple[int, int]], cell: int) -> int:
    """As `count_grid_tokens`, of scales as `plan_scales` gives them, with merged cells of `cell` pixels.

    Several plans are those of sizes between which an image's lies: counted are the most rows and columns of each scale.
    """
    grids = []
    for scales in zip_longest(*(plan[::-1] for plan in plans)):
        heights, widths = zip(*filter(None, scales), strict=True)
        grids.append((1, math.ceil(max(heights) / cell), math.ceil(max(widths) / cell)))
    return count_grid_tokens(grids, 1)


def largest_fitting_budget(
    images: Sequence[Sequence[tuple[int, int]]],
    cell: int,
    min_pixels: float,
    max_pixels: float,
    tau: float | None,
    max_tokens: int,
) -> int | None:
    """A `max_pixels`, as large as bisection finds it, with which all images' slots take `max_tokens` at most.

    Args:
        images: (height, width) in pixels of each image; several of an image that is not known exactly.

    Returns:
        None when not even `min_pixels` is small enough.
    """

    def fits(budget: int) -> bool:
        plans = ([plan_scales(*size, cell, min_pixels, budget, tau) for size in sizes] for sizes in images)
        return sum(count_slot_tokens(*plans_of_image, cell=cell) for plans_of_image in plans) <= max_tokens

    low, high = math.ceil(min_pixels), math.floor(min(max_pixels, max(h * w for sizes in images for h, w in sizes)))
    if not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def possible_sizes(height: int, width: int, cell: int) -> list[tuple[int, int]]:
    """Sizes (height, width) in pixels, a few of all, that a picture padded to this size may have had before."""
    slack = [step * (cell - 1) // 3 for step in range(4)]
    sizes = [(height - bottom, width - right) for bottom in slack for right in slack]
    return [(min(h, MAX_ASPECT_RATIO * w), min(w, MAX_ASPECT_RATIO * h)) for h, w in sizes]


def context_error(
    num_tokens: int, context_length: int, num_images: int = 0, max_pixels: int | None = None, is_exact: bool = True
) -> ValueError:
    """What to say of a prompt that is too long.

    Args:
        max_pixels: as `largest_fitting_budget` gives it.
        is_exact: whether that was computed from the pictures' own sizes.
    """
    problem = f"the prompt has {num_tokens} tokens but the context holds {context_length}"
    if not num_images:
        return ValueError(f"{problem}: shorten the text")
    images = f"its {num_images} image{'s' * (num_images > 1)}"
    if max_pixels is None:
        return ValueError(
            f"{problem}: with no max_pixels would {images} fit; give fewer, shorten the text or lower min_pixels"
        )
    return ValueError(f"{problem}: {images} {'would' if is_exact else 'should'} fit with max_pixels={max_pixels}")


def patchify(pixels: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """(H, W, C), sides multiples of `patch * merge` pixels -> (patches, C * patch * patch), merge groups together."""
    height, width, channels = pixels.shape
    cell = patch * merge
    split = pixels.reshape(height // cell, merge, patch, width // cell, merge, patch, channels)
    return split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels * patch * patch)


@lru_cache(maxsize=16)
def normalised_bytes(mean: float, std: float, in_pairs: bool) -> np.ndarray:
    """What to look pixels up in: (256,) float32; or (65536,) of two neighbours at a time, which takes half as long.

    Two float32 numbers are one complex64 then, and two bytes in memory one uint16.
    """
    single = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(mean)) / np.float32(std)
    if not in_pairs:
        return single
    return single[np.arange(65536, dtype=np.uint16).view(np.uint8)].view(np.complex64)


class NaViLImageProcessor(BaseImageProcessor):
    """Resizes, pads and splits images into normalised patches, one scale or packed multi-scale.

    Args:
        patch_size: side of a patch, in pixels.
        merge_size: side of a merged cell, in patches.
        min_pixels, max_pixels: budget of an image at its smallest and largest scale, before padding; `None` means
            256 and 24576 patches, the released settings.
        scale_downsample_ratio: side ratio tau of consecutive scales.
        multi_scale: whether a call packs several scales of each image by default.
        image_mean, image_std: per-channel normalisation of values between 0 and 1.

    Raises:
        ValueError: settings outside their range, with the numbers.
    """

    model_input_names = ["pixel_values", "image_grid_thw", "num_scales"]

    def __init__(
        self,
        patch_size: int = 16,
        merge_size: int = 2,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        scale_downsample_ratio: float = 0.7071,
        multi_scale: bool = False,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_switches({name: value for name, value in kwargs.items() if name in RELEASED_SETTINGS})
        for name, value in (("patch_size", patch_size), ("merge_size", merge_size)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_PATCH_SIZE:
                raise ValueError(f"{name} must be a whole number from 1 to {MAX_PATCH_SIZE}, got {value!r:.80}")
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.min_pixels = 256 * patch_size**2 if min_pixels is None else min_pixels
        self.max_pixels = 24576 * patch_size**2 if max_pixels is None else max_pixels
        self.scale_downsample_ratio = scale_downsample_ratio
        self.multi_scale = multi_scale
        if not _are_channel_values(image_mean) or not _are_channel_values(image_std) or 0 in image_std:
            raise ValueError(
                f"image_mean and image_std must have 3 numbers each, none of them 0 in image_std; "
                f"got {image_mean!r:.80} and {image_std!r:.80}"
            )
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self._check_settings(self.min_pixels, self.max_pixels, scale_downsample_ratio)

    @staticmethod
    def _check_settings(min_pixels: float, max_pixels: float, tau: float) -> None:
        for value in (min_pixels, max_pixels, tau):
            if not _is_number(value) or value <= 0:
                raise ValueError(
                    f"pixel budgets and scale_downsample_ratio must be positive numbers, got {min_pixels!r:.80} and "
                    f"{max_pixels!r:.80}, {tau!r:.80}"
                )
        if not min_pixels <= max_pixels:
            raise ValueError(f"need 0 < min_pixels <= max_pixels, got {min_pixels} and {max_pixels}")
        if not tau < 1:
            raise ValueError(f"scale_downsample_ratio must lie between 0 and 1, got {tau}")

    def preprocess(
        self,
        images: Any,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        scale_downsample_ratio: float | None = None,
        multi_scale: bool | None = None,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        context_length: int | None = None,
        num_text_tokens: int = 0,
        **kwargs: Any,
    ) -> BatchFeature:
        """Packs one image or a (nested) list of images; every image has the full pixel budget.

        Args default to the processor's own settings. `return_tensors` is `"pt"`, `"np"` or None (NumPy arrays).
            input_data_format: `channels_first` or `channels_last` of arrays; None finds out.
            context_length, num_text_tokens: refuse images whose slots do not fit the context beside that many tokens
                of text; no more patches are made than fit.
            kwargs: transformers' usual switches, with the values of `RELEASED_SETTINGS` only.

        Images are decoded one at a time, whole and as RGB (a JPEG file far above the budget to a fraction of its size);
        all that follows takes memory in proportion to the pixel budget.

        Returns:
            `pixel_values` (patches, 3 * p * p) float32, `image_grid_thw` (scales, 3) frames, rows and columns in
            patches, `num_scales` (images,); smallest scale first, images in the given order.

        Raises:
            ValueError: no image, an unreadable one, an aspect ratio over 200, images beyond the context, or settings
                outside their range.
        """
        min_pixels = self.min_pixels if min_pixels is None else min_pixels
        max_pixels = self.max_pixels if max_pixels is None else max_pixels
        tau = self.scale_downsample_ratio if scale_downsample_ratio is None else scale_downsample_ratio
        self._check_settings(min_pixels, max_pixels, tau)
        check_switches(kwargs)
        if not (self.multi_scale if multi_scale is None else multi_scale):
            tau = None
        images = flatten_images(images)
        if not images:
            raise ValueError("expected at least one image, got none")

        full_sizes, packed, grids, num_scales = [], [], [], []
        cell = self.patch_size * self.merge_size
        num_tokens = num_text_tokens
        with ThreadPoolExecutor() as pool:  # Pillow resizes without holding the interpreter's lock
            for image in images:
                picture = load_picture(image, max_pixels, input_data_format)
                full_sizes.append((picture.height, picture.width))
                sizes = plan_scales(picture.height, picture.width, cell, min_pixels, max_pixels, tau)
                num_scales.append(len(sizes))
                num_tokens += count_slot_tokens(sizes, cell=cell)
                if context_length is not None and num_tokens > context_length:
                    continue  # count on, for the error
                patches, grids_of_image = self._pack_scales(picture.pixels, sizes, pool)
                packed.append(patches)
                grids += grids_of_image
        if context_length is not None and num_tokens > context_length:
            one_size_each = [[size] for size in full_sizes]
            room = context_length - num_text_tokens
            fitting = largest_fitting_budget(one_size_each, cell, min_pixels, max_pixels, tau, room)
            raise context_error(num_tokens, context_length, len(images), fitting)
        data = {
            "pixel_values": packed[0] if len(packed) == 1 else np.concatenate(packed),
            "image_grid_thw": np.array(grids, dtype=np.int64),
            "num_scales": np.array(num_scales, dtype=np.int64),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _pack_scales(
        self, image: Image.Image, sizes: Sequence[tuple[int, int]], pool: ThreadPoolExecutor
    ) -> tuple[np.ndarray, list[list[int]]]:
        """Patches (patches, 3 * p * p) and grids of all scales of an image, `sizes` being theirs before padding."""
        cell = self.patch_size * self.merge_size
        grids = [[1, *(self.merge_size * math.ceil(side / cell) for side in size)] for size in sizes]
        ends = np.cumsum([math.prod(grid) for grid in grids])
        packed = np.empty((ends[-1], 3 * self.patch_size**2), dtype=np.float32)
        parts = np.split(packed, ends[:-1])
        # The largest scale takes longest, so it is begun first.
        for _ in pool.map(partial(self._write_patches, image), sizes[::-1], parts[::-1]):
            pass  # raises here what was raised there
        return packed, grids

    def _write_patches(self, image: Image.Image, size: tuple[int, int], patches: np.ndarray) -> None:
        """Fills in the patches (patches, 3 * p * p) of one scale, `size` being its (height, width) before padding."""
        height, width = size
        cell = self.patch_size * self.merge_size
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.pad(np.asarray(image), ((0, -height % cell), (0, -width % cell), (0, 0)))
        area = self.patch_size**2
        channels = patchify(pixels, self.patch_size, self.merge_size).reshape(-1, 3, area)
        in_pairs = area % 2 == 0
        channels = channels.view(np.uint16) if in_pairs else channels
        normalised = patches.reshape(-1, 3, area)
        tables = [normalised_bytes(*values, in_pairs) for values in zip(self.image_mean, self.image_std, strict=True)]
        for start in range(0, len(channels), PATCHES_AT_ONCE):
            some = slice(start, start + PATCHES_AT_ONCE)
            for channel, table in enumerate(tables):
                looked_up = table.take(channels[some, channel], mode="clip")  # "clip": no check, all are inside
                normalised[some, channel] = looked_up.view(np.float32)


def _are_channel_values(values: Any) -> bool:
    if not isinstance(values, list | tuple) or len(values) != 3:
        return False
    return all(map(_is_number, values))


def _is_number(value: Any) -> bool:
    """A finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_switches(settings: dict[str, Any]) -> None:
    """Raises a ValueError for a setting that asks for another processing than NaViL's."""
    for name, value in settings.items():
        if value is None:
            continue
        if name not in RELEASED_SETTINGS:
            raise ValueError(
                f"the image processor has no setting {name}={value!r:.80}; sizes follow from min_pixels and max_pixels"
            )
        if value is not RELEASED_SETTINGS[name]:
            raise ValueError(f"{name} must be {RELEASED_SETTINGS[name]}, as NaViL was trained; got {value!r:.80}")


def flatten_images(images: Any, depth: int = 2) -> list[Any]:
    """One image, a list of images or a list of such lists, as a flat list.

    Raises:
        ValueError: lists nested deeper.
    """
    if not isinstance(images, list | tuple):
        return [images]
    if depth == 0:
        raise ValueError("images may be a list of images or a list of such lists, got lists nested deeper")
    return [image for entry in images for image in flatten_images(entry, depth - 1)]


NaViLImageProcessor.register_for_auto_class()
