"""vLLM gives the package's own ids and logprobs (float32), whatever parts of which prompts a step of it holds."""

import gc

import pytest
from cases import conversations
from engine import GREEDY, ask, start
from navil_vllm.model import DecoderModel
from package import TOLERANCE, answers, check, largest_error, load
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

CHATS = conversations()


@pytest.fixture(scope="module")
def engine(tiny):
    """16 requests at once, with different numbers of images."""
    llm = start(tiny.folder)
    yield llm
    del llm
    gc.collect()


def test_many_requests_at_once(tiny, engine):
    check(tiny.answers, ask(engine, CHATS))


def test_prefix_cache(tiny, engine):
    ask(engine, CHATS)
    answers = ask(engine, CHATS)
    for name, answer in answers.items():
        expected = (len(answer["prompt_ids"]) - 1) // 32 * 32
        assert answer["num_cached"] == expected, (name, answer["num_cached"])
    check(tiny.answers, answers)


def test_prefix_cache_knows_the_settings_of_a_request(tiny, engine):
    chats = {name: CHATS[name] for name in ("640 x 480", "history with a second picture")}
    lower = {"mm_processor_kwargs": {"max_pixels": 64 * 16**2}}
    small, whole, again = ask(engine, chats, **lower), ask(engine, chats), ask(engine, chats, **lower)
    for name in chats:
        assert len(small[name]["prompt_ids"]) < len(whole[name]["prompt_ids"])
        assert again[name]["prompt_ids"] == small[name]["prompt_ids"] and again[name]["ids"] == small[name]["ids"]
        assert largest_error(tiny.answers, {name: whole[name]}) < TOLERANCE, name


@pytest.mark.parametrize("part", ["first visual token", "last visual token", "<img>", "a text token"])
def test_a_mask_with_one_wrong_token_fails(tiny, engine, monkeypatch, part):
    name, forward = "640 x 480", DecoderModel.forward_with_images

    def broken(self, positions, inputs_embeds, is_visual):
        visual = is_visual.nonzero().flatten()
        index = {"first visual token": visual[1], "last visual token": visual[-1], "<img>": visual[0]}.get(part, 3)
        is_visual = is_visual.clone()
        is_visual[index] ^= True
        return forward(self, positions, inputs_embeds, is_visual)

    monkeypatch.setattr(DecoderModel, "forward_with_images", broken)
    engine.reset_prefix_cache()
    assert largest_error(tiny.answers, ask(engine, {name: CHATS[name]})) > TOLERANCE
    monkeypatch.undo()
    engine.reset_prefix_cache()
    assert largest_error(tiny.answers, ask(engine, {name: CHATS[name]})) < TOLERANCE


def test_generated_slot_tokens_are_text(tiny, engine):
    """`<img>` and `<IMG_CONTEXT>` in an answer; logprobs are those without the restriction to them."""
    chats = {name: CHATS[name] for name in ("640 x 480", "history with a second picture", "text: Hello!")}
    model = load(tiny.folder)
    ids = [model.config.image_start_token_id, model.config.image_token_id]
    expected = answers(model, tiny.folder, chats, prefix_allowed_tokens_fn=lambda *_: ids)
    sampling = GREEDY.clone()
    sampling.allowed_token_ids = ids
    for name, answer in ask(engine, chats, sampling).items():
        assert set(answer["ids"]) <= set(ids)
        assert largest_error(expected, {name: answer}) < TOLERANCE, name


def test_structured_outputs(engine):
    """vLLM's grammars work with the tokenizer."""
    choices = ["cat", "dog 12"]
    sampling = SamplingParams(temperature=0, structured_outputs=StructuredOutputsParams(choice=choices))
    outputs = engine.chat([CHATS["640 x 480"], CHATS["text: Hello!"]], sampling, use_tqdm=False)
    assert {output.outputs[0].text for output in outputs} <= set(choices)


@pytest.mark.parametrize("num_tokens", [33, 64])
def test_chunked_prefill(tiny, num_tokens):
    check(tiny.answers, ask(start(tiny.folder, max_num_batched_tokens=num_tokens, max_model_len=4096), CHATS))


def test_window_order(window):
    check(window.answers, ask(start(window.folder, max_model_len=4096), CHATS))
