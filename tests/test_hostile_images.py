"""Odd and hostile pictures: a right result or a ValueError, and no more memory than the pixel budget allows."""

import copy
import io
import itertools
import struct

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, recorded_image, refused
from fuzzing import damaged_files, fuzz
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from navil.image_processing_navil import (
    ImagePlan,
    NaViLImageProcessor,
    count_slot_tokens,
    decode_image,
    load_image,
    measure_image,
    plan_scales,
)
from navil.tokenization_navil import image_slot

CRASHES = sorted((FIXTURES / "crashes").iterdir())
GRADIENT = np.add.outer(np.arange(0, 160, 8), np.arange(0, 90, 3)).astype(np.uint8)  # 20 x 30
GRAY_MODES = ("L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F")


def pixels_of(image, input_data_format: str | None = None) -> np.ndarray:
    return np.asarray(load_image(image, input_data_format))


def as_mode(mode: str) -> Image.Image:
    image = Image.fromarray(GRADIENT)
    if mode in ("La", "PA"):
        return image.convert("LA").convert(mode)
    return image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode)


@pytest.mark.parametrize("mode", GRAY_MODES)
@pytest.mark.filterwarnings("error")
def test_every_mode_is_the_same_picture(mode):
    loaded = pixels_of(as_mode(mode)).astype(int)
    assert loaded.shape == (*GRADIENT.shape, 3)
    assert np.abs(loaded - GRADIENT[..., None]).max() <= 2


def test_bilevel_and_lab():
    checkers = np.indices((6, 8)).sum(0) % 2 == 0
    assert np.array_equal(pixels_of(Image.fromarray(checkers))[..., 0], checkers * 255)
    gray = np.asarray(load_image(Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (128, 128, 128)])))
    assert np.ptp(gray) <= 6 and 100 < gray.mean() < 140


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bit_gray_keeps_its_steps(mode, tmp_path):
    steps = (GRADIENT.astype(np.uint16) * 257).astype("<u2" if mode == "I;16" else ">u2")
    image = Image.frombytes(mode, GRADIENT.shape[::-1], steps.tobytes())
    assert np.array_equal(pixels_of(image)[..., 1], GRADIENT)
    if mode == "I;16":
        image.save(tmp_path / "gray.png")
        assert np.array_equal(pixels_of(tmp_path / "gray.png")[..., 2], GRADIENT)


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
@pytest.mark.filterwarnings("error")
def test_transparency_shows_the_stored_color(transparency, tmp_path):
    image = Image.fromarray(GRADIENT).convert("P")
    image.save(tmp_path / "palette.png", transparency=transparency)
    assert np.array_equal(pixels_of(tmp_path / "palette.png"), np.asarray(image.convert("RGB")))
    clear = Image.merge("LA", [Image.fromarray(GRADIENT), Image.new("L", (30, 20), 0)])
    assert np.array_equal(pixels_of(clear)[..., 0], GRADIENT)


OUT_OF_RANGE = [(np.nan, "f4"), (np.inf, "f4"), (-1, "f4"), (256, "f4"), (0.5, "f4"), (-1, "i4"), (256, "i4")]


@pytest.mark.parametrize(("value", "dtype"), OUT_OF_RANGE)
def test_modes_without_a_fixed_range_are_not_guessed(value, dtype):
    with refused("must count from 0 to 255"):
        load_image(Image.fromarray(np.array([[0, value]], dtype)))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_every_exif_orientation_comes_out_upright(orientation, file_format, tmp_path):
    stored = recorded_image(30, 20, 1)
    method = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
    shown = stored if method is None else stored.transpose(Image.Transpose(method))
    options = {"lossless": True} if file_format == "WEBP" else {}
    stored.save(tmp_path / "turned", file_format, exif=turned(orientation), **options)
    assert np.array_equal(pixels_of(tmp_path / "turned"), np.asarray(shown))
    with Image.open(tmp_path / "turned") as opened:
        assert np.array_equal(pixels_of(opened), np.asarray(shown))


