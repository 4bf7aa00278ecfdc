"""Configs: released `config.json` <-> `NaViLConfig`, and text LLM's `config.json` -> `NaViLConfig`."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from navil.configuration_navil import VISUAL_EXPERTS, NaViLConfig, NaViLTextConfig, NaViLVisionConfig
from navil.tokenization_navil import DEFAULT_SYSTEM_MESSAGE, END_OF_TURN, IMAGE_START_TOKEN, IMAGE_TOKEN, NaViLTokenizer

JSON = dict[str, Any]

RELEASED_BACKBONES = ("internlm2", "qwen3")
LLM_ARCHITECTURES = ("internlm2", "llama", "qwen2", "qwen3")

SUPPORTED_RELEASED = {
    "model_type": ["navil_chat"],
    "select_layer": [-1],
    "use_backbone_lora": [0],
    "use_llm_lora": [0],
    "anyres_image_size": [True],
    "pad2square": [False],
}
SUPPORTED_VISION = {
    "num_channels": [3],
    "hidden_act": ["gelu"],
    "qk_normalization": [False],  # the released code cannot run it
}
SUPPORTED_TEXT = {
    "model_type": LLM_ARCHITECTURES,
    "hidden_act": ["silu"],
    "use_sliding_window": [False],
    "skip_final_norm_weight": [False],
    "mlp_bias": [False],
    "partial_rotary_factor": [1.0],
}

VISION_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
VISION_SETTINGS = (*VISION_SIZES, "norm_type", "layer_norm_eps", "qkv_bias")
VISION_OPTIONS = ("fullatt_block_indexes", "initializer_range", "window_size")
TEXT_SETTINGS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_SETTINGS += ("rms_norm_eps", "max_position_embeddings")
TEXT_OPTIONS = ("num_key_value_heads", "head_dim", "attention_bias", "attention_dropout", "initializer_range")


def need(config: JSON, *names: str) -> JSON:
    """The named settings of a source's config, all of which it must have."""
    if not isinstance(config, dict):
        raise ValueError(f"the source's config.json has {config!r:.80} where an object belongs")
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise ValueError(f"the source's config.json lacks {', '.join(missing)}")
    return {name: config[name] for name in names}


def given(config: JSON, *names: str) -> JSON:
    """Those of the named settings that the config has."""
    return {name: config[name] for name in names if config.get(name) is not None}


def check_supported(config: JSON, supported: Mapping[str, Sequence[Any]]) -> None:
    """Raises a ValueError for a setting of the config, by name and value, if the value is not a supported one."""
    need(config)
    for name, value in given(config, *supported).items():
        if value not in supported[name]:
            raise ValueError(f"{name}={value!r} cannot be converted, only {' or '.join(map(repr, supported[name]))}")


def convert_config(source: JSON, tokenizer: NaViLTokenizer) -> NaViLConfig:
    """A released `config.json` -> `NaViLConfig` with an untied output head. `released_config` is the way back.

    Raises:
        ValueError: a setting that this package does not support, by name and value.
    """
    check_supported(source, SUPPORTED_RELEASED)
    check_supported(source["llm_config"], {"model_type": RELEASED_BACKBONES})
    config = NaViLConfig(
        vision_config=convert_vision_config(source["vision_config"], source["downsample_ratio"]),
        text_config=convert_text_config(source["llm_config"], tied=False),
        **token_ids(tokenizer),
        **need(source, "min_dynamic_patch", "max_dynamic_patch"),
        **given(source, "scale_downsample_ratio"),
    )
    config.architectures = ["NaViLForConditionalGeneration"]
    return config


def convert_vision_config(source: JSON, downsample_ratio: float) -> NaViLVisionConfig:
    check_supported(source, SUPPORTED_VISION)
    is_ratio = isinstance(downsample_ratio, float) and 0 < downsample_ratio < 1
    if not is_ratio or round(1 / downsample_ratio) * downsample_ratio != 1:
        raise ValueError(f"downsample_ratio must be 1 / an integer, got {downsample_ratio!r}")
    return NaViLVisionConfig(
        **need(source, *VISION_SETTINGS),
        **given(source, *VISION_OPTIONS),
        spatial_merge_size=round(1 / downsample_ratio),
        visual_token_order="window",
    )


def convert_text_config(source: JSON, tied: bool) -> NaViLTextConfig:
    """A released `llm_config` or the config of a text LLM -> `NaViLTextConfig`.

    Args:
        tied: whether the result's output head is its embedding table.
    """
    architecture = need(source, "model_type")["model_type"]
    check_supported(source, SUPPORTED_TEXT)
    for kind in source.get("layer_types") or ():
        check_supported({"layer_types": kind}, {"layer_types": ["full_attention"]})
    settings = need(source, *TEXT_SETTINGS) | given(source, *TEXT_OPTIONS) | convert_rope(source)
    settings.setdefault("num_key_value_heads", source["num_attention_heads"])
    if architecture == "qwen2":  # always has biases on q, k and v, and no setting for them
        settings["attention_bias"] = True
    return NaViLTextConfig(**settings, qk_norm=architecture == "qwen3", tie_word_embeddings=tied)


def convert_rope(source: JSON) -> JSON:
    """Base and scaling of the rotary positions; transformers 5 writes both as `rope_parameters`."""
    scaling = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling must be an object with a type and a factor, got {scaling!r}")
    theta = scaling.get("rope_theta") or need(source, "rope_theta")["rope_theta"]
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type == "default":
        return {"rope_theta": theta}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": rope_type, "factor": scaling.get("factor", 1.0)}}


def token_ids(tokenizer: NaViLTokenizer) -> dict[str, int | None]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "image_start_token_id": tokenizer.convert_tokens_to_ids(IMAGE_START_TOKEN),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(END_OF_TURN),
        "pad_token_id": tokenizer.pad_token_id,
    }


