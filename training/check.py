"""Reads all training data once, as training would, and names every bad record.

    python -m training.check --model . --subfolder tiny --data receipts.json
    python -m training.check --model . --data shards/{00000..00099}.tar --workers 8 --output runs/check

Weights are ignored. It exits with 1 if a record is bad.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from .loader import TrainingLoader, add_data_arguments
from .sources import Source
from .streams import StreamOptions


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check training data for records that cannot be trained on.")
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder or name on the Hub")
    parser.add_argument("--subfolder", default="", metavar="NAME", help="folder of the processor in it, if not itself")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest conversation that is allowed")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read (%(default)s: this one)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the list of bad records")
    add_data_arguments(parser, required=True)
    parser.set_defaults(on_error="skip")
    return parser


def count_tokens(conversations: Sequence[Any]) -> dict[str, int]:
    return {"tokens": sum(len(conversation.input_ids) for conversation in conversations)}


def check(options: argparse.Namespace) -> int:
    """Prints the summary; returns the number of bad records."""
    sources = [replace(Source.parse(words), weight=None) for words in options.data]
    processor = AutoProcessor.from_pretrained(options.model, subfolder=options.subfolder, trust_remote_code=True)
    loader = TrainingLoader(
        sources,
        processor.encode_conversation,
        count_tokens,
        StreamOptions(max_tokens=options.max_tokens, shuffle=False, epochs=1),
        on_error=options.on_error,
        max_errors=options.max_errors,
        folder=options.output,
        num_workers=options.workers,
    )
    lengths = [batch["tokens"] for batch in loader]
    print(f"{len(lengths):,} good records, {sum(lengths):,} tokens, at most {max(lengths, default=0):,} in one")
    print(loader.report())
    return len(loader.bad_records.found)


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        return 1 if check(options) else 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