def with_late_exif(data: bytes) -> bytes:
    """A PNG file with its eXIf chunk moved behind its pixels."""
    start = data.index(b"eXIf") - 4
    (length,) = struct.unpack(">I", data[start : start + 4])
    chunk = data[start : start + 12 + length]
    rest = data.replace(chunk, b"")
    return rest[:-12] + chunk + rest[-12:]  # in front of IEND


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "late PNG", "TIFF", "WEBP"])
def test_a_turned_file_is_the_same_picture_in_every_form(file_format, tmp_path):
    file, path = io.BytesIO(), tmp_path / "turned"
    recorded_image(300, 100, 0).save(file, file_format.removeprefix("late "), exif=turned(6))
    data = with_late_exif(file.getvalue()) if file_format == "late PNG" else file.getvalue()
    path.write_bytes(data)
    processor = NaViLImageProcessor(min_pixels=256, max_pixels=1500)  # a JPEG is decoded at a fraction of its size
    expected = processor(path)
    assert expected["image_grid_thw"].tolist() == [[1, 6, 2]]
    loaded = processor.plan([path, data, io.BytesIO(data)])
    assert all(isinstance(plan.source, str | bytes) for plan in loaded)  # nothing decoded is kept
    with path.open("rb") as opened:
        for form in (data, io.BytesIO(data), opened):
            assert np.array_equal(processor([form, form])["pixel_values"], np.tile(expected["pixel_values"], (2, 1)))
    copied = Image.open(io.BytesIO(data)), copy.deepcopy(Image.open(io.BytesIO(data)))
    for picture in copied:  # decoded whole, as the caller's
        features = processor(picture)
        assert features["image_grid_thw"].tolist() == [[1, 6, 2]]
        assert np.abs(features["pixel_values"] - expected["pixel_values"]).mean() < 0.1


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_animations_show_their_first_frame_or_the_one_they_stand_at(file_format, tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving", file_format, save_all=True, append_images=frames[1:], lossless=True)
    assert load_image(tmp_path / "moving").getpixel((0, 0)) == (255, 0, 0)
    with Image.open(tmp_path / "moving") as opened:
        opened.seek(2)
        assert load_image(opened).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_cut_off_files(file_format, part, tmp_path):
    recorded_image(60, 40, 0).save(tmp_path / "picture", file_format)
    data = (tmp_path / "picture").read_bytes()
    (tmp_path / "picture").write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match="cannot read an image from '.*picture'"):
        load_image(tmp_path / "picture")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", CRASHES, ids=lambda path: path.name)
def test_files_that_once_crashed(path):
    """Found by fuzzing: Pillow's errors were RuntimeErrors and the like, or named no file."""
    with refused("cannot read an image from"):
        load_image(path)


def test_a_decoder_that_runs_out_of_memory(tmp_path, monkeypatch):
    """As for a damaged JPEG 2000 whose header stated a huge size."""

    def load(self):
        raise MemoryError

    recorded_image(8, 8, 0).save(tmp_path / "picture.png")
    for image_class in (Image.Image, ImageFile.ImageFile):
        monkeypatch.setattr(image_class, "load", load)
    with refused("picture.png': MemoryError"):
        load_image(tmp_path / "picture.png")


@fuzz
@given(data=st.one_of(damaged_files(), st.binary(max_size=64)))
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    try:
        image = load_image(path)
    except ValueError as error:
        assert str(error).startswith("cannot read an image from")
    else:
        assert image.mode == "RGB" and 0 not in image.size


