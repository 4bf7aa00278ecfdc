"""convert_checkpoint.py export: the way back to the released layout, exact where it can be, refused where it cannot."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, FIXTURES, recorded_image, relative_error
from released_model import SPECIAL_TOKENS, ReleasedModel
from safetensors.torch import load_file, save_file
from test_conversion import VARIANTS, write_variant
from test_conversion_from_llm import convert as grow
from test_conversion_from_llm import write_llm
from transformers import AutoModel, AutoTokenizer

import convert_checkpoint as converter


def run(command: str, source: Path, destination: Path, *options: str) -> Path:
    assert converter.main([command, str(source), str(destination), *options]) == 0
    return destination


def refusal(capsys, source: Path, destination: Path, *options: str) -> str:
    assert converter.main(["export", str(source), str(destination), *options]) == 1
    assert not destination.exists()
    return capsys.readouterr().err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def special_rows(folder: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return tokenizer.convert_tokens_to_ids(list(converter.tokenization.IMAGE_TOKENS))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_released_checkpoint_comes_back(tmp_path, backbone):
    source = FIXTURES / backbone
    folder = run("official", source, tmp_path / "navil")
    back = run("export", folder, tmp_path / "released")
    before, after = weights(source), weights(back)
    assert after.keys() == before.keys()
    table, rows = f"language_model.model.{'tok_embeddings' if backbone == 'internlm2' else 'embed_tokens'}.weight", []
    for name, tensor in before.items():
        if name == table:
            # The released model never reads these rows; they are replaced by `special_token_embedding`.
            rows = special_rows(folder)
            tensor, after[name] = tensor.clone(), after[name].clone()
            tensor[rows] = after[name][rows] = 0
        if name.endswith("wo_ve.weight"):  # taken out of the product of two matrices
            assert relative_error(after[name], tensor) < 1e-3
        else:
            assert torch.equal(after[name], tensor), name
    assert rows
    # What the converter reads of the config is the same again.
    settings = [json.loads((path / "config.json").read_text()) for path in (source, back)]
    tokenizer = converter.convert_tokenizer(source)
    one, other = (converter.layouts.convert_config(s, tokenizer, tied=False).to_dict() for s in settings)
    assert one == other
    assert settings[0]["template"] == settings[1]["template"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_round_trip_from_here_is_exact(tmp_path, backbone):
    folder = run("official", FIXTURES / backbone, tmp_path / "navil")
    again = run("official", run("export", folder, tmp_path / "released"), tmp_path / "again")
    before, after = weights(folder), weights(again)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if backbone == "internlm2" and name.endswith("visual.o_proj.weight"):
            assert relative_error(after[name], tensor) < 1e-5
        else:
            assert torch.equal(after[name], tensor), name
    processor = "processor_config.json"  # the image processor's settings are in it from transformers 5 on
    for name in ("config.json", "tokenizer.json", processor, "generation_config.json"):
        one, other = (json.loads((path / name).read_text()) for path in (folder, again))
        assert one == other
    one, other = (AutoTokenizer.from_pretrained(path, trust_remote_code=True) for path in (folder, again))
    assert one.chat_template == other.chat_template
    assert one.spaces_between_special_tokens == other.spaces_between_special_tokens
    assert one.special_tokens_map == other.special_tokens_map


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_exported_variant_obeys_the_released_equations(tmp_path, backbone, variant):
    write_variant(tmp_path / "source", backbone, variant)
    folder = run("official", tmp_path / "source", tmp_path / "navil")
    back = run("export", folder, tmp_path / "released", "--dtype", "float64")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    config, tensors = json.loads((back / "config.json").read_text()), weights(back)
    embedding, head = converter.layouts.EMBEDDING_NAMES[backbone]
    assert config["llm_config"]["tie_word_embeddings"] == (head not in tensors)
    token_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    released = ReleasedModel(config, tensors, token_ids)
    plans, _ = model.plan_images(recorded_image(90, 60, 0))
    images = model.image_processor.pack(plans, "pt")
    ids = model.encode_chat(tokenizer, [("<image> <ref>left</ref>?", None)], plans)
    with torch.no_grad():
        logits = model(ids, **images).logits[0]
    # The released equations take rotary angles in double here, the model in float32.
    assert (
        relative_error(logits, released.logits(ids[0], images["pixel_values"], images["image_grid_thw"].tolist()))
        < 1e-5
    )


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
def test_a_grown_llm_can_be_exported_in_window_order(tmp_path, capsys, architecture):
    write_llm(tmp_path / "llm", model_type=architecture, head_dim=32 if architecture == "qwen3" else 16)
    folder = grow(tmp_path / "llm", tmp_path / "navil")
    assert "visual_token_order='raster'" in refusal(capsys, folder, tmp_path / "released")
    edit(folder, "vision_config", visual_token_order="window")
    back = run("export", folder, tmp_path / "released")
    if architecture != "qwen3":  # visual experts are copies still: wo_ve(wo(x)) is wo(x)
        wo_ve = weights(back)["language_model.model.layers.0.attention.wo_ve.weight"]
        assert torch.equal(wo_ve, torch.eye(64))
    again = weights(run("official", back, tmp_path / "again"))
    before = weights(folder)
    # All biases of the released layout or none: the ones that were not there are zero.
    assert all(torch.equal(again.pop(name), tensor) for name, tensor in before.items())
    assert all(name.endswith("o_proj.bias") and (tensor == 0).all() for name, tensor in again.items())
    assert bool(again) == (architecture == "qwen2")


def test_sentencepiece_model_comes_along(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "internlm2", source, ignore=shutil.ignore_patterns("cases*", "*token*"))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copy(FIXTURES / "tokenizer_internlm2" / name, source)
    config = json.loads((source / "config.json").read_text())
    config["llm_config"]["vocab_size"] = 1216
    (source / "config.json").write_text(json.dumps(config))
    tensors = weights(source)
    for name in converter.layouts.EMBEDDING_NAMES["internlm2"]:
        tensors[name] = torch.randn(1216, 64)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    folder = run("official", source, tmp_path / "navil")
    back = run("export", folder, tmp_path / "released")
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert not (back / "tokenizer.json").exists()
    again = run("official", back, tmp_path / "again")
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    one, other = (AutoTokenizer.from_pretrained(path, trust_remote_code=True) for path in (folder, again))
    text = "Hello  <ref>world</ref> 人工智能<|im_end|>"
    assert one(text).input_ids == other(text).input_ids and one.decode(one(text).input_ids) == other.decode(
        other(text).input_ids
    )


# -- what the released layout cannot express ---------------------------------------------------------------------------


def edit(folder: Path, section: str | None = None, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[section] if section else config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("vision_config", {"visual_token_order": "raster"}, "visual_token_order='raster'"),
        ("vision_config", {"rope_theta": 1000.0}, "rope_theta=1000.0"),
        ("text_config", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("text_config", {"num_attention_heads": 8}, "8 heads of size 16"),
        ("text_config", {"num_hidden_layers": 4}, "lacks 16 tensors: model.language_model.layers.3"),
        (None, {"model_type": "llava"}, "model_type='llava'"),
    ],
)
def test_settings_that_cannot_be_expressed_are_refused(tmp_path, capsys, section, changes, message):
    folder = run("official", FIXTURES / "internlm2", tmp_path / "navil")
    edit(folder, section, **changes)
    assert message in refusal(capsys, folder, tmp_path / "released")


def test_a_chat_template_of_its_own_is_refused(tmp_path, capsys):
    folder = run("official", FIXTURES / "qwen3", tmp_path / "navil")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[0].content }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(settings["chat_template"])  # where later versions look
    assert "not 'qwen3-chat' as released" in refusal(capsys, folder, tmp_path / "released")


def test_an_output_matrix_that_is_no_product_is_refused(tmp_path, capsys):
    folder = run("official", FIXTURES / "internlm2", tmp_path / "navil")
    tensors = weights(folder)
    tensors["model.language_model.layers.1.self_attn.text.o_proj.weight"][0] = 0  # no longer invertible
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "cannot express language_model.model.layers.1.attention.wo_ve" in refusal(capsys, folder, tmp_path / "out")


def test_half_precision_says_how_well_it_can_be_taken_apart(tmp_path):
    folder = run("official", FIXTURES / "internlm2", tmp_path / "navil", "--dtype", "bfloat16")
    again = run("official", run("export", folder, tmp_path / "released"), tmp_path / "again")
    before, after = weights(folder), weights(again)
    for name, tensor in before.items():
        error = (after[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert error < 1e-2 if name.endswith("visual.o_proj.weight") else error == 0, name


def test_dry_run_writes_nothing(tmp_path, capsys):
    folder = run("official", FIXTURES / "qwen3", tmp_path / "navil")
    capsys.readouterr()
    assert converter.main(["export", str(folder), str(tmp_path / "released"), "--dry-run"]) == 0
    count = sum(tensor.numel() for tensor in weights(FIXTURES / "qwen3").values())
    assert f"{count:,} parameters" in capsys.readouterr().out
    assert not (tmp_path / "released").exists()
