"""Tokenizer, chat templates and image slots of NaViL (docs/architecture.md).

messages -> chat template -> prompt with one `<image>` per image
         -> image slots   -> prompt with one `<IMG_CONTEXT>` per visual token -> ids
"""

import inspect
import json
import math
import os
import re
import threading
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import chain, groupby
from typing import Any

from jinja2 import Environment
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

IMAGE_PLACEHOLDER = "<image>"
IMAGE_START_TOKEN, IMAGE_TOKEN, IMAGE_END_TOKEN = "<img>", "<IMG_CONTEXT>", "</img>"
END_OF_TURN = "<|im_end|>"
IMAGE_TOKENS = (
    *("</box>", "<box>", "<IMG_CONTEXT>", "</img>", "<img>", "</quad>", "<quad>", "</ref>", "<ref>"),
    *("<img_uncond>", "<IMG_LINE_BREAK>", "<IMG_FRAME_BREAK>"),
)
"""The 12 image tokens, in the row order of the released `special_token_embedding` table."""

SLOT_TOKENS = (IMAGE_START_TOKEN, IMAGE_TOKEN, "<IMG_LINE_BREAK>", "<IMG_FRAME_BREAK>", "</img>", "<img_uncond>")
"""Image tokens that only this package writes. The others (`<ref>`, `<box>`, `<quad>`) are grounding tokens, which texts
may contain."""

CONTROL_TOKENS = (*SLOT_TOKENS, "<|im_start|>", END_OF_TURN)
"""Tokens that structure a conversation and so may not come from a message's text."""

ROLES = ("system", "user", "assistant", "tool")

DEFAULT_SYSTEM_MESSAGE = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)

# Padding and truncation are state of the Rust tokenizer: while one thread changes them, no other may use it. A child
# process inherits the locks of Rust and Jinja in their current state, so a fork waits until no thread holds them.
_RUST_TOKENIZER = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_RUST_TOKENIZER.acquire,
        after_in_parent=_RUST_TOKENIZER.release,
        after_in_child=_RUST_TOKENIZER.release,
    )

# The Rust tokenizer keeps these from the last truncated or padded call, and transformers reads them as settings.
_CALL_SETTINGS = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id")

# The text between "assistant\n" and an answer, by the released name of the template.
ASSISTANT_PREFIXES = {"internlm2-chat": "", "Hermes-2": "", "qwen3-chat": "<think>\n\n</think>\n\n"}


def chat_template(template: str, system_message: str = DEFAULT_SYSTEM_MESSAGE, begins_with_bos: bool = False) -> str:
    """The Jinja chat template of a released template name.

    Its variables are `messages`, `add_generation_prompt` and `system_message`; in `qwen3-chat` also `enable_thinking`,
    which drops the empty thoughts from the generation prompt.

    Args:
        template: `internlm2-chat`, `Hermes-2` or `qwen3-chat`.
        system_message: default of the variable of that name, for a conversation without a system message; may be empty.
        begins_with_bos: whether the tokenizer, and so the template, puts the bos token in front of a text.

    Raises:
        ValueError: an unknown template name.
    """
    if template not in ASSISTANT_PREFIXES:
        raise ValueError(f"template must be one of {sorted(ASSISTANT_PREFIXES)}, got {template!r}")
    texts = (f"{IMAGE_PLACEHOLDER}\n", ASSISTANT_PREFIXES[template], system_message)
    image, prefix, default = (json.dumps(text, ensure_ascii=False) for text in texts)
    generation_prefix = prefix if prefix == '""' else f'("" if enable_thinking else {prefix})'
    return (
        ("{{- bos_token -}}" if begins_with_bos else "") + "{%- macro text(content) -%}"
        "{%- if content is string -%}{{- content -}}{%- else -%}"
        f"{{%- for part in content -%}}{{%- if part.type == 'image' -%}}{{{{- {image} -}}}}"
        "{%- else -%}{{- part.text -}}{%- endif -%}{%- endfor -%}"
        "{%- endif -%}{%- endmacro -%}"
        "{%- if not messages or messages[0].role != 'system' -%}"
        f"{{{{- '<|im_start|>system\\n' + system_message | default({default}) + '<|im_end|>' -}}}}"
        "{%- endif -%}"
        "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
        f"{{%- if message.role == 'assistant' -%}}{{{{- {prefix} -}}}}{{%- endif -%}}"
        "{{- text(message.content) + '<|im_end|>' -}}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' + {generation_prefix} -}}}}{{%- endif -%}}"
    )


