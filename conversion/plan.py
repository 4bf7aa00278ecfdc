"""What a conversion will write, planned from configs and file headers.

released checkpoint  ->  plan_official  -->  Conversion: config, tokenizer, and the plan of all tensors
text LLM             ->  plan_from_llm  -/
model folder         ->  plan_export    -->  Export: the same for the released layout
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from conversion import configs, names, tokenizers
from conversion.configs import JSON, check_supported, need
from conversion.files import preview, read_json, unreadable
from conversion.read import DTYPES, Shape, Tensors, open_tensors
from navil.configuration_navil import NaViLConfig
from navil.tokenization_navil import IMAGE_TOKENS, NaViLTokenizer

PARTS = {
    "vision encoder": "model.vision_model.",
    "connector": "model.connector.",
    "embeddings": "embed_tokens.",
    "output head": "lm_head.",
    "text experts": ".text.",
    "visual experts": ".visual.",
    "norms": "norm",
}
"""What the names of a part's tensors have in common; the first match counts."""


@dataclass(frozen=True)
class Plan:
    """The tensors to write, in this order, and how they are made."""

    rules: list[names.Rule]
    source: Tensors
    dtype: torch.dtype

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        return {name: shape for rule in self.rules for name, shape in rule.targets.items()}

    @property
    def num_parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def num_bytes(self) -> int:
        return self.num_parameters * self.dtype.itemsize

    def make(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each tensor, made when it is asked for. Each source tensor is read once."""
        for rule in self.rules:
            yield from zip(rule.targets, rule.make(self.source), strict=True)

    def without_new_weights(self) -> "Plan":
        """The tensors that come from the source."""
        return Plan([rule for rule in self.rules if rule.sources], self.source, self.dtype)


@dataclass
class Conversion:
    """A model folder to be written."""

    config: NaViLConfig
    tokenizer: NaViLTokenizer
    plan: Plan
    origin: str  # a sentence for the model card
    license: str = "mit"
    sentencepiece: Path | None = None  # the model that the tokenizer was made from
    llm_config: JSON | None = None  # of the text LLM that it comes from

    @property
    def summary(self) -> str:
        """A table of parameters by part."""
        plan, vision, text = self.plan, self.config.vision_config, self.config.text_config
        counts = dict.fromkeys(PARTS, 0)
        for name, shape in plan.shapes.items():
            counts[next(part for part, mark in PARTS.items() if mark in name)] += math.prod(shape)
        casts = [name for name, dtype in plan.source.dtypes.items() if dtype != plan.dtype]
        cast = f" ({len(casts)} tensors are cast to it: {preview(casts)})" if casts else ""
        notes = {
            "vision encoder": f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, "
            f"{vision.num_attention_heads} heads of {vision.head_dim}",
            "embeddings": f"{text.vocab_size} rows, {'tied' if text.tie_word_embeddings else 'untied'}",
            "text experts": f"{text.num_hidden_layers} layers, width {text.hidden_size}, "
            f"{text.num_attention_heads} heads of {text.head_dim}",
            "total": f"{plan.num_bytes / 1e9:.2f} GB, {dtype_name(plan.dtype)}{cast}",
            "activated": "per token: one expert of each pair",
        }
        counts["total"] = plan.num_parameters
        counts["activated"] = plan.num_parameters - counts["visual experts"]
        return "\n".join(f"{part:<16}{count:>16,}  {notes.get(part, '')}".rstrip() for part, count in counts.items())


@dataclass
class Export:
    """A folder in the released layout to be written."""

    config: JSON
    tokenizer: NaViLTokenizer
    backbone: str  # of the released layout: internlm2 or qwen3
    plan: Plan
    sentencepiece: Path | None

    @property
    def summary(self) -> str:
        tensors, parameters = len(self.plan.shapes), self.plan.num_parameters
        return f"released layout with {self.backbone}: {tensors} tensors, {parameters:,} parameters"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main_dtype(tensors: Tensors) -> torch.dtype:
    """The dtype of most of the numbers, the wider one of two with as many.

    Raises:
        ValueError: a tensor of a dtype that weights never have.
    """
    wrong = [f"{name} is {dtype}" for name, dtype in tensors.dtypes.items() if dtype not in DTYPES.values()]
    if wrong:
        raise ValueError(f"weights must be one of {sorted(DTYPES)}: {preview(wrong)}")
    counts: Counter[torch.dtype] = Counter()
    for name, dtype in tensors.dtypes.items():
        counts[dtype] += math.prod(tensors.shapes[name])
    return max(counts, key=lambda dtype: (counts[dtype], dtype.itemsize))


def sentencepiece_of(source: Path) -> Path | None:
    path = source / tokenizers.SENTENCEPIECE_NAME
    return path if path.is_file() else None


def plan_official(source: Path, dtype: torch.dtype | None = None, allow_pickle: bool = False) -> Conversion:
    """How a released checkpoint folder becomes a model folder.

    Args:
        dtype: of the weights to write; None means that of most of the source's.

    Raises:
        ValueError: anything in the source that is missing, unknown, misshapen or not supported, by name.
    """
    released = read_json(source / "config.json")
    check_supported(released, configs.SUPPORTED_RELEASED)
    need(released, "model_type", "vision_config", "llm_config", "template", "downsample_ratio")
    llm_config = released["llm_config"]
    backbone = need(llm_config, "model_type")["model_type"]
    tokenizer = tokenizers.convert_tokenizer(source, released["template"], released.get("system_message"))
    special_ids = tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    tensors = open_tensors(source, allow_pickle)
    dtype = dtype or main_dtype(tensors)
    with unreadable(source / "config.json"):
        config = configs.convert_config(released, tokenizer)
        tied = bool(llm_config.get("tie_word_embeddings"))
        rules = names.official_rules(config, backbone, special_ids, tied)
    tokenizers.check_ids(tokenizer, config.text_config.vocab_size)
    embedding, head = (names.released_name(name, backbone) for name in (names.EMBEDDING, names.HEAD))
    if tied:
        names.drop_tied_head(tensors, embedding, head)
    names.check_sources(rules, tensors.shapes)
    if tied and torch.equal(tensors[embedding][special_ids], tensors[names.SPECIAL_ROWS]):
        config.tie_word_embeddings = True  # no row is replaced: the head may stay tied
        rules = names.official_rules(config, backbone, special_ids)
    origin = f"Converted from the released checkpoint `{source.resolve().name}` by `convert_checkpoint.py official`:"
    plan = Plan(rules, tensors, dtype)
    return Conversion(config, tokenizer, plan, origin, sentencepiece=sentencepiece_of(source))


def plan_from_llm(
    source: Path,
    vision_size: str = "auto",
    template: str | None = None,
    system_message: str = "",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
) -> Conversion:
    """How a text LLM becomes a NaViL.

    Args:
        vision_size: of the vision encoder (see `configs.parse_vision_size`).
        template: name of the chat template; None means Qwen3's for Qwen3 and InternLM2's otherwise.
        system_message: default system message.
        seed: of the new weights of the vision encoder and the connector.
        dtype: of the weights to write; None means that of most of the source's.

    Raises:
        ValueError: anything in the source that is missing, unknown, misshapen or not supported, by name.
    """
    llm_config, tensors, llm_tokenizer = read_llm(source, allow_pickle)
    architecture = llm_config["model_type"]
    template = template or ("qwen3-chat" if architecture == "qwen3" else "internlm2-chat")
    tokenizer = tokenizers.extended_tokenizer(llm_tokenizer, template, system_message)
    dtype = dtype or main_dtype(tensors)
    if llm_config.get("tie_word_embeddings"):
        names.drop_tied_head(tensors, *(names.llm_name(name, architecture) for name in (names.EMBEDDING, names.HEAD)))
    for name in [name for name in tensors.shapes if name.endswith(".rotary_emb.inv_freq")]:
        tensors.remove(name)  # old files store these constants
    shape = configs.parse_vision_size(vision_size, sum(map(math.prod, tensors.shapes.values())))
    rows = need(llm_config, "vocab_size")["vocab_size"]
    grown_rows = max(rows, max(tokenizer.get_vocab().values()) + 1)
    with unreadable(source / "config.json"):
        config = configs.grown_config(llm_config, tokenizer, shape, grown_rows)
        rules = names.llm_rules(config, architecture, rows, seed)
    names.check_sources(rules, tensors.shapes)
    origin = (
        f"Made from the text LLM `{source.resolve().name}` by `convert_checkpoint.py from-llm`: its weights are the "
        f"text experts,\nand copies of them the visual experts. The vision encoder and the connector are new "
        f"(seed {seed}): text works,\nand pictures need training. The weights are under that LLM's license:"
    )
    plan, sentencepiece = Plan(rules, tensors, dtype), sentencepiece_of(source)
    return Conversion(config, tokenizer, plan, origin, "other", sentencepiece, llm_config)


def read_llm(source: Path, allow_pickle: bool = False) -> tuple[JSON, Tensors, tokenizers.SourceTokenizer]:
    """A text LLM from a folder in transformers' layout, or from a GGUF file or a folder with one.

    A GGUF file is dequantized to float32 as a whole, in memory.

    Raises:
        ValueError: files that are missing or cannot be read, or an architecture that is not supported.
    """
    gguf = find_gguf(source)
    if gguf is None:
        config = configs.with_defaults(read_json(source / "config.json"))
        return config, open_tensors(source, allow_pickle), tokenizers.read_tokenizer(source)
    with unreadable(gguf):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, torch_dtype=torch.float32)
    config, tensors = configs.with_defaults(model.config.to_dict()), Tensors()
    tensors.add_state(model.state_dict())
    return config, tensors, tokenizers.read_gguf_tokenizer(gguf, config)


def find_gguf(source: Path) -> Path | None:
    """The GGUF file that a source is or, if it has no `config.json`, holds."""
    if source.is_file():
        return source
    files = sorted(source.glob("*.gguf"))
    if (source / "config.json").is_file() or not files:
        return None
    if len(files) > 1:
        raise ValueError(f"{source} holds {len(files)} GGUF files; name one of them: {preview(f.name for f in files)}")
    return files[0]


def read_config(folder: Path) -> NaViLConfig:
    """The config of a model folder of this package."""
    settings = read_json(folder / "config.json")
    model_type = settings.get("model_type")
    if model_type != "navil":
        raise ValueError(f"{folder} is not a model folder of this package: model_type is {model_type!r}, not 'navil'")
    with unreadable(folder / "config.json"):
        return NaViLConfig(**settings)


def plan_export(source: Path, dtype: torch.dtype | None = None) -> Export:
    """How a model folder of this package goes back to the released layout.

    Args:
        dtype: of the weights to write; None means that of most of the source's.

    Raises:
        ValueError: a setting or a tensor that the released layout cannot represent, by name.
    """
    config = read_config(source)
    with unreadable(source / "tokenizer.json"):
        tokenizer = NaViLTokenizer.from_pretrained(source)
    settings = tokenizer.init_kwargs
    released = configs.released_config(config, settings["template"], settings["system_message"])
    tokenizers.check_template(tokenizer)
    tensors = open_tensors(source)
    dtype = dtype or main_dtype(tensors)
    released["torch_dtype"] = dtype_name(dtype)
    backbone, special_ids = configs.released_backbone(config), tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    rules = names.export_rules(config, backbone, special_ids, dtype)
    names.check_sources(rules, tensors.shapes)
    return Export(released, tokenizer, backbone, Plan(rules, tensors, dtype), sentencepiece_of(source))
