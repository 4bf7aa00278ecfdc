"""Images to packed patches: the released grids and pixels, settings, and every form of an image."""

import base64
import hashlib
import io
import json
import threading
from decimal import Decimal
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import FIXTURES, recorded_image, refused
from PIL import Image
from safetensors.torch import load_file

from navil.image_processing_navil import NaViLImageProcessor, load_image, patchify

FOLDER = FIXTURES / "image_processing"
CASES = json.loads((FOLDER / "cases.json").read_text())


BUDGET = {"min_pixels": 4096, "max_pixels": 65536}


def processor_for(case: dict) -> NaViLImageProcessor:
    budget = {"min_pixels": case["min_patches"] * 256, "max_pixels": case["max_patches"] * 256}
    return NaViLImageProcessor(**budget, scale_downsample_ratio=case["ratio"])


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
    image, processor = recorded_image(200, 130, 13), NaViLImageProcessor()
    one, many = (processor(image, **BUDGET, multi_scale=multi_scale) for multi_scale in (False, True))
    assert one["image_grid_thw"].tolist() == [[1, 10, 14]] == many["image_grid_thw"][-1:].tolist()
    assert np.array_equal(one["pixel_values"], many["pixel_values"][-140:])


def test_every_image_has_the_whole_budget_or_its_own():
    image, processor = recorded_image(300, 200, 0), NaViLImageProcessor(min_pixels=4096, multi_scale=True)
    own = {"type": "image", "image": image, "max_pixels": torch.tensor(9000.0)}
    together = processor([image, own, {"image": image, "min_pixels": None, "max_pixels": None}], max_pixels=30000)
    large, small = processor(image, max_pixels=30000), processor(image, max_pixels=9000)
    assert large["num_scales"] > small["num_scales"]
    for name in ("pixel_values", "image_grid_thw", "num_scales"):
        assert np.array_equal(together[name], np.concatenate([features[name] for features in (large, small, large)]))
    with refused("got 4096 and 100"):
        processor({"image": image, "min_pixels": 4096, "max_pixels": 100})


@pytest.mark.parametrize("given", [{"max_pixels": 4096}, {"min_pixels": 65536}], ids=str)
def test_a_given_end_of_the_budget_moves_the_default_of_the_other(given):
    image, processor = recorded_image(300, 200, 0), NaViLImageProcessor(min_pixels=16384, max_pixels=32768)
    [value] = given.values()
    expected = processor(image, min_pixels=value, max_pixels=value)["image_grid_thw"].tolist()
    assert processor(image, **given)["image_grid_thw"].tolist() == expected
    assert processor({"image": image, **given})["image_grid_thw"].tolist() == expected
    with refused("need 0 < min_pixels <= max_pixels, got 5000 and 4096"):
        processor(image, min_pixels=5000, max_pixels=4096)


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