def _without_system_message(template: str) -> str:
    """A `chat_template` without what differs between tokenizers: the bos token and the default system message."""
    return re.sub(r'default\("(?:[^"\\]|\\.)*"\)', "", template.removeprefix("{{- bos_token -}}"))


@lru_cache
def template_names(template: str) -> frozenset[str]:
    """The variables that a Jinja template can read: all names in its expressions except attributes."""
    tokens = [(kind, text) for _, kind, text in Environment().lex(template) if kind != "whitespace"]
    pairs = zip([("operator", ""), *tokens], tokens, strict=False)
    return frozenset(text for (_, before), (kind, text) in pairs if kind == "name" and before != ".")


def image_slot(scales: Iterable[tuple[int, int]], cell: int) -> str:
    """The text that stands for one image in a prompt: `<img>`, its scales row by row, `</img>`.

    Args:
        scales: (height, width) of each frame of each scale.
        cell: side of a merged cell, in the same unit.
    """
    frames = []
    for height, width in scales:
        row = IMAGE_TOKEN * math.ceil(width / cell) + "<IMG_LINE_BREAK>"
        frames.append(row * math.ceil(height / cell) + "<IMG_FRAME_BREAK>")
    return IMAGE_START_TOKEN + "".join(frames) + "</img>"


def expand_image_slots(
    texts: Sequence[str],
    images: Sequence[Sequence[tuple[int, int]]],
    cell: int,
    allow_control_tokens: bool = False,
) -> list[str]:
    """Replaces each `<image>` by an image's slot, in order over all texts.

    Args:
        texts: prompts with one `<image>` per image.
        images: scales of each image, as in `image_slot`.
        cell: side of a merged cell, in the unit of the scales.
        allow_control_tokens: accept texts that contain slot tokens already.

    Returns:
        The texts with slots, and with every `<image>` that `hide_placeholders` hid.

    Raises:
        ValueError: the numbers of placeholders and images differ, or a text contains a slot token.
    """
    if not allow_control_tokens:
        for text in texts:
            reject_tokens(text, SLOT_TOKENS)
    num_placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    if num_placeholders != len(images):
        raise ValueError(
            f"the text has {num_placeholders} {IMAGE_PLACEHOLDER} placeholders but {len(images)} images were given"
        )
    slots = iter([image_slot(scales, cell) for scales in images])
    filled = [re.sub(re.escape(IMAGE_PLACEHOLDER), lambda _: next(slots), text) for text in texts]
    return [text.replace(_HIDDEN_PLACEHOLDER, IMAGE_PLACEHOLDER) for text in filled]


# Stands for an `<image>` in a message's text until the slots are filled; no user's text has it, as it is not encodable.
_HIDDEN_PLACEHOLDER = "<image\udfff>"


def hide_placeholders(content: Any) -> Any:
    """A text, or messages of `list_conversations`, with every `<image>` in a text hidden from `expand_image_slots`."""
    if isinstance(content, str):
        return content.replace(IMAGE_PLACEHOLDER, _HIDDEN_PLACEHOLDER)
    if isinstance(content, list):
        return [hide_placeholders(entry) for entry in content]
    if isinstance(content, dict):
        return content | {key: hide_placeholders(content[key]) for key in ("content", "text") if key in content}
    return content


def reject_tokens(text: str, tokens: Sequence[str]) -> None:
    """Raises a ValueError if a text contains one of the tokens."""
    found = [token for token in tokens if token in text]
    if found:
        raise ValueError(
            f"the text contains {', '.join(found)}, reserved for the model's own use: {text[:80]!r};"
            " allow_control_tokens=True allows it"
        )


