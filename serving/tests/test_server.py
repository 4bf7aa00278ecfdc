"""vLLM's OpenAI server with the openai client: right answers under load, and nothing that a client sends stops it."""

import base64
import io
import json
import random
import re
import shlex
import struct
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import openai
import pytest
import requests
from cases import conversations, data_uri, message, picture
from conftest import ROOT
from servers import Server, running, wait_until

CHATS = conversations()
FEW_IMAGES = [name for name in CHATS if "3 pictures" not in name]
CONTEXT = 1024  # tokens
SLOW = 3  # seconds, more than the server waits for an image
DOCUMENT = (ROOT / "docs" / "serving.md").read_text()
PICTURE = picture(100, 80, 1)
EPS = "data:image/eps;base64," + base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """The documented command, with a small context and small caches; torch compiles the decoder."""
    [line] = re.findall(
        r"^python (-m vllm.entrypoints.openai.api_server --model weights/tiny .*) --port", DOCUMENT, re.M
    )
    command = [sys.executable, *shlex.split(line.replace("weights/tiny", str(tiny.folder)))]
    options = ["--dtype", "float32", "--block-size", "32", "--max-num-seqs", "16"]
    options += ["--max-model-len", str(CONTEXT), "--trust-request-mm-kwargs", "--mm-processor-cache-gb", "0.02"]
    options += ["--num-gpu-blocks-override", "600", "--allowed-media-domains", "127.0.0.1"]
    options += ["--limit-mm-per-prompt", '{"image": 2}']
    environment = {
        "TORCH_COMPILE_DISABLE": "0",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm")),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_IMAGE_FETCH_TIMEOUT": "1",
        "VLLM_MEDIA_FETCH_MAX_RETRIES": "1",
        "VLLM_MAX_IMAGE_PIXELS": "150000000",
    }
    with running([*command, *options], **environment) as server:
        yield server


