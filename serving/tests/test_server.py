"""vLLM's OpenAI server with the openai client: right answers under load, and a 400 for each bad request."""

import base64
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from cases import conversations, data_uri, message, picture
from servers import running

CHATS = conversations()
FEW_IMAGES = [name for name in CHATS if "3 pictures" not in name]
CONTEXT = 1024  # tokens


@pytest.fixture(scope="module")
def server(tiny):
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny.folder]
    options = "--served-model-name navil --trust-remote-code --dtype float32 --enforce-eager --block-size 32".split()
    options += ["--max-num-seqs", "16", "--max-model-len", str(CONTEXT), "--trust-request-mm-kwargs"]
    options += ["--limit-mm-per-prompt", '{"image": 2}']
    with running([*module, *options], VLLM_ENABLE_V1_MULTIPROCESSING="1") as client:
        yield client


def ask(server, messages, stream=False, **extra):
    options = {"ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False, **extra}
    return server.chat.completions.create(
        model="navil",
        messages=messages,
        temperature=0,
        max_tokens=8,
        stream=stream,
        logprobs=not stream,
        extra_body=options,
    )


def check(server, tiny, name: str) -> None:
    [choice] = ask(server, CHATS[name]).choices
    expected = tiny.answers[name]
    assert choice.token_ids == expected["ids"], name
    for step, (token_id, entry) in enumerate(zip(choice.token_ids, choice.logprobs.content, strict=True)):
        assert abs(entry.logprob - expected["logprobs"][step, token_id].item()) < 1e-4, (name, step)


def refused(server, messages, fact: str, **extra) -> str:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(server, messages, **extra)
    assert fact in str(raised.value), str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", ["640 x 480", "2000 x 10", "alpha", "large JPEG", "history with a second picture"])
def test_answers(server, tiny, name):
    check(server, tiny, name)


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


def test_bad_requests_are_refused_and_the_server_lives(server, tiny):
    text = base64.b64encode(b"no image").decode()
    cut = data_uri(picture(300, 300, 1))[: len("data:image/png;base64,") + 4 * 400]
    refused(server, [message("?", f"data:image/png;base64,{text}")], "image")
    refused(server, [message("?", cut)], "image")
    refused(server, [message("?", "data:image/png;base64,$$$")], "")
    refused(server, [message("?", data_uri(picture(1, 201, 1)))], "absolute aspect ratio must be smaller than 200")
    refused(server, CHATS[next(name for name in CHATS if "3 pictures" in name)], "At most 2 image(s)")
    for token in ("<img>", "<IMG_CONTEXT>", "<|im_end|>"):
        refused(server, [message(f"a {token} b", picture(50, 50, 1))], "reserved for the model's own use")
        refused(server, [{"role": "user", "content": f"a {token} b"}], "reserved for the model's own use")
    refused(server, [message("an <image> here", picture(50, 50, 1))], "2 <image> placeholders but 1 images were given")
    refused(server, CHATS["64 x 64"], "unknown_setting", mm_processor_kwargs={"unknown_setting": 1})
    refused(server, [{"role": "user", "content": "word " * CONTEXT}], str(CONTEXT))
    check(server, tiny, "640 x 480")


def test_too_long_a_prompt_is_refused_with_a_budget_that_fits(server):
    messages = [message("What differs?", picture(2000, 2000, 5), picture(2000, 1990, 6))]
    error = refused(
        server, messages, f"but the context holds {CONTEXT}", mm_processor_kwargs={"max_pixels": 2048 * 256}
    )
    assert "its 2 images would fit with max_pixels=" in error
    fitting = int(error.split("max_pixels=")[1].split("'")[0].split('"')[0])
    [choice] = ask(server, messages, mm_processor_kwargs={"max_pixels": fitting * 9 // 10}).choices
    assert len(choice.token_ids) == 8


def test_a_client_that_goes_away(server, tiny):
    for _ in range(3):
        stream = ask(server, CHATS["512 x 512"], stream=True)
        next(iter(stream))
        stream.close()
    check(server, tiny, "512 x 512")


def test_32_requests_of_8_clients(server, tiny):
    names = [FEW_IMAGES[index % len(FEW_IMAGES)] for index in range(32)]
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(lambda name: check(server, tiny, name), names))
