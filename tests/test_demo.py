"""The command lines that chat and fine-tune: what they say, and the device that they take."""

import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, recorded_image

import demo
from examples import finetune


@pytest.mark.parametrize(("answer", "message"), [("", "(the model gave an empty answer)\n"), (" B", "")])
def test_an_empty_answer_is_said(monkeypatch, capsys, answer, message):
    model = types.SimpleNamespace(eval=lambda: model, to=lambda device: model, chat=lambda *_, **__: answer)
    monkeypatch.setattr(demo.AutoModel, "from_pretrained", lambda **_: model)
    assert demo.main(["--question", "What?"]) == 0
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("available", ["mps", "cuda", "cpu"])
def test_the_device_is_the_best_there_is(monkeypatch, tmp_path, available):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available == "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available == "cuda")
    dtype = torch.float32 if available == "cpu" else torch.bfloat16
    assert demo.best_device() == (available, dtype)
    monkeypatch.setattr(finetune, "PartialState", lambda cpu: types.SimpleNamespace(num_processes=1))
    options = finetune.settle(finetune.build_parser().parse_args(["--model", "m", "--output", str(tmp_path)]))
    assert (options.use_cpu, options.bf16) == (available == "cpu", available == "cuda")


def test_demo_streams_an_answer(recordings, tmp_path, capsys):
    recorded_image(120, 90, 0).save(tmp_path / "image.png")
    image = ["--image", str(tmp_path / "image.png")]
    model = str(recordings["internlm2"].folder)
    options = ["--model", model, "--question", "What is this?", "--max-new-tokens", "8"]
    finished = subprocess.run([sys.executable, ROOT / "demo.py", *options, *image], capture_output=True, timeout=300)
    assert finished.returncode == 0
    answers = [finished.stdout.decode()]
    for images in (image, [], image * 2):
        assert demo.main([*options, *images]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and all(answer.strip() for answer in answers)
    assert demo.main([*options, "--image", "none.png"]) == 1
    assert "cannot read an image from 'none.png'" in capsys.readouterr().err
