"""Chats about pictures in the terminal, streaming the answers.

python demo.py --image examples/chart.png --question "Which bar is the highest?"
python demo.py --image examples/chart.png              # a conversation; /help lists its commands
python demo.py --model weights/navil-2b --image examples/cat.jpg --question "What is in this picture?"
"""

import argparse
import json
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, StoppingCriteria, TextStreamer

from navil.image_processing_navil import NaViLImageProcessor

try:
    import readline  # noqa: F401  `input` then has a history and the arrow keys
except ImportError:  # Windows
    pass

EMBEDDED = {"pretrained_model_name_or_path": Path(__file__).resolve().parent, "subfolder": "tiny"}
ERRORS = (ValueError, OSError, torch.OutOfMemoryError)
HELP = """\
/image FILE ...  add pictures to the next question; without FILE, remove those added
/clear           begin a new conversation
/save FILE       write the conversation to a new file, as a record for examples/finetune.py --data
/help            this list
/quit            leave; so do Ctrl-D and two Ctrl-C in a row
Ctrl-C stops an answer. <image> in a question says where a picture goes; without it, pictures go first."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Ask NaViL about pictures, or about none: one question, or a conversation.",
        epilog='example: python demo.py --model DIR --image a.jpg --image b.png --question "What differs?"',
    )
    parser.add_argument("--model", metavar="DIR", help="model folder or name on the Hub (default: the embedded tiny/)")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="picture; repeat for several")
    parser.add_argument(
        "--question", metavar="TEXT", help="may place the pictures by <image>; without it, a conversation begins"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="of an answer; default: %(default)s"
    )
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="of a picture's largest scale; default: the model's"
    )
    return parser


def best_device() -> tuple[str, torch.dtype]:
    """A GPU in bf16, Apple's or NVIDIA's, or else the CPU in float32."""
    if torch.backends.mps.is_available():
        return "mps", torch.bfloat16
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def expand(name: str) -> Path:
    """The path with `~` as the home directory; a ValueError if there is none."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name!r}: {error}") from None


def check_picture(name: str) -> str:
    """The path of a picture's file, of which only the header is read; a ValueError says what else it is."""
    if re.match(r"[a-z][a-z0-9+.-]+://|data:", name, re.IGNORECASE):
        raise ValueError(f"{name[:200]!r} is a URL: download the picture and give its file")
    path = expand(name)
    if path.is_dir():
        raise ValueError(f"{name!r} is a folder: give the files of its pictures")
    if not path.is_file():
        raise ValueError(f"there is no file {name!r}")
    with path.open("rb") as file:
        if file.read(5) == b"%PDF-":
            raise ValueError(f"{name!r} is a PDF: give its pages as pictures, for example from pdftoppm -png")
    NaViLImageProcessor().plan(path)
    return str(path)


class StopOnInterrupt(StoppingCriteria):
    """While entered, a Ctrl-C ends the answer behind its current token; another one raises KeyboardInterrupt."""

    is_pressed = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.is_pressed, device=input_ids.device)

    def __enter__(self) -> "StopOnInterrupt":
        self.is_pressed = False
        self._handler = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._handler)

    def _press(self, *_: Any) -> None:
        if self.is_pressed:
            raise KeyboardInterrupt
        self.is_pressed = True


class Conversation:
    """A conversation by lines: questions and the commands of `HELP`.

    Args:
        model, tokenizer, max_new_tokens: answer the questions.
        images: files of the pictures of the first question.
        options: of `chat`.
    """

    def __init__(self, model: Any, tokenizer: Any, images: Sequence[str], max_new_tokens: int, **options: Any):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.stop = StopOnInterrupt()
        self.settings = {"max_new_tokens": max_new_tokens, "stopping_criteria": [self.stop]}
        self.clear()
        self.added = list(images)

    def clear(self) -> None:
        self.session = self.model.chat_session(self.tokenizer, self.settings, **self.options)
        self.images: list[str] = []  # of the session's questions
        self.added: list[str] = []  # for the next question

    def run(self) -> None:
        """Reads and answers lines until the user leaves. An error is one sentence."""
        is_interrupted = False  # by a Ctrl-C since the last line
        while True:
            try:
                line = input(self.prompt()).strip()
                is_interrupted = False
                if line == "/quit":
                    return
                is_interrupted = self.handle(line)
            except ERRORS as error:
                print(f"error: {error}", file=sys.stderr)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if is_interrupted:
                    return
                print("\n(Ctrl-C again or /quit leaves)")
                is_interrupted = True

    def prompt(self) -> str:
        if not sys.stdin.isatty():
            return ""
        return f"({len(self.added)} picture{'s' * (len(self.added) > 1)}) > " if self.added else "> "

    def handle(self, line: str) -> bool:
        """Carries out a line. Returns whether a Ctrl-C stopped its answer."""
        if line.startswith("/"):
            self.command(*shlex.split(line))
            return False
        return bool(line) and self.ask(line)

    def command(self, name: str, *files: str) -> None:
        if name == "/image":
            self.added = [*self.added, *map(check_picture, files)] if files else []
        elif name == "/save":
            if len(files) != 1:
                raise ValueError(f"/save takes one file, got {len(files)}")
            self.save(expand(files[0]))
        elif name == "/clear":
            self.clear()
        elif name == "/help":
            print(HELP)
        else:
            raise ValueError(f"no such command: {' '.join([name, *files])}; /help lists the commands")

    def ask(self, question: str) -> bool:
        """Streams the answer, or the part of it before a Ctrl-C. Returns whether there was one."""
        with self.stop:
            answer = self.session.ask(question, self.added, text_streamer(self.tokenizer))
            self.images, self.added = self.images + self.added, []
        if self.stop.is_pressed:
            print("(stopped)")
        else:
            say_if_empty(answer)
        return self.stop.is_pressed

    def save(self, path: Path) -> None:
        """Writes the conversation as one line of JSON, as `apply_chat_template` and `--data` take it."""
        if not self.session.history:
            raise ValueError("there is no answer to save yet")
        if path.exists():
            raise ValueError(f"there is a file {str(path)!r} already: give another name")
        messages, images = [], iter(self.images)
        for question, answer in self.session.history:
            first, *others = re.split(r"<image>\n?", question)
            parts = [{"type": "text", "text": first}]
            for text in others:
                image = {"type": "image", "path": str(Path(next(images)).resolve())}
                parts += [image, {"type": "text", "text": text}]
            parts = [part for part in parts if part.get("text") != ""]
            messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        print(f"wrote {path}")


def text_streamer(tokenizer: Any) -> TextStreamer:
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def say_if_empty(answer: str) -> None:
    if not answer.strip():
        print("(the model gave an empty answer)", file=sys.stderr)


def run(options: argparse.Namespace) -> None:
    images = [check_picture(name) for name in options.image]
    source = {"pretrained_model_name_or_path": options.model} if options.model else EMBEDDED
    device, dtype = best_device()
    tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=True)
    model = AutoModel.from_pretrained(**source, torch_dtype=dtype, trust_remote_code=True)
    model.eval().to(device)
    limits = {"max_pixels": options.max_pixels}
    if options.question is None:
        print(f"{options.model or 'tiny/'} on {device}. /help lists the commands, Ctrl-C stops an answer.")
        Conversation(model, tokenizer, images, options.max_new_tokens, **limits).run()
        return
    settings, streamer = {"max_new_tokens": options.max_new_tokens}, text_streamer(tokenizer)
    say_if_empty(model.chat(tokenizer, images or None, options.question, settings, streamer=streamer, **limits))


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        run(options)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
