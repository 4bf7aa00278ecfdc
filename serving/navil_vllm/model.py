"""The model: NaViL's own encoder and connector, and its decoder with vLLM's parallel layers and paged attention.

    pixel_values -> NaViLVisionModel -> NaViLConnector -> visual tokens      code of the model folder, on each device
    ids -> embeddings, visual tokens in their slots                          embed_input_ids
        -> a step of text alone:      the text experts, compiled             DecoderModel.forward
        -> a step with visual tokens: sorted by modality, both experts       DecoderModel.forward_with_images
        -> logits

vLLM gives `embed_input_ids` a mask of the tokens of this step whose embeddings come from images, made of the slots'
positions in their prompts. As `<img>` is among them (see processing.py), it is exactly the mask of the visual experts,
whatever part of a prompt the step holds; a generated `<IMG_CONTEXT>` stays text, as in the package.

Shapes: T tokens of a step (of several requests), D hidden size, H heads, K key/value heads, E head dimension; heads are
those of one device.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsLoRA, SupportsMultiModal, SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from . import lora
from .processing import NaViLDummyInputsBuilder, NaViLMultiModalProcessor, NaViLProcessingInfo, from_model_folder

MODALITIES = ("text", "visual")
FULL_PRECISION = ("model.vision_model", "model.connector")
"""Modules that must not be quantized."""


class ModalityOrder(NamedTuple):
    """Sorts the tokens of a step by modality, text first: each expert then runs on one slice."""

    num_text: int
    by_modality: Tensor  # (T,) token at each sorted index
    by_sequence: Tensor  # (T,) sorted index of each token

    @classmethod
    def build(cls, is_visual: Tensor, device: torch.device) -> "ModalityOrder":
        """is_visual: (T,) bool on the CPU, so that no device is waited for."""
        by_modality = is_visual.byte().argsort(stable=True)
        num_text = len(is_visual) - int(is_visual.sum())
        by_sequence = by_modality.argsort()
        return cls(num_text, by_modality.to(device, non_blocking=True), by_sequence.to(device, non_blocking=True))

    def split(self, x: Tensor) -> Tensor:
        return x[self.by_modality]

    def join(self, x: Tensor) -> Tensor:
        return x[self.by_sequence]

    def apply(self, experts: nn.ModuleDict | dict[str, Callable], x: Tensor) -> Tensor:
        """Applies each expert to its own tokens of x (T, ...), sorted by modality."""
        parts = {"text": x[: self.num_text], "visual": x[self.num_text :]}
        return torch.cat([experts[modality](part) for modality, part in parts.items() if len(part)])


class SequenceOrder(NamedTuple):
    """In place of ModalityOrder with LoRA, whose layers find the adapter of a token by its index in the step.

    Both experts run on all tokens.
    """

    is_visual: Tensor  # (T, 1) bool

    def split(self, x: Tensor) -> Tensor:
        return x

    def join(self, x: Tensor) -> Tensor:
        return x

    def apply(self, experts: nn.ModuleDict | dict[str, Callable], x: Tensor) -> Tensor:
        """Applies both experts to x (T, ...)."""
        return torch.where(self.is_visual, experts["visual"](x), experts["text"](x))


class AttentionExpert(nn.Module):
    """One modality's projections for the shared attention."""

    def __init__(self, config: Any, quant_config: Any, prefix: str):
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.sizes = [self.qkv_proj.num_heads * self.head_dim, *[self.qkv_proj.num_kv_heads * self.head_dim] * 2]
        self.has_norms = config.qk_norm
        if self.has_norms:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, (H + 2 * K) * E): normalized queries and keys, and values."""
        qkv, _ = self.qkv_proj(x)
        if not self.has_norms:
            return qkv
        query, key, value = qkv.split(self.sizes, dim=-1)
        query = self.q_norm(query.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        key = self.k_norm(key.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        return torch.cat([query, key, value], dim=-1)

    def output(self, x: Tensor) -> Tensor:
        return self.o_proj(x)[0]


class DecoderAttention(nn.Module):
    """Causal attention over all tokens, with the projections of each token's modality."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        quant_config = vllm_config.quant_config
        self.text = AttentionExpert(config, quant_config, f"{prefix}.text")
        self.visual = AttentionExpert(config, quant_config, f"{prefix}.visual")
        self.rotary_emb = get_rope(
            config.head_dim,
            config.max_position_embeddings,
            rope_parameters={"rope_theta": config.rope_theta, **self.rope_scaling(config)},
        )
        num_heads, num_kv_heads = self.text.qkv_proj.num_heads, self.text.qkv_proj.num_kv_heads
        self.attn = Attention(
            num_heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    @staticmethod
    def rope_scaling(config: Any) -> dict[str, Any]:
        if config.rope_type == "linear":
            return {"rope_type": "linear", "factor": config.rope_factor}
        return {"rope_type": "default"}  # also for dynamic NTK scaling, which starts beyond the trained context

    def attend(self, positions: Tensor, qkv: Tensor) -> Tensor:
        """In sequence order: (T, (H + 2 * K) * E) -> (T, H * E)."""
        query, key, value = qkv.split(self.text.sizes, dim=-1)
        query, key = self.rotary_emb(positions, query.contiguous(), key.contiguous())
        return self.attn(query, key, value)

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        return self.text.output(self.attend(positions, self.text.project(x)))

    def forward_with_images(self, positions: Tensor, x: Tensor, order: ModalityOrder | SequenceOrder) -> Tensor:
        """As `forward`; x and the result (T, D) are in the given order."""
        qkv = order.apply({"text": self.text.project, "visual": self.visual.project}, x)
        attended = order.split(self.attend(positions, order.join(qkv)))
        return order.apply({"text": self.text.output, "visual": self.visual.output}, attended)


class FeedForwardExpert(nn.Module):
    """SwiGLU of one modality."""

    def __init__(self, config: Any, quant_config: Any, prefix: str):
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.activation = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(x)[0]))[0]


