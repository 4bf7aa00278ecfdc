"""Converts NaViL checkpoints and tokenizers to the layout of this package.

    python convert_checkpoint.py official SRC DST     # a released checkpoint -> a complete, Hub-ready model folder
    python convert_checkpoint.py tokenizer SRC DST    # its tokenizer alone

What is settled here, so that the model code needs no special case: InternLM2's grouped `wqkv` is split, its two visual
output matrices are folded into one, the 12 image-token rows move into the embedding table, and the patch convolution
becomes a linear layer (reference §2-§4).
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import HfApi, split_state_dict_into_shards_factory
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2TokenizerFast
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parent
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def navil_module(name: str, class_name: str) -> ModuleType:
    """A module of this package, loaded as transformers loads remote code."""
    return sys.modules[get_class_from_dynamic_module(f"{name}.{class_name}", str(ROOT)).__module__]


configuration = navil_module("configuration_navil", "NaViLConfig")
tokenization = navil_module("tokenization_navil", "NaViLTokenizer")
image_processing = navil_module("image_processing_navil", "NaViLImageProcessor")
processing = navil_module("processing_navil", "NaViLProcessor")


# ----------------------------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------------------------


def need(config: dict[str, Any], *names: str) -> dict[str, Any]:
    """The named settings of a released config, all of which must be there."""
    if not isinstance(config, dict):
        raise ValueError(f"the source's config.json has {config!r:.80} where an object belongs")
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise ValueError(f"the source's config.json lacks {', '.join(missing)}")
    return {name: config[name] for name in names}


def require(config: dict[str, Any], name: str, allowed: Sequence[Any], default: Any) -> None:
    """Refuses a setting of a released config that this package does not express."""
    need(config)
    value = default if config.get(name) is None else config[name]
    if value not in allowed:
        raise ValueError(f"cannot convert a checkpoint with {name}={value!r}; it must be one of {list(allowed)}")


def convert_vision_config(source: dict[str, Any], downsample_ratio: float) -> Any:
    require(source, "num_channels", [3], 3)
    require(source, "qk_normalization", [False], False)  # the released code cannot run it (reference §2)
    require(source, "hidden_act", ["gelu"], "gelu")
    is_ratio = isinstance(downsample_ratio, float) and 0 < downsample_ratio < 1
    if not is_ratio or round(1 / downsample_ratio) * downsample_ratio != 1:
        raise ValueError(f"downsample_ratio must be 1 / an integer, got {downsample_ratio!r}")
    settings = need(
        source,
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size"),
        *("norm_type", "layer_norm_eps", "qkv_bias"),
    )
    optional = ("fullatt_block_indexes", "initializer_range", "window_size")
    settings |= {name: source[name] for name in optional if source.get(name) is not None}
    return configuration.NaViLVisionConfig(
        **settings, spatial_merge_size=round(1 / downsample_ratio), visual_token_order="window"
    )


def convert_text_config(source: dict[str, Any], tied: bool, output_bias: bool = False) -> Any:
    """A released `llm_config` -> `NaViLTextConfig`; `output_bias`: whether an output projection has a bias."""
    require(source, "model_type", ["internlm2", "qwen3"], None)
    require(source, "hidden_act", ["silu"], "silu")
    require(source, "use_sliding_window", [False], False)
    require(source, "skip_final_norm_weight", [False], False)
    settings = need(
        source,
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("rms_norm_eps", "rope_theta", "max_position_embeddings"),
    )
    optional = ("num_key_value_heads", "head_dim", "attention_bias", "attention_dropout", "initializer_range")
    settings |= {name: source[name] for name in optional if source.get(name) is not None}
    settings.setdefault("num_key_value_heads", source["num_attention_heads"])
    if source["model_type"] == "internlm2":
        settings["attention_bias"] = source.get("bias", True)
    rope_scaling = source.get("rope_scaling") or None
    if rope_scaling is not None:
        if not isinstance(rope_scaling, dict):
            raise ValueError(f"rope_scaling must be an object with a type and a factor, got {rope_scaling!r}")
        rope_type = rope_scaling.get("rope_type") or rope_scaling.get("type")
        rope_scaling = {"rope_type": rope_type, "factor": rope_scaling.get("factor", 1.0)}
    return configuration.NaViLTextConfig(
        **settings,
        qk_norm=source["model_type"] == "qwen3",
        attention_output_bias=output_bias,
        rope_scaling=rope_scaling,
        tie_word_embeddings=tied,
    )


def convert_config(source: dict[str, Any], tokenizer: Any, tied: bool, output_bias: bool = False) -> Any:
    """A released `config.json` -> `NaViLConfig`.

    Args:
        tied: whether the result's output head is its embedding table.
        output_bias: whether the attention's output projections have biases.

    Raises:
        ValueError: a setting that this package does not express, by name and value.
    """
    require(source, "select_layer", [-1], -1)
    require(source, "use_backbone_lora", [0], 0)
    require(source, "use_llm_lora", [0], 0)
    require(source, "anyres_image_size", [True], True)
    require(source, "pad2square", [False], False)
    config = configuration.NaViLConfig(
        vision_config=convert_vision_config(source["vision_config"], source["downsample_ratio"]),
        text_config=convert_text_config(source["llm_config"], tied, output_bias),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_start_token_id=tokenizer.convert_tokens_to_ids("<img>"),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(tokenization.END_OF_TURN),
        pad_token_id=tokenizer.pad_token_id,
        **need(source, "min_dynamic_patch", "max_dynamic_patch"),
        scale_downsample_ratio=source.get("scale_downsample_ratio") or 0.7071,
    )
    config.architectures = ["NaViLForConditionalGeneration"]
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Rule:
    """How one tensor of this package's layout comes from tensors of the released one."""

    target: str
    sources: dict[str, tuple[int, ...]]  # name -> shape
    convert: Callable[..., Tensor]


