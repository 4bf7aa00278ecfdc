"""Pushing to a Hub and loading from it, by the real client against a server on the loopback interface."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import FIXTURES, ROOT, recorded_image
from hub_server import HubServer, card_errors
from huggingface_hub import ModelCard

PUSH = """
import sys, torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer
folder, name = sys.argv[1:]
AutoModel.from_pretrained(folder, trust_remote_code=True).push_to_hub(name)
AutoTokenizer.from_pretrained(folder, trust_remote_code=True).push_to_hub(name)
AutoProcessor.from_pretrained(folder, trust_remote_code=True).push_to_hub(name)
"""

LOAD = """
import sys, torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer
name, expected = sys.argv[1:]
model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
saved = torch.load(expected)
with torch.no_grad():
    logits = model(**saved["inputs"]).logits
assert torch.equal(logits, saved["logits"]), (logits - saved["logits"]).abs().max()
assert sys.modules[type(model).__module__].__file__.startswith(sys.argv[2].rsplit("/", 1)[0]), "code from elsewhere"
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
assert AutoConfig.from_pretrained(name, trust_remote_code=True).vision_config.patch_size == 16
images = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
for name, value in saved["image settings"].items():
    assert getattr(images, name) == getattr(processor.image_processor, name) == value, name
assert model.chat(tokenizer, saved["image"], "What is it?", {"max_new_tokens": 6}) == saved["answer"]
"""


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """Runs Python in a process that knows this Hub, its token and caches of its own, all empty at first."""

    def run(*arguments, token=True, cache="cache"):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_HOME": str(tmp_path / cache), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"HF_HUB_DISABLE_XET": "1"}  # the server stores large files by LFS
        environment |= {"HF_TOKEN": hub.token} if token else {}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)

    return run


def save_expected(recording, path):
    inputs, image = recording.inputs("single"), recorded_image(90, 60, 0)
    with torch.no_grad():
        logits = recording.model(**inputs).logits
    answer = recording.model.chat(recording.tokenizer, image, "What is it?", {"max_new_tokens": 6})
    names = ("patch_size", "merge_size", "min_pixels", "max_pixels", "scale_downsample_ratio")
    settings = {name: getattr(recording.processor.image_processor, name) for name in names}
    image.save(path.parent / "image.png")
    saved = {"inputs": inputs, "logits": logits, "image": str(path.parent / "image.png"), "answer": answer}
    torch.save({**saved, "image settings": settings}, path)


def assert_loads(run, name, expected):
    loaded = run("-c", LOAD, name, expected, token=False, cache="another-cache")
    assert loaded.returncode == 0, loaded.stderr


def test_model_tokenizer_and_processor_are_pushed_and_load_elsewhere(recordings, hub, run, tmp_path):
    recording = recordings["qwen3"]
    save_expected(recording, tmp_path / "expected.pt")
    pushed = run("-c", PUSH, recording.folder, "tester/navil-small")
    assert pushed.returncode == 0, pushed.stderr
    _, files = hub.repository("tester/navil-small").at("main")
    code = {path.name for path in ROOT.glob("*_navil.py")}
    assert code | {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= files.keys()
    assert any(request.startswith("PUT /lfs/upload/") for request in hub.requests)
    assert_loads(run, "tester/navil-small", tmp_path / "expected.pt")


def test_converted_folder_is_pushed_as_it_is(recordings, hub, run, tmp_path):
    save_expected(recordings["internlm2"], tmp_path / "expected.pt")
    command = [ROOT / "convert_checkpoint.py", "official", FIXTURES / "internlm2", tmp_path / "converted"]
    pushed = run(*command, "--push-to-hub", "tester/navil-converted")
    assert pushed.returncode == 0, pushed.stderr
    assert f"{hub.endpoint}/tester/navil-converted" in pushed.stdout
    repository = hub.repository("tester/navil-converted")
    sha, files = repository.at("main")
    for path in (tmp_path / "converted").iterdir():
        assert (hub.objects / files[path.name][0]).read_bytes() == path.read_bytes()
    assert len(repository.commits) == 2  # the empty repository's and one for all files
    assert_loads(run, "tester/navil-converted", tmp_path / "expected.pt")


def test_pushing_without_a_token_or_to_no_name_is_refused_before_converting(hub, run, tmp_path):
    command = [ROOT / "convert_checkpoint.py", "official", FIXTURES / "internlm2", tmp_path / "converted"]
    for name, token, message in (("tester/a", False, "hf auth login"), ("tester/a/b", True, "'tester/a/b'")):
        refused = run(*command, "--push-to-hub", name, token=token)
        assert refused.returncode == 1 and message in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "converted").exists() and not hub.repositories


def test_a_damaged_upload_is_refused(hub):
    oid = "0" * 64
    with pytest.raises(Exception, match="the content is not"):
        hub.lfs_upload(b"other bytes", oid)


def cards(recordings):
    return [ROOT / "README.md", ROOT / "tiny" / "README.md", *(r.folder / "README.md" for r in recordings.values())]


def test_model_cards_are_valid(recordings):
    for path in cards(recordings):
        card = ModelCard.load(path, ignore_metadata_errors=False)
        metadata = card.data.to_dict()
        assert metadata["license"] == "mit" and metadata["library_name"] == "transformers"
        assert metadata["pipeline_tag"] == "image-text-to-text" and "custom_code" in metadata["tags"]
        assert card.text.strip().startswith("#")
        assert card_errors(path.read_text(encoding="utf-8")) == []


def test_checker_tells_a_bad_card():
    assert card_errors("---\nlicense: [a\n---\n") and card_errors("---\npipeline_tag: see\n---\n")
    assert card_errors("---\ntags: navil\n---\n") and card_errors("---\nlicense: My own!\n---\n")
