"""The package as a Hub repository: Auto classes, subfolders, saving, reloading in a fresh process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, recorded_image, relative_error
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import demo
from navil import CODE_FILES


def in_fresh_process(script: str, *arguments: str | Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
def test_every_auto_class_gives_the_model(recording, auto_class):
    model = auto_class.from_pretrained(recording.folder, trust_remote_code=True)
    assert type(model).__name__ == "NaViLForConditionalGeneration"


def test_released_loading_call(recording):
    model = AutoModel.from_pretrained(
        str(recording.folder),
        torch_dtype=torch.bfloat16,
        trust_remote_code=True,
        low_cpu_mem_usage=True,
        load_in_8bit=False,
    ).eval()
    assert model.dtype == torch.bfloat16
    config = model.config
    assert (config.min_dynamic_patch, config.max_dynamic_patch, config.scale_downsample_ratio) == (16, 256, 0.7071)
    assert (config.vision_config.patch_size, config.downsample_ratio, config.tie_word_embeddings) == (16, 0.5, False)


def test_companions_load(recording):
    image_processor = AutoImageProcessor.from_pretrained(recording.folder, trust_remote_code=True)
    assert image_processor.to_dict().items() >= {"min_pixels": 4096, "max_pixels": 65536}.items()
    processor = AutoProcessor.from_pretrained(recording.folder, trust_remote_code=True)
    assert type(processor.tokenizer).__name__ == "NaViLTokenizer"
    assert AutoConfig.from_pretrained(recording.folder, trust_remote_code=True).model_type == "navil"


def test_code_from_the_root_and_weights_from_a_subfolder(recording, tmp_path):
    root = tmp_path / "repository"
    shutil.copytree(recording.folder, root / "small", ignore=shutil.ignore_patterns("*.py"))
    for name in CODE_FILES:
        shutil.copy(ROOT / name, root)
    options = {"subfolder": "small", "trust_remote_code": True}
    model = AutoModel.from_pretrained(root, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(root, **options)
    processor = AutoProcessor.from_pretrained(root, **options)
    image = recorded_image(90, 60, 0)
    settings = {"max_new_tokens": 5}
    expected = recording.model.chat(recording.tokenizer, image, "What?", settings)
    assert model.chat(tokenizer, image, "What?", settings) == expected
    assert processor.image_processor.max_pixels == 65536


@pytest.mark.parametrize("options", [{"torch_dtype": torch.bfloat16}, {"device_map": "auto"}, {"device_map": "cpu"}])
def test_rotary_frequencies_survive_loading(recording, options):
    loaded = AutoModel.from_pretrained(recording.folder, trust_remote_code=True, **options).eval()
    with torch.no_grad():
        if options.get("torch_dtype"):
            loaded = loaded.float()  # weights rounded, angles not
            exact = recording.model.state_dict()
            loaded.load_state_dict(exact)
        logits = loaded(**recording.inputs("single")).logits
    assert relative_error(logits, recording.tensors("single")["logits"]) < 1e-5


def test_bfloat16_logits_are_close(recording):
    model = AutoModel.from_pretrained(recording.folder, trust_remote_code=True, torch_dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits = model(**recording.inputs("single")).logits
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits, recording.tensors("single")["logits"]) < 0.05


FRESH_CHECK = """
import sys, torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer
folder, expected = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
saved = torch.load(expected)
with torch.no_grad():
    logits = model(**saved["inputs"]).logits
assert torch.equal(logits, saved["logits"]), (logits - saved["logits"]).abs().max()
assert model.vision_model.config._attn_implementation == model.language_model.config._attn_implementation == "sdpa"
AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
AutoProcessor.from_pretrained(folder, trust_remote_code=True)
"""


@pytest.mark.parametrize("times", [1, 2])
def test_saved_model_reloads_in_a_fresh_process(recording, tmp_path, monkeypatch, times):
    model, processor = recording.model, recording.processor
    for number in range(times):
        folder = tmp_path / f"saved-{number}"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert {*CODE_FILES} <= {path.name for path in folder.iterdir()}
    inputs = recording.inputs("single")
    with torch.no_grad():
        logits = recording.model(**inputs).logits
    torch.save({"inputs": inputs, "logits": logits}, tmp_path / "expected.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    in_fresh_process(FRESH_CHECK, folder, tmp_path / "expected.pt")


def test_saved_config_names_code_in_its_own_folder(recording, tmp_path):
    recording.model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == json.loads((ROOT / "config.json").read_text())["auto_map"]


def test_tying_survives_saving(recording, tmp_path):
    options = {"trust_remote_code": True, "tie_word_embeddings": True}
    tied = AutoModel.from_pretrained(recording.folder, **options)
    tied.tie_weights()  # transformers 5 leaves it at what the file says, where that holds two matrices
    tied.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert model.config.tie_word_embeddings and model.config.text_config.tie_word_embeddings
    assert model.lm_head.weight is model.language_model.embed_tokens.weight


def test_base_model_gives_the_last_hidden_state_and_reloads_alone(recording, tmp_path):
    model, inputs = recording.model, recording.inputs("single")
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(**inputs).logits)
        model.save_pretrained(tmp_path)
        alone = type(model.base_model).from_pretrained(tmp_path).eval()
        assert torch.equal(alone(**inputs).last_hidden_state, hidden)
    assert model.vision_model is model.model.vision_model and model.language_model is model.get_decoder()


def test_use_flash_attn_chooses_the_attention(recording, monkeypatch):
    def load(**options):
        return AutoModel.from_pretrained(recording.folder, trust_remote_code=True, **options)

    assert load(use_flash_attn=False).language_model.config._attn_implementation == "sdpa"
    assert load(use_flash_attn=None, attn_implementation="eager").vision_model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="means attn_implementation='sdpa'"):
        load(use_flash_attn=False, attn_implementation="eager")
    module = sys.modules[type(recording.model).__module__]
    monkeypatch.setattr(module, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU and the package flash-attn"):
        load(use_flash_attn=True)


def test_demo_streams_an_answer(recording, tmp_path, capsys):
    recorded_image(120, 90, 0).save(tmp_path / "image.png")
    image = ["--image", str(tmp_path / "image.png")]
    options = ["--model", str(recording.folder), "--question", "What is this?", "--max-new-tokens", "8"]
    finished = subprocess.run([sys.executable, ROOT / "demo.py", *options, *image], capture_output=True, timeout=300)
    assert finished.returncode == 0
    answers = [finished.stdout.decode()]
    for images in (image, [], image * 2):
        assert demo.main([*options, *images]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and all(answer.strip() for answer in answers)
    assert demo.main([*options, "--image", "none.png"]) == 1
    assert "cannot read an image from 'none.png'" in capsys.readouterr().err
