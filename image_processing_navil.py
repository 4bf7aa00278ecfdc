"""Images of any resolution to packed patches for NaViL (paper, section 3; docs/architecture.md).

    image -> plan: sizes of its scales, from the image's size alone
          -> pack: decode, resize, pad to whole merged cells, split into patches, normalize
          -> pixel_values (patches, 3 * p * p), image_grid_thw (scales, 3), smallest scale first

Order of the patches of a scale: row-major over merged cells, row-major inside a cell. `NaViLImageProcessor` resizes by
Pillow, as the released code does; `NaViLImageProcessorFast` by torch (docs/performance.md).
"""

import base64
import math
import os
import string
import struct
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from itertools import accumulate
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

MAX_ASPECT_RATIO = 200
DOWNLOAD_TIMEOUT = 30  # seconds
PILLOW_VERSION = int(PIL.__version__.split(".")[0])
STRIP_HEIGHT = 32  # pixels
STRIP_AREA = 2**18  # pixels; a smaller image is not cut into strips
DRAFT_MARGIN = 2  # a JPEG decoded at reduced size has sides at least this many times the largest scale's

Size = tuple[int, int]  # height and width in pixels
Source = Image.Image | str | bytes  # a decoded image, or the path or bytes of an image file
IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "num_scales")
IMAGE_KEYS = ("image", "bytes", "base64", "url", "image_url", "path")
"""Keys of a dict that may hold its image, by priority: the `path` next to a data set's `bytes` may not exist."""
URL_SCHEMES = ("http://", "https://", "file://", "data:")
CALL_SETTINGS = ("min_pixels", "max_pixels", "scale_downsample_ratio", "multi_scale")
SETTINGS = ("patch_size", "merge_size", *CALL_SETTINGS, "image_mean", "image_std")
TRANSFORMERS_KEYS = ("auto_map", "processor_class", "image_processor_type", "feature_extractor_type")
TRAINED_SWITCHES = {
    **dict.fromkeys(("do_convert_rgb", "do_pad", "do_rescale", "do_normalize"), True),
    **dict.fromkeys(("do_resize", "do_center_crop"), False),
}
"""transformers' switches, at the values that NaViL was trained with. Images are always resized to the pixel budget and
padded to whole merged cells; `do_resize` would stretch them to whole cells instead."""


def number(value: Any) -> int | float:
    """A number of any type (Python, NumPy, 0-d array or tensor, Fraction, Decimal) as an int if whole, else a float."""
    value = float(value)
    return int(value) if value.is_integer() else value


def whole_number(value: Any, name: str) -> int:
    """As `number`; a ValueError for a fraction or a number below 1."""
    whole = number(value)
    if not isinstance(whole, int) or whole < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {whole}")
    return whole


def scale_settings(min_pixels: Any, max_pixels: Any, scale_downsample_ratio: Any) -> tuple[float, float, float]:
    """As `number`, each; a ValueError unless 0 < min_pixels <= max_pixels and 0 < scale_downsample_ratio < 1."""
    low, high, tau = number(min_pixels), number(max_pixels), float(scale_downsample_ratio)
    if not 0 < low <= high:  # NaN fails too
        raise ValueError(f"need 0 < min_pixels <= max_pixels, got {low} and {high}")
    if not 0 < tau < 1:
        raise ValueError(f"scale_downsample_ratio must lie between 0 and 1, got {tau}")
    return low, high, tau


def check_switches(switches: Mapping[str, Any], settings: Sequence[str]) -> None:
    """Raises a ValueError for a keyword other than `TRAINED_SWITCHES` at their values; `settings` names the others."""
    for name, value in switches.items():
        if value is None:
            continue
        if name not in TRAINED_SWITCHES:
            names = ", ".join(settings)
            raise ValueError(f"the image processor has no setting {name}={value!r:.80}; its settings are {names}")
        if bool(value) != TRAINED_SWITCHES[name]:
            raise ValueError(f"{name} must be {TRAINED_SWITCHES[name]}, as NaViL was trained; got {value!r:.80}")


def flatten_images(images: Any, depth: int = 2) -> list[Any]:
    """One image, or an iterable of images or of such iterables, as a flat list; a 4-D array is a batch of images."""
    if getattr(images, "ndim", None) == 4:
        return list(images)
    is_image = isinstance(images, str | bytes | bytearray | memoryview | Mapping)
    if is_image or hasattr(images, "read") or hasattr(images, "__array__") or not isinstance(images, Iterable):
        return [images]
    if depth == 0:
        raise ValueError("images may be a list of images or a list of such lists, got lists nested deeper")
    return [image for entry in images for image in flatten_images(entry, depth - 1)]


