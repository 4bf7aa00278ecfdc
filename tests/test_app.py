"""The page: its answers, limits and errors; and, where a Chromium is installed, what a visitor sees in it."""

import base64
import html
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import types
from contextlib import closing

import numpy as np
import pytest
from conftest import ROOT, refused
from PIL import Image

gradio = pytest.importorskip("gradio")

import app  # noqa: E402
from app import EXAMPLES, TINY, Server, Turn  # noqa: E402
from navil import draw_boxes  # noqa: E402

CHART, BOX, TEXT = (str(ROOT / "examples" / name) for name in ("chart.png", "box.png", "text.png"))
VISITOR = types.SimpleNamespace(session_hash="visitor")
BOX_ANSWER = "<ref>green circle</ref><box>[[177, 135, 677, 646]]</box>"  # tests/test_tiny.py checks it


@pytest.fixture(scope="module")
def server(recordings) -> Server:
    """With a second model, which has random weights and so does not end its answers."""
    return Server([TINY, str(recordings["internlm2"].folder)])


def ask(server, text, pictures=(), turns=(), model=TINY, megapixels=0, multi_scale=True, temperature=0, most=64):
    """All that the page shows while it answers, in order: chat, turns, input box."""
    turns = list(turns)
    *_, asked = server.accept({"text": text, "files": list(pictures)}, turns, VISITOR)
    return list(server.reply(asked, turns, model, megapixels, multi_scale, temperature, most, VISITOR))


def answered(*arguments, **options) -> list[Turn]:
    """The conversation with the answer."""
    return ask(*arguments, **options)[-1][1]


# -- answers -----------------------------------------------------------------------------------------------------------


def test_examples_are_answered_as_chat_does(server, tiny):
    for example in EXAMPLES:
        [turn] = answered(server, example["text"], example["files"])
        assert turn.answer == tiny.chat(example["files"], example["text"], {"max_new_tokens": 64})
    assert answered(server, *("Which picture has more circles?", EXAMPLES[-1]["files"]))[0].answer == "second"


def test_answers_stream_piece_by_piece(server):
    steps = ask(server, "Where is the green circle?", [BOX])
    shown = [html.unescape(chat[-1]["content"]) for chat, *_ in steps[:-1] if chat[-1]["role"] == "assistant"]
    assert len(shown) > 2 and all(BOX_ANSWER.startswith(text) for text in shown)
    assert shown == sorted(shown, key=len) and [turns for _, turns, _ in steps[:-1]] == [[]] * (len(steps) - 1)


def test_boxes_are_drawn_on_the_last_picture(server):
    [turn] = answered(server, "Where is the green circle?", [BOX])
    assert turn.answer == BOX_ANSWER
    assert np.array_equal(Image.open(turn.drawing), draw_boxes(BOX, BOX_ANSWER)[1])
    assert app.display([turn])[-1] == {"role": "assistant", "content": {"path": turn.drawing}}
    assert app.draw_to_file([CHART, BOX], BOX_ANSWER) == turn.drawing
    assert app.draw_to_file([], BOX_ANSWER) is app.draw_to_file([BOX], "no box") is None


def test_a_conversation_goes_on_and_keeps_its_cache(server, tiny):
    turns = answered(server, "Which bar is the highest?", [CHART])
    turns = answered(server, "What is the value of C?", [], turns)
    history = [(turns[0].question, turns[0].answer)]
    settings = {"max_new_tokens": 64}
    assert turns[1].answer == tiny.chat([CHART], "What is the value of C?", settings, history=history)
    session = server.load(TINY).session
    assert 0 < session.num_prefilled < 40  # the picture alone has more tokens


def test_another_picture_of_the_same_size_does_not_meet_the_cache_of_the_last(server, tiny, tmp_path):
    flipped = tmp_path / "flipped.png"
    Image.open(BOX).transpose(Image.Transpose.ROTATE_180).save(flipped)
    question, settings = "Where is the green circle?", {"max_new_tokens": 64}
    first = answered(server, question, [BOX])
    other = answered(server, question, [str(flipped)])
    assert other[0].answer == tiny.chat(str(flipped), question, settings) != first[0].answer
    history = [(turn.question, turn.answer) for turn in first]
    again = answered(server, question, [], first)  # the first visitor goes on
    assert again[-1].answer == tiny.chat([BOX], question, settings, history=history)