# -- settings ----------------------------------------------------------------------------------------------------------
BAD_SETTINGS = [
    ({"min_pixels": 100, "max_pixels": 99}, "100 and 99"),
    ({"min_pixels": 0}, "0 and"),
    ({"max_pixels": float("nan")}, "and nan"),
    ({"max_pixels": "many"}, "could not convert string to float: 'many'"),
    ({"scale_downsample_ratio": 1.0}, "1.0"),
    ({"do_resize": True}, "do_resize must be False"),
    ({"do_pad": False}, "do_pad must be True"),
    ({"do_rescale": 0}, "do_rescale must be True"),
    ({"size": {"height": 9}}, "no setting size={'height': 9}"),
    ({"max_pixel": 300_000}, "no setting max_pixel=300000"),
    ({"max_pixel": 300_000}, "min_pixels, max_pixels, scale_downsample_ratio, multi_scale"),
    ({"patch_size": 16.5}, "patch_size must be a whole number of at least 1, got 16.5"),
    ({"merge_size": 0}, "merge_size must be a whole number of at least 1, got 0"),
    ({"image_mean": [0.5]}, "3 numbers each"),
    ({"image_std": (0.5, 0, 0.5)}, "3 numbers each"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=str)
def test_bad_settings_are_refused_by_constructor_from_pretrained_and_call(settings, message, tmp_path):
    with refused(message):
        NaViLImageProcessor(**settings)
    if settings.keys().isdisjoint({"size", "max_pixel"}):  # transformers drops unknown settings here
        NaViLImageProcessor().save_pretrained(tmp_path)
        with refused(message):
            NaViLImageProcessor.from_pretrained(tmp_path, **settings)
    if settings.keys().isdisjoint({"patch_size", "merge_size", "image_mean", "image_std"}):
        with refused(message):
            NaViLImageProcessor()(recorded_image(40, 40, 0), **settings)


def test_released_switches_change_nothing():
    image, processor = recorded_image(90, 60, 0), NaViLImageProcessor(min_pixels=1024, max_pixels=4096)
    switches = {"do_convert_rgb": True, "do_rescale": np.True_, "do_normalize": torch.tensor(True), "size": None}
    features = processor(image, **switches, do_resize=False, do_pad=True)
    assert np.array_equal(features["pixel_values"], processor(image)["pixel_values"])


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
def test_numbers_of_every_type_are_the_same_setting(convert, tmp_path):
    image = recorded_image(300, 200, 0)
    plain = NaViLImageProcessor(**BUDGET, scale_downsample_ratio=0.5, multi_scale=True, image_mean=(1, 0, 1))
    expected = plain(image)["pixel_values"]
    budget = {"min_pixels": convert(4096), "max_pixels": convert(65536), "multi_scale": np.True_}
    budget["scale_downsample_ratio"] = convert(0.5) if convert is not np.int64 else 0.5
    mean = [convert(1), convert(0), convert(1)]
    given = NaViLImageProcessor(convert(16), convert(2), image_mean=mean, **budget)
    assert given.to_json_string() == plain.to_json_string()
    NaViLImageProcessor(image_mean=np.array((1, 0, 1))).save_pretrained(tmp_path)
    loaded = NaViLImageProcessor.from_pretrained(tmp_path, **budget)
    by_call = NaViLImageProcessor(image_mean=torch.tensor((1, 0, 1)))(image, **budget)
    for features in (given(image), loaded(image), by_call):
        assert np.array_equal(features["pixel_values"], expected)


# -- forms of an image -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def chart(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a #1 ü.png"
    recorded_image(50, 40, 3).save(path)
    return path


def as_base64(path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


FORMS = {
    "path": lambda path: path,
    "text": str,
    "NumPy text": np.str_,
    "PIL image": Image.open,
    "file url": lambda path: path.as_uri(),
    "unquoted file url": lambda path: f"file://{path}",
    "data url": lambda path: "data:image/png;base64," + as_base64(path),
    "base64 in lines": lambda path: base64.encodebytes(path.read_bytes()).decode(),
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "file in memory": lambda path: io.BytesIO(path.read_bytes()),
    "dataset": lambda path: {"bytes": path.read_bytes(), "path": "a mere name.png"},
    "dataset of paths": lambda path: {"bytes": None, "path": str(path)},
    "part with empty keys": lambda path: {"type": "image", "image": None, "text": None, "url": path.as_uri()},
    "part with base64": lambda path: {"type": "image", "base64": as_base64(path)},
    "part with a dataset's image": lambda path: {"type": "image", "image": {"bytes": path.read_bytes(), "path": None}},
    "part with an empty dataset's image": lambda path: {"path": str(path), "image": {"bytes": None, "path": None}},
    "part with an empty URL": lambda path: {"path": str(path), "image_url": {"url": None, "detail": None}},
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


class Pictures(SimpleHTTPRequestHandler):
    """Serves clients that say who they are."""

    def do_GET(self):
        super().do_GET() if "navil" in self.headers["User-Agent"] else self.send_error(403)

    def log_message(self, *args):
        pass


def test_downloads(chart, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "图 1.png").write_bytes(chart.read_bytes())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Pictures, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/图 1.png"
        for form in (url, {"type": "image", "url": url}):
            assert load_image(form).tobytes() == load_image(chart).tobytes()
        shortened = r"cannot read an image from 'http://127.*\.\.\..*x': HTTP Error 404"
        with pytest.raises(ValueError, match=shortened) as raised:
            load_image(f"http://127.0.0.1:{server.server_port}/{'x' * 200}")
        assert len(str(raised.value)) < 200
        server.shutdown()
    with pytest.raises(ValueError, match="cannot read an image from 'http://127.*refused"):
        load_image(url)


@pytest.mark.parametrize("text", ["data:image/png;base64," + "A" * 10**6, "A" * 10**6, "x/" * 10**5, b"A" * 10**6])
def test_a_long_source_is_cut_short_in_errors(text):
    with pytest.raises(ValueError, match="cannot read an image from") as raised:
        load_image(text)
    assert len(str(raised.value)) < 250
