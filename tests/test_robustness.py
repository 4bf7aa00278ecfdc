"""Half precision, many chats, many threads and interruptions."""

import copy
import gc
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, conversation, recorded_image, relative_error
from transformers import TextStreamer

# -- numbers -----------------------------------------------------------------------------------------------------------
HALF_PRECISION_ERROR = {torch.bfloat16: 0.04, torch.float16: 0.004}
"""Of the largest recorded float32 logit. Largest seen: 0.026 and 0.0025."""


@pytest.fixture(scope="module")
def in_half_precision(recordings):
    kinds = [(name, dtype) for name in BACKBONES for dtype in HALF_PRECISION_ERROR]
    return {(name, dtype): copy.deepcopy(recordings[name].model).to(dtype) for name, dtype in kinds}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", HALF_PRECISION_ERROR, ids=str)
@pytest.mark.parametrize("name", BACKBONES)
def test_half_precision_agrees_with_float32(recordings, in_half_precision, name, dtype, attention, monkeypatch):
    model = in_half_precision[name, dtype]
    for config in (model.config.text_config, model.config.vision_config):
        monkeypatch.setattr(config, "_attn_implementation_internal", attention)
    for case in recordings[name].cases:
        with torch.no_grad():
            outputs = model(**recordings[name].inputs(case), output_hidden_states=True)
        assert all(torch.isfinite(hidden).all() for hidden in outputs.hidden_states)
        assert outputs.logits.dtype == dtype and torch.isfinite(outputs.logits).all()
        expected = recordings[name].tensors(case)["logits"]
        assert relative_error(outputs.logits, expected) < HALF_PRECISION_ERROR[dtype]
        assert 0 < relative_error(outputs.logits, expected)  # it did run in half precision


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", HALF_PRECISION_ERROR, ids=str)
def test_padding_stays_finite_in_half_precision(in_half_precision, dtype, attention, monkeypatch):
    """A padded position sees no key at all: its scores must not become a softmax over nothing."""
    model = in_half_precision["qwen3", dtype]
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", attention)
    ids, mask = torch.randint(20, 100, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[0, :25] = 0
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[:1, 25:]).logits
    assert torch.isfinite(padded).all()
    assert relative_error(padded[:1, 25:], alone) < HALF_PRECISION_ERROR[dtype]


# -- load --------------------------------------------------------------------------------------------------------------
def questions(recording, max_new_tokens=4):
    """Chats of every kind, each as a call without arguments."""
    images, short = [recorded_image(90, 60, 0), recorded_image(60, 90, 1)], {"max_new_tokens": max_new_tokens}
    return [
        partial(recording.chat, None, "Hello?", short),
        partial(recording.chat, images[0], "What is it?", short),
        partial(recording.chat, images, "What differs?", short),
        partial(recording.chat, images[1], "And now?", short, history=[("<image>\nWhat?", "That.")]),
        partial(recording.chat, images[1], "Beams?", {**short, "num_beams": 2}),
    ]


def resident_memory() -> int:
    """MiB in use; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20 if status.exists() else 0


def test_200_chats_give_the_same_answers_and_leave_nothing_behind(recordings):
    model = recordings["qwen3"].model
    asked = questions(recordings["qwen3"], max_new_tokens=2)
    expected = [ask() for ask in asked]
    for ask in asked:  # fills caches of Python and torch
        ask()
    config, attributes = model.config.to_dict(), set(vars(model))
    gc.collect()
    tensors, objects, memory = sum(map(torch.is_tensor, gc.get_objects())), len(gc.get_objects()), resident_memory()
    for turn in range(200):
        assert asked[turn % len(asked)]() == expected[turn % len(asked)]
    gc.collect()
    assert sum(map(torch.is_tensor, gc.get_objects())) <= tensors
    assert len(gc.get_objects()) - objects < 200  # not one object per chat
    assert resident_memory() - memory < 32
    assert model.config.to_dict() == config and set(vars(model)) == attributes


def in_threads(count: int, work) -> None:
    """Runs work(0), work(1), ... at once and raises the first error."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