def keep(tensor: Tensor) -> Tensor:
    return tensor


def fold_outputs(visual_output: Tensor, output: Tensor) -> Tensor:
    """`wo_ve(wo(x))` as one matrix, the product rounded once."""
    return (visual_output.double() @ output.double()).to(output.dtype)


def fold_output_biases(visual_output: Tensor, bias: Tensor, visual_bias: Tensor | None = None) -> Tensor:
    """The bias of `wo_ve(wo(x))` as one layer."""
    folded = visual_output.double() @ bias.double()
    return (folded if visual_bias is None else folded + visual_bias.double()).to(visual_output.dtype)


def split_wqkv(config: Any, part: str) -> Callable[[Tensor], Tensor]:
    """Takes q, k or v out of `wqkv`, whose rows are [q x groups, k, v] per key/value head."""
    groups = config.num_attention_heads // config.num_key_value_heads
    heads = {"q_proj": slice(0, groups), "k_proj": slice(groups, groups + 1), "v_proj": slice(groups + 1, groups + 2)}

    def take(wqkv: Tensor) -> Tensor:
        grouped = wqkv.unflatten(0, (config.num_key_value_heads, groups + 2, config.head_dim))
        return grouped[:, heads[part]].flatten(0, 2)

    return take


def vision_rules(config: Any) -> Iterator[Rule]:
    width, mlp_width = config.hidden_size, config.intermediate_size
    patch_shape = (width, 3, config.patch_size, config.patch_size)
    source = "vision_model.embeddings.patch_embedding"
    target = "vision_model.patch_embedding"
    yield Rule(f"{target}.weight", {f"{source}.weight": patch_shape}, lambda kernel: kernel.flatten(1))
    yield Rule(f"{target}.bias", {f"{source}.bias": (width,)}, keep)
    shapes = {
        "ls1": (width,),
        "ls2": (width,),
        "norm1.weight": (width,),
        "norm2.weight": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.fc1.weight": (mlp_width, width),
        "mlp.fc1.bias": (mlp_width,),
        "mlp.fc2.weight": (width, mlp_width),
        "mlp.fc2.bias": (width,),
    }
    if config.norm_type == "layer_norm":
        shapes |= {"norm1.bias": (width,), "norm2.bias": (width,)}
    if config.qkv_bias:
        shapes["attn.qkv.bias"] = (3 * width,)
    for layer in range(config.num_hidden_layers):
        for name, shape in shapes.items():
            yield Rule(
                f"vision_model.blocks.{layer}.{name}", {f"vision_model.encoder.layers.{layer}.{name}": shape}, keep
            )


