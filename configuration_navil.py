"""Configuration of NaViL, a native multimodal LLM (arXiv 2510.08565).

Units: a patch is `patch_size` x `patch_size` pixels, one token of the vision encoder; a merged cell is
`spatial_merge_size` x `spatial_merge_size` patches, one visual token of the decoder.
"""

from collections.abc import Sequence
from typing import Any

from transformers.configuration_utils import PretrainedConfig

try:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
except ImportError:  # transformers before 5
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES = None

AUTO_MAP = {
    "AutoConfig": "configuration_navil.NaViLConfig",
    "AutoModel": "modeling_navil.NaViLForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_navil.NaViLForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_navil.NaViLForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_navil.NaViLForConditionalGeneration",
    "AutoTokenizer": ["tokenization_navil.NaViLTokenizer", None],
    "AutoImageProcessor": "image_processing_navil.NaViLImageProcessor",
    "AutoProcessor": "processing_navil.NaViLProcessor",
}
"""The classes that transformers' Auto classes load, relative to the root of a model repository."""

VISUAL_TOKEN_ORDERS = ("raster", "window")
NORM_TYPES = ("rms_norm", "layer_norm")
VISUAL_EXPERTS = ("attention", "ffn")
ROPE_SCALING_TYPES = ("default", "linear", "dynamic")

# Differences of the released models from the defaults below (paper, Table 6).
_NAVIL_2B_VISION = {"visual_token_order": "window"}
_NAVIL_2B_TEXT = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
_NAVIL_9B_VISION = {
    "hidden_size": 1792,
    "intermediate_size": 7168,
    "num_hidden_layers": 32,
    "num_attention_heads": 28,
    "qkv_bias": False,
    "visual_token_order": "window",
}
_NAVIL_9B_TEXT = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "head_dim": 128,
    "qk_norm": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
}


def _require_divisible(config: PretrainedConfig, name: str, divisor_name: str, divisor: int) -> None:
    value = getattr(config, name)
    if value % divisor:
        raise ValueError(
            f"{type(config).__name__}.{name} must be a multiple of {divisor_name}: {value} does not divide by {divisor}"
        )


class _NaViLPartConfig(PretrainedConfig):
    def __init__(self, **kwargs: Any):
        # transformers 4.51 saves this flag of a nested config without the attention itself, and would load eager.
        kwargs.pop("_attn_implementation_autoset", None)
        super().__init__(**kwargs)


