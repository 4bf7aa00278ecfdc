"""What a chat session saves: prefilled tokens and time, compared with `chat` and the same history.

python -m benchmarks.chat_session                                   # the checkpoint in tiny/
python -m benchmarks.chat_session --model weights/navil-2b --turns 4 --dtype bfloat16
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from navil import ROOT

from .roofline import device_name, elapsed
from .workloads import EXAMPLE_PHOTO

QUESTION = "What is in this picture, part {turn}?"
COLUMNS = ("chat tokens", "session tokens", "chat seconds", "session seconds")


def timed(call: Callable[[], str], device: torch.device) -> tuple[float, str]:
    results: list[str] = []
    return elapsed(lambda: results.append(call()), device), results[0]


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image: Path, turns: int, max_new_tokens: int
) -> list[dict[str, float]]:
    """One conversation about an image, each turn by `chat` and by a session; one row per turn."""
    settings = {"max_new_tokens": max_new_tokens}
    session = model.chat_session(tokenizer, settings)
    prefilled: list[int] = []
    hook = model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: prefilled.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    rows = []
    for turn in range(1, turns + 1):
        question, history = QUESTION.format(turn=turn), list(session.history)
        prefilled.clear()
        chat_seconds, expected = timed(
            lambda q=question, h=history: model.chat(tokenizer, image, q, settings, history=h), model.device
        )
        chat_tokens = prefilled[0]
        new_image = image if turn == 1 else None
        session_seconds, answer = timed(lambda q=question, i=new_image: session.ask(q, i), model.device)
        values = (chat_tokens, session.num_prefilled, chat_seconds, session_seconds)
        rows.append(dict(zip(COLUMNS, values, strict=True)) | {"equal": answer == expected})
    hook.remove()
    return rows


HEADER = """turn   tokens prefilled        seconds        speedup  equal answers
         chat  session     chat  session"""


def as_table_row(name: str, row: dict[str, float], equal: str) -> str:
    speedup = row["chat seconds"] / row["session seconds"]
    return (
        f"{name:>4} {row['chat tokens']:8} {row['session tokens']:8} "
        f"{row['chat seconds']:8.3f} {row['session seconds']:8.3f} {speedup:7.2f}  {equal}"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare a chat session with `chat` and the same history.",
        epilog="example: python -m benchmarks.chat_session --turns 2 --repeats 1",
    )
    parser.add_argument("--model", metavar="DIR", help="model folder or name on the Hub (default: tiny/)")
    parser.add_argument("--image", type=Path, default=EXAMPLE_PHOTO, metavar="FILE", help="(%(default)s)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=8, metavar="N", help="per answer (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="the fastest is printed (%(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    source = options.model or ROOT
    settings = {"trust_remote_code": True} | ({} if options.model else {"subfolder": "tiny"})
    tokenizer = AutoTokenizer.from_pretrained(source, **settings)
    model = AutoModel.from_pretrained(source, torch_dtype=getattr(torch, options.dtype), **settings).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    conversations = [
        measure(model, tokenizer, options.image, options.turns, options.max_new_tokens)
        for _ in range(options.repeats + 1)
    ][1:]  # the first one warms up

    print(f"{device_name(model.device)}, {options.dtype}, best of {options.repeats}\n\n{HEADER}")
    totals = dict.fromkeys(COLUMNS, 0)
    for turn, rows in enumerate(zip(*conversations, strict=True), start=1):
        best = {name: min(row[name] for row in rows) for name in COLUMNS}
        totals = {name: totals[name] + best[name] for name in COLUMNS}
        print(as_table_row(str(turn), best, str(all(row["equal"] for row in rows))))
    print(as_table_row("all", totals, ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
