"""recipes.paper: the paper's numbers, and the way from a text LLM over three stages to answers about pictures."""

import json
from pathlib import Path

import pytest
import torch
from conftest import load_model
from safetensors.torch import load_file

from recipes.paper import __main__ as paper
from recipes.paper import smoke

NUMBERS = {  # arXiv 2510.08565, section 4.2, Tables 7 and 8
    "s1.1": (500e6, 4096, 5e-5, "constant_with_warmup", 200, 0.05),
    "s1.2": (185e6, 12188, 5e-5, "constant_with_warmup", 200, 0.1),
    "s2": (68e6, 24576, 2e-5, "cosine", 0, 0.01),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("paper") / "smoke"
    return folder, smoke.run(folder)  # `verify` is a part of it


def run_stage(folder: Path, *words: object) -> int:
    """S2 on the instructions of the smoke run."""
    needed = ("--model", folder / "s2", "--data", folder / "instructions.json", "--output", folder / "more")
    return paper.main(["s2", *map(str, (*needed, *words))])


@pytest.mark.parametrize("name", NUMBERS)
def test_stages_have_the_papers_numbers(name, tmp_path):
    options, flags = paper.build_parser().parse_known_args(
        [name, "--model", "m", "--data", "d", "--output", str(tmp_path), "--save_steps", "7", "--bf16", "false"]
    )
    stage = paper.read_stage(options)
    arguments = paper.training_arguments(options, stage["arguments"], flags, steps=9)
    schedule = (arguments.lr_scheduler_type.value, arguments.warmup_steps)
    numbers = (stage["samples"], stage["max_patches"], arguments.learning_rate, *schedule, arguments.weight_decay)
    assert numbers == NUMBERS[name] and stage["row_length"] == 16384 and stage["stage"] == name
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.9, 0.95, 1e-8)
    assert stage["arguments"]["bf16"] is True and (arguments.bf16, arguments.save_steps) == (False, 7)
    assert (arguments.max_steps, arguments.gradient_accumulation_steps) == (9, 256)


def test_model_answers_after_all_stages(trained):
    assert trained[1] == {color: color for color in smoke.COLORS}


def test_each_stage_trains_its_parameters_on_its_schedule(trained):
    folder, _ = trained
    source, expected_rates = "navil", {"s1.1": [0, 1, 1], "s1.2": [0, 1, 1], "s2": [0, 1, 0]}
    for stage in NUMBERS:
        output = stage.replace(".", "")
        before, after = (load_file(folder / name / "model.safetensors") for name in (source, output))
        model = load_model(folder / output)
        model.set_training_stage(stage)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and changed <= trainable
        if stage != "s1.1":  # its images have text around them
            assert any(".self_attn.text." in name for name in changed)
        state = json.loads((folder / output / "trainer_state.json").read_text())
        rates = [row["learning_rate"] / 3e-3 for row in state["log_history"] if "loss" in row]
        assert [rates[0], rates[2], rates[-1]] == pytest.approx(expected_rates[stage], abs=0.01)
        assert model.config.max_dynamic_patch == 256
        source = output


def test_steps_follow_from_the_scale(trained, capsys):
    assert paper.count_steps(500e6, 1000, 256, 16384) == 119209  # 500 billion tokens
    options = ("--scale", "1e-6", "--global-batch", "8", "--row-length", "512", "--max-patches", "256")
    assert run_stage(trained[0], *options, "--bf16", "false", "--save_strategy", "no") == 0
    processor = paper.load(str(trained[0] / "s2"), {"max_patches": 256, "stage": "s2"})[1]
    sources = [paper.Source(str(trained[0] / "instructions.json"))]
    steps = round(68 * paper.mean_tokens(sources, processor, 512) / (8 * 512))
    assert steps > 0 and f"s2: {steps} steps of 8 rows of 512 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-patches", 100), "at least 256 patches"),
        (("--steps", 1, "--global-batch", 0), "--global-batch must be a multiple of 1 processes, got 0"),
        (("--steps", 1, "--row-length", 8), "too long"),
    ],
)
def test_bad_options_are_named(trained, capsys, words, message):
    assert run_stage(trained[0], *words, "--bf16", "false") == 1
    assert message in capsys.readouterr().err


def test_unknown_flags_are_refused(trained, capsys):
    assert run_stage(trained[0], "--steps", 1, "--lerning_rate", 1) == 1
    assert "--lerning_rate" in capsys.readouterr().err