def image_source(image: Any) -> tuple[Any, dict[str, Any]]:
    """The image in a dict, and the dict's `min_pixels` and `max_pixels` if it has them; any other image as it is.

    A dict is a part of a message, `{"type": "image", "image": ...}` or
    `{"type": "image_url", "image_url": {"url": ...}}`, or a data set's `{"bytes": ..., "path": ...}`. Entries that are
    None are ignored.
    """
    own_budget: dict[str, Any] = {}
    while isinstance(image, Mapping):
        part = {name: value for name, value in image.items() if not _is_empty(value)}
        found = [part[name] for name in IMAGE_KEYS if name in part]
        if not found:
            raise ValueError(f"an image part needs one of {', '.join(IMAGE_KEYS)}; got {image!r:.80}")
        own_budget = {name: part[name] for name in ("min_pixels", "max_pixels") if name in part} | own_budget
        image = found[0]
    return os.fspath(image) if isinstance(image, os.PathLike) else image, own_budget


def _is_empty(value: Any) -> bool:
    return value is None or isinstance(value, Mapping) and all(map(_is_empty, value.values()))


def load_image(image: Any, input_data_format: str | None = None) -> Image.Image:
    """Reads an image in any form, as an upright RGB image.

    Args:
        image: a PIL image; a path; a `file://`, `http(s)://` or `data:` URL; base64 text; the bytes of an image file,
            or such a file opened for reading; a dict as in `image_source`; or an array or tensor, (H, W), (H, W, C) or
            (C, H, W) with 1, 3 or 4 channels, integers from 0 to 255 or floating point between 0 and 1.
        input_data_format: `channels_first` or `channels_last` of an array; None prefers the latter where both fit.

    EXIF orientation is applied. Transparency is ignored, as in the released code: a pixel has its stored color. An
    animated file gives its first frame, an opened animation its current frame. 16-bit gray is reduced to 8 bits;
    values of Pillow's modes I and F must lie between 0 and 255 (mode F with values up to 1 only is refused).

    Raises:
        ValueError: an unreadable image, one beyond Pillow's decompression-bomb limit, or an unsupported array.
    """
    image, _ = image_source(image)
    source, _ = measure_image(image, input_data_format)
    with named_in_errors(image):
        return decode_image(source)


def measure_image(image: Any, input_data_format: str | None = None) -> tuple[Source, tuple[int, int]]:
    """An image as a source for `decode_image`, and its upright (height, width) in pixels.

    A file is decoded here only if its header does not give its size and orientation. The bytes of downloads and open
    files are kept, decoded pixels are not.
    """
    with named_in_errors(image):
        source = readable_source(image, input_data_format)
        if isinstance(source, Image.Image):
            return source, _upright_size(source)
        with _open(source) as file:
            return source, _upright_size(file)


