"""Checks a model folder: its files, every tensor, every setting, and what it answers, alone or against its source.

What is cheap comes first. Only a folder whose code is this package's, byte for byte, is loaded as its users load it, by
`checkpoint_loading.py` in a process of its own; no code of a source is executed.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import checkpoint_layouts as layouts
from checkpoint_files import (
    CHECKSUMS_NAME,
    DTYPES,
    Tensors,
    bounds,
    preview,
    read_checksums,
    read_json,
    sha256,
    tensor_bytes,
)
from checkpoint_plans import Conversion, copy_code, plan_from_llm, plan_official, read_config
from checkpoint_tokenizers import check_ids
from navil import CODE_FILES, ROOT
from navil import image_processing_navil as image_processing
from navil import modeling_navil as modeling
from navil import tokenization_navil as tokenization

SETTINGS_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
SETTINGS_FILES += ("tokenizer.json", "tokenizer_config.json")
"""What every saved model has beside its weights and code; a default would take the place of one that is missing."""


@dataclass
class Finding:
    """One line of the report."""

    check: str
    result: str
    is_ok: bool = True

    def __str__(self) -> str:
        return f"{self.check:<26}{'ok' if self.is_ok else 'FAILED':<8}{self.result}"


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
    config, checksums = read_config(folder), read_checksums(folder)
    findings = [
        *attempt("checksums", check_files(folder, checksums[0])),
        *attempt("weights", check_tensors(config, folder, checksums[1])),
        *attempt("tokenizer", check_tokenizer(config, folder)),
        *attempt("image processor", check_image_processor(config, folder)),
        *attempt("generation", check_generation(config, folder)),
    ]
    if not all(finding.is_ok for finding in findings):
        return findings
    source = None if against is None else Source.read(against, config, folder, allow_pickle)
    if source is not None:
        findings.append(compare_tensors(Tensors.in_folder(folder), source.expected))
        if not findings[-1].is_ok:
            return findings
    return [*findings, *attempt("Auto classes", check_loaded(folder, source, max_kl))]


def attempt(check: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """What a check finds; an exception is a finding too."""
    try:
        yield from findings
    except Exception as error:  # whatever damaged files make of the libraries that read them
        yield Finding(check, f"{type(error).__name__}: {error}", is_ok=False)


# ----------------------------------------------------------------------------------------------------------------------
# The folder alone
# ----------------------------------------------------------------------------------------------------------------------


def check_files(folder: Path, checksums: dict[str, str]) -> Iterator[Finding]:
    """Files as the conversion wrote them, and code as in this package."""
    changed = [name for name, digest in checksums.items() if digest != sha256(folder / name)]
    result = f"{len(checksums)} files are as {CHECKSUMS_NAME} says" if checksums else f"none, without {CHECKSUMS_NAME}"
    yield finding("checksums", result, **{"missing or changed": changed})
    lacking = [name for name in SETTINGS_FILES if not (folder / name).exists()]
    yield finding("files", "every file of settings", missing=lacking)
    place = code_folder(folder)
    odd = [name for name in CODE_FILES if sha256(place / name) != sha256(ROOT / name)]
    odd += [name for path in folder.glob("*.json") for name in code_named_by(path) if name not in CODE_FILES]
    yield finding("code", "this package's", **{"missing or other": odd})


def code_folder(folder: Path) -> Path:
    """The folder with a model's code: its own, or its parent for one that is loaded as a subfolder."""
    folder = folder.resolve()
    return folder if any((folder / name).exists() for name in CODE_FILES) else folder.parent


def code_named_by(path: Path) -> Iterator[str]:
    """The files that the `auto_map`s of a JSON file make transformers run."""
    maps: list[dict[str, Any]] = []
    json.loads(path.read_text(encoding="utf-8"), object_hook=lambda part: maps.append(part.get("auto_map", {})) or part)
    for names in (value for auto_map in maps for value in auto_map.values()):
        yield from (f"{name.split('.')[0]}.py" for name in (names if isinstance(names, list) else [names]) if name)


