"""Sources for conversions, small and random, and what the tests of conversions do to folders."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import FIXTURES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import convert_checkpoint
from conversion.configs import convert_config
from conversion.names import EMBEDDING, HEAD, official_rules, released_name
from conversion.tokenizers import convert_tokenizer
from navil.tokenization_navil import IMAGE_TOKENS

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def convert(command: str, source: Path, destination: Path, *options: str) -> Path:
    """The new folder. The vision encoder of a text LLM is small unless the options have another size."""
    if command == "from-llm" and "--vision-size" not in options:
        options += ("--vision-size", "2x64")
    assert convert_checkpoint.main([command, str(source), str(destination), *options]) == 0
    return destination


def refusal(capsys, command: str, source: Path, destination: Path, *options: str) -> str:
    """The converter's message about a source that it refuses; nothing may be left behind."""
    capsys.readouterr()
    before = {path.name for path in destination.parent.iterdir()}
    assert convert_checkpoint.main([command, str(source), str(destination), *options]) == 1
    assert {path.name for path in destination.parent.iterdir()} == before
    return capsys.readouterr().err


# -- folders -----------------------------------------------------------------------------------------------------------
def copy_released(folder: Path, backbone: str = "qwen3", *without: str) -> Path:
    """A recorded checkpoint in the released layout, to be changed."""
    return Path(shutil.copytree(FIXTURES / backbone, folder, ignore=shutil.ignore_patterns("cases*", *without)))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def edit_json(path: Path, section: str | None = None, **changes) -> None:
    settings = read_json(path)
    (settings[section] if section else settings).update(changes)
    path.write_text(json.dumps(settings))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def save_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Saves other weights, without checksums as `save_pretrained` does."""
    tensors = weights(folder)
    change(tensors)
    save_weights(folder, tensors)
    (folder / "SHA256SUMS").unlink(missing_ok=True)


def split(folder: Path, parts: int, suffix: str = "safetensors") -> None:
    """Makes several files and an index of a folder's weights."""
    tensors = weights(folder)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for number in range(parts):
        part = {name: tensors[name] for name in list(tensors)[number::parts]}
        path = folder / f"part-{number}.{suffix}"
        torch.save(part, path) if suffix == "bin" else save_file(part, path)
        weight_map |= dict.fromkeys(part, path.name)
    index = "pytorch_model.bin.index.json" if suffix == "bin" else INDEX
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


# -- released checkpoints ----------------------------------------------------------------------------------------------
VARIANTS = {
    "mha, layer norm, windows in every block": {
        "llm_config": {"num_key_value_heads": 4},
        "vision_config": {"norm_type": "layer_norm", "qkv_bias": True, "fullatt_block_indexes": [], "window_size": 4},
    },
    "mqa, no bias on qkv, one full block, half the side": {
        "llm_config": {"num_key_value_heads": 1},
        "vision_config": {"qkv_bias": False, "fullatt_block_indexes": [2], "window_size": 8},
        "scale_downsample_ratio": 0.5,
    },
    "tied, larger vocabulary, system message": {
        "llm_config": {"tie_word_embeddings": True, "vocab_size": 400},
        "system_message": "Answer 'briefly'.\nIn {{one}} \"word\".",
    },
    "tied and stored as the output head": {"llm_config": {"tie_word_embeddings": True}, "stored": "head"},
}


def table_names(backbone: str) -> tuple[str, str]:
    """Released names of the embedding table and the output head."""
    return released_name(EMBEDDING, backbone), released_name(HEAD, backbone)


def write_variant(folder: Path, backbone: str, variant: dict) -> dict[str, torch.Tensor]:
    """A released checkpoint with random weights and the variant's settings; returns its tensors."""
    copy_released(folder, backbone, "*.safetensors")
    config, variant = read_json(folder / "config.json"), dict(variant)
    stored = variant.pop("stored", "embedding")
    for name, value in variant.items():
        config[name].update(value) if isinstance(value, dict) else config.update({name: value})
    (folder / "config.json").write_text(json.dumps(config))
    target, tied = convert_config(config, convert_tokenizer(folder)), config["llm_config"]["tie_word_embeddings"]
    tensors = {}
    for rule in official_rules(target, backbone, range(12), tied):
        for name, shape in rule.sources.items():
            is_scale = len(shape) == 1 and not name.endswith("bias")
            tensors[name] = torch.randn(shape) * 0.1 + (1.0 if is_scale else 0.0)
    embedding, head = table_names(backbone)
    save_weights(folder, {head if name == embedding and stored == "head" else name: t for name, t in tensors.items()})
    return tensors


# -- text LLMs ---------------------------------------------------------------------------------------------------------
LLM = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1},
    **{"eos_token_id": 2, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "tie_word_embeddings": False},
}


def write_llm(folder: Path, **settings) -> torch.nn.Module:
    """A text LLM with random weights, saved by transformers, with the recorded Qwen tokenizer."""
    settings = copy.deepcopy(LLM | settings)  # transformers 5 writes into it
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    write_llm_tokenizer(folder)
    return model


def write_llm_tokenizer(folder: Path) -> None:
    """The recorded Qwen tokenizer without the image tokens, as a text LLM has it."""
    backend, settings = (read_json(FIXTURES / "qwen3" / name) for name in ("tokenizer.json", "tokenizer_config.json"))
    # Ordinary tokens take the ids of the image tokens, so all other ids stay.
    vocabulary = backend["model"]["vocab"]
    backend["model"]["vocab"] = {f"unused{i}" if t in IMAGE_TOKENS else t: i for t, i in vocabulary.items()}
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] not in IMAGE_TOKENS]
    declared = settings["added_tokens_decoder"].items()
    settings["added_tokens_decoder"] = {i: token for i, token in declared if token["content"] not in IMAGE_TOKENS}
    settings.pop("additional_special_tokens", None)
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_internlm2(folder: Path) -> torch.nn.Module:
    """InternLM2 is Llama with q, k and v in one matrix and other names: writes one, and returns it as a Llama."""
    llama = write_llm(folder, model_type="llama")
    tensors = weights(folder)
    renamed = {
        "model.tok_embeddings.weight": tensors.pop("model.embed_tokens.weight"),
        "output.weight": tensors.pop("lm_head.weight"),
        "model.norm.weight": tensors.pop("model.norm.weight"),
    }
    names = {"self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1"}
    names |= {"mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}
    for layer in ("model.layers.0", "model.layers.1"):
        q, k, v = (tensors.pop(f"{layer}.self_attn.{name}_proj.weight") for name in "qkv")
        rows = [torch.cat([q[32 * i :][:32], k[16 * i :][:16], v[16 * i :][:16]]) for i in (0, 1)]
        renamed[f"{layer}.attention.wqkv.weight"] = torch.cat(rows)
    for name, tensor in tensors.items():
        old = next(old for old in names if old in name)
        renamed[name.replace(old, names[old])] = tensor
    save_weights(folder, renamed)
    config = read_json(folder / "config.json") | {"model_type": "internlm2", "bias": False}
    for name in ("head_dim", "attention_bias", "mlp_bias"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    return llama