def decode_image(source: Source, max_pixels: float = math.inf) -> Image.Image:
    """An image from `measure_image`, upright and in RGB.

    A JPEG file far above `max_pixels` is decoded at a half, a quarter or an eighth of its sides.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source)
    with _open(source) as file:
        shrink = math.sqrt(math.prod(file.size) / max_pixels) / DRAFT_MARGIN
        if shrink >= 2:
            file.draft(None, tuple(math.ceil(side / shrink) for side in file.size))
        return _upright_rgb(file)


@contextmanager
def named_in_errors(image: Any) -> Iterator[None]:
    """Turns any error into a ValueError that names the image."""
    try:
        yield
    except Exception as error:  # Pillow's decoders raise errors of many types
        name = repr(image)
        name = name if len(name) < 200 else f"{name[:50]}...{name[-27:]}"
        raise ValueError(f"cannot read an image from {name}: {str(error) or type(error).__name__}") from error


def readable_source(image: Any, input_data_format: str | None) -> Source:
    """A PIL image, or the path or bytes of an image file. A file that the caller opened stays open."""
    if isinstance(image, Image.Image):
        return image
    if hasattr(image, "__array__") and not isinstance(image, str):
        return _image_from_array(image, input_data_format)
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str):
        return _source_of_text(image)
    if not hasattr(image, "read"):
        raise TypeError(f"expected an image, path, URL, text, bytes, open file or array, got {type(image).__name__}")
    if getattr(image, "seekable", bool)():
        image.seek(0)
    return bytes(image.read())


def _source_of_text(image: str) -> Source:
    if image[:7].lower() == "file://" and os.path.exists(image[7:]):
        return image[7:]  # not percent-encoded
    if image[:8].lower().startswith(URL_SCHEMES):
        request = Request(quote(image, safe=string.punctuation), headers={"User-Agent": "navil"})
        with urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
            return response.read()
    if os.path.exists(image):
        return image
    try:
        content = base64.b64decode("".join(image.split()), validate=True)
        _open(content).close()
        return content
    except (ValueError, UnidentifiedImageError):
        raise FileNotFoundError("no such file, and no base64 text of an image") from None


def _open(source: str | bytes) -> Image.Image:
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source)


def _is_measured_by_header(file: Image.Image) -> bool:
    """Whether an opened file gives its size and orientation before its pixels, which are not decoded yet."""
    if file.format != "PNG" or getattr(file, "fp", None) is None:  # a copied image has no file
        return file.format in ("JPEG", "MPO", "WEBP", "GIF", "BMP")
    begin, has_pixels = file.fp.tell(), False  # a PNG file may have its orientation behind its pixels
    file.fp.seek(8)  # behind the signature
    while len(head := file.fp.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        start = file.fp.tell()
        has_pixels |= kind == b"IDAT"
        keyword = file.fp.read(min(length, 21)).split(b"\0")[0]
        if has_pixels and (kind == b"eXIf" or keyword in (b"Raw profile type exif", b"XML:com.adobe.xmp")):
            break
        file.fp.seek(start + length + 4)  # data and CRC
    file.fp.seek(begin)
    return len(head) < 8


def _upright_size(image: Image.Image) -> tuple[int, int]:
    if _is_measured_by_header(image):
        exif = Image.Image.getexif(image)  # PngImageFile.getexif would decode
    else:
        image.load()
        exif = image.getexif()
    width, height = image.size
    if 0 in image.size:
        raise ValueError(f"an image must have at least one pixel, got {width} x {height}")
    is_rotated = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)  # by 90 degrees
    return (width, height) if is_rotated else (height, width)


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # `load` has rotated a TIFF already
    return _to_rgb(image if orientation == 1 else ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    """As Pillow's `convert`, but modes of more than 8 bits are scaled or checked instead of clipped."""
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
        image = image.convert("RGBA")  # Pillow warns about a direct conversion to RGB
    return image.convert("RGB")


def _image_from_array(image: Any, input_data_format: str | None) -> Image.Image:
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(f"input_data_format must be channels_first or channels_last, got {input_data_format!r}")
    if hasattr(image, "detach"):  # a tensor; NumPy has no bfloat16
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
    array = np.asarray(image)
    shape = array.shape
    if array.ndim == 3:
        is_first = shape[-1] not in (1, 3, 4) and shape[0] in (1, 3, 4)
        if input_data_format is not None:
            is_first = input_data_format == "channels_first"
        array = array.transpose(1, 2, 0) if is_first else array
        array = array[..., 0] if array.shape[-1] == 1 else array
    if array.size == 0 or not (array.ndim == 2 or array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise ValueError(f"an image array must be (H, W), (H, W, C) or (C, H, W), C 1, 3 or 4; got {shape}")
    is_float = array.dtype.kind == "f"
    limit = 1 if is_float else 255
    if array.dtype.kind not in "iuf" or not (array.min() >= 0 and array.max() <= limit):  # NaN fails too
        raise ValueError(f"{array.dtype} pixels must be integers from 0 to 255 or finite numbers between 0 and 1")
    array = np.round(array * 255) if is_float else array
    return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8)).convert("RGB")


