"""NaViL: images of any resolution and text in, text out (arXiv 2510.08565, NeurIPS 2025).

    pixel_values (N, 3*p*p) -> NaViLVisionModel -> NaViLConnector -> visual tokens (V, D) --+
    input_ids (B, L) -> embed_tokens -> (B, L, D), <IMG_CONTEXT> rows replaced by them <----+
                     -> sorted by modality -> NaViLDecoderLayer x depth -> norm -> sequence order -> lm_head -> logits

In each decoder layer, a token uses the projections and the FFN of its modality; norms, rotary positions and the causal
attention over all tokens are shared (paper, section 3). There is no router: a token is visual if it is `<IMG_CONTEXT>`
or `<img>` and `pixel_values` is given.

Shapes: B batch, L tokens of a sequence, T = B*L tokens, V visual tokens (merged cells), N patches, S scales
(each scale of each frame is an attention segment), D hidden size, H heads, K key/value heads, E head dimension.
"""

import functools
import inspect
import math
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby, pairwise
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import CompileConfig, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.auto.processing_auto import AutoProcessor
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.utils import GENERATION_CONFIG_NAME, can_return_tuple, is_flash_attn_2_available, logging
from transformers.utils.quantization_config import BitsAndBytesConfig

# transformers copies only the modules that this one imports directly, so it imports all of them.
from .chat_navil import CACHE, NaViLChat
from .configuration_navil import NaViLConfig, NaViLTextConfig, NaViLVisionConfig
from .image_processing_navil import IMAGE_INPUTS, ImagePlan, NaViLImageProcessor
from .processing_navil import NaViLProcessor
from .tokenization_navil import IMAGE_START_TOKEN, IMAGE_TOKEN, NaViLTokenizer

if is_flash_attn_2_available():
    from flash_attn import flash_attn_varlen_func
else:
    flash_attn_varlen_func = None

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
HAS_VARLEN = varlen_attn is not None and "window_size" in inspect.signature(varlen_attn).parameters  # torch 2.11

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
LOSS_CHUNK = 1024  # positions; float32 logits of 152,000 tokens take 0.6 GB


class NaViLRMSNorm(nn.RMSNorm):
    """RMSNorm of x in the weight's dtype, which stays float32 under autocast; torch always sums in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def rotary_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """Angles per position, (dim / 2,) float32; not a buffer, so checkpoints and casts cannot change them."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


# oneMKL selects a function's kernel in its first call; if several threads make it at once, one may get a kernel with an
# error of 2e-4 (pytorch/pytorch#188792). So one thread makes the first call here.
for function in (torch.cos, torch.sin):
    function(torch.zeros(1, device="cpu"))


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates features i and i + E/2 of x (..., E) as a pair; cos and sin (..., E/2) broadcast.

    The result has the wider dtype of x and cos.
    """
    first, second = x.chunk(2, dim=-1)
    rotated = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(rotated, dim=-1)


def visible_keys(attention_mask: Tensor | None, cache_position: Tensor, key_length: int) -> Tensor:
    """(B or 1, 1, L, key_length) bool: the keys that each query attends to.

    Args:
        attention_mask: (B, keys), 0 for padding; a static cache may have more keys, which are still empty.
        cache_position: (L,) index of each query among the keys.
    """
    allowed = torch.arange(key_length, device=cache_position.device) <= cache_position[:, None]  # (L, keys)
    if attention_mask is None:
        return allowed[None, None]
    attention_mask = attention_mask.to(cache_position.device)
    real = F.pad(attention_mask, (0, key_length - attention_mask.shape[1])).bool()
    return (allowed & real[:, None])[:, None]


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, elsewhere the lowest number of the dtype."""
    blocked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
    return torch.where(allowed, blocked.new_zeros(()), blocked)


@functools.cache
def compiled(function: Callable) -> Callable:
    """The function as one graph for inputs of any size."""
    return torch.compile(function, dynamic=True)


@torch.compiler.assume_constant_result
def sdpa_backends() -> list[SDPBackend]:
    """The enabled kernels of torch's attention on a GPU, without cuDNN's unless it is the only one.

    torch prefers cuDNN's on Hopper GPUs and newer, where it takes at least 50 ms to plan each new shape. Here the shape
    changes with every prompt, every image and every token of a growing cache.
    """
    enabled = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    return [backend for backend, is_on in enabled.items() if is_on] or [SDPBackend.CUDNN_ATTENTION]


def sdpa_kernels(query: Tensor, dropout: float = 0.0) -> AbstractContextManager:
    """Restricts torch's attention on a GPU to `sdpa_backends`, with flash-attn-4's kernels where they run."""
    if not query.is_cuda:
        return nullcontext()
    backends = sdpa_backends()
    if has_flash_attention_4() and dropout > 0:  # its kernels have no dropout
        backends = [backend for backend in backends if backend != SDPBackend.FLASH_ATTENTION] or backends
    return sdpa_kernel(backends)


@torch.compiler.assume_constant_result
def has_flash_attention_4() -> bool:
    return flash_attention_4_obstacle() is None


@functools.cache
def flash_attention_4_obstacle() -> str | None:
    """Gives torch's flash attention the kernels of flash-attn-4, for the whole process; why not, or None if it does.

    `torch.nn.attention.restore_flash_attention_impl()` takes them away again.
    """
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "flash-attn-4 is not installed"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (9, 10):
        return "flash-attn-4 needs a Hopper or Blackwell GPU"
    try:
        register_flash_attention_4()
        query = torch.zeros(8, 1, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        offsets = torch.tensor([0, 8], dtype=torch.int32, device="cuda")
        varlen_attn(query, query, query, offsets, offsets, 8, 8).sum().backward()
    except Exception as error:  # of many types; then torch's own kernels run
        with suppress(ImportError):
            from torch.nn.attention import restore_flash_attention_impl

            restore_flash_attention_impl()
        obstacle = f"the installed flash-attn-4 does not fit torch {torch.__version__} ({error!r:.200})"
        logger.warning(f"{obstacle}; attention runs on torch's kernels")
        return obstacle
    return None


def register_flash_attention_4() -> None:
    """Activates flash-attn-4 in torch's registry, through a module with as many results as torch unpacks."""
    from torch.nn.attention import activate_flash_attention_impl, register_flash_attention_impl
    from torch.nn.attention._fa4 import register_flash_attention_fa4

    interface, adapter = import_module("flash_attn.cute.interface"), ModuleType("navil_flash_attention_4")
    adapter._flash_attn_fwd = lambda *args, **kwargs: interface._flash_attn_fwd(*args, **kwargs)[:2]
    adapter._flash_attn_bwd = lambda *args, **kwargs: interface._flash_attn_bwd(*args, **kwargs)[:3]
    sys.modules[adapter.__name__] = adapter
    register_flash_attention_impl(
        adapter.__name__, register_fn=functools.partial(register_flash_attention_fa4, adapter.__name__)
    )
    activate_flash_attention_impl(adapter.__name__)


# -- Vision encoder ----------------------------------------------------------------------------------------------------


@dataclass  # a NamedTuple would make torch.compile recompile for each number of segment runs
class Segments:
    """Consecutive groups of packed patches, or of packed documents' tokens; attention stays inside a group."""

    runs: list[tuple[int, int]]  # (count, length): `count` adjacent segments of `length` patches or tokens each
    offsets: Tensor  # (segments + 1,) int32, cumulative lengths (`cu_seqlens`)
    max_length: int

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device) -> "Segments":
        runs = [(len(list(group)), length) for length, group in groupby(lengths)]
        offsets = np.cumsum([0, *lengths], dtype=np.int32)
        return cls(runs, torch.from_numpy(offsets).to(device), max(lengths))

    def repeat_for_members(self, values: Tensor) -> Tensor:
        """(segments,) a number per segment -> (N,) the number of each patch's or token's segment."""
        return values.repeat_interleave(self.offsets.diff())

    def positions(self) -> Tensor:
        """(N,) index of each patch or token in its segment."""
        starts = self.repeat_for_members(self.offsets[:-1])
        return torch.arange(len(starts), device=starts.device) - starts

    @classmethod
    def of_documents(
        cls,
        offsets: Tensor,
        batch_shape: tuple[int, int],
        key_offsets: Tensor | None = None,
        max_lengths: Sequence[int | None] = (),
    ) -> "Segments":
        """The documents of packed rows (B, L), from their offsets (documents + 1,) among the B*L tokens.

        Raises:
            ValueError: offsets that do not divide every row into documents, other offsets for the keys, or a maximum
                below the longest document.
        """
        ends = offsets.tolist()
        row_ends = range(0, math.prod(batch_shape) + 1, batch_shape[1])
        rises = all(before < after for before, after in pairwise(ends))
        if not rises or not ends or (ends[0], ends[-1]) != (0, row_ends[-1]) or not {*row_ends} <= {*ends}:
            kind = f"{row_ends.stop - 1} and contain the end of each of the {batch_shape[0]} rows"
            raise ValueError(f"cu_seq_lens_q must rise from 0 to {kind}; got {ends!r:.200}")
        if key_offsets is not None and key_offsets.tolist() != ends:
            raise ValueError(f"cu_seq_lens_k must equal cu_seq_lens_q; got {key_offsets.tolist()!r:.200}")
        segments = cls.of_lengths([after - before for before, after in pairwise(ends)], offsets.device)
        if any(length is not None and length < segments.max_length for length in max_lengths):
            raise ValueError(f"max_length_q and max_length_k are {max_lengths}, a document has {segments.max_length}")
        return segments


