"""The package as a model repository: loading, saving, training and PEFT under every supported transformers version.

`tests/compat.sh` runs this file under each version. transformers 5 can load a model without an error but with wrong
contents (weights initialized again, empty buffers, a tokenizer rebuilt from its vocabulary alone), so everything is
compared with the files or with recordings.
"""

import json
import sys

import pytest
import torch
from conftest import ROOT, conversation, recorded_image, refused, relative_error, run_python
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


def load(recording, **options):
    return AutoModel.from_pretrained(recording.folder, trust_remote_code=True, **options).eval()


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
    "AutoModelForImageTextToText": (AutoModelForImageTextToText, {}),
    "one device": (AutoModel, {"device_map": "cpu"}),
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
    model = load(recording, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True, load_in_8bit=False)
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
    assert load(recording, use_flash_attn=False).language_model.config._attn_implementation == "sdpa"
    eager = load(recording, use_flash_attn=None, attn_implementation="eager")
    assert eager.vision_model.config._attn_implementation == "eager"
    with refused("means attn_implementation='sdpa'"):
        load(recording, use_flash_attn=False, attn_implementation="eager")
    module = sys.modules[type(recording.model).__module__]
    monkeypatch.setattr(module, "is_flash_attn_2_available", lambda: False)
    with refused("needs an NVIDIA GPU and the package flash-attn"):
        load(recording, use_flash_attn=True)


# -- saving ------------------------------------------------------------------------------------------------------------

FRESH_PROCESS = """
import copy, pickle, sys, numpy, torch
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline
root, image, *folders = sys.argv[1:]

def load(auto_class, folder, **options):
    return auto_class.from_pretrained(folder, trust_remote_code=True, **options)

# As people use the repository: weights in a subfolder, code at the root, the processor first.
tiny = {"subfolder": "tiny"}
processor, model = load(AutoProcessor, root, **tiny), load(AutoModel, root, **tiny).eval()
tokenizer = load(AutoTokenizer, root, **tiny)
load(AutoImageProcessor, root, **tiny)
content = [{"type": "image", "url": image}, {"type": "text", "text": "Which bar is the highest?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs)
print(model.chat(tokenizer, image, content[1]["text"]), end=" ")
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))

for folder in folders:  # the first of them with the processor first
    if folder == folders[0]:
        processor, model = load(AutoProcessor, folder), load(AutoModel, folder).eval()
    else:
        model, processor = load(AutoModel, folder).eval(), load(AutoProcessor, folder)
    saved = torch.load(folder + ".pt")
    for copied in (model, pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            logits = copied(**saved["inputs"]).logits
        assert torch.equal(logits, saved["logits"]), (logits - saved["logits"]).abs().max()
    assert model.vision_model.config._attn_implementation == model.language_model.config._attn_implementation == "sdpa"
    assert processor.tokenizer(saved["text"])["input_ids"] == load(AutoTokenizer, folder)(saved["text"])["input_ids"]
    assert processor.tokenizer(saved["text"])["input_ids"] == saved["ids"]
    assert processor.image_processor.to_dict() == saved["image settings"]
    for original in (model.image_processor, processor.image_processor, load(AutoImageProcessor, folder)):
        for copied in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
            assert copied.to_dict() == original.to_dict()
            assert copied(numpy.zeros((9, 9)))["num_scales"].tolist() == [1]

print("pipeline", file=sys.stderr)  # which says its device
pipe = pipeline("image-text-to-text", model=root, trust_remote_code=True, model_kwargs=tiny)
print(pipe(text=messages, return_full_text=False)[0]["generated_text"])
"""


def test_saved_folders_and_the_repository_load_in_a_fresh_process_without_a_warning(recordings, tiny, tmp_path):
    """Each folder is saved, loaded and saved again; then a process without these modules loads and pickles it."""
    names, text = [*recordings, "tiny"], "Was ist das? 你好"
    for name, original in zip(names, [*recordings.values(), tiny], strict=True):
        model, processor = original.model, original.processor
        for folder in (tmp_path / f"{name}-once", tmp_path / name):
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        assert {*CODE_FILES} <= {path.name for path in folder.iterdir()}
        configs = [json.loads((path / "config.json").read_text()) for path in (folder, ROOT)]
        assert configs[0]["auto_map"] == configs[1]["auto_map"]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        chat = conversation("What is it?", recorded_image(90, 60, 0))
        inputs = dict(original.processor.apply_chat_template(chat, **options))
        with torch.no_grad():
            logits = original.model(**inputs).logits
        expected = {"inputs": inputs, "logits": logits, "text": text, "ids": original.tokenizer(text)["input_ids"]}
        expected["image settings"] = original.processor.image_processor.to_dict()
        torch.save(expected, tmp_path / f"{name}.pt")
    folders = [tmp_path / name for name in names]
    run = run_python(FRESH_PROCESS, ROOT, ROOT / "examples" / "chart.png", *folders, modules=tmp_path / "modules")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "B B\nB\n" and run.stderr.startswith("pipeline\n"), run.stderr


def test_tying_survives_saving(recording, tmp_path):
    tied = load(recording, tie_word_embeddings=True)
    tied.tie_weights()  # transformers 5 leaves it at what the file says, where that holds two matrices
    tied.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert model.config.tie_word_embeddings and model.config.text_config.tie_word_embeddings
    assert model.lm_head.weight is model.language_model.embed_tokens.weight


def test_base_model_gives_the_last_hidden_state_and_reloads_alone(recording, tmp_path):
    model, inputs = recording.model, recording.inputs("single")
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(**inputs).logits)
        model.save_pretrained(tmp_path)
        alone = type(model.base_model).from_pretrained(tmp_path).eval()
        assert torch.equal(alone(**inputs).last_hidden_state, hidden)
    assert model.vision_model is model.model.vision_model and model.language_model is model.get_decoder()


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
    model = load(recording).train()
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
    return peft.get_peft_model(load(recording), config)


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
    reloaded = sys.modules["peft"].PeftModel.from_pretrained(load(internlm2), tmp_path).eval()
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
