"""What every supported transformers version must do with the same files; `tests/compat.sh` runs it under each of them.

transformers 5 can load a model without an error and yet wrongly: weights initialised anew, buffers left empty, a
tokenizer rebuilt from its vocabulary alone. So everything is compared with the files or with recordings.
"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, recorded_image, relative_error
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

GREEDY = {"max_new_tokens": 6, "do_sample": False}
LOADING = {
    "plain": {},
    "one device": {"device_map": "cpu"},
    "meta device first": {"low_cpu_mem_usage": True},
    "released call": {"torch_dtype": torch.float32, "low_cpu_mem_usage": True, "load_in_8bit": False},
    "eager": {"attn_implementation": "eager"},
}


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


@pytest.mark.parametrize("options", LOADING.values(), ids=LOADING)
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
def test_loaded_weights_are_the_files(recording, auto_class, options):
    torch.manual_seed(1)  # an initialisation that ran after loading would show
    model, report = auto_class.from_pretrained(
        recording.folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_weights_are_the_files(model, recording.folder)
    with torch.no_grad():
        logits = model.eval()(**recording.inputs("single")).logits
    assert relative_error(logits, recording.tensors("single")["logits"]) < 1e-5


def test_loaded_weights_are_the_files_of_the_embedded_model():
    options = {"subfolder": "tiny", "trust_remote_code": True}
    model = AutoModel.from_pretrained(ROOT, **options).eval()
    assert_weights_are_the_files(model, ROOT / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(ROOT, **options)
    for example in json.loads((ROOT / "examples" / "answers.json").read_text()):
        assert model.chat(tokenizer, ROOT / example["image"], example["question"]) == example["answer"]


def test_half_precision_is_the_file_rounded(recording):
    model = AutoModel.from_pretrained(recording.folder, trust_remote_code=True, torch_dtype=torch.bfloat16)
    stored = load_file(recording.folder / "model.safetensors")
    loaded = model.state_dict()
    assert [name for name in stored if not torch.equal(loaded[name], stored[name].bfloat16())] == []


def test_missing_weights_alone_are_initialised(recording, tmp_path):
    """What a fine-tune does that begins with a part of a checkpoint."""
    torch.manual_seed(1)
    recording.model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    dropped = [name for name in stored if name.startswith(("model.connector.", "model.vision_model.blocks.0."))]
    kept = {name: tensor for name, tensor in stored.items() if name not in dropped}
    model = type(recording.model).from_pretrained(None, config=recording.model.config, state_dict=kept)
    loaded = model.state_dict()
    assert [name for name in kept if not torch.equal(loaded[name], kept[name])] == []
    assert torch.equal(loaded["model.connector.norm.weight"], torch.ones_like(loaded["model.connector.norm.weight"]))
    scale = loaded["model.vision_model.blocks.0.ls1"]
    assert torch.equal(scale, torch.full_like(scale, recording.model.config.vision_config.layer_scale_init))
    assert loaded["model.connector.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_tokenizer_is_its_file(recording):
    plain = Tokenizer.from_file(str(recording.folder / "tokenizer.json"))
    for text in (
        "What is in this picture?",
        " 10 + 2  = 12.\n",
        "你好，世界 <ref>a</ref><box>[[1, 2]]</box>",
        "naïve 🙂",
    ):
        ids = recording.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == plain.encode(text, add_special_tokens=False).ids
        assert recording.tokenizer.decode(ids, spaces_between_special_tokens=False) == plain.decode(
            ids, skip_special_tokens=False
        )


def conversation(text, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "samples", "static cache"],
)
def test_generate_from_messages(recording, settings):
    messages = conversation("What differs?", recorded_image(90, 60, 0), recorded_image(40, 70, 1))
    inputs = recording.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    output = recording.model.generate(**inputs, **{**GREEDY, **settings})
    assert output.shape == (settings.get("num_return_sequences", 1), inputs["input_ids"].shape[1] + 6)
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].expand(len(output), -1))
    if "do_sample" not in settings and "num_beams" not in settings:
        sequence = inputs["input_ids"]
        images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "num_scales")}
        for _ in range(6):
            with torch.no_grad():
                logits = recording.model(input_ids=sequence, use_cache=False, **images).logits
            sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(output, sequence)


def test_padded_batch_equals_one_by_one(recording):
    batch = [conversation("What?", recorded_image(90, 60, 0)), conversation("And what else is there to say?")]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    padded = recording.processor.apply_chat_template(batch, padding=True, **options)
    together = recording.model.generate(**padded, **GREEDY)[:, padded["input_ids"].shape[1] :]
    for row, messages in zip(together, batch, strict=True):
        inputs = recording.processor.apply_chat_template(messages, **options)
        alone = recording.model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(row, alone)


RELOAD = """
import sys, torch
from transformers import AutoModel, AutoProcessor
folder, expected = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
saved = torch.load(expected)
with torch.no_grad():
    logits = model(**saved["inputs"]).logits
