"""The package as a model repository: loading, saving, training and PEFT under every supported transformers version.

`tests/compat.sh` runs this file under each version. transformers 5 can load a model without an error but with wrong
contents (weights initialized again, empty buffers, a tokenizer rebuilt from its vocabulary alone), so everything is
compared with the files or with recordings.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, conversation, load_model, recorded_image, refused, relative_error
from fresh_process import save_expected
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from navil import CODE_FILES

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


# -- loading -----------------------------------------------------------------------------------------------------------
def assert_weights_are_the_files(model, folder):
    stored = load_file(folder / "model.safetensors")
    loaded = model.state_dict()
    head = "lm_head.weight"
    if head not in stored:
        assert loaded[head].data_ptr() == loaded["model.language_model.embed_tokens.weight"].data_ptr()
        loaded.pop(head)
    assert loaded.keys() == stored.keys()
    assert [name for name in stored if not torch.equal(loaded[name], stored[name])] == []
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


LOADING = {
    "AutoModel": (AutoModel, {}),
    "AutoModelForCausalLM": (AutoModelForCausalLM, {}),
    "AutoModelForImageTextToText": (AutoModelForImageTextToText, {"device_map": "cpu"}),
    "devices chosen": (AutoModel, {"device_map": "auto"}),
    "meta device first": (AutoModel, {"low_cpu_mem_usage": True}),
    "released call": (AutoModel, {"torch_dtype": torch.float32, "low_cpu_mem_usage": True, "load_in_8bit": False}),
    "eager": (AutoModel, {"attn_implementation": "eager"}),
}


@pytest.mark.parametrize(("auto_class", "options"), LOADING.values(), ids=LOADING)
def test_loaded_weights_are_the_files(recording, auto_class, options):
    torch.manual_seed(1)  # an initialization after loading would show
    options = {"trust_remote_code": True, "output_loading_info": True, **options}
    model, report = auto_class.from_pretrained(recording.folder, **options)
    assert type(model).__name__ == "NaViLForConditionalGeneration"
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_weights_are_the_files(model, recording.folder)
    with torch.no_grad():
        logits = model.eval()(**recording.inputs("single")).logits
    assert relative_error(logits, recording.tensors("single")["logits"]) < 1e-5


def test_a_subfolder_holds_weights_and_settings_of_its_own(tiny):
    assert_weights_are_the_files(tiny.model, ROOT / "tiny")
    stored = json.loads((ROOT / "tiny" / "generation_config.json").read_text())
    assert tiny.model.generation_config.eos_token_id == stored["eos_token_id"] is not None
    assert tiny.model.generation_config.max_new_tokens == stored["max_new_tokens"]


def test_half_precision_rounds_the_weights_but_not_the_rotary_angles(recording):
    model = load_model(recording.folder, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True, load_in_8bit=False)
    stored, loaded = load_file(recording.folder / "model.safetensors"), model.state_dict()
    assert [name for name in stored if not torch.equal(loaded[name], stored[name].bfloat16())] == []
    model = model.float()
    model.load_state_dict(recording.model.state_dict())
    with torch.no_grad():
        logits = model(**recording.inputs("single")).logits
    assert relative_error(logits, recording.tensors("single")["logits"]) < 1e-5


def test_configs_and_processors_have_the_released_settings(recording):
    config = AutoConfig.from_pretrained(recording.folder, trust_remote_code=True)
    assert (config.model_type, config.tie_word_embeddings, config.downsample_ratio) == ("navil", False, 0.5)
    assert (config.min_dynamic_patch, config.max_dynamic_patch, config.scale_downsample_ratio) == (16, 256, 0.7071)
    image_processor = AutoImageProcessor.from_pretrained(recording.folder, trust_remote_code=True)
    settings = {"min_pixels": 4096, "max_pixels": 65536, "patch_size": config.vision_config.patch_size}
    assert image_processor.to_dict().items() >= settings.items() and settings["patch_size"] == 16
    assert type(recording.processor.tokenizer).__name__ == type(recording.tokenizer).__name__ == "NaViLTokenizer"


def test_missing_weights_alone_are_initialized(recording, tmp_path):
    """As in fine-tuning from a part of a checkpoint."""
    torch.manual_seed(1)
    recording.model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    dropped = [name for name in stored if name.startswith(("model.connector.", "model.vision_model.blocks.0."))]
    kept = {name: tensor for name, tensor in stored.items() if name not in dropped}
    loaded = type(recording.model).from_pretrained(None, config=recording.model.config, state_dict=kept).state_dict()
    assert [name for name in kept if not torch.equal(loaded[name], kept[name])] == []
    assert loaded["model.connector.norm.weight"].unique().tolist() == [1.0]
    scale = loaded["model.vision_model.blocks.0.ls1"]
    assert torch.equal(scale, torch.full_like(scale, recording.model.config.vision_config.layer_scale_init))
    assert loaded["model.connector.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.1)


TEXTS = ["What is in this picture?", " 10 + 2  = 12.\n", "你好，世界 <ref>a</ref><box>[[1, 2]]</box>", "naïve 🙂"]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_is_its_file(recording, text):
    plain = Tokenizer.from_file(str(recording.folder / "tokenizer.json"))
    ids = recording.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == plain.encode(text, add_special_tokens=False).ids
    decoded = recording.tokenizer.decode(ids, spaces_between_special_tokens=False)
    assert decoded == plain.decode(ids, skip_special_tokens=False)


def test_use_flash_attn_chooses_the_attention(recording, monkeypatch):
    assert load_model(recording.folder, use_flash_attn=False).language_model.config._attn_implementation == "sdpa"
    eager = load_model(recording.folder, use_flash_attn=None, attn_implementation="eager")
    assert eager.vision_model.config._attn_implementation == "eager"
    with refused("means attn_implementation='sdpa'"):
        load_model(recording.folder, use_flash_attn=False, attn_implementation="eager")
    module = sys.modules[type(recording.model).__module__]
    monkeypatch.setattr(module, "is_flash_attn_2_available", lambda: False)
    with refused("needs an NVIDIA GPU and the package flash-attn"):
        load_model(recording.folder, use_flash_attn=True)


# -- saving ------------------------------------------------------------------------------------------------------------
def test_saved_folders_and_the_repository_load_in_a_fresh_process_without_a_warning(recordings, tiny, tmp_path):
    """Each folder is saved, loaded and saved again; then a process without these modules loads and pickles it."""
    image, expected = recorded_image(90, 60, 0), []
    for name, original in (recordings | {"tiny": tiny}).items():
        model, processor = original.model, original.processor
        for folder in (tmp_path / f"{name}-once", tmp_path / name):
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        assert {*CODE_FILES} <= {path.name for path in folder.iterdir()}
        configs = [json.loads((path / "config.json").read_text()) for path in (folder, ROOT)]
        assert configs[0]["auto_map"] == configs[1]["auto_map"]
        expected.append(save_expected(original, folder, tmp_path / f"{name}.pt", image))
    chart = ROOT / "examples" / "chart.png"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "TQDM_DISABLE": "1"}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 300}
    for arguments, answers in ((expected, ""), (["--repository", ROOT, chart], "B B\nB\n")):
        run = subprocess.run([sys.executable, ROOT / "tests" / "fresh_process.py", *arguments], **options)
        assert run.returncode == 0 and run.stdout == answers, run.stderr
        assert run.stderr.partition("pipeline\n")[0] == "", run.stderr


def test_base_model_gives_the_last_hidden_state_and_reloads_alone(recording, tmp_path):
    """Tied, as well."""
    model, inputs = load_model(recording.folder, tie_word_embeddings=True), recording.inputs("single")
    model.tie_weights()  # transformers 5 leaves it at what the file says, where that holds two matrices
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(**inputs).logits)
        model.save_pretrained(tmp_path)
        alone = type(model.base_model).from_pretrained(tmp_path).eval()
        assert torch.equal(alone(**inputs).last_hidden_state, hidden)
    tied = load_model(tmp_path)
    assert tied.config.tie_word_embeddings and tied.config.text_config.tie_word_embeddings
    assert tied.lm_head.weight is tied.language_model.embed_tokens.weight
    assert tied.vision_model is tied.model.vision_model and tied.language_model is tied.get_decoder()


# -- training ----------------------------------------------------------------------------------------------------------
def losses_of_steps(model, batch, steps, learning_rate) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        assert not any(parameter.grad is None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_training_step(recording, checkpointing):
    model = load_model(recording.folder).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = recording.inputs("single") | {"labels": recording.tensors("single")["labels"]}
    losses = losses_of_steps(model, batch, steps=2, learning_rate=1e-3)
    assert losses[0] == pytest.approx(recording.tensors("single")["loss"].item(), abs=1e-4)
    assert losses[1] < losses[0]


@pytest.fixture
def internlm2(recordings):
    """The other one's connector has a norm as long as its vocabulary, which PEFT takes for the embeddings."""
    return recordings["internlm2"]


