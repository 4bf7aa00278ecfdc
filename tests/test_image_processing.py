"""Images to packed patches: the released grids and pixels, every form of an image, every type of number.

Pillow's modes, EXIF, array layouts and damaged files are tested in test_hostile_images.py; the released example's loop
over scales in test_chat.py.
"""

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

from navil.image_processing_navil import NaViLImageProcessor, load_image, patchify

FOLDER = FIXTURES / "image_processing"
CASES = json.loads((FOLDER / "cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['width']}x{case['height']}")
def test_recorded_case(case):
    image = recorded_image(case["width"], case["height"], case["seed"])
    budget = {"min_pixels": case["min_patches"] * 256, "max_pixels": case["max_patches"] * 256}
    processor = NaViLImageProcessor(scale_downsample_ratio=case["ratio"], **budget)
    if "error" in case:
        with pytest.raises(ValueError) as raised:
            processor(image, multi_scale=True)
        assert f"ValueError: {raised.value}" == case["error"]
        return
    features = processor(image, multi_scale=True, return_tensors="pt")
    patches = features["pixel_values"]
    assert features["image_grid_thw"].tolist() == case["image_grid_thw"]
    assert features["num_scales"].tolist() == [case["num_scales"]]
    assert patches.dtype == torch.float32 and list(patches.shape) == [case["shape"][0], 3 * 16 * 16]
    assert hashlib.sha256(patches.numpy().tobytes()).hexdigest() == case["sha256"]
    if "tensor" in case:
        assert torch.equal(patches, load_file(FOLDER / "pixels.safetensors")[case["tensor"]].flatten(1))


def test_one_scale_is_the_largest_of_many():
    processor, image = NaViLImageProcessor(min_pixels=4096, max_pixels=65536), recorded_image(200, 130, 13)
    one, many = processor(image), processor(image, multi_scale=True)
    assert one["image_grid_thw"].tolist() == [[1, 10, 14]] == many["image_grid_thw"][-1:].tolist()
    assert np.array_equal(one["pixel_values"], many["pixel_values"][-140:]) and many["num_scales"].tolist() == [5]


@pytest.mark.parametrize("patch_size", [4, 5])  # an even and an odd number of pixels
def test_each_channel_is_normalized_by_its_own_mean_and_deviation(patch_size):
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


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_pixels": 100, "max_pixels": 99}, "need 0 < min_pixels <= max_pixels, got 100 and 99"),
        ({"min_pixels": 0}, "0 and"),
        ({"max_pixels": float("nan")}, "and nan"),
        ({"max_pixels": "many"}, "could not convert string to float: 'many'"),
        ({"scale_downsample_ratio": 1.0}, "1.0"),
        ({"patch_size": 16.5}, "patch_size must be a whole number of at least 1, got 16.5"),
        ({"merge_size": 0}, "merge_size must be a whole number of at least 1, got 0"),
        ({"image_mean": [0.5]}, "3 numbers each"),
        ({"image_std": (0.5, 0, 0.5)}, "3 numbers each"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NaViLImageProcessor(**settings)
    if settings.keys() <= {"min_pixels", "max_pixels", "scale_downsample_ratio"}:  # those of a call too
        with pytest.raises(ValueError, match=message):
            NaViLImageProcessor()(np.zeros((40, 40), np.uint8), **settings)


@pytest.mark.parametrize(
    "convert",
    [np.int64, np.float32, np.array, torch.tensor, lambda n: torch.tensor(n, dtype=torch.bfloat16), Fraction, Decimal],
    ids=["int64", "float32", "0-d array", "tensor", "bfloat16", "fraction", "decimal"],
)
def test_numbers_of_every_type_are_the_same_setting_of_a_constructor_or_call(convert):
    image = recorded_image(300, 200, 0)
    plain = NaViLImageProcessor(min_pixels=4096, max_pixels=65536, scale_downsample_ratio=0.5, multi_scale=True)
    budget = {"min_pixels": convert(4096), "max_pixels": convert(65536)}
    tau = convert(0.5) if convert is not np.int64 else 0.5
    given = NaViLImageProcessor(convert(16), convert(2), scale_downsample_ratio=tau, multi_scale=np.True_, **budget)
    assert given.to_json_string() == plain.to_json_string()
    by_call = NaViLImageProcessor()(image, scale_downsample_ratio=tau, multi_scale=np.True_, **budget)
    for features in (given(image), by_call):
        assert np.array_equal(features["pixel_values"], plain(image)["pixel_values"])
        assert features["num_scales"].tolist() == [3]


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, lambda values: [*map(np.float32, values)]])
def test_channel_values_are_any_three_numbers(convert):
    values = (0.25, 0.5, 1)
    processor = NaViLImageProcessor(image_mean=convert(values), image_std=convert(values))
    assert processor.image_mean == processor.image_std == [0.25, 0.5, 1.0]
    assert NaViLImageProcessor(**json.loads(processor.to_json_string())).image_std == [0.25, 0.5, 1.0]


