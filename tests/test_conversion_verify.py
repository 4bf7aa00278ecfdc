"""convert_checkpoint.py verify: what is wrong with a folder is named; a good one is shown to answer as its source."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, ROOT
from conversion_helpers import (
    WEIGHTS,
    convert,
    copy_released,
    edit_json,
    edit_tensors,
    read_json,
    weights,
    write_internlm2,
    write_llm,
)

import convert_checkpoint
from conversion import loading, verify
from conversion.files import read_checksums
from conversion.read import read_safetensors_header
from navil import CODE_FILES

NAME = "model.connector.fc1.weight"


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    return convert("official", FIXTURES / "qwen3", tmp_path_factory.mktemp("verify") / "navil")


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    """A model folder to be changed."""
    return Path(shutil.copytree(converted, tmp_path / "navil"))


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    """Folders are loaded here: a fresh process takes seconds. The code that runs in it is the same."""
    monkeypatch.setattr(verify, "inspect_in_fresh_process", loading.inspect_folder)


def report(capsys, *arguments: str | Path) -> tuple[int, dict[str, str]]:
    """Exit code, and the report's lines by what they check."""
    capsys.readouterr()
    code = convert_checkpoint.main(["verify", *map(str, arguments)])
    output = capsys.readouterr()
    assert "error: " not in output.err, output.err
    return code, {line[:26].strip(): line[26:] for line in output.out.splitlines()}


def failed(lines: dict[str, str]) -> list[str]:
    return [name for name, line in lines.items() if line.startswith("FAILED")]


def divergence(line: str) -> float:
    return float(re.search(r"([\d.e+-]+) nats on average", line)[1])


# -- against a source --------------------------------------------------------------------------------------------------
def test_a_conversion_answers_as_its_source(folder, capsys):
    """In a fresh process, as users run it."""
    code, lines = report(capsys, folder, "--against", FIXTURES / "qwen3")
    assert code == 0 and all(line.startswith("ok") for line in lines.values())
    assert lines["tensors"] == f"ok      all {len(weights(folder))} equal the source's"
    for name in ("text", "picture"):
        assert divergence(lines[f"KL, {name}"]) < 1e-12
        assert lines[f"top-1 agreement, {name}"] == "ok      100.0%"


def test_a_conversion_to_half_precision_is_close(tmp_path, capsys, in_this_process):
    source = FIXTURES / "internlm2"
    folder = convert("official", source, tmp_path / "navil", "--dtype", "bfloat16")
    code, lines = report(capsys, folder, "--against", source)
    assert code == 0 and not failed(lines)
    for name in ("text", "picture"):
        assert divergence(lines[f"KL, {name}"]) < 1e-3
        assert float(re.search(r"([\d.]+)%", lines[f"top-1 agreement, {name}"])[1]) > 80


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "internlm2"])
def test_a_text_llm_answers_as_before(tmp_path, capsys, in_this_process, architecture):
    is_internlm2, llm = architecture == "internlm2", tmp_path / "llm"
    write_internlm2(llm) if is_internlm2 else write_llm(llm, model_type=architecture, vocab_size=330)
    code, lines = report(capsys, convert("from-llm", llm, tmp_path / "navil"), "--against", llm)
    assert code == 0 and "KL, picture" not in lines
    assert lines["top-1 agreement, text"] == "ok      100.0%"
    assert divergence(lines["KL, text"]) < 1e-9


def test_another_model_is_not_the_source(folder, tmp_path, capsys, in_this_process):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    name = "model.language_model.layers.1.mlp.text.down_proj.weight"
    edit_tensors(other, lambda tensors: tensors.update({name: torch.randn_like(tensors[name])}))
    code, lines = report(capsys, folder, "--against", other)
    assert code == 1 and failed(lines) == ["KL, text", "KL, picture"]
    assert lines["tensors"].startswith("ok      1 of 104 differ from the source's (fine-tuned?)")
    assert lines["tensors"].endswith(f"in {name}")
    code, lines = report(capsys, folder, "--against", other, "--max-kl", "1000")
    assert code == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"hidden_size": 128}, "misshapen"), ({"num_hidden_layers": 3}, "missing: model.language_model.layers.2")],
)
def test_a_source_of_another_size_is_named(tmp_path, capsys, sizes, message):
    write_llm(tmp_path / "llm", model_type="qwen3", vocab_size=330)
    write_llm(tmp_path / "other", model_type="qwen3", vocab_size=330, **sizes)
    folder = convert("from-llm", tmp_path / "llm", tmp_path / "navil")
    code, lines = report(capsys, folder, "--against", tmp_path / "other")
    assert code == 1 and failed(lines) == ["tensors"] and message in lines["tensors"]
    assert lines["KL, text"] == lines["Auto classes"] == "skipped because of a failure above"