def adapted(recording, kind):
    peft = pytest.importorskip("peft")
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    config = {
        "prompt tuning": lambda: peft.PromptTuningConfig(**virtual),
        "p-tuning": lambda: peft.PromptEncoderConfig(**virtual, encoder_hidden_size=32),
        "prefix tuning": lambda: peft.PrefixTuningConfig(**virtual),
        "LoRA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    }[kind]()
    return peft.get_peft_model(load_model(recording.folder), config)


@pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning", "prefix tuning", "LoRA"])
def test_adapter_trains_generates_and_reloads(internlm2, tmp_path, kind):
    model = adapted(internlm2, kind).train()
    prompts = [conversation("What?", recorded_image(90, 60, 0)), conversation("And what else is there to say?")]
    answer = {"role": "assistant", "content": "a wave"}
    batch = internlm2.processor.training_batch([{"messages": [*messages, answer]} for messages in prompts])
    losses = losses_of_steps(model, batch, steps=3, learning_rate=1e-2)
    assert losses[2] < losses[1] < losses[0]

    inputs = dict(internlm2.encode(*prompts))
    together = model.eval().generate(**inputs, **GREEDY)
    sequence, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(GREEDY["max_new_tokens"]):
        grown = inputs | {"input_ids": sequence, "attention_mask": mask}
        with torch.no_grad():
            logits = model(**grown, use_cache=False).logits
        sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(together, sequence)

    model.save_pretrained(tmp_path)
    reloaded = sys.modules["peft"].PeftModel.from_pretrained(load_model(internlm2.folder), tmp_path).eval()
    assert torch.equal(reloaded.generate(**inputs, **GREEDY), together)


def test_virtual_tokens_are_tokens_in_front_of_the_prompt(internlm2):
    model = adapted(internlm2, "prompt tuning").eval()
    inputs = dict(internlm2.encode(conversation("What?", recorded_image(90, 60, 0))))
    ids = internlm2.tokenizer("Say it as you see it", add_special_tokens=False, return_tensors="pt")["input_ids"][:, :4]
    model.prompt_encoder["default"].embedding.weight.data = internlm2.model.get_input_embeddings()(ids[0]).detach()
    longer = {"input_ids": torch.cat([ids, inputs["input_ids"]], dim=1), "attention_mask": None}
    with torch.no_grad():
        actual, expected = model(**inputs).logits, internlm2.model(**inputs | longer).logits
    assert relative_error(actual, expected) < 1e-5
