"""convert_checkpoint.py: every released layout goes in, nothing is lost, and a bad source leaves nothing behind."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, FIXTURES, ROOT, recorded_image, relative_error
from released_model import SPECIAL_TOKENS, ReleasedModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoTokenizer

import checkpoint_layouts as layouts
import convert_checkpoint as converter
from navil import CODE_FILES
from navil import configuration_navil as configuration
from navil import modeling_navil as modeling

MODEL_FILES = {
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "README.md"),
    *(
        "LICENSE",
        "SHA256SUMS",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "model.safetensors",
    ),
    *CODE_FILES,
}


def convert(source: Path, destination: Path, *options: str) -> None:
    assert converter.main(["official", str(source), str(destination), *options]) == 0


def error_of(capsys, source: Path, destination: Path) -> str:
    """What the converter says of a source that it refuses; it must leave nothing behind."""
    assert converter.main(["official", str(source), str(destination)]) == 1
    assert not destination.exists()
    assert [path.name for path in destination.parent.iterdir() if path.name.startswith(".")] == []
    return capsys.readouterr().err


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of a released checkpoint to tamper with."""
    folder = tmp_path / "source"
    shutil.copytree(FIXTURES / "qwen3", folder, ignore=shutil.ignore_patterns("cases*"))
    return folder


def edit_config(folder: Path, section: str | None = None, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[section] if section else config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -- full size ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "backbone"), [("2b", "internlm2"), ("9b", "qwen3")])
def test_official_layout_becomes_the_preset(size, backbone):
    layout = json.loads((FIXTURES / f"official_layout_{size}.json").read_text())
    preset = getattr(configuration.NaViLConfig, f"navil_{size}")()
    recorded = layout["config"]
    assert layouts.convert_vision_config(recorded["vision_config"], 0.5).to_dict() == preset.vision_config.to_dict()
    assert layouts.convert_text_config(recorded["llm_config"], False).to_dict() == preset.text_config.to_dict()
    budget = ("min_dynamic_patch", "max_dynamic_patch", "scale_downsample_ratio")
    assert all(recorded[name] == getattr(preset, name) for name in budget)

    rules = layouts.official_rules(preset, backbone, range(12), *layouts.EMBEDDING_NAMES[backbone])
    shapes = {name: tuple(shape) for name, shape in layout["tensors"].items()}
    layouts.check_sources(rules, shapes)
    with torch.device("meta"):
        model = modeling.NaViLForConditionalGeneration(preset)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {rule.target: rule.shape() for rule in rules} == expected
    assert len(rules) == len(expected)


def test_root_config_is_navil_2b():
    preset = configuration.NaViLConfig.navil_2b().to_dict()
    root = configuration.NaViLConfig(**json.loads((ROOT / "config.json").read_text())).to_dict()
    for settings in (preset, root):
        for name in ("architectures", "torch_dtype", "dtype", "transformers_version"):  # dtype from 4.56 on
            settings.pop(name, None)
    assert root == preset
    assert json.loads((ROOT / "config.json").read_text())["auto_map"] == configuration.AUTO_MAP


# -- variants without a recording --------------------------------------------------------------------------------------

BIASED = {"bias": True, "attention_bias": True}
VARIANTS = {
    "mha": {"llm_config": {"num_key_value_heads": 4}},
    "gqa-4-to-1": {"llm_config": {"num_key_value_heads": 1}},
    "layer-norm": {"vision_config": {"norm_type": "layer_norm", "qkv_bias": True}},
    "no-qkv-bias": {"vision_config": {"qkv_bias": False}},
    "all-biases": {"llm_config": BIASED},
    "text-biases-only": {"llm_config": BIASED, "without": ("_ve.bias",)},
    "no-output-biases": {"llm_config": BIASED, "without": ("wo.bias", "wo_ve.bias", "o_proj.bias", "o_proj_ve.bias")},
    "no-visual-output-bias": {"llm_config": BIASED, "without": ("wo_ve.bias", "o_proj_ve.bias")},
    "visual-output-bias-only": {"llm_config": BIASED, "without": ("wo.bias", "o_proj.bias")},
    "tied": {"llm_config": {"tie_word_embeddings": True}},
    "tied-under-the-name-of-the-head": {"llm_config": {"tie_word_embeddings": True}, "tied_name": "head"},
    "windows-everywhere": {"vision_config": {"fullatt_block_indexes": [], "window_size": 4}},
    "one-full-block": {"vision_config": {"fullatt_block_indexes": [2], "window_size": 8}},
    "tau-half": {"scale_downsample_ratio": 0.5},
    "system-message": {"system_message": "Answer 'briefly'.\nIn {{one}} \"word\"."},
    "larger-vocabulary": {"llm_config": {"vocab_size": 400}},
}