def fit_to_budget(height: int, width: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Largest (height, width) in pixels of the same aspect ratio within [min_pixels, max_pixels].

    A size within is kept. Sides are rounded down when shrinking (to at least 1) and up when growing: an enlarged size,
    or one with a side of 1, may exceed `max_pixels`.

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
        tau: side ratio of consecutive scales (`scale_downsample_ratio`); None plans the largest scale only.
    """
    sizes: list[tuple[int, int]] = []
    smallest_area, budget = math.inf, max_pixels
    while budget >= min_pixels:
        size = fit_to_budget(height, width, min_pixels, budget)
        padded_area = math.prod(math.ceil(side / cell) * cell for side in size)
        if padded_area >= smallest_area:
            break
        sizes.append(size)
        smallest_area = padded_area
        # The released helper rounds the next budget to float32, which decides ties.
        budget = 0 if tau is None else float(np.float32(padded_area) * np.float32(tau**2))
    return sizes[::-1]


def count_slot_tokens(scales: Sequence[tuple[int, int]], cell: int) -> int:
    """Number of tokens in an image's slot; arguments as in `tokenization_navil.image_slot`.

    `<img>` and `</img>`, a token for each merged cell, and one at the end of each row of cells and of each scale.
    """
    return 2 + sum(math.ceil(height / cell) * (math.ceil(width / cell) + 1) + 1 for height, width in scales)


@dataclass
class ImagePlan:
    """How to pack an image; sizes are (height, width) in pixels."""

    image: Any  # as given, for error messages
    source: Source | None  # None if the image is packed already
    sizes: list[tuple[int, int]]  # the image's size; several candidates if only the padded size is known
    min_pixels: float
    max_pixels: float
    tau: float | None  # side ratio of consecutive scales; None for a single scale
    scales: list[tuple[int, int]]  # before padding, smallest first
    has_own_budget: bool = False  # of its dict, which the call's `max_pixels` does not change


def unpadded_sizes(height: int, width: int, cell: int) -> list[tuple[int, int]]:
    """Some of the sizes (height, width) in pixels that become this size when padded to whole cells."""
    padding = [step * (cell - 1) // 3 for step in range(4)]
    sizes = [(height - bottom, width - right) for bottom in padding for right in padding]
    return [(min(h, MAX_ASPECT_RATIO * w), min(w, MAX_ASPECT_RATIO * h)) for h, w in sizes]


def resize_exactly(image: Image.Image, size: Size) -> Image.Image:
    """An image resized to (height, width) by Pillow's bicubic filter."""
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def size_between_passes(old: Size, new: Size) -> Size:
    """The size after the first of the two passes in which Pillow resizes, rounding after each.

    The width changes first; since Pillow 13 the height, if it loses more than twice as many pixels.
    """
    is_height_first = PILLOW_VERSION >= 13 and old[0] > new[0] and old[0] - new[0] > 2 * (old[1] - new[1])
    return (new[0], old[1]) if is_height_first else (old[0], new[1])


def resize_by_torch(pixels: Tensor, size: Size) -> Tensor:
    """(1, 3, H, W), uint8 or whole float32 numbers, to (height, width, 3) uint8, almost as by `resize_exactly`."""
    steps = [size_between_passes(pixels.shape[2:], size), size]
    is_uint8 = pixels.dtype == torch.uint8
    if is_uint8 and steps[0][1] == size[1]:  # torch's uint8 kernel makes both passes, the width first
        del steps[0]
    for step in steps:
        if pixels.shape[2:] != step:
            pixels = F.interpolate(pixels, size=step, mode="bicubic", antialias=True)
            pixels = pixels if is_uint8 else pixels.round_().clamp_(0, 255)
    return pixels[0].permute(1, 2, 0).to(torch.uint8)


def in_threads(pool: Executor, resize: Callable[[Size], Any], sizes: Sequence[Size]) -> Iterator[tuple[Size, Any]]:
    """Each size and what it was resized to, as completed. Pillow and torch release the GIL while they resize."""
    futures = {pool.submit(resize, size): size for size in sizes}
    return ((futures[future], future.result()) for future in as_completed(futures))


def strips(pixels: Image.Image | np.ndarray, height: int, width: int) -> Iterator[np.ndarray]:
    """An image cut into (height, width, 3) uint8 from top to bottom, black beyond its edges.

    A strip is valid until the next one: like this, temporary memory stays in the CPU's cache.
    """
    if isinstance(pixels, Image.Image):
        for top in range(0, pixels.height, height):
            yield np.asarray(pixels.crop((0, top, width, top + height)))
        return
    strip = np.zeros((height, width, 3), np.uint8)
    for top in range(0, len(pixels), height):
        rows = pixels[top : top + height]
        strip[: len(rows), : rows.shape[1]] = rows
        strip[len(rows) :] = 0
        yield strip


def to_device(image: Image.Image, device: torch.device) -> Tensor:
    """An image as (H, W, 3) uint8 on a device. The CPU goes on while a GPU copies."""
    shape = (image.height, image.width, 3)
    if device.type == "cuda":
        pixels = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=True)
    else:
        pixels = torch.from_numpy(np.empty(shape, np.uint8))  # NumPy asks for huge pages, torch does not
    rows = pixels.numpy()
    for number, strip in enumerate(strips(image, STRIP_HEIGHT, image.width)):
        part = rows[number * STRIP_HEIGHT : (number + 1) * STRIP_HEIGHT]
        part[...] = strip[: len(part)]
    return pixels.to(device, non_blocking=True)