class ImageHost(BaseHTTPRequestHandler):
    files = {
        "/picture.png": base64.b64decode(data_uri(PICTURE).split(",")[1]),
        "/page.html": b"<html>no image</html>",
        "/empty.png": b"",
    }

    def do_GET(self):
        if self.path == "/slow.png":
            time.sleep(SLOW)
            self.path = "/picture.png"
        if self.path not in self.files:
            self.send_error(int(self.path[1:]) if self.path[1:].isdigit() else 404)
            return
        self.send_response(200)
        self.end_headers()
        with suppress(BrokenPipeError):  # the server waits no longer
            self.wfile.write(self.files[self.path])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def host():
    """The address of a server of images."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), ImageHost)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(server: Server, messages, stream=False, max_tokens=8, **extra):
    options = {"ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False, **extra}
    return server.client.chat.completions.create(
        model="navil",
        messages=messages,
        temperature=0,
        max_tokens=max_tokens,
        stream=stream,
        logprobs=not stream,
        extra_body=options,
    )


def check(server: Server, tiny, name: str) -> None:
    [choice] = ask(server, CHATS[name]).choices
    expected = tiny.answers[name]
    assert choice.token_ids == expected["ids"], name
    for step, (token_id, entry) in enumerate(zip(choice.token_ids, choice.logprobs.content, strict=True)):
        assert abs(entry.logprob - expected["logprobs"][step, token_id].item()) < 1e-4, (name, step)


def refused(server: Server, messages, fact: str, status: int = 400, **extra) -> str:
    with pytest.raises(openai.APIStatusError) as raised:
        ask(server, messages, **extra)
    assert raised.value.status_code == status and fact in str(raised.value), str(raised.value)
    return str(raised.value)


def post(server: Server, body: dict | bytes) -> requests.Response:
    """A chat request that the openai client would not send."""
    data = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    return requests.post(f"{server.url}/v1/chat/completions", data, headers=headers, timeout=120)


def request(messages=None, **settings) -> dict:
    messages = [message("?", PICTURE)] if messages is None else messages
    return {"model": "navil", "messages": messages, "temperature": 0, "max_tokens": 4, **settings}


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["640 x 480", "2000 x 10", "alpha", "large JPEG", "history with a second picture"])
def test_answers(server, tiny, name):
    check(server, tiny, name)


def test_documented_client(server, monkeypatch):
    [script] = [block for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.S) if "OpenAI(" in block]
    assert "http://localhost:8000" in script
    monkeypatch.chdir(ROOT)
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(script.replace("http://localhost:8000", server.url), "docs/serving.md", "exec"), {})
    assert printed.getvalue().strip() == script.split("# ")[-1].strip()


def test_streaming(server):
    messages = CHATS["640 x 480"]
    chunks = [chunk.choices[0].delta.content for chunk in ask(server, messages, stream=True) if chunk.choices]
    whole = ask(server, messages).choices[0].message.content
    assert "".join(filter(None, chunks)) == whole and len(list(filter(None, chunks))) > 1


def test_stop_string(server):
    whole = ask(server, CHATS["224 x 224"]).choices[0].message.content
    stop = whole[3:5]
    [choice] = ask(server, CHATS["224 x 224"], stop=[stop]).choices
    assert choice.message.content == whole[: whole.index(stop)] and choice.finish_reason == "stop"


# -- images ------------------------------------------------------------------------------------------------------------


def test_image_urls(server, host):
    [by_url] = ask(server, [message("What is it?", f"{host}/picture.png")]).choices
    [by_data] = ask(server, [message("What is it?", PICTURE)]).choices
    assert by_url.token_ids == by_data.token_ids


@pytest.mark.parametrize(
    ("path", "status", "fact"),
    [
        ("/404", 422, "404"),
        ("/500", 422, "500"),
        ("/slow.png", 422, "cannot fetch an image from http://127.0.0.1"),
        ("/page.html", 400, "cannot read an image from 21 bytes"),
        ("/empty.png", 400, "cannot read an image from 0 bytes"),
    ],
)
def test_image_urls_that_fail(server, host, path, status, fact):
    refused(server, [message("?", host + path)], fact, status)


@pytest.mark.parametrize(
    ("url", "status", "fact"),
    [
        ("http://localhost/picture.png", 400, "allowed domains"),
        ("http://127.0.0.1:1/picture.png", 422, "Cannot connect to host 127.0.0.1:1"),
        ("file:///etc/hostname", 422, "Cannot load local files"),
        ("ftp://127.0.0.1/picture.png", 400, "must be either a HTTP, data or file URL"),
        ("data:image/png,abc", 422, "Only base64 data URLs"),
        ("data:image/png;base64,$$$", 400, "Non-base64 digit"),
        ("data:image/png;base64," + base64.b64encode(b"no image").decode(), 400, "cannot read an image from 8 bytes"),
        (data_uri(picture(300, 300, 1))[: len("data:image/png;base64,") + 4 * 400], 400, "image file is truncated"),
        (data_uri(picture(1, 201, 1)), 400, "absolute aspect ratio must be smaller than 200"),
        (EPS, 400, "EPS images are not served"),
    ],
)
def test_wrong_images(server, url, status, fact):
    refused(server, [message("?", url)], fact, status)


def png(width: int, height: int) -> str:
    """A file that claims a size, as a data URI."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return "data:image/png;base64," + base64.b64encode(file).decode()


def test_images_that_claim_to_be_large(server):
    for size in ((20_000, 20_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)):
        refused(server, [message("?", png(*size))], "decompression bomb")
    refused(server, [message("?", png(13_000, 13_000))], "an image has 13000 x 13000 pixels, more than 150000000")
    refused(server, [message("?", png(12_000, 12_000))], "image file is truncated")


def test_too_many_images(server):
    refused(server, CHATS[next(name for name in CHATS if "3 pictures" in name)], "At most 2 image(s)")


