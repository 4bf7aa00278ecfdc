"""Pushing to a Hub and loading from it, by the real client against a server on the loopback interface."""

import os
import subprocess
import sys

from conftest import FIXTURES, ROOT, recorded_image
from fresh_process import save_expected
from hub_server import HubServer
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


def test_models_are_pushed_and_load_elsewhere(recordings, tmp_path):
    """A conversion, and a model, tokenizer and processor that were loaded and are pushed one by one.

    A conversion without a token or to an impossible name is refused before it starts.
    """

    def run(hub, *command, **extra):
        """In a process with this Hub and a cache of its own, which is empty."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, *map(str, command)]
        options = {"capture_output": True, "text": True, "timeout": 300, "cwd": tmp_path, "env": environment | extra}
        finished = subprocess.run(command, **options)
        assert finished.returncode == 0, finished.stderr

    folder = tmp_path / "converted"
    with HubServer() as hub:
        arguments = (FIXTURES / "internlm2", folder, recordings["qwen3"].folder)
        run(hub, "-c", PUBLISH, *arguments, HF_HOME=str(tmp_path / "cache"), HF_TOKEN=hub.token)
        assert hub.commits.keys() == {CONVERTED, SAVED}
        assert hub.commits[CONVERTED] == [{}, {path.name: path.read_bytes() for path in folder.iterdir()}]
        files = hub.commits[SAVED][-1].keys()
        assert {*CODE_FILES, "config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= files

        names, image = {"internlm2": CONVERTED, "qwen3": SAVED}, recorded_image(90, 60, 0)
        expected = [save_expected(recordings[key], name, tmp_path / key, image) for key, name in names.items()]
        run(hub, ROOT / "tests" / "fresh_process.py", *expected, HF_HOME=str(tmp_path / "another-cache"))
        assert [*(tmp_path / "another-cache").rglob("modeling_navil.py")]  # the code is the Hub's


def test_model_cards_are_valid(recordings):
    folders = (ROOT, ROOT / "tiny", *(recording.folder for recording in recordings.values()))
    for path in (folder / "README.md" for folder in folders):
        card = ModelCard.load(path, ignore_metadata_errors=False)
        metadata = card.data.to_dict()
        assert metadata["license"] == "mit" and metadata["library_name"] == "transformers"
        assert metadata["pipeline_tag"] == "image-text-to-text" and "custom_code" in metadata["tags"]
        assert card.text.strip().startswith("#")
