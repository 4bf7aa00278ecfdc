"""Images to packed patches: the released grids and pixels, and every image its own budget (reference §5)."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, recorded_image
from navil.image_processing_navil import NaViLImageProcessor, load_image, patchify, plan_scales
from PIL import Image
from safetensors.torch import load_file

FOLDER = FIXTURES / "image_processing"
CASES = json.loads((FOLDER / "cases.json").read_text())


def processor_for(case: dict) -> NaViLImageProcessor:
    return NaViLImageProcessor(
        min_pixels=case["min_patches"] * 256,
        max_pixels=case["max_patches"] * 256,
        scale_downsample_ratio=case["ratio"],
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['width']}x{case['height']}")
def test_recorded_case(case):
    image = recorded_image(case["width"], case["height"], case["seed"])
    if "error" in case:
        with pytest.raises(ValueError) as raised:
            processor_for(case)(image, multi_scale=True)
        assert f"ValueError: {raised.value}" == case["error"]
        return
    features = processor_for(case)(image, multi_scale=True, return_tensors="pt")
    patches = features["pixel_values"]
    assert features["image_grid_thw"].tolist() == case["image_grid_thw"]
    assert features["num_scales"].tolist() == [case["num_scales"]]
    assert patches.dtype == torch.float32 and list(patches.shape) == [case["shape"][0], 3 * 16 * 16]
    assert hashlib.sha256(patches.numpy().tobytes()).hexdigest() == case["sha256"]
    if "tensor" in case:
        assert torch.equal(patches, load_file(FOLDER / "pixels.safetensors")[case["tensor"]].flatten(1))


def test_one_scale_is_the_largest_of_many():
    image = recorded_image(200, 130, 13)
    processor = NaViLImageProcessor()
    one = processor(image, return_tensors="pt", min_pixels=16 * 256, max_pixels=256 * 256)
    many = processor(image, return_tensors="pt", min_pixels=16 * 256, max_pixels=256 * 256, multi_scale=True)
    assert one["image_grid_thw"].tolist() == [[1, 10, 14]] == many["image_grid_thw"][-1:].tolist()
    assert torch.equal(one["pixel_values"], many["pixel_values"][-140:])


def test_every_image_has_its_own_budget():
    images = [recorded_image(640, 480, 0), recorded_image(37, 53, 1), recorded_image(640, 480, 2)]
    processor = NaViLImageProcessor(multi_scale=True)
    together = processor(images)
    alone = [processor(image) for image in images]
    for name in ("pixel_values", "image_grid_thw", "num_scales"):
        assert np.array_equal(together[name], np.concatenate([features[name] for features in alone]))
    assert together["num_scales"].tolist() == [3, 1, 3]


def test_call_settings_override_the_constructor():
    image = recorded_image(640, 480, 0)
    by_constructor = NaViLImageProcessor(
        min_pixels=4096, max_pixels=65536, scale_downsample_ratio=0.5, multi_scale=True
    )(image)
    by_call = NaViLImageProcessor()(
        image, min_pixels=4096, max_pixels=65536, scale_downsample_ratio=0.5, multi_scale=True
    )
    assert np.array_equal(by_constructor["pixel_values"], by_call["pixel_values"])
    assert by_call["num_scales"].tolist() == [len(by_call["image_grid_thw"])] == [3]


@pytest.mark.parametrize("tau", [0.9, 0.7071, 0.5])
@pytest.mark.parametrize("size", [(64, 64), (1024, 300), (999, 2001)])
def test_scales_shrink_strictly(size, tau):
    sizes = plan_scales(*size, cell=32, min_pixels=4096, max_pixels=262144, tau=tau)
    cells = [-(-height // 32) * -(-width // 32) for height, width in sizes]
    assert cells == sorted(set(cells))


@pytest.mark.parametrize("patch_size", [4, 5])  # an even and an odd number of pixels
def test_each_channel_is_normalised_by_its_own_mean_and_deviation(patch_size):
    mean, std = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
    side = 6 * patch_size
    budget = {"min_pixels": patch_size**2, "max_pixels": side**2}
    processor = NaViLImageProcessor(patch_size, 2, image_mean=mean, image_std=std, **budget)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    patches = patchify(pixels, patch_size, 2).reshape(-1, 3, patch_size**2)
    expected = (patches / 255 - np.array(mean)[:, None]) / np.array(std)[:, None]
    given = processor(pixels, return_tensors="np")["pixel_values"]
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, expected.reshape(given.shape), rtol=0, atol=1e-6)


def test_patchify_keeps_merge_groups_together():
    rows, columns = np.meshgrid(np.arange(8), np.arange(12), indexing="ij")
    pixels = np.stack([rows, columns], axis=-1)  # 8 x 12 pixels, patches of 2, cells of 4
    corners = patchify(pixels, patch=2, merge=2).reshape(-1, 2, 2, 2)[:, :, 0, 0]  # (row, column) of each patch
    assert corners[:5].tolist() == [[0, 0], [0, 2], [2, 0], [2, 2], [0, 4]]
    assert corners[-1].tolist() == [6, 10]


@pytest.mark.parametrize(
    "convert",
    [
        lambda image: image,
        np.asarray,
        lambda image: np.asarray(image).transpose(2, 0, 1),
        lambda image: np.asarray(image) / 255,
        lambda image: torch.from_numpy(np.array(image)),
        lambda image: image.convert("RGBA"),
    ],
    ids=["pil", "uint8", "channels-first", "float", "tensor", "rgba"],
)
def test_every_form_of_an_image_is_the_same_picture(convert):
    image = recorded_image(50, 40, 3)
    assert np.array_equal(np.asarray(load_image(convert(image))), np.asarray(image))


def test_exif_orientation_is_applied(tmp_path):
    image = recorded_image(60, 40, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").size == (40, 60)
    with Image.open(tmp_path / "turned.png") as opened:
        assert load_image(opened).size == (40, 60)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (ROOT / "README.md", "cannot read an image from '.*README.md'"),
        ("no/such/file.jpg", "cannot read an image from 'no/such/file.jpg'"),
        (np.zeros((6, 4, 5), np.uint8), r"\(6, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.full((4, 4, 3), np.nan), "finite numbers between 0 and 1"),
        (np.full((4, 4, 3), 255.0), "finite numbers between 0 and 1"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (7, "int"),
        ([], "at least one image"),
    ],
)
def test_bad_image(image, message):
    with pytest.raises(ValueError, match=message):
        NaViLImageProcessor()(image)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_pixels": 100, "max_pixels": 99}, "100 and 99"),
        ({"min_pixels": 0}, "0 and"),
        ({"scale_downsample_ratio": 1.0}, "1.0"),
        ({"image_mean": [0.5]}, "3 numbers each"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NaViLImageProcessor(**settings)
    if "image_mean" not in settings:
        with pytest.raises(ValueError, match=message):
            NaViLImageProcessor()(recorded_image(40, 40, 0), **settings)