@dataclass
class PackedLayout:
    """The order of merged cells inside the encoder, computed once per forward.

    Segments of equal length are adjacent, and so are windows of equal size inside a segment: each run of them is one
    batched attention. `entry[exit]` maps output cells to input cells.
    """

    entry: Tensor  # (V,) input cell at each index of the encoder's order
    exit: Tensor  # (V,) index in the encoder's order of each output cell
    positions: Tensor  # (N, 2) row and column in patches, encoder's order
    segments: Segments
    windows: Segments

    @classmethod
    def build(cls, grids: Sequence[Sequence[int]], config: NaViLVisionConfig, device: torch.device) -> "PackedLayout":
        # In NumPy: the GPU waits for this, and torch took milliseconds for single look-ups on a host with many cores.
        merge = config.spatial_merge_size
        cells_per_window = config.window_size // merge
        # (frames of all scales, 2) in merged cells; the other arrays have one number per cell.
        sides = np.array([(rows // merge, columns // merge) for count, rows, columns in grids for _ in range(count)])
        lengths = sides.prod(-1)
        frame = np.arange(len(sides)).repeat(lengths)
        rows, columns = sides[frame].T
        row, column = np.divmod(np.arange(len(frame)) - (lengths.cumsum() - lengths)[frame], columns)

        # Windows are numbered row-major in their frame; those at the right and bottom edges may be smaller.
        window_row, window_column = row // cells_per_window, column // cells_per_window
        window = window_row * -(-columns // cells_per_window) + window_column
        height = np.minimum(cells_per_window, rows - window_row * cells_per_window)
        width = np.minimum(cells_per_window, columns - window_column * cells_per_window)

        entry = np.lexsort((window, height * width, frame, lengths[frame]))  # primary key last
        output = np.lexsort((window, frame)) if config.visual_token_order == "window" else np.arange(len(frame))
        is_first = np.diff(frame[entry], prepend=-1) | np.diff(window[entry], prepend=-1) != 0
        window_lengths = np.diff(np.flatnonzero(is_first), append=len(frame))
        return cls(
            entry=torch.from_numpy(entry).to(device),
            exit=torch.from_numpy(entry.argsort()[output]).to(device),
            positions=patch_positions(torch.from_numpy(np.stack([row, column], axis=-1)[entry]).to(device), merge),
            segments=Segments.of_lengths((np.sort(lengths) * merge**2).tolist(), device),
            windows=Segments.of_lengths((window_lengths * merge**2).tolist(), device),
        )


def patch_positions(cells: Tensor, merge: int) -> Tensor:
    """Row and column of each merged cell, (V, 2) in cells -> of each patch, (V * merge**2, 2) in patches."""
    side = torch.arange(merge, device=cells.device)
    return (cells[:, None] * merge + torch.cartesian_prod(side, side)).flatten(0, 1)


def segment_attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attention inside segments, by definition; query, key, value and result are (N, H, E)."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * scaling) @ k.transpose(-1, -2)
        if is_causal:
            hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return F.dropout(scores.softmax(dim=-1), p=dropout).to(v.dtype) @ v

    return _attend_by_run(attend, query, key, value, segments)


def segment_attention_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """As `segment_attention_eager`, with torch's scaled_dot_product_attention."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # contiguous keys and values are faster on CPUs
        k, v = k.contiguous(), v.contiguous()
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal, scale=scaling)

    with sdpa_kernels(query, dropout):
        return _attend_by_run(attend, query, key, value, segments)


def _attend_by_run(attend: Callable, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Batched attention over each run of equal-length segments."""
    sizes = [count * length for count, length in segments.runs]
    outputs = []
    for (count, _), *run in zip(segments.runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in run)  # (count, H, length, E)
        outputs.append(attend(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)  # (N, H, E)


def segment_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """As `segment_attention_eager`, with torch's variable-length flash attention (CUDA, half precision).

    It has no dropout: with dropout this is `segment_attention_sdpa`.
    """
    if dropout > 0:
        return segment_attention_sdpa(query, key, value, segments, scaling, is_causal, dropout)
    offsets, length = segments.offsets, segments.max_length
    causal = {"window_size": (-1, 0)} if is_causal else {}
    return varlen_attn(query, key, value, offsets, offsets, length, length, scale=scaling, **causal)


def segment_attention_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """As `segment_attention_eager`, with the flash-attn package (CUDA, half precision)."""
    offsets, length = segments.offsets, segments.max_length
    return flash_attn_varlen_func(
        query, key, value, offsets, offsets, length, length, dropout, softmax_scale=scaling, causal=is_causal
    )


SEGMENT_ATTENTION_FUNCTIONS = {
    "eager": segment_attention_eager,
    "sdpa": segment_attention_sdpa,
    "varlen": segment_attention_varlen,
    "flash_attention_2": segment_attention_flash,
}


def segment_attention_function(implementation: str, query: Tensor) -> Callable:
    """The function for an attention implementation; `sdpa` selects torch's fastest kernel for the query (N, H, E).

    Raises:
        ValueError: an implementation that has none; the decoder, without packed rows, accepts all of transformers'.
    """
    if implementation not in SEGMENT_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"attention of the vision encoder, or of packed rows, is one of {list(SEGMENT_ATTENTION_FUNCTIONS)}, got "
            f"{implementation!r}; name both parts: attn_implementation={{'vision_config': 'sdpa', 'text_config': ...}}"
        )
    if implementation == "sdpa" and HAS_VARLEN and query.is_cuda:
        is_half = query.dtype in (torch.float16, torch.bfloat16)
        if is_half and query.shape[-1] % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0):
            has_flash_attention_4()  # activates it
            implementation = "varlen"
    return SEGMENT_ATTENTION_FUNCTIONS[implementation]


class NaViLVisionAttention(nn.Module):
    def __init__(self, config: NaViLVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(1)  # (N, H, E) each
        query, key = (rotate_pairs(heads, cos, sin).to(value.dtype) for heads in (query, key))
        attend = segment_attention_function(self.config._attn_implementation, query)
        return self.proj(attend(query, key, value, segments, self.scaling).flatten(1))


class NaViLVisionMLP(nn.Module):
    def __init__(self, config: NaViLVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class NaViLVisionBlock(nn.Module):
    def __init__(self, config: NaViLVisionConfig):
        super().__init__()
        norm = nn.LayerNorm if config.norm_type == "layer_norm" else NaViLRMSNorm
        self.norm1 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = NaViLVisionAttention(config)
        self.mlp = NaViLVisionMLP(config)
        self.ls1 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))
        self.ls2 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        x = torch.addcmul(x, self.ls1, self.attn(self.norm1(x), cos, sin, segments))
        return torch.addcmul(x, self.ls2, self.mlp(self.norm2(x)))


_STATIC_CACHES = weakref.WeakKeyDictionary()  # a `threading.local` per model: threads do not share a static cache


class NaViLPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization of all parts of NaViL."""

    config_class = NaViLConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NaViLVisionBlock", "NaViLDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn_2 = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _supports_cache_class = True
    _supports_static_cache = True
    _supports_quantized_cache = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.get_text_config().initializer_range
        if isinstance(module, NaViLVisionBlock):
            nn.init.constant_(module.ls1, module.attn.config.layer_scale_init)
            nn.init.constant_(module.ls2, module.attn.config.layer_scale_init)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @staticmethod
    def _prepare_4d_causal_attention_mask_with_cache_position(
        attention_mask: Tensor, target_length: int, dtype: torch.dtype, cache_position: Tensor, **kwargs: Any
    ) -> Tensor:
        """The mask that `generate` prepares for static caches, whose shape is the same in each compiled forward."""
        return additive_mask(visible_keys(attention_mask, cache_position, target_length), dtype)

    @property
    def _cache(self) -> Cache:
        """The static cache that `generate` reuses, one per thread; an AttributeError before it makes the first."""
        return _STATIC_CACHES.setdefault(self, threading.local()).cache

    @_cache.setter
    def _cache(self, cache: Cache) -> None:
        _STATIC_CACHES.setdefault(self, threading.local()).cache = cache

    def _run(self, layer: nn.Module, *args: Any) -> Any:
        """Calls a layer, recomputing it in the backward pass when gradient checkpointing is on."""
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(layer.__call__, *args)
        return layer(*args)


class NaViLVisionModel(NaViLPreTrainedModel):
    """ViT over packed patches of any number of images and scales, without padding or N x N mask (paper, section 3)."""

    config_class = NaViLVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: NaViLVisionConfig):
        super().__init__(config)
        self.patch_embedding = nn.Linear(config.patch_dim, config.hidden_size)
        self.blocks = nn.ModuleList([NaViLVisionBlock(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embedding

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Features (V, merge**2, D_vision) of merged cells, in the config's `visual_token_order`.

        Args:
            pixel_values: (N, 3*p*p) or (N, 3, p, p) patches in the image processor's order.
            image_grid_thw: (S, 3) frames, rows and columns of each scale, in patches.

        Raises:
            ValueError: patches or grids of the wrong shape, or different numbers of patches in the two.
        """
        config = self.config
        patches = self.check_inputs(pixel_values, image_grid_thw)
        layout = PackedLayout.build(image_grid_thw.tolist(), config, patches.device)
        merge_cells = (-1, config.spatial_merge_size**2)
        x = patches.unflatten(0, merge_cells).index_select(0, layout.entry).flatten(0, 1)
        x = self.patch_embedding(x.to(self.patch_embedding.bias.dtype))  # (N, D_vision); weights may be quantized
        frequencies = rotary_frequencies(config.head_dim // 2, config.rope_theta, x.device)  # (E/4,)
        angles = (layout.positions[..., None] * frequencies).flatten(1)[:, None]  # (N, 1, E/2)
        cos, sin = angles.cos(), angles.sin()
        full_blocks = range(len(self.blocks)) if config.fullatt_block_indexes is None else config.fullatt_block_indexes
        for index, block in enumerate(self.blocks):
            segments = layout.segments if index in full_blocks else layout.windows
            x = self._run(block, x, cos, sin, segments)
        return x.unflatten(0, merge_cells).index_select(0, layout.exit.to(x.device))

    def check_inputs(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """The patches as (N, 3*p*p); arguments and errors as in `forward`."""
        merge, patch_dim = self.config.spatial_merge_size, self.config.patch_dim
        patches = pixel_values.reshape(len(pixel_values), math.prod(pixel_values.shape[1:]))
        if patches.shape[1] != patch_dim:
            raise ValueError(f"pixel_values has {patches.shape[1]} numbers per patch, expected {patch_dim}")
        is_table = image_grid_thw.ndim == 2 and image_grid_thw.shape[1] == 3 and len(image_grid_thw) > 0
        if not is_table or image_grid_thw.is_floating_point():
            kind = f"{tuple(image_grid_thw.shape)} {image_grid_thw.dtype}"
            raise ValueError(f"image_grid_thw must be (scales, 3) whole numbers, at least one scale; got {kind}")
        grids = image_grid_thw.tolist()
        for grid in grids:
            if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
                kind = f"positive, rows and columns multiples of {merge}"
                raise ValueError(f"frames, rows and columns of a grid must be {kind}; got {grid}")
        num_patches = sum(map(math.prod, grids))
        if num_patches != len(patches):
            raise ValueError(
                f"image_grid_thw describes {num_patches} patches but pixel_values has {len(patches)}; Trainer cuts "
                "batches of streaming data apart, unless its accelerator_config is {'dispatch_batches': False}"
            )
        return patches


class NaViLConnector(nn.Module):
    """Merges the patches of a cell into one visual token: concatenation, LayerNorm, MLP (paper, section 3)."""

    def __init__(self, config: NaViLConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.vision_config.merged_dim, eps=1e-5)
        self.fc1 = nn.Linear(config.vision_config.merged_dim, config.text_config.hidden_size)
        self.fc2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, cells: Tensor) -> Tensor:
        """(V, merge**2, D_vision) -> (V, D)."""
        return self.fc2(F.gelu(self.fc1(self.norm(cells.flatten(1)))))


# -- Decoder with modality experts -------------------------------------------------------------------------------------


class ModalityOrder(NamedTuple):
    """Sorts the tokens of a batch by modality, text first, so that each expert runs on one contiguous slice.

    Built once per forward. Without visual tokens, the order is the sequence order and needs no index.
    """

    batch_shape: tuple[int, int]  # (B, L)
    num_text: int
    by_modality: Tensor | None  # (T,) token at each sorted index
    by_sequence: Tensor | None  # (T,) sorted index of each token

    @classmethod
    def build(cls, batch_shape: tuple[int, int], visual_mask: Tensor | None) -> "ModalityOrder":
        """visual_mask: (B, L) bool, or None if all tokens are text."""
        if visual_mask is None:
            return cls(batch_shape, batch_shape[0] * batch_shape[1], None, None)
        visual = visual_mask.flatten()
        num_text = visual.numel() - int(visual.sum())  # the only wait for the GPU in a forward pass
        by_modality = visual.byte().argsort(stable=True)
        by_sequence = torch.empty_like(by_modality)
        by_sequence[by_modality] = torch.arange(len(by_modality), device=by_modality.device)
        return cls(batch_shape, num_text, by_modality, by_sequence)

    def split(self, x: Tensor) -> Tensor:
        """(B, L, ...) in sequence order -> (T, ...) sorted by modality."""
        x = x.flatten(0, 1)
        return x if self.by_modality is None else x.index_select(0, self.by_modality.to(x.device))

    def join(self, x: Tensor) -> Tensor:
        """(T, ...) sorted by modality -> (B, L, ...) in sequence order."""
        x = x if self.by_sequence is None else x.index_select(0, self.by_sequence.to(x.device))
        return x.unflatten(0, self.batch_shape)

    def apply_experts(self, text_expert: Callable, visual_expert: Callable, x: Tensor) -> Tensor:
        """Applies each expert to its own tokens of x (T, ...).

        With gradients, an expert without tokens runs on an empty slice: DDP needs a (zero) gradient of its weights.
        """
        if self.num_text == len(x) and not torch.is_grad_enabled():
            return text_expert(x)
        return torch.cat([text_expert(x[: self.num_text]), visual_expert(x[self.num_text :])])


@dataclass(eq=False)
class CausalMask:
    """The attention mask of all layers, built when the first layer knows the number of keys in the cache.

    Raises:
        ValueError: a mask of another shape or dtype, or one that flash-attn does not support.
    """

    attention_mask: Tensor | None  # (B, keys) 1 for tokens; or (B, 1, L, keys) bool (True: attend) or additive
    cache_position: Tensor  # (L,) index of each query among the keys
    past_length: int | None  # keys in the cache; None if only the device knows (static caches)
    implementation: str  # the attention implementation of all layers
    dtype: torch.dtype
    documents: Segments | None = None  # of packed rows, in place of a mask
    _built: Tensor | None = None
    _key_length: int | None = None

    def __post_init__(self):
        mask = self.attention_mask
        is_4d = mask is not None and mask.ndim == 4
        if mask is not None:
            num_keys = len(self.cache_position) + (self.past_length or 0)
            if mask.ndim != 2 and not (is_4d and (mask.dtype == torch.bool or mask.is_floating_point())):
                given = f"{tuple(mask.shape)} {mask.dtype}"
                raise ValueError(f"attention_mask must be (B, keys), or (B, 1, L, keys) bool or additive; got {given}")
            if mask.shape[-1] < num_keys:
                raise ValueError(f"attention_mask covers {mask.shape[-1]} keys but there are at least {num_keys}")
        if self.implementation == "flash_attention_2" and (self.past_length is None or is_4d):
            raise ValueError(
                "flash_attention_2 takes neither a (B, 1, L, keys) mask nor a static cache; "
                "attn_implementation='sdpa' takes both"
            )

    def __call__(self, key_length: int, num_places: int, device: torch.device) -> Tensor | None:
        """For the first `key_length` of the `num_places` keys that the cache has room for."""
        if key_length != self._key_length:
            self._built, self._key_length = self._build(key_length, num_places), key_length
        return None if self._built is None else self._built.to(device)

    def _build(self, key_length: int, num_places: int) -> Tensor | None:
        mask = self.attention_mask
        if mask is not None and mask.ndim == 4:
            mask = mask[..., :key_length]
            return additive_mask(mask, self.dtype) if mask.dtype == torch.bool else mask
        if mask is not None and mask.shape[1] > num_places:
            raise ValueError(f"attention_mask covers {mask.shape[1]} keys but there are {num_places}")
        mask = None if mask is None else mask[:, :key_length]
        has_padding = mask is not None and (torch.compiler.is_compiling() or not bool(mask.all()))
        if self.implementation == "flash_attention_2":
            return mask if has_padding else None
        # Kernels need no mask if queries and keys are the same tokens, or if a single query attends to all keys.
        num_queries = len(self.cache_position)
        is_full = self.past_length is not None and self.past_length + num_queries == key_length
        needs_mask = self.implementation == "eager" or has_padding or not is_full or num_queries not in (1, key_length)
        return additive_mask(visible_keys(mask, self.cache_position, key_length), self.dtype) if needs_mask else None


def decoder_attention_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention by definition: query (B, H, L, E), key and value (B, K, keys, E) -> (B, L, H, E).

    Also returns the weights (B, H, L, keys).
    """
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = (query * scaling) @ key.transpose(-1, -2)
    scores = scores if mask is None else scores + mask
    weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def decoder_attention_one_query(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, None]:
    """As `decoder_attention_eager` for L = 1: decoding, whose speed is that of reading keys and values.

    GQA query groups are folded into the query dimension, so keys and values are not repeated as in transformers'
    function. Compiled for a GPU, the definition is faster than kernels that use one block per head; FlexAttention, with
    `flash_decoding`, splits the keys over blocks.
    """
    if module.flash_decoding and torch.compiler.is_compiling():
        score_mod = None if mask is None else lambda score, b, h, q, k: score + mask[b % len(mask), 0, q, k]
        output = flex_attention(query, key, value, score_mod, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None
    if query.is_cuda and torch.compiler.is_compiling():
        return decoder_attention_eager(module, query, key, value, mask, scaling, dropout)[0], None
    query = query.squeeze(2).unflatten(1, (key.shape[1], -1))  # (B, K, H/K, E)
    output = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
    return output.flatten(1, 2)[:, None], None  # (B, 1, H, E)


def decoder_attention_documents(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, documents: Segments, scaling: float, dropout: float
) -> tuple[Tensor, None]:
    """As `decoder_attention_eager` for packed rows: attention stays inside a document, without a mask."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, L, H, E)
    attend = segment_attention_function(module.config._attn_implementation, query)
    flat = (x.flatten(0, 1) for x in (query, key, value))
    return attend(*flat, documents, scaling, is_causal=True, dropout=dropout).view_as(query), None


class NaViLAttentionExpert(nn.Module):
    """One modality's projections for the shared attention."""

    def __init__(self, config: NaViLTextConfig):
        super().__init__()
        self.head_dim = config.head_dim
        query_dim = config.num_attention_heads * config.head_dim
        key_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias=False)
        self.q_norm = NaViLRMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = NaViLRMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def query(self, x: Tensor) -> Tensor:
        return self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))  # (T, H, E)

    def key(self, x: Tensor) -> Tensor:
        return self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))  # (T, K, E)

    def value(self, x: Tensor) -> Tensor:
        return self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, E)


