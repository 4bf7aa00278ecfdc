"""TRL's trainers, where the package is installed: two versions in `tests/compat.sh`.

What a trainer logs is compared with what the model alone gives for the same conversations, and the scripts of
docs/trl.md run.
"""

import re

import pytest
import torch
from conftest import ROOT, conversation, load_model, load_tokenizer, recorded_image
from transformers import AutoProcessor

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

IS_OLD = int(trl.__version__.split(".")[0]) < 1
SETTINGS = {
    **{"use_cpu": True, "bf16": False, "optim": "sgd", "learning_rate": 1e-4, "lr_scheduler_type": "constant"},
    **{"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True},
}
SMALL, LARGE = recorded_image(64, 64, 0), recorded_image(120, 90, 1)
QUESTIONS = ("What is it?", "And this one, what is it?")
ANSWERS, WRONG = ("a wave", "it, as you say"), ("no", "nothing")
PICTURES = {
    "text": None,
    "large": [[LARGE], [LARGE]],
    "several": [[SMALL, LARGE], [LARGE, SMALL]],
    "in some": [[], [SMALL, LARGE]],
}
KINDS = pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)


@pytest.fixture
def folder(recordings):
    return recordings["qwen3"].folder


@pytest.fixture
def model(folder):
    return load_model(folder)


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def data_set(pictures, **columns):
    """Two rows with pictures and, for each column, its role and its two texts."""
    rows = [
        {name: [{"role": role, "content": texts[number]}] for name, (role, texts) in columns.items()}
        for number in range(2)
    ]
    if pictures is not None:
        rows = [{**row, "images": images} for row, images in zip(rows, pictures, strict=True)]
    return datasets.Dataset.from_list(rows)


def inputs_of(processor, question, answer, pictures):
    """Inputs of one conversation and how many of its tokens come before the answer."""
    messages = conversation(question, *pictures)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
    messages.append({"role": "assistant", "content": answer})
    whole = processor.apply_chat_template(messages, add_generation_prompt=False, **options)
    return dict(whole), prompt["input_ids"].shape[1]


def log_probabilities(model, inputs, start):
    """Of the tokens from `start` on, (L - start,)."""
    with torch.no_grad():
        logits = model(**inputs).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(1, inputs["input_ids"][0, start:, None])[:, 0]


def answers_log_probabilities(model, processor, answers, pictures, end=()):
    """Of each answer's tokens and the ids of `end` after them."""
    result = []
    for row in zip(QUESTIONS, answers, [[], []] if pictures is None else pictures, strict=True):
        inputs, start = inputs_of(processor, *row)
        ids = torch.cat([inputs["input_ids"], torch.tensor([end], dtype=torch.long)], dim=1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        result.append(log_probabilities(model.eval(), inputs, start))
    return result


def logged(trainer) -> dict[str, float]:
    """What one step logs."""
    trainer.train()
    return {name: float(value) for name, value in trainer.state.log_history[0].items()}


@KINDS
def test_sft_loss_is_that_of_the_answers(model, processor, tmp_path, pictures):
    expected = -torch.cat(answers_log_probabilities(model, processor, ANSWERS, pictures)).mean().item()
    rows = data_set(pictures, prompt=("user", QUESTIONS), completion=("assistant", ANSWERS))
    args = trl.SFTConfig(str(tmp_path), max_length=None, per_device_train_batch_size=2, **SETTINGS)
    model.config.output_logits = IS_OLD or None  # TRL 0.25 reads the logits
    trainer = trl.SFTTrainer(model=model, processing_class=processor, args=args, train_dataset=rows)
    assert logged(trainer)["loss"] == pytest.approx(expected, rel=1e-3)


def test_sft_with_the_collator_of_the_processor(model, processor, tmp_path):
    answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[0]}]}
    examples = [{"messages": [*conversation(QUESTIONS[0], LARGE), answer]}]
    with torch.no_grad():
        expected = model.eval()(**processor.training_batch(examples)).loss.item()
    options = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    parts = {
        "args": trl.SFTConfig(str(tmp_path), per_device_train_batch_size=1, **options, **SETTINGS),
        "train_dataset": datasets.Dataset.from_list(examples),
        "data_collator": processor.training_batch,
    }
    model.config.output_logits = IS_OLD or None
    trainer = trl.SFTTrainer(model=model, processing_class=processor, **parts)
    assert logged(trainer)["loss"] == pytest.approx(expected, rel=1e-3)


