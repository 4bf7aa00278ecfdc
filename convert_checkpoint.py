"""Converts checkpoints to the layout of this package and back, and checks the result.

    python convert_checkpoint.py official SRC DST     # a released checkpoint -> a complete, Hub-ready model folder
    python convert_checkpoint.py from-llm SRC DST     # a text LLM -> a NaViL ready to train
    python convert_checkpoint.py export SRC DST       # a model folder -> the released layout
    python convert_checkpoint.py verify DIR           # checks a model folder, alone or against its source
    python convert_checkpoint.py tokenizer SRC DST    # a released tokenizer alone
    python convert_checkpoint.py bundle SRC DST       # a model folder without code, such as tiny/, with it

DST is written atomically. No code of a source is run.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

import checkpoint_layouts as layouts
import checkpoint_tokenizers as tokenizers
from checkpoint_files import DTYPES, check_links, new_folder, preview, write_checksums, write_json, write_weights
from checkpoint_plans import Conversion, Export, copy_code, plan_export, plan_from_llm, plan_official
from checkpoint_tokenizers import convert_tokenizer
from checkpoint_verification import verify
from navil import ROOT
from navil import tokenization_navil as tokenization

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


def write_model(conversion: Conversion, folder: Path, max_shard_size: str) -> None:
    """Fills a folder with a complete model: weights, configs, tokenizer, code, card and checksums."""
    plans = conversion.plans()
    weight_lines = write_weights(plans, folder, max_shard_size)
    conversion.write_settings(folder)
    for path in (ROOT / "LICENSE", conversion.sentencepiece):
        if path is not None:
            shutil.copy(path, folder)
    vision, text = conversion.config.vision_config, conversion.config.text_config
    card = MODEL_CARD.format(
        licence=conversion.licence,
        origin=conversion.origin,
        parameters=sum(math.prod(plan.shape) for plan in plans.values()),
        dtype=dtype_name(conversion.dtype),
        config=conversion.config,
        vision=vision,
        text=text,
        cell=vision.patch_size * vision.spatial_merge_size,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_checksums(folder, weight_lines)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(conversion: Conversion) -> str:
    """A table of what a conversion would write."""
    config, counts = conversion.config, layouts.count_parameters(conversion.rules)
    vision, text = config.vision_config, config.text_config
    num_bytes = sum(plan.num_bytes for plan in conversion.plans().values())
    casts = [name for name, dtype in conversion.tensors.dtypes.items() if dtype != conversion.dtype]
    notes = {
        "vision encoder": f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, "
        f"{vision.num_attention_heads} heads of {vision.head_dim}",
        "embeddings": f"{text.vocab_size} rows, {'tied' if text.tie_word_embeddings else 'untied'}",
        "text experts": f"{text.num_hidden_layers} layers, width {text.hidden_size}, "
        f"{text.num_attention_heads} heads of {text.head_dim}",
    }
    total = sum(counts.values())
    rows = [(name, count, notes.get(name, "")) for name, count in counts.items()]
    cast = f" ({len(casts)} tensors are cast to it: {preview(casts)})" if casts else ""
    rows.append(("total", total, f"{num_bytes / 1e9:.2f} GB, {dtype_name(conversion.dtype)}{cast}"))
    rows.append(("activated", total - counts["visual experts"], "per token: one expert of each pair"))
    return "\n".join(f"{name:<16}{count:>16,}  {note}".rstrip() for name, count, note in rows)


def write_export(export: Export, folder: Path, max_shard_size: str) -> None:
    """Fills a folder in the released layout."""
    weight_lines = write_weights(export.plans, folder, max_shard_size)
    write_json(folder / "config.json", export.config)
    tokenizers.export_tokenizer(export.tokenizer, export.backbone, export.sentencepiece, folder)
    write_checksums(folder, weight_lines)


# ----------------------------------------------------------------------------------------------------------------------
# The Hub
# ----------------------------------------------------------------------------------------------------------------------


def check_hub_access(repo_id: str) -> None:
    """Raises a ValueError for a name that no repository can have, and where nobody, or nobody known, is logged in."""
    validate_repo_id(repo_id)
    try:
        HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ValueError(f"cannot push: log in by `hf auth login` or set HF_TOKEN ({error})") from error


def push_folder(folder: Path, repo_id: str) -> str:
    """Pushes a model folder in one commit, to a new repository where there is none; the repository's address.

    Raises:
        ValueError: the Hub refuses; the folder stays.
    """
    try:
        url = HfApi().create_repo(repo_id, exist_ok=True)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload NaViL")
    except HfHubHTTPError as error:
        raise ValueError(f"cannot push {folder}: {error}\nTry again by: hf upload {repo_id} {folder}") from error
    return str(url)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


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
        parser.add_argument("--dry-run", action="store_true", help="check the source and print the plan; write nothing")

    def add_weights(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the weights (default: most of the source's)")
        parser.add_argument(
            "--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: %(default)s)"
        )

    def add_push(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--push-to-hub", metavar="REPO", help="then push the folder, to USER/NAME")

    def add_pickle(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--allow-pickle",
            action="store_true",
            help="read pytorch_model.bin where there is no safetensors file (its tensors alone; no code of it is run)",
        )

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    official = command(
        "official", "a released checkpoint -> a complete model folder", "NaViL-2B weights/navil-2b --dtype bfloat16"
    )
    add_folders(official, "folder in the released layout")
    add_weights(official)
    add_push(official)
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
    add_push(from_llm)
    add_pickle(from_llm)

    export_command = command("export", "a model folder -> the released layout", "weights/navil-2b NaViL-2B-mine")
    add_folders(export_command, "model folder of this package")
    add_weights(export_command)

    verify_command = command(
        "verify", "check a model folder, alone or against its source", "weights/navil-2b --against NaViL-2B"
    )
    verify_command.add_argument("source", type=Path, metavar="DIR", help="model folder of this package")
    verify_command.add_argument(
        "--against", type=Path, metavar="SRC", help="released checkpoint, text LLM or model folder that it came from"
    )
    verify_command.add_argument(
        "--max-kl", type=float, default=0.01, metavar="NATS", help="largest mean KL allowed (default: %(default)s)"
    )
    add_pickle(verify_command)

    tokenizer = command("tokenizer", "a released tokenizer -> tokenizer files alone", "NaViL-2B weights/tokenizer")
    add_folders(tokenizer, "folder with the released tokenizer")
    tokenizer.add_argument("--template", choices=templates, help="chat template (default: by its kind)")

    bundle = command(
        "bundle", "weights and settings with the code that runs them -> a model folder", "tiny weights/tiny"
    )
    add_folders(bundle, "model folder without code, such as tiny/")
    return parser


def prepare_bundle(source: Path) -> tuple[str, Callable[[Path], None]]:
    """`prepare` for a model folder without code, such as `tiny/`: its copy loads by its path alone.

    Raises:
        ValueError: no model folder of this package, or one that has its code already.
    """
    settings = source / "config.json"
    if not settings.is_file() or json.loads(settings.read_text(encoding="utf-8")).get("model_type") != "navil":
        raise ValueError(f"{source} is no model folder of this package: its config.json has no model_type navil")
    files = [path for path in sorted(source.iterdir()) if path.is_file()]
    code = [path.name for path in files if path.suffix == ".py"]
    if code:
        raise ValueError(f"{source} has its code already ({preview(code)}): copy the folder")

    def write(folder: Path) -> None:
        for path in files:
            shutil.copy(path, folder)
        copy_code(folder)

    return f"bundle: {len(files)} files and the code", write


def prepare(options: argparse.Namespace) -> tuple[str, Callable[[Path], None]]:
    """A summary of what a command will write, and what writes it into a folder."""
    if options.command == "bundle":
        return prepare_bundle(options.source)
    if options.command == "tokenizer":
        tokenizer = convert_tokenizer(options.source, options.template)
        return f"tokenizer: {len(tokenizer)} tokens", tokenizer.save_pretrained
    if options.command == "export":
        export = plan_export(options.source, DTYPES.get(options.dtype))
        return export.summary, lambda folder: write_export(export, folder, options.max_shard_size)
    if options.command == "official":
        conversion = plan_official(options.source, options.allow_pickle)
    else:
        chat = (options.template, options.system_message)
        conversion = plan_from_llm(options.source, options.vision_size, *chat, options.seed, options.allow_pickle)
    conversion.dtype = DTYPES.get(options.dtype, conversion.dtype)
    return describe(conversion), lambda folder: write_model(conversion, folder, options.max_shard_size)


def convert(options: argparse.Namespace) -> int:
    is_gguf = options.command == "from-llm" and options.source.suffix == ".gguf" and options.source.is_file()
    if options.source.is_dir():
        check_links(options.source)
    elif not is_gguf:
        raise ValueError(f"{options.source} is not a folder")
    if options.command != "export" and "." in options.destination.resolve().name:
        raise ValueError(
            f"the name of {options.destination} has a dot; transformers loads no code from a local folder whose name "
            "has one"
        )
    if options.dry_run:
        print(prepare(options)[0])
        return 0
    repo_id = getattr(options, "push_to_hub", None)
    if repo_id is not None:
        check_hub_access(repo_id)
    with new_folder(options.destination) as folder:
        summary, write = prepare(options)
        print(summary)
        write(folder)
    print(f"wrote {options.destination}")
    if repo_id is not None:
        print(f"pushed to {push_folder(options.destination, repo_id)}")
    return 0


def check(options: argparse.Namespace) -> int:
    for folder in (options.source, options.against):
        if folder is not None and folder.is_dir():
            check_links(folder)
    findings = verify(options.source, options.against, options.max_kl, options.allow_pickle)
    print("\n".join(map(str, findings)))
    return 0 if all(finding.is_ok for finding in findings) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        return check(options) if options.command == "verify" else convert(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