class NaViLAttention(nn.Module):
    """Causal attention over all tokens, with the projections of each token's modality (the paper's MHA-MMoE)."""

    flash_decoding = False

    def __init__(self, config: NaViLTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.text = NaViLAttentionExpert(config)
        self.visual = NaViLAttentionExpert(config) if "attention" in config.visual_experts else None

    def project(self, x: Tensor, order: ModalityOrder, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, H, L, E) and keys, and values, (B, K, L, E) each, of tokens sorted by modality (T, D)."""
        text, visual = self.text, self.visual or self.text
        query = order.join(order.apply_experts(text.query, visual.query, x)).transpose(1, 2)  # (B, H, L, E)
        key = order.join(order.apply_experts(text.key, visual.key, x)).transpose(1, 2)  # (B, K, L, E)
        value = order.join(order.apply_experts(text.value, visual.value, x)).transpose(1, 2)
        return rotate_pairs(query, *rotary), rotate_pairs(key, *rotary), value

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: CausalMask, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `project`'s queries, (B, L, H*E), and its weights if the implementation gives them."""
        num_places = key.shape[-2]
        if cache is not None:
            cached = cache.update(key, value, self.layer_idx, {"cache_position": mask.cache_position})
            num_places = cached[0].shape[-2]
            if mask.past_length != 0:  # an empty static cache returns its empty places too
                key, value = cached
        if mask.documents is not None:
            attend = decoder_attention_documents
        elif mask.implementation == "eager":
            attend = decoder_attention_eager
        elif mask.implementation == "sdpa" and query.shape[-2] == 1:
            attend = decoder_attention_one_query
        else:
            attend = ALL_ATTENTION_FUNCTIONS[mask.implementation]
        dropout = self.config.attention_dropout if self.training else 0.0
        built_mask = mask.documents or mask(key.shape[-2], num_places, query.device)
        with sdpa_kernels(query, dropout):
            output, weights = attend(self, query, key, value, built_mask, scaling=self.scaling, dropout=dropout)
        return output.flatten(2), weights

    def project_output(self, attended: Tensor, order: ModalityOrder) -> Tensor:
        """(B, L, H*E) -> (T, D), sorted by modality."""
        visual = self.visual or self.text
        return order.apply_experts(self.text.o_proj, visual.o_proj, order.split(attended))


class NaViLFeedForwardExpert(nn.Module):
    """SwiGLU of one modality."""

    def __init__(self, config: NaViLTextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class NaViLFeedForward(nn.Module):
    """The FFN of each token's modality (the paper's FFN-MMoE)."""

    def __init__(self, config: NaViLTextConfig):
        super().__init__()
        self.text = NaViLFeedForwardExpert(config)
        self.visual = NaViLFeedForwardExpert(config) if "ffn" in config.visual_experts else None

    def forward(self, x: Tensor, order: ModalityOrder) -> Tensor:
        return order.apply_experts(self.text, self.visual or self.text, x)


class NaViLDecoderLayer(nn.Module):
    """Attention and FFN, each with a residual.

    The parts before and after attention see no mask and no cache: compiled, one graph of each serves all layers.
    """

    is_compiled = False

    def __init__(self, config: NaViLTextConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = NaViLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = NaViLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = NaViLAttention(config, layer_idx)
        self.mlp = NaViLFeedForward(config)

    def forward(
        self, x: Tensor, order: ModalityOrder, rotary: tuple[Tensor, Tensor], mask: CausalMask, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        before, after = NaViLDecoderLayer.before_attention, NaViLDecoderLayer.after_attention
        if self.is_compiled and not torch.compiler.is_compiling():
            before, after = compiled(before), compiled(after)
        attended, weights = self.self_attn(*before(self, x, order, rotary), mask, cache)
        return after(self, x, attended, order), weights

    def before_attention(
        self, x: Tensor, order: ModalityOrder, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(x), order, rotary)

    def after_attention(self, x: Tensor, attended: Tensor, order: ModalityOrder) -> Tensor:
        x = x + self.self_attn.project_output(attended, order)
        return x + self.mlp(self.post_attention_layernorm(x), order)


class NaViLTextModel(NaViLPreTrainedModel):
    """The decoder without its output head. Without visual tokens, it computes what a plain LLM does."""

    config_class = NaViLTextConfig

    def __init__(self, config: NaViLTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([NaViLDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = NaViLRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        visual_token_mask: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        cache_position: Tensor | None = None,
        cache: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> BaseModelOutputWithPast:
        """As in transformers' decoders.

        Args:
            position_ids: (B or 1, L). Without a mask and a cache, a restart begins another document, as in
                `cu_seq_lens_q`.
            visual_token_mask: (B, L) bool, True for the visual experts; None means that all tokens are text.
            cache: the name of `past_key_values` since transformers 5.24.
            cu_seq_lens_q: (documents + 1,) offsets of the documents in packed rows, among the B*L tokens: no document
                attends to another. `cu_seq_lens_k`, `max_length_q` and `max_length_k` say the same again, as in
                transformers' `DataCollatorWithFlattening`.

        Raises:
            ValueError: inputs that do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch_shape = tuple(inputs_embeds.shape[:2])
        if visual_token_mask is not None and tuple(visual_token_mask.shape) != batch_shape:
            raise ValueError(f"visual_token_mask is {tuple(visual_token_mask.shape)} but the tokens are {batch_shape}")
        past_key_values = one_cache(past_key_values, cache)
        excludes_packing = (
            any(x is not None for x in (attention_mask, past_key_values)) or use_cache or output_attentions
        )
        packing = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        documents = find_documents(batch_shape, position_ids, *packing, excludes_packing)
        if use_cache is None:
            use_cache = self.config.use_cache and documents is None
        use_cache = use_cache and not (self.gradient_checkpointing and self.training)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()

        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if batch_shape[1] > 1 and not torch.compiler.is_compiling():
            past_length = int(past_length)  # of a static cache: one wait for the GPU, in the prefill
        if cache_position is None:
            cache_position = torch.arange(batch_shape[1], device=inputs_embeds.device) + past_length
        causal_mask = CausalMask(
            attention_mask,
            cache_position,
            past_length if isinstance(past_length, int) else None,
            "eager" if output_attentions else self.config._attn_implementation,  # kernels return no weights
            inputs_embeds.dtype,
            documents,
        )
        if position_ids is None:
            position_ids = default_position_ids(attention_mask, cache_position, documents)
        rotary = self._rotary(position_ids, documents, inputs_embeds.dtype)
        order = ModalityOrder.build(batch_shape, visual_token_mask)

        x = order.split(inputs_embeds)  # (T, D)
        hidden_states, attentions = [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(order.join(x))
            x, weights = self._run(layer, x, order, rotary, causal_mask, past_key_values)
            attentions.append(weights)
        last_hidden_state = order.join(self.norm(x))  # (B, L, D)
        hidden_states.append(last_hidden_state)
        return BaseModelOutputWithPast(
            last_hidden_state=last_hidden_state,
            **{CACHE: past_key_values if use_cache else None},
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _rotary(self, position_ids: Tensor, documents: Segments | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, (B, 1, L, E/2), of 1D RoPE without scaling, or with linear or dynamic NTK scaling."""
        config = self.config
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, position_ids.device)  # (E/2,)
        positions = position_ids[..., None].float()  # (B, L, 1)
        if config.rope_type == "linear":
            positions = positions / config.rope_factor
        elif config.rope_type == "dynamic":
            # Beyond the trained context, the base grows with the length of each sequence; no host sync.
            length = positions.amax(dim=1, keepdim=True) + 1  # (B, 1, 1)
            if documents is not None:
                length = documents.repeat_for_members(documents.offsets.diff()).view_as(positions)
            length = length.clamp(min=config.max_position_embeddings)
            growth = config.rope_factor * length / config.max_position_embeddings - (config.rope_factor - 1)
            exponents = torch.arange(0, config.head_dim, 2, device=growth.device) / (config.head_dim - 2)
            frequencies = frequencies * growth**-exponents  # (B, 1 or L, E/2)
        angles = (positions * frequencies)[:, None]  # (B, 1, L, E/2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, given by its name before or since transformers 5.24; a ValueError if both are given."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one thing: give one of them")
    return cache if past_key_values is None else past_key_values


def num_cached_tokens(inputs: dict[str, Any]) -> int:
    """Tokens in the cache of `generate`'s inputs; a host sync for a static cache."""
    cache = one_cache(inputs.get("past_key_values"), inputs.get("cache"))
    return 0 if cache is None else int(cache.get_seq_length())


def default_position_ids(
    attention_mask: Tensor | None, cache_position: Tensor, documents: Segments | None = None
) -> Tensor:
    """(B or 1, L) positions, not counting padding, and restarting in each document of packed rows."""
    if documents is not None:
        return documents.positions().view(-1, len(cache_position))
    if attention_mask is None or attention_mask.ndim != 2:
        return cache_position[None]
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return positions[:, cache_position.to(positions.device)]


def find_documents(
    batch_shape: tuple[int, int],
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    max_length_q: int | None,
    max_length_k: int | None,
    is_excluded: bool,
) -> Segments | None:
    """The documents of packed rows (B, L): as given, or beginning where positions restart inside a row.

    Raises:
        ValueError: values that do not fit together, or documents where `is_excluded`.
    """
    if cu_seq_lens_q is not None and not is_excluded:
        return Segments.of_documents(cu_seq_lens_q, batch_shape, cu_seq_lens_k, (max_length_q, max_length_k))
    if any(x is not None for x in (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)):
        raise ValueError("packed rows need cu_seq_lens_q, without an attention_mask, a cache or attention weights")
    if position_ids is None or is_excluded or torch.compiler.is_compiling():  # then only the device knows positions
        return None
    starts = F.pad(position_ids.diff() != 1, (1, 0), value=True).expand(batch_shape)
    if not starts[:, 1:].any():
        return None
    offsets = F.pad(starts.flatten(), (0, 1), value=True).nonzero().flatten()
    return Segments.of_documents(offsets.to(torch.int32), batch_shape)


def next_token_loss(
    hidden: Tensor,
    labels: Tensor,
    output_head: nn.Module,
    loss_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each position's logits against the next position's label.

    Args:
        hidden: (B, L, D) last hidden state.
        labels: (B, L) ids, -100 for positions to ignore.
        output_head: (..., D) -> (..., vocabulary); it runs on labelled positions only, in chunks.
        loss_weight: (B, L) weight of each label. The loss is then sum(w * ce) / sum(w) over all shifted positions; an
            ignored label adds 0 to the first sum and its weight to the second.
        num_items: divisor of the summed loss instead of the number of labels here: the number of labels in all
            micro-batches of a step. Weighted losses ignore it; to accumulate those, set `Trainer`'s
            `model_accepts_loss_kwargs = False`, so that it averages the micro-batches.

    Returns:
        The loss; 0 with zero gradients if there is no label.
    """
    labels = labels[:, 1:].to(hidden.device, torch.long)
    counted = labels != IGNORE_INDEX
    losses = token_losses(hidden[:, :-1][counted], labels[counted], output_head)
    if loss_weight is not None:
        weight = loss_weight[:, 1:].to(losses)
        total = weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
        return (losses * weight[counted.to(weight.device)]).sum() / total
    num_items = len(losses) if num_items is None else num_items
    return losses.sum() / torch.as_tensor(num_items, device=losses.device).clamp(min=1)


def token_losses(hidden: Tensor, labels: Tensor, output_head: nn.Module) -> Tensor:
    """(N,) float32 cross-entropy of hidden states (N, D) against labels (N,).

    No more than `LOSS_CHUNK` positions have logits at a time: the backward pass computes a chunk's logits again.
    """

    def losses_of_chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = output_head(hidden).float()
        return F.cross_entropy(logits, labels.to(logits.device), reduction="none")

    if len(hidden) <= LOSS_CHUNK:
        return losses_of_chunk(hidden, labels)
    chunks = zip(hidden.split(LOSS_CHUNK), labels.split(LOSS_CHUNK), strict=True)
    return torch.cat([checkpoint(losses_of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


# -- The composed model ------------------------------------------------------------------------------------------------

MIN_STATIC_CACHE = 512  # tokens
DECODING_DEFAULTS = {"use_cache": True, "cache_implementation": None, "num_beams": 1, "prefill_chunk_size": None}
"""Settings of `generate` with which `optimize_for_inference` applies."""
TUNED_OPTIONS = {
    # Tune the kernels of one-row matmuls, fuse independent kernels, start each while the one before it ends.
    "cuda": {
        "triton.cudagraphs": True,
        "coordinate_descent_tuning": True,
        "max_autotune_pointwise": True,
        "combo_kernels": True,
        "triton.enable_pdl": True,
    },
    "cpu": {"cpp_wrapper": True},  # call the kernels from C++ instead of Python
}
"""Options of `torch.compile` that measured fastest for decoding, by device."""


def compile_obstacle(device: torch.device) -> str | None:
    """Why torch cannot compile for a device (no C++ compiler, no triton, an old GPU), or None."""
    try:
        torch.compile(lambda x: -x, dynamic=True)(torch.zeros(2, device=device))
    except Exception as error:  # of many types
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


VISUAL_INPUTS = (*IMAGE_INPUTS, "visual_token_mask")
"""Inputs of `generate` for the prompt only, not for later steps."""

TRAINING_STAGES = {
    "s1.1": ("vision_model.", "connector.", ".visual."),
    "s1.2": ("vision_model.", "connector.", ".visual.", ".self_attn.text."),
    "s2": ("",),
}
"""The paper's training stages (section 4.2): each trains the parameters whose names contain one of these strings."""


def check_slots(num_slots: int, num_visual_tokens: int) -> None:
    if num_slots != num_visual_tokens:
        raise ValueError(
            f"input_ids has {num_slots} <IMG_CONTEXT> tokens but the images give {num_visual_tokens} visual tokens"
        )


def fill_slots(inputs_embeds: Tensor, slots: Tensor, visual_tokens: Tensor) -> Tensor:
    """Writes visual tokens (V, D) into their slots (B, L) bool of the embeddings (B, L, D).

    Raises:
        ValueError: different numbers of slots and visual tokens.
    """
    check_slots(int(slots.sum()), len(visual_tokens))
    visual_tokens = visual_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(slots[..., None].to(inputs_embeds.device), visual_tokens)


class NaViLModel(NaViLPreTrainedModel):
    """Vision encoder, connector and decoder, without the output head."""

    def __init__(self, config: NaViLConfig):
        super().__init__(config)
        self.vision_model = NaViLVisionModel(config.vision_config)
        self.connector = NaViLConnector(config)
        self.language_model = NaViLTextModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Visual tokens (V, D) in the order of their `<IMG_CONTEXT>` slots; arguments as in `NaViLVisionModel`."""
        return self.connector(self.vision_model(pixel_values, image_grid_thw))

    def find_tokens(self, name: str, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """(B, L) bool: the positions of a special token; without ids, it is recognized by its embedding.

        Args:
            name: `image_token_id`, for the slots of visual tokens, or `image_start_token_id`.

        Raises:
            ValueError: the config lacks the token's id.
        """
        token_id = getattr(self.config, name)
        if token_id is None:
            raise ValueError("the config lacks the image tokens' ids: call init_special_token_ids(tokenizer)")
        if input_ids is not None:
            return input_ids == token_id
        embedding = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
        return (inputs_embeds == embedding).all(-1)

    def get_visual_token_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """(B, L) bool: the tokens that run on the visual experts if `pixel_values` is given."""
        slots = self.find_tokens("image_token_id", input_ids, inputs_embeds)
        return slots | self.find_tokens("image_start_token_id", input_ids, inputs_embeds)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        num_scales: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        visual_token_mask: Tensor | None = None,
        always_run_vision: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Last hidden state (B, L, D) of images and text; arguments as in `NaViLForConditionalGeneration`.

        Args:
            always_run_vision: run the vision encoder even without images, as in every training step.
            kwargs: arguments of `NaViLTextModel`.
        """
        has_images = pixel_values is not None
        if has_images and (image_grid_thw is None or (input_ids is None and inputs_embeds is None)):
            raise ValueError("pixel_values needs image_grid_thw, and input_ids or inputs_embeds")
        if not has_images and (input_ids is None) == (inputs_embeds is None):
            raise ValueError("without pixel_values give exactly one of input_ids and inputs_embeds")
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if has_images:
            num_grids = len(image_grid_thw)
            total = num_grids if num_scales is None else int(num_scales.sum())
            if total != num_grids:
                raise ValueError(f"num_scales adds up to {total} but image_grid_thw has {num_grids} scales")
            if visual_token_mask is None:
                visual_token_mask = self.get_visual_token_mask(input_ids, inputs_embeds)
            elif input_ids is None:  # PEFT's prompt tuning puts virtual tokens in front, without a mask
                num_virtual = inputs_embeds.shape[1] - visual_token_mask.shape[1]
                visual_token_mask = F.pad(visual_token_mask, (num_virtual, 0))
            slots = self.find_tokens("image_token_id", input_ids, inputs_embeds) & visual_token_mask
            if len(pixel_values):
                visual_tokens = self.get_image_features(pixel_values, image_grid_thw)
            else:  # rows without images, sliced from a batch with images
                visual_tokens = self._dummy_features(embeds.device)
            embeds = fill_slots(embeds, slots, visual_tokens)
        elif always_run_vision or (self.training and torch.is_grad_enabled()):
            embeds = embeds + self._dummy_features(embeds.device).sum().to(embeds)
        return self.language_model(inputs_embeds=embeds, visual_token_mask=visual_token_mask, **kwargs)

    def _dummy_features(self, device: torch.device) -> Tensor:
        """(0, D): runs the encoder on a blank cell and drops the result, for batches without images.

        Distributed training needs it: FSDP gathers each block's weights, and DDP gets a (zero) gradient of each.
        """
        merge_size = self.config.vision_config.spatial_merge_size
        patches = torch.zeros(merge_size**2, self.config.vision_config.patch_dim, device=device)
        return self.get_image_features(patches, torch.tensor([[1, merge_size, merge_size]]))[:0]


class NaViLForConditionalGeneration(NaViLPreTrainedModel, NaViLChat, GenerationMixin):
    """NaViL with its output head: `generate` and `chat`."""

    decoding_settings: dict[str, Any] | None = None  # of `generate`, after `optimize_for_inference` on a GPU
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: NaViLConfig):
        super().__init__(config)
        self.model = NaViLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.image_processor = NaViLImageProcessor.from_config(config)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, *args: Any, use_flash_attn: bool | None = None, load_in_8bit: bool = False, **kwargs: Any
    ) -> "NaViLForConditionalGeneration":
        """As in transformers; `use_flash_attn` is the released name for an `attn_implementation`.

        Raises:
            ValueError: `use_flash_attn=True` without flash-attn or flash-attn-4, or with another `attn_implementation`.
        """
        if load_in_8bit:  # used in the released examples; transformers 5 has dropped it
            kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        if use_flash_attn is not None:
            implementation = "flash_attention_2" if use_flash_attn and is_flash_attn_2_available() else "sdpa"
            if use_flash_attn and implementation == "sdpa" and (obstacle := flash_attention_4_obstacle()):
                raise ValueError(
                    f"use_flash_attn=True needs an NVIDIA GPU and the package flash-attn or flash-attn-4: {obstacle}"
                )
            # AutoModel moves the argument into the config.
            given = getattr(kwargs.get("config"), "_attn_implementation_internal", None)
            if kwargs.setdefault("attn_implementation", given or implementation) != implementation:
                raise ValueError(f"use_flash_attn={use_flash_attn} means attn_implementation={implementation!r}")
        loaded = super().from_pretrained(*args, **kwargs)
        if kwargs.get("subfolder") and kwargs.get("generation_config") is None:
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            file = f"{kwargs['subfolder']}/{GENERATION_CONFIG_NAME}"
            names = kwargs.keys() & {"revision", "token", "cache_dir", "local_files_only"}
            source = {name: kwargs[name] for name in names}
            with suppress(OSError):  # transformers 5 ignores the subfolder here
                model.generation_config = GenerationConfig.from_pretrained(args[0], file, **source)
        return loaded

    @property
    def vision_model(self) -> NaViLVisionModel:
        return self.model.vision_model

    @property
    def language_model(self) -> NaViLTextModel:
        return self.model.language_model

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_decoder(self) -> nn.Module:
        return self.model.language_model

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """As `NaViLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw)

    def init_special_token_ids(self, tokenizer: NaViLTokenizer) -> None:
        """Sets the ids of `<IMG_CONTEXT>` and `<img>` in the config to the tokenizer's.

        Raises:
            ValueError: the tokenizer lacks them, or they lie outside the embedding table.
        """
        vocabulary = tokenizer.get_vocab()
        token_ids = [vocabulary.get(token) for token in (IMAGE_TOKEN, IMAGE_START_TOKEN)]
        vocab_size = self.config.vocab_size
        if any(token_id is None or token_id >= vocab_size for token_id in token_ids):
            raise ValueError(
                f"{IMAGE_TOKEN} and {IMAGE_START_TOKEN} have ids {token_ids}, the embedding table {vocab_size} rows"
            )
        self.config.image_token_id, self.config.image_start_token_id = token_ids

    def optimize_for_inference(
        self, tune: bool = True, flash_decoding: bool = False
    ) -> "NaViLForConditionalGeneration":
        """Compiles the model for the device that it is on, for `generate`, `chat` and everything else; returns it.

        Decoder layers apart from attention, and on an NVIDIA GPU vision blocks, become graphs that serve all layers and
        sizes. On a GPU, decoding becomes one CUDA graph per size of a static cache, which doubles when it is too small;
        `generate` uses it unless a call asks for another cache, beams or an assistant model. Compilation happens in the
        first calls. Where torch cannot compile, a message says why and the model stays as it is.

        Args:
            tune: on a GPU, try several forms of each decoding kernel, which takes minutes per size of the cache.
            flash_decoding: on a GPU, decode with FlexAttention, which splits the keys of a head over several blocks,
                in place of attention by its definition; not measured yet.
        """
        if obstacle := compile_obstacle(self.device):
            logger.warning(f"the model stays as it is, not compiled: {obstacle}")
            return self
        for layer in self.language_model.layers:
            layer.is_compiled = True
            layer.self_attn.flash_decoding = flash_decoding
        if self.device.type == "cuda":
            for block in self.vision_model.blocks:  # on a CPU, each number of segment runs would be a graph of its own
                block.compile(dynamic=True)
            options = TUNED_OPTIONS["cuda"] if tune else {"triton.cudagraphs": True}
            self.decoding_settings = {"compile_config": CompileConfig(mode=None, options=options)}
        return self.eval()

    def set_training_stage(self, stage: str) -> None:
        """Sets which parameters train (paper, section 4.2).

        Args:
            stage: `s1.1` trains the vision encoder, the connector and the visual experts; `s1.2` also the text experts'
                attention; `s2` everything.

        Raises:
            ValueError: another stage.
        """
        if stage not in TRAINING_STAGES:
            raise ValueError(f"stage must be one of {list(TRAINING_STAGES)}, got {stage!r}")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(part in name for part in TRAINING_STAGES[stage]))

    def enable_input_require_grads(self) -> None:
        """As in transformers, for both the decoder and the vision encoder."""
        super().enable_input_require_grads()
        self.vision_model.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        super().disable_input_require_grads()
        self.vision_model.disable_input_require_grads()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        num_scales: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        visual_token_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weight: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, vocabulary) of images and text, with `labels` also the loss.

        Arguments that other models of transformers do not have:
            pixel_values, image_grid_thw: of all images of the batch, as in `NaViLVisionModel`.
            num_scales: (images,) number of scales of each image.
            inputs_embeds: (B, L, D); with `pixel_values` and without `input_ids`, slots are recognized by their
                embedding, as PEFT's prompt tuning needs.
            visual_token_mask: (B, L) bool, the tokens for the visual experts. The default is every `<IMG_CONTEXT>` and
                `<img>` if `pixel_values` is given, and no token otherwise: pass it with `inputs_embeds` that contain
                visual tokens. An `<IMG_CONTEXT>` outside the mask is not a slot.
            labels: (B, L) ids or -100. A label after an `<IMG_CONTEXT>` is ignored; in the processor's `training_batch`
                it is -100 already, so `Trainer` normalizes by the same token count.
            loss_weight: (B, L), as in `next_token_loss`; with it, labels after `<IMG_CONTEXT>` are not ignored.
            output_logits: whether to compute logits. The default is the config's setting of this name; if that is None,
                training steps with labels compute only the loss, in chunks of positions.
            kwargs: of `NaViLTextModel`: `cache_position`, which transformers passes before 5.24, and packed rows'
                `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`. Others are a TypeError.

        Raises:
            ValueError: different numbers of `<IMG_CONTEXT>` and visual tokens, or inputs that do not fit together.
        """
        config = self.config
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            num_scales=num_scales,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            visual_token_mask=visual_token_mask,
            always_run_vision=labels is not None,
            use_cache=use_cache,
            output_attentions=config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        output_logits = config.output_logits if output_logits is None else output_logits
        logits = loss = None
        if output_logits or output_logits is None and (labels is None or not self.training):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        if labels is not None:
            if hidden.shape[:2] != labels.shape:
                raise ValueError(f"labels are {tuple(labels.shape)} but the tokens are {tuple(hidden.shape[:2])}")
            if loss_weight is None and pixel_values is not None:
                slots = self.model.find_tokens("image_token_id", input_ids, inputs_embeds)
                labels = labels.masked_fill(F.pad(slots[:, :-1], (1, 0)).to(labels.device), IGNORE_INDEX)
            loss = next_token_loss(hidden, labels, self.lm_head, loss_weight, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    # -- generation ----------------------------------------------------------------------------------------------------

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers.

        Raises:
            ValueError: a prompt longer than the context, with both lengths and a `max_pixels` that fits; or
                `prefill_chunk_size` with images.
        """
        settings = self.generation_config if generation_config is None else generation_config
        chunk_size = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        has_images = kwargs.get("pixel_values") is not None
        if chunk_size is not None and has_images:
            raise ValueError("prefill_chunk_size would split a prompt inside its images: leave it out with images")
        prompts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        prompt = next((prompt for prompt in prompts if prompt is not None), None)
        if prompt is not None and prompt.shape[1] > self.config.text_config.context_length:
            self._check_prompts(prompt, kwargs)
        has_ids = prompt is not None and not prompt.is_floating_point()
        if has_images and has_ids and kwargs.get("visual_token_mask") is None:
            # Of the prompt only: generated tokens are text, also if a forward without a cache gets them again.
            kwargs["visual_token_mask"] = self.model.get_visual_token_mask(prompt)
        kwargs |= self._optimized_decoding(settings, kwargs)
        return super().generate(inputs, generation_config, *args, **kwargs)

    def _optimized_decoding(self, generation_config: GenerationConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What `optimize_for_inference` adds to the arguments of `generate`, unless they rule out a static cache."""
        if self.decoding_settings is None or "compile_config" in kwargs or kwargs.get("assistant_model") is not None:
            return {}
        given = one_cache(kwargs.get("past_key_values"), kwargs.get("cache"))
        if given is not None:
            return dict(self.decoding_settings) if given.is_compileable else {}
        chosen = {name: kwargs.get(name, getattr(generation_config, name, None)) for name in DECODING_DEFAULTS}
        is_plain = all(value is None or value == DECODING_DEFAULTS[name] for name, value in chosen.items())
        return {**self.decoding_settings, "cache_implementation": "static"} if is_plain else {}

    def _prepare_cache_for_generation(self, *args: Any) -> Any:
        """As in transformers, but static caches grow by doubling: each size is compiled once."""
        *others, max_length = args[:5]
        if args[0].cache_implementation == "static":
            max_length = self.static_cache_length(max_length)
        return super()._prepare_cache_for_generation(*others, max_length, *args[5:])

    def new_session_cache(self, num_tokens: int) -> Cache:
        """An empty cache of one sequence for `NaViLChatSession`, for at least `num_tokens` tokens."""
        if self.decoding_settings is None:
            return DynamicCache()
        settings = {"max_cache_len": self.static_cache_length(num_tokens), "device": self.device, "dtype": self.dtype}
        return StaticCache(self.config.text_config, max_batch_size=1, **settings)

    def static_cache_length(self, num_tokens: int) -> int:
        """The size of the static cache for a number of tokens: a power of two, or the context's length."""
        doubled = max(MIN_STATIC_CACHE, 1 << (num_tokens - 1).bit_length())
        return max(num_tokens, min(doubled, self.config.text_config.context_length))

    def check_context(self, num_tokens: int, plans: Sequence[ImagePlan] = ()) -> None:
        """Raises `NaViLImageProcessor.context_error` for a prompt with more tokens than the context holds."""
        limit = self.config.text_config.context_length
        if num_tokens > limit:
            raise self.image_processor.context_error(num_tokens, limit, plans)

    def _check_prompts(self, prompts: Tensor, inputs: dict[str, Any]) -> None:
        """`check_context` for the longest row of prompts (B, L), or embeddings (B, L, D)."""
        attention_mask, grids = inputs.get("attention_mask"), inputs.get("image_grid_thw")
        lengths = torch.full((len(prompts),), prompts.shape[1])
        if attention_mask is not None and attention_mask.ndim == 2:
            lengths = attention_mask.sum(-1).cpu()
        plans = []
        if grids is not None and not prompts.is_floating_point():
            rows = self._row_of_scale(prompts[:, num_cached_tokens(inputs) :], grids)  # refuses wrong grids
            plans = self.image_processor.plans_of_grids(grids, inputs.get("num_scales"))
            rows = rows if inputs.get("num_scales") is None else rows[inputs["num_scales"].reshape(-1).cumsum(0) - 1]
            plans = [plan for plan, row in zip(plans, rows.tolist(), strict=True) if row == int(lengths.argmax())]
        self.check_context(int(lengths.max()), plans)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, visual_token_mask: Tensor | None = None, **kwargs
    ) -> dict[str, Any]:
        kwargs.pop("tokenizer", None)  # for stop strings; transformers 4.57 and later pass it to the model
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        attention_mask = kwargs.get("attention_mask")
        if "cache" in inputs:  # PEFT's prompt tuning looks for the older name
            inputs["past_key_values"] = inputs.pop("cache")
        tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        num_new, num_cached = tokens.shape[1], input_ids.shape[1] - tokens.shape[1]
        if num_new > 1 and attention_mask is not None:  # for static caches transformers makes it (B, 1, L, keys)
            inputs["attention_mask"] = attention_mask
        if visual_token_mask is not None:
            # Without a cache the sequence grows past the prompt's mask: generated tokens are text.
            grown = F.pad(visual_token_mask, (0, max(0, input_ids.shape[1] - visual_token_mask.shape[1])))
            inputs["visual_token_mask"] = grown[:, -num_new:]
        if inputs.get("pixel_values") is not None and num_cached > 0:
            inputs |= self._images_not_cached(input_ids, num_cached, inputs["pixel_values"], inputs["image_grid_thw"])
        return inputs

    def _images_not_cached(
        self, input_ids: Tensor, num_cached: int, pixel_values: Tensor, image_grid_thw: Tensor
    ) -> dict[str, Tensor | None]:
        """The images whose slots are not among the prompt's first `num_cached` tokens, which the cache holds.

        The given images may be those of the whole prompt (B, L) or only of its uncached tokens.
        """
        slots = self.model.find_tokens("image_token_id", input_ids)
        columns = slots.nonzero()[:, 1]  # (V,) index in the row, of the slot of each visual token
        if not slots[:, num_cached:].any():
            return dict.fromkeys(VISUAL_INPUTS)
        num_patches = image_grid_thw.prod(-1).to(columns.device)
        num_cells = num_patches // self.config.vision_config.spatial_merge_size**2
        if int(num_cells.sum()) != len(columns):
            return {}
        is_new = columns[num_cells.cumsum(0) - num_cells] >= num_cached  # (S,)
        is_new_patch = is_new.repeat_interleave(num_patches).to(pixel_values.device)
        return {
            "pixel_values": pixel_values[is_new_patch],
            "image_grid_thw": image_grid_thw[is_new.to(image_grid_thw.device)],
            "num_scales": None,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs.get("use_cache", True):  # the cache has the prompt and its images
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in VISUAL_INPUTS}
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeats each prompt and its images `expand_size` times, for beams or several return sequences."""
        packed = {name: inputs.pop(name, None) for name in IMAGE_INPUTS}
        if expand_size > 1 and packed["pixel_values"] is not None:
            new_tokens = input_ids[:, num_cached_tokens(inputs) :]
            if self.model.find_tokens("image_token_id", new_tokens).any():  # else the cache holds the images already
                packed = self._repeat_images(new_tokens, expand_size, *list(packed.values())[:2])
        input_ids, inputs = super()._expand_inputs_for_generation(expand_size, input_ids=input_ids, **inputs)
        return input_ids, inputs | {name: value for name, value in packed.items() if value is not None}

    def _repeat_images(
        self, input_ids: Tensor, times: int, pixel_values: Tensor, image_grid_thw: Tensor
    ) -> dict[str, Tensor]:
        row_of_scale = self._row_of_scale(input_ids, image_grid_thw)
        scales = [(row_of_scale == row).nonzero().flatten().tolist() for row in range(len(input_ids))]
        repeated = [scale for of_row in scales for _ in range(times) for scale in of_row]
        patches = pixel_values.split(image_grid_thw.prod(-1).tolist())
        return {
            "pixel_values": torch.cat([patches[scale] for scale in repeated]),
            "image_grid_thw": image_grid_thw[repeated],
        }

    def _row_of_scale(self, input_ids: Tensor, image_grid_thw: Tensor) -> Tensor:
        """(S,) the row of each scale's slots: both slots and scales are in order over the batch.

        Raises:
            ValueError: different numbers of slots and visual tokens.
        """
        slots_before = self.model.find_tokens("image_token_id", input_ids).sum(-1).cumsum(0)  # (B,)
        cells_before = (image_grid_thw.prod(-1) // self.config.vision_config.spatial_merge_size**2).cumsum(0)
        check_slots(int(slots_before[-1]), int(cells_before[-1]))
        return torch.searchsorted(slots_before, cells_before.to(slots_before.device)).to(image_grid_thw.device)


NaViLForConditionalGeneration.register_for_auto_class("AutoModel")
# Pipelines look up the tokenizer, the processor and the model in these tables, and Trainer's label smoothing shifts
# labels for models in the last one. The keys are class names and not model types: TRL before 1.0 would require an image
# in every row for a model type in the image table.
AutoTokenizer.register(NaViLConfig, fast_tokenizer_class=NaViLTokenizer, exist_ok=True)
AutoProcessor.register(NaViLConfig, NaViLProcessor, exist_ok=True)
for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
    names[NaViLForConditionalGeneration.__name__] = NaViLForConditionalGeneration.__name__
