"""Checks a model folder: its files, every tensor, every setting and its answers, alone or against its source.

Cheap checks come first. A folder is loaded as users load it, by `loading.py` in a fresh process, only if its code is
this package's, byte for byte. No code of a source is run.
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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conversion.configs import token_ids
from conversion.files import CHECKSUMS_NAME, describe_problems, read_checksums, read_json, sha256
from conversion.names import Rule, meta_model, model_shapes, shape_problems
from conversion.plan import Conversion, Plan, main_dtype, plan_from_llm, plan_official, read_config
from conversion.read import DTYPES, Tensors, bounds, open_tensors, read_safetensors_header, tensor_bytes
from conversion.tokenizers import check_ids
from conversion.write import copy_code, write_settings
from navil import CODE_FILES, ROOT
from navil.configuration_navil import NaViLConfig
from navil.image_processing_navil import NaViLImageProcessor
from navil.tokenization_navil import NaViLTokenizer

SETTINGS_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
SETTINGS_FILES += ("tokenizer.json", "tokenizer_config.json")
"""Files of settings in every saved model. If one is missing, transformers silently takes defaults."""

MEASURES = ("KL", "top-1 agreement")
FILE_CHECKS = ("checksums", "files", "code")
TENSOR_CHECKS = ("names and shapes", "dtype", "numbers", "bits")
COMPANION_CHECKS = ("tokenizer", "image processor", "generation")
LOADED_CHECKS = ("Auto classes", "forward passes")
TEXT_CHECKS = ("tensors", *LOADED_CHECKS, "settings", *(f"{measure}, text" for measure in MEASURES))
PICTURE_CHECKS = (*TEXT_CHECKS, *(f"{measure}, picture" for measure in MEASURES))


@dataclass
class Finding:
    """One line of the report."""

    check: str
    result: str
    status: str = "ok"  # or FAILED or skipped

    @property
    def is_ok(self) -> bool:
        return self.status == "ok"

    def __str__(self) -> str:
        return f"{self.check:<26}{self.status:<8}{self.result}"


def verify(
    folder: Path, against: Path | None = None, max_kl: float = 0.01, allow_pickle: bool = False
) -> list[Finding]:
    """Checks a model folder.

    Args:
        against: what it was made from (a released checkpoint or a text LLM), or another model folder.
        max_kl: largest mean KL divergence from the source's next-token distribution that passes, in nats.
        allow_pickle: whether the source may have pickled weights.

    Returns:
        A finding for each check, also for those that are skipped because an earlier one failed.

    Raises:
        ValueError: a config, checksums or a source that cannot be read.
    """
    config, (file_sums, tensor_sums) = read_config(folder), checksums_of(folder)
    findings = [
        *run_checks(FILE_CHECKS, check_files(folder, file_sums)),
        *run_checks(TENSOR_CHECKS, check_tensors(config, folder, tensor_sums)),
        *run_checks(COMPANION_CHECKS, check_companions(config, folder)),
    ]
    checks = LOADED_CHECKS if against is None else PICTURE_CHECKS if source_kind(against) else TEXT_CHECKS
    if not all(finding.is_ok for finding in findings):
        return [*findings, *run_checks(checks, iter(()))]
    source = None if against is None else read_source(against, config, folder, allow_pickle)
    return [*findings, *run_checks(checks, check_use(folder, source, max_kl))]


def run_checks(checks: Sequence[str], findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings of some checks. An exception is a failure of the check that raised it; the rest is skipped."""
    waiting = list(checks)
    try:
        for finding in findings:
            waiting.remove(finding.check)
            yield finding
    except Exception as error:  # damaged files make libraries raise exceptions of any kind
        yield Finding(waiting.pop(0), f"{type(error).__name__}: {error}", "FAILED")
    yield from (Finding(check, "because of a failure above", "skipped") for check in waiting)


def conclude(check: str, result: str, **problems: Collection[str]) -> Finding:
    """A finding that passes unless there are problems; they are named, by kind."""
    found = describe_problems(problems)
    return Finding(check, found, "FAILED") if found else Finding(check, result)


