"""Tokenizers of released checkpoints and of text LLMs as `NaViLTokenizer`s."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, Qwen2TokenizerFast

from checkpoint_files import preview, read_json, unreadable, write_json
from checkpoint_layouts import require
from navil import tokenization_navil as tokenization

TURN_TOKENS = ("<|im_start|>", tokenization.END_OF_TURN)
TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
SENTENCEPIECE_NAME = "tokenizer.model"


@dataclass
class SourceTokenizer:
    """What a tokenizer's files say, whatever their kind."""

    backend: Tokenizer
    tokens: dict[str, str | None]  # bos_token, eos_token, unk_token, pad_token
    extra: list[str] = field(default_factory=list)  # further special tokens
    template: str = "qwen3-chat"
    spaces_between_special_tokens: bool = False


def convert_tokenizer(source: Path, template: str | None = None, system_message: str | None = None) -> Any:
    """The tokenizer of a released folder as a `NaViLTokenizer`.

    Args:
        source: folder that `read_tokenizer` takes.
        template: name of the chat template; None means InternLM2's for SentencePiece and Qwen3's otherwise.
        system_message: default system message; None means the released one.

    Raises:
        ValueError: no tokenizer files, tokens whose ids do not come out as declared, special tokens that are not in
            the vocabulary, or missing image tokens.
    """
    with unreadable(source / "tokenizer_config.json"):
        tokenizer = read_tokenizer(source)
        special = [token for token in (*tokenizer.tokens.values(), *tokenizer.extra) if token is not None]
        unknown = [token for token in special if tokenizer.backend.token_to_id(token) is None]
        if unknown:
            raise ValueError(f"special tokens that are not in the vocabulary of {source}: {preview(unknown)}")
        return navil_tokenizer(tokenizer, template, system_message)


def check_ids(tokenizer: Any, rows: int) -> None:
    """Raises a ValueError for tokens outside of an embedding table."""
    outside = [f"{token} is {token_id}" for token, token_id in tokenizer.get_vocab().items() if token_id >= rows]
    if outside:
        raise ValueError(f"token ids outside the {rows} rows of the embedding: {preview(outside)}")


def extended_tokenizer(tokenizer: SourceTokenizer, template: str, system_message: str) -> Any:
    """A text LLM's tokenizer as a `NaViLTokenizer`, with the image tokens and the chat template's own."""
    known = tokenizer.backend.get_vocab()
    missing = [token for token in (*TURN_TOKENS, *tokenization.IMAGE_TOKENS) if token not in known]
    tokenizer.backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in missing])
    tokenizer.extra += [token for token in missing if token not in tokenizer.extra]
    if tokenizer.backend.encode("").tokens == ["<|im_start|>"]:  # a chat begins with it anyway
        tokenizer.backend.post_processor = None
    return navil_tokenizer(tokenizer, template, system_message)


def navil_tokenizer(source: SourceTokenizer, template: str | None, system_message: str | None) -> Any:
    """Without the truncation and padding that a `tokenizer.json` may have kept from one call, which would cut prompts.

    Special tokens are matched in the text as typed: behind a normalizer other characters, such as full-width ones
    under NFKC, would become control tokens.
    """
    backend = json.loads(source.backend.to_str()) | {"truncation": None, "padding": None}
    for token in backend["added_tokens"]:
        token["normalized"] = token["normalized"] and not token["special"]
    # Batches need some padding token; what stands there is masked.
    padding = source.tokens["pad_token"] or source.tokens["eos_token"] or tokenization.END_OF_TURN
    optional = {} if system_message is None else {"system_message": system_message}
    return tokenization.NaViLTokenizer(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        template=template or source.template,
        spaces_between_special_tokens=source.spaces_between_special_tokens,
        additional_special_tokens=source.extra,
        **{role: token for role, token in (source.tokens | {"pad_token": padding}).items() if token is not None},
        **optional,
    )


