"""Fine-tuning: batches, stages, Trainer, LoRA, and two processes that train as one."""

import json
import re
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT, conversation, load_model, recorded_image, refused, relative_error
from distributed_worker import STRATEGIES, fit, losses, start_two, torchrun, train_on_stream
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import convert_checkpoint
from examples import finetune
from navil import CODE_FILES
from training import DataError, FineTuner, Source, read_examples
from training.evaluation import checked_examples, expected_answer, generate_answers, is_correct, split_sources
from training.parts import PARTS, add_adapters, freeze, part_of, read_rates
from training.trainer import last_checkpoint

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


def read_evaluations(folder) -> list[tuple[int, float]]:
    """Step and accuracy of each evaluation."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(row["step"], row["eval_accuracy"]) for row in history if "eval_accuracy" in row]


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


def test_example_teaches_its_answers(recordings, conversations, tmp_path, capsys):
    """It ends with the best checkpoint, not the last, in a folder that `verify` accepts."""
    recording = recordings["qwen3"]
    output = tmp_path / "out"
    options = ["--model", str(recording.folder), "--data", str(conversations), "--output", str(output)]
    conversations.write_text("\n".join(conversations.read_text().splitlines()[:2]))
    settings = ["--steps", "40", "--learning-rate", "0.01", "--row-length", "2000", "--lr_scheduler_type", "constant"]
    evaluation = ["--eval-data", str(conversations), "--eval-steps", "8", "--early-stop", "1", "--answer-tokens", "48"]
    assert finetune.main([*options, *settings, *evaluation, "--checkpointing"]) == 0
    losses, evaluations = [loss for loss, _ in read_log(output)], read_evaluations(output)
    assert 16 <= len(losses) < 40 and losses[-1] < 0.3 * losses[0]
    best = max(accuracy for _, accuracy in evaluations)
    step = next(step for step, accuracy in evaluations if accuracy == best)
    assert best == 1 and len(losses) == step + 8  # one more evaluation, no better
    kept, saved = (load_file(folder / "model.safetensors") for folder in (output / f"checkpoint-{step}", output))
    last = load_file(output / f"checkpoint-{len(losses)}" / "model.safetensors")
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    assert any(not torch.equal(last[name], saved[name]) for name in saved)
    assert "right answers: 0 of 2 before, 2 of 2 after" in capsys.readouterr().out

    assert convert_checkpoint.main(["verify", str(output)]) == 0
    model = load_model(output)
    assert model.chat(recording.tokenizer, recorded_image(64, 64, 0), "What is it?", {"max_new_tokens": 8}) == "a wave"
    assert finetune.main(options) == 1
    assert "is of an earlier run: --resume_from_checkpoint" in capsys.readouterr().err
    assert finetune.main([*options, "--resume_from_checkpoint", "--row-length", "4"]) == 1


def test_tiny_does_not_know_what_the_example_teaches(tiny):
    examples = read_examples([Source(str(finetune.EXAMPLE_DATA))])
    answers = generate_answers(tiny.model, tiny.processor, examples, 8, 16)
    assert len(examples) == 8 and not any(
        is_correct(answer, expected_answer(one, tiny.processor)) for one, answer in zip(examples, answers, strict=True)
    )


def settled(*words: str):
    return finetune.settle(finetune.build_parser().parse_args(["--model", "m", "--output", "o", *words]))


def test_every_argument_of_trainer_is_an_option():
    args = finetune.training_arguments(settled("--weight_decay", "0.1", "--report-to", "tensorboard", "--fp16", "true"))
    assert (args.weight_decay, args.report_to, args.max_steps) == (0.1, ["tensorboard"], finetune.DEFAULT_STEPS)
    assert args.output_dir == "o" and args.save_strategy == "no" and args.eval_strategy == "no"
    args = finetune.training_arguments(settled("--num_train_epochs", "2", "--save_steps", "7", "--batch-size", "3"))
    assert (args.max_steps, args.num_train_epochs, args.save_strategy, args.save_steps) == (-1, 2, "steps", 7)
    assert args.per_device_train_batch_size == 3 and not args.load_best_model_at_end
    args = finetune.training_arguments(settled("--eval-fraction", "0.1", "--eval_strategy", "epoch"))
    assert args.eval_strategy == args.save_strategy == "epoch" and args.load_best_model_at_end
    assert args.metric_for_best_model == "accuracy" and args.greater_is_better


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dora"], "need --lora"),
        (["--eval-steps", "5"], "--eval-steps needs --eval-data or --eval-fraction"),
        (["--early-stop", "2"], "--early-stop needs --eval-data or --eval-fraction"),
        (["--eval-data", "a.json", "--eval-fraction", "0.1"], "exclude each other"),
    ],
)
def test_options_that_do_not_fit_are_refused(words, message):
    with refused(message):
        settled(*words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="QLoRA runs here")
def test_qlora_without_a_gpu_says_what_it_needs(recording, tmp_path, capsys):
    options = ["--model", str(recording.folder), "--output", str(tmp_path), "--lora", "both", "--qlora"]
    assert finetune.main(options) == 1 and "QLoRA needs an NVIDIA GPU" in capsys.readouterr().err


# -- learning rates and frozen parameters ------------------------------------------------------------------------------
def test_parts_have_their_learning_rates(recording, tmp_path):
    model = load_model(recording.folder)
    freeze(model, [r"layers\.0\.", "embed_tokens"])
    rates = read_rates(["vision=1e-5", "connector=1e-4", "visual=0"])
    args = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=0.5, weight_decay=0.1, report_to=[])
    trainer = FineTuner(recording.processor, rates, model=model, args=args)
    trainer.create_optimizer_and_scheduler(10)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["initial_lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == {name for name in names.values() if "layers.0." not in name and "embed_tokens" not in name}
    assert {name: rate for name, (rate, _) in found.items()} == {
        name: {**dict.fromkeys(PARTS, 0.5), **rates}[part_of(name)] for name in found
    }
    assert found["model.connector.fc1.weight"] == (1e-4, 0.1) and found["model.connector.fc1.bias"] == (1e-4, 0)


def test_bad_rates_and_patterns_are_refused(recording, tmp_path):
    for word in ("vision", "vision=fast", "vision=-1", "head=1e-4"):
        with refused(f"got '{word}'"):
            read_rates([word])
    model = load_model(recording.folder)
    for pattern, message in (("attention_7", "no parameter's name has"), ("(", "not a regular"), ("", "is frozen")):
        with refused(message):
            freeze(model, [pattern])
    model.set_training_stage("s1.1")
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with refused("no parameter of text trains"):
        FineTuner(recording.processor, {"text": 0.1}, model=model, args=args).create_optimizer()


# -- evaluation --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "expected", "exact", "relaxed"),
    [
        ("A  Wave ", "a wave", True, True),
        ("104", "100", False, True),
        ("1,040", "1000", False, True),
        ("106", "100", False, False),
        ("42%", "42", False, True),
        ("0.1", "0", False, False),
        ("-5", "5", False, False),
        ("nan", "5", False, False),
        ("", "5", False, False),
    ],
)
def test_answers_count_by_exact_match_or_relaxed_accuracy(answer, expected, exact, relaxed):
    assert (is_correct(answer, expected), is_correct(answer, expected, 0.05)) == (exact, relaxed)


def test_a_held_out_fraction_and_the_rest_are_all_records(recording, conversations):
    encode = recording.processor.encode_conversation
    training, held_out = split_sources([Source(str(conversations))], 0.25, seed=0)
    parts = [checked_examples(sources, encode, 2000) for sources in (training, held_out)]
    questions = [[text for one in part if (text := str(one["messages"]))] for part in parts]
    everything = [str(one["messages"]) for one in read_examples([Source(str(conversations))])]
    assert [len(part) for part in parts] == [6, 2] and sorted(questions[0] + questions[1]) == sorted(everything)
    with pytest.raises(DataError, match="a fraction of 0.01 of the 8 records"):
        checked_examples(split_sources([Source(str(conversations))], 0.01, 0)[1], encode, 2000)


def test_bad_records_of_an_evaluation_are_found_before_training(recording, conversations):
    encode = recording.processor.encode_conversation
    conversations.write_text(conversations.read_text() + '\n{"messages": []}')
    with pytest.raises(DataError, match="data.jsonl:9"):
        checked_examples([Source(str(conversations))], encode, 2000)
    assert len(checked_examples([Source(str(conversations))], encode, 2000, on_error="skip")) == 8


# -- adapters ----------------------------------------------------------------------------------------------------------
def test_lora_without_peft_says_what_to_install(monkeypatch, recording):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        add_adapters(load_model(recording.folder), "both", 4)


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


def test_dora_trains_magnitudes_merges_and_reloads(recordings, conversations, tmp_path):
    peft, recording = pytest.importorskip("peft"), recordings["qwen3"]
    options = ["--model", str(recording.folder), "--data", str(conversations), "--output", str(tmp_path / "out")]
    settings = ["--steps", "2", "--lora", "both", "--dora", "--lora-rank", "4", "--learning-rate", "0.01"]
    assert finetune.main([*options, *settings]) == 0
    adapter = tmp_path / "out" / "adapter"
    saved, merged = load_file(adapter / "adapter_model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(recording.folder / "model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_magnitude_vector"
    magnitudes = {name.removeprefix(prefix).removesuffix(suffix): saved[name] for name in saved if suffix in name}
    assert magnitudes.keys() == {
        name.removesuffix(".weight") for name in before if re.search(r"\.(text|visual)\.\w+_proj\.", name)
    }
    for name, magnitude in magnitudes.items():  # the length of each row, which LoRA has no parameter for
        assert torch.allclose(merged[f"{name}.weight"].norm(dim=1), magnitude, rtol=1e-4)
    lengths = {name: before[f"{name}.weight"].norm(dim=1) for name in magnitudes}
    assert any(relative_error(magnitudes[name], length) > 1e-3 for name, length in lengths.items())
    inputs, reloaded = recording.inputs("single"), load_model(tmp_path / "out")
    adapted = peft.PeftModel.from_pretrained(load_model(recording.folder), adapter).eval()
    with torch.no_grad():
        logits = reloaded(**inputs).logits
        assert relative_error(adapted(**inputs).logits, logits) < 1e-5
        assert relative_error(recording.model(**inputs).logits, logits) > 1e-3


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


def test_a_killed_run_of_two_processes_resumes_with_the_losses_of_one_that_was_not(recordings, conversations, tmp_path):
    """By two processes or by one, compared with one process without interruption."""
    options = ["--model", recordings["qwen3"].folder, "--data", conversations, "--learning-rate", 0.01, "--steps", 12]
    options += ["--eval-data", conversations, "--eval-steps", 4, "--answer-tokens", 12, "--output"]
    whole, killed, alone, kept = (tmp_path / name for name in ("whole", "killed", "alone", "kept"))
    assert finetune.main([*map(str, [*options, whole]), "--batch-size", "2"]) == 0

    processes = start_two("examples/finetune.py", *options, killed, "--batch-size", 1)
    deadline = time.monotonic() + 300
    while last_checkpoint(killed) is None and time.monotonic() < deadline:
        assert processes[0].poll() is None, "it ended before its first checkpoint"
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.wait()
    assert not (killed / "model.safetensors").exists()
    shutil.copytree(last_checkpoint(killed), kept)
    (killed / "checkpoint-11").mkdir()  # as if it had been killed while it saved
    torchrun("examples/finetune.py", *options, killed, "--batch-size", 1, "--resume_from_checkpoint")
    resumed = [*map(str, [*options, alone, "--resume_from_checkpoint", kept]), "--batch-size", "1", "--accumulate", "2"]
    assert finetune.main(resumed) == 0
    expected, evaluations = read_log(whole), read_evaluations(whole)
    assert len(expected) == 12 and evaluations[-1][1] > evaluations[0][1]
    for folder in (killed, alone):
        assert np.array(read_log(folder)) == pytest.approx(np.array(expected), rel=2e-3)
        assert read_evaluations(folder) == evaluations


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_configurations_of_accelerate_are_valid(recordings, monkeypatch, name):
    path = ROOT / "examples" / "accelerate" / f"{name}.yaml"
    options = launch_command_parser().parse_args(["--config_file", str(path), "finetune.py"])
    options, defaults, _ = _validate_launch_command(options)
    assert (options.use_fsdp, options.use_deepspeed) == (name == "fsdp2", name == "zero3")
    assert options.mixed_precision == "bf16" and options.num_processes == 8
    if name == "zero3":
        assert options.zero_stage == 3 and defaults.deepspeed_config["zero3_save_16bit_model"]
        return
    for variable, value in prepare_multi_gpu_env(options).items():
        monkeypatch.setenv(variable, value)
    plugin, model = FullyShardedDataParallelPlugin(), recordings["qwen3"].model
    plugin.set_auto_wrap_policy(model)
    kinds = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert plugin.fsdp_version == 2 and {kind.__name__ for kind in kinds} == set(model._no_split_modules)


def test_python_of_the_training_guide_runs(recordings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorded_image(60, 40, 1).save("photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.DOTALL)
    script = "\n".join(blocks).replace("weights/navil-2b", str(recordings["internlm2"].folder))
    names = {}
    exec(compile(script, "docs/training.md", "exec"), names)
    assert names["model"].language_model.layers[0].self_attn.text.q_proj.weight.grad.abs().sum() > 0
    assert "pixel_values" in next(iter(names["trainer"].get_train_dataloader()))
