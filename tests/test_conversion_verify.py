"""convert_checkpoint.py verify: what is wrong with a folder is named; a good one is shown to answer as its source."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, FIXTURES, ROOT
from safetensors.torch import load_file, save_file
from test_conversion_from_llm import convert as grow
from test_conversion_from_llm import smollm2, write_llm
from test_conversion_from_llm import test_internlm2_equals_llama as write_internlm2

import checkpoint_verification as verification
import convert_checkpoint as converter
from checkpoint_files import Tensors, read_checksums
from navil import CODE_FILES


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "navil"
    assert converter.main(["official", str(FIXTURES / "qwen3"), str(folder)]) == 0
    return folder


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    """A model folder to tamper with."""
    return Path(shutil.copytree(converted, tmp_path / "navil"))


def report(capsys, *arguments: str | Path) -> tuple[int, dict[str, str]]:
    """Exit code, and the report's lines by what they check."""
    capsys.readouterr()
    code = converter.main(["verify", *map(str, arguments)])
    output = capsys.readouterr()
    assert "error: " not in output.err, output.err
    return code, {line[:26].strip(): line[26:] for line in output.out.splitlines()}


def edit_tensors(folder: Path, change) -> None:
    """Saves other weights without checksums, as `save_pretrained` does."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "SHA256SUMS").unlink(missing_ok=True)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def edit_json(path: Path, **changes) -> None:
    settings = json.loads(path.read_text())
    settings.get("image_processor", settings).update(changes)
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(("backbone", "dtype"), zip(BACKBONES, ("float32", "bfloat16"), strict=True))
def test_a_conversion_answers_as_its_source(tmp_path, capsys, backbone, dtype):
    arguments = [str(FIXTURES / backbone), str(tmp_path / "navil"), "--dtype", dtype]
    assert converter.main(["official", *arguments]) == 0
    code, lines = report(capsys, tmp_path / "navil", "--against", FIXTURES / backbone)
    assert code == 0 and all(line.startswith("ok") for line in lines.values())
    count = len(load_file(tmp_path / "navil" / "model.safetensors"))
    assert f"{count} of {count} as converted" in lines["tensors"]
    for name in ("text", "picture"):
        kl = float(re.search(r"([\d.e+-]+) nats on average", lines[f"KL, {name}"])[1])
        assert kl < (1e-12 if dtype == "float32" else 1e-3)
        agreement = float(re.search(r"([\d.]+)%", lines[f"top-1 agreement, {name}"])[1])
        assert agreement == 100 if dtype == "float32" else agreement > 80


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])  # llama: the next test
def test_a_grown_llm_answers_text_as_its_source(tmp_path, capsys, architecture):
    write_llm(tmp_path / "llm", model_type=architecture, head_dim=16, vocab_size=330)
    folder = grow(tmp_path / "llm", tmp_path / "navil")
    code, lines = report(capsys, folder, "--against", tmp_path / "llm")
    assert code == 0 and "KL, picture" not in lines
    assert lines["top-1 agreement, text"] == "ok      100.0%"
    assert float(re.search(r"([\d.e+-]+) nats", lines["KL, text"])[1]) < 1e-9


def test_internlm2_is_compared_too(tmp_path, capsys):
    write_internlm2(tmp_path)  # leaves the LLM and what was grown from it
    code, lines = report(capsys, tmp_path / "navil", "--against", tmp_path / "llm")
    assert code == 0 and lines["top-1 agreement, text"] == "ok      100.0%"


def test_another_model_is_not_the_source(folder, tmp_path, capsys):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    name = "model.language_model.layers.1.mlp.text.down_proj.weight"
    edit_tensors(other, lambda tensors: tensors.update({name: torch.randn_like(tensors[name])}))
    code, lines = report(capsys, folder, "--against", other)
    assert code == 1
    assert f"{name} differs most" in lines["tensors"]
    assert lines["KL, text"].startswith("FAILED") and lines["KL, picture"].startswith("FAILED")
    code, lines = report(capsys, folder, "--against", other, "--max-kl", "1000")
    assert code == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"hidden_size": 128}, "in the source"), ({"num_hidden_layers": 3}, "missing: model.language_model.layers.2")],
)
def test_a_source_of_another_size_is_named(tmp_path, capsys, sizes, message):
    write_llm(tmp_path / "llm", model_type="qwen3", head_dim=16, vocab_size=330)
    write_llm(tmp_path / "other", model_type="qwen3", head_dim=16, vocab_size=330, **sizes)
    folder = grow(tmp_path / "llm", tmp_path / "navil")
    code, lines = report(capsys, folder, "--against", tmp_path / "other")
    assert code == 1 and lines["tensors"].startswith("FAILED") and message in lines["tensors"]


NAME = "model.connector.fc1.weight"


def spoil(value: float):
    def change(tensors):
        tensors[NAME][0, :3] = value

    return change


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (spoil(float("nan")), "numbers", f"{NAME} has 3 NaN and 0 infinite"),
        (spoil(float("-inf")), "numbers", f"{NAME} has 0 NaN and 3 infinite"),
        (lambda t: t.pop(NAME), "names", f"1 missing: {NAME}"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "no others", "1 unknown: extra"),
        (lambda t: t.update({NAME: torch.zeros(2, 3)}), "shapes", f"{NAME} is (2, 3), not (64, 320)"),
        (lambda t: t.update({NAME: t[NAME].half()}), "dtype", f"{NAME} is torch.float16"),
        (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), "dtype", f"{NAME} is I8"),
    ],
)
def test_bad_tensors_are_named(folder, capsys, change, check, message):
    edit_tensors(folder, change)
    code, lines = report(capsys, folder)
    assert code == 1
    assert lines[check].startswith("FAILED") and message in lines[check]
    assert [name for name, line in lines.items() if line.startswith("FAILED")] == [check]


def test_overflow_in_a_forward_pass_is_reported(folder, capsys):
    edit_tensors(folder, lambda tensors: tensors[NAME].fill_(3e38))
    code, lines = report(capsys, folder)
    assert code == 1 and lines["forward passes"] == "FAILED  not finite: picture"


IMAGES = "the image processor's"


def image_settings(folder: Path) -> Path:
    """Where the image processor's settings are: transformers 5 has one file for the whole processor."""
    path = folder / "preprocessor_config.json"
    return path if path.is_file() else folder / "processor_config.json"


