"""What trains: frozen parameters, adapters, and learning rates of the model's parts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

PARTS = {"vision": "vision_model.", "connector": "connector.", "visual": ".visual.", "text": ""}
"""The model's parts by a string in their parameters' names, the first that fits: the vision encoder, the connector, the
visual experts, and the rest of the decoder."""

LORA_TARGETS = {
    "text": r".*\.text\.\w+_proj",
    "visual": r".*\.visual\.\w+_proj",
    "both": r".*\.(text|visual)\.\w+_proj",
}
"""`target_modules` for PEFT: the linear layers of the decoder's attention and FFN experts, by modality."""


def part_of(name: str) -> str:
    """The key of PARTS that a parameter belongs to."""
    return next(part for part, piece in PARTS.items() if piece in name)


def read_rates(words: Sequence[str]) -> dict[str, float]:
    """Learning rates of parts, from `PART=X` each.

    Raises:
        ValueError: another form, an unknown part, or a number that is negative or not finite.
    """
    rates = {}
    for word in words:
        part, _, value = word.partition("=")
        try:
            rate = float(value)
        except ValueError:
            rate = -1.0
        if part not in PARTS or not 0 <= rate < float("inf"):
            raise ValueError(f"a learning rate is PART=X with X >= 0 and a part of {', '.join(PARTS)}; got {word!r}")
        rates[part] = rate
    return rates


def split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Splits the optimizer's groups so that each part of the model with a rate has its own.

    Raises:
        ValueError: a part with a rate has no parameter that trains.
    """
    parts = {parameter: part_of(name) for name, parameter in model.named_parameters()}
    groups, found = [], set()
    for group in optimizer.param_groups:
        own = {part: [] for part in (*PARTS, None)}
        for parameter in group["params"]:
            part = parts[parameter]
            own[part if part in rates else None].append(parameter)
        kept = {part: parameters for part, parameters in own.items() if parameters}
        found |= kept.keys()
        groups += [{**group, "params": ps, "lr": rates.get(part, group["lr"])} for part, ps in kept.items()]
    if missing := sorted(rates.keys() - found):
        raise ValueError(f"no parameter of {', '.join(missing)} trains, so it takes no learning rate")
    optimizer.param_groups[:] = groups


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes the parameters in whose names a regular expression is found.

    Raises:
        ValueError: an expression that is not valid or is found in no name; or nothing is left to train.
    """
    for pattern in patterns:
        try:
            matched = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        if not matched:
            raise ValueError(f"no parameter's name has {pattern!r}; one of them is {next(model.named_parameters())[0]}")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("every parameter is frozen")


def import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"adapters need peft: pip install peft ({error})") from error
    return peft


def add_adapters(model: PreTrainedModel, experts: str, rank: int, use_dora: bool = False) -> Any:
    """The model as a `peft.PeftModel` with adapters on the experts of a key of LORA_TARGETS.

    Raises:
        ImportError: peft is not installed.
    """
    peft = import_peft()
    if getattr(model, "is_loaded_in_4bit", False):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    options = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "use_dora": use_dora}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=LORA_TARGETS[experts], **options))


def four_bit_settings(local_rank: int) -> dict[str, Any]:
    """Arguments of `from_pretrained` for QLoRA: the decoder's linear layers in 4-bit NF4, on one GPU.

    Raises:
        ValueError: there is no NVIDIA GPU.
        ImportError: bitsandbytes is not installed.
    """
    if not torch.cuda.is_available():
        raise ValueError("QLoRA needs an NVIDIA GPU: bitsandbytes computes 4-bit layers there; use LoRA on this device")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(f"QLoRA needs bitsandbytes: pip install bitsandbytes ({error})") from error
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["vision_model", "connector", "lm_head"],
    )
    return {"quantization_config": quantized, "device_map": {"": local_rank}}