class NaViLTokenizer(PreTrainedTokenizerFast):
    """Fast tokenizer with the 12 image tokens, left padding and a chat template; threads may share it.

    Args:
        tokenizer_file, tokenizer_object: a `tokenizer.json` or a `tokenizers.Tokenizer` with the image tokens.
            Truncation and padding saved in it are dropped: they are settings of a call.
        template: released name of the chat template; ignored if `chat_template` is given and not a released one.
        system_message: default system message of that template.
        spaces_between_special_tokens: whether `decode` puts spaces around special tokens, as InternLM2's SentencePiece
            tokenizer does.

    Raises:
        ValueError: an image token is missing, or the template's name is unknown.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    slow_tokenizer_class = None

    def __init__(
        self,
        *args: Any,
        template: str = "internlm2-chat",
        system_message: str | None = None,
        spaces_between_special_tokens: bool = False,
        **kwargs: Any,
    ):
        system_message = DEFAULT_SYSTEM_MESSAGE if system_message is None else system_message
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        if isinstance(kwargs.get("extra_special_tokens"), list):  # as transformers 5 saves them and 4 cannot read them
            kwargs["additional_special_tokens"] = kwargs.pop("extra_special_tokens")
        kwargs |= {"template": template, "system_message": system_message}
        super().__init__(*args, spaces_between_special_tokens=spaces_between_special_tokens, **kwargs)
        self._drop_call_settings()
        self.system_message = system_message
        self.spaces_between_special_tokens = spaces_between_special_tokens
        released = [_without_system_message(chat_template(name)) for name in ASSISTANT_PREFIXES]
        given = self.chat_template
        if given is None or isinstance(given, str) and _without_system_message(given) in released:
            begins_with_bos = self.bos_token is not None and self("")["input_ids"][:1] == [self.bos_token_id]
            self.chat_template = chat_template(template, system_message, begins_with_bos)
        vocabulary = self.get_vocab()
        missing = [token for token in (*IMAGE_TOKENS, END_OF_TURN) if token not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer lacks the tokens {', '.join(missing)}")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `template` replaces the saved chat template.

        Raises:
            ValueError: a `system_message` for a chat template that does not use it.
        """
        if "template" in kwargs:
            kwargs.setdefault("chat_template", None)
        tokenizer = super().from_pretrained(*args, **kwargs)
        given = {"system_message": kwargs.get("system_message")}
        check_keywords(given, template_names(tokenizer.get_chat_template()), "a variable of the chat template")
        return tokenizer

    @classmethod
    def convert_to_native_format(cls, *, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Keeps the whole `tokenizer.json`, of which transformers 5 would use the vocabulary alone."""
        return kwargs

    def _drop_call_settings(self) -> None:
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        for name in _CALL_SETTINGS:
            self.init_kwargs.pop(name, None)

    # All uses of the Rust tokenizer that change its state or release the GIL go through these methods: encoding ends in
    # `_batch_encode_plus` in transformers 4 and in `_encode_plus` in 5.

    def _batch_encode_plus(self, batch_text_or_text_pairs: Any, *args: Any, **kwargs: Any) -> Any:
        check_encodable(batch_text_or_text_pairs)
        with _RUST_TOKENIZER:
            return super()._batch_encode_plus(batch_text_or_text_pairs, *args, **kwargs)

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        check_encodable(text)
        with _RUST_TOKENIZER:
            return super()._encode_plus(text, *args, **kwargs)

    def _add_tokens(self, *args: Any, **kwargs: Any) -> int:
        with _RUST_TOKENIZER:
            return super()._add_tokens(*args, **kwargs)

    def _save_pretrained(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        with _RUST_TOKENIZER:
            self._drop_call_settings()
            return super()._save_pretrained(*args, **kwargs)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        *args: Any,
        system_message: str | None = None,
        allow_control_tokens: bool = False,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, but special tokens in a message's text are refused: they would forge a turn or an image.

        Args:
            conversation: messages, or a batch of conversations; see `list_conversations`.
            system_message: for conversations without a system message; None means the tokenizer's.
            allow_control_tokens: accept special tokens in texts; grounding tokens (`<ref>`, `<box>`, `<quad>` and their
                ends) are always accepted.
            kwargs: the other keywords of transformers, and variables of the template.

        Raises:
            ValueError: no message, an unknown role or kind of content, a special token in a message, a variable that
                the template does not use, or a final message to continue that is blank or a part of `<|im_end|>`.
        """
        conversations = list_conversations(conversation)
        if not allow_control_tokens:
            reserved = self._reserved_tokens()
            reject_tokens(system_message or "", reserved)
            for message in chain.from_iterable(conversations):
                parts = content_parts(message)
                reject_tokens("".join(part["text"] if part["type"] == "text" else "\n" for part in parts), reserved)
        if continue_final_message:
            for messages in conversations:
                _check_continuable(messages[-1])
        variables = {name: value for name, value in kwargs.items() if name not in _KEYWORDS}
        variables |= {"tools": tools, "documents": documents, "system_message": system_message}
        if system_message is None:
            system_message = self.system_message
        with _RUST_TOKENIZER:
            known = template_names(self.get_chat_template(chat_template, tools))
            check_keywords(variables, known, "a setting, nor a variable of the chat template")
            conversation = conversations if _is_list(conversation[0]) else conversations[0]
            kwargs |= {"system_message": system_message, "continue_final_message": continue_final_message}
            return super().apply_chat_template(conversation, tools, documents, chat_template, *args, **kwargs)

    def _reserved_tokens(self) -> list[str]:
        """All special tokens of the vocabulary except grounding tokens."""
        special = {token.content for token in self.added_tokens_decoder.values() if token.special}
        special |= {*CONTROL_TOKENS, *self.all_special_tokens}
        return sorted(special - (set(IMAGE_TOKENS) - set(SLOT_TOKENS)))

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        is_spaced = kwargs.pop("spaces_between_special_tokens", None)
        if is_spaced is None:
            is_spaced = self.spaces_between_special_tokens
        with _RUST_TOKENIZER:
            if skip_special_tokens or not is_spaced:
                return super()._decode(token_ids, skip_special_tokens, **kwargs)
            # <s>, </s> and <unk> have a space in front, all other special tokens one on either side.
            marks = {self.bos_token_id, self.eos_token_id, self.unk_token_id}
            kinds = dict.fromkeys(self.all_special_ids, "special") | dict.fromkeys(marks, "mark")
            text, before = "", ""
            for kind, run in groupby([token_ids] if isinstance(token_ids, int) else token_ids, kinds.get):
                text += " " * (before == "special" or kind == "special" and before != "") + " " * (kind == "mark")
                if kind is None:
                    text += super()._decode(list(run), False, **kwargs)
                else:
                    text += ("" if kind == "mark" else " ").join(self.convert_ids_to_tokens(list(run)))
                before = kind
        return text


# Common variables of chat templates, and what `transformers serve` passes for videos.
_VARIABLES = ("tools", "documents", "enable_thinking", "system_message", "load_audio_from_video")
_KEYWORDS = inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters


def check_keywords(keywords: dict[str, Any], known: Collection[str], kind: str) -> None:
    """Raises a ValueError for unknown keywords, except None, and `_VARIABLES` that are False or empty."""
    given = {name: value for name, value in keywords.items() if value or value is not None and name not in _VARIABLES}
    unknown = [f"{name}={value!r:.40}" for name, value in given.items() if name not in known]
    if unknown:
        raise ValueError(f"unknown keyword {', '.join(unknown)}: not {kind}")


def check_encodable(texts: Any) -> None:
    """Raises a UnicodeEncodeError (a ValueError) for a text with a lone surrogate, as from malformed JSON."""
    if isinstance(texts, str):
        texts.encode()
    elif _is_list(texts):
        for text in texts:
            check_encodable(text)


def list_conversations(conversation: Any) -> list[list[dict[str, Any]]]:
    """A conversation, or a batch of them, as a list of conversations in a form that all chat templates understand.

    A message's content is a text or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image", ...}` with
    `image`, `path`, `url`, `base64` or `bytes`, or OpenAI's `{"type": "image_url", "image_url": ...}`, which becomes an
    image part. Entries that are None, as Arrow adds them, are dropped.

    Raises:
        ValueError: no message, an unknown role, or content of another kind.
    """
    batch = conversation if _is_list(conversation) and conversation and _is_list(conversation[0]) else [conversation]
    for messages in batch:
        if not _is_list(messages) or not messages:
            raise ValueError(f"expected a list with at least one message, got {messages!r:.80}")
    return [[_read_message(message) for message in messages] for messages in batch]


def _read_message(message: Any) -> dict[str, Any]:
    given = _drop_none(message)
    if given.get("role") not in ROLES:
        raise ValueError(f"a message is a dict whose role must be one of {ROLES}, got {message!r:.80}")
    content = given.get("content")
    if isinstance(content, str):
        return given
    return {**given, "content": [_read_part(part) for part in (content if _is_list(content) else [content])]}


def _read_part(part: Any) -> dict[str, Any]:
    given = _drop_none(part)
    kind = given.get("type")
    if kind == "text" and isinstance(given.get("text"), str):
        return given
    if kind not in ("image", "image_url"):
        raise ValueError(f"content is a text or a list of text and image parts; got {part!r:.80}")
    return {**given, "type": "image"}


def _drop_none(entries: Any) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value is not None} if isinstance(entries, dict) else {}


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def content_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message of `list_conversations`; a text is one part."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _check_continuable(message: dict[str, Any]) -> None:
    """Raises a ValueError for a text that transformers, which searches the prompt for it, would find elsewhere."""
    *_, text = ["", *(part["text"] for part in content_parts(message) if part["type"] == "text")]
    if (text.lstrip() + END_OF_TURN).rindex(text.strip()):
        raise ValueError(f"a message cannot be continued if its text is blank or part of {END_OF_TURN}: {text!r:.80}")


NaViLTokenizer.register_for_auto_class()