def test_settings_of_another_source_are_named(folder, capsys, in_this_process):
    changes = [
        (image_settings(folder), {"image_mean": [0.1] * 3}, "image_mean is [0.1, 0.1, 0.1], not [0.5, 0.5, 0.5]"),
        (image_settings(folder), {"min_pixels": 1}, "min_pixels is 1, not"),
        (folder / "generation_config.json", {"max_new_tokens": 7}, "max_new_tokens is 7, not 1024"),
        (folder / "tokenizer_config.json", {"padding_side": "right"}, "padding_side is 'right', not 'left'"),
        (folder / "tokenizer.json", {"normalizer": {"type": "NFKC"}}, "normalizer"),
    ]
    for path, changed, _ in changes:
        edit_settings(path, **changed)
    edit_json(folder / "config.json", "text_config", max_position_embeddings=64)
    edit_tensors(folder, lambda tensors: None)  # without checksums
    code, lines = report(capsys, folder, "--against", FIXTURES / "qwen3")
    assert code == 1 and failed(lines) == ["settings"]
    assert "text_config.max_position_embeddings is 64, not" in lines["settings"]
    assert all(message in lines["settings"] for _, _, message in changes)


def test_a_saved_model_needs_no_checksums(recordings, tmp_path, capsys, in_this_process):
    recording = recordings["internlm2"]
    recording.model.save_pretrained(tmp_path / "saved")
    recording.processor.save_pretrained(tmp_path / "saved")
    code, lines = report(capsys, tmp_path / "saved", "--against", recording.source)
    assert code == 0 and lines["checksums"] == "ok      not compared, no SHA256SUMS"
    assert lines["settings"].startswith("ok")
    (tmp_path / "saved" / "tokenizer_config.json").unlink()  # a default template would take its place
    code, lines = report(capsys, tmp_path / "saved")
    assert code == 1 and lines["files"] == "FAILED  1 missing: tokenizer_config.json"


def test_the_embedded_checkpoint_passes(capsys, in_this_process):
    code, lines = report(capsys, ROOT / "tiny")  # whose code is in the folder above
    assert code == 0 and lines["Auto classes"].startswith("ok"), lines


# -- tensors -----------------------------------------------------------------------------------------------------------
def spoil(value: float):
    return lambda tensors: tensors[NAME][0, :3].fill_(value)


TENSORS = [
    (spoil(float("nan")), "numbers", f"{NAME} has 3 NaN and 0 infinite values"),
    (spoil(float("-inf")), "numbers", f"{NAME} has 0 NaN and 3 infinite values"),
    (spoil(3e38), "forward passes", "1 not finite: picture"),
    (lambda tensors: tensors.pop(NAME), "names and shapes", f"1 missing: {NAME}"),
    (lambda tensors: tensors.update({"extra": torch.zeros(1)}), "names and shapes", "1 unknown: extra"),
    (lambda tensors: tensors.update({NAME: torch.zeros(2, 3)}), "names and shapes", f"{NAME} is (2, 3), not (64, 320)"),
    (lambda tensors: tensors.update({NAME: tensors[NAME].half()}), "dtype", f"{NAME} is torch.float16"),
    (lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int8)}), "dtype", f"{NAME} is I8"),
]


@pytest.mark.parametrize(("change", "check", "message"), TENSORS)
def test_bad_tensors_are_named(folder, capsys, in_this_process, change, check, message):
    edit_tensors(folder, change)
    code, lines = report(capsys, folder)
    assert code == 1 and failed(lines) == [check] and message in lines[check]
    after = [line for name, line in lines.items() if name in ("Auto classes", "forward passes") and name != check]
    assert check == "forward passes" or all(line.startswith("skipped") for line in after)


