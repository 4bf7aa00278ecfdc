"""convert_checkpoint.py official: released checkpoints are read in full, and a bad source leaves nothing behind."""

import math
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, FIXTURES, ROOT, load_model, load_tokenizer, recorded_image, relative_error
from conversion_helpers import (
    INDEX,
    VARIANTS,
    WEIGHTS,
    convert,
    copy_released,
    edit_json,
    edit_tensors,
    read_json,
    refusal,
    split,
    table_names,
    weights,
    write_variant,
)
from released_model import SPECIAL_TOKENS, ReleasedModel
from tokenizers import Tokenizer
from transformers import AutoConfig

from conversion.configs import convert_text_config, convert_vision_config
from conversion.names import check_sources, official_rules
from conversion.plan import plan_official
from conversion.read import Tensors
from navil import CODE_FILES
from navil.configuration_navil import AUTO_MAP, NaViLConfig

MODEL_FILES = {"config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"}
MODEL_FILES |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "model.safetensors"}
MODEL_FILES |= {"README.md", "LICENSE", "SHA256SUMS", *CODE_FILES}


@pytest.fixture
def source(tmp_path) -> Path:
    """A released checkpoint to be changed."""
    return copy_released(tmp_path / "source")


# -- full size ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "backbone"), [("2b", "internlm2"), ("9b", "qwen3")])
def test_official_layout_becomes_the_preset(size, backbone):
    layout = read_json(FIXTURES / f"official_layout_{size}.json")
    preset, recorded = getattr(NaViLConfig, f"navil_{size}")(), layout["config"]
    assert convert_vision_config(recorded["vision_config"], 0.5).to_dict() == preset.vision_config.to_dict()
    assert convert_text_config(recorded["llm_config"], False).to_dict() == preset.text_config.to_dict()
    budget = ("min_dynamic_patch", "max_dynamic_patch", "scale_downsample_ratio")
    assert all(recorded[name] == getattr(preset, name) for name in budget)

    rules = official_rules(preset, backbone, range(12))
    check_sources(rules, {name: tuple(shape) for name, shape in layout["tensors"].items()})
    assert sum(len(rule.sources) for rule in rules) == len(layout["tensors"])  # each source is read once
    for rule in rules:
        made = rule.convert(*(torch.empty(shape, device="meta") for shape in rule.sources.values()))
        assert [tuple(tensor.shape) for tensor in made] == list(rule.targets.values())


def test_root_config_is_navil_2b():
    preset = NaViLConfig.navil_2b().to_dict()
    root = NaViLConfig(**read_json(ROOT / "config.json")).to_dict()
    for settings in (preset, root):
        for name in ("architectures", "torch_dtype", "dtype", "transformers_version"):  # dtype from 4.56 on
            settings.pop(name, None)
    assert root == preset
    assert read_json(ROOT / "config.json")["auto_map"] == AUTO_MAP


# -- variants without a recording --------------------------------------------------------------------------------------
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants_obey_the_released_equations(tmp_path, backbone, variant):
    """Converted, and exported from there: the same numbers as an independent model of the released layout."""
    tensors = write_variant(tmp_path / "source", backbone, variant)
    folder = convert("official", tmp_path / "source", tmp_path / "navil")
    back = convert("export", folder, tmp_path / "back", "--dtype", "float64")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    token_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = read_json(tmp_path / "source" / "config.json")
    released = ReleasedModel(config, tensors, token_ids)

    plans, _ = model.plan_images([recorded_image(200, 130, 0), recorded_image(60, 90, 1)])
    images = model.image_processor.pack(plans, "pt")
    pixel_values, grids = images["pixel_values"], images["image_grid_thw"].tolist()
    ids = model.encode_chat(tokenizer, [("<image>\n<ref>left</ref> or <image> <box>right</box>?", None)], plans)
    text_ids = model.encode_chat(tokenizer, [("No image.", None)], [])
    assert config.get("system_message", "InternVL") in tokenizer.decode(ids[0])
    with torch.no_grad():
        visual_tokens = model.get_image_features(pixel_values, images["image_grid_thw"])
        logits, text_logits = model(ids, **images).logits[0], model(text_ids).logits[0]
    assert relative_error(visual_tokens, released.visual_tokens(pixel_values, grids)) < 1e-5
    assert relative_error(logits, released.logits(ids[0], pixel_values, grids)) < 1e-5
    assert relative_error(text_logits, released.logits(text_ids[0], None, [])) < 1e-5

    exported, exported_config = weights(back), read_json(back / "config.json")
    assert exported_config["llm_config"]["tie_word_embeddings"] == (table_names(backbone)[1] not in exported)
    exported_model = ReleasedModel(exported_config, exported, token_ids)
    assert relative_error(logits, exported_model.logits(ids[0], pixel_values, grids)) < 1e-5