class DecoderLayer(nn.Module):
    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(config, vllm_config, f"{prefix}.self_attn")
        self.mlp = nn.ModuleDict(
            {name: FeedForwardExpert(config, vllm_config.quant_config, f"{prefix}.mlp.{name}") for name in MODALITIES}
        )

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        x = x + self.self_attn(positions, self.input_layernorm(x))
        return x + self.mlp["text"](self.post_attention_layernorm(x))

    def forward_with_images(self, positions: Tensor, x: Tensor, order: ModalityOrder | SequenceOrder) -> Tensor:
        """As `forward`; x and the result (T, D) are in the given order."""
        x = x + self.self_attn.forward_with_images(positions, self.input_layernorm(x), order)
        return x + order.apply(self.mlp, self.post_attention_layernorm(x))


@support_torch_compile(dynamic_arg_dims={"positions": 0, "inputs_embeds": 0})
class DecoderModel(nn.Module):
    """The decoder without its output head; `forward`, for text, is compiled and captured into graphs."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config.text_config
        self.has_adapters = vllm_config.lora_config is not None
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.layers = nn.ModuleList(
            [DecoderLayer(config, vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(self, positions: Tensor, inputs_embeds: Tensor) -> Tensor:
        x = inputs_embeds
        for layer in self.layers:
            x = layer(positions, x)
        return self.norm(x)

    def forward_with_images(self, positions: Tensor, inputs_embeds: Tensor, is_visual: Tensor) -> Tensor:
        """As `forward`; is_visual (T,) bool on the CPU tells the tokens of the visual experts."""
        device = inputs_embeds.device
        if self.has_adapters:
            order = SequenceOrder(is_visual[:, None].to(device, non_blocking=True))
        else:
            order = ModalityOrder.build(is_visual, device)
        x = order.split(inputs_embeds)
        for layer in self.layers:
            x = layer.forward_with_images(positions, x, order)
        return order.join(self.norm(x))


@MULTIMODAL_REGISTRY.register_processor(
    NaViLMultiModalProcessor, info=NaViLProcessingInfo, dummy_inputs=NaViLDummyInputsBuilder
)
class NaViLForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsQuant):
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.": ""},
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.is_visual: Tensor | None = None  # (T,) bool: the visual tokens of the step between its two calls
        with self._mark_tower_model(vllm_config, "image"):
            # Replicated on each device: vLLM's tensor parallelism covers the decoder.
            encoder = from_model_folder("modeling_navil.NaViLVisionModel", vllm_config.model_config)
            connector = from_model_folder("modeling_navil.NaViLConnector", vllm_config.model_config)
            config.vision_config._attn_implementation = "sdpa"
            self.vision_model = encoder(config.vision_config)
            self.connector = connector(config)
        with self._mark_language_model(vllm_config):
            self.language_model = DecoderModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model"))
            self.lm_head = ParallelLMHead(
                config.text_config.vocab_size,
                config.text_config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.language_model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.text_config.vocab_size)
        check_quantization(vllm_config.model_config.quantization, self.language_model)

    @property
    def lora_manager(self) -> LoRAModelManager:
        return self._lora_manager

    @lora_manager.setter
    def lora_manager(self, manager: LoRAModelManager) -> None:
        """vLLM sets its manager of LoRA adapters when their layers are in place."""
        lora.prepare(manager)
        self._lora_manager = manager

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<image>"

    def get_language_model(self) -> nn.Module:
        return self.language_model

    def embed_multimodal(
        self, pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None, num_scales: Any = None, **_: Any
    ) -> MultiModalEmbeddings:
        """The embeddings of each image (1 + V, D): of `<img>`, then its visual tokens."""
        if pixel_values is None:
            return []
        visual_tokens = self.connector(self.vision_model(pixel_values, image_grid_thw))
        cells = image_grid_thw.prod(-1) // self.config.vision_config.spatial_merge_size**2  # (S,)
        num_cells = [int(own.sum()) for own in cells.split(num_scales.flatten().tolist())]
        start_id = torch.tensor([self.config.image_start_token_id], device=visual_tokens.device)
        start = self.language_model.embed_input_ids(start_id)
        return [torch.cat([start, own]) for own in visual_tokens.split(num_cells)]

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """As in vLLM; keeps the mask of visual tokens for this step's `forward`."""
        embeddings = super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)
        has_images = multimodal_embeddings is not None and len(multimodal_embeddings) > 0
        self.is_visual = is_multimodal.clone() if has_images else None
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Hidden states (T, D); T may exceed the step's tokens, up to the size of a graph."""
        is_visual, self.is_visual = self.is_visual, None
        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_input_ids(input_ids)
        if is_visual is None:
            return self.language_model(positions, inputs_embeds)
        is_visual = F.pad(is_visual, (0, len(inputs_embeds) - len(is_visual)))
        return self.language_model.forward_with_images(positions, inputs_embeds, is_visual)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As in vLLM.

        Raises:
            ValueError: a quantized encoder or connector.
        """
        return AutoWeightsLoader(self).load_weights(map(check_precision, weights), mapper=self.hf_to_vllm_mapper)


def check_quantization(name: str | None, decoder: DecoderModel) -> None:
    """Refuses a quantization that leaves all layers as they are, as those for mixtures of experts do.

    Raises:
        ValueError: no linear layer of the experts is quantized.
    """
    methods = {type(module.quant_method) for module in decoder.modules() if isinstance(module, LinearBase)}
    if name is not None and methods == {UnquantizedLinearMethod}:
        raise ValueError(f"the quantization {name!r} quantizes none of NaViL's linear layers")


def check_precision(weight: tuple[str, Tensor]) -> tuple[str, Tensor]:
    """Refuses a weight (name, tensor) of the encoder or the connector that is a tensor of torchao."""
    name, tensor = weight
    if name.startswith(FULL_PRECISION) and type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(f"{name!r} is quantized: quantize with modules_to_not_convert={[*FULL_PRECISION, 'lm_head']}")
    return weight
