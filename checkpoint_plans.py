"""What a conversion will write, worked out from headers and configs before any tensor is read.

released checkpoint  ->  plan_official  -->  Conversion: config, tokenizer, and a rule for each tensor
text LLM             ->  plan_from_llm  -/
model folder         ->  plan_export    -->  Export: the same for the released layout
"""

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import checkpoint_layouts as layouts
import checkpoint_tokenizers as tokenizers
from checkpoint_files import DTYPES, TensorPlan, Tensors, preview, read_json, unreadable
from checkpoint_layouts import Rule
from navil import CODE_FILES, ROOT
from navil import configuration_navil as configuration
from navil import image_processing_navil as image_processing
from navil import processing_navil as processing
from navil import tokenization_navil as tokenization


@dataclass
class Conversion:
    """All that a conversion will write, before any tensor is read."""

    config: Any
    tokenizer: Any
    tensors: Tensors
    rules: list[Rule]
    dtype: torch.dtype  # of the weights written
    origin: str  # a sentence for the model card
    licence: str = "mit"
    sentencepiece: Path | None = None  # the model that the tokenizer was made from
    llm_config: dict[str, Any] | None = None  # of the text LLM that it grows from

    def plans(self) -> dict[str, TensorPlan]:
        return weight_plans(self.rules, self.tensors, self.dtype)

    def write_settings(self, folder: Path) -> None:
        """Writes all that a model folder has besides its weights, its license and its card."""
        config, vision = self.config, self.config.vision_config
        image_processor = image_processing.NaViLImageProcessor(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            min_pixels=config.min_dynamic_patch * vision.patch_size**2,
            max_pixels=config.max_dynamic_patch * vision.patch_size**2,
            scale_downsample_ratio=config.scale_downsample_ratio,
        )
        processing.NaViLProcessor(image_processor, self.tokenizer).save_pretrained(folder)
        config.torch_dtype = self.dtype
        config.save_pretrained(folder)
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(do_sample=False, max_new_tokens=1024, **ids).save_pretrained(folder)
        copy_code(folder)


def copy_code(folder: Path) -> None:
    for name in CODE_FILES:
        shutil.copy(ROOT / name, folder)


def main_dtype(tensors: Tensors) -> torch.dtype:
    """The dtype of most of the numbers, the wider one of two with as many.

    Raises:
        ValueError: a tensor of another dtype than weights have.
    """
    odd = [f"{name} is {dtype}" for name, dtype in tensors.dtypes.items() if dtype not in DTYPES.values()]
    if odd:
        raise ValueError(f"weights must be one of {sorted(DTYPES)}: {preview(odd)}")
    counts: Counter[torch.dtype] = Counter()
    for name, dtype in tensors.dtypes.items():
        counts[dtype] += math.prod(tensors.shapes[name])
    return max(counts, key=lambda dtype: (counts[dtype], dtype.itemsize))


def weight_plans(rules: Sequence[Rule], tensors: Tensors, dtype: torch.dtype) -> dict[str, TensorPlan]:
    return {rule.target: TensorPlan(dtype, rule.shape(), partial(rule.make, tensors)) for rule in rules}


# ----------------------------------------------------------------------------------------------------------------------
# Sources
# ----------------------------------------------------------------------------------------------------------------------