def test_too_long_a_prompt_is_refused_with_a_budget_that_fits(server):
    messages = [message("What differs?", picture(2000, 2000, 5), picture(2000, 1990, 6))]
    error = refused(
        server, messages, f"but the context holds {CONTEXT}", mm_processor_kwargs={"max_pixels": 2048 * 256}
    )
    assert "its 2 images would fit with max_pixels=" in error
    fitting = int(error.split("max_pixels=")[1].split("'")[0].split('"')[0])
    [choice] = ask(server, messages, mm_processor_kwargs={"max_pixels": fitting * 9 // 10}).choices
    assert len(choice.token_ids) == 8


# -- hostile requests --------------------------------------------------------------------------------------------------

TEXT = {"role": "user", "content": "Hello!"}
BAD_REQUESTS = [
    *[([message(f"a {token} b", PICTURE)], "reserved for the model's own use") for token in ("<img>", "<IMG_CONTEXT>")],
    *[([TEXT | {"content": f"a {token} b"}], "reserved for the model's own use") for token in ("<img>", "<|im_end|>")],
    ([message("an <image> here", PICTURE)], "2 <image> placeholders but 1 images were given"),
    ([TEXT | {"content": "word " * CONTEXT}], str(CONTEXT)),
    ([], "expected a list with at least one message"),
    ([TEXT | {"role": "alien"}], "role must be one of"),
    ([TEXT | {"content": None}], "content"),
    ([TEXT | {"content": 5}], "content"),
    ([TEXT | {"content": [{"type": "smell", "smell": "x"}]}], "type"),
    ([TEXT | {"content": [{"type": "image_url", "image_url": None}]}], "image_url"),
    ([TEXT | {"content": [{"type": "image_url", "image_url": {"url": 5}}]}], "image_url"),
    ([TEXT | {"content": [{"type": "image_url", "image_url": None, "uuid": "never sent"}]}], "Cache miss"),
    ([TEXT | {"content": [{"type": "image_embeds", "image_embeds": "AAAA"}]}], "image_embeds"),
    ([TEXT | {"content": [{"type": "video_url", "video_url": {"url": png(8, 8)}}]}], "At most 0 video(s)"),
    ([TEXT | {"content": "\ud800"}], "surrogates not allowed"),
]
BAD_SETTINGS = [
    *[{"max_tokens": value} for value in (-1, 10**9, 10**30, "x")],
    *[{"logit_bias": value} for value in ({"999999999": 1}, {"-1": 1}, {"x": 1}, {"5": None})],
    *[{"allowed_token_ids": value} for value in ([], [-1], [10**9])],
    *[{"stop_token_ids": value} for value in ([-1], [10**9], [2**70])],
    *[{"temperature": value} for value in (-1, 1e308, "x", [])],
    *[{name: -7} for name in ("n", "top_p", "top_k", "min_p", "min_tokens", "repetition_penalty", "presence_penalty")],
    *[{"stop": value} for value in ("", [None], ["a"] * 5000)],
    {"n": 10**9},
    {"seed": 2**70},
    {"prompt_logprobs": 10**9},
    {"truncate_prompt_tokens": 3},
    {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
    {"chat_template_kwargs": {"messages": []}},
    {"structured_outputs": {"regex": "("}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
    {"media_io_kwargs": {"image": 5}},
]
BAD_IMAGE_SETTINGS = [
    ({"max_pixels": -1}, "need 0 < min_pixels <= max_pixels, got -1 and -1"),
    ({"max_pixels": "x"}, "could not convert string to float"),
    ({"min_pixels": 10**9, "max_pixels": 10**12}, f"but the context holds {CONTEXT}"),
    ({"min_pixels": 10**12}, f"but the context holds {CONTEXT}"),
    ({"scale_downsample_ratio": 1}, "scale_downsample_ratio must lie between 0 and 1, got 1.0"),
    ({"unknown_setting": 1}, "the image processor has no setting unknown_setting=1"),
    ({"images": []}, "images"),
]
BAD_BODIES = [
    b'{"model": "navil", ',
    b"\xff\xfe",
    b"[]",
    b"null",
    b"",
    b"[" * 100_000,
    b'{"messages":' + b"9" * 5000 + b"}",
]


def test_bad_requests(server, tiny):
    for messages, fact in BAD_REQUESTS:
        response = post(server, request(messages))
        assert response.status_code == 400 and fact in response.text, (messages, response.text)
    for settings in BAD_SETTINGS:
        response = post(server, request(**settings))
        assert response.status_code == 400, (settings, response.text)
    for settings, fact in BAD_IMAGE_SETTINGS:
        response = post(server, request(mm_processor_kwargs=settings))
        assert response.status_code == 400 and fact in response.text, (settings, response.text)
    for body in BAD_BODIES:
        response = post(server, body)
        assert response.status_code == 400, (body[:50], response.text)
    check(server, tiny, "640 x 480")


JUNK = [None, True, -1, 0, 1, 2**31, 2**63, 1e308, "", "x", "<image>", "<img>", "\0", [], [None], {}, {"x": 1}]


def mutate(value, choose: random.Random):
    """Replaces, removes or adds one value anywhere in a tree of JSON."""
    if choose.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return choose.choice(JUNK)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, rest = choose.choice(keys), value.copy()
    if choose.random() < 0.1:
        del rest[key]
    else:
        rest[key] = mutate(value[key], choose)
    return rest


def test_mutated_requests(server, tiny):
    settings = {
        "top_p": 0.5,
        "seed": 1,
        "stop": ["a"],
        "logit_bias": {"5": 1},
        "min_tokens": 1,
        "n": 1,
        "stream": False,
    }
    settings |= {"mm_processor_kwargs": {"max_pixels": 4096}, "chat_template_kwargs": {"system_message": "x"}}
    base = request([TEXT, {"role": "assistant", "content": "a"}, message("?", PICTURE)], **settings)
    choose = random.Random(0)
    bodies = [mutate(base, choose) for _ in range(150)]
    with ThreadPoolExecutor(8) as clients:
        responses = list(clients.map(lambda body: post(server, json.dumps(body).encode()), bodies))
    failed = [(body, reply.text) for body, reply in zip(bodies, responses, strict=True) if reply.status_code >= 500]
    assert failed == []
    assert {200, 400} <= {reply.status_code for reply in responses}
    check(server, tiny, "640 x 480")


# -- load --------------------------------------------------------------------------------------------------------------


def num_running(server: Server) -> float:
    return server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")


def test_clients_that_go_away(server, tiny, host):
    """Their requests end before any of them has its tokens."""
    generated, long = server.metric("vllm:generation_tokens_total"), {"max_tokens": CONTEXT // 2, "ignore_eos": True}
    for _ in range(3):
        stream = ask(server, CHATS["224 x 224"], stream=True, **long)
        next(iter(stream))
        stream.close()
    for messages in (CHATS["text: Hello!"], [message("?", f"{host}/slow.png")]):
        with pytest.raises(requests.Timeout):
            requests.post(f"{server.url}/v1/chat/completions", json=request(messages, **long), timeout=0.7)
    wait_until(lambda: num_running(server) == 0, 30, "requests without a client still run")
    assert 0 < server.metric("vllm:generation_tokens_total") - generated < long["max_tokens"]
    check(server, tiny, "512 x 512")


def test_200_requests_of_16_clients(server, tiny):
    """Right answers to 47 conversations, and no memory kept: the bound is less than the patches of 100 requests."""

    def answer(number: int) -> None:
        names = [FEW_IMAGES[index % len(FEW_IMAGES)] for index in range(number)]
        with ThreadPoolExecutor(16) as clients:
            list(clients.map(lambda name: check(server, tiny, name), names))

    answer(100)  # fills caches, starts threads
    before = server.memory()
    answer(100)
    assert server.memory() - before < 100
