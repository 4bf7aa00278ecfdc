"""`optimize_for_inference`: the same answers, on compiled parts and static caches."""

import pytest
import torch
from conftest import recorded_image, relative_error
from test_modeling import build, image_inputs, prompt
from transformers import DynamicCache, StaticCache

from navil import modeling_navil as modeling


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes, which then run without being optimized."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_with = torch.compile
    torch._dynamo.reset()
    modeling.compiled.cache_clear()
    monkeypatch.setattr(
        torch, "compile", lambda function, **settings: compile_with(function, backend=count, **settings)
    )
    yield graphs
    modeling.compiled.cache_clear()


@torch.no_grad()
def test_decoder_layers_of_all_sizes_share_graphs_without_breaks(graphs):
    """Two graphs. With text alone, two others, and again two for the first layer, whose input is a view."""
    model = build({"num_hidden_layers": 4})
    images = [image_inputs((4, 6), (4, 4)), image_inputs((8, 10)), {}, {}]
    batches = list(zip([prompt(6, 4), prompt(20), prompt(text=9), prompt(text=15)], images, strict=True))
    expected = [model(ids, **images).logits for ids, images in batches]
    model.optimize_for_inference()
    graphs.clear()  # of the test whether torch can compile
    numbers = []
    for (ids, images), logits in zip(batches, expected, strict=True):
        assert relative_error(model(ids, **images).logits, logits) < 1e-5
        numbers.append(len(graphs))
    assert numbers == [2, 2, 6, 6]


def test_a_device_without_a_compiler_leaves_the_model_as_it_is(monkeypatch, caplog):
    def fail(*args, **settings):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    model = build()
    monkeypatch.setattr(modeling.logger, "propagate", True)
    assert model.optimize_for_inference() is model and not model.language_model.layers[0].is_compiled
    assert "RuntimeError: no compiler" in caplog.text


@pytest.fixture
def decodes_statically(recording, monkeypatch):
    """The recorded model as after `optimize_for_inference` on a GPU, here without compiling the decoding step."""
    monkeypatch.setattr(type(recording.model), "decoding_settings", {"disable_compile": True})
    return recording


def test_static_caches_double(decodes_statically):
    model, settings = decodes_statically.model, {"return_dict_in_generate": True, "do_sample": False}
    lengths = []
    for num_new in (5, 30, 600, 700, 5):
        ids = torch.tensor([[300, 301, 302]])
        output = model.generate(ids, max_new_tokens=num_new, min_new_tokens=num_new, **settings)
        cache = output.get("cache", output.get("past_key_values"))
        assert isinstance(cache, StaticCache)
        lengths.append(cache.get_max_cache_shape())
    assert lengths == [512, 512, 1024, 1024, 1024]


@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"cache_implementation": "dynamic"}, {"use_cache": False}, {"past_key_values": None}]
)
def test_calls_that_rule_out_a_static_cache_keep_theirs(decodes_statically, settings):
    model, ids = decodes_statically.model, torch.tensor([[300, 301, 302]])
    if "past_key_values" in settings:
        settings = {modeling.CACHE: DynamicCache()}
    fixed = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(ids, **fixed, **settings)
    assert not isinstance(output.get("cache", output.get("past_key_values")), StaticCache)


@pytest.mark.parametrize("num_new", [1, 12])
def test_chat_and_sessions_give_the_same_answers_on_static_caches(decodes_statically, monkeypatch, num_new):
    """A static cache is kept while all its tokens begin the next prompt, as after answers of one token, not cached."""
    model, tokenizer = decodes_statically.model, decodes_statically.tokenizer
    image, settings = recorded_image(64, 48, 1), {"max_new_tokens": num_new}
    questions = ["What is it?", "Why?"]

    def answers(cache_class: type) -> tuple[list[str], int]:
        session = model.chat_session(tokenizer, settings)
        turns = [session.ask(question, image if question == questions[0] else None) for question in questions]
        assert isinstance(session._cache, cache_class)
        return turns, session.num_prefilled

    static = answers(StaticCache)
    assert model.chat(tokenizer, image, questions[0], settings) == static[0][0]
    monkeypatch.setattr(type(model), "decoding_settings", None)
    dynamic = answers(DynamicCache)
    assert static[0] == dynamic[0] and (num_new > 1 or static[1] == dynamic[1])
