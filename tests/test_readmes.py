"""The READMEs hold together: links lead somewhere, and the Chinese one says what the English one says."""

import re

import pytest
from conftest import ROOT

READMES = ["README.md", "README.zh.md", "examples/README.md", "examples/evaluation/README.md", "recipes/README.md"]


@pytest.mark.parametrize("name", READMES)
def test_relative_links_lead_to_files(name):
    path = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    assert [link for link in local if not (path.parent / link).exists()] == []


def test_chinese_commands_are_the_english_ones():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in READMES[:2])
    commands = [
        line.split("#")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", chinese, flags=re.DOTALL)
        for line in block.splitlines()
    ]
    assert commands and [line for line in commands if line and line not in english] == []


def test_both_have_the_same_sections_tables_and_calls():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in READMES[:2])

    def outline(text: str) -> list[str]:
        guarantees = text.find("\n| guarantee |")  # a table that the Chinese one sums up
        text = text if guarantees < 0 else text[:guarantees] + text[text.index("Tried without") :]
        calls = [re.findall(r"\w+\(", block) for block in re.findall(r"```(?:python|py)\n(.*?)```", text, flags=re.S)]
        return re.findall(r"^(?:##+ |\|---)", text, flags=re.M) + calls

    assert outline(chinese) == outline(english)


def test_published_numbers_are_the_same_in_both():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in READMES[:2])
    rows = [
        line
        for line in english.splitlines()
        if re.match(r"\| (Qwen2.5|InternVL|EVEv2|SAIL|NaViL-\dB \| \d+\.\dB)", line)
    ]
    assert len(rows) == 6 and all(row in chinese for row in rows)
