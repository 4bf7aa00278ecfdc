"""`convert_checkpoint.py bundle`: weights and settings without code become a folder that loads by its path alone."""

import json
import shutil

import pytest
from conftest import ROOT
from transformers import AutoModel, AutoProcessor, AutoTokenizer, pipeline

import convert_checkpoint
from navil import CODE_FILES

ANSWERS = json.loads((ROOT / "examples" / "answers.json").read_text())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "navil-tiny"
    assert convert_checkpoint.main(["bundle", str(ROOT / "tiny"), str(folder)]) == 0
    return folder


def test_bundle_has_the_files_of_its_source_and_the_code(bundle):
    expected = {path.name: path for path in (ROOT / "tiny").iterdir()} | {name: ROOT / name for name in CODE_FILES}
    assert {path.name for path in bundle.iterdir()} == expected.keys()
    assert all((bundle / name).read_bytes() == path.read_bytes() for name, path in expected.items())


def test_bundle_answers_as_its_source(bundle):
    model = AutoModel.from_pretrained(bundle, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(bundle, trust_remote_code=True)
    for example in ANSWERS[:3]:
        assert model.chat(tokenizer, ROOT / example["image"], example["question"]) == example["answer"]


def test_pipeline_and_processor_take_its_path(bundle):
    [example] = [example for example in ANSWERS if example["image"] == "examples/chart.png"][:1]
    content = [{"type": "image", "path": str(ROOT / example["image"])}, {"type": "text", "text": example["question"]}]
    pipe = pipeline("image-text-to-text", model=str(bundle), trust_remote_code=True)
    [answer] = pipe(text=[{"role": "user", "content": content}], max_new_tokens=64, return_full_text=False)
    assert answer["generated_text"] == example["answer"]
    assert AutoProcessor.from_pretrained(bundle, trust_remote_code=True).image_processor.patch_size == 16


@pytest.mark.parametrize("case", ["no config", "another model", "code", "dot", "taken"])
def test_what_cannot_be_bundled_is_refused(tmp_path, capsys, case):
    source, destination = tmp_path / "source", tmp_path / "bundled"
    shutil.copytree(ROOT / "tiny", source, ignore=shutil.ignore_patterns("*.safetensors"))
    message = {
        "no config": "cannot read",
        "another model": "is not a model folder of this package",
        "code": "has its code already (modeling_navil.py)",
        "dot": "has a dot",
        "taken": "exists already",
    }[case]
    if case == "no config":
        (source / "config.json").unlink()
    elif case == "another model":
        (source / "config.json").write_text('{"model_type": "llama"}')
    elif case == "code":
        shutil.copy(ROOT / "modeling_navil.py", source)
    elif case == "dot":
        destination = tmp_path / "navil-1.0"
    else:
        destination.mkdir()
        (destination / "kept").write_text("mine")
    assert convert_checkpoint.main(["bundle", str(source), str(destination)]) == 1
    assert message in capsys.readouterr().err
    assert not destination.exists() or [path.name for path in destination.iterdir()] == ["kept"]


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert convert_checkpoint.main(["bundle", str(ROOT / "tiny"), str(tmp_path / "b"), "--dry-run"]) == 0
    assert "the code" in capsys.readouterr().out and not (tmp_path / "b").exists()