def connector_rules(config: Any) -> Iterator[Rule]:
    merged, width = config.vision_config.merged_dim, config.text_config.hidden_size
    for source, target, shape in (
        ("mlp1.0", "connector.norm", (merged,)),
        ("mlp1.1", "connector.fc1", (width, merged)),
        ("mlp1.3", "connector.fc2", (width, width)),
    ):
        yield Rule(f"{target}.weight", {f"{source}.weight": shape}, keep)
        yield Rule(f"{target}.bias", {f"{source}.bias": shape[:1]}, keep)


def qwen3_layer_rules(config: Any, layer: int, biases: Collection[str]) -> Iterator[Rule]:
    source, target = f"language_model.model.layers.{layer}", f"language_model.model.layers.{layer}"
    width, head_dim = config.hidden_size, config.head_dim
    query_dim, key_dim = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    projections = {
        "q_proj": (query_dim, width),
        "k_proj": (key_dim, width),
        "v_proj": (key_dim, width),
        "o_proj": (width, query_dim),
    }
    for modality, suffix in (("text", ""), ("visual", "_ve")):
        attention = f"{target}.self_attn.{modality}"
        for name, shape in projections.items():
            yield Rule(f"{attention}.{name}.weight", {f"{source}.self_attn.{name}{suffix}.weight": shape}, keep)
            if config.attention_output_bias if name == "o_proj" else config.attention_bias:
                yield bias_rule(f"{attention}.{name}.bias", f"{source}.self_attn.{name}{suffix}.bias", shape[0], biases)
        for name in ("q_norm", "k_norm"):
            yield Rule(f"{attention}.{name}.weight", {f"{source}.self_attn.{name}{suffix}.weight": (head_dim,)}, keep)
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield ffn_rule(config, f"{target}.mlp.{modality}", name, f"{source}.mlp{suffix}.{name}.weight")
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Rule(f"{target}.{name}.weight", {f"{source}.{name}.weight": (width,)}, keep)


def internlm2_layer_rules(config: Any, layer: int, biases: Collection[str]) -> Iterator[Rule]:
    source, target = f"language_model.model.layers.{layer}", f"language_model.model.layers.{layer}"
    width = config.hidden_size
    query_dim, key_dim = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    packed_dim = query_dim + 2 * key_dim
    wo = f"{source}.attention.wo"
    for modality, suffix in (("text", ""), ("visual", "_ve")):
        attention = f"{target}.self_attn.{modality}"
        packed = f"{source}.attention.wqkv{suffix}"
        for name, rows in (("q_proj", query_dim), ("k_proj", key_dim), ("v_proj", key_dim)):
            take = split_wqkv(config, name)
            yield Rule(f"{attention}.{name}.weight", {f"{packed}.weight": (packed_dim, width)}, take)
            if config.attention_bias:
                yield bias_rule(f"{attention}.{name}.bias", f"{packed}.bias", rows, biases, packed_dim, take)
        for name, released in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            yield ffn_rule(config, f"{target}.mlp.{modality}", name, f"{source}.feed_forward{suffix}.{released}.weight")
    output = {f"{wo}.weight": (width, query_dim)}
    visual_output = {f"{wo}_ve.weight": (width, width)}
    yield Rule(f"{target}.self_attn.text.o_proj.weight", output, keep)
    yield Rule(f"{target}.self_attn.visual.o_proj.weight", visual_output | output, fold_outputs)
    if config.attention_output_bias:
        yield bias_rule(f"{target}.self_attn.text.o_proj.bias", f"{wo}.bias", width, biases)
        visual_target = f"{target}.self_attn.visual.o_proj.bias"
        bias = {f"{wo}.bias": (width,)}
        visual_bias = {f"{wo}_ve.bias": (width,)}
        if bias_name(f"{wo}.bias") not in biases:
            yield Rule(visual_target, visual_bias, keep)
        elif bias_name(f"{wo}_ve.bias") not in biases:
            yield Rule(visual_target, visual_output | bias, fold_output_biases)
        else:
            yield Rule(visual_target, visual_output | bias | visual_bias, fold_output_biases)
    for released, name in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
        yield Rule(f"{target}.{name}.weight", {f"{source}.{released}.weight": (width,)}, keep)


def ffn_rule(config: Any, target: str, name: str, source: str) -> Rule:
    shape = (config.intermediate_size, config.hidden_size)
    return Rule(f"{target}.{name}.weight", {source: shape[::-1] if name == "down_proj" else shape}, keep)