def test_every_image_has_its_own_scales_and_may_have_its_own_budget():
    image, processor = recorded_image(300, 200, 0), NaViLImageProcessor(min_pixels=4096, multi_scale=True)
    own = {"type": "image", "image": image, "max_pixels": torch.tensor(9000.0)}
    unset = {"image": recorded_image(37, 53, 1), "min_pixels": None, "max_pixels": None}
    together = processor([image, own, unset], max_pixels=30000)
    alone = [processor(image, max_pixels=30000), processor(image, max_pixels=9000), processor(unset["image"])]
    for name in ("pixel_values", "image_grid_thw", "num_scales"):
        assert np.array_equal(together[name], np.concatenate([features[name] for features in alone]))
    assert together["num_scales"][0] > together["num_scales"][1] > together["num_scales"][2] == 1
    with pytest.raises(ValueError, match="got 4096 and 100"):
        processor({"image": image, "min_pixels": 4096, "max_pixels": 100})


@pytest.mark.parametrize(
    ("given", "budget"), [({"max_pixels": 4096}, (4096, 4096)), ({"min_pixels": 65536}, (65536, 65536))]
)
def test_one_given_limit_of_the_budget_moves_the_default_of_the_other(given, budget):
    processor, image = NaViLImageProcessor(min_pixels=16384, max_pixels=32768), recorded_image(300, 200, 0)
    expected = processor.plan(image, *budget)[0].scales
    assert processor.plan(image, **given)[0].scales == processor.plan({"image": image, **given})[0].scales == expected


def test_settings_given_to_from_pretrained_are_checked_and_kept(tmp_path):
    NaViLImageProcessor().save_pretrained(tmp_path)
    loaded = NaViLImageProcessor.from_pretrained(tmp_path, max_pixels=np.int64(300_000), multi_scale=np.True_)
    assert json.loads(loaded.to_json_string())["max_pixels"] == 300_000 and loaded.multi_scale is True
    for settings in ({"max_pixels": 1}, {"do_resize": True}):
        with pytest.raises(ValueError, match="max_pixels|do_resize"):
            NaViLImageProcessor.from_pretrained(tmp_path, **settings)


# -- forms of an image -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chart(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a #1 ü.png"
    recorded_image(50, 40, 3).save(path)
    return path