@pytest.mark.parametrize("name", BACKBONES)
def test_8_threads_share_one_model(recordings, name, monkeypatch):
    asked = questions(recordings[name])
    expected = [ask() for ask in asked]
    for token in ("image_token_id", "image_start_token_id"):  # the first chat sets them, in whichever thread
        monkeypatch.setattr(recordings[name].model.config, token, None)

    def work(index: int) -> None:
        for turn in range(index, index + 5):
            assert asked[turn % len(asked)]() == expected[turn % len(asked)]

    in_threads(8, work)


def test_threads_have_their_own_static_caches(recordings):
    chat, asked = recordings["qwen3"].chat, ["Hello?", "What is the time?", "Where?", "How many are there?"]
    expected = [chat(None, question) for question in asked]

    def work(index: int) -> None:
        for _ in range(3):
            settings = {"max_new_tokens": 6, "cache_implementation": "static"}
            assert chat(None, asked[index], settings) == expected[index]

    in_threads(4, work)


def test_8_threads_share_one_processor(recordings):
    """The Rust tokenizer said "Already borrowed" when one thread set the padding while another encoded or decoded."""
    processor, tokenizer = recordings["qwen3"].processor, recordings["qwen3"].processor.tokenizer
    prompts = [["a b c", "a" * length] for length in range(1, 60)]
    expected = [processor(text=pair, padding=True)["input_ids"] for pair in prompts]
    ids = processor(text="hello " * 60)["input_ids"][0]
    text, tokens = processor.decode(ids), tokenizer.tokenize("hello")

    def work(index: int) -> None:
        for pair, padded in zip(prompts, expected, strict=True):
            if index % 2:
                assert processor(text=pair, padding=True)["input_ids"] == padded
                assert tokenizer.tokenize("hello") == tokens and tokenizer.encode("hello " * 60) == ids
                if hasattr(tokenizer, "batch_encode_plus"):  # transformers 4
                    assert tokenizer.batch_encode_plus(["hello " * 60, "a"])["input_ids"][0] == ids
            else:
                assert processor(text="hello " * 60)["input_ids"][0] == ids
                assert processor.decode(ids) == text

    in_threads(8, work)


def ends_in_time(child: int, seconds: float) -> bool:
    """Waits for a forked process and kills it if it takes longer."""
    deadline = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.01)
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_process_forks_while_a_thread_prepares_prompts(recordings, monkeypatch):
    """As `DataLoader` workers do. They found the locks of Rust taken by a thread that they do not have."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    processor, done = recordings["qwen3"].processor, threading.Event()
    chat = conversation("a b " * 500, recorded_image(90, 60, 0))

    def work() -> None:
        while not done.is_set():
            processor(text=["some text " * 500, "a"], padding=True)
            processor.apply_chat_template(chat, tokenize=True)

    def forked_process_ends_in_time() -> bool:
        time.sleep(0.01)
        child = os.fork()
        if child == 0:
            processor.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True)
            os._exit(0)
        return ends_in_time(child, seconds=10)

    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(work) for _ in range(2)]
        try:
            assert all([forked_process_ends_in_time() for _ in range(10)])
        finally:
            done.set()
        assert [future.result() for future in busy] == [None, None]


# -- interruptions -----------------------------------------------------------------------------------------------------
class Interrupted(BaseException):
    """As a KeyboardInterrupt, which pytest would take for its own."""


class BreaksAfter(TextStreamer):
    def __init__(self, tokenizer, tokens: int):
        super().__init__(tokenizer)
        self.left = tokens

    def put(self, value):
        if self.left == 0:
            raise Interrupted
        self.left -= 1


@pytest.mark.parametrize("place", ["prompt", "token", "layer"])
def test_an_exception_in_the_middle_leaves_the_model_usable(recording, place):
    image, attributes = recorded_image(90, 60, 0), set(vars(recording.model))
    expected = recording.chat(image)

    def interrupt(*args):
        raise Interrupted

    hook, options = None, {}
    if place == "layer":
        hook = recording.model.get_decoder().layers[-1].register_forward_pre_hook(interrupt)
    else:
        options["streamer"] = BreaksAfter(recording.tokenizer, tokens=0 if place == "prompt" else 3)
    with pytest.raises(Interrupted):
        recording.chat(image, **options)
    if hook:
        hook.remove()
    assert torch.is_grad_enabled() and set(vars(recording.model)) == attributes
    assert recording.chat(image) == expected
