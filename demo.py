"""Chats about pictures from the command line, streaming the answer.

python demo.py --image examples/chart.png --question "Which bar is the highest?"
python demo.py --model weights/navil-2b --image examples/cat.jpg --question "What is in this picture?"
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, TextStreamer

EMBEDDED = {"pretrained_model_name_or_path": Path(__file__).resolve().parent, "subfolder": "tiny"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Ask NaViL a question about pictures, or about none.",
        epilog='example: python demo.py --model DIR --image a.jpg --image b.png --question "What differs?"',
    )
    parser.add_argument("--model", metavar="DIR", help="model folder or name on the Hub (default: the embedded tiny/)")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="picture; repeat for several")
    parser.add_argument("--question", required=True, metavar="TEXT", help="may place the pictures by <image>")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    return parser


def best_device() -> tuple[str, torch.dtype]:
    """A GPU in bf16, Apple's or NVIDIA's, or else the CPU in float32."""
    if torch.backends.mps.is_available():
        return "mps", torch.bfloat16
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    source = {"pretrained_model_name_or_path": options.model} if options.model else EMBEDDED
    device, dtype = best_device()
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=True)
        model = AutoModel.from_pretrained(**source, torch_dtype=dtype, trust_remote_code=True)
        model.eval().to(device)
        answer = model.chat(
            tokenizer,
            options.image or None,
            options.question,
            generation_config={"max_new_tokens": options.max_new_tokens},
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not answer.strip():
        print("(the model gave an empty answer)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
