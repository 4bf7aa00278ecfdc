"""Images to packed patches: the released grids and pixels, and every image its own budget (reference §5)."""

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from decimal import Decimal
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, recorded_image
from PIL import Image
from safetensors.torch import load_file

from navil.image_processing_navil import NaViLImageProcessor, load_image, patchify, plan_scales

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
        (np.full((4, 4, 3), 256), "integers from 0 to 255"),
        ({"type": "image", "image": None}, "needs one of image, bytes"),
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
        ({"max_pixels": float("nan")}, "and nan"),
        ({"max_pixels": "many"}, "could not convert string to float: 'many'"),
        ({"scale_downsample_ratio": 1.0}, "1.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NaViLImageProcessor(**settings)
    with pytest.raises(ValueError, match=message):
        NaViLImageProcessor()(recorded_image(40, 40, 0), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 16.5}, "patch_size must be a whole number of at least 1, got 16.5"),
        ({"merge_size": 0}, "merge_size must be a whole number of at least 1, got 0"),
        ({"image_mean": [0.5]}, "3 numbers each"),
        ({"image_std": (0.5, 0, 0.5)}, "3 numbers each"),
    ],
)
def test_bad_settings_of_the_constructor(settings, message):
    with pytest.raises(ValueError, match=message):
        NaViLImageProcessor(**settings)


# -- numbers of any type -----------------------------------------------------------------------------------------------

NUMBER_TYPES = {
    "int64": np.int64,
    "float32": np.float32,
    "0-d array": np.array,
    "tensor": torch.tensor,
    "bfloat16": lambda value: torch.tensor(value, dtype=torch.bfloat16),
    "fraction": Fraction,
    "decimal": Decimal,
}


@pytest.mark.parametrize("convert", NUMBER_TYPES.values(), ids=NUMBER_TYPES)
def test_numbers_of_every_type_are_the_same_setting(convert):
    image = recorded_image(300, 200, 0)
    plain = NaViLImageProcessor(min_pixels=4096, max_pixels=65536, scale_downsample_ratio=0.5, multi_scale=True)
    expected = plain(image)["pixel_values"]
    budget = {"min_pixels": convert(4096), "max_pixels": convert(65536)}
    tau = convert(0.5) if convert is not np.int64 else 0.5
    given = NaViLImageProcessor(convert(16), convert(2), scale_downsample_ratio=tau, multi_scale=np.True_, **budget)
    assert given.to_json_string() == plain.to_json_string()
    assert np.array_equal(given(image)["pixel_values"], expected)
    by_call = NaViLImageProcessor()(image, scale_downsample_ratio=tau, multi_scale=np.True_, **budget)
    assert np.array_equal(by_call["pixel_values"], expected)


def test_channel_values_are_any_three_numbers():
    values = (0.25, 0.5, 1)
    for convert in (list, np.array, torch.tensor, lambda values: [np.float32(value) for value in values]):
        processor = NaViLImageProcessor(image_mean=convert(values), image_std=convert(values))
        assert processor.image_mean == processor.image_std == [0.25, 0.5, 1.0]
        assert NaViLImageProcessor(**json.loads(processor.to_json_string())).image_std == [0.25, 0.5, 1.0]


def test_the_released_loop_over_scales_computes_budgets_with_torch():
    image, processor = recorded_image(300, 200, 0), NaViLImageProcessor(min_pixels=4096, max_pixels=65536)
    expected = processor(image, multi_scale=True)["image_grid_thw"].tolist()
    grids, max_pixels = [], 65536
    while max_pixels >= 4096:
        [grid] = processor(image, return_tensors="pt", min_pixels=4096, max_pixels=max_pixels)["image_grid_thw"]
        grids.append(grid.tolist())
        max_pixels = grid.prod() * 16**2 * torch.tensor(0.7071**2)
    assert grids[::-1] == expected and len(grids) > 2


# -- forms of an image -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chart(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a chart.png"
    recorded_image(50, 40, 3).save(path)
    return path