def checksums_of(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """As `read_checksums`; a ValueError if the file is missing although the weights were written with one."""
    if not (folder / CHECKSUMS_NAME).is_file():
        for path in folder.glob("*.safetensors"):
            if "checksums" in read_safetensors_header(path).get("__metadata__", {}):
                raise ValueError(f"{folder / CHECKSUMS_NAME} is missing; it was written with {path.name}")
    return read_checksums(folder)


def check_files(folder: Path, checksums: Mapping[str, str]) -> Iterator[Finding]:
    """Files are as the conversion wrote them, and the code is this package's."""
    changed = [name for name, digest in checksums.items() if digest != sha256(folder / name)]
    result = f"{len(checksums)} files as in {CHECKSUMS_NAME}" if checksums else f"not compared, no {CHECKSUMS_NAME}"
    yield conclude("checksums", result, **{"missing or changed": changed})
    missing = [name for name in SETTINGS_FILES if not (folder / name).exists()]
    yield conclude("files", "all files of settings are there", missing=missing)
    place = code_folder(folder)
    other = [name for name in CODE_FILES if sha256(place / name) != sha256(ROOT / name)]
    other += [name for path in folder.glob("*.json") for name in code_named_by(path) if name not in CODE_FILES]
    yield conclude("code", "the same as this package's", **{"missing or different": other})


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


def check_tensors(config: NaViLConfig, folder: Path, checksums: Mapping[str, int]) -> Iterator[Finding]:
    """Names, shapes and dtypes from the headers; every value from the data."""
    tensors, expected = open_tensors(folder), model_shapes(meta_model(config))
    result = f"{len(expected)} tensors, {sum(map(math.prod, expected.values())):,} parameters"
    yield conclude("names and shapes", result, **shape_problems(expected, tensors.shapes))
    [(stored, _)] = Counter(tensors.dtypes.values()).most_common(1)
    yield conclude("dtype", str(stored), wrong=wrong_dtypes(tensors, stored, config.torch_dtype))
    wrong, changed = [], []
    for name in tqdm(tensors.shapes, unit="tensor", desc="reading", disable=None):
        if isinstance(tensors.dtypes[name], torch.dtype):
            tensor = tensors[name]
            wrong += nonfinite_values(name, tensor)
            changed += [name] if checksums and zlib.crc32(tensor_bytes(tensor)) != checksums.get(name) else []
    yield conclude("numbers", "all finite", **{"not finite": wrong})
    result = f"CRC-32 of each tensor as in {CHECKSUMS_NAME}" if checksums else f"not compared, no {CHECKSUMS_NAME}"
    yield conclude("bits", result, changed=changed)


def wrong_dtypes(tensors: Tensors, stored: torch.dtype | str, declared: torch.dtype | None) -> list[str]:
    """Tensors of another dtype than `stored`, most tensors' dtype, which the config's must hold."""
    wrong = [
        f"{name} is {dtype}"
        for name, dtype in tensors.dtypes.items()
        if dtype != stored or dtype not in DTYPES.values()
    ]
    if not wrong and declared and torch.promote_types(stored, declared) != declared:
        wrong = [f"{declared} of config.json does not hold the weights' {stored}"]
    return wrong


def nonfinite_values(name: str, tensor: Tensor) -> list[str]:
    if all(map(math.isfinite, bounds(tensor))):
        return []
    return [f"{name} has {int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} infinite values"]


def check_companions(config: NaViLConfig, folder: Path) -> Iterator[Finding]:
    """Tokenizer, image processor and generation settings agree with the config."""
    tokenizer = NaViLTokenizer.from_pretrained(folder)
    check_ids(tokenizer, config.text_config.vocab_size)
    result = f"{len(tokenizer)} tokens, {tokenizer.init_kwargs['template']}"
    yield conclude("tokenizer", result, wrong=differences(config, token_ids(tokenizer)))
    image_processor, vision = NaViLImageProcessor.from_pretrained(folder), config.vision_config
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    result = f"patches of {vision.patch_size}, merged {vision.spatial_merge_size}"
    yield conclude("image processor", result, wrong=differences(image_processor, sizes))
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    missing = {config.eos_token_id} - set(ends if isinstance(ends, list) else [ends])
    yield conclude("generation", f"ends at {ends}", wrong=[f"ends at {ends}, not at {end}" for end in missing])


def differences(actual: object, expected: Mapping[str, Any]) -> list[str]:
    """Attributes with other values than expected."""
    values = {name: getattr(actual, name, None) for name in expected}
    return [f"{name} is {values[name]}, not {value}" for name, value in expected.items() if values[name] != value]


@dataclass
class Source:
    """What a model folder is compared with."""

    plan: Plan  # the tensors that the folder should have, as far as they come from the source
    load: Callable[[], nn.Module]
    write_settings: Callable[[Path], None]  # writes all that a conversion would write besides weights
    has_vision: bool = True


def check_use(folder: Path, source: Source | None, max_kl: float) -> Iterator[Finding]:
    """The folder through the Auto classes, and what they give against what the source gives."""
    if source is not None:
        tensors = compare_tensors(open_tensors(folder), source.plan)
        yield tensors
        if not tensors.is_ok:
            return
    loaded = load_folder(folder, source)
    yield Finding("Auto classes", "all load, in a fresh process")
    answers = loaded["answers"]
    wrong = [name for name, answer in answers.items() if not answer["logits"].isfinite().all()]
    yield conclude("forward passes", "finite logits", **{"not finite": wrong})
    if source is None or wrong:
        return
    yield compare_settings(loaded["settings"], loaded["expected"])
    model = source.load()
    for name, answer in answers.items():
        if name == "text" or source.has_vision:
            yield from compare_answers(model, name, answer, max_kl)


def load_folder(folder: Path, source: Source | None) -> dict[str, Any]:
    """What `loading.inspect_folder` finds in a folder and in the settings that a conversion of the source writes."""
    place = code_folder(folder)
    subfolder = "" if place == folder.resolve() else folder.resolve().name
    if source is None:
        return inspect_in_fresh_process(str(place), subfolder, "")
    with tempfile.TemporaryDirectory() as expected:
        source.write_settings(Path(expected))
        return inspect_in_fresh_process(str(place), subfolder, expected)


def inspect_in_fresh_process(*arguments: str) -> dict[str, Any]:
    """`loading.inspect_folder` with a module cache of its own. Raises a ValueError if the folder does not load."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result")
        command = [sys.executable, "-m", "conversion.loading", *arguments, str(result)]
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            raise ValueError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
        return torch.load(result, weights_only=True)


def compare_tensors(tensors: Tensors, plan: Plan) -> Finding:
    """How many tensors equal the source's; fails if they cannot be compared because the models have other sizes."""
    problems = shape_problems(plan.shapes, tensors.shapes) | {"unknown": ()}
    if any(problems.values()):
        return conclude("tensors", "", **problems)
    errors = {}
    for name, expected in tqdm(plan.make(), total=len(plan.shapes), unit="tensor", desc="comparing", disable=None):
        actual = tensors[name]
        if not torch.equal(actual, expected.to(actual.dtype)):
            scale = expected.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny)
            errors[name] = ((actual.double() - expected.double()).abs().max() / scale).item()
    if not errors:
        return Finding("tensors", f"all {len(plan.shapes)} equal the source's")
    worst = max(errors, key=errors.get)
    return Finding(
        "tensors",
        f"{len(errors)} of {len(plan.shapes)} differ from the source's (fine-tuned?); the largest difference is "
        f"{errors[worst]:.1e} of the largest value, in {worst}",
    )


