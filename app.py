"""A page to chat with NaViL about pictures and to see its boxes and where it looks. A Hugging Face Space starts it.

python app.py                                              # the embedded tiny/, at http://127.0.0.1:7860
python app.py --model weights/navil-2b --model weights/navil-9b
"""

import argparse
import html
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import gradio as gr
import torch
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation import BaseStreamer

from demo import EMBEDDED, ERRORS, best_device
from examples.attention_maps import compute_maps, draw_token
from navil import draw_boxes
from navil.image_processing_navil import ImagePlan, count_slot_tokens, load_image

TINY = "tiny"  # the embedded model's name in the picker
PICTURES = Path(__file__).resolve().parent / "examples"
EXAMPLES = [
    {"text": text, "files": [str(PICTURES / name) for name in names]}
    for text, *names in (
        ("Which bar is the highest?", "chart.png"),
        ("Where is the green circle?", "box.png"),
        ("What is the total?", "receipt.png"),
        ("What color is the triangle?", "shapes.png"),
        ("What does the text say?", "text.png"),
        ("Which picture has more circles?", "shapes.png", "box.png"),
    )
]

PICTURE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]
MAX_FILE_SIZE = "20mb"  # of an upload
MAX_DECODED_PIXELS = 50_000_000  # of a picture
MAX_QUESTIONS, MAX_PICTURES = 20, 8  # of a conversation
MAX_CHARACTERS = 20_000  # of a question
MAX_WAITING = 16  # requests in the queue
DELETION = 3600, 86_400  # seconds: each hour, uploads and drawings that are a day old
LOOK_PIXELS, LOOK_TOKENS = 768 * 768, 64  # of the picture and of the answer whose attention is drawn
LOOK_SIDE = 384  # of a drawing, in pixels
EMPTY_ANSWER = "(the model gave an empty answer)"
STYLE = """
#attention .grid-container { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)) }
.message-buttons [aria-label=Share] { display: none }
"""

Settings = dict[str, Any]


class Turn(NamedTuple):
    """A question about pictures, which are files, and its answer."""

    text: str  # as typed
    pictures: tuple[str, ...]
    answer: str | None = None
    question: str = ""  # with `<image>`, as the session keeps it
    drawing: str | None = None  # the file of the picture with the answer's boxes


class Assistant:
    """A loaded model, with the session of the conversation that it answered last. For one thread at a time."""

    def __init__(self, name: str):
        source = EMBEDDED if name == TINY else {"pretrained_model_name_or_path": name}
        device, dtype = best_device()
        self.processor = AutoProcessor.from_pretrained(**source, trust_remote_code=True)
        self.model = AutoModel.from_pretrained(**source, torch_dtype=dtype, trust_remote_code=True).eval().to(device)
        self.image_processor = self.model.image_processor
        self.session, self.answered = None, None

    def ask(
        self,
        turns: list[Turn],
        asked: Turn,
        pixels: Settings,
        generation: Settings,
        streamer: BaseStreamer | None = None,
    ) -> Turn:
        """Answers the next question; the last answer's key/value cache is used if the conversation is the same."""
        known = pictures_of(turns)
        plans = self.plan([*known, *asked.pictures], pixels)
        if self.answered != (turns, pixels):
            self.session = self.model.chat_session(self.processor.tokenizer)
            self.session.history = [(turn.question, turn.answer) for turn in turns]
            self.session.images = self.pack(plans[: len(known)])
        self.answered = None
        self.session.generation_config = generation
        answer = self.session.ask(asked.text, self.pack(plans[len(known) :]) or None, streamer)
        drawing = draw_to_file([*known, *asked.pictures], answer)
        turn = asked._replace(answer=answer, question=self.session.history[-1][0], drawing=drawing)
        self.answered = ([*turns, turn], pixels)
        return turn

    def look(self, asked: Turn, pixels: Settings) -> tuple[str, list[tuple[Image.Image, str]], str]:
        """The answer, the picture under the attention of each answer token, and a table of the picture's scales."""
        budget = min(pixels["max_pixels"] or math.inf, self.image_processor.max_pixels, LOOK_PIXELS)
        pixels = pixels | {"max_pixels": budget}
        [image] = map(load_image, asked.pictures)
        maps = compute_maps(self.model, self.processor, image, asked.text, LOOK_TOKENS, **pixels)
        image = ImageOps.contain(image, (LOOK_SIDE, LOOK_SIDE))
        drawings = [(draw_token(maps, index, image), token) for index, token in enumerate(maps.answer)]
        return "".join(maps.answer).strip(), drawings, scales_table(*self.plan(asked.pictures, pixels), maps.cell)

    def plan(self, pictures: Sequence[str], pixels: Settings) -> list[ImagePlan]:
        """The scales of pictures; a ValueError if these alone exceed the context."""
        plans = self.image_processor.plan(pictures, **pixels) if pictures else []
        num_tokens = sum(count_slot_tokens(plan.scales, self.image_processor.cell) for plan in plans)
        self.model.check_context(num_tokens, plans)
        return plans

    def pack(self, plans: list[ImagePlan]) -> dict[str, torch.Tensor]:
        device = self.model.device
        return dict(self.image_processor.pack(plans, "pt", device).to(device)) if plans else {}


