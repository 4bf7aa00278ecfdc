"""LoRA adapters, trained with PEFT, on the decoder's experts: what vLLM leaves to the model."""

from typing import Any

import torch.nn.functional as F
from torch import nn
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.platforms import current_platform


def prepare(manager: LoRAModelManager) -> None:
    """Completes vLLM's manager after its layers have replaced the linear ones of the experts."""
    if current_platform.is_cpu():
        for module in manager.modules.values():
            append_empty_slot(module)
    add_adapter = manager.add_adapter

    def add_checked(adapter: LoRAModel) -> bool:
        check_adapter(manager, adapter)
        return add_adapter(adapter)

    manager.add_adapter = add_checked


def append_empty_slot(module: nn.Module) -> None:
    """Adds an adapter of zeros: vLLM's functions for CPUs give the last one to tokens without adapter.

    See vllm-project/vllm#48421.
    """
    for name in ("lora_a_stacked", "lora_b_stacked"):
        stacks = getattr(module, name)  # (adapters, 1, features, features) of each packed module
        setattr(module, name, tuple(F.pad(stack, (0, 0, 0, 0, 0, 0, 0, 1)) for stack in stacks))


def check_adapter(manager: LoRAModelManager, adapter: LoRAModel) -> None:
    """Refuses an adapter of another model; vLLM would silently drop or pad what does not fit.

    Raises:
        ValueError: a module that this model's experts lack, or one of another size.
    """
    names = [part for name in manager.modules for part in manager.packed_modules.get(name, [name])]
    sizes = linear_sizes(manager.model.config.text_config)
    for name, weights in adapter.loras.items():
        if is_empty(weights):
            continue
        if name not in names:
            raise ValueError(f"the adapter changes {name!r}; adapters may change {sorted(sizes)} of the experts")
        given, expected = (weights.lora_a.shape[1], weights.lora_b.shape[0]), sizes[name.rsplit(".", 1)[1]]
        if given != expected:
            raise ValueError(f"the adapter's {name!r} has {given} input and output features, the model's {expected}")


def is_empty(weights: LoRALayerWeights) -> bool:
    """An adapter that changes nothing, as vLLM's own for its warm-up, which are packed already."""
    return isinstance(weights, PackedLoRALayerWeights) or not weights.lora_b.any()


def linear_sizes(config: Any) -> dict[str, tuple[int, int]]:
    """Input and output features of an expert's linear layers."""
    width, inner = config.hidden_size, config.intermediate_size
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    attention = {"q_proj": (width, query), "k_proj": (width, key), "v_proj": (width, key), "o_proj": (query, width)}
    return attention | {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