assert torch.equal(logits, saved["logits"]), (logits - saved["logits"]).abs().max()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert processor.tokenizer(saved["text"])["input_ids"] == saved["ids"]
assert processor.image_processor.to_dict() == saved["image settings"]
"""


@pytest.mark.parametrize("name", ["internlm2", "qwen3", "tiny"])
def test_saved_folder_reloads_in_a_fresh_process(recordings, tmp_path, monkeypatch, name):
    if name == "tiny":  # with tied embeddings
        options = {"subfolder": "tiny", "trust_remote_code": True}
        model = AutoModel.from_pretrained(ROOT, **options).eval()
        processor = AutoProcessor.from_pretrained(ROOT, **options)
    else:
        model, processor = recordings[name].model, recordings[name].processor
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    messages = conversation("What is it?", recorded_image(90, 60, 0))
    inputs = dict(processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt"))
    with torch.no_grad():
        logits = model(**inputs).logits
    text = "Was ist das? 你好"
    expected = {
        **{"inputs": inputs, "logits": logits, "text": text, "ids": processor.tokenizer(text)["input_ids"]},
        "image settings": processor.image_processor.to_dict(),
    }
    torch.save(expected, tmp_path / "expected.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-c", RELOAD, str(folder), str(tmp_path / "expected.pt")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_training_step(recording, checkpointing):
    model = AutoModel.from_pretrained(recording.folder, trust_remote_code=True).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = recording.inputs("single") | {"labels": recording.tensors("single")["labels"]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(**inputs).loss
        loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(recording.tensors("single")["loss"].item(), abs=1e-4)
    assert losses[1] < losses[0]


PLAIN_USE = """
import sys
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer
root, image = sys.argv[1:]
load = dict(subfolder="tiny", trust_remote_code=True)
model = AutoModel.from_pretrained(root, **load).eval()
tokenizer = AutoTokenizer.from_pretrained(root, **load)
processor = AutoProcessor.from_pretrained(root, **load)
AutoImageProcessor.from_pretrained(root, **load)
content = [{"type": "image", "path": image}, {"type": "text", "text": "Which bar is the highest?"}]
options = dict(tokenize=True, return_dict=True, return_tensors="pt")
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
output = model.generate(**inputs)
print(model.chat(tokenizer, image, content[1]["text"]), end=" ")
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def test_plain_use_prints_the_answer_and_nothing_else(tmp_path, monkeypatch):
    """No warning of transformers or of us: neither at the load of any part nor in a chat."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    command = [sys.executable, "-c", PLAIN_USE, str(ROOT), str(ROOT / "examples" / "chart.png")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("B B\n", "")


# -- PEFT --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recording_for_peft(recordings):
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
    return peft.get_peft_model(AutoModel.from_pretrained(recording.folder, trust_remote_code=True), config)


@pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning", "prefix tuning", "LoRA"])
def test_adapter_trains_generates_and_reloads(recording_for_peft, tmp_path, kind):
    recording = recording_for_peft
    model = adapted(recording, kind).train()
    prompts = [conversation("What?", recorded_image(90, 60, 0)), conversation("And what else is there to say?")]
    answer = {"role": "assistant", "content": "a wave"}
    batch = recording.processor.training_batch([{"messages": [*messages, answer]} for messages in prompts])
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]

    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    inputs = dict(recording.processor.apply_chat_template(prompts, **options))
    together = model.eval().generate(**inputs, **GREEDY, eos_token_id=None)
    sequence, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(GREEDY["max_new_tokens"]):
        grown = inputs | {"input_ids": sequence, "attention_mask": mask}
        with torch.no_grad():
            logits = model(**grown, use_cache=False).logits
        sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(together, sequence)

    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(recording.folder, trust_remote_code=True)
    reloaded = sys.modules["peft"].PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(reloaded.generate(**inputs, **GREEDY, eos_token_id=None), together)


def test_virtual_tokens_are_tokens_in_front_of_the_prompt(recording_for_peft):
    recording = recording_for_peft
    model = adapted(recording, "prompt tuning").eval()
    messages = conversation("What?", recorded_image(90, 60, 0))
    inputs = dict(
        recording.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    )
    ids = torch.tensor([recording.tokenizer("Say it as you see it", add_special_tokens=False)["input_ids"][:4]])
    embedding = model.prompt_encoder["default"].embedding.weight
    embedding.data = recording.model.get_input_embeddings()(ids[0]).detach()
    with torch.no_grad():
        actual = model(**inputs).logits
        longer = {"input_ids": torch.cat([ids, inputs["input_ids"]], dim=1), "attention_mask": None}
        expected = recording.model(**inputs | longer).logits
    assert relative_error(actual, expected) < 1e-5