def output_device(device: Any, return_tensors: str | None) -> torch.device:
    """`device`, None being the CPU; a ValueError for one that this torch lacks or that `return_tensors` rules out."""
    try:
        found = torch.device("cpu" if device is None else device)
        torch.empty(0, device=found)
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:
        raise ValueError(f"this torch cannot use device={device!r}: {error!s:.200}") from error
    if found.type == "meta":
        raise ValueError("device must hold data, got 'meta'")
    if found.type != "cpu" and return_tensors != "pt":
        raise ValueError(f"device={device!r} needs return_tensors='pt', got {return_tensors!r}")
    return found


def patchify(pixels: Any, patch: int, merge: int) -> Any:
    """(H, W, C), sides multiples of `patch * merge` pixels -> (patches, C * patch * patch), merge groups together."""
    height, width, channels = pixels.shape
    cell = patch * merge
    split = pixels.reshape(height // cell, merge, patch, width // cell, merge, patch, channels)
    order = (0, 3, 1, 4, 6, 2, 5)
    split = split.permute(order) if isinstance(split, Tensor) else split.transpose(order)
    return split.reshape(-1, channels * patch * patch)


@lru_cache(maxsize=16)
def normalization_table(means: tuple[float, ...], stds: tuple[float, ...], in_pairs: bool = False) -> np.ndarray:
    """Lookup tables for rescaling and normalizing, one behind the other: (256,) float32 per channel.

    Or (65536,) complex64 for pairs of pixels, which are twice as fast: two bytes are read as one uint16, two float32
    numbers are written as one complex64.
    """
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    tables = [(levels - np.float32(mean)) / np.float32(std) for mean, std in zip(means, stds, strict=True)]
    if in_pairs:
        pairs = np.arange(65536, dtype=np.uint16).view(np.uint8)
        tables = [table[pairs].view(np.complex64) for table in tables]
    return np.concatenate(tables)


def normalize_array(patches: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Looks `patches` (N, 3 * p * p) uint8 up in a `normalization_table` and writes the float32 numbers into `out`."""
    values = patches.reshape(len(patches), 3, -1)
    values = values if table.dtype == np.float32 else values.view(np.uint16)
    index = np.add(values, len(table) // 3 * np.arange(3)[:, None], dtype=np.intp)
    np.take(table, index, out=out.view(table.dtype).reshape(index.shape), mode="clip")  # without a bounds check


def normalize_tensor(patches: Tensor, table: np.ndarray, out: Tensor) -> None:
    """As `normalize_array`, on any device; `table` is not in pairs."""
    index = patches.int().view(len(patches), 3, -1)
    index += len(table) // 3 * torch.arange(3, dtype=torch.int32, device=out.device)[:, None]
    torch.index_select(torch.from_numpy(table).to(out.device), 0, index.flatten(), out=out.view(-1))


def asks_for_fast(given: Mapping[str, Any], saved: Mapping[str, Any]) -> bool | None:
    """Whether `use_fast` or `backend`, transformers 5's name for it, ask for the fast image processor; None if neither.

    They are in the keywords `given` to `from_pretrained` of a class. `AutoImageProcessor.from_pretrained` keeps them
    from the classes of a model folder, so they are looked up in its frame. It may also take the class from
    `config.json` instead of `saved`, the image processor's own settings, which then decide.
    """
    code, frame = AutoImageProcessor.from_pretrained.__func__.__code__, sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    of_auto_class = {} if frame is None else frame.f_locals
    backend = given.get("backend") or of_auto_class.get("backend_kwarg")
    if backend not in (None, "torchvision", "pil"):
        raise ValueError(f"backend must be torchvision (the fast image processor) or pil, got {backend!r}")
    use_fast = given.get("use_fast", of_auto_class.get("use_fast"))
    if backend is not None or use_fast is not None:
        return backend == "torchvision" if backend is not None else bool(use_fast)
    saved_class = (saved.get("auto_map") or {}).get("AutoImageProcessor")
    return None if frame is None or saved_class is None else saved_class.endswith("Fast")


class NaViLImageProcessor(BaseImageProcessor):
    """Resizes, pads and splits images into normalized patches, one scale or packed multi-scale.

    Args:
        patch_size: side of a patch, in pixels.
        merge_size: side of a merged cell, in patches.
        min_pixels, max_pixels: budget of an image's smallest and largest scale, before padding; None means 256 and
            24576 patches, the released settings.
        scale_downsample_ratio: side ratio tau of consecutive scales.
        multi_scale: whether to pack several scales of each image, unless a call says otherwise.
        image_mean, image_std: per-channel normalization of values between 0 and 1.

    Raises:
        ValueError: settings outside their range, with their values.
    """

    model_input_names = list(IMAGE_INPUTS)

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
        own = {name: kwargs.pop(name) for name in [*kwargs] if name in TRANSFORMERS_KEYS or name.startswith("_")}
        check_switches(kwargs, SETTINGS)
        super().__init__(**own)
        self.patch_size = whole_number(patch_size, "patch_size")
        self.merge_size = whole_number(merge_size, "merge_size")
        self.min_pixels, self.max_pixels, self.scale_downsample_ratio = scale_settings(
            256 * self.patch_size**2 if min_pixels is None else min_pixels,
            24576 * self.patch_size**2 if max_pixels is None else max_pixels,
            scale_downsample_ratio,
        )
        self.multi_scale = bool(multi_scale)
        self.image_mean, self.image_std = [[float(value) for value in values] for values in (image_mean, image_std)]
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            given = f"{self.image_mean} and {self.image_std}"
            raise ValueError(f"image_mean and image_std must have 3 numbers each, none 0 in image_std; got {given}")

    @classmethod
    def from_config(cls, config: Any) -> "NaViLImageProcessor":
        """The image processor for a model's `NaViLConfig`."""
        vision = config.vision_config
        return cls(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            min_pixels=config.min_dynamic_patch * vision.patch_size**2,
            max_pixels=config.max_dynamic_patch * vision.patch_size**2,
            scale_downsample_ratio=config.scale_downsample_ratio,
        )

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but the constructor also checks the settings among the keywords.

        `use_fast` or `backend` choose the class, see `asks_for_fast`.
        """
        is_fast = asks_for_fast(kwargs, image_processor_dict)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("use_fast", "backend")}
        names = [name for name in kwargs if name in SETTINGS or name in TRAINED_SWITCHES]
        settings = image_processor_dict | {name: kwargs.pop(name) for name in names}
        chosen = {None: cls, True: NaViLImageProcessorFast, False: NaViLImageProcessor}[is_fast]
        return super(NaViLImageProcessor, chosen).from_dict(settings, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without `image_processor_type`, about which transformers 4 warns at each load."""
        return {name: value for name, value in super().to_dict().items() if name != "image_processor_type"}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles by the class that the module defines now: Auto classes may import the module a second time."""
        cls = type(self)
        return object.__new__, (getattr(sys.modules.get(cls.__module__), cls.__qualname__, cls),), self.__dict__

    @property
    def cell(self) -> int:
        """Side of a merged cell, in pixels."""
        return self.patch_size * self.merge_size

    def preprocess(
        self, images: Any, return_tensors: str | None = None, device: Any = None, **settings: Any
    ) -> BatchFeature:
        """Plans and packs images: `images` and `settings` as in `plan`, the rest and the result as in `pack`."""
        return self.pack(self.plan(images, **settings), return_tensors, device)

    def plan(
        self,
        images: Any,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        scale_downsample_ratio: float | None = None,
        multi_scale: bool | None = None,
        input_data_format: str | None = None,
        **switches: Any,
    ) -> list[ImagePlan]:
        """The scales of one image or of a (nested) list of images, computed from their sizes.

        Args:
            images: in any form that `load_image` reads; `min_pixels` and `max_pixels` in an image's dict replace those
                of the call for this image.
            min_pixels, max_pixels, scale_downsample_ratio, multi_scale: replace the processor's own settings. If only
                one end of the budget is given, the default of the other moves to keep min_pixels <= max_pixels.
            input_data_format: `channels_first` or `channels_last` of arrays; None infers it from the shape.
            switches: those of transformers, at the values of `TRAINED_SWITCHES` only.

        Raises:
            ValueError: no image, an unreadable one, an aspect ratio over 200, settings outside their range, or an
                unknown keyword.
        """
        check_switches(switches, CALL_SETTINGS)
        ratio = self.scale_downsample_ratio if scale_downsample_ratio is None else scale_downsample_ratio
        is_multi_scale = self.multi_scale if multi_scale is None else multi_scale
        sources = [image_source(image) for image in flatten_images(images)]
        if not sources:
            raise ValueError("expected at least one image, got none")
        plans = []
        for image, own_budget in sources:
            budget = self._budget(**{"min_pixels": min_pixels, "max_pixels": max_pixels, **own_budget})
            low, high, tau = scale_settings(*budget, ratio)
            tau = tau if is_multi_scale else None
            source, size = measure_image(image, input_data_format)
            scales = plan_scales(*size, self.cell, low, high, tau)
            plans.append(ImagePlan(image, source, [size], low, high, tau, scales, "max_pixels" in own_budget))
        return plans

    def plans_of_grids(self, image_grid_thw: Any, num_scales: Any = None) -> list[ImagePlan]:
        """The plans of packed images, from the tensors that `pack` returns; without `num_scales`, one scale each."""
        plans, grids = [], image_grid_thw.tolist()
        num_scales = [1] * len(grids) if num_scales is None else num_scales.reshape(-1).tolist()
        if sum(num_scales) != len(grids):
            raise ValueError(f"num_scales adds up to {sum(num_scales)} scales but image_grid_thw has {len(grids)}")
        if min(num_scales, default=1) < 1:
            raise ValueError(f"num_scales must be at least 1 per image, got {num_scales}")
        for end, count in zip(accumulate(num_scales), num_scales, strict=True):
            own = grids[end - count : end]
            scales = [(self.patch_size * h, self.patch_size * w) for frames, h, w in own for _ in range(frames)]
            tau = self.scale_downsample_ratio if count > 1 else None
            plans.append(
                ImagePlan(None, None, unpadded_sizes(*scales[-1], self.cell), self.min_pixels, math.inf, tau, scales)
            )
        return plans

    def context_error(self, num_tokens: int, context_length: int, plans: Sequence[ImagePlan]) -> ValueError:
        """The error for a prompt that is too long, with a `max_pixels` at which its images fit."""
        plans = [plan for plan in plans if plan.source is not None] or plans  # packed images cannot become smaller
        room = context_length - num_tokens + sum(count_slot_tokens(plan.scales, self.cell) for plan in plans)
        verb = "would"
        if plans and plans[0].source is None:  # estimated sizes: keep a margin
            room, verb = room * 4 // 5, "should"
        images = f"its {len(plans)} image{'s' * (len(plans) > 1)}"
        if not plans:
            advice = "shorten the text"
        elif max_pixels := self.fitting_max_pixels(plans, room):
            own = ", also in place of an image's own" if any(plan.has_own_budget for plan in plans) else ""
            advice = f"{images} {verb} fit with max_pixels={max_pixels}{own}"
        else:
            advice = f"{images} do not fit even at min_pixels; give fewer, shorten the text or lower min_pixels"
        return ValueError(f"the prompt has {num_tokens} tokens but the context holds {context_length}: {advice}")

    def fitting_max_pixels(self, plans: Sequence[ImagePlan], max_tokens: int) -> int | None:
        """The largest `max_pixels`, by bisection, at which the images' slots have at most `max_tokens` tokens.

        None if they have more even at `min_pixels`.
        """

        def count_tokens(limit: int) -> int:
            num_tokens = 0
            for plan in plans:
                budget = plan.min_pixels, max(plan.min_pixels, min(plan.max_pixels, limit))
                scales = [plan_scales(*size, self.cell, *budget, plan.tau) for size in plan.sizes]
                num_tokens += max(count_slot_tokens(of_size, self.cell) for of_size in scales)
            return num_tokens

        low = math.ceil(min(plan.min_pixels for plan in plans))
        high = math.floor(max(min(plan.max_pixels, max(map(math.prod, plan.sizes))) for plan in plans))
        limits = range(low, max(low, high) + 1)
        num_fitting = bisect_right(limits, max_tokens, key=count_tokens)
        return limits[num_fitting - 1] if num_fitting else None

    def pack(self, plans: Sequence[ImagePlan], return_tensors: str | None = None, device: Any = None) -> BatchFeature:
        """Decodes planned images and splits them into patches.

        Images are decoded one at a time, at full size (a JPEG file far above the budget at a fraction of it). All later
        steps need memory in proportion to the pixel budget.

        Args:
            return_tensors: `"pt"` for tensors, `"np"` or None for NumPy arrays.
            device: of `pixel_values`. Bytes are copied there and normalized there, to the same numbers as on the CPU.

        Returns:
            `pixel_values` (patches, 3 * p * p) float32; `image_grid_thw` (scales, 3), frames, rows and columns of each
            scale in patches, images in the given order and the smallest scale of each first; `num_scales` (images,).

        Raises:
            ValueError: a damaged image, a device that torch cannot use, or one other than the CPU for NumPy arrays.
        """
        device = output_device(device, return_tensors)
        scales = [scale for plan in plans for scale in plan.scales]
        grids = np.array([[1, *(self.merge_size * math.ceil(side / self.cell) for side in scale)] for scale in scales])
        num_patches = grids.prod(1).tolist()
        shape = (sum(num_patches), 3 * self.patch_size**2)
        if device.type == "cpu":
            packed = torch.from_numpy(np.empty(shape, np.float32))
        else:
            packed = torch.empty(shape, dtype=torch.float32, device=device)
        parts = iter(packed.split(num_patches))
        with ThreadPoolExecutor() as pool:
            for plan in plans:
                with named_in_errors(plan.image):
                    image = decode_image(plan.source, plan.max_pixels)
                own_parts = dict(zip(plan.scales, parts, strict=False))
                # The largest scale takes longest and starts first.
                for size, pixels in self._resize_scales(image, plan.scales[::-1], device, pool):
                    if isinstance(pixels, Image.Image) and device.type != "cpu":
                        pixels = to_device(pixels, device)
                    self._write_patches(pixels, size, own_parts[size])
        num_scales = np.array([len(plan.scales) for plan in plans])
        packed = packed if return_tensors == "pt" else packed.numpy()
        features = {"pixel_values": packed, "image_grid_thw": grids, "num_scales": num_scales}
        return BatchFeature(features, tensor_type=return_tensors)

    def _budget(self, min_pixels: Any, max_pixels: Any) -> tuple[Any, Any]:
        """Both ends of a budget, with the processor's own settings in place of None as `plan` describes."""
        if min_pixels is None:
            min_pixels = self.min_pixels if max_pixels is None else min(self.min_pixels, number(max_pixels))
        if max_pixels is None:
            max_pixels = max(self.max_pixels, number(min_pixels))
        return min_pixels, max_pixels

    def _resize_scales(
        self, image: Image.Image, sizes: Sequence[Size], device: torch.device, pool: Executor
    ) -> Iterable[tuple[Size, Image.Image | np.ndarray | Tensor]]:
        """Each of `sizes` and the image resized to it, (height, width, 3) uint8, in any order."""
        return in_threads(pool, partial(resize_exactly, image), sizes)

    def _write_patches(self, pixels: Image.Image | np.ndarray | Tensor, size: Size, patches: Tensor) -> None:
        """Pads one scale of (height, width) `size` to whole cells and normalizes it into `patches` (N, 3 * p * p)."""
        height, width = (math.ceil(side / self.cell) * self.cell for side in size)
        split = partial(patchify, patch=self.patch_size, merge=self.merge_size)
        means, stds = tuple(self.image_mean), tuple(self.image_std)
        if isinstance(pixels, Tensor):
            padded = F.pad(pixels, (0, 0, 0, width - size[1], 0, height - size[0]))
            normalize_tensor(split(padded), normalization_table(means, stds), patches)
            return
        table = normalization_table(means, stds, in_pairs=self.patch_size % 2 == 0)
        step = height if height * width <= STRIP_AREA else self.cell
        outs = np.split(patches.numpy(), height // step)
        for strip, out in zip(strips(pixels, step, width), outs, strict=True):
            normalize_array(split(strip), table, out)


class NaViLImageProcessorFast(NaViLImageProcessor):
    """A `NaViLImageProcessor` that resizes by torch, on the CPU or the device of the call (docs/performance.md).

    `from_pretrained(path, use_fast=True, trust_remote_code=True)` of `AutoImageProcessor` and `AutoProcessor` load it.
    Plans, and so the numbers of tokens, are the same; levels differ by a few at most.
    """

    def _resize_scales(
        self, image: Image.Image, sizes: Sequence[Size], device: torch.device, pool: Executor
    ) -> Iterable[tuple[Size, Image.Image | np.ndarray | Tensor]]:
        pixels = to_device(image, device).permute(2, 0, 1)[None]  # (1, 3, H, W), channels last in memory
        if device.type == "cpu":  # torch's uint8 kernel is several times as fast as its float32 kernel
            return in_threads(pool, lambda size: resize_by_torch(pixels, size).numpy(), sizes)
        floats = pixels.float().contiguous()
        return ((size, resize_by_torch(floats, size)) for size in sizes)  # in this thread: on its CUDA stream


NaViLImageProcessor.register_for_auto_class()
