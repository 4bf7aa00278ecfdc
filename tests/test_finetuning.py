"""Fine-tuning: batches, stages, Trainer, LoRA, and two processes that train as one."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, conversation, load_model, recorded_image, relative_error
from distributed_worker import STRATEGIES, fit, losses, torchrun, train_on_stream
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from examples import finetune
from navil import CODE_FILES
from training import Source, read_examples

IGNORED = -100


def example(*turns: tuple[str, str], images: tuple = ()) -> dict:
    """Questions and answers, with images before the first question."""
    messages = []
    for question, answer in turns:
        messages += [*conversation(question, *([] if messages else images)), {"role": "assistant", "content": answer}]
    return {"messages": messages}


def mixed_examples() -> list[dict]:
    """Eight conversations of unequal length; the first, third and seventh have pictures."""
    small, large = recorded_image(64, 64, 0), recorded_image(120, 90, 1)
    return [
        example(("What is it?", "a wave"), images=(small,)),
        example(("Say it.", "it, as you asked for it, again and again")),
        example(("And this?", "two"), ("Sure?", "yes, I am"), images=(large, small)),
        example(("One?", "1")),
        example(("Say nothing.", "nothing")),
        example(("Two?", "2, or more than that")),
        example(("Where?", "left"), images=(large,)),
        example(("Three?", "3")),
    ]


def read_log(folder) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(row["loss"], row["grad_norm"]) for row in history if "loss" in row]


# -- batches -----------------------------------------------------------------------------------------------------------
def test_labels_are_the_answers_with_their_ends(recording):
    batch = recording.processor.training_batch(mixed_examples())
    tokenizer = recording.tokenizer
    for row, one in zip(batch["labels"], mixed_examples(), strict=True):
        answers = [message["content"] for message in one["messages"] if message["role"] == "assistant"]
        expected = "".join(f"{answer}<|im_end|>" for answer in answers)
        assert tokenizer.decode(row[row != IGNORED]).replace(" ", "") == expected.replace(" ", "")
    labelled = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    # Trainer counts all labels, so none may be outside the loss: at the start or predicted by an image token.
    assert not labelled[:, 0].any()
    assert not (labelled[:, 1:] & (batch["input_ids"][:, :-1] == recording.model.config.image_token_id)).any()


def test_training_ids_begin_like_the_ids_that_chat_sees(recording):
    image = recorded_image(120, 90, 1)
    batch = recording.processor.training_batch([example(("What is it?", "a wave"), images=(image,))])
    start = int((batch["labels"][0] != IGNORED).nonzero()[0])
    plans, _ = recording.model.plan_images(image)
    ids = recording.model.encode_chat(recording.tokenizer, [("<image>\nWhat is it?", None)], plans)
    assert ids[0].tolist() == batch["input_ids"][0, :start].tolist()


def test_packed_conversations_do_not_see_each_other(recording):
    """Whether all are in one row or a row is as long as the longest and the shortest together."""
    examples, collate = mixed_examples(), recording.processor.training_batch
    alone = [collate([one]) for one in examples]
    lengths = [batch["input_ids"].shape[1] for batch in alone]
    packed, rows = (collate(examples, row_length=n) for n in (sum(lengths), max(lengths) + min(lengths)))
    assert packed["input_ids"].shape == (1, sum(lengths)) and 1 < len(rows["input_ids"]) < len(examples)
    assert rows["input_ids"].shape[1] <= max(lengths) + min(lengths)
    with torch.no_grad():
        outputs = recording.model(**packed)
        single = torch.cat([recording.model(**batch).logits[0] for batch in alone])
        losses = [recording.model(**batch).loss.item() for batch in (rows, collate(examples))]
    assert relative_error(outputs.logits[0], single) < 1e-5
    assert losses == pytest.approx([outputs.loss.item()] * 2, rel=1e-5)


@pytest.mark.parametrize(
    ("examples", "row_length", "message"),
    [
        ([], None, "at least one example"),
        ([[{"role": "user", "content": "Hi"}]], None, "as its `messages`"),
        ([{"messages": [{"role": "user", "content": "Hi"}]}], None, "a question first and an answer last"),
        ([{"messages": [{"role": "assistant", "content": "Hi"}]}], None, "a question first and an answer last"),
        ([{"messages": [*example(("Hi", "a"))["messages"], {"role": "user", "content": "b"}]}], None, "an answer last"),
        ([example(("Hi", "a long answer"))], 4, r"tokens but row_length is 4"),
        ([example(("Hi", "<|im_end|>"))], None, "reserved"),
    ],
)
def test_bad_examples_are_refused(recording, examples, row_length, message):
    with pytest.raises(ValueError, match=message):
        recording.processor.training_batch(examples, row_length=row_length)


# -- what trains -------------------------------------------------------------------------------------------------------
def test_stages_train_what_the_paper_says(recording):
    model, trained = load_model(recording.folder), {}
    for stage in ("s1.2", "s2", "s1.1"):
        model.set_training_stage(stage)
        trained[stage] = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    visual = {name for name in trained["s2"] if any(p in name for p in ("vision_model", "connector", ".visual."))}
    attention = {name for name in trained["s2"] if ".self_attn.text." in name}
    assert trained["s2"] == {name for name, _ in model.named_parameters()} and attention and visual
    assert (trained["s1.1"], trained["s1.2"]) == (visual, visual | attention)
    with pytest.raises(ValueError, match=r"\['s1.1', 's1.2', 's2'\], got 'S3'"):
        model.set_training_stage("S3")


@pytest.mark.parametrize("stage", ["s1.1", "s2"])
@pytest.mark.parametrize("with_image", [False, True])
def test_every_training_parameter_has_a_gradient(recording, stage, with_image):
    model = load_model(recording.folder).train()
    model.set_training_stage(stage)
    images = (recorded_image(64, 64, 0),) if with_image else ()
    model(**recording.processor.training_batch([example(("Hi", "there"), images=images)])).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    visual = [p.grad.abs().sum() for name, p in model.named_parameters() if ".visual." in name]
    assert all(total == 0 for total in visual) != with_image


def test_without_labels_the_loss_is_zero(recording):
    model = load_model(recording.folder).train()
    batch = recording.processor.training_batch([example(("Hi", "there"))])
    batch["labels"].fill_(IGNORED)
    for options in ({}, {"num_items_in_batch": torch.tensor(0)}, {"loss_weight": torch.zeros(batch["labels"].shape)}):
        model.zero_grad()
        loss = model(**batch, **options).loss
        loss.backward()
        assert loss == 0 and all(parameter.grad.abs().sum() == 0 for parameter in model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_encoder_trains_behind_a_frozen_input(recording, use_reentrant):
    model = load_model(recording.folder).train()
    batch = recording.processor.training_batch(mixed_examples()[:2])
    gradients = []
    for checkpointing in (False, True):
        model.set_training_stage("s1.1")
        model.vision_model.patch_embedding.requires_grad_(False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append(model.vision_model.blocks[0].attn.qkv.weight.grad.clone())
    model.disable_input_require_grads()
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(*gradients, atol=1e-6)


# -- Trainer -----------------------------------------------------------------------------------------------------------
def test_accumulated_packed_and_checkpointed_steps_equal_whole_ones(recordings):
    arguments = (recordings["qwen3"].folder, mixed_examples())
    whole, model = fit(*arguments, per_device_train_batch_size=4)
    accumulated, other = fit(*arguments, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    packed, _ = fit(*arguments, per_device_train_batch_size=4, row_length=2000)
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    checkpointed, _ = fit(*arguments, per_device_train_batch_size=4, **checkpointing)
    assert whole[0] != pytest.approx(whole[1], rel=1e-2)
    for rows in (accumulated, packed, checkpointed):
        assert np.array(rows) == pytest.approx(np.array(whole), rel=2e-4)  # the log has four decimals
    for parameter, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.allclose(parameter, expected, atol=5e-5)  # a step changes them a hundred times as much


@pytest.mark.parametrize("with_images", [False, True])
def test_label_smoothing_shifts_the_labels_too(recordings, with_images):
    arguments = (recordings["qwen3"].folder, mixed_examples()[0 if with_images else 1 :: 2])
    plain, _ = fit(*arguments, per_device_train_batch_size=4)
    smoothed, _ = fit(*arguments, per_device_train_batch_size=4, label_smoothing_factor=1e-6)
    assert np.array(smoothed) == pytest.approx(np.array(plain), rel=2e-4)


def test_evaluation_loss_of_trainer(recording, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, remove_unused_columns=False, report_to=[], disable_tqdm=True)
    collate = recording.processor.training_batch
    trainer = Trainer(recording.model, args, data_collator=collate, eval_dataset=mixed_examples())
    trainer.args.prediction_loss_only = True
    with torch.no_grad():
        expected = recording.model(**collate(mixed_examples())).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


# -- the example -------------------------------------------------------------------------------------------------------
@pytest.fixture
def conversations(tmp_path):
    """The examples as a JSONL file, with their pictures in the same folder."""
    lines = []
    for number, one in enumerate(mixed_examples()):
        for part in one["messages"][0]["content"]:
            if part["type"] == "image":
                part["path"] = f"{number}-{part['image'].width}.png"
                part.pop("image").save(tmp_path / part["path"])
        lines.append(json.dumps(one))
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_example_teaches_its_answers(recordings, conversations, tmp_path):
    recording = recordings["qwen3"]
    output = tmp_path / "out"
    options = ["--model", str(recording.folder), "--data", str(conversations), "--output", str(output)]
    conversations.write_text("\n".join(conversations.read_text().splitlines()[:2]))
    settings = ["--steps", "16", "--learning-rate", "0.01", "--row-length", "2000"]
    assert finetune.main([*options, *settings, "--checkpointing"]) == 0
    losses = [loss for loss, _ in read_log(output)]
    assert len(losses) == 16 and losses[-1] < 0.3 * losses[0]
    model = load_model(output)
    assert model.chat(recording.tokenizer, recorded_image(64, 64, 0), "What is it?", {"max_new_tokens": 8}) == "a wave"
    assert finetune.main([*options, "--row-length", "4"]) == 1


def test_lora_without_peft_says_what_to_install(monkeypatch, recording):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        finetune.add_lora(load_model(recording.folder), "both", 4)


@pytest.mark.parametrize("experts", finetune.LORA_TARGETS)
def test_lora_trains_its_experts_alone_merges_and_reloads(recordings, conversations, tmp_path, experts):
    """From a subfolder of a repository whose own config has another vocabulary, which PEFT compares with."""
    peft = pytest.importorskip("peft")
    recording, root, output = recordings["qwen3"], tmp_path / "repository", tmp_path / "out"
    shutil.copytree(recording.folder, root / "weights")
    for name in (*CODE_FILES, "config.json"):
        shutil.copyfile(ROOT / name, root / name)
    options = ["--model", str(root), "--subfolder", "weights", "--data", str(conversations), "--output", str(output)]
    settings = ["--steps", "2", "--lora", experts, "--lora-rank", "4", "--learning-rate", "0.01", "--checkpointing"]
    assert finetune.main([*options, *settings]) == 0
    assert all(".lora_" in name for name in load_file(output / "adapter" / "adapter_model.safetensors"))
    before, merged = (load_file(folder / "model.safetensors") for folder in (recording.folder, output))
    assert before.keys() == merged.keys()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    modalities = ("text", "visual") if experts == "both" else (experts,)
    targets = {
        name
        for name in before
        if name.endswith("_proj.weight") and any(f".{modality}." in name for modality in modalities)
    }
    # In the last layer, only the keys and values of a visual token reach other tokens.
    last = f".layers.{recording.model.config.text_config.num_hidden_layers - 1}."
    visual = {name for name in targets if last in name and ".visual." in name}
    assert changed == targets - {name for name in visual if not name.endswith(("k_proj.weight", "v_proj.weight"))}
    inputs = recording.inputs("single")
    adapted = peft.PeftModel.from_pretrained(load_model(recording.folder), output / "adapter").eval()
    reloaded = load_model(output)
    with torch.no_grad():
        logits = reloaded(**inputs).logits
        assert relative_error(adapted(**inputs).logits, logits) < 1e-5
        assert relative_error(recording.model(**inputs).logits, logits) > 1e-3
    answers = [
        model.chat(recording.tokenizer, recorded_image(64, 64, 0), "Hi", {"max_new_tokens": 4})
        for model in (adapted, reloaded)
    ]
    assert answers[0] == answers[1]


# -- two processes -----------------------------------------------------------------------------------------------------


def test_ddp_fsdp_and_streaming_give_the_losses_of_one_process(recordings, conversations, tmp_path):
    folder, collate, mixed = recordings["qwen3"].folder, recordings["qwen3"].processor.training_batch, mixed_examples()
    batches = [dict(collate([one])) for one in mixed]
    examples = read_examples([Source(str(conversations))])
    torch.save({"batches": batches, "examples": examples}, tmp_path / "data.pt")
    torchrun("tests/distributed_worker.py", "train", folder, tmp_path / "data.pt", tmp_path / "losses.pt")
    together = torch.load(tmp_path / "losses.pt")

    expected = losses(load_model(folder), [collate(mixed[start : start + 2]) for start in range(0, 8, 2)])
    assert expected[-1] < expected[0]
    for strategy in STRATEGIES:
        assert together[strategy] == pytest.approx(expected, rel=1e-4), strategy
    streamed = pytest.approx(expected[:-1], rel=1e-3)
    assert together["stream"] == streamed and train_on_stream(folder, examples) == streamed
    with pytest.raises(ValueError, match="dispatch_batches"):  # Trainer's default, which slices each tensor by rows
        train_on_stream(folder, examples, accelerator_config=None)


def test_example_on_two_processes_logs_the_losses_of_one(recordings, conversations, tmp_path):
    options = ["--model", recordings["qwen3"].folder, "--data", conversations, "--learning-rate", "0.01", "--steps", 4]
    one, two = tmp_path / "one", tmp_path / "two"
    assert finetune.main([*map(str, options), "--output", str(one), "--batch-size", "2"]) == 0
    torchrun("examples/finetune.py", *options, "--output", two, "--batch-size", 1)
    for row, expected in zip(read_log(two), read_log(one), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


def test_python_of_the_training_guide_runs(recordings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorded_image(60, 40, 1).save("photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.DOTALL)
    script = "\n".join(blocks).replace("weights/navil-2b", str(recordings["internlm2"].folder))
    names = {}
    exec(compile(script, "docs/training.md", "exec"), names)
    assert names["model"].language_model.layers[0].self_attn.text.q_proj.weight.grad.abs().sum() > 0
    assert "pixel_values" in next(iter(names["trainer"].get_train_dataloader()))
