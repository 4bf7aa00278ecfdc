"""Layouts of checkpoints: how configs and tensors of one follow from another's.

    released NaViL (reference §2-§4)  <->  this package
    text LLM (Llama, Qwen2, Qwen3, InternLM2)  ->  this package

A `Rule` per tensor says which tensors it comes from and how, so that a conversion can be checked and counted before it
is run, and run one tensor at a time. What is settled here, so that the model code needs no special case: InternLM2's
grouped `wqkv` is split, its two visual output matrices are folded into one, the 12 image-token rows move into the
embedding table, and the patch convolution becomes a linear layer.
"""

import copy
import math
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from checkpoint_files import Tensors, preview
from navil import configuration_navil as configuration
from navil import modeling_navil as modeling
from navil import tokenization_navil as tokenization

RELEASED_BACKBONES = ("internlm2", "qwen3")
LLM_ARCHITECTURES = ("internlm2", "llama", "qwen2", "qwen3")

# ----------------------------------------------------------------------------------------------------------------------
# Configs
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
        raise ValueError(
            f"a checkpoint with {name}={value!r} cannot be read or written here; {name} must be one of {list(allowed)}"
        )


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
    """A released `llm_config` or the config of a text LLM -> `NaViLTextConfig`.

    Args:
        tied: whether the result's output head is its embedding table.
        output_bias: whether an attention output projection has a bias.
    """
    require(source, "model_type", LLM_ARCHITECTURES, None)
    require(source, "hidden_act", ["silu"], "silu")
    require(source, "use_sliding_window", [False], False)
    require(source, "skip_final_norm_weight", [False], False)
    require(source, "mlp_bias", [False], False)
    require(source, "partial_rotary_factor", [1.0], 1.0)
    for kind in source.get("layer_types") or ():
        require({"layer_types": kind}, "layer_types", ["full_attention"], None)
    settings = need(
        source,
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("rms_norm_eps", "max_position_embeddings"),
    )
    optional = ("num_key_value_heads", "head_dim", "attention_bias", "attention_dropout", "initializer_range")
    settings |= {name: source[name] for name in optional if source.get(name) is not None}
    settings.setdefault("num_key_value_heads", source["num_attention_heads"])
    if source["model_type"] == "internlm2":
        settings["attention_bias"] = source.get("bias", True)
    elif source["model_type"] == "qwen2":
        settings["attention_bias"] = True
    return configuration.NaViLTextConfig(
        **settings,
        **convert_rope(source),
        qk_norm=source["model_type"] == "qwen3",
        attention_output_bias=output_bias,
        tie_word_embeddings=tied,
    )


def convert_rope(source: dict[str, Any]) -> dict[str, Any]:
    """Base and scaling of the rotary positions; transformers 5 writes both as `rope_parameters`."""
    scaling = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling must be an object with a type and a factor, got {scaling!r}")
    theta = scaling.get("rope_theta") or need(source, "rope_theta")["rope_theta"]
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type == "default":
        return {"rope_theta": theta}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": rope_type, "factor": scaling.get("factor", 1.0)}}


def with_defaults(source: dict[str, Any]) -> dict[str, Any]:
    """A text LLM's config with the settings that it leaves to transformers' defaults.

    Raises:
        ValueError: an architecture that this package does not express, or quantized weights.
    """
    require(source, "model_type", LLM_ARCHITECTURES, None)
    require(source, "quantization_config", [None], None)
    if source["model_type"] not in CONFIG_MAPPING:  # InternLM2 is not part of transformers: its configs are complete
        return source
    try:
        return CONFIG_MAPPING[source["model_type"]](**source).to_dict()
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"transformers cannot read the source's config.json: {error}") from error