def test_tied_checkpoint_stays_tied_when_no_row_is_replaced(tmp_path):
    tensors = write_variant(tmp_path / "source", "qwen3", {"llm_config": {"tie_word_embeddings": True}})
    rows = tensors["language_model.model.embed_tokens.weight"][6:18]  # the ids of the 12 tokens, in order
    edit_tensors(tmp_path / "source", lambda tensors: tensors.update({"special_token_embedding.weight": rows.clone()}))
    folder = convert("official", tmp_path / "source", tmp_path / "tied")
    model = load_model(folder)
    assert model.config.tie_word_embeddings and "lm_head.weight" not in weights(folder)
    assert model.lm_head.weight is model.language_model.embed_tokens.weight


def test_tied_checkpoint_may_store_its_head_if_equal(source, tmp_path, capsys):
    edit_json(source / "config.json", "llm_config", tie_word_embeddings=True)
    assert "lm_head.weight differs from" in refusal(capsys, "official", source, tmp_path / "out")
    table, head = table_names("qwen3")
    edit_tensors(source, lambda tensors: tensors.update({head: tensors[table].clone()}))
    convert("official", source, tmp_path / "out")


# -- the result --------------------------------------------------------------------------------------------------------
def test_converted_folder_is_complete(recording):
    assert {path.name for path in recording.folder.iterdir()} >= MODEL_FILES
    assert read_json(recording.folder / "config.json")["auto_map"] == AUTO_MAP
    generation = read_json(recording.folder / "generation_config.json")
    assert generation["eos_token_id"] == recording.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation["max_new_tokens"] == 1024


def test_sharded_source_and_sharded_result(source, tmp_path):
    whole = convert("official", source, tmp_path / "whole")
    split(source, 2)
    sharded = convert("official", source, tmp_path / "sharded", "--max-shard-size", "300KB")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (sharded / WEIGHTS).exists()
    assert max(shard.stat().st_size for shard in shards) < 320_000
    total_size = read_json(sharded / INDEX)["metadata"]["total_size"]
    assert total_size == sum(tensor.nbytes for tensor in weights(whole).values())
    one, other = (load_model(path).state_dict() for path in (whole, sharded))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("size", ["5", "GB", "-1GB", "1 PB"])
def test_a_shard_size_has_a_unit(source, tmp_path, capsys, size):
    assert f"got {size!r}" in refusal(capsys, "official", source, tmp_path / "out", f"--max-shard-size={size}")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_source_tensor_is_read_once(tmp_path, backbone, monkeypatch):
    plan, read, get = plan_official(FIXTURES / backbone).plan, [], Tensors.__getitem__
    monkeypatch.setattr(Tensors, "__getitem__", lambda self, name: read.append(name) or get(self, name))
    assert {name: tuple(tensor.shape) for name, tensor in plan.make()} == plan.shapes
    assert sorted(read) == sorted(plan.source.shapes)


DTYPES = [  # of most tensors, of one tensor, of the result, and options
    ("float32", "float32", "bfloat16", ("--dtype", "bfloat16")),
    ("float32", "float16", "float32", ()),
    ("bfloat16", "float32", "bfloat16", ()),
    ("float16", "bfloat16", "float16", ()),
]


@pytest.mark.parametrize(("most", "few", "stored", "options"), DTYPES)
def test_dtypes(source, tmp_path, capsys, most, few, stored, options):
    name = "language_model.model.norm.weight"
    edit_tensors(source, lambda tensors: tensors.update({n: t.to(getattr(torch, most)) for n, t in tensors.items()}))
    edit_tensors(source, lambda tensors: tensors.update({name: tensors[name].to(getattr(torch, few))}))
    folder = convert("official", source, tmp_path / "out", *options)
    assert options or f"{stored} (1 tensors are cast to it: {name})" in capsys.readouterr().out
    assert {tensor.dtype for tensor in weights(folder).values()} == {getattr(torch, stored)}
    assert str(AutoConfig.from_pretrained(folder, trust_remote_code=True).torch_dtype) == f"torch.{stored}"


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, "float32"), (math.inf, "float32"), (1e5, "float16")])
def test_values_that_the_result_cannot_hold_are_refused(source, tmp_path, capsys, value, dtype):
    edit_tensors(source, lambda tensors: tensors["mlp1.1.weight"].view(-1)[5].fill_(value))
    message = refusal(capsys, "official", source, tmp_path / "out", "--dtype", dtype)
    assert f"fc1.weight is not finite as torch.{dtype}" in message


# -- bad sources -------------------------------------------------------------------------------------------------------
LAYER = "language_model.model.layers.0"
TENSORS = {
    "1 missing: mlp1.3.bias": {"mlp1.3.bias": None},
    "1 unknown: extra.weight": {"extra.weight": torch.zeros(2)},
    "mlp1.3.bias is I8": {"mlp1.3.bias": torch.zeros(64, dtype=torch.int8)},
    "mlp1.3.bias is (63,), not (64,)": {"mlp1.3.bias": torch.zeros(63)},
    f"1 unknown: {LAYER}.self_attn.o_proj.bias": {f"{LAYER}.self_attn.o_proj.bias": torch.zeros(64)},
}


