"""Measures what a chat session saves: tokens that are prefilled, and time, against `chat` with the same history.

python benchmarks/chat_session.py                                       # the checkpoint in tiny/, on this machine
python benchmarks/chat_session.py --model weights/navil-2b --turns 4 --dtype bfloat16
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "What is in this picture, part {turn}?"


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure(model: Any, tokenizer: Any, image: Path, turns: int, max_new_tokens: int) -> list[dict[str, float]]:
    """One conversation about a picture, every turn by `chat` and by a session; a row per turn."""
    settings = {"max_new_tokens": max_new_tokens}
    session = model.chat_session(tokenizer, settings)
    prefilled = []
    hook = model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: prefilled.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    rows = []
    for turn in range(1, turns + 1):
        question, history = QUESTION.format(turn=turn), list(session.history)
        prefilled.clear()
        chat_seconds, expected = timed(
            lambda q=question, h=history: model.chat(tokenizer, image, q, settings, history=h)
        )
        chat_tokens = prefilled[0]
        new_image = image if turn == 1 else None
        session_seconds, answer = timed(lambda q=question, i=new_image: session.ask(q, i))
        rows.append(
            {
                "chat tokens": chat_tokens,
                "session tokens": session.num_prefilled,
                "chat seconds": chat_seconds,
                "session seconds": session_seconds,
                "equal": answer == expected,
            }
        )
    hook.remove()
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="model folder or name on the Hub (default: tiny/ of this one)")
    parser.add_argument("--image", type=Path, default=ROOT / "examples" / "cat.jpg", metavar="FILE")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=8, metavar="N", help="an answer's (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="the fastest counts (%(default)s)")
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

    print(f"{model.device}, {options.dtype}, {torch.get_num_threads()} threads, best of {options.repeats}")
    print("turn   tokens prefilled        seconds          equal\n         chat  session     chat  session  ratio")
    totals = dict.fromkeys(("chat tokens", "session tokens", "chat seconds", "session seconds"), 0.0)
    for turn, rows in enumerate(zip(*conversations, strict=True), start=1):
        best = {name: min(row[name] for row in rows) for name in totals}
        totals = {name: totals[name] + best[name] for name in totals}
        print_row(str(turn), best, str(all(row["equal"] for row in rows)))
    print_row("all", totals, "")
    return 0


def print_row(name: str, row: dict[str, float], equal: str) -> None:
    ratio = row["chat seconds"] / row["session seconds"]
    print(
        f"{name:>4} {row['chat tokens']:8.0f} {row['session tokens']:8.0f} "
        f"{row['chat seconds']:8.3f} {row['session seconds']:8.3f} {ratio:6.2f}  {equal}"
    )


if __name__ == "__main__":
    sys.exit(main())