def plan_official(source: Path, allow_pickle: bool = False) -> Conversion:
    """How a released checkpoint folder becomes a model folder.

    Raises:
        ValueError: anything in the source that is missing, unknown, misshapen or not expressible, by name.
    """
    source_config = read_json(source / "config.json")
    layouts.require(source_config, "model_type", ["navil_chat"], None)
    layouts.need(source_config, "vision_config", "llm_config", "template", "downsample_ratio")
    llm_config = source_config["llm_config"]
    backbone = layouts.need(llm_config, "model_type")["model_type"]
    layouts.require(llm_config, "model_type", layouts.RELEASED_BACKBONES, None)
    tokenizer = tokenizers.convert_tokenizer(source, source_config["template"], source_config.get("system_message"))
    tensors = Tensors.in_folder(source, allow_pickle)
    dtype = main_dtype(tensors)
    biases = layouts.attention_biases(tensors.shapes)
    output_bias = not biases.isdisjoint(layouts.OUTPUT_BIASES)
    with unreadable(source / "config.json"):
        config = layouts.convert_config(source_config, tokenizer, tied=False, output_bias=output_bias)
    tokenizers.check_ids(tokenizer, config.text_config.vocab_size)
    special_ids = tokenizer.convert_tokens_to_ids(list(tokenization.IMAGE_TOKENS))
    tied = bool(llm_config.get("tie_word_embeddings", False))
    embedding, head, ignored = layouts.embedding_sources(tensors, layouts.EMBEDDING_NAMES[backbone], tied)
    rules = layouts.official_rules(config, backbone, special_ids, embedding, head, biases)
    layouts.check_sources(rules, tensors.shapes, ignored)
    if tied and torch.equal(tensors[embedding][special_ids], tensors[layouts.SPECIAL_ROWS]):
        config.tie_word_embeddings = True  # no row is replaced: the head may stay tied
        rules = layouts.official_rules(config, backbone, special_ids, embedding, head, biases)
    name = source.resolve().name
    origin = f"Converted from the released checkpoint `{name}` by `convert_checkpoint.py official`:"
    return Conversion(config, tokenizer, tensors, rules, dtype, origin, sentencepiece=sentencepiece_of(source))


@dataclass
class TextLLM:
    """A text LLM's files, read."""

    config: dict[str, Any]
    tensors: Tensors
    tokenizer: tokenizers.SourceTokenizer


def read_llm(source: Path, allow_pickle: bool = False) -> TextLLM:
    """A text LLM from a folder in transformers' layout, or from a GGUF file or a folder with one.

    A GGUF file is dequantized to float32 as a whole, in memory.

    Raises:
        ValueError: files that are missing or cannot be read, or an architecture that this package does not express.
    """
    gguf = find_gguf(source)
    if gguf is None:
        config = layouts.with_defaults(read_json(source / "config.json"))
        tensors = Tensors.in_folder(source, allow_pickle)
        return TextLLM(config, tensors, tokenizers.read_tokenizer(source))
    with unreadable(gguf):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, torch_dtype=torch.float32)
    config = layouts.with_defaults(model.config.to_dict())
    return TextLLM(config, Tensors.in_memory(model.state_dict()), tokenizers.read_gguf_tokenizer(gguf, config))


def find_gguf(source: Path) -> Path | None:
    """The GGUF file that a source is or, without a config of its own, holds."""
    if source.is_file():
        return source
    files = sorted(source.glob("*.gguf"))
    if (source / "config.json").is_file() or not files:
        return None
    if len(files) > 1:
        raise ValueError(f"{source} holds {len(files)} GGUF files; name one of them: {preview(f.name for f in files)}")
    return files[0]


