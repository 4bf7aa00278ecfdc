"""`transformers serve` answers the openai client as the package does."""

import sys
from pathlib import Path

import pytest
from cases import conversations
from servers import running
from transformers import AutoTokenizer

CHATS = conversations()
NAMES = ["text: Hello!", "640 x 480", "64 x 64", "alpha", "3 pictures [(32, 32), (32, 32), (32, 32)]"]
NAMES += [name for name in CHATS if "history" in name]


@pytest.fixture(scope="module")
def server(tiny):
    command = [Path(sys.executable).with_name("transformers"), "serve", tiny.folder, "--trust-remote-code"]
    with running([*command, "--device", "cpu", "--dtype", "float32"]) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
def test_answers(server, tiny, stream):
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder, trust_remote_code=True)
    for name in NAMES:
        ids = tiny.answers[name]["ids"]
        ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        options = {"model": str(tiny.folder), "messages": CHATS[name], "max_tokens": 8, "stream": stream}
        result = server.client.chat.completions.create(**options, temperature=0)
        if stream:
            answer = "".join(chunk.choices[0].delta.content or "" for chunk in result if chunk.choices)
        else:
            answer = result.choices[0].message.content
        assert answer == tokenizer.decode(ids, skip_special_tokens=True), name
