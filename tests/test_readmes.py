"""The documents hold together: links lead somewhere, named tests exist, Python runs, both READMEs say the same."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, recorded_image
from transformers import GenerationMixin

READMES = ("README.md", "README.zh.md")
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "*/README.md", "examples/evaluation/README.md")
    for path in ROOT.glob(pattern)
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def body(name: str) -> str:
    """A document without its metadata."""
    return re.sub(r"\A---\n.*?\n---\n", "", read(name), flags=re.DOTALL)


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and the Hub make them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_and_headings(name):
    folder, text = (ROOT / name).parent, read(name)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = folder / path if path else ROOT / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", [*READMES, "recipes/README.md"])
def test_readmes_have_at_most_250_lines(name):
    assert len(read(name).splitlines()) <= 250


def test_both_readmes_have_the_same_commands():
    def commands(name: str) -> list[str]:
        lines = "".join(code_blocks(read(name), "bash")).splitlines()
        return [line.split(" #")[0].strip() for line in lines]

    english, chinese = map(commands, READMES)
    assert english and chinese == english


def test_both_readmes_have_the_same_sections_tables_and_calls():
    def outline(name: str) -> list[str]:
        calls = [call for block in code_blocks(read(name), "python") for call in re.findall(r"\w+\(", block)]
        return re.findall(r"^(?:##+ |\|---.*|- )", body(name), flags=re.MULTILINE) + calls

    english, chinese = map(outline, READMES)
    assert english and chinese == english


def test_both_readmes_have_the_same_numbers_in_their_tables():
    def numbers(name: str) -> list[list[str]]:
        rows = re.findall(r"^\|.*", read(name), flags=re.MULTILINE)
        return [re.findall(r"\d[\d.,]*\d|\d", re.sub(r"\]\([^)]*\)", "", row)) for row in rows]

    english, chinese = map(numbers, READMES)
    assert any(english) and chinese == english


def test_tests_named_in_the_guarantees_exist():
    named = set(re.findall(r"`(test_\w+)`", read("docs/guarantees.md")))
    defined = re.findall(r"def (test_\w+)", "".join(path.read_text() for path in ROOT.glob("tests/test_*.py")))
    assert named and named - set(defined) == set()


def test_python_of_the_readme_runs(recordings, tmp_path, monkeypatch):
    folder = recordings["internlm2"].folder
    monkeypatch.chdir(tmp_path)
    Path("examples").mkdir()
    for name in ("cat.jpg", "chart.png", "shapes.png"):  # the README's pictures, small
        recorded_image(60, 40, 1).save(Path("examples", name))
    generate = GenerationMixin.generate
    monkeypatch.setattr(  # random weights do not end an answer
        GenerationMixin, "generate", lambda *args, **settings: generate(*args, **settings | {"max_new_tokens": 2})
    )
    script = "\n".join(code_blocks(read("README.md"), "python"))
    assert '"weights/navil-2b"' in script and "bfloat16" in script
    script = script.replace("weights/navil-2b", str(folder)).replace("bfloat16", "float32")
    exec(compile(script, "README.md", "exec"), {})


def test_parameters_are_the_documented_ones(capsys):
    [script] = code_blocks(read("docs/architecture.md"), "python")
    exec(compile(script, "docs/architecture.md", "exec"), {})
    assert capsys.readouterr().out.strip() == script.split("# ")[-1].strip()


@pytest.mark.parametrize("name", READMES)
def test_the_first_answer_shown_is_recorded_and_true(name):
    image = re.findall(r'<img src="([^"]+)"', read(name))[0]
    question, answer = re.findall(r"^\*\*(.+?)\*\* `(.+)`", read(name), flags=re.MULTILINE)[0]
    recorded = json.loads(read("examples/answers.json"))  # tests/test_tiny.py compares the model with it
    assert {"image": image, "question": question, "true": answer, "answer": answer} in recorded
    assert f'--image {image} --question "{question}"' in read(name)
