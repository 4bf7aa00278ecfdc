"""The fast image processor: its levels next to the exact one's, its plans, devices, loading and saving.

`python -m benchmarks.fast_images` measures the differences on more pictures, and the speed.
"""

import copy
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, recorded_image, refused, relative_error
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from navil import image_processing_navil
from navil.image_processing_navil import (
    NaViLImageProcessor,
    NaViLImageProcessorFast,
    resize_by_torch,
    resize_exactly,
)

LARGEST, MEAN = 2, 0.05  # of 255 levels
BUDGET = {"min_pixels": 4096, "max_pixels": 65536, "multi_scale": True}


def levels(features) -> np.ndarray:
    """The bytes that were normalized, from `pixel_values`."""
    return np.round((np.asarray(features["pixel_values"], np.float64) + 1) * 127.5).astype(int)


def assert_close(image, **settings):
    settings = BUDGET | settings
    exact, fast = (cls()(image, **settings) for cls in (NaViLImageProcessor, NaViLImageProcessorFast))
    for name in ("image_grid_thw", "num_scales"):
        assert np.array_equal(exact[name], fast[name])
    assert fast["pixel_values"].dtype == np.float32 and fast["pixel_values"].shape == exact["pixel_values"].shape
    difference = np.abs(levels(exact) - levels(fast))
    assert difference.max() <= LARGEST
    assert difference.mean() <= MEAN or difference.size < 10_000


def noise(width: int, height: int) -> np.ndarray:
    """Black and white pixels: the sharpest picture there is."""
    return np.random.default_rng(width + height).integers(0, 2, (height, width, 3), np.uint8) * 255