def convert_config(source: dict[str, Any], tokenizer: Any, tied: bool, output_bias: bool = False) -> Any:
    """A released `config.json` -> `NaViLConfig`. Export (`released_config`) is the way back.

    Args:
        tied: whether the result's output head is its embedding table.
        output_bias: whether the attention's output projections have biases.

    Raises:
        ValueError: a setting that this package does not express, by name and value.
    """
    require(source["llm_config"], "model_type", RELEASED_BACKBONES, None)
    require(source, "select_layer", [-1], -1)
    require(source, "use_backbone_lora", [0], 0)
    require(source, "use_llm_lora", [0], 0)
    require(source, "anyres_image_size", [True], True)
    require(source, "pad2square", [False], False)
    config = configuration.NaViLConfig(
        vision_config=convert_vision_config(source["vision_config"], source["downsample_ratio"]),
        text_config=convert_text_config(source["llm_config"], tied, output_bias),
        **token_ids(tokenizer),
        **need(source, "min_dynamic_patch", "max_dynamic_patch"),
        scale_downsample_ratio=source.get("scale_downsample_ratio") or 0.7071,
    )
    config.architectures = ["NaViLForConditionalGeneration"]
    return config


def vision_size(llm_parameters: int) -> int:
    """Parameters of the encoder that suits an LLM: 0.6 B for 1.8 B and 1.2 B for 8 B, log-linear (reference §9)."""
    exponent = math.log(1.2 / 0.6) / math.log(8 / 1.8)
    return round(0.6e9 * (llm_parameters / 1.8e9) ** exponent)


def vision_shape(parameters: int) -> tuple[int, int]:
    """Depth and width of an encoder of about that size, 12 * depth * width**2.

    The depth follows the released encoders, 24 at 0.6 B and 32 at 1.2 B, log-linear; the width is a multiple of the
    head size 64.
    """
    depth = max(1, round(24 * (parameters / 0.6e9) ** math.log2(32 / 24)))
    return depth, max(1, round(math.sqrt(parameters / 12 / depth) / 64)) * 64


def parse_vision_size(text: str, llm_parameters: int) -> tuple[int, int]:
    """`auto`, a number of parameters like `600M` or `1.2B`, or `DEPTHxWIDTH` -> depth and width.

    Raises:
        ValueError: another form, or a width that is no multiple of 64.
    """
    wanted = text.strip().lower()
    if wanted == "auto":
        return vision_shape(vision_size(llm_parameters))
    if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", wanted):
        depth, width = map(int, match.groups())
        if width % 64:
            raise ValueError(f"the vision encoder's width must be a multiple of the head size 64, got {width}")
        return depth, width
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([mb])", wanted):
        parameters = float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]]
        if parameters >= 1e6:
            return vision_shape(round(parameters))
    raise ValueError(f"--vision-size must be auto, a size from 1M like 600M or 1.2B, or DEPTHxWIDTH; got {text!r}")


def grown_config(source: dict[str, Any], tokenizer: Any, shape: tuple[int, int], output_bias: bool, rows: int) -> Any:
    """The `NaViLConfig` that a text LLM grows into.

    Args:
        source: the LLM's config, complete (`with_defaults`).
        tokenizer: its tokenizer, with the image tokens.
        shape: depth and width of the new vision encoder.
        output_bias: whether the attention's output projections have biases.
        rows: rows of the embedding table, at least as many as the tokenizer has ids.
    """
    depth, width = shape
    tied = bool(source.get("tie_word_embeddings", False))
    config = configuration.NaViLConfig(
        vision_config=configuration.NaViLVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=width // 64
        ),
        text_config=convert_text_config({**source, "vocab_size": rows}, tied, output_bias),
        **token_ids(tokenizer),
    )
    config.architectures = ["NaViLForConditionalGeneration"]
    return config


def token_ids(tokenizer: Any) -> dict[str, int | None]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids(tokenization.IMAGE_TOKEN),
        "image_start_token_id": tokenizer.convert_tokens_to_ids(tokenization.IMAGE_START_TOKEN),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(tokenization.END_OF_TURN),
        "pad_token_id": tokenizer.pad_token_id,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Rules
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Rule:
    """How one tensor of the target's layout comes from tensors of the source's."""

    target: str
    sources: dict[str, tuple[int, ...]]  # name -> shape
    convert: Callable[..., Tensor]

    def shape(self) -> tuple[int, ...]:
        """Shape of the result, worked out without data."""
        with torch.device("meta"):
            return tuple(self.convert(*map(torch.empty, self.sources.values())).shape)

    def make(self, tensors: Tensors) -> Tensor:
        return self.convert(*map(tensors.__getitem__, self.sources))


