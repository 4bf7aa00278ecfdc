"""NaViL in VLMEvalKit (`ms-vlmeval`): its wrapper, and a command line that runs the kit with it.

    python -m navil_evaluation.vlmevalkit --model-path weights/navil-2b --data ChartQA_TEST OCRBench --work-dir runs/kit

Everything but the options below is the kit's own: `--data`, `--work-dir`, `--mode`, `--judge`, `--limit`, ...
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from . import NaViLAnswers, make_torchvision_importable


class NaViLMessages:
    """What VLMEvalKit asks of a model; `wrapper_class` joins it with the kit's base class."""

    INTERLEAVE = True

    def __init__(self, model_path: str, plain_prompt: bool = False, **settings: Any):
        super().__init__()
        self.answers = NaViLAnswers(model_path, **settings)
        self.plain_prompt = plain_prompt

    def use_custom_prompt(self, dataset: str) -> bool:
        return self.plain_prompt

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        """The question as it stands, without the kit's request for a single word."""
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*images, {"type": "text", "value": line["question"]}]

    def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
        """Answers a message, a list of `{"type": "image" | "text", "value": path or text}`."""
        return self.answers.answer([(part["type"], part["value"]) for part in message])


def wrapper_class() -> type:
    """The model class for VLMEvalKit."""
    from vlmeval.vlm.base import BaseModel

    return type("NaViL", (NaViLMessages, BaseModel), {"INTERLEAVE": True})


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run VLMEvalKit on NaViL. Other options go to the kit as they are.",
        epilog="example: python -m navil_evaluation.vlmevalkit --model-path weights/navil-2b --data ChartQA_TEST",
        allow_abbrev=False,
    )
    parser.add_argument("--model-path", required=True, metavar="DIR", help="model folder or name on the Hub")
    parser.add_argument("--subfolder", default="", metavar="NAME", help="of the model, where its weights are")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="default: %(default)s")
    parser.add_argument("--plain-prompt", action="store_true", help="ask the questions without the kit's additions")
    parser.add_argument(
        "--own-data",
        action="store_true",
        help="take the TSV files under $LMUData for what they are, though their checksums are not the benchmarks'",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options, kit_arguments = build_parser().parse_known_args(arguments)
    make_torchvision_importable()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the kit forks to score, which tokenizers warns about
    from vlmeval.config import supported_VLM
    from vlmeval.dataset import DATASET_CLASSES
    from vlmeval.run import main as run_kit

    logging.getLogger("vlmeval.api.gpt").addFilter(lambda record: "API Key" not in record.getMessage())
    if options.own_data:
        for kind in DATASET_CLASSES:
            kind.DATASET_MD5 = {}
    supported_VLM["NaViL"] = partial(
        wrapper_class(),
        options.model_path,
        options.plain_prompt,
        subfolder=options.subfolder,
        max_new_tokens=options.max_new_tokens,
    )
    sys.argv = ["vlmeval", "--model", "NaViL", *kit_arguments]
    run_kit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