def bias_name(name: str) -> str:
    """A bias's name inside its layer, such as `wqkv_ve.bias`."""
    return ".".join(name.split(".")[-2:])


def attention_biases(names: Collection[str]) -> set[str]:
    """Which attention biases the first layer has, by `bias_name`; every other layer must have the same."""
    first_layer = "language_model.model.layers.0."
    return {bias_name(name) for name in names if name.startswith(first_layer) and name.endswith(".bias")}


def bias_rule(
    target: str,
    source: str,
    rows: int,
    biases: Collection[str],
    source_rows: int | None = None,
    convert: Callable[[Tensor], Tensor] = keep,
) -> Rule:
    """A bias. A projection without one, where another modality's has one, is the same as one whose bias is zero."""
    if bias_name(source) in biases:
        return Rule(target, {source: (source_rows or rows,)}, convert)
    return Rule(target, {}, lambda: torch.zeros(rows))


LAYER_RULES = {"internlm2": internlm2_layer_rules, "qwen3": qwen3_layer_rules}
EMBEDDING_NAMES = {
    "internlm2": ("language_model.model.tok_embeddings.weight", "language_model.output.weight"),
    "qwen3": ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
}
SPECIAL_ROWS = "special_token_embedding.weight"


def embedding_rules(config: Any, embedding: str, head: str, special_ids: Sequence[int]) -> Iterator[Rule]:
    """The 12 image-token rows replace theirs in the table; an output head that was tied keeps the old rows.

    `embedding` and `head` are the source's tensors, one and the same when they are tied.
    """
    table = (config.vocab_size, config.hidden_size)

    def write_rows(weight: Tensor, rows: Tensor) -> Tensor:
        return weight.index_copy(0, torch.tensor(special_ids, device=weight.device), rows.to(weight.dtype))

    special = {SPECIAL_ROWS: (len(tokenization.IMAGE_TOKENS), config.hidden_size)}
    yield Rule("language_model.model.embed_tokens.weight", {embedding: table} | special, write_rows)
    if not config.tie_word_embeddings:
        yield Rule("language_model.lm_head.weight", {head: table}, keep)


def official_rules(
    config: Any, backbone: str, special_ids: Sequence[int], embedding: str, head: str, biases: Collection[str] = ()
) -> list[Rule]:
    """Rules for every tensor of this package's layout, from the released layout.

    Args:
        config: the target `NaViLConfig`.
        backbone: `internlm2` or `qwen3`, the released LLM.
        special_ids: ids of the 12 image tokens in the row order of `special_token_embedding`.
        embedding, head: the released embedding table and output head, one and the same when they are tied.
        biases: the attention biases that the released layers have (see `attention_biases`).
    """
    text = config.text_config
    rules = [*vision_rules(config.vision_config), *connector_rules(config)]
    rules += embedding_rules(text, embedding, head, special_ids)
    for layer in range(text.num_hidden_layers):
        rules += LAYER_RULES[backbone](text, layer, biases)
    rules.append(
        Rule("language_model.model.norm.weight", {"language_model.model.norm.weight": (text.hidden_size,)}, keep)
    )
    return rules