def compare_settings(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> Finding:
    names = [name for name in expected | actual if actual.get(name) != expected.get(name)]
    if not names:
        return Finding("settings", f"{len(expected)} as in a conversion of the source")
    shown = "; ".join(f"{name} is {actual.get(name)!r:.60}, not {expected.get(name)!r:.60}" for name in names[:20])
    return Finding("settings", f"{len(names)} different: {shown}", "FAILED")


@torch.no_grad()
def compare_answers(model: nn.Module, name: str, answer: Mapping[str, Any], max_kl: float) -> Iterator[Finding]:
    """Next-token distributions of the folder against those of its source."""
    expected = model(**answer["inputs"]).logits[0].double()
    columns = min(expected.shape[-1], answer["logits"].shape[-1])  # a grown vocabulary has new tokens at its end
    ours, theirs = answer["logits"][:, :columns].log_softmax(-1), expected[:, :columns].log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    text = f"{kl.mean():.1e} nats on average, {kl.max():.1e} at most, over {len(kl)} tokens"
    yield Finding(f"KL, {name}", text, "ok" if kl.mean().item() <= max_kl else "FAILED")
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    yield Finding(f"top-1 agreement, {name}", f"{agreement:.1%}")


def source_kind(path: Path) -> str | None:
    """`navil` for a model folder, `navil_chat` for a released checkpoint, None for a text LLM."""
    if path.is_file() or not (path / "config.json").is_file():  # GGUF
        return None
    model_type = read_json(path / "config.json").get("model_type")
    return model_type if model_type in ("navil", "navil_chat") else None


def read_source(path: Path, config: NaViLConfig, folder: Path, allow_pickle: bool) -> Source:
    """The source that a model folder with this config is said to come from."""
    kind = source_kind(path)
    if kind == "navil":
        tensors, source_config = open_tensors(path), read_config(path)
        rules = [Rule({name: shape}, {name: shape}) for name, shape in tensors.shapes.items()]
        plan = Plan(rules, tensors, main_dtype(tensors))
        return Source(plan, partial(assemble, source_config, plan), partial(copy_settings, path))
    if kind == "navil_chat":
        conversion = plan_official(path, allow_pickle=allow_pickle)
        load = partial(assemble, conversion.config, conversion.plan)
    else:
        vision, chat = config.vision_config, NaViLTokenizer.from_pretrained(folder).init_kwargs
        size = f"{vision.num_hidden_layers}x{vision.hidden_size}"
        conversion = plan_from_llm(path, size, chat["template"], chat["system_message"], allow_pickle=allow_pickle)
        load = partial(load_llm, conversion)
    plan = conversion.plan.without_new_weights()
    return Source(plan, load, partial(write_settings, conversion), has_vision=kind == "navil_chat")


def copy_settings(folder: Path, destination: Path) -> None:
    """Copies a model folder's settings, and this package's code: the folder's may be another version."""
    for pattern in ("*.json", "*.jinja"):
        for path in folder.glob(pattern):
            shutil.copy(path, destination)
    copy_code(destination)


def assemble(config: NaViLConfig, plan: Plan) -> nn.Module:
    """The model that a plan describes, in memory."""
    model = meta_model(config)
    model.load_state_dict({name: tensor.to(plan.dtype) for name, tensor in plan.make()}, assign=True, strict=False)
    model.tie_weights()
    return model.eval()


def load_llm(conversion: Conversion) -> nn.Module:
    """The text LLM of a conversion, by transformers' own code; InternLM2, which it does not have, as a Llama."""
    plan = conversion.plan
    if conversion.llm_config["model_type"] == "internlm2":
        text = conversion.config.text_config
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        names += ("vocab_size", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings")
        config = LlamaConfig(**{name: getattr(text, name) for name in (*names, "tie_word_embeddings")})
        state = {
            name.replace("model.language_model.", "model.").replace(".text.", "."): tensor
            for name, tensor in plan.without_new_weights().make()
            if ".visual." not in name
        }
    else:
        config = CONFIG_MAPPING[conversion.llm_config["model_type"]](**conversion.llm_config)
        state = {name: plan.source[name] for name in plan.source.shapes}
    model = AutoModelForCausalLM.from_config(config, torch_dtype=plan.dtype)
    model.load_state_dict(state, strict=False)  # a tied head may be stored or not; all else was checked by name
    model.tie_weights()
    return model.eval()
