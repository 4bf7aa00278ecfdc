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
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from conversion.files import check_links, new_folder
from conversion.hub import check_hub_access, push_folder
from conversion.plan import plan_export, plan_from_llm, plan_official
from conversion.read import DTYPES
from conversion.tokenizers import convert_tokenizer
from conversion.verify import verify
from conversion.write import bundle_files, write_bundle, write_export, write_model
from navil.tokenization_navil import ASSISTANT_PREFIXES

TEMPLATES = sorted(ASSISTANT_PREFIXES)
OPTIONS = {
    "--dry-run": {"action": "store_true", "help": "check the source and print the plan; write nothing"},
    "--dtype": {"choices": sorted(DTYPES), "help": "of the weights (default: most of the source's)"},
    "--max-shard-size": {"default": "5GB", "metavar": "SIZE", "help": "largest weight file (default: 5GB)"},
    "--push-to-hub": {"metavar": "REPO", "help": "then push the folder, to USER/NAME"},
    "--allow-pickle": {
        "action": "store_true",
        "help": "read pytorch_model.bin if there is no safetensors file (tensors only; no code from it is run)",
    },
    "--vision-size": {
        "default": "auto",
        "metavar": "SIZE",
        "help": "vision encoder: auto (the paper's joint scaling law, the default), a size like 600M, or DEPTHxWIDTH",
    },
    "--template": {"choices": TEMPLATES, "help": "chat template (default: by architecture)"},
    "--system-message": {"default": "", "metavar": "TEXT", "help": "default system message (default: none)"},
    "--seed": {"type": int, "default": 0, "metavar": "N", "help": "of the new weights (default: 0)"},
    "--against": {
        "type": Path,
        "metavar": "SRC",
        "help": "the released checkpoint, text LLM or model folder that it was made from",
    },
    "--max-kl": {
        "type": float,
        "default": 0.01,
        "metavar": "NATS",
        "help": "largest mean KL divergence allowed (default: 0.01)",
    },
}
WEIGHTS = ("--dry-run", "--dtype", "--max-shard-size")
COMMANDS = {
    "official": (
        "a released checkpoint -> a complete model folder",
        "folder in the released layout",
        (*WEIGHTS, "--push-to-hub", "--allow-pickle"),
        "NaViL-2B weights/navil-2b --dtype bfloat16",
    ),
    "from-llm": (
        "a text LLM (Llama, Qwen2, Qwen3 or InternLM2) -> a NaViL ready to train",
        "folder in transformers' layout, or a GGUF file",
        ("--vision-size", "--template", "--system-message", "--seed", *WEIGHTS, "--push-to-hub", "--allow-pickle"),
        "Qwen3-1.7B weights/navil-qwen3 --vision-size 600M",
    ),
    "export": (
        "a model folder -> the released layout",
        "model folder of this package",
        WEIGHTS,
        "weights/navil-2b NaViL-2B-mine",
    ),
    "verify": (
        "check a model folder, alone or against its source",
        "model folder of this package",
        ("--against", "--max-kl", "--allow-pickle"),
        "weights/navil-2b --against NaViL-2B",
    ),
    "tokenizer": (
        "a released tokenizer -> tokenizer files alone",
        "folder with the released tokenizer",
        ("--template", "--dry-run"),
        "NaViL-2B weights/tokenizer",
    ),
    "bundle": (
        "weights and settings without code -> a model folder that loads by its path",
        "model folder without code, such as tiny/",
        ("--dry-run",),
        "tiny weights/tiny",
    ),
}
"""Help, help on SRC, options and an example of each command."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (help, source, options, example) in COMMANDS.items():
        epilog = f"example: python convert_checkpoint.py {name} {example}"
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=epilog)
        command.add_argument("source", type=Path, metavar="DIR" if name == "verify" else "SRC", help=source)
        if name != "verify":
            command.add_argument("destination", type=Path, metavar="DST", help="new folder")
        for option in options:
            command.add_argument(option, **OPTIONS[option])
    return parser


def prepare(options: argparse.Namespace) -> tuple[str, Callable[[Path], None]]:
    """A summary of what a command will write, and the function that writes it into a folder."""
    if options.command == "tokenizer":
        tokenizer = convert_tokenizer(options.source, options.template)
        return f"tokenizer: {len(tokenizer)} tokens", tokenizer.save_pretrained
    if options.command == "bundle":
        files = bundle_files(options.source)
        return f"bundle: {len(files)} files and the code", lambda folder: write_bundle(files, folder)
    dtype = DTYPES.get(options.dtype)
    if options.command == "export":
        export = plan_export(options.source, dtype)
        return export.summary, lambda folder: write_export(export, folder, options.max_shard_size)
    if options.command == "official":
        conversion = plan_official(options.source, dtype, options.allow_pickle)
    else:
        conversion = plan_from_llm(
            options.source,
            options.vision_size,
            options.template,
            options.system_message,
            options.seed,
            dtype,
            options.allow_pickle,
        )
    return conversion.summary, lambda folder: write_model(conversion, folder, options.max_shard_size)


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