# -- size and memory ---------------------------------------------------------------------------------------------------
def test_a_bomb_is_refused_by_pillows_guard_unless_it_is_lifted(tmp_path, monkeypatch):
    assert Image.MAX_IMAGE_PIXELS < 10**8
    Image.new("1", (3_000, 2_000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
    with pytest.raises(ValueError, match="6000000 pixels.*decompression bomb"):
        NaViLImageProcessor()(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    features = NaViLImageProcessor()(tmp_path / "bomb.png", min_pixels=1024, max_pixels=9_600)
    assert features["image_grid_thw"].tolist() == [[1, 6, 8]]


@pytest.mark.parametrize(("max_pixels", "fraction"), [(10**9, 1), (9_600, 2), (1_200, 4), (256, 8), (1, 8)])
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(max_pixels, fraction, tmp_path):
    path = tmp_path / "large.jpg"
    recorded_image(480, 320, 0).save(path, exif=turned(6))
    for form in (str(path), path.read_bytes(), path.as_uri()):
        source, size = measure_image(form)
        image = decode_image(source, max_pixels)
        assert size == (480, 320) and image.size == (320 // fraction, 480 // fraction)  # upright
    assert fraction in (1, 8) or image.width * image.height < 16 * max_pixels


def test_a_draft_is_planned_as_the_whole_picture_and_looks_like_it(tmp_path):
    image = Image.fromarray(np.kron(GRADIENT, np.ones((32, 32), np.uint8))).convert("RGB")  # 960 x 640
    image.save(tmp_path / "large.jpg", quality=95)
    processor = NaViLImageProcessor(min_pixels=256, max_pixels=9_600, multi_scale=True)
    drafted = processor(tmp_path / "large.jpg")
    with Image.open(tmp_path / "large.jpg") as opened:
        whole = processor(opened)
    assert drafted["image_grid_thw"].tolist() == whole["image_grid_thw"].tolist()
    assert np.abs(drafted["pixel_values"] - whole["pixel_values"]).mean() < 0.02


sizes = st.integers(1, 400)
budgets = st.tuples(st.integers(1, 40_000), st.integers(1, 40_000)).map(sorted)
taus = st.floats(0.05, 0.97)


@fuzz
@given(width=sizes, height=sizes, budget=budgets, tau=st.one_of(st.none(), taus), patch=st.sampled_from([4, 7, 16]))
@example(width=1, height=1, budget=[1, 1], tau=0.5, patch=16)
@example(width=200, height=1, budget=[1, 40_000], tau=0.97, patch=4)
def test_packing(width, height, budget, tau, patch):
    min_pixels, max_pixels = budget
    processor = NaViLImageProcessor(patch_size=patch, min_pixels=min_pixels, max_pixels=max_pixels)
    image = np.zeros((height, width, 3), np.uint8)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match="aspect ratio"):
            processor(image)
        return
    features = processor(image, multi_scale=tau is not None, scale_downsample_ratio=tau)
    grids = features["image_grid_thw"]
    areas = grids.prod(1)
    assert (grids[:, 1:] % 2 == 0).all() and (grids > 0).all()
    assert features["pixel_values"].shape == (areas.sum(), 3 * patch**2)
    assert features["num_scales"].tolist() == [len(grids)] and (tau is not None or len(grids) == 1)
    assert (np.diff(areas) > 0).all()  # smallest first
    assert np.isfinite(features["pixel_values"]).all()


@fuzz
@given(
    size=st.tuples(st.integers(1, 30_000), st.integers(1, 30_000)),
    budget=st.tuples(st.integers(1, 10**8), st.integers(1, 10**8)).map(sorted),
    tau=taus,
)
def test_scales_keep_the_budget(size, budget, tau):
    if max(size) > 200 * min(size):
        return
    min_pixels, max_pixels = budget
    scales = plan_scales(*size, 32, min_pixels, max_pixels, tau)
    for height, width in scales:
        is_grown = height > size[0] or width > size[1]
        assert height * width <= max_pixels or is_grown or 1 in (height, width)
        assert height * width >= min_pixels or not is_grown
        aspect_error = abs(height * size[1] - width * size[0]) / max(size)
        assert aspect_error <= max(height, width) / min(height, width) + 1
    if count_slot_tokens(scales, cell=32) < 40_000:
        assert count_slot_tokens(scales, cell=32) == image_slot(scales, 32).count("<")


@fuzz
@given(
    images=st.lists(st.tuples(st.integers(20, 4000), st.integers(20, 4000)), min_size=1, max_size=5),
    max_tokens=st.integers(1, 5_000),
    tau=st.one_of(st.none(), taus),
)
def test_a_suggested_budget_fits(images, max_tokens, tau):
    def tokens(budget: int) -> int:
        return sum(count_slot_tokens(plan_scales(*size, 32, 4096, budget, tau), cell=32) for size in images)

    plans = [ImagePlan(None, None, [size], 4096, 10**7, tau, []) for size in images]
    suggested = NaViLImageProcessor().fitting_max_pixels(plans, max_tokens)
    if suggested is None:
        assert tokens(4096) > max_tokens
    else:
        assert tokens(suggested) <= max_tokens
        assert suggested >= 4096


def test_a_suggested_budget_fits_images_with_budgets_of_their_own():
    images = [recorded_image(300, 200, seed) for seed in range(3)]
    parts = [images[0], {"image": images[1], "max_pixels": 9_000}, {"image": images[2], "max_pixels": 60_000}]
    processor = NaViLImageProcessor(min_pixels=4_096)
    suggested = processor.fitting_max_pixels(processor.plan(parts), 100)
    assert suggested > 9_000
    lowered = [parts[0], parts[1], {**parts[2], "max_pixels": suggested}]

    def num_tokens(images, **settings):
        return sum(count_slot_tokens(plan.scales, 32) for plan in processor.plan(images, **settings))

    assert num_tokens(lowered, max_pixels=suggested) <= 100 < num_tokens(parts)


# -- arrays ------------------------------------------------------------------------------------------------------------
@fuzz
@given(
    seed=st.integers(0, 9),
    shape=st.tuples(st.integers(5, 12), st.integers(5, 12)),
    channels=st.sampled_from([None, 1, 3, 4]),
    dtype=st.sampled_from(["uint8", "float16", "float32", "float64"]),
    channels_first=st.booleans(),
    as_tensor=st.booleans(),
)
def test_arrays_of_every_layout_are_the_same_picture(seed, shape, channels, dtype, channels_first, as_tensor):
    pixels = np.random.default_rng(seed).integers(0, 256, shape if channels is None else (*shape, channels), np.uint8)
    expected = pixels.reshape(*shape, -1)[..., :3]
    array = pixels if dtype == "uint8" else (pixels / 255).astype(dtype)
    if channels is not None and channels_first:
        array = array.transpose(2, 0, 1)
    loaded = np.asarray(load_image(torch.from_numpy(array.copy()) if as_tensor else array))
    assert np.array_equal(loaded, np.broadcast_to(expected, loaded.shape))


def test_input_data_format_decides_where_a_shape_is_ambiguous():
    array = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3)
    first = array.transpose(1, 2, 0)
    for settings, expected in (((), array), (("channels_last",), array), (("channels_first",), first)):
        assert np.array_equal(pixels_of(array, *settings), expected)
    processor = NaViLImageProcessor(min_pixels=1, max_pixels=1024)
    features = processor(array, input_data_format="channels_first")
    assert np.array_equal(features["pixel_values"], processor(first)["pixel_values"])
    with refused("channels_first or channels_last, got 'HWC'"):
        load_image(array, "HWC")


def cut_off_image() -> Image.Image:
    file = io.BytesIO()
    recorded_image(50, 40, 3).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:200]))


