"""The embedded checkpoint: it loads from this repository, bundled with its code too, and answers as it did."""

import json
import shutil

import pytest
from conftest import ROOT, conversation
from transformers import AutoProcessor, pipeline

import convert_checkpoint
from navil import CODE_FILES

ANSWERS = json.loads((ROOT / "examples" / "answers.json").read_text())


@pytest.mark.parametrize("example", ANSWERS, ids=lambda example: example["image"])
def test_examples_are_answered_as_recorded(tiny, example):
    answer = tiny.model.chat(tiny.tokenizer, ROOT / example["image"], example["question"])
    assert answer == example["answer"]


def test_some_recorded_answers_are_true_of_a_small_model(tiny):
    assert sum(example["answer"] == example["true"] for example in ANSWERS) >= 3
    assert sum(parameter.numel() for parameter in tiny.model.parameters()) < 20e6
    assert (ROOT / "tiny" / "model.safetensors").stat().st_size <= 40 * 2**20


# -- convert_checkpoint.py bundle --------------------------------------------------------------------------------------
def test_a_bundle_has_the_files_of_its_source_and_the_code_and_answers_by_its_path(tmp_path, capsys):
    bundle = tmp_path / "navil-tiny"
    assert convert_checkpoint.main(["bundle", str(ROOT / "tiny"), str(bundle), "--dry-run"]) == 0
    assert "the code" in capsys.readouterr().out and not bundle.exists()
    assert convert_checkpoint.main(["bundle", str(ROOT / "tiny"), str(bundle)]) == 0
    expected = {path.name: path for path in (ROOT / "tiny").iterdir()} | {name: ROOT / name for name in CODE_FILES}
    assert {path.name for path in bundle.iterdir()} == expected.keys()
    assert all((bundle / name).read_bytes() == path.read_bytes() for name, path in expected.items())

    example = next(example for example in ANSWERS if example["image"] == "examples/chart.png")
    pipe = pipeline("image-text-to-text", model=str(bundle), trust_remote_code=True)
    chat = conversation(example["question"], str(ROOT / example["image"]))
    [answer] = pipe(text=chat, max_new_tokens=64, return_full_text=False)
    assert answer["generated_text"] == example["answer"]
    assert AutoProcessor.from_pretrained(bundle, trust_remote_code=True).image_processor.patch_size == 16


UNFIT = {
    "cannot read": lambda source, destination: (source / "config.json").unlink(),
    "is not a model folder of this package": lambda source, destination: (source / "config.json").write_text("{}"),
    "has its code already (modeling_navil.py)": lambda source, destination: (source / "modeling_navil.py").touch(),
    "exists already": lambda source, destination: (destination / "kept").mkdir(parents=True),
}


@pytest.mark.parametrize("message", UNFIT)
def test_what_cannot_be_bundled_is_refused(tmp_path, capsys, message):
    source, destination = tmp_path / "source", tmp_path / "bundled"
    shutil.copytree(ROOT / "tiny", source, ignore=shutil.ignore_patterns("*.safetensors"))
    UNFIT[message](source, destination)
    before = [*destination.parent.rglob("*")]
    assert convert_checkpoint.main(["bundle", str(source), str(destination)]) == 1
    assert message in capsys.readouterr().err and [*destination.parent.rglob("*")] == before