def keep(tensor: Tensor) -> Tensor:
    return tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which products of weights are summed up, well beyond the precision of the weights themselves."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def fold_outputs(visual_output: Tensor, output: Tensor) -> Tensor:
    """`wo_ve(wo(x))` as one matrix, the product rounded once."""
    dtype = working_dtype(output.dtype)
    return (visual_output.to(dtype) @ output.to(dtype)).to(output.dtype)


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
    target = "model.vision_model.patch_embedding"
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
            source = f"vision_model.encoder.layers.{layer}.{name}"
            yield Rule(f"model.vision_model.blocks.{layer}.{name}", {source: shape}, keep)


def connector_rules(config: Any) -> Iterator[Rule]:
    merged, width = config.vision_config.merged_dim, config.text_config.hidden_size
    for source, target, shape in (
        ("mlp1.0", "model.connector.norm", (merged,)),
        ("mlp1.1", "model.connector.fc1", (width, merged)),
        ("mlp1.3", "model.connector.fc2", (width, width)),
    ):
        yield Rule(f"{target}.weight", {f"{source}.weight": shape}, keep)
        yield Rule(f"{target}.bias", {f"{source}.bias": shape[:1]}, keep)


def llama_layer_rules(config: Any, layer: int, biases: Collection[str]) -> Iterator[Rule]:
    """Of the layout that Llama, Qwen2 and Qwen3 share."""
    source, target = f"language_model.model.layers.{layer}", f"model.language_model.layers.{layer}"
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
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            yield Rule(f"{attention}.{name}.weight", {f"{source}.self_attn.{name}{suffix}.weight": (head_dim,)}, keep)
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield ffn_rule(config, f"{target}.mlp.{modality}", name, f"{source}.mlp{suffix}.{name}.weight")
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Rule(f"{target}.{name}.weight", {f"{source}.{name}.weight": (width,)}, keep)


def internlm2_layer_rules(config: Any, layer: int, biases: Collection[str]) -> Iterator[Rule]:
    source, target = f"language_model.model.layers.{layer}", f"model.language_model.layers.{layer}"
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


def attention_biases(names: Collection[str], prefix: str = "language_model.") -> set[str]:
    """Which attention biases the first layer has, by `bias_name`; every other layer must have the same."""
    first_layer = f"{prefix}model.layers.0."
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