def check_tensors(config: Any, folder: Path, checksums: dict[str, int]) -> Iterator[Finding]:
    """Names, shapes and dtypes from the headers; every number from the data."""
    tensors = Tensors.in_folder(folder)
    with torch.device("meta"):
        model = modeling.NaViLForConditionalGeneration(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    yield finding("names", f"{len(expected)} tensors", missing=expected.keys() - tensors.shapes.keys())
    yield finding("no others", "", unknown=tensors.shapes.keys() - expected.keys())
    odd = [f"{n} is {s}, not {expected[n]}" for n, s in tensors.shapes.items() if expected.get(n, s) != s]
    yield finding("shapes", f"{sum(map(math.prod, expected.values())):,} parameters", misshapen=odd)
    [(stored, _)] = Counter(tensors.dtypes.values()).most_common(1)
    odd = [f"{n} is {dtype}" for n, dtype in tensors.dtypes.items() if dtype != stored or dtype not in DTYPES.values()]
    if not odd and config.torch_dtype and torch.promote_types(stored, config.torch_dtype) != config.torch_dtype:
        odd = [f"{config.torch_dtype} of config.json does not hold the weights' {stored}"]
    yield finding("dtype", str(stored), other=odd)
    odd, changed = [], []
    for name in tqdm(tensors.shapes, unit="tensor", desc="reading", disable=None):
        if isinstance(tensors.dtypes[name], torch.dtype):
            tensor = tensors[name]
            odd += odd_numbers(name, tensor)
            changed += [name] if checksums and zlib.crc32(tensor_bytes(tensor)) != checksums.get(name) else []
    yield finding("numbers", "all finite", odd=odd)
    yield finding("bits", f"as {CHECKSUMS_NAME} says" if checksums else "not compared", changed=changed)


def finding(check: str, result: str, **problems: Sequence[str]) -> Finding:
    """Passes unless there are problems, which are given under one word."""
    [(word, names)] = problems.items()
    return Finding(check, f"{len(names)} {word}: {preview(names)}" if names else result, not names)


def odd_numbers(name: str, tensor: Tensor) -> list[str]:
    if all(map(math.isfinite, bounds(tensor))):
        return []
    return [f"{name} has {int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} infinite numbers"]


def check_tokenizer(config: Any, folder: Path) -> Iterator[Finding]:
    tokenizer = tokenization.NaViLTokenizer.from_pretrained(folder)
    check_ids(tokenizer, config.text_config.vocab_size)
    result = f"{len(tokenizer)} tokens, {tokenizer.init_kwargs['template']}"
    yield matching("tokenizer", config, layouts.token_ids(tokenizer), result)


def check_image_processor(config: Any, folder: Path) -> Iterator[Finding]:
    image_processor, vision = image_processing.NaViLImageProcessor.from_pretrained(folder), config.vision_config
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    result = f"patches of {vision.patch_size}, merged {vision.spatial_merge_size}"
    yield matching("image processor", image_processor, sizes, result)


def check_generation(config: Any, folder: Path) -> Iterator[Finding]:
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    is_ok = config.eos_token_id in (ends if isinstance(ends, list) else [ends])
    yield Finding("generation", f"ends at {ends}" + ("" if is_ok else f", not at {config.eos_token_id}"), is_ok)


def matching(check: str, thing: Any, expected: dict[str, Any], result: str) -> Finding:
    actual = {name: getattr(thing, name, None) for name in expected}
    wrong = [f"{n} is {actual[n]}, not {value}" for n, value in expected.items() if actual[n] != value]
    return finding(check, result, wrong=wrong)


# ----------------------------------------------------------------------------------------------------------------------
# As users load it
# ----------------------------------------------------------------------------------------------------------------------


def check_loaded(folder: Path, source: "Source | None", max_kl: float) -> Iterator[Finding]:
    """The folder through the Auto classes, and what they give against what the source gives."""
    loaded = load_in_fresh_process(folder, source)
    yield Finding("Auto classes", "all load, in a process of their own")
    answers = loaded["answers"]
    odd = [name for name, answer in answers.items() if not answer["logits"].isfinite().all()]
    yield Finding("forward passes", f"not finite: {preview(odd)}" if odd else "finite logits", not odd)
    if source is None or odd:
        return
    actual, wanted = loaded["settings"], loaded["expected"]
    names = [name for name in wanted | actual if actual.get(name) != wanted.get(name)]
    different = "; ".join(f"{name} is {actual.get(name)!r:.60}, not {wanted.get(name)!r:.60}" for name in names[:20])
    same = f"{len(wanted)} as a conversion of the source gives them"
    yield Finding("settings", f"{len(names)} different: {different}" if names else same, not names)
    yield from compare_answers(source.load(), answers, max_kl)


def load_in_fresh_process(folder: Path, source: "Source | None") -> dict[str, Any]:
    """The result of `checkpoint_loading.py`. Raises a ValueError with its reason where the folder does not load."""
    place = code_folder(folder)
    subfolder = "" if place == folder.resolve() else folder.resolve().name
    with tempfile.TemporaryDirectory() as scratch:
        expected, result = Path(scratch, "expected"), Path(scratch, "result")
        if source is not None:
            expected.mkdir()
            source.write_settings(expected)
        arguments = (place, subfolder, "" if source is None else expected, result)
        command = [sys.executable, str(ROOT / "checkpoint_loading.py"), *map(str, arguments)]
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            raise ValueError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
        return torch.load(result, weights_only=True)


# ----------------------------------------------------------------------------------------------------------------------
# Against a source
# ----------------------------------------------------------------------------------------------------------------------


def load(folder: Path) -> torch.nn.Module:
    return modeling.NaViLForConditionalGeneration.from_pretrained(folder, torch_dtype="auto").eval()


@torch.no_grad()
def compare_answers(model: torch.nn.Module, answers: dict[str, Any], max_kl: float) -> Iterator[Finding]:
    """Next-token distributions of the folder against those of its source; a text LLM gets no picture."""
    for name, answer in answers.items():
        if name == "picture" and not isinstance(model, modeling.NaViLForConditionalGeneration):
            continue
        expected = model(**answer["inputs"]).logits[0].double()
        columns = min(expected.shape[-1], answer["logits"].shape[-1])  # a grown vocabulary has new tokens at its end
        ours, theirs = answer["logits"][:, :columns].log_softmax(-1), expected[:, :columns].log_softmax(-1)
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
    write_settings: Callable[[Path], None]  # all that a conversion would write besides weights

    @classmethod
    def read(cls, path: Path, config: Any, folder: Path, allow_pickle: bool) -> "Source":
        is_gguf = path.is_file() or not (path / "config.json").is_file()
        kind = None if is_gguf else read_json(path / "config.json").get("model_type")
        if kind == "navil":
            tensors = Tensors.in_folder(path)
            expected = {name: lambda name=name: tensors[name] for name in tensors.shapes}
            return cls(expected, lambda: load(path), lambda destination: copy_settings(path, destination))
        if kind == "navil_chat":
            conversion = plan_official(path, allow_pickle)
            return cls(targets(conversion), lambda: assemble(conversion), conversion.write_settings)
        vision, chat = config.vision_config, tokenization.NaViLTokenizer.from_pretrained(folder).init_kwargs
        conversion = plan_from_llm(
            path,
            vision_size=f"{vision.num_hidden_layers}x{vision.hidden_size}",
            template=chat["template"],
            system_message=chat["system_message"],
            allow_pickle=allow_pickle,
        )
        return cls(targets(conversion), lambda: load_llm(conversion), conversion.write_settings)


def copy_settings(folder: Path, destination: Path) -> None:
    """Of a model folder, whose code may be another version's and is not copied."""
    for pattern in ("*.json", "*.jinja"):
        for path in folder.glob(pattern):
            shutil.copy(path, destination)
    copy_code(destination)


def targets(conversion: Conversion) -> dict[str, Callable[[], Tensor]]:
    """What each tensor that has a source should be."""
    return {rule.target: lambda rule=rule: rule.make(conversion.tensors) for rule in conversion.rules if rule.sources}


def assemble(conversion: Conversion) -> torch.nn.Module:
    """The model that a conversion would write, in memory."""
    with torch.device("meta"):
        model = modeling.NaViLForConditionalGeneration(conversion.config)
    state = {name: plan.make().to(plan.dtype) for name, plan in conversion.plans().items()}
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
    model = AutoModelForCausalLM.from_config(config, torch_dtype=conversion.dtype)
    model.load_state_dict(state, strict=False)  # a tied head may be stored or not; all else was checked by name
    model.tie_weights()
    return model.eval()