@pytest.mark.parametrize(
    ("name", "changes", "check", "message"),
    [
        ("config.json", {"image_token_id": 5}, "tokenizer", "image_token_id is 5, not 8"),
        ("generation_config.json", {"eos_token_id": 3}, "generation", "ends at 3, not at 4"),
        ("config.json", {"torch_dtype": "bfloat16", "dtype": "bfloat16"}, "dtype", "torch.float32"),
        (IMAGES, {"patch_size": 14}, "image processor", "patch_size is 14, not 16"),
        (IMAGES, {"patch_size": -1}, "image processor", "patch_size"),
    ],
)
def test_files_that_disagree_are_named(folder, capsys, name, changes, check, message):
    edit_json(image_settings(folder) if name == IMAGES else folder / name, **changes)
    code, lines = report(capsys, folder)
    assert code == 1 and lines[check].startswith("FAILED") and message in lines[check]


def test_incomplete_folders(folder, capsys):
    for path, check in (
        (image_settings(folder), "image processor"),
        (folder / "tokenizer.json", "tokenizer"),
        (folder / "model.safetensors", "weights"),
    ):
        path.unlink()
        code, lines = report(capsys, folder)
        assert code == 1 and lines[check].startswith("FAILED")
    (folder / "config.json").unlink()
    assert converter.main(["verify", str(folder)]) == 1
    assert "cannot read" in capsys.readouterr().err
    assert converter.main(["verify", str(FIXTURES / "qwen3")]) == 1
    assert "model_type='navil_chat'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["modeling_navil.py", "other.py"])
def test_other_code_is_named_and_not_run(folder, tmp_path, capsys, name):
    trap = f"open({str(tmp_path / 'executed')!r}, 'w').close()\n"
    (folder / name).write_text(trap)
    edit_json(folder / "config.json", auto_map={"AutoConfig": f"{name.removesuffix('.py')}.NaViLConfig"})
    edit_tensors(folder, lambda tensors: None)
    code, lines = report(capsys, folder)
    assert code == 1 and lines["code"].startswith("FAILED") and name in lines["code"]
    assert not (tmp_path / "executed").exists()


