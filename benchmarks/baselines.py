"""What the benchmarks compare with: simpler implementations, and transformers' own models of equal size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessor, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from navil import modeling_navil
from navil.configuration_navil import NaViLConfig, NaViLTextConfig
from navil.image_processing_navil import NaViLImageProcessor
from navil.modeling_navil import ModalityOrder, Segments

from .workloads import on_device

# -- Images ------------------------------------------------------------------------------------------------------------


def resized_scales(processor: NaViLImageProcessor, image: Image.Image) -> list[Image.Image]:
    """An image at all its scales, by Pillow in one thread: the cost that identical bytes cannot avoid."""
    [plan] = processor.plan(image, multi_scale=True)
    return [image.resize((width, height), Image.Resampling.BICUBIC) for height, width in plan.scales]


def qwen2_vl_patches(processor: NaViLImageProcessor, image: Image.Image) -> np.ndarray:
    """Multi-scale patches (N, 3*p*p) of an image, scale by scale, by transformers' Qwen2-VL image processor."""
    cell = processor.cell
    qwen = Qwen2VLImageProcessor(
        patch_size=processor.patch_size,
        merge_size=processor.merge_size,
        temporal_patch_size=1,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        do_resize=False,
    )
    scales = []
    for resized in resized_scales(processor, image):
        padded = Image.new("RGB", tuple(-(-side // cell) * cell for side in resized.size))
        padded.paste(resized)
        scales.append(qwen.preprocess(padded, return_tensors="np")["pixel_values"])
    return np.concatenate(scales)


# -- Vision encoder ----------------------------------------------------------------------------------------------------


def _dense_inputs(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> tuple[list[Tensor], Tensor]:
    """(1, H, N, E) query, key and value, and the (N, N) mask of pairs within one segment."""
    positions = torch.arange(len(query), device=query.device)
    segment = torch.searchsorted(segments.offsets, positions, right=True)
    return [x.transpose(0, 1)[None] for x in (query, key, value)], segment[:, None] == segment


def dense_mask_sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
    """Attention within segments by one N x N mask over all packed patches; query, key, value and result (N, H, E)."""
    heads, mask = _dense_inputs(query, key, value, segments)
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scaling)[0].transpose(0, 1)


def dense_mask_eager(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float) -> Tensor:
    """As `dense_mask_sdpa`, from the definition: the attention weights of all heads and pairs are held in memory."""
    (query, key, value), mask = _dense_inputs(query, key, value, segments)
    weights = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights @ value)[0].transpose(0, 1)


@contextmanager
def dense_mask(attend: Callable[..., Tensor] = dense_mask_sdpa) -> Iterator[None]:
    """A context in which the vision encoder attends by one mask over all packed patches."""
    with mock.patch.object(modeling_navil, "segment_attention_function", lambda *_: attend):
        yield


def qwen_vision(config: NaViLConfig, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Qwen2.5-VL's vision transformer with as many parameters; every block attends over whole images."""
    vision = config.vision_config
    qwen = Qwen2_5_VLVisionConfig(
        depth=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        intermediate_size=2 * vision.intermediate_size // 3,  # its MLP has three matrices, NaViL's two
        num_heads=vision.num_attention_heads,
        patch_size=vision.patch_size,
        temporal_patch_size=1,
        spatial_merge_size=vision.spatial_merge_size,
        out_hidden_size=config.text_config.hidden_size,
        fullatt_block_indexes=list(range(vision.num_hidden_layers)),
    )
    return on_device(lambda: Qwen2_5_VisionTransformerPretrainedModel._from_config(qwen, torch_dtype=dtype), device)


# -- Decoder -----------------------------------------------------------------------------------------------------------


class BothExperts(ModalityOrder):
    """Runs both experts on every token and selects a result for each by the mask."""

    @classmethod
    def build(cls, batch_shape: tuple[int, int], visual_mask: Tensor | None) -> "BothExperts":
        return cls(batch_shape, 0, None, visual_mask)

    def split(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    def join(self, x: Tensor) -> Tensor:
        return x.unflatten(0, self.batch_shape)

    def apply_experts(self, text_expert: Callable, visual_expert: Callable, x: Tensor) -> Tensor:
        text, visual = text_expert(x), visual_expert(x)
        return torch.where(self.by_sequence.view(-1, *[1] * (text.ndim - 1)), visual, text)


@contextmanager
def both_experts() -> Iterator[None]:
    """A context in which the decoder runs both experts on every token."""
    with mock.patch.object(modeling_navil, "ModalityOrder", BothExperts):
        yield


def plain_llm(config: NaViLTextConfig, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """Qwen3 of the size of one modality's experts, with random weights."""
    sizes = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings rms_norm_eps rope_theta"
    ).split()
    qwen3 = Qwen3Config(**{name: getattr(config, name) for name in sizes}, tie_word_embeddings=False)
    return on_device(lambda: Qwen3ForCausalLM._from_config(qwen3, torch_dtype=dtype), device)
