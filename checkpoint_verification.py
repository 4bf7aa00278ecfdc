"""Checks a model folder: every tensor, what it needs beside them, and what it answers beside its source.

The folder is loaded by this package's own code, not by the copy that it carries; no code of its source is executed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import checkpoint_layouts as layouts
from checkpoint_files import Tensors, preview, read_json
from checkpoint_plans import Conversion, plan_from_llm, plan_official, read_config
from navil_modules import CODE_FILES, ROOT, image_processing, modeling, processing, tokenization

TEXT = (
    "The capital of France is Paris, and the Seine flows through it. 12 x 12 = 144; 人工智能 is written in Chinese. "
    "def add(a, b): return a + b"
)
QUESTION = "What is in this picture?"


@dataclass
class Finding:
    """One line of the report."""

    check: str
    result: str
    is_ok: bool = True

    def __str__(self) -> str:
        return f"{self.check:<24}{'ok' if self.is_ok else 'FAILED':<8}{self.result}"


def verify(
    folder: Path, against: Path | None = None, max_kl: float = 0.01, allow_pickle: bool = False
) -> list[Finding]:
    """Checks a model folder.

    Args:
        against: what it was made from (a released checkpoint or a text LLM), or another model folder.
        max_kl: largest mean KL divergence from the source's next-token distribution that passes, in nats.
        allow_pickle: whether the source may have pickled weights.

    Raises:
        ValueError: no config that can be read, or a source that cannot be read.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = modeling.NaViLForConditionalGeneration(config)
    try:
        tensors = Tensors.in_folder(folder)
    except ValueError as error:
        return [Finding("weights", str(error), is_ok=False)]
    findings = [*check_tensors(config, model, tensors), *check_companions(config, folder)]
    if not all(finding.is_ok for finding in findings):
        return findings
    probe = Probe.of_folder(folder)
    model = load(folder)
    answers = {name: run(model, inputs) for name, inputs in probe.inputs(model).items()}
    odd = [name for name, logits in answers.items() if not logits.isfinite().all()]
    findings.append(Finding("forward passes", f"not finite: {preview(odd)}" if odd else "finite logits", not odd))
    if against is not None and not odd:
        del model
        findings += compare(config, tensors, probe, answers, against, max_kl, allow_pickle)
    return findings


# ----------------------------------------------------------------------------------------------------------------------
# The folder alone
# ----------------------------------------------------------------------------------------------------------------------