def read_tokenizer(source: Path) -> SourceTokenizer:
    """The tokenizer of a folder.

    Args:
        source: folder with `tokenizer.model` (InternLM2's SentencePiece), `tokenizer.json`, or `vocab.json` and
            `merges.txt` (Qwen's), and their `tokenizer_config.json`.

    Raises:
        ValueError: no tokenizer files, or tokens whose ids do not come out as declared.
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
        require(settings, "add_eos_token", [False], False)
        backend, defaults = sentencepiece_backend(source / SENTENCEPIECE_NAME, settings.get("add_bos_token", True))
    elif (source / "tokenizer.json").is_file():
        content = read_json(source / "tokenizer.json")
        with unreadable(source / "tokenizer.json"):
            backend = Tokenizer.from_str(json.dumps(content))
        check_declared(backend, {token["content"]: token["id"] for token in content.get("added_tokens") or ()})
    elif (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
        with unreadable(source / "vocab.json"):
            backend = Qwen2TokenizerFast.from_pretrained(source).backend_tokenizer
    else:
        raise ValueError(f"{source} has neither tokenizer.model, tokenizer.json nor vocab.json with merges.txt")
    add_declared_tokens(backend, declared_tokens(source, settings))
    extra = special.get("additional_special_tokens") or settings.get("additional_special_tokens") or []
    return SourceTokenizer(
        backend,
        tokens={
            role: token_text(special.get(role) or settings.get(role) or defaults.get(role))
            for role in ("bos_token", "eos_token", "unk_token", "pad_token")
        },
        extra=[token_text(token) for token in extra],
        template="internlm2-chat" if is_sentencepiece else "qwen3-chat",
        spaces_between_special_tokens=bool(settings.get("spaces_between_special_tokens", is_sentencepiece)),
    )


def read_gguf_tokenizer(path: Path, config: dict[str, Any]) -> SourceTokenizer:
    """The tokenizer in a GGUF file, as transformers reads it.

    Args:
        config: the model's, which has the ids of the special tokens; the tokenizer's own may name others.
    """
    with unreadable(path):
        backend = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    roles = {role: config.get(f"{role}_id") for role in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokens = {role: None if token_id is None else backend.id_to_token(token_id) for role, token_id in roles.items()}
    return SourceTokenizer(backend, tokens)


def begins_with_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def check_template(tokenizer: Any) -> None:
    """Raises a ValueError unless a `NaViLTokenizer`'s chat template is one of the released ones."""
    template, system_message = (tokenizer.init_kwargs[name] for name in ("template", "system_message"))
    if tokenizer.chat_template != tokenization.chat_template(template, system_message, begins_with_bos(tokenizer)):
        raise ValueError(f"the chat template is not {template!r} as released; the released layout has no other")


def export_tokenizer(tokenizer: Any, backbone: str, sentencepiece: Path, folder: Path) -> None:
    """Writes a `NaViLTokenizer` as the files of a released one.

    Args:
        backbone: the released LLM, whose tokenizer class is named.
        sentencepiece: where the SentencePiece model lies that the tokenizer came from, if there is one.
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
    if backbone == "internlm2" and sentencepiece.is_file():
        saved |= {
            "tokenizer_class": "InternLM2Tokenizer",
            "add_bos_token": begins_with_bos(tokenizer),
            "add_eos_token": False,
        }
        shutil.copy(sentencepiece, folder / SENTENCEPIECE_NAME)
        (folder / "tokenizer.json").unlink()
    else:
        saved["tokenizer_class"] = "Qwen2Tokenizer" if backbone == "qwen3" else "PreTrainedTokenizerFast"
        if backbone == "qwen3":
            tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for the slow tokenizer
    write_json(folder / "tokenizer_config.json", saved)


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
        # A token that is known already keeps its id; the call then only sets its flags.
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    check_declared(backend, {token.content: token_id for token_id, token in declared.items()})


def check_declared(backend: Tokenizer, declared: dict[str, int]) -> None:
    for token, token_id in declared.items():
        if backend.token_to_id(token) != token_id:
            raise ValueError(f"token {token!r} has id {backend.token_to_id(token)}, declared as {token_id}")


def sentencepiece_backend(path: Path, add_bos: bool) -> tuple[Tokenizer, dict[str, str]]:
    """A SentencePiece BPE model with byte fallback as a `tokenizers` pipeline, and the special tokens it names.

    Raises:
        ValueError: not a BPE model with the identity normalizer and byte fallback, which InternLM2's is.
    """
    from sentencepiece import sentencepiece_model_pb2  # only this format needs it

    with unreadable(path):
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    kind = model.trainer_spec.ModelType.Name(model.trainer_spec.model_type)
    if kind != "BPE" or not model.trainer_spec.byte_fallback:
        raise ValueError(
            f"{path.name} is a {kind} model, byte_fallback={model.trainer_spec.byte_fallback}; need BPE, True"
        )
    spec = model.normalizer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces or not spec.escape_whitespaces:
        raise ValueError(f"{path.name} normalizes its input ({spec.name}); only the identity is supported")

    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    piece_type = model.SentencePiece.Type
    text_types = (piece_type.NORMAL, piece_type.USER_DEFINED)
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type in text_types}
    unknown = next(piece.piece for piece in model.pieces if piece.type == piece_type.UNKNOWN)
    backend = Tokenizer(
        models.BPE(vocabulary, sentencepiece_merges(scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if spec.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", left=1)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    controls = [piece.piece for piece in model.pieces if piece.type in (piece_type.CONTROL, piece_type.UNKNOWN)]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in controls])
    if add_bos:
        bos = model.trainer_spec.bos_piece
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    spec = model.trainer_spec
    return backend, {"bos_token": spec.bos_piece, "eos_token": spec.eos_piece, "unk_token": spec.unk_piece}


def sentencepiece_merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score of the result first, as SentencePiece picks them."""
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, -cut, left, right))
    return [(left, right) for _, _, left, right in sorted(merges)]
