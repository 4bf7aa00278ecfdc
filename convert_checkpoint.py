"""Converts checkpoints to the layout of this package and back, and checks the result.

    python convert_checkpoint.py official SRC DST     # a released checkpoint -> a complete, Hub-ready model folder
    python convert_checkpoint.py from-llm SRC DST     # a text LLM -> a NaViL ready to train
    python convert_checkpoint.py export SRC DST       # a model folder -> the released layout
    python convert_checkpoint.py verify DIR           # checks a model folder, alone or against its source
    python convert_checkpoint.py tokenizer SRC DST    # a released tokenizer alone

A destination is whole or not there, whatever happens on the way. Nothing that a source brings along is executed.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import checkpoint_layouts as layouts
import checkpoint_tokenizers as tokenizers
from checkpoint_files import DTYPES, TensorPlan, Tensors, new_folder, preview, read_json, write_json, write_weights
from checkpoint_layouts import Rule
from checkpoint_tokenizers import convert_tokenizer, unreadable
from navil_modules import ROOT, configuration, image_processing, processing, tokenization
from navil_modules import navil_module as navil_module  # recipes/ loads further modules with it

CODE_FILES = tuple(
    f"{name}_navil.py" for name in ("configuration", "image_processing", "modeling", "processing", "tokenization")
)


@dataclass
class Conversion:
    """All that a conversion will write, before any tensor is read."""

    config: Any
    tokenizer: Any
    tensors: Tensors
    rules: list[Rule]
    origin: str  # a sentence for the model card
    licence: str = "mit"
    sentencepiece: Path | None = None  # the model that the tokenizer was made from

    def plans(self, dtype: torch.dtype | None) -> dict[str, TensorPlan]:
        """What to write; dtype None keeps the dtype of each tensor's first source."""
        return weight_plans(self.rules, self.tensors, dtype)

    def main_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return dtype or main_dtype(self.rules, self.tensors)


def main_dtype(rules: Sequence[Rule], tensors: Tensors) -> torch.dtype:
    """Of the first tensor that has a source."""
    return tensors.dtypes[next(name for rule in rules for name in rule.sources)]


def weight_plans(rules: Sequence[Rule], tensors: Tensors, dtype: torch.dtype | None) -> dict[str, TensorPlan]:
    fallback = dtype or main_dtype(rules, tensors)
    return {
        rule.target: TensorPlan(
            dtype=dtype or (tensors.dtypes[next(iter(rule.sources))] if rule.sources else fallback),
            shape=rule.shape(),
            make=partial(rule.make, tensors),
        )
        for rule in rules
    }


def check_dtypes(tensors: Tensors) -> None:
    odd = [f"{name} is {dtype}" for name, dtype in tensors.dtypes.items() if dtype not in DTYPES.values()]
    if odd:
        raise ValueError(f"weights must be one of {sorted(DTYPES)}: {preview(odd)}")


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
    tokenizer = convert_tokenizer(source, source_config["template"], source_config.get("system_message"))
    tensors = Tensors.in_folder(source, allow_pickle)
    special_ids = tokenizer.convert_tokens_to_ids(list(tokenization.IMAGE_TOKENS))
    biases = layouts.attention_biases(tensors.shapes)
    output_bias = not biases.isdisjoint(layouts.OUTPUT_BIASES)
    config = layouts.convert_config(source_config, tokenizer, tied=False, output_bias=output_bias)
    if max(special_ids) >= config.text_config.vocab_size:
        raise ValueError(
            f"image token id {max(special_ids)} lies outside the {config.text_config.vocab_size} rows of the embedding"
        )

    tied = bool(llm_config.get("tie_word_embeddings", False))
    embedding, head, ignored = layouts.embedding_sources(tensors, layouts.EMBEDDING_NAMES[backbone], tied)
    rules = layouts.official_rules(config, backbone, special_ids, embedding, head, biases)
    layouts.check_sources(rules, tensors.shapes, ignored)
    check_dtypes(tensors)
    if tied and torch.equal(tensors[embedding][special_ids], tensors[layouts.SPECIAL_ROWS]):
        config.tie_word_embeddings = True  # no row is replaced: the head may stay tied
        rules = layouts.official_rules(config, backbone, special_ids, embedding, head, biases)
    name = source.resolve().name
    origin = f"Converted from the released checkpoint `{name}` by `convert_checkpoint.py official`:"
    return Conversion(config, tokenizer, tensors, rules, origin, sentencepiece=sentencepiece_of(source))