class SourceTensors:
    """The tensors of a folder with `model.safetensors` or shards and an index, read one at a time.

    Raises:
        ValueError: no safetensors weights, or an index that disagrees with its shards.
    """

    def __init__(self, folder: Path):
        self._files: dict[str, Any] = {}
        index_path = folder / INDEX_NAME
        if index_path.is_file():
            weight_map = read_json(index_path).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index_path} has no weight_map")
            for shard in sorted(set(weight_map.values())):
                self._add_file(folder, shard)
            listed, found = set(weight_map), set(self._files)
            if listed != found:
                raise ValueError(f"{INDEX_NAME} and its shards disagree about {preview(listed ^ found)}")
        elif (folder / WEIGHTS_NAME).is_file():
            self._add_file(folder, WEIGHTS_NAME)
        else:
            raise ValueError(f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}")

    def _add_file(self, folder: Path, name: str) -> None:
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise ValueError(f"{INDEX_NAME} names {name!r}, which is not a file in {folder}")
        try:
            handle = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        self._files |= dict.fromkeys(handle.keys(), handle)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Some rows of a matrix, without reading the others."""
        matrix = self._files[name].get_slice(name)
        return torch.stack([matrix[index] for index in indices])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._files[name].get_slice(name)[:0].dtype


def check_sources(rules: Sequence[Rule], shapes: dict[str, tuple[int, ...]], ignored: Sequence[str] = ()) -> None:
    """Every source tensor is used and has its shape.

    Raises:
        ValueError: missing, unknown or misshapen tensors, by name.
    """
    expected = {name: shape for rule in rules for name, shape in rule.sources.items()}
    missing = expected.keys() - shapes.keys()
    if missing:
        raise ValueError(f"the source lacks {len(missing)} tensors: {preview(missing)}")
    unknown = shapes.keys() - expected.keys() - set(ignored)
    if unknown:
        raise ValueError(f"the source has {len(unknown)} unknown tensors: {preview(unknown)}")
    misshapen = [f"{name} is {shapes[name]}, not {shape}" for name, shape in expected.items() if shapes[name] != shape]
    if misshapen:
        raise ValueError(f"the source has {len(misshapen)} misshapen tensors: {preview(misshapen)}")


def preview(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def write_weights(
    rules: Sequence[Rule], source: SourceTensors, folder: Path, dtype: torch.dtype | None, max_shard_size: str
) -> torch.dtype:
    """Writes the target's safetensors shard by shard; returns the dtype of its first tensor.

    dtype None keeps the dtype of each tensor's first source.
    """
    shapes = source.shapes()
    main_dtype = dtype or source.dtype(next(iter(rules[0].sources)))
    dtypes = {
        rule.target: source.dtype(next(iter(rule.sources))) if dtype is None and rule.sources else main_dtype
        for rule in rules
    }
    plan = split_state_dict_into_shards_factory(
        {rule.target: target_shape(rule, shapes).numel() * dtypes[rule.target].itemsize for rule in rules},
        get_storage_size=lambda size: size,
        get_storage_id=lambda size: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    targets = {rule.target: rule for rule in rules}
    with tqdm(total=len(rules), unit="tensor", desc="converting", disable=None) as progress:
        for filename, names in plan.filename_to_tensors.items():
            shard = {}
            for name in names:
                tensor = targets[name].convert(*map(source.__getitem__, targets[name].sources))
                shard[name] = tensor.to(dtypes[name]).contiguous()
                progress.update()
            save_file(shard, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        write_json(folder / INDEX_NAME, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    return main_dtype


def target_shape(rule: Rule, shapes: dict[str, tuple[int, ...]]) -> torch.Size:
    """Shape of a rule's result, worked out without data."""
    return rule.convert(*(torch.empty(shapes[name], device="meta") for name in rule.sources)).shape


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------