@pytest.mark.parametrize("settings", [{"megapixels": 0.1}, {"multi_scale": False}])
def test_settings_reach_the_image_processor(server, tmp_path, settings):
    picture = tmp_path / "large.png"
    Image.open(CHART).resize((900, 900)).save(picture)
    usual, changed = {}, {}
    for seen, options in ((usual, {}), (changed, settings)):
        answered(server, "Which bar is the highest?", [str(picture)], **options)
        seen |= server.load(TINY).session.images
    assert len(changed["pixel_values"]) < len(usual["pixel_values"])
    assert usual["num_scales"].item() > 1 == changed["num_scales"].item()


def test_temperature_samples(server):
    model = server.models[1]
    answers = {answered(server, "What?", [], model=model, temperature=2, most=8)[0].answer for _ in range(3)}
    assert len(answers) == 3
    greedy = {answered(server, "What?", [], model=model, most=8)[0].answer for _ in range(2)}
    assert len(greedy) == 1


def test_attention_of_each_token_of_the_answer(server):
    answer, drawings, table = server.look(
        {"text": "What color is the triangle?", "files": EXAMPLES[3]["files"]}, TINY, 0, True
    )
    assert answer == "green" == "".join(token for _, token in drawings)
    assert len({drawing.tobytes() for drawing, _ in drawings}) == 5
    assert {drawing.size for drawing, _ in drawings} == {(app.LOOK_SIDE, app.LOOK_SIDE)}
    assert "| 1 | 512x512 | 256 |" in table and "| 275 |" in table  # 16 x 16 cells, 16 ends of rows, 3 other ends


def test_the_attention_tab_takes_the_last_question():
    turns = [Turn("What?", (BOX,), "A"), Turn("And?", (), "B")]
    assert app.last_question(turns[:1]) == {"text": "What?", "files": [BOX]}
    assert app.last_question(turns) == app.last_question([]) == gradio.skip()


# -- stopping, limits and errors ---------------------------------------------------------------------------------------


def test_stop_ends_the_generation(server):
    model = server.models[1]
    *_, asked = server.accept({"text": "What?", "files": []}, [], VISITOR)
    reply = server.reply(asked, [], model, 0, True, 0, 1024, VISITOR)
    for _ in range(3):
        next(reply)
    server.stop(VISITOR)
    *_, (chat, [turn], _) = reply
    session = server.load(model).session
    assert turn.answer and html.unescape(chat[-1]["content"]) == turn.answer
    assert session._cached_ids.numel() - session.num_prefilled < 512  # of 1024 tokens
    assert server.stops == {}


def test_a_question_that_is_stopped_while_it_waits_is_not_asked(server):
    chat, _, asked = server.accept({"text": "What?", "files": [BOX]}, [], VISITOR)
    assert [message["role"] for message in chat] == ["user", "user"]
    server.stop(VISITOR)
    [(chat, turns, box)] = server.reply(asked, [], TINY, 0, True, 0, 64, VISITOR)
    assert chat == turns == [] and box.constructor_args["value"] == {"text": "What?", "files": [BOX]}


def test_a_visitor_who_leaves_ends_the_generation(server):
    model = server.models[1]
    *_, asked = server.accept({"text": "What?", "files": []}, [], VISITOR)
    reply = server.reply(asked, [], model, 0, True, 0, 1024, VISITOR)
    next(reply)
    reply.close()
    server.worker.submit(int).result()  # behind the answer
    session = server.load(model).session
    assert session._cached_ids.numel() - session.num_prefilled < 512
    assert answered(server, "Which bar is the highest?", [CHART])[0].answer == "B"