# -- every file --------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, Path.unlink, flip])
def test_damage_to_any_file_is_found(folder, capsys, damage, monkeypatch):
    monkeypatch.setattr(verification, "load_in_fresh_process", lambda *_: pytest.fail("cheap checks were enough"))
    names = sorted(path.name for path in folder.iterdir())
    assert {"SHA256SUMS", "model.safetensors", "config.json", "README.md", "LICENSE", *CODE_FILES} < set(names)
    for name in names:
        content = (folder / name).read_bytes()
        damage(folder / name)
        assert converter.main(["verify", str(folder)]) == 1, name
        assert name in "".join(capsys.readouterr()), name
        (folder / name).write_bytes(content)


def test_a_flipped_bit_of_a_weight_is_named(folder, capsys):
    tensors = Tensors.in_folder(folder)
    path, offset, *_ = tensors._readers[NAME].args
    content = bytearray(path.read_bytes())
    content[offset] ^= 1  # the last bit of the first number
    path.write_bytes(content)
    code, lines = report(capsys, folder)
    assert code == 1 and lines["bits"] == f"FAILED  1 changed: {NAME}"
    assert [name for name, line in lines.items() if line.startswith("FAILED")] == ["checksums", "bits"]


def test_sums_are_those_of_sha256sum(folder):
    files, _ = read_checksums(folder)
    assert files.keys() == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    for name, digest in files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_a_saved_model_needs_no_checksums(recordings, tmp_path, capsys):
    recording = recordings["internlm2"]
    recording.model.save_pretrained(tmp_path / "saved")
    recording.processor.save_pretrained(tmp_path / "saved")
    code, lines = report(capsys, tmp_path / "saved", "--against", recording.source)
    assert code == 0 and lines["checksums"] == "ok      none, without SHA256SUMS"
    assert lines["settings"].startswith("ok")
    (tmp_path / "saved" / "tokenizer_config.json").unlink()  # a default template would take its place
    code, lines = report(capsys, tmp_path / "saved")
    assert code == 1 and lines["files"] == "FAILED  1 missing: tokenizer_config.json"


def test_the_embedded_checkpoint_passes(capsys):
    code, lines = report(capsys, ROOT / "tiny")
    assert code == 0 and lines["Auto classes"].startswith("ok"), lines


def test_settings_of_another_source_are_named(folder, capsys):
    for path, name, value in (
        (image_settings(folder), "image_mean", [0.1] * 3),
        (image_settings(folder), "min_pixels", 1),
        (folder / "generation_config.json", "max_new_tokens", 7),
        (folder / "tokenizer_config.json", "padding_side", "right"),
        (folder / "tokenizer.json", "normalizer", {"type": "NFKC"}),
    ):
        edit_json(path, **{name: value})
    edit_json(folder / "config.json", text_config={**config_of(folder)["text_config"], "max_position_embeddings": 64})
    edit_tensors(folder, lambda tensors: None)  # without checksums
    code, lines = report(capsys, folder, "--against", FIXTURES / "qwen3")
    assert code == 1 and [name for name, line in lines.items() if line.startswith("FAILED")] == ["settings"]
    for text in (
        *(
            "image_mean is [0.1, 0.1, 0.1], not [0.5, 0.5, 0.5]",
            "min_pixels is 1, not",
            "max_new_tokens is 7, not 1024",
        ),
        *("padding_side is 'right', not 'left'", "normalizer", "text_config.max_position_embeddings is 64, not"),
    ):
        assert text in lines["settings"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"auto_map": {}}),
        ("tokenizer_config.json", {"chat_template": "{%- for message iN messages %}"}),
    ],
)
def test_a_folder_that_does_not_load_fails(folder, capsys, name, changes):
    edit_json(folder / name, **changes)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit_tensors(folder, lambda tensors: None)
    code, lines = report(capsys, folder)
    assert code == 1 and lines["Auto classes"].startswith("FAILED") and "Traceback" not in lines["Auto classes"]


def test_smollm2(tmp_path, capsys):
    pytest.importorskip("gguf")
    folder = grow(smollm2(), tmp_path / "navil", "--vision-size", "2x128")
    code, lines = report(capsys, folder, "--against", smollm2())
    assert code == 0 and lines["top-1 agreement, text"] == "ok      100.0%"
    assert float(re.search(r"([\d.e+-]+) nats", lines["KL, text"])[1]) < 1e-6
