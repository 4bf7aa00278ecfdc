"""Shared fixtures."""

import json
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
BACKBONES = ("internlm2", "qwen3")

# Remote code is copied to a module cache: not the user's own. transformers reads this when it is imported.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="navil-modules-")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModel, AutoProcessor, AutoTokenizer  # noqa: E402

import convert_checkpoint  # noqa: E402


def recorded_image(width: int, height: int, seed: int) -> Image.Image:
    """The picture that the recordings were made with (fixtures/README.md)."""
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0] = (127.5 + 127.5 * np.sin(x / 7 + seed)).astype(np.uint8)
    pixels[..., 1] = (127.5 + 127.5 * np.cos(y / 5 + 2 * seed)).astype(np.uint8)
    pixels[..., 2] = (3 * x + 5 * y + 17 * seed) % 256
    return Image.fromarray(pixels)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def conversation(question: str, *images, **budget) -> list[dict]:
    """One message of a user: images, each with the same pixel budget, and a question."""
    parts = [{"type": "image", "image": image, **budget} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


@contextmanager
def refused(fact: str):
    """Expects a ValueError whose message contains `fact`."""
    with pytest.raises(ValueError) as raised:
        yield
    assert fact in str(raised.value)


def load_model(folder: str | Path, **options) -> torch.nn.Module:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **options).eval()


def load_tokenizer(folder: str | Path, **options):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **options)


class Loaded:
    """A checkpoint, loaded through the Auto classes."""

    def __init__(self, folder: Path, **options):
        self.folder = folder
        self.model = load_model(folder, **options)
        self.tokenizer = load_tokenizer(folder, use_fast=False, **options)
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, **options)

    def encode(self, *conversations: list[dict], **options) -> dict[str, torch.Tensor]:
        """Inputs of `generate` for a batch of conversations."""
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True, **options}
        return self.processor.apply_chat_template(list(conversations), **options)

    def generate(self, inputs: dict[str, torch.Tensor], **settings) -> torch.Tensor:
        """New ids only, 8 unless the settings say otherwise."""
        output = self.model.generate(**inputs, **{"max_new_tokens": 8, **settings})
        return output[:, inputs["input_ids"].shape[1] :]

    def chat(self, images=None, question: str = "What is it?", settings: dict | None = None, **options):
        """An answer of 6 tokens unless the settings say otherwise."""
        return self.model.chat(self.tokenizer, images, question, settings or {"max_new_tokens": 6}, **options)


class Recording(Loaded):
    """One recorded checkpoint, converted, with its recorded cases."""

    def __init__(self, name: str, folder: Path):
        self.source = FIXTURES / name
        assert convert_checkpoint.main(["official", str(self.source), str(folder)]) == 0
        super().__init__(folder)
        self.cases = {case["name"]: case for case in json.loads((self.source / "cases.json").read_text())["cases"]}
        self._tensors = load_file(self.source / "cases.safetensors")

    def tensors(self, case: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(f"{case}."): t for name, t in self._tensors.items() if name.startswith(f"{case}.")}

    def inputs(self, case: str) -> dict[str, torch.Tensor]:
        """Recorded inputs of a forward pass."""
        names = ("input_ids", "pixel_values", "image_grid_thw", "num_scales")
        return {name: tensor for name, tensor in self.tensors(case).items() if name in names}

    def images(self, case: str) -> list[Image.Image] | None:
        return [recorded_image(*image) for image in self.cases[case]["images"]] or None

    def history(self, case: str) -> list[tuple[str, str]] | None:
        history = self.cases[case]["history"]
        return None if history is None else [tuple(turn) for turn in history]


@pytest.fixture(scope="session")
def recordings(tmp_path_factory) -> dict[str, Recording]:
    folder = tmp_path_factory.mktemp("converted")
    return {name: Recording(name, folder / name) for name in BACKBONES}


@pytest.fixture(params=BACKBONES)
def recording(request, recordings) -> Recording:
    return recordings[request.param]


@pytest.fixture(scope="session")
def tiny() -> Loaded:
    """The embedded checkpoint, for tests that do not change it."""
    return Loaded(ROOT, subfolder="tiny")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