@KINDS
def test_dpo_compares_the_answers(folder, model, processor, tmp_path, pictures):
    if IS_OLD and pictures is not None:
        pytest.skip("before 1.0 DPO takes a model's pictures as one tensor of one size")
    end = [processor.tokenizer.eos_token_id] if IS_OLD else []  # which it appends
    expected = {}
    for name, answers in (("chosen", ANSWERS), ("rejected", WRONG)):
        of_tokens = answers_log_probabilities(model, processor, answers, pictures, end)
        expected[f"logps/{name}"] = torch.cat(of_tokens).sum().item() / len(of_tokens)
    columns = {"chosen": ("assistant", ANSWERS), "rejected": ("assistant", WRONG)}
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=load_model(folder),
        processing_class=processor.tokenizer if IS_OLD else processor,
        args=trl.DPOConfig(str(tmp_path), per_device_train_batch_size=2, **SETTINGS),
        train_dataset=data_set(pictures, prompt=("user", QUESTIONS), **columns),
    )
    log = logged(trainer)
    assert log["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-3)


@KINDS
def test_grpo_makes_rewarded_completions_likelier(folder, model, tmp_path, pictures):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, multi_scale=False)
    asked, completed = [], []

    def rewards(prompts, completion_ids, **columns):
        asked.extend(prompts)
        completed.extend(completion_ids)
        return [float(sum(ids) % 11) for ids in completion_ids]

    def log_probability(messages, completion):
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        start = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([completion])], dim=1)
        return log_probabilities(model.eval(), dict(inputs) | {"attention_mask": None}, start).mean()

    args = trl.GRPOConfig(
        str(tmp_path),
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 2},
        **({"max_prompt_length": None} if IS_OLD else {}),
        **{"max_completion_length": 4, **SETTINGS},
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = data_set(pictures, prompt=("user", QUESTIONS))
    trl.GRPOTrainer(
        model=model, processing_class=processor, reward_funcs=rewards, args=args, train_dataset=rows
    ).train()
    scores = torch.tensor([sum(ids) % 11 for ids in completed]).view(2, 2).float()  # two completions of each prompt
    advantages = (scores - scores.mean(1, keepdim=True)).flatten()
    assert advantages.abs().sum() > 0

    def objective():
        return (advantages * torch.stack(list(map(log_probability, asked, completed)))).sum()

    after = objective()
    model.load_state_dict(before)
    assert after > objective()


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_the_scripts_of_the_documentation_run(folder, model, tmp_path, monkeypatch, name):
    if IS_OLD and name == "DPO":
        pytest.skip("before 1.0 DPO takes a model's pictures as one tensor of one size")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trl.md").read_text(), flags=re.DOTALL)
    [script] = [block for block in blocks if f"{name}Trainer" in block]
    assert '"weights/navil-2b"' in script
    monkeypatch.chdir(tmp_path)
    LARGE.save("photo.jpg")
    variables = {}
    exec(compile(script.replace("weights/navil-2b", str(folder)), "docs/trl.md", "exec"), variables)
    history = variables["trainer"].state.log_history
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in history if "loss" in row)
    saved = load_model(tmp_path / "runs" / name.lower())
    weights, before = saved.state_dict(), model.state_dict()
    changed = [key for key in before if not torch.equal(weights[key], before[key])]
    assert any(".text." in key for key in changed) and any("vision_model" in key for key in changed)
    assert saved.chat(load_tokenizer(tmp_path / "runs" / name.lower()), LARGE, "What?", {"max_new_tokens": 2})
    if name == "GRPO":
        assert {row["reward"] > 0 for row in history if "reward" in row} == {True}
        assert AutoProcessor.from_pretrained("runs/grpo", trust_remote_code=True).multi_scale is False