def test_a_flipped_bit_of_a_weight_is_named(folder, capsys):
    (begin, _) = read_safetensors_header(folder / WEIGHTS)[NAME]["data_offsets"]
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[begin] ^= 1  # the last bit of the first number
    (folder / WEIGHTS).write_bytes(content)
    code, lines = report(capsys, folder)
    assert code == 1 and lines["bits"] == f"FAILED  1 changed: {NAME}"
    assert failed(lines) == ["checksums", "bits"]


# -- settings and files ------------------------------------------------------------------------------------------------
def image_settings(folder: Path) -> Path:
    """Where the image processor's settings are: transformers 5 has one file for the whole processor."""
    path = folder / "preprocessor_config.json"
    return path if path.is_file() else folder / "processor_config.json"


def edit_settings(path: Path, **changes) -> None:
    edit_json(path, "image_processor" if "image_processor" in read_json(path) else None, **changes)


IMAGES = "the image processor's"
SETTINGS = [
    ("config.json", {"image_token_id": 5}, "tokenizer", "image_token_id is 5, not 8"),
    ("generation_config.json", {"eos_token_id": 3}, "generation", "ends at 3, not at 4"),
    ("config.json", {"torch_dtype": "bfloat16", "dtype": "bfloat16"}, "dtype", "torch.float32"),
    (IMAGES, {"patch_size": 14}, "image processor", "patch_size is 14, not 16"),
    (IMAGES, {"patch_size": -1}, "image processor", "patch_size"),
    ("config.json", {"auto_map": {}}, "Auto classes", "AutoConfig does not load"),
]


@pytest.mark.parametrize(("name", "changes", "check", "message"), SETTINGS)
def test_settings_that_disagree_are_named(folder, capsys, in_this_process, name, changes, check, message):
    edit_settings(image_settings(folder) if name == IMAGES else folder / name, **changes)
    edit_tensors(folder, lambda tensors: None)  # without checksums
    code, lines = report(capsys, folder)
    assert code == 1 and failed(lines) == [check] and message in lines[check]


def test_a_folder_that_does_not_load_fails_with_the_reason(folder, capsys):
    """In a fresh process."""
    edit_json(folder / "tokenizer_config.json", chat_template="{%- for message iN messages %}")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit_tensors(folder, lambda tensors: None)
    code, lines = report(capsys, folder)
    assert code == 1 and failed(lines) == ["Auto classes"]
    assert "TemplateSyntaxError" in lines["Auto classes"] and "Traceback" not in lines["Auto classes"]
    assert lines["forward passes"] == "skipped because of a failure above"


def test_incomplete_folders(folder, tmp_path, capsys):
    for path, check in (
        (image_settings(folder), "image processor"),
        (folder / "tokenizer.json", "tokenizer"),
        (folder / WEIGHTS, "names and shapes"),
    ):
        path.unlink()
        code, lines = report(capsys, folder)
        assert code == 1 and lines[check].startswith("FAILED")
    (folder / "config.json").unlink()
    released = copy_released(tmp_path / "source")
    for source, message in ((folder, "cannot read"), (released, "model_type is 'navil_chat'")):
        assert convert_checkpoint.main(["verify", str(source)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["modeling_navil.py", "other.py"])
def test_other_code_is_named_and_not_run(folder, tmp_path, capsys, name):
    (folder / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\n")
    edit_json(folder / "config.json", auto_map={"AutoConfig": f"{name.removesuffix('.py')}.NaViLConfig"})
    edit_tensors(folder, lambda tensors: None)
    code, lines = report(capsys, folder)
    assert code == 1 and failed(lines) == ["code"] and name in lines["code"]
    assert not (tmp_path / "executed").exists()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, Path.unlink, flip])
def test_damage_to_any_file_is_found(folder, capsys, damage, monkeypatch):
    monkeypatch.setattr(verify, "inspect_in_fresh_process", lambda *_: pytest.fail("cheap checks were enough"))
    names = sorted(path.name for path in folder.iterdir())
    assert {"SHA256SUMS", WEIGHTS, "config.json", "README.md", "LICENSE", *CODE_FILES} < set(names)
    for name in names:
        content = (folder / name).read_bytes()
        damage(folder / name)
        assert convert_checkpoint.main(["verify", str(folder)]) == 1, name
        assert name in "".join(capsys.readouterr()), name
        (folder / name).write_bytes(content)


def test_sums_are_those_of_sha256sum(folder):
    files, _ = read_checksums(folder)
    assert files.keys() == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    for name, digest in files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
