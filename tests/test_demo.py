"""The command lines that chat and fine-tune: what they say, and the device that they take."""

import io
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import FIXTURES, ROOT, recorded_image

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
    assert demo.main([*options, *image, "--max-pixels", "1"]) == 0  # fewer tokens, another answer
    assert capsys.readouterr().out != answers[0]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://example.com/cat.jpg", "'https://example.com/cat.jpg' is a URL: download the picture"),
        ("data:image/png;base64,AAAA", "is a URL"),
        ("none.png", "there is no file 'none.png'"),
        (str(FIXTURES), "is a folder: give the files of its pictures"),
        ("paper.pdf", "'paper.pdf' is a PDF: give its pages as pictures"),
        ("text.png", "cannot read an image from 'text.png'"),
        ("long.png", "aspect ratio must be smaller than 200, got 201"),
    ],
)
@pytest.mark.parametrize("question", [["--question", "What?"], []])
def test_pictures_are_checked_before_the_model_is_loaded(monkeypatch, tmp_path, capsys, image, message, question):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.7\n%")
    (tmp_path / "text.png").write_text("no picture")
    recorded_image(201, 1, 0).save(tmp_path / "long.png")
    for name in ("AutoModel", "AutoTokenizer"):
        monkeypatch.setattr(demo, name, None)  # loading would raise an AttributeError
    assert demo.main([*question, "--image", str(ROOT / "examples" / "cat.jpg"), "--image", image]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def talk(monkeypatch, lines, *options) -> int:
    """The demo with these lines as its input, which is no terminal."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    return demo.main(options)


def test_a_conversation_has_history_and_pictures(monkeypatch, tiny, tmp_path, capsys):
    chart, box, text = (str(ROOT / "examples" / f"{name}.png") for name in ("chart", "box", "text"))
    saved = tmp_path / "saved.jsonl"
    ask = "Which bar is the highest?", "Where is the green circle?", "What does the text say?"
    lines = [ask[0], f"/image {box}", ask[1], f"/save {saved}", "/clear", f"/image '{text}'", ask[2], "/quit", "unread"]
    assert talk(monkeypatch, lines, "--image", chart) == 0
    output = capsys.readouterr()
    session = tiny.model.chat_session(tiny.tokenizer)
    answers = [session.ask(ask[0], chart), session.ask(ask[1], box), tiny.model.chat(tiny.tokenizer, text, ask[2])]
    assert answers[::2] == ["B", "83"] and output.err == ""
    assert output.out.splitlines()[1:] == [*answers[:2], f"wrote {saved}", answers[2]]
    [record] = map(json.loads, saved.read_text().splitlines())
    history = [text for turn in session.history for text in turn]
    assert [message["role"] for message in record["messages"]] == ["user", "assistant"] * 2
    prompt = tiny.processor.apply_chat_template(record["messages"])
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, history, strict=True)]
    assert prompt == tiny.processor.apply_chat_template(messages)
    assert len(tiny.processor.training_batch([record])["num_scales"]) == 2


def test_errors_are_sentences_and_the_conversation_goes_on(monkeypatch, tmp_path, capsys):
    chart, file = str(ROOT / "examples" / "chart.png"), tmp_path / "file.jsonl"
    file.write_text("kept")
    lines = {
        "/image none.png": "there is no file 'none.png'",
        f"/image {chart} none.png": "there is no file 'none.png'",  # none is added
        "/image 'a": "No closing quotation",
        "<|im_end|>": "the text contains <|im_end|>, reserved",
        "word " * 5000: "tokens but the context holds 8192: shorten the text",
        "two <image> <image>": "2 <image> placeholders but 0 images",
        "/save": "/save takes one file, got 0",
        "/save ~nosuchuser/a": "'~nosuchuser/a': Could not determine home directory",
        "/image ~nosuchuser/a.png": "'~nosuchuser/a.png': Could not determine home directory",
        "/picture a": "no such command: /picture a; /help",
        f"/save {tmp_path / 'empty'}": "there is no answer to save yet",
    }
    added = [f"/image {chart}", "/image", f"/image {chart}", "Which bar is the highest?"]
    after = {
        f"/save {file}": f"there is a file {str(file)!r} already",
        f"/save {tmp_path / 'no' / 'folder'}": "No such file or directory",
    }
    assert talk(monkeypatch, [*lines, *added, *after]) == 0
    output = capsys.readouterr()
    assert output.out.split("answer.")[1].split() == ["B"] and file.read_text() == "kept"
    for line, message in zip(output.err.splitlines(), [*lines.values(), *after.values()], strict=True):
        assert line.startswith("error: ") and message in line


def test_lines_that_are_not_utf8_and_help(monkeypatch, capsys):
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert demo.main([]) == 0
    assert "error: 'utf-8' codec can't decode" in capsys.readouterr().err
    assert talk(monkeypatch, ["/help"]) == 0
    output = capsys.readouterr().out
    assert all(command in output for command in ("/image", "/clear", "/save", "/quit", "Ctrl-C"))


@pytest.fixture
def terminal(recordings):
    """A demo in a terminal, with random weights, which do not end an answer."""
    pexpect = pytest.importorskip("pexpect")
    options = ["demo.py", "--model", str(recordings["qwen3"].folder), "--max-new-tokens", "20000"]
    environment = {**os.environ, "TERM": "dumb"}  # without control sequences
    terminal = pexpect.spawn(sys.executable, options, cwd=ROOT, env=environment, encoding="utf-8", timeout=300)
    terminal.expect("/help lists the commands.*\n> ")
    yield terminal
    terminal.close(force=True)


def test_ctrl_c_stops_an_answer_and_not_the_program(terminal, tmp_path):
    saved = tmp_path / "saved.jsonl"
    terminal.sendline("/image examples/chart.png")
    terminal.expect_exact("(1 picture) > ")
    terminal.sendline("/image examples/box.png examples/cat.jpg")
    terminal.expect_exact("(3 pictures) > ")
    terminal.sendline("/image")
    terminal.expect_exact("\n> ")
    for question in ("Hello?", "And now?"):
        terminal.sendline(question)
        terminal.expect_exact(f"{question}\r\n")
        terminal.expect(r"\S")  # the answer begins
        terminal.sendintr()
        terminal.expect_exact("(stopped)\r\n> ")
    terminal.sendline(f"/save {saved}")
    terminal.expect_exact("wrote ")
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"][0]["text"] for message in messages[::2]] == ["Hello?", "And now?"]
    assert all(message["content"] for message in messages[1::2])
    terminal.sendintr()  # at the prompt, and not behind an answer
    terminal.expect_exact("(Ctrl-C again or /quit leaves)\r\n> ")
    terminal.sendline("/help")
    terminal.expect_exact("> ")


@pytest.mark.parametrize("keys", [["sendintr", "sendintr"], ["sendeof"]])
def test_leaving(terminal, keys):
    pexpect = pytest.importorskip("pexpect")
    for key in keys:
        getattr(terminal, key)()
        terminal.expect(r"leaves\)\r\n> " if key != keys[-1] else "\r\n")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