FORMS = {
    "path": lambda path: path,
    "text": str,
    "file url": lambda path: path.as_uri(),
    "unquoted file url": lambda path: f"file://{path}",
    "data url": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
    "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
    "base64 in lines": lambda path: base64.encodebytes(path.read_bytes()).decode(),
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "file in memory": lambda path: io.BytesIO(path.read_bytes()),
    "dataset": lambda path: {"bytes": path.read_bytes(), "path": "a mere name.png"},
    "dataset of paths": lambda path: {"bytes": None, "path": str(path)},
    "part": lambda path: {"type": "image", "image": path},
    "part with empty keys": lambda path: {"type": "image", "image": None, "text": None, "url": path.as_uri()},
    "part with base64": lambda path: {"type": "image", "base64": base64.b64encode(path.read_bytes()).decode()},
    "part with a dataset's image": lambda path: {"type": "image", "image": {"bytes": path.read_bytes(), "path": None}},
    "OpenAI's part": lambda path: {"type": "image_url", "image_url": {"url": path.as_uri(), "detail": "auto"}},
    "OpenAI's part in short": lambda path: {"type": "image_url", "image_url": path.as_uri()},
    "int64": lambda path: np.asarray(Image.open(path)).astype(np.int64),
    "int16 tensor": lambda path: torch.from_numpy(np.asarray(Image.open(path)).astype(np.int16)).permute(2, 0, 1),
    "tensor with a gradient": lambda path: torch.from_numpy(np.asarray(Image.open(path)) / 255).requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_is_the_image_in_the_file(form, chart):
    processor = NaViLImageProcessor(min_pixels=1024, max_pixels=4096)
    expected = processor(chart)["pixel_values"]
    assert np.array_equal(processor(form(chart))["pixel_values"], expected)
    assert np.array_equal(processor([form(chart), form(chart)])["pixel_values"], np.concatenate([expected, expected]))


def test_a_bfloat16_tensor_is_read_with_its_precision(chart):
    image = torch.from_numpy(np.array(Image.open(chart))) / 255
    loaded = np.asarray(load_image(image.bfloat16())).astype(int)
    assert np.abs(loaded - np.asarray(Image.open(chart))).max() <= 1  # 8 bits of mantissa


def test_an_open_file_stays_open(chart):
    with chart.open("rb") as file:
        first, second = load_image(file), load_image(file)
        assert not file.closed and first.tobytes() == second.tobytes()


ITERABLES = {
    "tuple": tuple,
    "generator": lambda images: (image for image in images),
    "iterator": iter,
    "keys": lambda images: dict.fromkeys(images).keys(),
    "generator of lists": lambda images: ([image] for image in images),
    "batch": lambda images: np.stack([np.asarray(Image.open(image)) for image in images]),
    "tensor batch": lambda images: torch.from_numpy(np.stack([np.asarray(Image.open(image)) for image in images])),
}


@pytest.mark.parametrize("collect", ITERABLES.values(), ids=ITERABLES)
def test_every_iterable_is_a_list_of_images(collect, chart, tmp_path):
    recorded_image(50, 40, 4).save(tmp_path / "other.png")
    images = [chart, tmp_path / "other.png"]
    processor = NaViLImageProcessor(min_pixels=1024, max_pixels=4096)
    assert np.array_equal(processor(collect(images))["pixel_values"], processor(images)["pixel_values"])


def test_an_image_may_have_its_own_budget():
    image, processor = recorded_image(300, 200, 0), NaViLImageProcessor(min_pixels=4096, multi_scale=True)
    own = {"type": "image", "image": image, "max_pixels": torch.tensor(9000.0)}
    both = processor([image, own, {"image": image, "min_pixels": None, "max_pixels": None}], max_pixels=30000)
    large, small = processor(image, max_pixels=30000), processor(image, max_pixels=9000)
    assert both["num_scales"].tolist() == [*large["num_scales"], *small["num_scales"], *large["num_scales"]]
    assert np.array_equal(
        both["pixel_values"], np.concatenate([features["pixel_values"] for features in (large, small, large)])
    )
    with pytest.raises(ValueError, match="got 4096 and 100"):
        processor({"image": image, "min_pixels": 4096, "max_pixels": 100})


class Pictures(BaseHTTPRequestHandler):
    """Gives `picture`, under any name that ends with .png, to clients that say who they are."""

    picture = b""

    def do_GET(self):
        is_served = self.path.endswith(".png") and "navil" in self.headers["User-Agent"]
        self.send_response(200 if is_served else 404)
        self.end_headers()
        self.wfile.write(self.picture if is_served else b"")

    def log_message(self, *args):
        pass


def test_downloads(chart, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Pictures, "picture", chart.read_bytes())
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/\u56fe 1.png"
        assert (
            load_image(url).tobytes()
            == load_image({"type": "image", "url": url}).tobytes()
            == load_image(chart).tobytes()
        )
        with pytest.raises(
            ValueError, match=r"cannot read an image from 'http://127.*\.\.\..*x': HTTP Error 404"
        ) as raised:
            load_image(f"http://127.0.0.1:{server.server_port}/{'x' * 1000}")
        assert len(str(raised.value)) < 200
        server.shutdown()
    with pytest.raises(ValueError, match="cannot read an image from 'http://127.*refused"):
        load_image(url)


@pytest.mark.parametrize("text", ["data:image/png;base64," + "A" * 10**6, "A" * 10**6, "x/" * 10**5, b"A" * 10**6])
def test_a_long_source_is_cut_short_in_errors(text):
    with pytest.raises(ValueError, match="cannot read an image from") as raised:
        load_image(text)
    assert len(str(raised.value)) < 250


# -- transformers' loading ---------------------------------------------------------------------------------------------


def test_settings_given_to_from_pretrained_are_checked_and_kept(tmp_path):
    NaViLImageProcessor().save_pretrained(tmp_path)
    loaded = NaViLImageProcessor.from_pretrained(tmp_path, max_pixels=np.int64(300_000), multi_scale=np.True_)
    assert json.loads(loaded.to_json_string())["max_pixels"] == 300_000 and loaded.multi_scale is True
    for settings in ({"max_pixels": 1}, {"do_resize": True}):
        with pytest.raises(ValueError, match="max_pixels|do_resize"):
            NaViLImageProcessor.from_pretrained(tmp_path, **settings)


IN_EITHER_ORDER = """
import copy, pickle, sys, numpy, torch
from transformers import AutoImageProcessor, AutoModel, AutoProcessor
def load(auto_class): return auto_class.from_pretrained(folder, trust_remote_code=True)
for folder, model_first in zip(sys.argv[1:], (True, False)):
    if model_first:
        model, processor = load(AutoModel), load(AutoProcessor)
    else:
        processor, model = load(AutoProcessor), load(AutoModel)
    for original in (model.image_processor, processor.image_processor, load(AutoImageProcessor)):
        for clone in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
            assert clone.to_dict() == original.to_dict()
            assert clone(numpy.zeros((9, 9)))["num_scales"].tolist() == [1]
    clone = pickle.loads(pickle.dumps(model))
    assert all(map(torch.equal, clone.parameters(), model.parameters()))
"""


def test_a_model_is_pickled_in_either_order_of_loading_and_no_warning_is_printed(recordings, tmp_path):
    folders = [
        shutil.copytree(recordings["qwen3"].folder, tmp_path / name) for name in ("model_first", "processor_first")
    ]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", IN_EITHER_ORDER, *folders], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "use_fast" not in run.stdout + run.stderr


def test_paths_and_empty_dicts_as_people_write_them(tmp_path):
    path = tmp_path / "a #1 ü.png"
    recorded_image(60, 40, 0).save(path)
    expected = NaViLImageProcessor()(path)["pixel_values"]
    for form in (np.str_(path), f"file://{path}", path.as_uri()):
        assert np.array_equal(NaViLImageProcessor()(form)["pixel_values"], expected)
    for empty in ({"image": {"bytes": None, "path": None}}, {"image_url": {"url": None, "detail": None}}):
        part = {"type": "image", "path": str(path), **empty}
        assert np.array_equal(NaViLImageProcessor()(part)["pixel_values"], expected)


def test_a_given_end_of_the_budget_moves_the_default_of_the_other():
    image = recorded_image(300, 200, 0)
    processor = NaViLImageProcessor(min_pixels=16384, max_pixels=32768)
    for given, whole in (
        ({"max_pixels": 4096}, {"min_pixels": 4096, "max_pixels": 4096}),
        ({"min_pixels": 65536}, {"min_pixels": 65536, "max_pixels": 65536}),
    ):
        expected = processor(image, **whole)["image_grid_thw"].tolist()
        assert processor(image, **given)["image_grid_thw"].tolist() == expected
        assert processor({"image": image, **given})["image_grid_thw"].tolist() == expected
    with pytest.raises(ValueError, match="need 0 < min_pixels <= max_pixels, got 5000 and 4096"):
        processor(image, min_pixels=5000, max_pixels=4096)