def check_tensors(config: Any, model: torch.nn.Module, tensors: Tensors) -> Iterator[Finding]:
    """Names, shapes and dtypes from the headers; every number from the data."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    yield finding("names", f"{len(expected)} tensors", missing=expected.keys() - tensors.shapes.keys())
    yield finding("no others", "", unknown=tensors.shapes.keys() - expected.keys())
    shared = expected.keys() & tensors.shapes.keys()
    count = sum(map(math.prod, expected.values()))
    yield finding(
        "shapes",
        f"{count:,} parameters",
        misshapen=[
            f"{n} is {tensors.shapes[n]}, not {expected[n]}" for n in shared if tensors.shapes[n] != expected[n]
        ],
    )
    odd = [f"{name} is {dtype}" for name, dtype in tensors.dtypes.items() if dtype != config.torch_dtype]
    yield finding("dtype", f"{config.torch_dtype}, as the config says", other=odd)
    progress = tqdm(tensors.shapes, unit="tensor", desc="reading", disable=None)
    numbers = [name for name in progress if isinstance(tensors.dtypes[name], torch.dtype)]
    yield finding("numbers", "all finite", odd=[text for name in numbers if (text := odd_numbers(name, tensors[name]))])


def finding(check: str, result: str, **problems: Sequence[str]) -> Finding:
    """Passes unless there are problems, which are given under one word."""
    [(word, names)] = problems.items()
    return Finding(check, f"{len(names)} {word}: {preview(names)}" if names else result, not names)


def odd_numbers(name: str, tensor: Tensor) -> str:
    if tensor.isfinite().all():
        return ""
    return f"{name} has {int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} infinite numbers"


def check_companions(config: Any, folder: Path) -> Iterator[Finding]:
    """Tokenizer, processor and code."""
    try:
        tokenizer = tokenization.NaViLTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers has no exception class of its own to catch
        yield Finding("tokenizer", str(error), is_ok=False)
        return
    rows, last = config.text_config.vocab_size, max(tokenizer.get_vocab().values())
    expected = layouts.token_ids(tokenizer)
    wrong = [f"{n} is {getattr(config, n)}, not {i}" for n, i in expected.items() if getattr(config, n) != i]
    wrong += [f"id {last} lies outside the {rows} rows of the embedding"] if last >= rows else []
    yield finding("tokenizer", f"{len(tokenizer)} tokens, {tokenizer.init_kwargs['template']}", wrong=wrong)
    try:
        image_processor = image_processing.NaViLImageProcessor.from_pretrained(folder)
    except (OSError, TypeError, ValueError) as error:
        yield Finding("image processor", str(error), is_ok=False)
        return
    vision = config.vision_config
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    wrong = [
        f"{n} is {getattr(image_processor, n)}, not {s}" for n, s in sizes.items() if getattr(image_processor, n) != s
    ]
    yield finding("image processor", f"patches of {vision.patch_size}, merged {vision.spatial_merge_size}", wrong=wrong)
    own = [name for name in CODE_FILES if (folder / name).is_file()]
    changed = [name for name in own if (folder / name).read_bytes() != (ROOT / name).read_bytes()]
    text = f"differs from this package's, which was used here: {preview(changed)}" if changed else "this package's"
    yield Finding("code", text if own else "none of its own")


# ----------------------------------------------------------------------------------------------------------------------
# Against a source
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """The fixed prompt and picture that models are compared on."""

    processor: Any

    @classmethod
    def of_folder(cls, folder: Path) -> "Probe":
        image_processor = image_processing.NaViLImageProcessor.from_pretrained(folder)
        return cls(processing.NaViLProcessor(image_processor, tokenization.NaViLTokenizer.from_pretrained(folder)))

    def inputs(self, model: torch.nn.Module) -> dict[str, dict[str, Tensor]]:
        """Inputs of a forward pass by name; a text LLM gets no picture."""
        inputs = {"text": {"input_ids": self.processor.tokenizer(TEXT, return_tensors="pt").input_ids}}
        if isinstance(model, modeling.NaViLForConditionalGeneration):
            content = [{"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}]
            messages = [{"role": "user", "content": content}]
            options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
            inputs["picture"] = dict(self.processor.apply_chat_template(messages, **options))
        return inputs


def picture() -> Image.Image:
    """Discs on a gradient, 192 x 128."""
    y, x = np.mgrid[:128, :192]
    pixels = np.stack([x, 2 * y, 255 - x], axis=-1).astype(np.uint8)
    for row, column, colour in ((40, 50, (220, 30, 30)), (80, 130, (30, 200, 60))):
        pixels[(y - row) ** 2 + (x - column) ** 2 < 900] = colour
    return Image.fromarray(pixels)


def load(folder: Path) -> torch.nn.Module:
    return modeling.NaViLForConditionalGeneration.from_pretrained(folder, torch_dtype="auto").eval()


@torch.no_grad()
def run(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits (L, vocabulary) in float64."""
    return model(**inputs).logits[0].double()


def compare(
    config: Any,
    tensors: Tensors,
    probe: Probe,
    answers: dict[str, Tensor],
    against: Path,
    max_kl: float,
    allow_pickle: bool,
) -> Iterator[Finding]:
    """The folder's tensors and logits beside its source's."""
    source = Source.read(against, config, allow_pickle)
    compared = compare_tensors(tensors, source.expected)
    yield compared
    if not compared.is_ok:
        return
    model = source.load()
    for name, inputs in probe.inputs(model).items():
        expected = run(model, inputs)
        columns = min(expected.shape[-1], answers[name].shape[-1])  # a grown vocabulary has new tokens at its end
        ours, theirs = answers[name][:, :columns].log_softmax(-1), expected[:, :columns].log_softmax(-1)
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
        text = f"{kl.mean():.1e} nats on average, {kl.max():.1e} at most, over {len(kl)} tokens"
        yield Finding(f"KL, {name}", text, kl.mean().item() <= max_kl)
        yield Finding(f"top-1 agreement, {name}", f"{agreement:.1%}")