OUTPUT_BIASES = ("wo.bias", "wo_ve.bias", "o_proj.bias", "o_proj_ve.bias")
LLAMA_EMBEDDING_NAMES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
LAYER_RULES = dict.fromkeys(LLM_ARCHITECTURES, llama_layer_rules) | {"internlm2": internlm2_layer_rules}
EMBEDDING_NAMES = dict.fromkeys(LLM_ARCHITECTURES, LLAMA_EMBEDDING_NAMES) | {
    "internlm2": ("language_model.model.tok_embeddings.weight", "language_model.output.weight")
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
    yield Rule("model.language_model.embed_tokens.weight", {embedding: table} | special, write_rows)
    if not config.tie_word_embeddings:
        yield Rule("lm_head.weight", {head: table}, keep)


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
    norm = {"language_model.model.norm.weight": (text.hidden_size,)}
    rules.append(Rule("model.language_model.norm.weight", norm, keep))
    return rules


def embedding_sources(tensors: Tensors, names: tuple[str, str], tied: bool) -> tuple[str, str, list[str]]:
    """The source's embedding table, its output head, and a duplicate of them that is not needed.

    A tied checkpoint may store its one matrix under either of its two names or both.
    """
    embedding, head = names
    if not tied:
        return embedding, head, []
    if embedding in tensors and head in tensors:
        if not torch.equal(tensors[embedding], tensors[head]):
            raise ValueError(f"tie_word_embeddings is true but {head} differs from {embedding}")
        return embedding, embedding, [head]
    stored = head if head in tensors else embedding
    return stored, stored, []


# ----------------------------------------------------------------------------------------------------------------------
# From a text LLM
# ----------------------------------------------------------------------------------------------------------------------


def llm_name(name: str) -> str:
    """A released tensor's name in the LLM that the release was grown from."""
    return name.removeprefix("language_model.")


def llm_rules(
    config: Any, architecture: str, rows: int, embedding: str, head: str, biases: Collection[str], seed: int
) -> list[Rule]:
    """Rules for every tensor of this package's layout, from a text LLM's.

    Its weights are the text experts, and copies of them the visual experts. The vision encoder and the connector are
    fresh.

    Args:
        config: the target `NaViLConfig`.
        architecture: one of `LLM_ARCHITECTURES`.
        rows: rows of the LLM's embedding table.
        embedding, head: the LLM's embedding table and output head, one and the same when they are tied.
        biases: the attention biases that the LLM's layers have (see `attention_biases`).
        seed: of the fresh weights.
    """
    text = config.text_config
    rules = [*fresh_rules(config, seed)]
    table = (rows, text.hidden_size)
    rules.append(Rule("model.language_model.embed_tokens.weight", {embedding: table}, grow_table(text.vocab_size)))
    if not text.tie_word_embeddings:
        rules.append(Rule("lm_head.weight", {head: table}, grow_table(text.vocab_size)))
    for layer in range(text.num_hidden_layers):
        for rule in LAYER_RULES[architecture](text, layer, biases):
            if ".visual." in rule.target:
                continue
            sources = {llm_name(name): shape for name, shape in rule.sources.items()}
            rules.append(Rule(rule.target, sources, rule.convert))
            if ".text." in rule.target:
                rules.append(Rule(rule.target.replace(".text.", ".visual."), sources, rule.convert))
    rules.append(Rule("model.language_model.norm.weight", {"model.norm.weight": (text.hidden_size,)}, keep))
    return rules


def grow_table(rows: int) -> Callable[[Tensor], Tensor]:
    """Gives a table new rows up to a number, each the mean of the old ones: as logits, they never come first."""

    def grow(table: Tensor) -> Tensor:
        if len(table) == rows:
            return table
        mean = torch.stack([part.double().sum(0) for part in table.split(4096)]).sum(0) / len(table)
        return torch.cat([table, mean.to(table.dtype).expand(rows - len(table), -1)])

    return grow


def fresh_rules(config: Any, seed: int) -> Iterator[Rule]:
    """The vision encoder and the connector as the model initialises them, each tensor from a seed of its own."""
    with torch.device("meta"):
        model = modeling.NaViLForConditionalGeneration(config)
    for part, initialise in (
        ("model.vision_model", model.vision_model._init_weights),
        ("model.connector", model._init_weights),
    ):
        for name, parameter in model.get_submodule(part).named_parameters(prefix=part):
            yield Rule(name, {}, fresh_tensor(model, name, parameter.shape, initialise, seed))


def fresh_tensor(
    model: nn.Module, name: str, shape: torch.Size, initialise: Callable[[nn.Module], None], seed: int
) -> Callable[[], Tensor]:
    module_name, _, parameter_name = name.rpartition(".")

    def make() -> Tensor:
        module = copy.deepcopy(model.get_submodule(module_name))  # without data, but for the one parameter
        module.register_parameter(parameter_name, nn.Parameter(torch.empty(shape), requires_grad=False))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            initialise(module)
        return module.get_parameter(parameter_name)

    return make


# ----------------------------------------------------------------------------------------------------------------------
# To the released layout
# ----------------------------------------------------------------------------------------------------------------------


def released_config(config: Any, template: str, system_message: str) -> dict[str, Any]:
    """A `NaViLConfig` -> a released `config.json`; `convert_config` is the way back.

    Args:
        template, system_message: the tokenizer's.

    Raises:
        ValueError: a setting that the released layout does not express, by name and value.
    """
    vision, text = config.vision_config, config.text_config
    require(vision.to_dict(), "visual_token_order", ["window"], None)
    require(vision.to_dict(), "rope_theta", [10000.0], None)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "norm_type")
    names += ("layer_norm_eps", "qkv_bias", "window_size", "fullatt_block_indexes", "initializer_range")
    vision_config = {name: getattr(vision, name) for name in names} | {
        **{"model_type": "navil_vit", "num_channels": 3, "hidden_act": "gelu", "qk_normalization": False},
        "downsample_ratio": config.downsample_ratio,
    }
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings", "initializer_range")
    llm_config = {name: getattr(text, name) for name in names} | {
        **{"hidden_act": "silu", "tie_word_embeddings": text.tie_word_embeddings, "rope_scaling": None},
    }
    has_biases = text.attention_bias or text.attention_output_bias
    if released_backbone(config) == "internlm2":
        require(text.to_dict(), "attention_dropout", [0.0], 0.0)
        if text.head_dim * text.num_attention_heads != text.hidden_size:
            raise ValueError(
                f"cannot export {text.num_attention_heads} heads of size {text.head_dim} without qk_norm: InternLM2's "
                f"heads make up the width, {text.hidden_size}"
            )
        llm_config |= {"model_type": "internlm2", "architectures": ["InternLM2VEForCausalLM"], "bias": has_biases}
        type_name = "type"
    else:
        llm_config |= {"model_type": "qwen3", "architectures": ["Qwen3VEForCausalLM"], "head_dim": text.head_dim}
        llm_config |= {"attention_bias": has_biases, "attention_dropout": text.attention_dropout}
        type_name = "rope_type"
    if text.rope_type != "default":
        llm_config["rope_scaling"] = {type_name: text.rope_type, "factor": text.rope_factor}
    return {
        **{"model_type": "navil_chat", "architectures": ["NaViL"], "vision_config": vision_config},
        **{"llm_config": llm_config, "template": template, "select_layer": -1, "pad2square": False},
        **{"use_backbone_lora": 0, "use_llm_lora": 0, "anyres_image_size": True, "ps_version": "v1"},
        **{name: getattr(config, name) for name in ("downsample_ratio", "min_dynamic_patch", "max_dynamic_patch")},
        "scale_downsample_ratio": config.scale_downsample_ratio,
        **({} if system_message == tokenization.DEFAULT_SYSTEM_MESSAGE else {"system_message": system_message}),
    }