def convert_tokenizer(source: Path, template: str | None = None, system_message: str | None = None) -> Any:
    """The tokenizer of a released folder as a `NaViLTokenizer`.

    Args:
        source: folder with `tokenizer.model` (InternLM2's SentencePiece), `tokenizer.json`, or `vocab.json` and
            `merges.txt` (Qwen's), and their `tokenizer_config.json`.
        template: name of the chat template; None means InternLM2's for SentencePiece and Qwen3's otherwise.
        system_message: default system message; None means the released one.

    Raises:
        ValueError: no tokenizer files, tokens whose ids do not come out as declared, or missing image tokens.
    """
    settings, special = (
        read_json(source / name) if (source / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    is_sentencepiece = (source / "tokenizer.model").is_file() and (
        settings.get("tokenizer_class") == "InternLM2Tokenizer" or not (source / "tokenizer.json").is_file()
    )
    defaults: dict[str, str] = {}
    if is_sentencepiece:
        require(settings, "add_eos_token", [False], False)
        backend, defaults = sentencepiece_backend(source / "tokenizer.model", settings.get("add_bos_token", True))
    elif (source / "tokenizer.json").is_file():
        with unreadable(source / "tokenizer.json"):
            backend = Tokenizer.from_file(str(source / "tokenizer.json"))
    elif (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
        with unreadable(source / "vocab.json"):
            backend = Qwen2TokenizerFast.from_pretrained(source).backend_tokenizer
    else:
        raise ValueError(f"{source} has neither tokenizer.model, tokenizer.json nor vocab.json with merges.txt")
    add_declared_tokens(backend, declared_tokens(source, settings))

    tokens = {
        role: token_text(special.get(role) or settings.get(role) or defaults.get(role))
        for role in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    # Batches need some padding token; what stands there is masked.
    tokens["pad_token"] = tokens["pad_token"] or tokens["eos_token"] or tokenization.END_OF_TURN
    extra = special.get("additional_special_tokens") or settings.get("additional_special_tokens") or []
    optional = {} if system_message is None else {"system_message": system_message}
    return tokenization.NaViLTokenizer(
        tokenizer_object=backend,
        template=template or ("internlm2-chat" if is_sentencepiece else "qwen3-chat"),
        spaces_between_special_tokens=is_sentencepiece,
        additional_special_tokens=[token_text(token) for token in extra],
        **{role: token for role, token in tokens.items() if token is not None},
        **optional,
    )


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Turns whatever a parser raises about a file into a ValueError that names it."""
    try:
        yield
    except Exception as error:  # tokenizers and protobuf have no exception class of their own to catch
        raise ValueError(f"cannot read {path}: {error}") from error


def token_text(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def declared_tokens(source: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by id, from `tokenizer_config.json` or else `added_tokens.json`."""
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    declared = {
        int(token_id): AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})
        for token_id, token in (settings.get("added_tokens_decoder") or {}).items()
    }
    if not declared and (source / "added_tokens.json").is_file():
        names = read_json(source / "added_tokens.json")
        declared = {token_id: AddedToken(name, normalized=False, special=True) for name, token_id in names.items()}
    return declared


def add_declared_tokens(backend: Tokenizer, declared: dict[int, AddedToken]) -> None:
    for token_id, token in sorted(declared.items()):
        # A token that is known already keeps its id; the call then only sets its flags.
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != token_id:
            raise ValueError(
                f"token {token.content!r} has id {backend.token_to_id(token.content)}, declared as {token_id}"
            )


def sentencepiece_backend(path: Path, add_bos: bool) -> tuple[Tokenizer, dict[str, str]]:
    """A SentencePiece BPE model with byte fallback as a `tokenizers` pipeline, and the special tokens it names.

    Raises:
        ValueError: not a BPE model with the identity normalizer and byte fallback, which InternLM2's is.
    """
    from sentencepiece import sentencepiece_model_pb2  # only this format needs it

    with unreadable(path):
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    kind = model.trainer_spec.ModelType.Name(model.trainer_spec.model_type)
    if kind != "BPE" or not model.trainer_spec.byte_fallback:
        raise ValueError(
            f"{path.name} is a {kind} model, byte_fallback={model.trainer_spec.byte_fallback}; need BPE, True"
        )
    spec = model.normalizer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces or not spec.escape_whitespaces:
        raise ValueError(f"{path.name} normalizes its input ({spec.name}); only the identity is supported")

    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    piece_type = model.SentencePiece.Type
    text_types = (piece_type.NORMAL, piece_type.USER_DEFINED)
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type in text_types}
    unknown = next(piece.piece for piece in model.pieces if piece.type == piece_type.UNKNOWN)
    backend = Tokenizer(
        models.BPE(vocabulary, sentencepiece_merges(scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if spec.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", left=1)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    controls = [piece.piece for piece in model.pieces if piece.type in (piece_type.CONTROL, piece_type.UNKNOWN)]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in controls])
    if add_bos:
        bos = model.trainer_spec.bos_piece
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    spec = model.trainer_spec
    return backend, {"bos_token": spec.bos_piece, "eos_token": spec.eos_piece, "unk_token": spec.unk_piece}


def sentencepiece_merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score of the result first, as SentencePiece picks them."""
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, -cut, left, right))
    return [(left, right) for _, _, left, right in sorted(merges)]


# ----------------------------------------------------------------------------------------------------------------------
# Folders
# ----------------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {content!r:.80}")
    return content


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` that takes its name when all went well, and is removed otherwise.

    Raises:
        ValueError: the destination exists and is not an empty folder, or its name has a dot.
    """
    destination = destination.resolve()
    if "." in destination.name:
        raise ValueError(
            f"the name of {destination} has a dot; transformers loads no code from a local folder whose name has one"
        )
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ValueError(f"{destination} exists already; choose another destination or remove it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        yield building
        # Temporary folders and safetensors files are private to their owner: give what a new file would have.
        mask = os.umask(0)
        os.umask(mask)
        building.chmod(0o777 & ~mask)
        for path in building.iterdir():
            path.chmod(0o666 & ~mask)
        os.replace(building, destination)
    finally:
        shutil.rmtree(building, ignore_errors=True)


MODEL_CARD = """\
---
license: mit
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- navil
- multimodal
- custom_code
---

# NaViL

A native multimodal LLM: images of any resolution and text in, text out
([arXiv 2510.08565](https://arxiv.org/abs/2510.08565), NeurIPS 2025).
Converted from the released checkpoint `{source}` by `convert_checkpoint.py official`:
{parameters:,} parameters, {dtype}.

```python
import torch
from transformers import AutoModel, AutoTokenizer

path = "."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModel.from_pretrained(path, torch_dtype=torch.bfloat16, trust_remote_code=True).eval()
print(model.chat(tokenizer, "photo.jpg", "What is in this picture?"))
```

`AutoProcessor` gives the transformers-style interface (`apply_chat_template`, then `model.generate`).

## Sizes

| | vision encoder | LLM |
|---|---|---|
| depth | {vision.num_hidden_layers} | {text.num_hidden_layers} |
| width | {vision.hidden_size} | {text.hidden_size} |
| MLP width | {vision.intermediate_size} | {text.intermediate_size} |
| heads (key/value) | {vision.num_attention_heads} | {text.num_attention_heads} ({text.num_key_value_heads}) |

An image is seen at several scales with at most {config.max_dynamic_patch} patches of
{vision.patch_size} x {vision.patch_size} pixels at the largest; a visual token covers
{cell} x {cell} pixels. Context length: {text.max_position_embeddings} tokens.
"""


def convert_official(source: Path, folder: Path, dtype: torch.dtype | None, max_shard_size: str) -> None:
    """Fills a folder with the complete model of a released checkpoint folder.

    Raises:
        ValueError: anything in the source that is missing, unknown, misshapen or not expressible, by name.
    """
    source_config = read_json(source / "config.json")
    require(source_config, "model_type", ["navil_chat"], None)
    need(source_config, "vision_config", "llm_config", "template", "downsample_ratio")
    backbone = need(source_config["llm_config"], "model_type")["model_type"]
    require(source_config["llm_config"], "model_type", list(LAYER_RULES), None)
    tokenizer = convert_tokenizer(source, source_config["template"], source_config.get("system_message"))
    tensors = SourceTensors(source)
    special_ids = tokenizer.convert_tokens_to_ids(list(tokenization.IMAGE_TOKENS))
    biases = attention_biases(tensors.shapes())
    output_bias = not biases.isdisjoint(OUTPUT_BIASES)
    config = convert_config(source_config, tokenizer, tied=False, output_bias=output_bias)
    if max(special_ids) >= config.text_config.vocab_size:
        raise ValueError(
            f"image token id {max(special_ids)} lies outside the {config.text_config.vocab_size} rows of the embedding"
        )

    source_tied = bool(source_config["llm_config"].get("tie_word_embeddings", False))
    embedding, head, ignored = embedding_sources(tensors, backbone, source_tied)
    rules = official_rules(config, backbone, special_ids, embedding, head, biases)
    check_sources(rules, tensors.shapes(), ignored)
    odd = [
        f"{name} is {tensors.dtype(name)}" for name in tensors.shapes() if tensors.dtype(name) not in DTYPES.values()
    ]
    if odd:
        raise ValueError(f"weights must be one of {sorted(DTYPES)}: {preview(odd)}")
    if source_tied and torch.equal(tensors.rows(embedding, special_ids), tensors[SPECIAL_ROWS]):
        config.tie_word_embeddings = True  # no row is replaced: the head may stay tied
        rules = official_rules(config, backbone, special_ids, embedding, head, biases)

    config.torch_dtype = write_weights(rules, tensors, folder, dtype, max_shard_size)
    write_companions(folder, config, tokenizer, source.resolve().name, tensors.shapes(), rules)


OUTPUT_BIASES = ("wo.bias", "wo_ve.bias", "o_proj.bias", "o_proj_ve.bias")


def embedding_sources(tensors: SourceTensors, backbone: str, tied: bool) -> tuple[str, str, list[str]]:
    """The source's embedding table, its output head, and a duplicate of them that is not needed.

    A tied checkpoint may store its one matrix under either name or both.
    """
    embedding, head = EMBEDDING_NAMES[backbone]
    if not tied:
        return embedding, head, []
    if embedding in tensors and head in tensors:
        if not torch.equal(tensors[embedding], tensors[head]):
            raise ValueError(f"tie_word_embeddings is true but {head} differs from {embedding}")
        return embedding, embedding, [head]
    stored = head if head in tensors else embedding
    return stored, stored, []


def write_companions(
    folder: Path, config: Any, tokenizer: Any, source_name: str, shapes: dict[str, Any], rules: Sequence[Rule]
) -> None:
    """Everything of a model folder that is not weights."""
    vision, text = config.vision_config, config.text_config
    image_processor = image_processing.NaViLImageProcessor(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        min_pixels=config.min_dynamic_patch * vision.patch_size**2,
        max_pixels=config.max_dynamic_patch * vision.patch_size**2,
        scale_downsample_ratio=config.scale_downsample_ratio,
    )
    processing.NaViLProcessor(image_processor, tokenizer).save_pretrained(folder)
    config.save_pretrained(folder)
    GenerationConfig(
        do_sample=False,
        max_new_tokens=1024,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
    for name in ("configuration", "image_processing", "modeling", "processing", "session", "tokenization"):
        shutil.copy(ROOT / f"{name}_navil.py", folder)
    shutil.copy(ROOT / "LICENSE", folder)
    card = MODEL_CARD.format(
        source=source_name,
        parameters=sum(target_shape(rule, shapes).numel() for rule in rules),
        dtype=str(config.torch_dtype).removeprefix("torch."),
        config=config,
        vision=vision,
        text=text,
        cell=vision.patch_size * vision.spatial_merge_size,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# The Hub
# ----------------------------------------------------------------------------------------------------------------------


def check_hub_access(repo_id: str) -> None:
    """Raises a ValueError for a name that no repository can have, and where nobody, or nobody known, is logged in."""
    validate_repo_id(repo_id)
    try:
        HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ValueError(f"cannot push: log in by `hf auth login` or set HF_TOKEN ({error})") from error


def push_folder(folder: Path, repo_id: str) -> str:
    """Pushes a model folder in one commit, to a new repository where there is none; the repository's address.

    Raises:
        ValueError: the Hub refuses; the folder stays.
    """
    try:
        url = HfApi().create_repo(repo_id, exist_ok=True)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload NaViL")
    except HfHubHTTPError as error:
        raise ValueError(f"cannot push {folder}: {error}\nTry again by: hf upload {repo_id} {folder}") from error
    return str(url)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert NaViL checkpoints and tokenizers.",
        epilog="example: python convert_checkpoint.py official NaViL-2B navil-2b --dtype bfloat16",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    official = commands.add_parser("official", help="a released checkpoint folder -> a complete model folder")
    official.add_argument("source", type=Path, metavar="SRC", help="folder in the released layout")
    official.add_argument("destination", type=Path, metavar="DST", help="new folder")
    official.add_argument("--dtype", choices=sorted(DTYPES), help="dtype of the weights (default: the source's)")
    official.add_argument("--max-shard-size", default="1GB", help="largest weight file (default: %(default)s)")
    official.add_argument("--push-to-hub", metavar="REPO", help="then push the folder, to USER/NAME")
    tokenizer = commands.add_parser("tokenizer", help="a released tokenizer -> tokenizer files alone")
    tokenizer.add_argument("source", type=Path, metavar="SRC", help="folder with the released tokenizer")
    tokenizer.add_argument("destination", type=Path, metavar="DST", help="new folder")
    tokenizer.add_argument(
        "--template", choices=sorted(tokenization.ASSISTANT_PREFIXES), help="chat template (default: by its kind)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        if not options.source.is_dir():
            raise ValueError(f"{options.source} is not a folder")
        repo_id = getattr(options, "push_to_hub", None)
        if repo_id is not None:
            check_hub_access(repo_id)
        with new_folder(options.destination) as folder:
            if options.command == "official":
                convert_official(options.source, folder, DTYPES.get(options.dtype), options.max_shard_size)
            else:
                convert_tokenizer(options.source, options.template).save_pretrained(folder)
        if repo_id is not None:
            print(f"pushed to {push_folder(options.destination, repo_id)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"wrote {options.destination}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
