"""Tokenizer, chat templates and image slots of NaViL (reference §6).

messages -> chat template -> prompt with one `<image>` per image
         -> image slots   -> prompt with one `<IMG_CONTEXT>` per visual token -> ids
"""

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

IMAGE_PLACEHOLDER = "<image>"
IMAGE_START_TOKEN, IMAGE_TOKEN, IMAGE_END_TOKEN = "<img>", "<IMG_CONTEXT>", "</img>"
END_OF_TURN = "<|im_end|>"
IMAGE_TOKENS = (
    *("</box>", "<box>", "<IMG_CONTEXT>", "</img>", "<img>", "</quad>", "<quad>", "</ref>", "<ref>"),
    *("<img_uncond>", "<IMG_LINE_BREAK>", "<IMG_FRAME_BREAK>"),
)
"""The 12 image tokens, in the row order of the released `special_token_embedding` table (reference §4)."""

SLOT_TOKENS = (IMAGE_START_TOKEN, IMAGE_TOKEN, "<IMG_LINE_BREAK>", "<IMG_FRAME_BREAK>", "</img>", "<img_uncond>")
"""Image tokens that only the package writes; the others mark grounded answers and are content."""

CONTROL_TOKENS = (*SLOT_TOKENS, "<|im_start|>", END_OF_TURN)
"""Tokens that give a conversation its structure and so may not come from a message's text."""

ROLES = ("system", "user", "assistant", "tool")

DEFAULT_SYSTEM_MESSAGE = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)

# Padding and truncation are settings of the Rust tokenizer: while one thread changes them, no other may be at work.
_RUST_TOKENIZER = threading.RLock()

# What a template puts behind "assistant\n", in history and before a new answer.
ASSISTANT_PREFIXES = {"internlm2-chat": "", "Hermes-2": "", "qwen3-chat": "<think>\n\n</think>\n\n"}


def chat_template(template: str, system_message: str = DEFAULT_SYSTEM_MESSAGE, begins_with_bos: bool = False) -> str:
    """The Jinja chat template of a released template name.

    Args:
        template: `internlm2-chat`, `Hermes-2` or `qwen3-chat`.
        system_message: said when a conversation does not begin with a system message; may be empty.
        begins_with_bos: whether the tokenizer puts its bos token in front of a text; the template then does.

    Raises:
        ValueError: an unknown template name.
    """
    if template not in ASSISTANT_PREFIXES:
        raise ValueError(f"template must be one of {sorted(ASSISTANT_PREFIXES)}, got {template!r}")
    prefix = _jinja_string(ASSISTANT_PREFIXES[template])
    return (
        ("{{- bos_token -}}" if begins_with_bos else "") + "{%- macro text(content) -%}"
        "{%- if content is string -%}{{- content -}}"
        "{%- else -%}{%- for part in content -%}"
        f"{{%- if part.type == 'image' -%}}{{{{- {_jinja_string(IMAGE_PLACEHOLDER)} + '\\n' -}}}}"
        "{%- else -%}{{- part.text -}}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
        "{%- endmacro -%}"
        "{%- if not messages or messages[0].role != 'system' -%}"
        f"{{{{- '<|im_start|>system\\n' + {_jinja_string(system_message)} + '<|im_end|>' -}}}}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message.role + '\\n' -}}"
        f"{{%- if message.role == 'assistant' -%}}{{{{- {prefix} -}}}}{{%- endif -%}}"
        "{{- text(message.content) + '<|im_end|>' -}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' + {prefix} -}}}}{{%- endif -%}}"
    )