def compare_tensors(tensors: Tensors, expected: dict[str, Callable[[], Tensor]]) -> Finding:
    """How many tensors are the source's; fails where they cannot be compared, the models being of other sizes."""
    missing = expected.keys() - tensors.shapes.keys()
    if missing:
        return finding("tensors", "", missing=missing)
    worst, error, equal = "", 0.0, 0
    for name in tqdm(expected, unit="tensor", desc="comparing", disable=None):
        actual, wanted = tensors[name], expected[name]()
        if actual.shape != wanted.shape:
            text = f"{name} is {tuple(actual.shape)}, in the source {tuple(wanted.shape)}"
            return Finding("tensors", text, is_ok=False)
        if torch.equal(actual, wanted.to(actual.dtype)):
            equal += 1
        else:
            scale = wanted.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny)
            difference = ((actual.double() - wanted.double()).abs().max() / scale).item()
            worst, error = (name, difference) if difference >= error else (worst, error)
    text = f"{equal} of {len(expected)} as converted from the source"
    if worst:
        text += f"; {worst} differs most, by {error:.1e} of its largest number"
    return Finding("tensors", text)


@dataclass
class Source:
    """What a model folder is compared with."""

    expected: dict[str, Callable[[], Tensor]]  # the folder's tensors as the source gives them
    load: Callable[[], torch.nn.Module]

    @classmethod
    def read(cls, path: Path, config: Any, allow_pickle: bool) -> "Source":
        is_gguf = path.is_file() or not (path / "config.json").is_file()
        kind = None if is_gguf else read_json(path / "config.json").get("model_type")
        if kind == "navil":
            tensors = Tensors.in_folder(path)
            return cls({name: lambda name=name: tensors[name] for name in tensors.shapes}, lambda: load(path))
        if kind == "navil_chat":
            conversion = plan_official(path, allow_pickle)
            return cls(targets(conversion), lambda: assemble(conversion))
        vision = config.vision_config
        size = f"{vision.num_hidden_layers}x{vision.hidden_size}"
        conversion = plan_from_llm(path, vision_size=size, allow_pickle=allow_pickle)
        return cls(targets(conversion), lambda: load_llm(conversion))


def targets(conversion: Conversion) -> dict[str, Callable[[], Tensor]]:
    """What each tensor that has a source should be."""
    return {rule.target: lambda rule=rule: rule.make(conversion.tensors) for rule in conversion.rules if rule.sources}


def assemble(conversion: Conversion) -> torch.nn.Module:
    """The model that a conversion would write, in memory."""
    with torch.device("meta"):
        model = modeling.NaViLForConditionalGeneration(conversion.config)
    state = {name: plan.make().to(plan.dtype) for name, plan in conversion.plans(None).items()}
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    return model.eval()


def load_llm(conversion: Conversion) -> torch.nn.Module:
    """The text LLM of a conversion, by transformers' own code. InternLM2, of which it has none, is a Llama renamed."""
    if conversion.llm_config["model_type"] == "internlm2":
        text = conversion.config.text_config
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        names += ("vocab_size", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings")
        names += ("attention_bias", "tie_word_embeddings")
        config = LlamaConfig(**{name: getattr(text, name) for name in names})
        state = {
            name.replace("model.language_model.", "model.").replace(".text.", "."): make()
            for name, make in targets(conversion).items()
            if ".visual." not in name
        }
    else:
        config = CONFIG_MAPPING[conversion.llm_config["model_type"]](**conversion.llm_config)
        state = {name: conversion.tensors[name] for name in conversion.tensors.shapes}
    model = AutoModelForCausalLM.from_config(config, torch_dtype=conversion.main_dtype(None))
    model.load_state_dict(state, strict=False)  # a tied head may be stored or not; all else was checked by name
    model.tie_weights()
    return model.eval()