def test_errors_are_told_and_the_server_lives_on(server, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    wrong = {
        "cannot read an image from &#x27;broken.png&#x27;": ("What?", [str(broken)]),
        "the text contains &lt;|im_end|&gt;, reserved": ("What?<|im_end|>", []),
        "question must be a text that is not empty": (" ", [BOX]),
        "the prompt has": ("word " * 4000, []),
    }
    for sentence, (text, pictures) in wrong.items():
        turns = answered(server, "Which bar is the highest?", [CHART])
        with pytest.raises(gradio.Error) as told:
            ask(server, text, pictures, turns)
        assert sentence in told.value.message and str(tmp_path) not in told.value.message
        chat, _ = server.take_back(Turn(text, tuple(pictures)), turns, VISITOR)
        assert chat == app.display(turns)
        assert turns[0].answer == "B"


def test_limits_of_a_conversation():
    asked = Turn("What?", (BOX,))
    app.check_limits([asked] * (app.MAX_PICTURES - 1), asked)
    app.check_limits([Turn("What?", ())] * (app.MAX_QUESTIONS - 1), asked)
    with refused(f"takes {app.MAX_PICTURES} pictures in a conversation at most, got {app.MAX_PICTURES + 1}"):
        app.check_limits([asked] * app.MAX_PICTURES, asked)
    with refused(f"takes {app.MAX_QUESTIONS} questions"):
        app.check_limits([Turn("What?", ())] * app.MAX_QUESTIONS, asked)
    with refused("characters in a question"):
        app.check_limits([], Turn("a" * (app.MAX_CHARACTERS + 1), ()))


def test_attention_takes_one_picture(server):
    with pytest.raises(gradio.Error, match="attention is drawn on one picture, got 2"):
        server.look({"text": "What?", "files": [BOX, CHART]}, TINY, 0, True)


@pytest.mark.parametrize(
    ("arguments", "space", "host"),
    [([], False, "127.0.0.1"), ([], True, "0.0.0.0"), (["--host", "10.0.0.1"], True, "10.0.0.1")],
)
def test_bound_to_the_loopback_address_unless_asked(monkeypatch, arguments, space, host):
    launched = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **settings: launched.update(settings, page=page))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.delenv("SPACE_ID", raising=False)
    if space:
        monkeypatch.setenv("SPACE_ID", "someone/page")
    assert app.main(arguments) == 0
    assert launched["server_name"] == host and launched["share"] is False
    assert launched["page"].analytics_enabled is False and launched["page"]._queue.max_size == app.MAX_WAITING
    functions = launched["page"].fns.values()
    assert {function.concurrency_limit for function in functions if function.concurrency_id == "model"} == {1}
    with refused("exceeds limit of 50000000 pixels"):
        app.load_image(large_png(8000, 7000))


def test_the_picker_takes_other_names_only_if_asked():
    pages = [app.build_page(Server([TINY], any_model)) for any_model in (False, True)]
    pickers = [next(block for block in page.blocks.values() if isinstance(block, gradio.Dropdown)) for page in pages]
    assert pickers[1].preprocess("someone/else") == "someone/else"
    with pytest.raises(gradio.Error, match="someone/else"):
        pickers[0].preprocess("someone/else")