def released_shapes(folder: Path, config: dict) -> dict[str, list[int]]:
    """Names and shapes of a released checkpoint with this config, written out from the recorded one's."""
    vision, llm = config["vision_config"], config["llm_config"]
    layers = {name: list(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    head_dim = llm.get("head_dim") or llm["hidden_size"] // llm["num_attention_heads"]
    query_dim, key_dim = llm["num_attention_heads"] * head_dim, llm["num_key_value_heads"] * head_dim
    rows = {"wqkv": query_dim + 2 * key_dim, "q_proj": query_dim, "k_proj": key_dim, "v_proj": key_dim}
    for name in list(layers):
        module, kind = name.split(".")[-2:]
        if module.removesuffix("_ve") in rows:
            layers[name][0] = rows[module.removesuffix("_ve")]
        if name.startswith("language_model.") and ("embed" in name or "output" in name or "lm_head" in name):
            layers[name][0] = llm["vocab_size"]
        if module == "qkv":
            layers.pop(name) if kind == "bias" else None
            if vision["qkv_bias"]:
                layers[name.replace("weight", "bias")] = layers[name.replace("bias", "weight")][:1]
        if module in ("norm1", "norm2") and vision["norm_type"] == "layer_norm":
            layers[name.replace("weight", "bias")] = layers[name]
        is_attention = ".attention." in name or "self_attn" in name and "norm" not in module
        if is_attention and llm.get("bias" if llm["model_type"] == "internlm2" else "attention_bias"):
            layers[name.replace("weight", "bias")] = layers[name][:1]
    return layers


def write_variant(folder: Path, backbone: str, variant: dict) -> dict[str, torch.Tensor]:
    """A released checkpoint with random weights and the variant's settings; returns its tensors."""
    shutil.copytree(FIXTURES / backbone, folder, ignore=shutil.ignore_patterns("cases*", "*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    variant = copy.deepcopy(variant)
    without, tied_name = variant.pop("without", ()), variant.pop("tied_name", "embedding")
    for name, value in variant.items():
        config[name].update(value) if isinstance(value, dict) else config.update({name: value})
    (folder / "config.json").write_text(json.dumps(config))
    shapes = released_shapes(FIXTURES / backbone, config)
    embedding, head = layouts.EMBEDDING_NAMES[backbone]
    if config["llm_config"]["tie_word_embeddings"]:
        del shapes[head if tied_name == "embedding" else embedding]
    tensors = {}
    for name, shape in shapes.items():
        if not (name.startswith("language_model") and name.endswith(without)):
            is_scale = len(shape) == 1 and not name.endswith("bias")
            tensors[name] = torch.randn(shape) * 0.1 + (1.0 if is_scale else 0.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tied_name == "head":
        tensors[embedding] = tensors[head]
    return tensors


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variant_equals_the_released_equations(tmp_path, backbone, variant):
    source, folder = tmp_path / "source", tmp_path / "converted"
    tensors = write_variant(source, backbone, variant)
    convert(source, folder)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    config = json.loads((source / "config.json").read_text())
    token_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    released = ReleasedModel(config, tensors, token_ids)

    plans, _ = model.plan_images([recorded_image(200, 130, 0), recorded_image(60, 90, 1)])
    images = model.image_processor.pack(plans, "pt")
    question = "<image>\n<ref>left</ref> or <image> <box>right</box>?"
    ids = model.encode_chat(tokenizer, [(question, None)], plans)
    grids = images["image_grid_thw"].tolist()
    assert config.get("system_message", "InternVL") in tokenizer.decode(ids[0])
    with torch.no_grad():
        visual_tokens = model.get_image_features(images["pixel_values"], images["image_grid_thw"])
        logits = model(ids, **images).logits[0]
        text_ids = model.encode_chat(tokenizer, [("No image.", None)], [])
        text_logits = model(text_ids).logits[0]
    assert relative_error(visual_tokens, released.visual_tokens(images["pixel_values"], grids)) < 1e-5
    assert relative_error(logits, released.logits(ids[0], images["pixel_values"], grids)) < 1e-5
    assert relative_error(text_logits, released.logits(text_ids[0], None, [])) < 1e-5


def test_tied_checkpoint_stays_tied_when_no_row_is_replaced(tmp_path):
    source = tmp_path / "source"
    tensors = write_variant(source, "qwen3", VARIANTS["tied"])
    rows = tensors["language_model.model.embed_tokens.weight"][6:18]  # the ids of the 12 tokens, in order
    edit_tensors(source, lambda tensors: tensors.update({"special_token_embedding.weight": rows.clone()}))
    convert(source, tmp_path / "tied")
    model = AutoModel.from_pretrained(tmp_path / "tied", trust_remote_code=True)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.language_model.embed_tokens.weight
    model.language_model.tie_weights()
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")


def test_tied_checkpoint_may_store_its_head_if_equal(source, tmp_path, capsys):
    edit_config(source, "llm_config", tie_word_embeddings=True)
    assert "lm_head.weight differs from" in error_of(capsys, source, tmp_path / "out")
    table = "language_model.model.embed_tokens.weight"
    edit_tensors(source, lambda tensors: tensors.update({"language_model.lm_head.weight": tensors[table].clone()}))
    convert(source, tmp_path / "out")


# -- folders -----------------------------------------------------------------------------------------------------------


def test_converted_folder_is_complete(recording):
    assert {path.name for path in recording.folder.iterdir()} >= MODEL_FILES
    config = json.loads((recording.folder / "config.json").read_text())
    assert config["auto_map"] == configuration.AUTO_MAP
    generation = json.loads((recording.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == recording.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation["max_new_tokens"] == 1024


def test_sharded_source_and_sharded_result(source, tmp_path):
    convert(source, tmp_path / "whole")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, source / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(names, f"part-{number}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(source, tmp_path / "sharded", "--max-shard-size", "300KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "sharded" / "model.safetensors").exists()
    assert max(shard.stat().st_size for shard in shards) < 320_000
    whole, sharded = (
        AutoModel.from_pretrained(tmp_path / name, trust_remote_code=True).state_dict() for name in ("whole", "sharded")
    )
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_dtype(source, tmp_path):
    convert(source, tmp_path / "half", "--dtype", "bfloat16")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config.get("torch_dtype", config.get("dtype")) == "bfloat16"  # dtype from transformers 4.56 on


@pytest.mark.parametrize(
    ("most", "few", "stored"),
    [("float32", "float16", "float32"), ("bfloat16", "float32", "bfloat16"), ("float16", "bfloat16", "float16")],
)
def test_mixed_dtypes_are_cast_to_that_of_most_numbers(source, tmp_path, capsys, most, few, stored):
    name = "language_model.model.norm.weight"
    edit_tensors(source, lambda tensors: tensors.update({n: t.to(getattr(torch, most)) for n, t in tensors.items()}))
    edit_tensors(source, lambda tensors: tensors.update({name: tensors[name].to(getattr(torch, few))}))
    convert(source, tmp_path / "out")
    assert f"{stored} (1 tensors are cast to it: {name})" in capsys.readouterr().out
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert dtypes == {getattr(torch, stored)}
    assert str(AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True).torch_dtype) == f"torch.{stored}"


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, "float32"), (math.inf, "float32"), (1e5, "float16")])
def test_numbers_that_the_result_cannot_hold_are_refused(source, tmp_path, capsys, value, dtype):
    edit_tensors(source, lambda tensors: tensors["mlp1.1.weight"].view(-1)[5].fill_(value))
    assert converter.main(["official", str(source), str(tmp_path / "out"), "--dtype", dtype]) == 1
    assert f"fc1.weight is not finite as torch.{dtype}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_existing_destination_is_refused(source, tmp_path, capsys):
    destination = tmp_path / "mine"
    destination.mkdir()
    (destination / "precious.txt").write_text("kept")
    assert converter.main(["official", str(source), str(destination)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert (destination / "precious.txt").read_text() == "kept"


# -- bad sources -------------------------------------------------------------------------------------------------------

TENSOR_CHANGES = {
    "lacks 1 tensors: mlp1.3.bias": lambda tensors: tensors.pop("mlp1.3.bias"),
    "has 1 unknown tensors: extra.weight": lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}),
    "mlp1.3.bias is I8": lambda tensors: tensors.update({"mlp1.3.bias": torch.zeros(64, dtype=torch.int8)}),
    "mlp1.3.bias is (63,), not (64,)": lambda tensors: tensors.update({"mlp1.3.bias": torch.zeros(63)}),
}


@pytest.mark.parametrize("message", TENSOR_CHANGES)
def test_every_tensor_is_accounted_for(source, tmp_path, capsys, message):
    edit_tensors(source, TENSOR_CHANGES[message])
    assert message in error_of(capsys, source, tmp_path / "out")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
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
    ],
)
def test_settings_that_cannot_be_expressed_are_refused(source, tmp_path, capsys, section, changes, message):
    edit_config(source, section, **changes)
    assert message in error_of(capsys, source, tmp_path / "out")


def test_unreadable_sources_are_refused(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert "is not a folder" in error_of(capsys, tmp_path / "absent", out)
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(weights[:1000])
    assert "model.safetensors" in error_of(capsys, source, out)
    (source / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in error_of(capsys, source, out)
    index = {"weight_map": {"mlp1.0.bias": "../model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names '../model.safetensors'" in error_of(capsys, source, out)
    (source / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in error_of(capsys, source, out)
    (source / "model.safetensors.index.json").unlink()
    assert "the name of" in error_of(capsys, source, tmp_path / "v1.0")
    (source / "tokenizer.json").write_text("{")
    assert "tokenizer.json: " in error_of(capsys, source, out)
    (source / "tokenizer.json").unlink()
    assert "neither tokenizer.model, tokenizer.json" in error_of(capsys, source, out)
    for content in ("{", '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"):
        (source / "config.json").write_text(content)
        assert "cannot read" in error_of(capsys, source, out)


# -- tokenizers --------------------------------------------------------------------------------------------------------


def edit_tokenizer(folder: Path, name: str, change) -> None:
    settings = json.loads((folder / name).read_text())
    change(settings)
    (folder / name).write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("special_tokens_map.json", {"pad_token": 5}, "a special token must be a text, got 5"),
        ("special_tokens_map.json", {"bos_token": "<nope>"}, "not in the vocabulary"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"10000000": {"content": "zz"}}}, "declared as 10000000"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"6": {"id": 6}}}, "tokenizer_config.json"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": [], "merges": 3}}, "cannot read"),
    ],
)
def test_damaged_tokenizers_are_refused(source, tmp_path, capsys, name, change, message):
    edit_tokenizer(source, name, lambda settings: settings.update(change))
    assert message in error_of(capsys, source, tmp_path / "out")


def test_an_added_token_has_the_id_that_tokenizer_json_gives_it(source, tmp_path, capsys):
    token = {"id": 10**7, "content": "zz", "special": True, "normalized": False}
    token |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    edit_tokenizer(source, "tokenizer.json", lambda settings: settings["added_tokens"].append(token))
    assert "token 'zz' has id 320, declared as 10000000" in error_of(capsys, source, tmp_path / "out")


def test_truncation_and_padding_of_a_source_are_dropped(source, tmp_path):
    backend = Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    backend.save(str(source / "tokenizer.json"))
    convert(source, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None


def test_a_normalizer_cannot_make_control_tokens(source, tmp_path):
    def normalize(settings):
        settings["normalizer"] = {"type": "NFKC"}
        for token in settings["added_tokens"]:
            token["normalized"] = True

    edit_tokenizer(source, "tokenizer.json", normalize)
    edit_tokenizer(source, "tokenizer_config.json", lambda settings: settings.pop("added_tokens_decoder"))
    convert(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn not in tokenizer("x\uff1c|im_end|\uff1e")["input_ids"]
    assert tokenizer("x<|im_end|>")["input_ids"][-1] == end_of_turn