def pictures_of(turns: list[Turn]) -> list[str]:
    return [picture for turn in turns for picture in turn.pictures]


def draw_to_file(pictures: Sequence[str], answer: str) -> str | None:
    """The last picture with the answer's boxes, in a file that the page may show; None without boxes."""
    boxes, drawing = draw_boxes(pictures[-1], answer) if pictures else ([], None)
    return save_pil_to_cache(drawing, get_upload_folder(), name="boxes", format="png") if boxes else None


def scales_table(plan: ImagePlan, cell: int) -> str:
    """Markdown: size and visual tokens of each scale of a picture, and the picture's tokens in the prompt."""
    rows = [
        f"| {index} | {width}x{height} | {math.ceil(height / cell) * math.ceil(width / cell)} |"
        for index, (height, width) in enumerate(plan.scales, 1)
    ]
    total = f"| in the prompt, with the ends of rows and scales | | {count_slot_tokens(plan.scales, cell)} |"
    return "\n".join(["| scale | size | tokens |", "|---|---|---|", *rows, total])


def display(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as messages of Gradio's chat, which shows HTML unless it is escaped."""
    messages = []
    for turn in turns:
        asked = [*({"path": picture} for picture in turn.pictures), html.escape(turn.text, quote=False)]
        said = [] if turn.answer is None else [html.escape(turn.answer or EMPTY_ANSWER, quote=False)]
        said += [{"path": turn.drawing}] if turn.drawing else []
        messages += [{"role": "user", "content": content} for content in asked]
        messages += [{"role": "assistant", "content": content} for content in said]
    return messages


def input_box(is_waiting: bool = False, **value: Settings | None) -> gr.MultimodalTextbox:
    """The input box, if given with another `value`; while the visitor waits for an answer, with a button to stop it."""
    return gr.MultimodalTextbox(submit_btn=not is_waiting, stop_btn=is_waiting, **value)


def last_question(turns: list[Turn]) -> Settings:
    """The conversation's last question, if it had a picture, for the input box of the attention."""
    [*_, last] = turns or [Turn("", ())]
    return as_message(last) if last.pictures else gr.skip()


def as_message(asked: Turn) -> Settings:
    """A question in the form of the input box's value."""
    return {"text": asked.text, "files": list(asked.pictures)}


@contextmanager
def told_to_the_visitor(pictures: Sequence[str] = ()) -> Iterator[None]:
    """Shows the sentence of an error on the page, with the names of the pictures instead of their paths."""
    try:
        yield
    except ERRORS as error:
        sentence = str(error)
        for picture in pictures:
            sentence = sentence.replace(picture, Path(picture).name)
        raise gr.Error(html.escape(sentence), print_exception=False) from error


def check_limits(turns: list[Turn], asked: Turn) -> None:
    """Raises a ValueError if a conversation has become too long."""
    counts = {
        "questions in a conversation": (len(turns) + 1, MAX_QUESTIONS),
        "pictures in a conversation": (len(pictures_of([*turns, asked])), MAX_PICTURES),
        "characters in a question": (len(asked.text), MAX_CHARACTERS),
    }
    for name, (count, limit) in counts.items():
        if count > limit:
            raise ValueError(f"this page takes {limit} {name} at most, got {count}")


class Server:
    """What the page's events call. All visitors share one worker thread: one model answers one question at a time.

    Args:
        models: folders or names on the Hub, or `TINY`, for the picker.
        any_model: whether visitors may name others, whose code then runs here.
    """

    def __init__(self, models: Sequence[str] = (TINY,), any_model: bool = False):
        self.models, self.any_model = list(models), any_model
        self.load = lru_cache(len(models) + any_model)(Assistant)
        self.worker = ThreadPoolExecutor(1)
        self.stops: dict[str | None, Event] = {}  # of the visitors who wait for an answer

    def accept(self, message: Settings, turns: list[Turn], request: gr.Request) -> tuple[Any, ...]:
        """Shows a question before it waits in the queue: chat, input box, question."""
        asked = Turn(message["text"], tuple(message["files"]))
        with told_to_the_visitor():
            check_limits(turns, asked)
        self.stops[request.session_hash] = Event()
        return display([*turns, asked]), input_box(is_waiting=True, value=None), asked

    def reply(
        self,
        asked: Turn,
        turns: list[Turn],
        model: str,
        megapixels: float,
        multi_scale: bool,
        temperature: float,
        max_new_tokens: int,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Streams the answer: chat, turns, input box."""
        stop = self.stops.setdefault(request.session_hash, Event())
        generation = {"max_new_tokens": int(max_new_tokens), "do_sample": temperature > 0}
        generation |= {"temperature": float(temperature)} if temperature > 0 else {}
        generation["stopping_criteria"] = StoppingCriteriaList([lambda *_, **__: stop.is_set()])
        try:
            if stop.is_set():  # while the question waited
                yield display(turns), turns, input_box(value=as_message(asked))
                return
            with told_to_the_visitor([*pictures_of(turns), *asked.pictures]):
                assistant = self.worker.submit(self.load, model).result()
                streamer = TextIteratorStreamer(
                    assistant.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
                )
                settings = (pixel_settings(megapixels, multi_scale), generation)
                running = self.worker.submit(assistant.ask, turns, asked, *settings, streamer)
                running.add_done_callback(lambda _: streamer.end())  # after an error too
                answer = ""
                for piece in streamer:
                    answer += piece
                    yield display([*turns, asked._replace(answer=answer or None)]), turns, gr.skip()
                turns = [*turns, running.result()]
            yield display(turns), turns, input_box()
        finally:
            self.leave(request)  # also if the visitor has closed the page

    def look(self, message: Settings, model: str, megapixels: float, multi_scale: bool) -> tuple[Any, ...]:
        """As `Assistant.look`."""
        asked = Turn(message["text"], tuple(message["files"]))
        with told_to_the_visitor(asked.pictures):
            check_limits([], asked)
            if len(asked.pictures) != 1:
                raise ValueError(f"attention is drawn on one picture, got {len(asked.pictures)}")
            assistant = self.worker.submit(self.load, model).result()
            return self.worker.submit(assistant.look, asked, pixel_settings(megapixels, multi_scale)).result()

    def stop(self, request: gr.Request) -> None:
        """Ends the visitor's answer after its next token."""
        if stop := self.stops.get(request.session_hash):
            stop.set()

    def leave(self, request: gr.Request) -> None:
        """Ends the visitor's answer, if there is one, and forgets it."""
        self.stop(request)
        self.stops.pop(request.session_hash, None)

    def take_back(self, asked: Turn, turns: list[Turn], request: gr.Request) -> tuple[Any, ...]:
        """After an error, puts the question back into its input box: chat, input box."""
        self.leave(request)
        return display(turns), input_box(value=as_message(asked))

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """Ends the conversation: turns, input box."""
        self.leave(request)
        return [], input_box()


def pixel_settings(megapixels: float, multi_scale: bool) -> Settings:
    """Settings of `NaViLImageProcessor.plan`; 0 megapixels leaves the model's own budget."""
    return {"max_pixels": round(megapixels * 1e6) or None, "multi_scale": multi_scale}


def build_page(server: Server) -> gr.Blocks:
    """The page. Events that run a model have the same `concurrency_id`, so they share one queue."""
    on_model = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
    at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    box = {"file_types": PICTURE_TYPES, "max_plain_text_length": MAX_CHARACTERS, "show_label": False}
    gr.set_static_paths([picture for example in EXAMPLES for picture in example["files"]])
    with gr.Blocks(title="NaViL", analytics_enabled=False, delete_cache=DELETION) as page:
        turns, asked = gr.State([]), gr.State()
        gr.Markdown(
            "# NaViL\nA native multimodal LLM ([paper](https://arxiv.org/abs/2510.08565)): it answers questions about "
            f"pictures. The model `{TINY}` knows only drawn pictures like the examples."
        )
        with gr.Tab("Chat"):
            chat = gr.Chatbot(
                examples=deepcopy(EXAMPLES), render_markdown=False, height="65dvh", show_label=False, buttons=[]
            )
            question = gr.MultimodalTextbox(file_count="multiple", placeholder="Ask about pictures", **box)
        with gr.Tab("Where it looks") as attention:
            looked = gr.MultimodalTextbox(EXAMPLES[3], placeholder="Ask about one picture", **box)
            gr.Markdown(
                "Below: what each token of the answer looked at, from black for nothing to yellow for the most."
            )
            answer = gr.Textbox(label="Answer", interactive=False)
            gallery = gr.Gallery(show_label=False, elem_id="attention", format="png", buttons=["fullscreen"])
            scales = gr.Markdown()
        with gr.Accordion("Model and settings", open=False):
            model = gr.Dropdown(server.models, label="Model", allow_custom_value=server.any_model)
            megapixels = gr.Slider(
                0, 6.3, 0, step=0.1, label="Millions of pixels of a picture, at most (0: the model's own limit)"
            )
            multi_scale = gr.Checkbox(True, label="Read pictures at several scales")
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: always the most probable token)")
            max_new_tokens = gr.Slider(1, 1024, 256, step=1, label="Tokens of an answer, at most")

        settings = [model, megapixels, multi_scale, temperature, max_new_tokens]
        streaming = on_model | {"show_progress": "minimal", "show_progress_on": chat}
        accepted = question.submit(server.accept, [question, turns], [chat, question, asked], **at_once)
        replied = accepted.success(server.reply, [asked, turns, *settings], [chat, turns, question], **streaming)
        replied.failure(server.take_back, [asked, turns], [chat, question], **at_once)
        question.stop(server.stop, **at_once)
        chat.clear(server.clear, None, [turns, question], cancels=[replied], **at_once)
        chat.example_select(pick_example, None, question, **at_once)
        page.unload(server.leave)
        attention.select(last_question, turns, looked, **at_once)
        looked.submit(server.look, [looked, *settings[:3]], [answer, gallery, scales], **on_model)
    return page


def pick_example(event: gr.SelectData) -> Settings:
    """The example at which the visitor pointed, for the input box."""
    return EXAMPLES[event.index]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        action="append",
        metavar="DIR",
        help="model folder or name on the Hub; repeat for several, each of which stays in memory (default: tiny)",
    )
    parser.add_argument(
        "--any-model",
        action="store_true",
        help="visitors may name any folder or model on the Hub, whose code then runs on this machine: only where "
        "every visitor may run programs",
    )
    parser.add_argument("--host", metavar="ADDRESS", help="default: 127.0.0.1, or 0.0.0.0 in a Space")
    parser.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    Image.MAX_IMAGE_PIXELS = MAX_DECODED_PIXELS // 2  # Pillow warns at this number and refuses at twice as many
    server = Server(options.model or [TINY], options.any_model)
    try:
        server.load(server.models[0])
    except ERRORS as error:
        print(f"error: cannot load {server.models[0]!r}: {error}", file=sys.stderr)
        return 1
    try:
        build_page(server).queue(max_size=MAX_WAITING).launch(
            server_name=options.host or ("0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"),
            server_port=options.port,
            max_file_size=MAX_FILE_SIZE,
            share=False,
            ssr_mode=False,
            footer_links=[],
            css=STYLE,
        )
    except OSError as error:
        print(f"error: {error} (--host, --port)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