@dataclass
class TextLLM:
    """A text LLM's files, read."""

    config: dict[str, Any]
    tensors: Tensors
    tokenizer: tokenizers.SourceTokenizer
    gguf: Path | None = None


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
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).to_dict()
    config = layouts.with_defaults(config)
    with unreadable(gguf):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, torch_dtype=torch.float32)
    tokenizer = tokenizers.read_gguf_tokenizer(gguf, config)
    return TextLLM(config, Tensors.in_memory(model.state_dict()), tokenizer, gguf)


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
    config = layouts.grown_config(llm.config, tokenizer, shape, output_bias, grown)
    rules = layouts.llm_rules(config, architecture, rows, embedding, head, biases, seed)
    layouts.check_sources(rules, tensors.shapes, ignored)
    check_dtypes(tensors)
    origin = (
        f"Grown from the text LLM `{source.resolve().name}` by `convert_checkpoint.py from-llm`: its weights are the "
        f"text experts,\nand copies of them the visual experts. The vision encoder and the connector are fresh "
        f"(seed {seed}), so text works\nand pictures need training. The weights are under that LLM's licence:"
    )
    sentencepiece = sentencepiece_of(source)
    return Conversion(config, tokenizer, tensors, rules, origin, licence="other", sentencepiece=sentencepiece)


def sentencepiece_of(source: Path) -> Path | None:
    path = source / tokenizers.SENTENCEPIECE_NAME
    return path if path.is_file() else None


# ----------------------------------------------------------------------------------------------------------------------
# Folders
# ----------------------------------------------------------------------------------------------------------------------

MODEL_CARD = """\
---
license: {licence}
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- navil
- multimodal
- custom_code
---

# NaViL

A native multimodal LLM: images of any resolution and text in, text out
([arXiv 2510.08565](https://arxiv.org/abs/2510.08565), NeurIPS 2025).
{origin}
{parameters:,} parameters, {dtype}.

```python
import torch
from transformers import AutoModel, AutoTokenizer

path = "."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModel.from_pretrained(path, torch_dtype=torch.bfloat16, trust_remote_code=True).eval()
print(model.chat(tokenizer, "photo.jpg", "What is in this picture?"))
```

`AutoProcessor` gives the transformers-style interface (`apply_chat_template`, then `model.generate`).

## Sizes

| | vision encoder | LLM |
|---|---|---|
| depth | {vision.num_hidden_layers} | {text.num_hidden_layers} |
| width | {vision.hidden_size} | {text.hidden_size} |
| MLP width | {vision.intermediate_size} | {text.intermediate_size} |
| heads (key/value) | {vision.num_attention_heads} | {text.num_attention_heads} ({text.num_key_value_heads}) |

An image is seen at several scales with at most {config.max_dynamic_patch} patches of
{vision.patch_size} x {vision.patch_size} pixels at the largest; a visual token covers
{cell} x {cell} pixels. Context length: {text.max_position_embeddings} tokens.
"""


