"""Models, inputs and compiled forms that the benchmarks share.

Weights are random: no measured time depends on their values.
"""

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from navil import ROOT
from navil.configuration_navil import NaViLConfig
from navil.image_processing_navil import NaViLImageProcessor
from navil.modeling_navil import TUNED_OPTIONS, NaViLForConditionalGeneration

Size = tuple[int, int]
"""Width and height of an image in pixels."""

EXAMPLE_PHOTO = ROOT / "examples" / "cat.jpg"


def small_config() -> NaViLConfig:
    """A size that runs in seconds on a laptop's CPU, with the proportions of the released models."""
    return NaViLConfig(
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 3,
            "num_attention_heads": 12,
        },
        text_config={
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 6,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "qk_norm": True,
            "max_position_embeddings": 32768,
        },
    )


SIZES: dict[str, Callable[[], NaViLConfig]] = {
    "tiny": partial(NaViLConfig.from_pretrained, ROOT / "tiny"),
    "small": small_config,
    "2b": NaViLConfig.navil_2b,
    "9b": NaViLConfig.navil_9b,
}


def vision_only(config: NaViLConfig) -> NaViLConfig:
    """The config with a decoder of no layers and a vocabulary of 8."""
    config = NaViLConfig.from_dict(config.to_dict())
    config.text_config.num_hidden_layers, config.text_config.vocab_size = 0, 8
    return config


def text_only(config: NaViLConfig) -> NaViLConfig:
    """The config with a vision encoder of no blocks."""
    config = NaViLConfig.from_dict(config.to_dict())
    config.vision_config.num_hidden_layers = 0
    return config


def on_device(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """The module that `build` makes, created on the device, in evaluation mode."""
    with torch.device(device):
        return build().eval()


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- A model size on a device ------------------------------------------------------------------------------------------


@dataclass
class Setup:
    """A model size, and where and in which dtype it runs."""

    config: NaViLConfig
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "Setup":
        """From the options that `add_setup_options` adds."""
        device = torch.device(options.device)
        dtype = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
        return cls(SIZES[options.size](), device, getattr(torch, dtype))

    def build(self, config: NaViLConfig) -> NaViLForConditionalGeneration:
        """A model with random weights."""
        return on_device(
            lambda: NaViLForConditionalGeneration._from_config(config, torch_dtype=self.dtype), self.device
        )

    def patches(self, size: Size, count: int = 1) -> tuple[Tensor, Tensor]:
        """`pixel_values` (N, 3*p*p) and `image_grid_thw` (S, 3) of `count` photos of a size."""
        processor = NaViLImageProcessor.from_config(self.config)
        packed = processor([photo(size)] * count, multi_scale=True, return_tensors="pt")
        return packed["pixel_values"].to(self.device, self.dtype), packed["image_grid_thw"].to(self.device)

    def mixed_tokens(self, length: int) -> tuple[Tensor, Tensor]:
        """Ids (1, length) and the mask of visual tokens, (1, length) bool: 75 %, in one stretch."""
        ids = torch.randint(self.config.text_config.vocab_size, (1, length), device=self.device)
        visual = torch.zeros(1, length, dtype=torch.bool, device=self.device)
        visual[:, length // 8 : length // 8 + 3 * length // 4] = True
        return ids, visual


def add_setup_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="small", help="model size (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")


# -- Images ------------------------------------------------------------------------------------------------------------


def photo(size: Size) -> Image.Image:
    """The repository's photo, resized."""
    return Image.open(EXAMPLE_PHOTO).convert("RGB").resize(size)


# -- Compiled forms ----------------------------------------------------------------------------------------------------


def compile_decoder(model: nn.Module, tuned: bool) -> nn.Module:
    settings = {"options": TUNED_OPTIONS[model.device.type]} if tuned else {"mode": "reduce-overhead"}
    return torch.compile(model, fullgraph=True, **settings)


def compile_encoder(model: NaViLForConditionalGeneration) -> None:
    """One graph for all blocks and image sizes."""
    for block in model.vision_model.blocks:
        block.compile(dynamic=True)


def compile_prefill(model: NaViLForConditionalGeneration) -> None:
    """Two graphs for all layers and lengths, as in `optimize_for_inference`."""
    for layer in model.language_model.layers:
        layer.is_compiled = True


not_compiled = partial(torch.compiler.set_stance, "force_eager")
"""A context in which compiled modules run eagerly."""


# -- Decoding ----------------------------------------------------------------------------------------------------------

DECODE_TOKENS = {"cpu": 4, "cuda": 16}
"""Tokens per timed call. On a GPU, the host launches a token's kernels while those of the token before it still run."""


def decode_step(
    setup: Setup, model: nn.Module, cache_kind: Literal["dynamic", "static"], batch: int, context: int
) -> Callable[[], None]:
    """A call that decodes `DECODE_TOKENS` tokens, up to a context that is the same in each call.

    The cache starts with random keys and values.
    """
    num_cached = context - DECODE_TOKENS[setup.device.type]
    cache = filled_cache(setup, cache_kind, batch, context, num_cached)
    token = torch.ones(batch, 1, dtype=torch.long, device=setup.device)
    positions = [torch.tensor([position], device=setup.device) for position in range(num_cached, context)]

    @torch.no_grad()
    def step() -> None:
        if cache_kind == "dynamic":
            cache.crop(num_cached)
        for position in positions:
            model(token, past_key_values=cache, cache_position=position, position_ids=position[None])

    return step


def filled_cache(setup: Setup, cache_kind: str, batch: int, context: int, num_cached: int) -> Cache:
    """A cache for `context` tokens that holds `num_cached` of them."""
    config, tensor_settings = setup.config.text_config, {"device": setup.device, "dtype": setup.dtype}
    cache = DynamicCache()
    if cache_kind == "static":
        cache = StaticCache(config, max_batch_size=batch, max_cache_len=context, **tensor_settings)
    shape = (batch, config.num_key_value_heads, num_cached, config.head_dim)
    positions = torch.arange(num_cached, device=setup.device)
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(2, *shape, **tensor_settings)
        cache.update(keys, values, layer, {"cache_position": positions})
    return cache