class NaViLVisionConfig(_NaViLPartConfig):
    """The vision encoder: pre-norm ViT blocks with 2D RoPE over packed patches (paper, section 3).

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: width, MLP width, depth and heads;
            the head dimension must be a multiple of 4 (2D RoPE rotates pairs of features along each axis).
        patch_size: side of a patch, in pixels.
        spatial_merge_size: side of a merged cell, in patches.
        norm_type: `rms_norm` or `layer_norm`.
        layer_norm_eps: epsilon of either norm.
        qkv_bias: whether the fused q/k/v projection has a bias.
        rope_theta: base of the rotary frequencies of both axes.
        window_size: side of an attention window, in patches.
        fullatt_block_indexes: blocks with attention over a whole segment (one scale of one image); the others attend
            inside windows. None means all blocks.
        visual_token_order: order of the visual tokens in the output. `raster` is row-major over merged cells; `window`,
            as the released weights were trained, is row-major over windows and inside each.
        layer_scale_init: initial value of the per-channel residual scales.
        initializer_range: standard deviation of newly initialized weights.

    Raises:
        ValueError: sizes that do not fit together, with their values.
    """

    model_type = "navil_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 1472,
        intermediate_size: int = 5888,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 23,
        patch_size: int = 16,
        spatial_merge_size: int = 2,
        norm_type: str = "rms_norm",
        layer_norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        rope_theta: float = 10000.0,
        window_size: int = 8,
        fullatt_block_indexes: list[int] | None = None,
        visual_token_order: str = "raster",
        layer_scale_init: float = 0.1,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.norm_type = norm_type
        self.layer_norm_eps = layer_norm_eps
        self.qkv_bias = qkv_bias
        self.rope_theta = rope_theta
        self.window_size = window_size
        self.fullatt_block_indexes = fullatt_block_indexes
        self.visual_token_order = visual_token_order
        self.layer_scale_init = layer_scale_init
        self.initializer_range = initializer_range
        _require_divisible(self, "hidden_size", "4 * num_attention_heads", 4 * self.num_attention_heads)
        _require_divisible(self, "window_size", "spatial_merge_size", self.spatial_merge_size)
        for name, allowed in (("norm_type", NORM_TYPES), ("visual_token_order", VISUAL_TOKEN_ORDERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        outside = [block for block in self.fullatt_block_indexes or [] if not 0 <= block < self.num_hidden_layers]
        if outside:
            raise ValueError(f"fullatt_block_indexes {outside} lie outside the {self.num_hidden_layers} blocks")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch: RGB channels x rows x columns."""
        return 3 * self.patch_size**2

    @property
    def merged_dim(self) -> int:
        """Width of a merged cell's concatenated patch features."""
        return self.hidden_size * self.spatial_merge_size**2


class NaViLTextConfig(_NaViLPartConfig):
    """The decoder: a Llama-style LLM with one attention expert and one FFN expert per modality (paper, section 3).

    Args:
        vocab_size: rows of the embedding table.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads: width, FFN width,
            depth, query heads and key/value heads.
        head_dim: width of a head; None means `hidden_size / num_attention_heads`.
        qk_norm: RMSNorm on every query and key head before RoPE (Qwen3).
        attention_bias: biases on the q, k and v projections; the output projection never has one.
        rms_norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None or `{"rope_type": "linear" | "dynamic", "factor": float}`.
        max_position_embeddings: context length in tokens; dynamic NTK scaling starts beyond it.
        attention_dropout: dropout on attention weights, in training only.
        initializer_range: standard deviation of newly initialized weights.
        use_cache: whether `forward` returns a key/value cache by default.
        tie_word_embeddings: whether the output head shares the embedding table.
        visual_experts: which of `attention` and `ffn` have an expert of their own for visual tokens, in every layer;
            without one, visual tokens run on the text expert. All of NaViL's models have both.

    Raises:
        ValueError: sizes that do not fit together, or an unknown expert, with their values.
    """

    model_type = "navil_text"
    base_config_key = "text_config"
    rope_scaling = None  # overrides transformers 5's property of this name, which warns when it is set
    base_model_tp_plan = {
        f"layers.*.{expert}.{modality}.{name}": "rowwise" if name in ("o_proj", "down_proj") else "colwise"
        for expert, names in (("self_attn", "q_proj k_proj v_proj o_proj"), ("mlp", "gate_proj up_proj down_proj"))
        for modality in ("text", "visual")
        for name in names.split()
    }
    """Tensor parallelism of every expert: heads and FFN channels are sharded, the vision encoder is not."""

    def __init__(
        self,
        vocab_size: int = 92556,
        hidden_size: int = 2048,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        head_dim: int | None = None,
        qk_norm: bool = False,
        attention_bias: bool = False,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 1000000.0,
        rope_scaling: dict[str, Any] | None = None,
        max_position_embeddings: int = 32768,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        visual_experts: Sequence[str] = VISUAL_EXPERTS,
        **kwargs: Any,
    ):
        rope_scaling = kwargs.pop("rope_parameters", None) or rope_scaling  # transformers 5's name for it
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        if head_dim is None:
            _require_divisible(self, "hidden_size", "num_attention_heads", num_attention_heads)
            head_dim = hidden_size // num_attention_heads
        self.head_dim = head_dim
        self.qk_norm = qk_norm
        self.attention_bias = attention_bias
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.rope_scaling = rope_scaling
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.visual_experts = [name for name in VISUAL_EXPERTS if name in visual_experts]
        if len(self.visual_experts) != len(visual_experts):
            raise ValueError(f"visual_experts may name {VISUAL_EXPERTS}, once each; got {visual_experts!r}")
        _require_divisible(self, "num_attention_heads", "num_key_value_heads", self.num_key_value_heads)
        _require_divisible(self, "head_dim", "2", 2)
        if self.rope_type not in ROPE_SCALING_TYPES or self.rope_factor < 1:
            raise ValueError(
                f"rope_scaling must be None, or a rope_type of {ROPE_SCALING_TYPES} with a factor of at least 1; "
                f"got {self.rope_scaling!r}"
            )

    @property
    def rope_type(self) -> str:
        scaling = self.rope_scaling or {}
        return scaling.get("rope_type") or scaling.get("type") or "default"

    @property
    def rope_factor(self) -> float:
        return float((self.rope_scaling or {}).get("factor", 1.0))

    @property
    def context_length(self) -> int:
        """Largest prompt, in tokens: `max_position_embeddings` times the factor of dynamic NTK scaling."""
        return int(self.max_position_embeddings * (self.rope_factor if self.rope_type == "dynamic" else 1))


class NaViLConfig(PretrainedConfig):
    """NaViL: vision encoder, connector and decoder with modality experts.

    Args:
        vision_config, text_config: config objects or dicts of the encoder and the decoder; None means NaViL-2B's.
        image_token_id: id of `<IMG_CONTEXT>`, the placeholder of one visual token.
        image_start_token_id: id of `<img>`, which starts an image and also runs on the visual experts.
        min_dynamic_patch, max_dynamic_patch: budget of an image's smallest and largest scale, in patches.
        scale_downsample_ratio: side ratio tau of consecutive scales in multi-scale packing.

    Raises:
        ValueError: values that do not fit together.
    """

    model_type = "navil"
    sub_configs = {"vision_config": NaViLVisionConfig, "text_config": NaViLTextConfig}
    output_logits = None  # the default of `forward`'s argument

    def __init__(
        self,
        vision_config: dict[str, Any] | NaViLVisionConfig | None = None,
        text_config: dict[str, Any] | NaViLTextConfig | None = None,
        image_token_id: int | None = None,
        image_start_token_id: int | None = None,
        min_dynamic_patch: int = 256,
        max_dynamic_patch: int = 24576,
        scale_downsample_ratio: float = 0.7071,
        **kwargs: Any,
    ):
        if not isinstance(vision_config, NaViLVisionConfig):
            vision_config = NaViLVisionConfig(**(vision_config or _NAVIL_2B_VISION))
        if not isinstance(text_config, NaViLTextConfig):
            text_config = NaViLTextConfig(**(text_config or _NAVIL_2B_TEXT))
        self.vision_config = vision_config
        self.text_config = text_config
        self.image_token_id = image_token_id
        self.image_start_token_id = image_start_token_id
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.scale_downsample_ratio = scale_downsample_ratio
        kwargs["auto_map"] = dict(AUTO_MAP)
        kwargs.setdefault("tie_word_embeddings", text_config.tie_word_embeddings)
        super().__init__(**kwargs)
        if min_dynamic_patch > max_dynamic_patch:
            raise ValueError(
                f"min_dynamic_patch {min_dynamic_patch} is larger than max_dynamic_patch {max_dynamic_patch}"
            )
        if not 0 < scale_downsample_ratio < 1:
            raise ValueError(f"scale_downsample_ratio must lie between 0 and 1, got {scale_downsample_ratio}")
        for name, token_id in (("image_token_id", image_token_id), ("image_start_token_id", image_start_token_id)):
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise ValueError(f"{name} {token_id} lies outside the vocabulary of {self.vocab_size}")

    @property
    def tie_word_embeddings(self) -> bool:
        """The text config's setting."""
        return self.text_config.tie_word_embeddings

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.text_config.tie_word_embeddings = value

    @property
    def vocab_size(self) -> int:
        """The text config's setting, where generation and PEFT look for it."""
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.text_config.vocab_size = value

    @property
    def downsample_ratio(self) -> float:
        """Side of a patch relative to a merged cell; the name in the released config."""
        return 1 / self.vision_config.spatial_merge_size

    @classmethod
    def navil_2b(cls, **overrides: Any) -> "NaViLConfig":
        """NaViL-2B: a 0.6 B encoder and InternLM2-1.8B (paper, Table 6)."""
        return cls(**overrides)

    @classmethod
    def navil_9b(cls, **overrides: Any) -> "NaViLConfig":
        """NaViL-9B: a 1.2 B encoder and Qwen3-8B (paper, Table 6)."""
        return cls(vision_config=_NAVIL_9B_VISION, text_config=_NAVIL_9B_TEXT, **overrides)


NaViLConfig.register_for_auto_class()
if MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES is not None:  # `transformers serve` loads remote code of these models only
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[NaViLConfig.model_type] = "NaViLForConditionalGeneration"
