"""convert_checkpoint.py export: the way back to the released layout, exact where it can be, refused where it cannot."""

import shutil

import pytest
import torch
from conftest import BACKBONES, FIXTURES, relative_error
from conversion_helpers import (
    convert,
    copy_released,
    edit_json,
    edit_tensors,
    read_json,
    refusal,
    save_weights,
    table_names,
    weights,
    write_llm,
)
from transformers import AutoTokenizer

from conversion.configs import convert_config
from conversion.tokenizers import convert_tokenizer
from navil.tokenization_navil import IMAGE_TOKENS


def assert_same(before, after, almost: str = "no tensor", tolerance: float = 0.0) -> None:
    """Equal names and values; up to a relative error for names that end in `almost`."""
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith(almost):
            assert relative_error(after[name], tensor) < tolerance
        else:
            assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_released_checkpoint_comes_back_and_converts_to_the_same(tmp_path, backbone):
    source = FIXTURES / backbone
    folder = convert("official", source, tmp_path / "navil")
    back = convert("export", folder, tmp_path / "released")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    rows = tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    before, after = weights(source), weights(back)
    for tensors in (before, after):  # these rows of the table are not used: `special_token_embedding` replaces them
        tensors[table_names(backbone)[0]][rows] = 0
    assert_same(before, after, "wo_ve.weight", 1e-3)  # solved for, from the product of two matrices
    settings = [read_json(path / "config.json") for path in (source, back)]
    one, other = (convert_config(s, convert_tokenizer(source)).to_dict() for s in settings)
    assert one == other and settings[0]["template"] == settings[1]["template"]

    again = convert("official", back, tmp_path / "again")
    almost = "visual.o_proj.weight" if backbone == "internlm2" else "no tensor"
    assert_same(weights(folder), weights(again), almost, 1e-5)
    processor = "processor_config.json"  # the image processor's settings are in it from transformers 5 on
    for name in ("config.json", "tokenizer.json", processor, "generation_config.json"):
        assert read_json(folder / name) == read_json(again / name)
    other = AutoTokenizer.from_pretrained(again, trust_remote_code=True)
    for name in ("chat_template", "spaces_between_special_tokens", "special_tokens_map"):
        assert getattr(tokenizer, name) == getattr(other, name)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_text_llm_can_be_exported_in_window_order(tmp_path, capsys, architecture):
    write_llm(tmp_path / "llm", model_type=architecture)
    folder = convert("from-llm", tmp_path / "llm", tmp_path / "navil")
    assert "visual_token_order='raster'" in refusal(capsys, "export", folder, tmp_path / "released")
    edit_json(folder / "config.json", "vision_config", visual_token_order="window")
    back = convert("export", folder, tmp_path / "released")
    if architecture == "llama":  # the visual experts are copies: wo_ve(wo(x)) is wo(x)
        assert torch.equal(weights(back)["language_model.model.layers.0.attention.wo_ve.weight"], torch.eye(64))
    assert_same(weights(folder), weights(convert("official", back, tmp_path / "again")))


def test_sentencepiece_model_comes_along(tmp_path):
    source = copy_released(tmp_path / "source", "internlm2", "*token*")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copy(FIXTURES / "tokenizer_internlm2" / name, source)
    edit_json(source / "config.json", "llm_config", vocab_size=1216)
    tables = {name: torch.randn(1216, 64) for name in table_names("internlm2")}
    save_weights(source, weights(source) | tables)
    folder = convert("official", source, tmp_path / "navil")
    back = convert("export", folder, tmp_path / "released")
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert not (back / "tokenizer.json").exists()
    again = convert("official", back, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert read_json(again / name) == read_json(folder / name)


SETTINGS = [
    ("vision_config", {"visual_token_order": "raster"}, "visual_token_order='raster'"),
    ("vision_config", {"rope_theta": 1000.0}, "rope_theta=1000.0"),
    ("text_config", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("text_config", {"attention_bias": True}, "attention_bias=True"),
    ("text_config", {"num_attention_heads": 8}, "8 heads of size 16"),
    ("text_config", {"num_hidden_layers": 4}, "16 missing: model.language_model.layers.3"),
    (None, {"model_type": "llava"}, "model_type is 'llava'"),
    (None, {"chat_template": "{{ messages[0].content }}"}, "not 'internlm2-chat' as released"),
]


@pytest.mark.parametrize(("section", "changes", "message"), SETTINGS)
def test_settings_that_cannot_be_represented_are_refused(recordings, tmp_path, capsys, section, changes, message):
    folder = shutil.copytree(recordings["internlm2"].folder, tmp_path / "navil")
    name = "tokenizer_config.json" if "chat_template" in changes else "config.json"
    edit_json(folder / name, section, **changes)
    if name == "tokenizer_config.json":
        (folder / "chat_template.jinja").write_text(changes["chat_template"])  # where later versions look
    assert message in refusal(capsys, "export", folder, tmp_path / "released")


def test_an_output_matrix_that_is_no_product_is_refused(tmp_path, capsys):
    folder = convert("official", FIXTURES / "internlm2", tmp_path / "navil")
    output = "model.language_model.layers.1.self_attn.text.o_proj.weight"
    edit_tensors(folder, lambda tensors: tensors[output][0].zero_())  # no longer invertible
    message = refusal(capsys, "export", folder, tmp_path / "out")
    assert "cannot express language_model.model.layers.1.attention.wo_ve" in message


def test_half_precision_comes_back_within_its_rounding_error(tmp_path):
    folder = convert("official", FIXTURES / "internlm2", tmp_path / "navil", "--dtype", "bfloat16")
    again = convert("official", convert("export", folder, tmp_path / "released"), tmp_path / "again")
    assert_same(weights(folder), weights(again), "visual.o_proj.weight", 1e-2)
