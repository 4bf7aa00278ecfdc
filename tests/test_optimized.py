"""`optimize_for_inference`: the same answers, on compiled parts and static caches."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

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
        # transformers 5.24 has renamed it.
        lengths.append((getattr(cache, "get_max_cache_shape", None) or cache.get_max_length)())
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


# -- flash-attn-4 ------------------------------------------------------------------------------------------------------


@pytest.fixture
def flash_attention_4(monkeypatch):
    """A stand-in for the package, whose functions return more results than torch unpacks; none is left registered."""
    interface = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd = lambda *args, **kwargs: ("output", "logsumexp", "more", "and more")
    interface._flash_attn_bwd = lambda *args, **kwargs: ("dq", "dk", "dv", "more")
    for name in ("flash_attn", "flash_attn.cute"):
        package = ModuleType(name)
        package.__spec__, package.__path__ = ModuleSpec(name, None, is_package=True), []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    modeling.flash_attention_4_obstacle.cache_clear()
    yield interface
    modeling.flash_attention_4_obstacle.cache_clear()
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
    sys.modules.pop("navil_flash_attention_4", None)


def test_flash_attention_4_gives_torch_as_many_results_as_it_unpacks(flash_attention_4):
    modeling.register_flash_attention_4()
    assert torch.nn.attention.current_flash_attention_impl() == "navil_flash_attention_4"
    adapter = sys.modules["navil_flash_attention_4"]
    assert adapter._flash_attn_fwd() == ("output", "logsumexp") and adapter._flash_attn_bwd() == ("dq", "dk", "dv")


def test_a_flash_attention_4_that_does_not_fit_is_refused_with_a_sentence(flash_attention_4, monkeypatch, caplog):
    """Here the trial on the GPU fails, as there is none."""
    monkeypatch.setattr(modeling.logger, "propagate", True)
    obstacle = modeling.flash_attention_4_obstacle()
    assert obstacle.startswith(f"the installed flash-attn-4 does not fit torch {torch.__version__}")
    assert "attention runs on torch's kernels" in caplog.text
    assert torch.nn.attention.current_flash_attention_impl() is None
    with pytest.raises(ValueError, match="flash-attn or flash-attn-4: the installed flash-attn-4 does not fit"):
        modeling.NaViLForConditionalGeneration.from_pretrained("tiny", use_flash_attn=True)


@pytest.mark.parametrize(
    ("capability", "installed", "message"),
    [((8, 0), True, "needs a Hopper or Blackwell GPU"), ((9, 0), False, "is not installed")],
)
def test_flash_attention_4_stays_off_elsewhere(flash_attention_4, monkeypatch, capability, installed, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    if not installed:
        monkeypatch.setattr(modeling, "find_spec", lambda name: None)
    assert message in modeling.flash_attention_4_obstacle()
    assert torch.nn.attention.current_flash_attention_impl() is None


# -- flash decoding ----------------------------------------------------------------------------------------------------


def test_flash_decoding_equals_attention_by_its_definition():
    """For grouped heads, rows with padding, and a cache with empty places."""
    module = SimpleNamespace(num_key_value_groups=3, training=False, flash_decoding=True)
    query, (key, value) = torch.randn(2, 6, 1, 16), torch.randn(2, 2, 2, 40, 16)
    mask = modeling.additive_mask(torch.rand(2, 1, 1, 40) < 0.7, torch.float32)
    arguments = {"scaling": 0.25, "dropout": 0.0}
    decode = torch.compile(modeling.decoder_attention_one_query, fullgraph=True)
    for one_mask in (mask, mask[:1], None):
        expected, _ = modeling.decoder_attention_eager(module, query, key, value, one_mask, **arguments)
        with torch.no_grad():
            assert relative_error(decode(module, query, key, value, one_mask, **arguments)[0], expected) < 1e-5