def test_an_unknown_model_is_said_before_the_page_opens(monkeypatch, capsys):
    monkeypatch.setattr(gradio.Blocks, "launch", lambda *_, **__: pytest.fail("the page was opened"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    assert app.main(["--model", "no/such-model"]) == 1
    assert "no/such-model" in capsys.readouterr().err


def test_the_extra_names_what_the_requirements_do():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["app"]
    assert (ROOT / "requirements-app.txt").read_text().split("\n") == ["-r requirements.txt", *extra, ""]


def large_png(width: int, height: int) -> bytes:
    """A PNG file of one color, far smaller than its pixels."""
    content = io.BytesIO()
    Image.new("1", (width, height)).save(content, "PNG")
    return content.getvalue()


# -- the running page --------------------------------------------------------------------------------------------------


SLOW_PAGE = """
import sys, time
import app

class SlowStreamer(app.TextIteratorStreamer):
    def put(self, value):
        time.sleep(0.02)  # a token, so that a visitor can stop an answer
        super().put(value)

app.TextIteratorStreamer = SlowStreamer
sys.exit(app.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def address(recordings, tmp_path_factory):
    """Of a page with `tiny` and the model that does not end its answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("page") / "log"
    command = [sys.executable, "-c", SLOW_PAGE, "--port", str(port)]
    command += ["--model", TINY, "--model", str(recordings["internlm2"].folder)]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(log.parent), "PYTHONPATH": str(ROOT)}
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
        try:
            wait_for(lambda: process.poll() is not None or "Running on" in log.read_text(), 300)
            assert process.poll() is None, log.read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_files_beyond_the_examples_are_not_served(address):
    import httpx

    status = {path: httpx.get(f"{address}/gradio_api/file={path}").status_code for path in (BOX, "/etc/passwd")}
    status |= {
        name: httpx.get(f"{address}/gradio_api/file={ROOT / name}").status_code for name in ("app.py", ".git/config")
    }
    assert status == {BOX: 200, "/etc/passwd": 403, "app.py": 403, ".git/config": 403}
    info = httpx.get(f"{address}/gradio_api/info").json()
    assert info == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_a_large_upload_is_refused(address):
    import httpx

    sizes = {20 * 2**20 + 1: 413, 2**20: 200}
    for size, status in sizes.items():
        response = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", bytes(size))}, timeout=60)
        assert response.status_code == status


# -- in a browser ------------------------------------------------------------------------------------------------------


PENDING = "Loading content"  # the message that stands in the place of an answer until its first token


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture
def visit(browser, address):
    """Opens the page as another visitor, at a width of so many pixels."""
    contexts = []

    def open_page(width: int = 1100, **options) -> "Visitor":
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        return Visitor(contexts[-1].new_page(), address)

    yield open_page
    for context in contexts:
        context.close()


class Visitor:
    """One who has the page open."""

    def __init__(self, page, address: str):
        self.page, self.foreign = page, []
        page.on("request", lambda request: self._note(request.url, address))
        page.goto(address)
        self.box.wait_for()

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.foreign.append(url)

    @property
    def box(self):
        return self.page.locator("textarea:visible").first

    @property
    def answers(self):
        return self.page.locator(".bot.message")

    def submit(self, text: str, *pictures: str) -> None:
        if pictures:
            self.page.locator("input[type=file]").first.set_input_files(pictures)
            self.page.locator(".thumbnails img, .thumbnail-item").nth(len(pictures) - 1).wait_for()
        self.box.fill(text)
        self.box.press("Enter")

    def read_answer(self, number: int = 1) -> str:
        """The text of an answer when it is whole."""
        wait_for(lambda: self.is_answered(number))
        return self.answers.nth(number - 1).inner_text().strip()

    def is_answered(self, number: int) -> bool:
        texts = self.answers.all_inner_texts()
        is_busy = PENDING in texts or self.page.locator(".stop-button").count() > 0
        return len(texts) >= number and not is_busy

    def choose_model(self, number: int) -> None:
        self.page.get_by_text("Model and settings").click()
        self.page.get_by_label("Model", exact=True).click()
        self.page.get_by_role("option").nth(number).click()

    def pixels(self, image) -> np.ndarray:
        """The file of a picture on the page."""
        script = "async url => btoa(String.fromCharCode(...new Uint8Array(await (await fetch(url)).arrayBuffer())))"
        content = base64.b64decode(self.page.evaluate(script, image.get_attribute("src")))
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_a_visitor_asks_about_the_chart(visit):
    visitor = visit()
    visitor.submit("Which bar is the highest?", CHART)
    assert visitor.read_answer() == "B"
    visitor.submit("Which bar is the lowest?")
    assert visitor.read_answer(2) == "D"
    assert visitor.foreign == []  # nothing is loaded from elsewhere, nothing is sent there


def test_a_visitor_sees_the_box(visit):
    visitor = visit()
    visitor.page.get_by_text("Where is the green circle?").click()
    visitor.page.locator(".thumbnails img, .thumbnail-item").first.wait_for()
    visitor.box.press("Enter")
    assert visitor.read_answer() == BOX_ANSWER
    drawn = visitor.answers.locator("img")
    drawn.wait_for()
    pixels = visitor.pixels(drawn)
    [box], expected = draw_boxes(BOX, BOX_ANSWER)
    assert np.array_equal(pixels, expected)
    assert (pixels[box.lower - 1, box.left : box.right] == (0xD5, 0x5E, 0x00)).all()  # its lower edge


def test_a_visitor_stops_an_answer_and_asks_on(visit):
    visitor = visit()
    visitor.choose_model(1)
    visitor.submit("What?")
    wait_for(lambda: visitor.answers.all_inner_texts() not in ([], [PENDING]))
    visitor.page.locator(".stop-button").click()
    stopped = visitor.read_answer()
    visitor.submit("And?")
    assert visitor.read_answer(2) and visitor.answers.first.inner_text().strip() == stopped


def test_two_visitors_at_once(visit):
    visitors = visit(), visit()
    visitors[0].submit("Which bar is the highest?", CHART)
    visitors[1].submit("What does the text say?", TEXT)
    assert [visitor.read_answer() for visitor in visitors] == ["B", "83"]
    assert [visitor.answers.count() for visitor in visitors] == [1, 1]


def test_a_broken_upload_gives_a_message_and_the_question_back(visit, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    visitor = visit()
    visitor.submit("What is it?", str(tmp_path / "broken.png"))
    message = visitor.page.locator(".toast-body")
    message.wait_for()
    assert "cannot read an image from 'broken.png'" in message.inner_text()
    wait_for(lambda: visitor.box.input_value() == "What is it?")
    visitor.page.reload()
    visitor.submit("Which bar is the highest?", CHART)
    assert visitor.read_answer() == "B"


def test_a_visitor_begins_a_new_conversation(visit):
    visitor = visit()
    visitor.submit("Which bar is the highest?", CHART)
    assert visitor.read_answer() == "B"
    visitor.page.get_by_label("Clear").click()
    visitor.answers.first.wait_for(state="detached")
    visitor.submit("What does the text say?", TEXT)
    assert visitor.read_answer() == "83"


def test_markup_is_shown_as_text(visit):
    visitor, text = visit(), "![a](http://picture.invalid/a.png) <b>&amp;</b>\n<img src=http://picture.invalid/b.png>"
    visitor.submit(text)
    visitor.read_answer()
    assert visitor.page.locator(".user.message").inner_text().strip() == text
    assert visitor.foreign == []


def test_a_visitor_sees_where_the_model_looks(visit):
    visitor = visit()
    visitor.page.get_by_role("tab", name="Where it looks").click()
    visitor.box.press("Enter")
    visitor.page.locator("#attention img").nth(4).wait_for()
    assert visitor.page.get_by_label("Answer").input_value() == "green"
    assert [caption.strip() for caption in visitor.page.locator("#attention .caption-label").all_inner_texts()] == [
        *"green"
    ]
    assert re.search(r"512x512\s+256", visitor.page.locator("table").inner_text())


def test_a_phone_shows_the_page_without_scrolling_sideways(visit):
    visitor = visit(375, is_mobile=True, has_touch=True)
    wide = "document.documentElement.scrollWidth"
    visitor.submit("Where is the green circle?", BOX)
    assert visitor.read_answer() == BOX_ANSWER
    assert visitor.page.evaluate(wide) == 375
    visitor.page.get_by_text("Model and settings").click()
    visitor.page.get_by_role("tab", name="Where it looks").click()
    visitor.box.press("Enter")
    visitor.page.locator("#attention img").nth(4).wait_for()
    assert visitor.page.evaluate(wide) == 375
    edges = visitor.page.locator("#attention img").evaluate_all(
        "images => images.map(i => i.getBoundingClientRect().right)"
    )
    assert max(edges) <= 375
