"""Tokenizers: a released checkpoint's or a text LLM's -> `NaViLTokenizer`, and back to released files."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, Qwen2TokenizerFast

from conversion.configs import check_supported
from conversion.files import preview, read_json, unreadable, write_json
from navil.tokenization_navil import END_OF_TURN, IMAGE_TOKENS, NaViLTokenizer, chat_template

TURN_TOKENS = ("<|im_start|>", END_OF_TURN)
TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
SENTENCEPIECE_NAME = "tokenizer.model"


@dataclass
class SourceTokenizer:
    """A tokenizer as its files describe it, in any of the formats that can be read."""

    backend: Tokenizer
    tokens: dict[str, str | None]  # by role, see `ROLES`
    extra: list[str] = field(default_factory=list)  # further special tokens
    template: str = "qwen3-chat"
    spaces_between_special_tokens: bool = False


def convert_tokenizer(source: Path, template: str | None = None, system_message: str | None = None) -> NaViLTokenizer:
    """The tokenizer of a released folder.

    Args:
        source: folder that `read_tokenizer` takes.
        template: name of the chat template; None means InternLM2's for SentencePiece and Qwen3's otherwise.
        system_message: default system message; None means the released one.

    Raises:
        ValueError: no tokenizer files, tokens whose ids differ from those declared, special tokens that are not in the
            vocabulary, or missing image tokens.
    """
    with unreadable(source / "tokenizer_config.json"):
        tokenizer = read_tokenizer(source)
        special = [token for token in (*tokenizer.tokens.values(), *tokenizer.extra) if token is not None]
        unknown = [token for token in special if tokenizer.backend.token_to_id(token) is None]
        if unknown:
            raise ValueError(f"special tokens that are not in the vocabulary of {source}: {preview(unknown)}")
        return navil_tokenizer(tokenizer, template, system_message)


def extended_tokenizer(tokenizer: SourceTokenizer, template: str, system_message: str) -> NaViLTokenizer:
    """A text LLM's tokenizer, with the image tokens and the chat template's tokens added if it lacks them."""
    known = tokenizer.backend.get_vocab()
    missing = [token for token in (*TURN_TOKENS, *IMAGE_TOKENS) if token not in known]
    tokenizer.backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in missing])
    tokenizer.extra += [token for token in missing if token not in tokenizer.extra]
    if tokenizer.backend.encode("").tokens == ["<|im_start|>"]:  # the chat template begins with it
        tokenizer.backend.post_processor = None
    return navil_tokenizer(tokenizer, template, system_message)


def navil_tokenizer(source: SourceTokenizer, template: str | None, system_message: str | None) -> NaViLTokenizer:
    """Drops saved truncation and padding, which would cut prompts, and matches special tokens before normalization.

    After a normalizer, other characters would become control tokens: full-width ones under NFKC, for example.
    """
    backend = json.loads(source.backend.to_str()) | {"truncation": None, "padding": None}
    for token in backend["added_tokens"]:
        token["normalized"] = token["normalized"] and not token["special"]
    # Batches need a padding token; any will do, as padding is masked.
    padding = source.tokens["pad_token"] or source.tokens["eos_token"] or END_OF_TURN
    settings = {**source.tokens, "pad_token": padding, "system_message": system_message}
    return NaViLTokenizer(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        template=template or source.template,
        spaces_between_special_tokens=source.spaces_between_special_tokens,
        additional_special_tokens=source.extra,
        **{name: value for name, value in settings.items() if value is not None},
    )


def check_ids(tokenizer: NaViLTokenizer, rows: int) -> None:
    """Raises a ValueError for tokens that an embedding table with this number of rows does not have."""
    outside = [f"{token} is {token_id}" for token, token_id in tokenizer.get_vocab().items() if token_id >= rows]
    if outside:
        raise ValueError(f"token ids outside the {rows} rows of the embedding: {preview(outside)}")


def read_tokenizer(source: Path) -> SourceTokenizer:
    """The tokenizer of a folder.

    Args:
        source: folder with `tokenizer.model` (InternLM2's SentencePiece), `tokenizer.json`, or `vocab.json` and
            `merges.txt` (Qwen's), and their `tokenizer_config.json`.

    Raises:
        ValueError: no tokenizer files, or tokens whose ids differ from those declared.
    """
    settings, special = (
        read_json(source / name) if (source / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    is_sentencepiece = (source / SENTENCEPIECE_NAME).is_file() and (
        settings.get("tokenizer_class") == "InternLM2Tokenizer" or not (source / "tokenizer.json").is_file()
    )
    defaults: dict[str, str] = {}
    if is_sentencepiece:
        check_supported(settings, {"add_eos_token": [False]})
        backend, defaults = read_sentencepiece(source / SENTENCEPIECE_NAME, settings.get("add_bos_token", True))
    else:
        backend = read_backend(source)
    add_declared_tokens(backend, declared_tokens(source, settings))
    extra = special.get("additional_special_tokens") or settings.get("additional_special_tokens") or []
    return SourceTokenizer(
        backend,
        tokens={role: token_text(special.get(role) or settings.get(role) or defaults.get(role)) for role in ROLES},
        extra=[token_text(token) for token in extra],
        template="internlm2-chat" if is_sentencepiece else "qwen3-chat",
        spaces_between_special_tokens=bool(settings.get("spaces_between_special_tokens", is_sentencepiece)),
    )


def read_backend(source: Path) -> Tokenizer:
    """`tokenizer.json`, or else `vocab.json` and `merges.txt`."""
    if (source / "tokenizer.json").is_file():
        content = read_json(source / "tokenizer.json")
        with unreadable(source / "tokenizer.json"):
            backend = Tokenizer.from_str(json.dumps(content))
        check_declared(backend, {token["content"]: token["id"] for token in content.get("added_tokens") or ()})
        return backend
    if not ((source / "vocab.json").is_file() and (source / "merges.txt").is_file()):
        raise ValueError(f"{source} has neither tokenizer.model, tokenizer.json nor vocab.json with merges.txt")
    with unreadable(source / "vocab.json"):
        return Qwen2TokenizerFast.from_pretrained(source).backend_tokenizer


def read_gguf_tokenizer(path: Path, config: dict[str, Any]) -> SourceTokenizer:
    """The tokenizer in a GGUF file, as transformers reads it.

    Args:
        config: the model's, which has the ids of the special tokens; those in the tokenizer may be wrong.
    """
    with unreadable(path):
        backend = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    ids = {role: config.get(f"{role}_id") for role in ROLES}
    tokens = {role: None if token_id is None else backend.id_to_token(token_id) for role, token_id in ids.items()}
    return SourceTokenizer(backend, tokens)


def token_text(token: str | dict[str, Any] | None) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise ValueError(f"a special token must be a text, got {token!r:.80}")
    return text


def declared_tokens(source: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by id, from `tokenizer_config.json` or else `added_tokens.json`."""
    declared = {
        int(token_id): AddedToken(token["content"], **{flag: token[flag] for flag in TOKEN_FLAGS if flag in token})
        for token_id, token in (settings.get("added_tokens_decoder") or {}).items()
    }
    if not declared and (source / "added_tokens.json").is_file():
        names = read_json(source / "added_tokens.json")
        declared = {token_id: AddedToken(name, normalized=False, special=True) for name, token_id in names.items()}
    return declared


def add_declared_tokens(backend: Tokenizer, declared: dict[int, AddedToken]) -> None:
    for _, token in sorted(declared.items()):
        # A known token keeps its id; the call only sets its flags.
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    check_declared(backend, {token.content: token_id for token_id, token in declared.items()})


def check_declared(backend: Tokenizer, declared: dict[str, int]) -> None:
    for token, token_id in declared.items():
        if backend.token_to_id(token) != token_id:
            raise ValueError(f"token {token!r} has id {backend.token_to_id(token)}, declared as {token_id}")


def read_sentencepiece(path: Path, add_bos: bool) -> tuple[Tokenizer, dict[str, str]]:
    """A SentencePiece BPE model with byte fallback as a `tokenizers` pipeline, and its special tokens by role.

    Raises:
        ValueError: not a BPE model with byte fallback and the identity normalizer, as InternLM2's is.
    """
    from sentencepiece import sentencepiece_model_pb2  # only this format needs it

    with unreadable(path):
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kind = trainer.ModelType.Name(trainer.model_type)
    if kind != "BPE" or not trainer.byte_fallback:
        raise ValueError(f"{path.name} is a {kind} model, byte_fallback={trainer.byte_fallback}; need BPE, True")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        raise ValueError(f"{path.name} normalizes its input ({normalizer.name}); only the identity is supported")

    types = model.SentencePiece.Type
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type in (types.NORMAL, types.USER_DEFINED)}
    controls = [piece.piece for piece in model.pieces if piece.type in (types.CONTROL, types.UNKNOWN)]
    unknown = next(piece.piece for piece in model.pieces if piece.type == types.UNKNOWN)
    backend = Tokenizer(
        models.BPE(vocabulary, sentencepiece_merges(scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if normalizer.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", left=1)] if normalizer.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in controls])
    bos = trainer.bos_piece
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return backend, {"bos_token": bos, "eos_token": trainer.eos_piece, "unk_token": trainer.unk_piece}


def sentencepiece_merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a third, in SentencePiece's order: the best score of the result first."""
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, -cut, left, right))
    return [(left, right) for _, _, left, right in sorted(merges)]


def begins_with_bos(tokenizer: NaViLTokenizer) -> bool:
    return tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def check_template(tokenizer: NaViLTokenizer) -> None:
    """Raises a ValueError unless a `NaViLTokenizer`'s chat template is one of the released ones."""
    template, system_message = (tokenizer.init_kwargs[name] for name in ("template", "system_message"))
    if tokenizer.chat_template != chat_template(template, system_message, begins_with_bos(tokenizer)):
        raise ValueError(f"the chat template is not {template!r} as released; the released layout has no other")


def export_tokenizer(tokenizer: NaViLTokenizer, backbone: str, sentencepiece: Path | None, folder: Path) -> None:
    """Writes a `NaViLTokenizer` as the files of a released one.

    Args:
        backbone: the released LLM, which decides the tokenizer class.
        sentencepiece: the SentencePiece model that the tokenizer came from, if it came from one.
    """
    tokenizer.save_pretrained(folder)
    saved = read_json(folder / "tokenizer_config.json")
    extra = saved.pop("extra_special_tokens", None)  # transformers 5's name for the additional ones
    if isinstance(extra, list):
        saved["additional_special_tokens"] = extra
    for name in ("auto_map", "template", "system_message", "chat_template"):
        saved.pop(name, None)
    saved["added_tokens_decoder"] = {
        str(token_id): {"content": token.content} | {flag: getattr(token, flag) for flag in TOKEN_FLAGS}
        for token_id, token in tokenizer.added_tokens_decoder.items()
    }
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if backbone == "qwen3":
        saved["tokenizer_class"] = "Qwen2Tokenizer"
        tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for the slow tokenizer
    elif sentencepiece is not None:
        saved |= {"tokenizer_class": "InternLM2Tokenizer", "add_eos_token": False}
        saved["add_bos_token"] = begins_with_bos(tokenizer)
        shutil.copy(sentencepiece, folder / SENTENCEPIECE_NAME)
        (folder / "tokenizer.json").unlink()
    else:
        saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", saved)