def plan_from_llm(
    source: Path,
    vision_size: str = "auto",
    template: str | None = None,
    system_message: str = "",
    seed: int = 0,
    allow_pickle: bool = False,
) -> Conversion:
    """How a text LLM grows into a NaViL.

    Args:
        vision_size: of the vision encoder (see `checkpoint_layouts.parse_vision_size`).
        template: name of the chat template; None means Qwen3's for Qwen3 and InternLM2's otherwise.
        system_message: default system message.
        seed: of the vision encoder's and the connector's fresh weights.

    Raises:
        ValueError: anything in the source that is missing, unknown, misshapen or not expressible, by name.
    """
    llm = read_llm(source, allow_pickle)
    architecture, tensors = llm.config["model_type"], llm.tensors
    template = template or ("qwen3-chat" if architecture == "qwen3" else "internlm2-chat")
    tokenizer = tokenizers.extended_tokenizer(llm.tokenizer, template, system_message)
    biases = layouts.attention_biases(tensors.shapes, prefix="")
    output_bias = not biases.isdisjoint(layouts.OUTPUT_BIASES)
    tied = bool(llm.config.get("tie_word_embeddings", False))
    names = tuple(map(layouts.llm_name, layouts.EMBEDDING_NAMES[architecture]))
    embedding, head, ignored = layouts.embedding_sources(tensors, names, tied)
    ignored += [name for name in tensors.shapes if name.endswith(".rotary_emb.inv_freq")]  # old files store constants
    parameters = sum(math.prod(shape) for name, shape in tensors.shapes.items() if name not in ignored)
    shape = layouts.parse_vision_size(vision_size, parameters)
    rows = layouts.need(llm.config, "vocab_size")["vocab_size"]
    grown = max(rows, max(tokenizer.get_vocab().values()) + 1)
    with unreadable(source / "config.json"):
        config = layouts.grown_config(llm.config, tokenizer, shape, output_bias, grown)
    rules = layouts.llm_rules(config, architecture, rows, embedding, head, biases, seed)
    layouts.check_sources(rules, tensors.shapes, ignored)
    origin = (
        f"Grown from the text LLM `{source.resolve().name}` by `convert_checkpoint.py from-llm`: its weights are the "
        f"text experts,\nand copies of them the visual experts. The vision encoder and the connector are fresh "
        f"(seed {seed}), so text works\nand pictures need training. The weights are under that LLM's licence:"
    )
    more = {"licence": "other", "sentencepiece": sentencepiece_of(source), "llm_config": llm.config}
    return Conversion(config, tokenizer, tensors, rules, main_dtype(tensors), origin, **more)


def sentencepiece_of(source: Path) -> Path | None:
    path = source / tokenizers.SENTENCEPIECE_NAME
    return path if path.is_file() else None


def read_config(source: Path) -> Any:
    """The config of a model folder of this package."""
    settings = read_json(source / "config.json")
    layouts.require(settings, "model_type", ["navil"], None)
    with unreadable(source / "config.json"):
        return configuration.NaViLConfig(**settings)


# ----------------------------------------------------------------------------------------------------------------------
# To the released layout
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Export:
    """All that an export will write, before any tensor is read."""

    config: dict[str, Any]
    tokenizer: Any
    backbone: str  # of the released layout: internlm2 or qwen3
    plans: dict[str, TensorPlan]
    sentencepiece: Path  # where a SentencePiece model would lie

    @property
    def summary(self) -> str:
        count = sum(math.prod(plan.shape) for plan in self.plans.values())
        return f"released layout with {self.backbone}: {len(self.plans)} tensors, {count:,} parameters"


def plan_export(source: Path, dtype: torch.dtype | None) -> Export:
    """How a model folder of this package goes back to the released layout.

    Raises:
        ValueError: a setting or a tensor that the released layout does not express, by name.
    """
    config = read_config(source)
    with unreadable(source / "tokenizer.json"):
        tokenizer = tokenization.NaViLTokenizer.from_pretrained(source)
    settings = tokenizer.init_kwargs
    released = layouts.released_config(config, settings["template"], settings["system_message"])
    tokenizers.check_template(tokenizer)
    tensors = Tensors.in_folder(source)
    dtype = dtype or main_dtype(tensors)
    special_ids = tokenizer.convert_tokens_to_ids(list(tokenization.IMAGE_TOKENS))
    released["torch_dtype"] = str(dtype).removeprefix("torch.")
    rules = layouts.export_rules(config, special_ids, dtype)
    layouts.check_sources(rules, tensors.shapes)
    backbone, sentencepiece = layouts.released_backbone(config), source / tokenizers.SENTENCEPIECE_NAME
    return Export(released, tokenizer, backbone, weight_plans(rules, tensors, dtype), sentencepiece)
