"""Pushing to a Hub and loading from it, by the real client against a server on the loopback interface."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import FIXTURES, ROOT, recorded_image
from hub_server import HubServer, card_errors
from huggingface_hub import ModelCard

from navil import CODE_FILES

CONVERTED, SAVED = "tester/navil-converted", "tester/navil-small"

PUBLISH = f"""
import contextlib, io, os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import convert_checkpoint
from transformers import AutoModel, AutoProcessor, AutoTokenizer
source, converted, saved = sys.argv[1:]

def convert(name):
    messages = io.StringIO()
    with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(messages):
        code = convert_checkpoint.main(["official", source, converted, "--push-to-hub", name])
    return code, messages.getvalue()

code, message = convert("tester/a/b")
assert code == 1 and "'tester/a/b'" in message, message
token = os.environ.pop("HF_TOKEN")
code, message = convert("tester/a")
assert code == 1 and "hf auth login" in message, message
assert not Path(converted).exists(), "converted before it was refused"
os.environ["HF_TOKEN"] = token
code, message = convert("{CONVERTED}")
assert code == 0 and os.environ["HF_ENDPOINT"] + "/{CONVERTED}" in message, message
for auto_class in (AutoModel, AutoTokenizer, AutoProcessor):
    auto_class.from_pretrained(saved, trust_remote_code=True).push_to_hub("{SAVED}")
"""

LOAD = """
import sys, torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer
for path in sys.argv[1:]:
    saved = torch.load(path)
    name = saved["name"]
    model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(**saved["inputs"]).logits
    assert torch.equal(logits, saved["logits"]), (logits - saved["logits"]).abs().max()
    assert sys.modules[type(model).__module__].__file__.startswith(path.rsplit("/", 1)[0]), "code from elsewhere"
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert AutoConfig.from_pretrained(name, trust_remote_code=True).vision_config.patch_size == 16
    images = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
    for setting, value in saved["image settings"].items():
        assert getattr(images, setting) == getattr(processor.image_processor, setting) == value, setting
    assert model.chat(tokenizer, saved["image"], "What is it?", {"max_new_tokens": 6}) == saved["answer"]
"""


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        yield server


def save_expected(recording, name, path):
    """What the model gives that will be pushed under this name."""
    inputs, image = recording.inputs("single"), recorded_image(90, 60, 0)
    with torch.no_grad():
        logits = recording.model(**inputs).logits
    answer = recording.model.chat(recording.tokenizer, image, "What is it?", {"max_new_tokens": 6})
    names = ("patch_size", "merge_size", "min_pixels", "max_pixels", "scale_downsample_ratio")
    settings = {name: getattr(recording.processor.image_processor, name) for name in names}
    image.save(path.with_suffix(".png"))
    saved = {"name": name, "inputs": inputs, "logits": logits, "image": str(path.with_suffix(".png"))}
    torch.save(saved | {"answer": answer, "image settings": settings}, path)
    return path


def test_models_are_pushed_and_load_elsewhere(recordings, hub, tmp_path):
    """A conversion, and a model, tokenizer and processor that were loaded and are pushed one by one.

    A conversion without a token or to an impossible name is refused before it starts.
    """

    def run(script, *arguments, **extra):
        """In a process with this Hub and a cache of its own, which is empty."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"HF_HUB_DISABLE_XET": "1", **extra}  # the server stores large files by LFS
        command = [sys.executable, "-c", script, *map(str, arguments)]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr

    folder = tmp_path / "converted"
    arguments = (FIXTURES / "internlm2", folder, recordings["qwen3"].folder)
    run(PUBLISH, *arguments, HF_HOME=str(tmp_path / "cache"), HF_TOKEN=hub.token)
    assert hub.repositories.keys() == {CONVERTED, SAVED}
    repository = hub.repositories[CONVERTED]
    assert len(repository.commits) == 2  # the empty repository's, and one for all files
    for path in folder.iterdir():
        assert (hub.objects / repository.files[path.name][0]).read_bytes() == path.read_bytes()
    files = hub.repositories[SAVED].files.keys()
    assert {*CODE_FILES, "config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= files
    assert any(request.startswith("PUT /lfs/upload/") for request in hub.requests)

    names = {"internlm2": CONVERTED, "qwen3": SAVED}
    expected = [save_expected(recordings[key], name, tmp_path / f"{key}.pt") for key, name in names.items()]
    run(LOAD, *expected, HF_HOME=str(tmp_path / "another-cache"))


def test_a_damaged_upload_is_refused(hub):
    with pytest.raises(Exception, match="the content is not"):
        hub.lfs_upload(b"other bytes", "0" * 64)


def test_model_cards_are_valid(recordings):
    folders = (ROOT, ROOT / "tiny", *(recording.folder for recording in recordings.values()))
    for path in (folder / "README.md" for folder in folders):
        card = ModelCard.load(path, ignore_metadata_errors=False)
        metadata = card.data.to_dict()
        assert metadata["license"] == "mit" and metadata["library_name"] == "transformers"
        assert metadata["pipeline_tag"] == "image-text-to-text" and "custom_code" in metadata["tags"]
        assert card.text.strip().startswith("#")
        assert card_errors(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("metadata", ["license: [a", "pipeline_tag: see", "tags: navil", "license: My own!"])
def test_bad_card_is_found(metadata):
    assert card_errors(f"---\n{metadata}\n---\n")
