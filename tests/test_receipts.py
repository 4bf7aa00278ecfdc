"""docs/receipts.md: its commands run, and the receipts that they draw say what the answers say."""

import json
import random
import re
import shlex

import pytest
from conftest import ROOT

from examples import finetune, receipts

REDUCED = {"draw": ["--train", "4", "--test", "2"], "--steps": ["--steps", "2"]}
PROGRAMS = {"examples/receipts.py": receipts.main, "examples/finetune.py": finetune.main}


def test_commands_of_the_guide_run_and_change_the_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(ROOT)
    guide = (ROOT / "docs" / "receipts.md").read_text()
    [block] = re.findall(r"```bash\n(.*?)```", guide, flags=re.DOTALL)
    tables = []
    for line in block.splitlines():
        _, program, *words = shlex.split(line.replace("runs/", f"{tmp_path}/"))
        added = [word for name, reduced in REDUCED.items() if name in words for word in reduced]
        capsys.readouterr()
        assert not PROGRAMS[program]([*words, *added])
        tables.append(capsys.readouterr().out)
    before, after = tables[1], tables[3]
    documented = re.findall(r"^\| (.+?) \| \d+ \| \d+ \|$", guide, flags=re.MULTILINE)
    for table in (before, after):
        rows = re.findall(r"^\| (.+?) \| (\d+) of (\d+) \|$", table, flags=re.MULTILINE)
        assert [name for name, *_ in rows] == documented and len(rows) == 5
        *questions, total = [(int(right), int(asked)) for _, right, asked in rows]
        assert all(asked == 2 for _, asked in questions) and total == tuple(map(sum, zip(*questions, strict=True)))
    assert (tmp_path / "receipts-lora" / "adapter" / "adapter_model.safetensors").is_file()


def test_answers_follow_from_the_receipt(tmp_path):
    receipts.write_receipts(tmp_path, {"train": 5}, seed=3)
    rng = random.Random(3)
    for number, record in enumerate(json.loads((tmp_path / "train.json").read_text())):
        receipt = receipts.make_receipt(rng)
        turns = [turn["value"] for turn in record["conversations"]]
        answers = dict(zip(turns[::2], turns[1::2], strict=True))
        assert turns[0].startswith("<image>\n") and record["image"] == f"train-{number:04}.png"
        answers = {question.removeprefix("<image>\n"): answer for question, answer in answers.items()}
        assert answers == receipts.ask(receipt)
        assert int(answers["How many items were bought?"]) == len(receipt.prices)
        cents = int(answers["What is the total?"].replace(".", ""))
        assert cents == round(sum(receipt.prices.values()) * 1.07)
        receipts.draw(receipt, rng)  # the generator goes on as it did
        rng.shuffle(list(receipts.ask(receipt).items()))


def test_only_right_answers_count(tmp_path):
    class Session:
        def ask(self, question, image):
            return receipts.ask(receipts.make_receipt(random.Random(3)))[question]

    class Model:
        def chat_session(self, tokenizer, settings):
            return Session()

    receipts.write_receipts(tmp_path, {"test": 2}, seed=3)
    results = receipts.score(Model(), None, tmp_path / "test.json")
    assert all(answers[0] for answers in results.values()) and not results["What is the total?"][1]