def with_defaults(source: JSON) -> JSON:
    """A text LLM's config with the settings that it leaves to transformers' defaults.

    Raises:
        ValueError: an architecture that is not supported, or quantized weights.
    """
    architecture = need(source, "model_type")["model_type"]
    check_supported(source, {"model_type": LLM_ARCHITECTURES, "quantization_config": [None]})
    if architecture not in CONFIG_MAPPING:  # InternLM2 is not part of transformers: its configs are complete
        return source
    try:
        return CONFIG_MAPPING[architecture](**source).to_dict()
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"transformers cannot read the source's config.json: {error}") from error


def grown_config(source: JSON, tokenizer: NaViLTokenizer, vision_shape: tuple[int, int], rows: int) -> NaViLConfig:
    """The config of a text LLM with a new vision encoder.

    Args:
        source: the LLM's config, complete (`with_defaults`).
        tokenizer: its tokenizer, with the image tokens.
        vision_shape: depth and width of the vision encoder.
        rows: rows of the embedding table, at least as many as the tokenizer has ids.
    """
    depth, width = vision_shape
    config = NaViLConfig(
        vision_config=NaViLVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=width // 64
        ),
        text_config=convert_text_config({**source, "vocab_size": rows}, bool(source.get("tie_word_embeddings"))),
        **token_ids(tokenizer),
    )
    config.architectures = ["NaViLForConditionalGeneration"]
    return config


def auto_vision_size(llm_parameters: int) -> int:
    """Parameters of the encoder for an LLM: 0.6 B for 1.8 B and 1.2 B for 8 B, log-linear (arXiv 2510.08565)."""
    exponent = math.log(1.2 / 0.6) / math.log(8 / 1.8)
    return round(0.6e9 * (llm_parameters / 1.8e9) ** exponent)


def vision_shape(parameters: int) -> tuple[int, int]:
    """Depth and width of an encoder of about this size, 12 * depth * width**2.

    The depth follows the released encoders, 24 at 0.6 B and 32 at 1.2 B, log-linear; the width is a multiple of the
    head size 64.
    """
    depth = max(1, round(24 * (parameters / 0.6e9) ** math.log2(32 / 24)))
    return depth, max(1, round(math.sqrt(parameters / 12 / depth) / 64)) * 64


def parse_vision_size(text: str, llm_parameters: int) -> tuple[int, int]:
    """`auto`, a number of parameters like `600M` or `1.2B`, or `DEPTHxWIDTH` -> depth and width.

    Raises:
        ValueError: another form, or a width that is not a multiple of 64.
    """
    wanted = text.strip().lower()
    if wanted == "auto":
        return vision_shape(auto_vision_size(llm_parameters))
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


def released_backbone(config: NaViLConfig) -> str:
    """The released LLM with this decoder's attention."""
    return "qwen3" if config.text_config.qk_norm else "internlm2"


def released_config(config: NaViLConfig, template: str, system_message: str) -> JSON:
    """A `NaViLConfig` -> a released `config.json`. `convert_config` is the way back.

    Args:
        template, system_message: the tokenizer's.

    Raises:
        ValueError: a setting that the released layout cannot represent, by name and value.
    """
    names = ("downsample_ratio", "min_dynamic_patch", "max_dynamic_patch", "scale_downsample_ratio")
    released = {
        **only_values(SUPPORTED_RELEASED),
        **{name: getattr(config, name) for name in names},
        "architectures": ["NaViL"],
        "ps_version": "v1",
        "vision_config": released_vision_config(config),
        "llm_config": released_text_config(config.text_config, released_backbone(config)),
        "template": template,
    }
    if system_message != DEFAULT_SYSTEM_MESSAGE:
        released["system_message"] = system_message
    return released


def only_values(supported: Mapping[str, Sequence[Any]]) -> JSON:
    return {name: value for name, (value,) in supported.items()}


def released_vision_config(config: NaViLConfig) -> JSON:
    vision = config.vision_config
    check_supported(vision.to_dict(), {"visual_token_order": ["window"], "rope_theta": [10000.0]})
    settings = {name: getattr(vision, name) for name in (*VISION_SETTINGS, *VISION_OPTIONS)}
    released = {"model_type": "navil_vit", "downsample_ratio": config.downsample_ratio}
    return released | only_values(SUPPORTED_VISION) | settings


def released_text_config(text: NaViLTextConfig, backbone: str) -> JSON:
    check_supported(text.to_dict(), {"attention_bias": [False], "visual_experts": [list(VISUAL_EXPERTS)]})
    names = (*TEXT_SETTINGS, "num_key_value_heads", "rope_theta", "initializer_range", "tie_word_embeddings")
    released = {name: getattr(text, name) for name in names} | {"hidden_act": "silu", "rope_scaling": None}
    if backbone == "internlm2":
        check_supported(text.to_dict(), {"attention_dropout": [0.0]})
        if text.head_dim * text.num_attention_heads != text.hidden_size:
            raise ValueError(
                f"cannot export {text.num_attention_heads} heads of size {text.head_dim} without qk_norm: InternLM2's "
                f"heads make up the width, {text.hidden_size}"
            )
        released |= {"model_type": "internlm2", "architectures": ["InternLM2VEForCausalLM"], "bias": False}
    else:
        released |= {"model_type": "qwen3", "architectures": ["Qwen3VEForCausalLM"], "attention_bias": False}
        released |= {name: getattr(text, name) for name in ("head_dim", "attention_dropout")}
    if text.rope_type != "default":
        type_name = "type" if backbone == "internlm2" else "rope_type"
        released["rope_scaling"] = {type_name: text.rope_type, "factor": text.rope_factor}
    return released