def write_model(conversion: Conversion, folder: Path, dtype: torch.dtype | None, max_shard_size: str) -> None:
    """Fills a folder with a complete model: weights, configs, tokenizer, code and card."""
    plans = conversion.plans(dtype)
    write_weights(plans, folder, max_shard_size)
    config = conversion.config
    config.torch_dtype = conversion.main_dtype(dtype)
    vision, text = config.vision_config, config.text_config
    image_processor = image_processing.NaViLImageProcessor(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        min_pixels=config.min_dynamic_patch * vision.patch_size**2,
        max_pixels=config.max_dynamic_patch * vision.patch_size**2,
        scale_downsample_ratio=config.scale_downsample_ratio,
    )
    processing.NaViLProcessor(image_processor, conversion.tokenizer).save_pretrained(folder)
    config.save_pretrained(folder)
    GenerationConfig(
        do_sample=False,
        max_new_tokens=1024,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
    for name in CODE_FILES:
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "LICENSE", folder)
    if conversion.sentencepiece is not None:
        shutil.copy(conversion.sentencepiece, folder)
    card = MODEL_CARD.format(
        licence=conversion.licence,
        origin=conversion.origin,
        parameters=sum(math.prod(plan.shape) for plan in plans.values()),
        dtype=str(config.torch_dtype).removeprefix("torch."),
        config=config,
        vision=vision,
        text=text,
        cell=vision.patch_size * vision.spatial_merge_size,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def describe(conversion: Conversion, dtype: torch.dtype | None) -> str:
    """A table of what a conversion would write."""
    config, counts = conversion.config, layouts.count_parameters(conversion.rules)
    vision, text = config.vision_config, config.text_config
    num_bytes = sum(plan.num_bytes for plan in conversion.plans(dtype).values())
    notes = {
        "vision encoder": f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, "
        f"{vision.num_attention_heads} heads of {vision.head_dim}",
        "embeddings": f"{text.vocab_size} rows, {'tied' if text.tie_word_embeddings else 'untied'}",
        "text experts": f"{text.num_hidden_layers} layers, width {text.hidden_size}, "
        f"{text.num_attention_heads} heads of {text.head_dim}",
    }
    total = sum(counts.values())
    rows = [(name, count, notes.get(name, "")) for name, count in counts.items()]
    dtype_name = str(conversion.main_dtype(dtype)).removeprefix("torch.")
    rows.append(("total", total, f"{num_bytes / 1e9:.2f} GB, {dtype_name}"))
    rows.append(("activated", total - counts["visual experts"], "per token: one expert of each pair"))
    return "\n".join(f"{name:<16}{count:>16,}  {note}".rstrip() for name, count, note in rows)


def export(source: Path, folder: Path | None, dtype: torch.dtype | None, max_shard_size: str) -> str:
    """Writes a model folder of this package in the released layout, or only checks that it can be; returns a summary.

    Raises:
        ValueError: a setting or a tensor that the released layout does not express, by name.
    """
    config = read_config(source)
    with unreadable(source / "tokenizer.json"):
        tokenizer = tokenization.NaViLTokenizer.from_pretrained(source)
    settings = tokenizer.init_kwargs
    released = layouts.released_config(config, settings["template"], settings["system_message"])
    backbone = layouts.released_backbone(config)
    tensors = Tensors.in_folder(source)
    check_dtypes(tensors)
    special_ids = tokenizer.convert_tokens_to_ids(list(tokenization.IMAGE_TOKENS))
    weights_dtype = dtype or next(iter(tensors.dtypes.values()))
    rules = layouts.export_rules(config, special_ids, weights_dtype)
    layouts.check_sources(rules, tensors.shapes)
    plans = weight_plans(rules, tensors, dtype)
    if folder is not None:
        write_weights(plans, folder, max_shard_size)
        released["torch_dtype"] = str(weights_dtype).removeprefix("torch.")
        write_json(folder / "config.json", released)
        tokenizers.export_tokenizer(tokenizer, backbone, source / tokenizers.SENTENCEPIECE_NAME, folder)
    count = sum(math.prod(plan.shape) for plan in plans.values())
    return f"released layout with {backbone}: {len(plans)} tensors, {count:,} parameters"


def read_config(source: Path) -> Any:
    """The config of a model folder of this package."""
    settings = read_json(source / "config.json")
    layouts.require(settings, "model_type", ["navil"], None)
    try:
        return configuration.NaViLConfig(**settings)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"cannot read {source / 'config.json'}: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

EXAMPLES = """\
examples:
  python convert_checkpoint.py official NaViL-2B weights/navil-2b --dtype bfloat16
  python convert_checkpoint.py from-llm Qwen3-1.7B weights/navil-qwen3 --vision-size auto --dry-run
  python convert_checkpoint.py from-llm Qwen3-1.7B weights/navil-qwen3
  python convert_checkpoint.py verify weights/navil-2b --against NaViL-2B
  python convert_checkpoint.py export weights/navil-2b NaViL-2B-mine
  python convert_checkpoint.py tokenizer NaViL-2B weights/tokenizer
"""


def build_parser() -> argparse.ArgumentParser:
    def command(name: str, help: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"example: python convert_checkpoint.py {name} {example}",
        )

    def add_folders(parser: argparse.ArgumentParser, source: str) -> None:
        parser.add_argument("source", type=Path, metavar="SRC", help=source)
        parser.add_argument("destination", type=Path, metavar="DST", help="new folder")

    def add_weights(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--dtype", choices=sorted(DTYPES), help="dtype of the weights (default: the source's)")
        parser.add_argument(
            "--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: %(default)s)"
        )
        parser.add_argument("--dry-run", action="store_true", help="check the source and print the plan; write nothing")

    def add_pickle(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--allow-pickle",
            action="store_true",
            help="read pytorch_model.bin where there is no safetensors file (its tensors alone; no code of it is run)",
        )

    parser = argparse.ArgumentParser(
        description="Convert checkpoints to the layout of this package and back, and check the result.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    official = command(
        "official", "a released checkpoint -> a complete model folder", "NaViL-2B weights/navil-2b --dtype bfloat16"
    )
    add_folders(official, "folder in the released layout")
    add_weights(official)
    add_pickle(official)

    from_llm = command(
        "from-llm",
        "a text LLM (Llama, Qwen2, Qwen3 or InternLM2) -> a NaViL ready to train",
        "Qwen3-1.7B weights/navil-qwen3 --vision-size 600M",
    )
    add_folders(from_llm, "folder in transformers' layout, or a GGUF file")
    from_llm.add_argument(
        "--vision-size",
        default="auto",
        metavar="SIZE",
        help="vision encoder: auto (the paper's joint scaling law), a size like 600M, or DEPTHxWIDTH "
        "(default: %(default)s)",
    )
    templates = sorted(tokenization.ASSISTANT_PREFIXES)
    from_llm.add_argument("--template", choices=templates, help="chat template (default: by architecture)")
    from_llm.add_argument("--system-message", default="", metavar="TEXT", help="default system message (default: none)")
    from_llm.add_argument("--seed", type=int, default=0, metavar="N", help="of the fresh weights (default: 0)")
    add_weights(from_llm)
    add_pickle(from_llm)

    export_command = command("export", "a model folder -> the released layout", "weights/navil-2b NaViL-2B-mine")
    add_folders(export_command, "model folder of this package")
    add_weights(export_command)

    tokenizer = command("tokenizer", "a released tokenizer -> tokenizer files alone", "NaViL-2B weights/tokenizer")
    add_folders(tokenizer, "folder with the released tokenizer")
    tokenizer.add_argument("--template", choices=templates, help="chat template (default: by its kind)")
    return parser


def run(options: argparse.Namespace) -> None:
    is_file = options.command == "from-llm" and options.source.suffix == ".gguf" and options.source.is_file()
    if not (options.source.is_dir() or is_file):
        raise ValueError(f"{options.source} is not a folder")
    if options.command != "export" and "." in options.destination.resolve().name:
        raise ValueError(
            f"the name of {options.destination} has a dot; transformers loads no code from a local folder whose name "
            "has one"
        )
    dtype = DTYPES.get(getattr(options, "dtype", None))
    if options.command == "tokenizer":
        with new_folder(options.destination) as folder:
            convert_tokenizer(options.source, options.template).save_pretrained(folder)
        print(f"wrote {options.destination}")
        return
    if options.command == "export":
        if options.dry_run:
            print(export(options.source, None, dtype, options.max_shard_size))
            return
        with new_folder(options.destination) as folder:
            print(export(options.source, folder, dtype, options.max_shard_size))
        print(f"wrote {options.destination}")
        return
    if options.command == "official":
        conversion = plan_official(options.source, options.allow_pickle)
    else:
        conversion = plan_from_llm(
            options.source,
            options.vision_size,
            options.template,
            options.system_message,
            options.seed,
            options.allow_pickle,
        )
    print(describe(conversion, dtype))
    if not options.dry_run:
        with new_folder(options.destination) as folder:
            write_model(conversion, folder, dtype, options.max_shard_size)
        print(f"wrote {options.destination}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