NO_PIXELS = itertools.product([np.nan, np.inf, -np.inf, -0.1, 1.1, 255.0], ["float16", "float32", "float64"])


NO_IMAGES = [
    (cut_off_image(), "cannot read an image from <PIL"),
    (Image.new("RGB", (0, 5)), "at least one pixel, got 0 x 5"),
    (None, "NoneType"),
    (b"\x89PNG", "cannot read an image from"),
    ({"type": "image", "image": None}, "needs one of image, bytes"),
    (object(), "object"),
    (7, "int"),
    ([], "at least one image"),
    ([[[np.zeros((3, 3), np.uint8)]]], "list"),
    ([[0, 1], [1, 0]], "int"),
    (ROOT / "README.md", "README.md'"),
    ("a\0b.png", "cannot read an image from"),
    ("\ud800.png", "cannot read an image from"),
    ("", "cannot read an image from"),
    (".", "cannot read an image from"),
    ("no/such/file.jpg", "cannot read an image from 'no/such/file.jpg'"),
    (np.zeros((3, 3), bool), "bool"),
    (np.zeros((3, 3), complex), "complex"),
    (np.zeros((3, 3), object), "object"),
    (np.array(["a.png"]), "<U5"),
    (np.float32(1), "()"),
    (np.zeros((5, 3, 2), np.uint8), "(5, 3, 2)"),
    (np.zeros((6, 4, 5), np.uint8), "(6, 4, 5)"),
    (np.zeros((0, 4, 3), np.uint8), "(0, 4, 3)"),
    (np.full((3, 3), 256), "integers from 0 to 255"),
    (torch.full((3, 3), -1), "integers from 0 to 255"),
    *((np.array([[value, 0.5]], dtype), "finite numbers between 0 and 1") for value, dtype in NO_PIXELS),
]


@pytest.mark.parametrize(("image", "message"), NO_IMAGES, ids=lambda value: str(value)[:30])
def test_things_that_are_no_image(image, message):
    with refused(message):
        NaViLImageProcessor()(image)