def as_base64(path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def as_array(path) -> np.ndarray:
    return np.array(Image.open(path))


FORMS = {
    "PIL": Image.open,
    "path": lambda path: path,
    "text": str,
    "NumPy text": np.str_,
    "file url": lambda path: path.as_uri(),
    "unquoted file url": lambda path: f"file://{path}",
    "data url": lambda path: "data:image/png;base64," + as_base64(path),
    "base64": as_base64,
    "base64 in lines": lambda path: base64.encodebytes(path.read_bytes()).decode(),
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "file in memory": lambda path: io.BytesIO(path.read_bytes()),
    "dataset": lambda path: {"bytes": path.read_bytes(), "path": "a mere name.png"},
    "dataset of paths": lambda path: {"bytes": None, "path": str(path)},
    "part": lambda path: {"type": "image", "image": path},
    "part with empty keys": lambda path: {"type": "image", "image": None, "text": None, "url": path.as_uri()},
    "part with an empty dataset": lambda path: {"image": {"bytes": None, "path": None}, "path": str(path)},
    "part with an empty OpenAI's": lambda path: {"image_url": {"url": None, "detail": None}, "path": str(path)},
    "part with base64": lambda path: {"type": "image", "base64": as_base64(path)},
    "part with a dataset's image": lambda path: {"type": "image", "image": {"bytes": path.read_bytes(), "path": None}},
    "OpenAI's part": lambda path: {"type": "image_url", "image_url": {"url": path.as_uri(), "detail": "auto"}},
    "OpenAI's part in short": lambda path: {"type": "image_url", "image_url": path.as_uri()},
    "int64": lambda path: as_array(path).astype(np.int64),
    "int16 tensor": lambda path: torch.from_numpy(as_array(path).astype(np.int16)).permute(2, 0, 1),
    "tensor with a gradient": lambda path: torch.from_numpy(as_array(path) / 255).requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_is_the_image_in_the_file(form, chart):
    processor = NaViLImageProcessor(min_pixels=1024, max_pixels=4096)
    expected = processor(recorded_image(50, 40, 3))["pixel_values"]
    assert np.array_equal(processor(form(chart))["pixel_values"], expected)
    assert np.array_equal(processor([form(chart), form(chart)])["pixel_values"], np.concatenate([expected, expected]))


def test_a_bfloat16_tensor_is_read_with_its_precision(chart):
    loaded = np.asarray(load_image(torch.from_numpy(as_array(chart) / 255).bfloat16())).astype(int)
    assert np.abs(loaded - as_array(chart)).max() <= 1  # 8 bits of mantissa


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
    "batch": lambda images: np.stack([as_array(image) for image in images]),
    "tensor batch": lambda images: torch.from_numpy(np.stack([as_array(image) for image in images])),
}


@pytest.mark.parametrize("collect", ITERABLES.values(), ids=ITERABLES)
def test_every_iterable_is_a_list_of_images(collect, chart, tmp_path):
    recorded_image(50, 40, 4).save(tmp_path / "other.png")
    images = [chart, tmp_path / "other.png"]
    processor = NaViLImageProcessor(min_pixels=1024, max_pixels=4096)
    assert np.array_equal(processor(collect(images))["pixel_values"], processor(images)["pixel_values"])


def cut_off_file() -> Image.Image:
    file = io.BytesIO()
    recorded_image(50, 40, 3).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:200]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (ROOT / "README.md", "cannot read an image from '.*README.md'"),
        ("no/such/file.jpg", "cannot read an image from 'no/such/file.jpg'"),
        (cut_off_file(), "cannot read an image from <PIL"),
        (Image.new("RGB", (0, 5)), "at least one pixel, got 0 x 5"),
        (np.zeros((6, 4, 5), np.uint8), r"\(6, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.full((4, 4, 3), 256), "integers from 0 to 255"),
        ({"type": "image", "image": None}, "needs one of image, bytes"),
        (7, "int"),
        ([], "at least one image"),
    ],
)
def test_bad_image(image, message):
    with pytest.raises(ValueError, match=message):
        NaViLImageProcessor()(image)


@pytest.mark.parametrize("text", ["data:image/png;base64," + "A" * 10**6, "A" * 10**6, "x/" * 10**5, b"A" * 10**6])
def test_a_long_source_is_cut_short_in_errors(text):
    with pytest.raises(ValueError, match="cannot read an image from") as raised:
        load_image(text)
    assert len(str(raised.value)) < 250


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
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/\u56fe 1.png"
        for form in (url, {"type": "image", "url": url}):
            assert np.array_equal(load_image(form), as_array(chart))
        with pytest.raises(ValueError, match=r"from 'http://127.*\.\.\..*x': HTTP Error 404") as raised:
            load_image(f"http://127.0.0.1:{server.server_port}/{'x' * 1000}")
        assert len(str(raised.value)) < 200
        server.shutdown()
    with pytest.raises(ValueError, match="cannot read an image from 'http://127.*refused"):
        load_image(url)


# -- pickling ----------------------------------------------------------------------------------------------------------

IN_EITHER_ORDER = """
import copy, pickle, sys, numpy, torch
from transformers import AutoImageProcessor, AutoModel, AutoProcessor
for folder, order in zip(sys.argv[1:], ((AutoModel, AutoProcessor), (AutoProcessor, AutoModel))):
    first, second, alone = (one.from_pretrained(folder, trust_remote_code=True) for one in (*order, AutoImageProcessor))
    model = first if order[0] is AutoModel else second
    for original in (first.image_processor, second.image_processor, alone):
        for clone in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
            assert clone.to_dict() == original.to_dict()
            assert clone(numpy.zeros((9, 9)))["num_scales"].tolist() == [1]
    clone = pickle.loads(pickle.dumps(model))
    assert all(map(torch.equal, clone.parameters(), model.parameters()))
"""


def test_a_model_is_pickled_whether_it_or_its_processor_was_loaded_first(recordings, tmp_path):
    source = recordings["qwen3"].folder
    folders = [shutil.copytree(source, tmp_path / name) for name in ("model_first", "processor_first")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", IN_EITHER_ORDER, *folders]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