def _jinja_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def image_slot(grids: Iterable[Sequence[int]], merge_size: int) -> str:
    """Text of one image: `<img>`, its scales row by row, `</img>`.

    Args:
        grids: (frames, rows, columns) of each scale, in patches.
        merge_size: side of a merged cell, in patches.
    """
    frames = []
    for num_frames, rows, columns in grids:
        row = IMAGE_TOKEN * (columns // merge_size) + "<IMG_LINE_BREAK>"
        frames += [row * (rows // merge_size) + "<IMG_FRAME_BREAK>"] * num_frames
    return IMAGE_START_TOKEN + "".join(frames) + "</img>"


def expand_image_slots(
    texts: Sequence[str],
    grids: Sequence[Sequence[int]],
    num_scales: Sequence[int],
    merge_size: int,
    allow_control_tokens: bool = False,
) -> list[str]:
    """Puts the images' slots where the texts say `<image>`, in order over all texts.

    Args:
        texts: prompts with one `<image>` per image.
        grids: (scales, 3) frames, rows and columns in patches, all images' scales in a row.
        num_scales: (images,) how many of these scales belong to each image.
        merge_size: side of a merged cell, in patches.
        allow_control_tokens: let slot tokens through that are in a text already.

    Raises:
        ValueError: another number of placeholders than of images, scales that do not add up, or a slot token that
            is in a text already.
    """
    if not allow_control_tokens:
        for text in texts:
            reject_tokens(text, SLOT_TOKENS)
    if min(num_scales, default=0) < 0:
        raise ValueError(f"num_scales must not be negative, got {list(num_scales)}")
    if sum(num_scales) != len(grids):
        raise ValueError(f"num_scales adds up to {sum(num_scales)} scales but image_grid_thw has {len(grids)}")
    num_placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    if num_placeholders != len(num_scales):
        raise ValueError(
            f"the text has {num_placeholders} {IMAGE_PLACEHOLDER} placeholders but {len(num_scales)} images were given"
        )
    scale = iter(grids)
    slots = iter([image_slot([next(scale) for _ in range(count)], merge_size) for count in num_scales])
    return [re.sub(re.escape(IMAGE_PLACEHOLDER), lambda _: next(slots), text) for text in texts]


def put_images_in_front(question: str, num_images: int) -> str:
    """The question with one `<image>` line per image in front, unless it says itself where images go."""
    return question if IMAGE_PLACEHOLDER in question else f"{IMAGE_PLACEHOLDER}\n" * num_images + question


def reject_tokens(text: str, tokens: Sequence[str]) -> None:
    """Raises a ValueError when one of the tokens is typed in a text."""
    found = [token for token in tokens if token in text]
    if found:
        raise ValueError(f"the text contains {', '.join(found)}, reserved for the model's own use: {text[:80]!r}")


class NaViLTokenizer(PreTrainedTokenizerFast):
    """Fast tokenizer with the 12 image tokens, left padding and a chat template.

    Args:
        tokenizer_file, tokenizer_object: a `tokenizer.json` or a `tokenizers.Tokenizer` that knows the image tokens.
        template: released name of the chat template, used unless `chat_template` is given.
        system_message: default system message of that template.
        spaces_between_special_tokens: whether `decode` sets special tokens off by blanks, as InternLM2's
            SentencePiece tokenizer does.

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
        system_message: str = DEFAULT_SYSTEM_MESSAGE,
        spaces_between_special_tokens: bool = False,
        **kwargs: Any,
    ):
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(
            *args,
            template=template,
            system_message=system_message,
            spaces_between_special_tokens=spaces_between_special_tokens,
            **kwargs,
        )
        self.spaces_between_special_tokens = spaces_between_special_tokens
        if self.chat_template is None:
            begins_with_bos = self.bos_token is not None and self("")["input_ids"][:1] == [self.bos_token_id]
            self.chat_template = chat_template(template, system_message, begins_with_bos)
        vocabulary = self.get_vocab()
        missing = [token for token in (*IMAGE_TOKENS, END_OF_TURN) if token not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer lacks the tokens {', '.join(missing)}")

    @classmethod
    def convert_to_native_format(cls, *, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Constructor arguments: the whole `tokenizer.json`, where transformers 5 would take its vocabulary."""
        return kwargs

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, from several threads too.

        Raises:
            ValueError: something else than a text or (nested) lists of texts, or a text with a lone surrogate.
        """
        if text is not None:
            check_texts(text)
        with _RUST_TOKENIZER:
            return super().__call__(text, *args, **kwargs)

    def apply_chat_template(
        self,
        conversation: Any,
        *args: Any,
        allow_control_tokens: bool = False,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; a message's text may not contain a special token unless `allow_control_tokens`.

        The marks of a grounded answer (`<ref>`, `<box>`, `<quad>` and their ends) are content and always allowed.

        Raises:
            ValueError: no message, an unknown role or kind of content, a special token typed in a message, which
                would forge a turn or an image slot, or a final message to continue that is blank or cannot be told
                from the end of its turn.
        """
        conversations = list_conversations(conversation)
        texts = [text for messages in conversations for message in messages for text in _message_texts(message)]
        if not allow_control_tokens:
            reserved = self._reserved_tokens()
            for text in texts:
                reject_tokens(text, reserved)
        if continue_final_message:
            for messages in conversations:
                _check_continuable(messages[-1])
        return super().apply_chat_template(conversation, *args, continue_final_message=continue_final_message, **kwargs)

    def _reserved_tokens(self) -> list[str]:
        """Every special token of the vocabulary but the marks of a grounded answer."""
        marks = set(IMAGE_TOKENS) - set(SLOT_TOKENS)
        special = {token.content for token in self.added_tokens_decoder.values() if token.special}
        return sorted({*CONTROL_TOKENS, *special, *self.all_special_tokens} - marks)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> str:
        if spaces_between_special_tokens is None:
            spaces_between_special_tokens = self.spaces_between_special_tokens
        with _RUST_TOKENIZER:
            return self._decode_spaced(
                token_ids, skip_special_tokens, clean_up_tokenization_spaces, spaces_between_special_tokens, **kwargs
            )

    def _decode_spaced(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool | None,
        spaces_between_special_tokens: bool,
        **kwargs: Any,
    ) -> str:
        if skip_special_tokens or not spaces_between_special_tokens:
            return super()._decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)
        token_ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        # The document marks (<s>, </s>, <unk>) take a blank in front, all other special tokens one on either side.
        marks = {self.bos_token_id, self.eos_token_id, self.unk_token_id}
        apart = set(self.all_special_ids) - marks
        chunks = []
        for key, run in groupby(token_ids, lambda i: i if i in apart else None):
            if key is None:
                chunks.append(self._decode_run(list(run), marks, clean_up_tokenization_spaces, **kwargs))
            else:
                chunks += [self.convert_ids_to_tokens(token_id) for token_id in run]
        return " ".join(chunks)

    def _decode_run(self, token_ids: list[int], marks: set[int | None], *args: Any, **kwargs: Any) -> str:
        text, after_mark = "", False
        for is_mark, run in groupby(token_ids, lambda i: i in marks):
            if is_mark:
                text += " " * (not after_mark) + "".join(self.convert_ids_to_tokens(list(run)))
            else:
                text += super()._decode(list(run), False, *args, **kwargs)
            after_mark = is_mark
        return text


def check_texts(texts: Any) -> None:
    """Raises a ValueError for anything but texts, or lists of them, that can be written as UTF-8."""
    if isinstance(texts, list | tuple):
        for text in texts:
            check_texts(text)
        return
    if not isinstance(texts, str):
        raise ValueError(f"expected a text, got {type(texts).__name__}")
    try:
        texts.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has a lone surrogate {texts[error.start]!r} at character {error.start}") from error


def list_conversations(conversation: Any) -> list[list[dict[str, Any]]]:
    """A conversation, or a batch of them, as a list of conversations.

    Raises:
        ValueError: no message, an unknown role or something else than messages.
    """
    batch = conversation if _is_list(conversation) and conversation and _is_list(conversation[0]) else [conversation]
    for messages in batch:
        if not _is_list(messages) or not messages:
            given = "none" if _is_list(messages) else repr(messages)[:80]
            raise ValueError(f"expected at least one message, got {given}")
        for message in messages:
            if not isinstance(message, dict):
                raise ValueError(f"a message must be a dict of role and content, got {message!r:.80}")
            if message.get("role") not in ROLES:
                raise ValueError(f"a message's role must be one of {ROLES}, got {message.get('role')!r:.80}")
    return list(batch)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _message_texts(message: dict[str, Any]) -> Iterator[str]:
    """A message's texts; those that follow one another are one, as in the prompt."""
    for kind, parts in groupby(content_parts(message), lambda part: part["type"]):
        if kind == "text":
            yield "".join(part["text"] for part in parts)


def _check_continuable(message: dict[str, Any]) -> None:
    """transformers finds where to stop by searching the prompt for the message's last text."""
    texts = [part["text"] for part in content_parts(message) if part["type"] == "text"]
    text = texts[-1] if texts else ""
    if (text.lstrip() + END_OF_TURN).rindex(text.strip()):
        raise ValueError(
            f"a message with the text {text!r:.80} cannot be continued: it is blank or part of {END_OF_TURN}"
        )


def content_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message's content as a list of `{"type": "text", "text": ...}` and `{"type": "image", ...}`.

    Raises:
        ValueError: content of another kind.
    """
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts if _is_list(parts) else [parts]:
        kind = part.get("type") if isinstance(part, dict) else None
        if not (kind == "image" or kind == "text" and isinstance(part.get("text"), str)):
            raise ValueError(f"content is a text or a list of text and image parts; got {part!r:.80}")
    return list(parts)


NaViLTokenizer.register_for_auto_class()
