"""Images of any resolution to packed patches for NaViL (reference §5).

    image -> scales (largest first, each tau times the side of the one before)
          -> resize, pad to whole merged cells, split into patches, normalise
          -> packed smallest scale first: pixel_values (patches, 3 * p * p), image_grid_thw (scales, 3)

Inside a scale, patches keep their merge groups together: row-major over merged cells, row-major inside a cell.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

MAX_ASPECT_RATIO = 200


def load_image(image: Any) -> Image.Image:
    """Any image a caller may hold, as an upright RGB picture.

    Args:
        image: a PIL image, the path of an image file, or an array or tensor, (H, W), (H, W, C) or (C, H, W) with
            1, 3 or 4 channels, either uint8 or floating point between 0 and 1.

    An EXIF orientation is applied, so that a phone's photo is seen the way people see it.

    Raises:
        ValueError: not an image, an unreadable file, or an array of another kind.
    """
    if isinstance(image, str | os.PathLike):
        return _read(os.fspath(image), lambda path: Image.open(path))
    if isinstance(image, Image.Image):
        return _read(image, lambda image: image)
    if hasattr(image, "__array__"):
        return _image_from_array(image)
    raise ValueError(f"expected a PIL image, a path or an array, got {type(image).__name__}")


def _read(source: Any, open_image: Callable[[Any], Image.Image]) -> Image.Image:
    try:  # PIL reads a file's pixels no sooner than here, also of an image that was opened elsewhere
        image = ImageOps.exif_transpose(open_image(source)).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read an image from {source!r}: {error}") from error
    if 0 in image.size:
        raise ValueError(f"an image must have at least one pixel, got {image.width} x {image.height}")
    return image


def _image_from_array(image: Any) -> Image.Image:
    try:
        array = np.asarray(image)
    except (TypeError, RuntimeError) as error:  # a tensor of a kind that NumPy has not, or on another device
        raise ValueError(f"cannot read an image from a {type(image).__name__}: {error}") from error
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise ValueError(f"an image array must be (H, W), (H, W, C) or (C, H, W), C 1, 3 or 4; got {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("a floating-point image array must hold finite numbers between 0 and 1")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an image array must be uint8, or floating point between 0 and 1; got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def fit_to_budget(height: int, width: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Largest (height, width) in pixels of the same aspect ratio within [min_pixels, max_pixels].

    A size already within is kept. Sides are rounded down (up) when shrinking (growing), but never below 1.

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


def patchify(pixels: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """(H, W, C), sides multiples of `patch * merge` pixels -> (patches, C * patch * patch), merge groups together."""
    height, width, channels = pixels.shape
    cell = patch * merge
    split = pixels.reshape(height // cell, merge, patch, width // cell, merge, patch, channels)
    return split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels * patch * patch)


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
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.min_pixels = 256 * patch_size**2 if min_pixels is None else min_pixels
        self.max_pixels = 24576 * patch_size**2 if max_pixels is None else max_pixels
        self.scale_downsample_ratio = scale_downsample_ratio
        self.multi_scale = multi_scale
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise ValueError(f"image_mean and image_std must have 3 numbers each, got {image_mean} and {image_std}")
        self._check_settings(self.min_pixels, self.max_pixels, scale_downsample_ratio)

    @staticmethod
    def _check_settings(min_pixels: int, max_pixels: int, tau: float) -> None:
        if not all(isinstance(value, int | float) for value in (min_pixels, max_pixels, tau)):
            raise ValueError(
                f"pixel budgets and scale_downsample_ratio are numbers, got {[min_pixels, max_pixels, tau]}"
            )
        if not 0 < min_pixels <= max_pixels:
            raise ValueError(f"need 0 < min_pixels <= max_pixels, got {min_pixels} and {max_pixels}")
        if not 0 < tau < 1:
            raise ValueError(f"scale_downsample_ratio must lie between 0 and 1, got {tau}")

    def preprocess(
        self,
        images: Any,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        scale_downsample_ratio: float | None = None,
        multi_scale: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Packs one image or a (nested) list of images; every image has the full pixel budget.

        Args default to the processor's own settings. `return_tensors` is `"pt"`, `"np"` or None (NumPy arrays).

        Returns:
            `pixel_values` (patches, 3 * p * p) float32, `image_grid_thw` (scales, 3) frames, rows and columns in
            patches, `num_scales` (images,); smallest scale first, images in the given order.

        Raises:
            ValueError: no image, an unreadable one, an aspect ratio over 200, or settings outside their range.
        """
        min_pixels = self.min_pixels if min_pixels is None else min_pixels
        max_pixels = self.max_pixels if max_pixels is None else max_pixels
        tau = self.scale_downsample_ratio if scale_downsample_ratio is None else scale_downsample_ratio
        self._check_settings(min_pixels, max_pixels, tau)
        multi_scale = self.multi_scale if multi_scale is None else multi_scale
        images = flatten_images(images)
        if not images:
            raise ValueError("expected at least one image, got none")

        scales, grids, num_scales = [], [], []
        cell = self.patch_size * self.merge_size
        with ThreadPoolExecutor() as pool:  # Pillow resizes without holding the interpreter's lock
            for image in map(load_image, images):
                largest = (image.height, image.width)
                sizes = plan_scales(*largest, cell, min_pixels, max_pixels, tau if multi_scale else None)
                num_scales.append(len(sizes))
                for patches, grid in pool.map(partial(self._scale_to_patches, image), sizes):
                    scales.append(patches)
                    grids.append(grid)
        data = {
            "pixel_values": np.concatenate(scales),
            "image_grid_thw": np.array(grids, dtype=np.int64),
            "num_scales": np.array(num_scales, dtype=np.int64),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _scale_to_patches(self, image: Image.Image, size: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
        """Patches and grid of one scale, `size` being its (height, width) before padding."""
        height, width = size
        cell = self.patch_size * self.merge_size
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pad_bottom, pad_right = -height % cell, -width % cell
        pixels = np.pad(np.asarray(image), ((0, pad_bottom), (0, pad_right), (0, 0)))
        # A byte has 256 values: normalise each once per channel and look the pixels up.
        byte_values = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]
        table = (byte_values - np.float32(self.image_mean)) / np.float32(self.image_std)  # (256, 3)
        patches = patchify(pixels, self.patch_size, self.merge_size)
        normalised = np.empty(patches.shape, dtype=np.float32)
        for channel in range(3):
            area = slice(channel * self.patch_size**2, (channel + 1) * self.patch_size**2)
            normalised[:, area] = table[:, channel][patches[:, area]]
        return normalised, [1, (height + pad_bottom) // self.patch_size, (width + pad_right) // self.patch_size]


def flatten_images(images: Any) -> list[Any]:
    """One image, a list of images or a list of such lists, as a flat list."""
    if not isinstance(images, list | tuple):
        return [images]
    return [image for entry in images for image in flatten_images(entry)]


NaViLImageProcessor.register_for_auto_class()