def released_backbone(config: Any) -> str:
    """The released LLM that has this decoder's attention."""
    return "qwen3" if config.text_config.qk_norm else "internlm2"


def export_rules(config: Any, special_ids: Sequence[int], dtype: torch.dtype) -> list[Rule]:
    """Rules for every tensor of the released layout, from this package's.

    Args:
        config: a `NaViLConfig` that `released_config` takes.
        special_ids: ids of the 12 image tokens in the row order of `special_token_embedding`.
        dtype: of the released weights, which bounds how well a product can be taken apart.
    """
    text, vision = config.text_config, config.vision_config
    backbone = released_backbone(config)
    embedding, head = EMBEDDING_NAMES[backbone]
    modules = ("wqkv", "wo") if backbone == "internlm2" else ("q_proj", "k_proj", "v_proj", "o_proj")
    biases = [f"{module}{suffix}.bias" for module in modules for suffix in ("", "_ve")]
    # A tensor that was only renamed is renamed back.
    rules = [
        Rule(name, {rule.target: shape}, keep)
        for rule in official_rules(config, backbone, special_ids, embedding, head, biases)
        for name, shape in rule.sources.items()
        if rule.convert is keep
    ]
    pixels = (3, vision.patch_size, vision.patch_size)
    patch_embedding = {"model.vision_model.patch_embedding.weight": (vision.hidden_size, vision.patch_dim)}
    name = "vision_model.embeddings.patch_embedding.weight"
    rules.append(Rule(name, patch_embedding, lambda weight: weight.unflatten(1, pixels)))
    table = {"model.language_model.embed_tokens.weight": (text.vocab_size, text.hidden_size)}
    rules.append(Rule(embedding, table, keep))
    rules.append(Rule(SPECIAL_ROWS, table, lambda weight: weight[list(special_ids)]))
    for layer in range(text.num_hidden_layers):
        prefix = f"language_model.model.layers.{layer}"
        if backbone == "internlm2":
            rules += internlm2_export_rules(text, prefix, f"model.language_model.layers.{layer}", dtype)
        if text.attention_bias != text.attention_output_bias:
            rules += absent_bias_rules(text, prefix, modules)
    return rules