SIZES = [(1, 1), (2, 1), (1, 2), (1, 200), (200, 1), (3, 599), (8, 1600), (1600, 8), (37, 53), (100, 700), (700, 100)]
SIZES += [(640, 480), (256, 256), (255, 257), (199, 803), (801, 400)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_levels_are_nearly_the_exact_ones(size):
    assert_close(noise(*size))
    assert_close(recorded_image(*size, 1), multi_scale=False)
    assert_close(recorded_image(*size, 2), max_pixels=4096, scale_downsample_ratio=0.5)


def test_an_image_of_its_own_size_is_not_changed():
    image = noise(96, 64)
    exact, fast = (
        cls()(image, min_pixels=1, max_pixels=96 * 64) for cls in (NaViLImageProcessor, NaViLImageProcessorFast)
    )
    assert np.array_equal(exact["pixel_values"], fast["pixel_values"])


@pytest.mark.parametrize("patch_size", [4, 5])
def test_each_channel_has_its_own_mean_and_deviation(patch_size):
    settings = {"patch_size": patch_size, "image_mean": (0.48, 0.45, 0.4), "image_std": (0.27, 0.26, 0.28)}
    settings |= {"min_pixels": 1, "max_pixels": 10_000}
    exact, fast = (cls(**settings)(noise(60, 40)) for cls in (NaViLImageProcessor, NaViLImageProcessorFast))
    assert np.array_equal(exact["pixel_values"], fast["pixel_values"])


def turned_jpeg(width: int, height: int) -> bytes:
    """A file that its EXIF orientation turns by 90 degrees."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    recorded_image(width, height, 0).save(file, "JPEG", exif=exif)
    return file.getvalue()


PICTURE = recorded_image(300, 200, 3)
FORMS = {
    "turned file": turned_jpeg(300, 100),
    "file decoded at a fraction": turned_jpeg(1800, 1200),
    "gray": PICTURE.convert("L"),
    "palette": PICTURE.convert("P"),
    "transparent": PICTURE.convert("RGBA"),
    "CMYK": PICTURE.convert("CMYK"),
    "16 bits": Image.fromarray(np.arange(40_000, dtype=np.uint16).reshape(200, 200)),
    "array": np.asarray(PICTURE),
    "floats, channels first": np.asarray(PICTURE).transpose(2, 0, 1) / 255,
    "bfloat16 tensor": (torch.from_numpy(np.array(PICTURE)) / 255).bfloat16(),
    "part with a budget": {"type": "image", "image": PICTURE, "max_pixels": 9_000},
    "several": [PICTURE, noise(50, 90), [turned_jpeg(64, 300)]],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_an_image(form):
    assert_close(form)


def test_the_order_of_the_passes_is_pillows():
    """Pillow 13 resizes tall images the other way around; the wrong order would differ by 30 levels."""
    for (height, width), (new_height, new_width) in (((700, 150), (340, 72)), ((300, 400), (140, 200))):
        image = noise(width, height)
        exact = np.asarray(resize_exactly(Image.fromarray(image), (new_height, new_width)), int)
        for dtype in (torch.uint8, torch.float32):
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(dtype)
            resized = resize_by_torch(pixels, (new_height, new_width))
            assert resized.dtype == torch.uint8 and np.abs(resized.numpy() - exact).max() <= LARGEST


def test_logits_of_the_recordings(recording):
    fast = NaViLImageProcessorFast.from_pretrained(recording.folder)
    for case in ("single", "two_images", "multi_turn"):
        inputs = recording.inputs(case)
        packed = fast(recording.images(case), multi_scale=True, return_tensors="pt")
        assert torch.equal(packed["image_grid_thw"], inputs["image_grid_thw"])
        with torch.no_grad():
            logits = recording.model(**inputs | {"pixel_values": packed["pixel_values"]}).logits
        assert relative_error(logits, recording.tensors(case)["logits"]) < 0.005


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [5, 16])
def test_normalizing_on_a_device_gives_the_same_bits(patch_size):
    mean, std = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
    processor = NaViLImageProcessor(patch_size, image_mean=mean, image_std=std)
    for size in ((1, 1), (50, 33), (600, 500)):
        image = noise(*size[::-1])
        rows, columns = (-(-side // processor.cell) * 2 for side in size)
        on_cpu, on_device = torch.zeros(2, rows * columns, 3 * patch_size**2)
        processor._write_patches(Image.fromarray(image), size, on_cpu)
        processor._write_patches(torch.from_numpy(image), size, on_device)
        assert torch.equal(on_cpu, on_device) and on_cpu.abs().sum() > 0


@pytest.mark.parametrize("cls", [NaViLImageProcessor, NaViLImageProcessorFast])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_patches_on_a_gpu(cls):
    images = [noise(700, 500), noise(30, 900), recorded_image(1200, 900, 0)]
    expected = NaViLImageProcessor()(images, multi_scale=True, return_tensors="pt")
    with torch.cuda.stream(torch.cuda.Stream()):
        given = cls()(images, multi_scale=True, return_tensors="pt", device="cuda")
        pixels = given["pixel_values"].cpu()
    assert given["pixel_values"].is_cuda and given["pixel_values"].dtype == torch.float32
    assert torch.equal(given["image_grid_thw"], expected["image_grid_thw"])
    if cls is NaViLImageProcessor:
        assert torch.equal(pixels, expected["pixel_values"])
    assert np.abs(levels({"pixel_values": pixels}) - levels(expected)).max() <= LARGEST


@pytest.mark.parametrize("cls", [NaViLImageProcessor, NaViLImageProcessorFast])
def test_the_cpu_may_be_named(cls):
    expected = cls()(PICTURE, **BUDGET)["pixel_values"]
    for device in ("cpu", "cpu:0", torch.device("cpu")):
        assert np.array_equal(cls()(PICTURE, **BUDGET, device=device)["pixel_values"], expected)
    tensors = cls()(PICTURE, **BUDGET, device="cpu", return_tensors="pt")["pixel_values"]
    assert torch.equal(tensors, torch.from_numpy(expected))


BAD_DEVICES = [("meta", "must hold data, got 'meta'"), ("gpu", "device='gpu'"), (3.5, "device=3.5")]
BAD_DEVICES += [] if torch.cuda.is_available() else [("cuda", "device='cuda'"), (torch.device("cuda", 1), "index=1")]


@pytest.mark.parametrize(("device", "message"), BAD_DEVICES, ids=str)
def test_devices_that_cannot_be_used(device, message, recording):
    for processor in (NaViLImageProcessor(), NaViLImageProcessorFast()):
        with refused(message):
            processor(PICTURE, device=device, return_tensors="pt")
    for settings in ({"device": device}, {"images_kwargs": {"device": device}}):
        with refused(message):
            recording.processor(images=PICTURE, text="<image>", return_tensors="pt", **settings)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": PICTURE}]},
        {"role": "assistant", "content": "a"},
    ]
    with refused(message):
        recording.processor.training_batch([{"messages": messages}], device=device)


def test_arrays_are_on_the_cpu(monkeypatch):
    monkeypatch.setattr(image_processing_navil.torch, "empty", lambda *_, **__: None)  # as if there were a GPU
    with refused("device='cuda' needs return_tensors='pt', got None"):
        NaViLImageProcessorFast()(PICTURE, device="cuda")


# -- users of the image processor --------------------------------------------------------------------------------------


def test_chat_and_training_take_the_fast_processor(recordings):
    recording = recordings["qwen3"]
    model, processor = copy.copy(recording.model), copy.copy(recording.processor)
    fast = AutoImageProcessor.from_pretrained(recording.folder, trust_remote_code=True, use_fast=True)
    model.image_processor = processor.image_processor = fast
    packed = []
    fast._write_patches = lambda *args: packed.append(args) or type(fast)._write_patches(fast, *args)
    settings = {"max_new_tokens": 4}
    assert isinstance(model.chat(recording.tokenizer, PICTURE, "What?", settings), str) and packed
    session = model.chat_session(recording.tokenizer, settings)
    assert session.ask("What?", PICTURE) == model.chat(recording.tokenizer, PICTURE, "What?", settings)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": PICTURE}]},
        {"role": "assistant", "content": "a"},
    ]
    batches = [p.training_batch([{"messages": messages}], device="cpu") for p in (processor, recording.processor)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    difference = np.abs(levels(batches[0]) - levels(batches[1]))
    assert 0 < difference.max() <= LARGEST


# -- loading and saving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto_class", [AutoImageProcessor, AutoProcessor])
def test_use_fast_and_backend_choose_the_class(auto_class, recording, tmp_path):
    def load(folder, **options):
        loaded = auto_class.from_pretrained(folder, trust_remote_code=True, **options)
        return getattr(loaded, "image_processor", loaded)

    exact, fast = "NaViLImageProcessor", "NaViLImageProcessorFast"
    choices = [({}, None), ({"use_fast": None}, None), ({"use_fast": False}, exact), ({"use_fast": True}, fast)]
    choices += [({"backend": "pil"}, exact), ({"backend": "torchvision"}, fast)]
    for folder, default in ((recording.folder, exact), (tmp_path, fast)):
        for options, expected in choices:
            assert type(load(folder, **options)).__name__ == (expected or default)
        saved = recording.processor.__class__(load(folder, use_fast=True, max_pixels=50_000), recording.tokenizer)
        saved.save_pretrained(tmp_path)
        recording.model.save_pretrained(tmp_path)  # transformers 5 looks into config.json first
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["auto_map"]["AutoImageProcessor"] == "image_processing_navil.NaViLImageProcessorFast"
    assert load(tmp_path).max_pixels == 50_000
    with refused("backend must be torchvision (the fast image processor) or pil, got 'numpy'"):
        load(tmp_path, backend="numpy")


def test_a_class_may_load_the_others_folder(tmp_path):
    for saved, loaded in (
        (NaViLImageProcessor, NaViLImageProcessorFast),
        (NaViLImageProcessorFast, NaViLImageProcessor),
    ):
        saved(max_pixels=80_000).save_pretrained(tmp_path)
        again = loaded.from_pretrained(tmp_path)
        assert type(again) is loaded and again.max_pixels == 80_000
        assert type(loaded.from_pretrained(tmp_path, use_fast=True)) is NaViLImageProcessorFast
        assert type(loaded.from_pretrained(tmp_path, backend="pil")) is NaViLImageProcessor


FRESH_PROCESS = """
import pickle, sys
import transformers
from transformers import AutoImageProcessor, AutoProcessor
root, image, folder = sys.argv[1:]
options = {"subfolder": "tiny", "trust_remote_code": True}
is_deprecated = hasattr(transformers, "TorchvisionBackend")  # use_fast, in later versions of transformers 5
for option in ({"backend": "torchvision"}, {} if is_deprecated else {"use_fast": True}):
    for auto_class in (AutoImageProcessor, AutoProcessor):
        loaded = auto_class.from_pretrained(root, **options, **option)
        loaded.save_pretrained(folder)
        again = auto_class.from_pretrained(folder, trust_remote_code=True)
        for processor in (loaded, again, pickle.loads(pickle.dumps(again))):
            processor = getattr(processor, "image_processor", processor)
            assert type(processor).__name__ == "NaViLImageProcessor" + "Fast" * bool(option)
            print(processor(image)["image_grid_thw"].tolist())
"""


def test_a_fresh_process_loads_both_without_a_warning(tmp_path):
    command = [sys.executable, "-c", FRESH_PROCESS, ROOT, ROOT / "examples" / "chart.png", tmp_path / "saved"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "TQDM_DISABLE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    grids = NaViLImageProcessor.from_pretrained(ROOT / "tiny")(ROOT / "examples" / "chart.png")["image_grid_thw"]
    assert run.stdout.splitlines() == 12 * [str(grids.tolist())]