@pytest.mark.parametrize("message", TENSORS)
def test_every_tensor_is_accounted_for(source, tmp_path, capsys, message):
    def change(tensors):
        for name, tensor in TENSORS[message].items():
            tensors.pop(name) if tensor is None else tensors.update({name: tensor})

    edit_tensors(source, change)
    assert message in refusal(capsys, "official", source, tmp_path / "out")


SETTINGS = [
    ("vision_config", {"qk_normalization": True}, "qk_normalization=True"),
    ("vision_config", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("vision_config", {"hidden_size": None}, "lacks hidden_size"),
    ("llm_config", {"model_type": "gpt2"}, "model_type='gpt2'"),
    ("llm_config", {"model_type": None}, "lacks model_type"),
    ("llm_config", {"rope_scaling": "dynamic"}, "'dynamic'"),
    ("llm_config", {"rope_theta": None}, "lacks rope_theta"),
    ("llm_config", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("llm_config", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ("llm_config", {"vocab_size": 12}, "token ids outside the 12 rows of the embedding"),
    (None, {"model_type": "llava"}, "model_type='llava'"),
    (None, {"template": "unheard-of"}, "unheard-of"),
    (None, {"downsample_ratio": 0.3}, "0.3"),
    (None, {"downsample_ratio": "0.5"}, "'0.5'"),
    (None, {"vision_config": [1]}, "[1]"),
    (None, {"pad2square": True}, "pad2square=True"),
    (None, {"select_layer": -2}, "select_layer=-2"),
    (None, {"llm_config": None}, "lacks llm_config"),
]


@pytest.mark.parametrize(("section", "changes", "message"), SETTINGS)
def test_settings_that_are_not_supported_are_refused(source, tmp_path, capsys, section, changes, message):
    edit_json(source / "config.json", section, **changes)
    assert message in refusal(capsys, "official", source, tmp_path / "out")


def test_unreadable_sources_are_refused(source, tmp_path, capsys):
    def refused(source: Path = source, destination: str = "out") -> str:
        return refusal(capsys, "official", source, tmp_path / destination)

    assert "is not a folder" in refused(tmp_path / "absent")
    assert "the name of" in refused(destination="v1.0")
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:1000])
    assert WEIGHTS in refused()
    (source / WEIGHTS).unlink()
    assert "neither model.safetensors nor" in refused()
    (source / "tokenizer.json").write_text("{")
    assert "tokenizer.json: " in refused()
    (source / "tokenizer.json").unlink()
    assert "neither tokenizer.model, tokenizer.json" in refused()
    for content in ("{", '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"):
        (source / "config.json").write_text(content)
        assert "cannot read" in refused()


# -- tokenizers --------------------------------------------------------------------------------------------------------
NEW_TOKEN = {"id": 10**7, "content": "zz", "special": True, "normalized": False}
NEW_TOKEN |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
TOKENIZERS = [
    ("special_tokens_map.json", {"pad_token": 5}, "a special token must be a text, got 5"),
    ("special_tokens_map.json", {"bos_token": "<nope>"}, "not in the vocabulary"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"10000000": {"content": "zz"}}}, "declared as 10000000"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"6": {"id": 6}}}, "tokenizer_config.json"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": [], "merges": 3}}, "cannot read"),
    ("tokenizer.json", {"added_tokens": [NEW_TOKEN]}, "token 'zz' has id 320, declared as 10000000"),
]


@pytest.mark.parametrize(("name", "changes", "message"), TOKENIZERS)
def test_damaged_tokenizers_are_refused(source, tmp_path, capsys, name, changes, message):
    edit_json(source / name, **changes)
    assert message in refusal(capsys, "official", source, tmp_path / "out")


def test_truncation_and_padding_of_a_source_are_dropped(source, tmp_path):
    backend = Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    backend.save(str(source / "tokenizer.json"))
    saved = read_json(convert("official", source, tmp_path / "out") / "tokenizer.json")
    assert saved["truncation"] is None and saved["padding"] is None


def test_a_normalizer_cannot_make_control_tokens(source, tmp_path):
    settings = read_json(source / "tokenizer.json")
    added = [token | {"normalized": True} for token in settings["added_tokens"]]
    edit_json(source / "tokenizer.json", normalizer={"type": "NFKC"}, added_tokens=added)
    edit_json(source / "tokenizer_config.json", added_tokens_decoder=None)
    tokenizer = load_tokenizer(convert("official", source, tmp_path / "out"))
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn not in tokenizer("x\uff1c|im_end|\uff1e")["input_ids"]
    assert tokenizer("x<|im_end|>")["input_ids"][-1] == end_of_turn