def internlm2_export_rules(text: Any, prefix: str, source: str, dtype: torch.dtype) -> Iterator[Rule]:
    width, groups = text.hidden_size, text.num_attention_heads // text.num_key_value_heads
    heads = {"q_proj": (groups, text.num_attention_heads), "k_proj": (1, text.num_key_value_heads)}
    heads["v_proj"] = heads["k_proj"]

    def pack(*projections: Tensor) -> Tensor:
        per_group = [
            projection.unflatten(0, (text.num_key_value_heads, size, text.head_dim))
            for projection, (size, _) in zip(projections, heads.values(), strict=True)
        ]
        return torch.cat(per_group, dim=1).flatten(0, 2)

    for modality, suffix in (("text", ""), ("visual", "_ve")):
        for kind, columns in (("weight", (width,)), ("bias", ())):
            if kind == "weight" or text.attention_bias:
                sources = {
                    f"{source}.self_attn.{modality}.{name}.{kind}": (count * text.head_dim, *columns)
                    for name, (_, count) in heads.items()
                }
                yield Rule(f"{prefix}.attention.wqkv{suffix}.{kind}", sources, pack)

    outputs = [f"{source}.self_attn.{modality}.o_proj" for modality in ("visual", "text")]
    weights = {f"{output}.weight": (width, width) for output in outputs}
    target = f"{prefix}.attention.wo_ve"

    def take_apart(visual: Tensor, text: Tensor) -> Tensor:
        return unfold_outputs(visual, text, dtype, target)

    def take_biases_apart(visual: Tensor, text: Tensor, visual_bias: Tensor, text_bias: Tensor) -> Tensor:
        inner = unfold_outputs(visual, text, dtype, target).double() @ text_bias.double()
        return (visual_bias.double() - inner).to(visual_bias.dtype)

    yield Rule(f"{target}.weight", weights, take_apart)
    if text.attention_output_bias:
        both_biases = {f"{output}.bias": (width,) for output in outputs}
        yield Rule(f"{target}.bias", weights | both_biases, take_biases_apart)


def unfold_outputs(visual_output: Tensor, output: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The `wo_ve` whose product with `wo` is the visual output matrix.

    Raises:
        ValueError: no such matrix of this dtype gives the product back to within `dtype`'s precision (1e-5 at best).
    """
    if visual_output.is_meta:
        return torch.empty_like(visual_output)
    if torch.equal(visual_output, output):
        return torch.eye(len(output), dtype=dtype)
    product, factor = visual_output.double(), output.double()
    try:
        solved = torch.linalg.solve(factor, product, left=False).to(dtype)
        error = ((solved.double() @ factor - product).norm() / product.norm()).item()
    except torch.linalg.LinAlgError:
        error = math.inf
    tolerance = max(1e-5, torch.finfo(dtype).eps)
    if not error <= tolerance:
        raise ValueError(
            f"cannot express {name}: no {dtype} matrix times wo gives the visual output matrix; the best one errs by "
            f"{error:.1e}, allowed is {tolerance:.1e}"
        )
    return solved


def absent_bias_rules(text: Any, prefix: str, modules: Sequence[str]) -> Iterator[Rule]:
    """The released layout has all attention biases or none: zeros for those that are not there."""
    query_dim, key_dim = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    sizes = {"wqkv": query_dim + 2 * key_dim, "q_proj": query_dim, "k_proj": key_dim, "v_proj": key_dim}
    attention = "attention" if "wo" in modules else "self_attn"
    for module in modules:
        if (module in ("wo", "o_proj")) == text.attention_bias:
            for suffix in ("", "_ve"):
                rows = sizes.get(module, text.hidden_size)
                yield Rule(f"{prefix}.{attention}.{module}{suffix}.bias", {}, partial(torch.zeros, rows))


# ----------------------------------------------------------------------------------------------------------------------
# Checks and sizes
# ----------------------------------------------------------------------------------------------------------------------


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


def count_parameters(rules: Sequence[Rule]) -> dict[str, int]:
    """Parameters of a model of this package's layout, by part."""
    counts = dict.fromkeys(("vision encoder", "connector", "embeddings", "text experts", "visual experts", "norms"), 0)
    for rule in rules:
        counts[part_of(rule.target)] += math.prod(rule.shape())
    return counts


def part_of(name: str) -> str:
    if name.startswith("model.vision_model."):
        return "vision encoder"
    if name.startswith("model.connector."):
        return "connector"
    if "embed_tokens" in name or "lm_head" in name:
        return "embeddings"
    if ".text." in name:
        return "text experts"
    return "visual experts" if ".visual." in name else "norms"
