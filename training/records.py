"""Records, as people have them, to conversations for `processor.training_batch`.

A record is a dict. Its fields decide what it is, the first match counts:

    messages         a conversation in this package's form, `{"role", "content"}` each
    conversations    LLaVA and ShareGPT: `{"from", "value"}` each
    texts            question and answer pairs, `{"user", "assistant"}` each
    question, answer one question and one answer
    caption          an image and its text

and `image` holds its images. Columns of other names are mapped to these (`Fields.columns`).
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

IMAGE_PLACEHOLDER = "<image>"
URL_SCHEMES = ("http://", "https://", "file://", "data:")
IMAGE_KEYS = ("image", "bytes", "base64", "url", "image_url", "path")
ALIASES = {
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "texts": ("texts",),
    "question": ("question", "query"),
    "answer": ("answer", "response"),
    "caption": ("caption", "text", "txt"),
    "image": ("images", "image"),
    "system": ("system",),
}
"""Fields of a record, and the names of columns that are recognized as them."""

SHAPES = ("messages", "conversations", "texts", "question", "caption")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROLES = ("system", "user", "assistant", "tool")


class BadRecord(ValueError):
    """A record that cannot be trained on.

    Args:
        kind: one of the kinds in docs/data.md, the same for all records with this defect.
        reason: what is wrong with this one.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(f"{kind}: {reason}")
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Fields:
    """How to read a source's records.

    Args:
        columns: names of columns, by the field (a key of `ALIASES`) that they hold.
        image_folder: folder that relative image paths start from.
        prompt: question of a captioned image; None asks nothing but shows the image.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    image_folder: str = ""
    prompt: str | None = None


def parse_json(content: bytes) -> Any:
    """The value of UTF-8 JSON text; a `BadRecord` if it is not."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"byte {error.object[error.start]:#04x} at {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("not JSON", str(error)) from None


def read_conversation(record: Any, fields: Fields) -> dict[str, Any]:
    """A record as `{"messages": [...]}`, with absolute image paths.

    Raises:
        BadRecord: a field is missing or has another type, an image file does not exist, the number of `<image>` is not
            that of the images, a role is unknown, or an answer is empty.
    """
    if not isinstance(record, dict):
        raise BadRecord("wrong type", f"a record is an object with named fields, got {record!r:.80}")
    values = named_values(record, fields.columns)
    images = [image_part(image, fields.image_folder) for image in list_images(values.get("image"))]
    shape = next((name for name in SHAPES if name in values), None)
    if shape is None:
        names = ", ".join(SHAPES)
        raise BadRecord("missing key", f"none of {names} (or a column mapped to one) in {sorted(map(str, record))}")
    if shape == "messages":
        messages = read_messages(values["messages"], images, fields.image_folder)
    elif shape == "caption":
        messages = caption_messages(values["caption"], images, fields.prompt)
    else:
        messages = place_images(TURN_READERS[shape](values), images)
    check_conversation(messages)
    return {"messages": messages}


def named_values(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record's values by field, without those that are None.

    Where a column is mapped to a text field, other columns are not searched for text.
    """
    missing = [name for name in columns.values() if name not in record]
    if missing:
        raise BadRecord("missing key", f"no column {missing[0]!r} in {sorted(map(str, record))}")
    is_mapped = any(name in columns for name in (*SHAPES, "answer"))
    searched = ("image", "system") if is_mapped else ALIASES
    values = {}
    for name in ALIASES:
        candidates = (columns[name],) if name in columns else ALIASES[name] if name in searched else ()
        found = [record[candidate] for candidate in candidates if record.get(candidate) is not None]
        values |= {name: found[0]} if found else {}
    return values


# -- images ------------------------------------------------------------------------------------------------------------


def list_images(value: Any) -> list[Any]:
    """The images of an `image` field: none, one, or a list."""
    if value is None or isinstance(value, str) and not value:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def image_part(image: Any, folder: str) -> dict[str, Any]:
    """A message's image part for a path, URL, bytes, PIL image, or dict with one of `IMAGE_KEYS`."""
    if isinstance(image, Mapping):
        entries = {key: value for key, value in image.items() if value is not None}
        key = next((key for key in IMAGE_KEYS if key in entries), None)
        if key is None:
            raise BadRecord("wrong type", f"an image needs one of {', '.join(IMAGE_KEYS)}, got {image!r:.80}")
        resolved = {key: resolve_path(entries[key], folder)} if key in ("image", "path") else {}
        return {**entries, **resolved, "type": "image"}
    if isinstance(image, bytes):
        return {"type": "image", "bytes": image}
    if isinstance(image, str) or hasattr(image, "getexif"):  # a PIL image
        return {"type": "image", "image": resolve_path(image, folder)}
    raise BadRecord("wrong type", f"an image is a path, URL or bytes, got {image!r:.80}")


def resolve_path(image: Any, folder: str) -> Any:
    """An absolute path if `image` is a path, which must exist; anything else as it is."""
    if not isinstance(image, str) or image[:8].lower().startswith(URL_SCHEMES):
        return image
    path = os.path.join(folder, image)
    if not os.path.isfile(path):
        raise BadRecord("missing image", f"no file {path!r:.300}")
    return path


# -- conversations -----------------------------------------------------------------------------------------------------


def read_messages(messages: Any, images: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Messages in this package's form. `images`, of a column of their own, fill the parts or `<image>` without one."""
    messages = [read_message(message) for message in expect("messages", messages, list)]
    parts = [part for message in messages for part in list_parts(message) if part["type"] != "text"]
    is_empty = [not any(key in part for key in IMAGE_KEYS) for part in parts]
    if images and not any(is_empty):
        if parts:
            raise BadRecord("image count", f"{len(images)} images of a column, and {len(parts)} in the messages")
        return place_images(messages, images)
    if sum(is_empty) != len(images):
        raise BadRecord("image count", f"{sum(is_empty)} image parts are empty but there are {len(images)} images")
    remaining = iter(images)

    def fill(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        return image_part(part, folder) if any(key in part for key in IMAGE_KEYS) else {**part, **next(remaining)}

    return [
        message if isinstance(message["content"], str) else {**message, "content": list(map(fill, message["content"]))}
        for message in messages
    ]


def read_message(message: Any) -> dict[str, Any]:
    """A message without entries that are None, after checks of its role and of its content's types."""
    given = {key: value for key, value in expect("a message", message, dict).items() if value is not None}
    role = given.get("role")
    if role not in ROLES:
        raise BadRecord("unknown role", f"{role!r:.80} is none of {', '.join(ROLES)}")
    content = expect("content", given.get("content"), str, list)
    if isinstance(content, str):
        return given
    parts = [
        {key: value for key, value in expect("a part", part, dict).items() if value is not None} for part in content
    ]
    for part in parts:
        if part.get("type") not in ("text", "image", "image_url"):
            raise BadRecord("wrong type", f"a part is text, image or image_url, got {part!r:.80}")
        if part["type"] == "text":
            expect("text", part.get("text"), str)
    return {**given, "content": parts}


def shared_turns(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Of LLaVA and ShareGPT; `{"role", "content"}` in such a list is read too."""
    messages = system_message(values)
    for turn in expect("conversations", values["conversations"], list):
        expect("a turn", turn, dict)
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise BadRecord("unknown role", f"{speaker!r:.80} is none of {', '.join(SPEAKERS)}")
        messages.append(text_message(SPEAKERS[speaker], turn.get("value", turn.get("content"))))
    return messages


def paired_turns(values: dict[str, Any]) -> list[dict[str, Any]]:
    messages = system_message(values)
    for pair in expect("texts", values["texts"], list):
        expect("a pair", pair, dict)
        messages += [text_message("user", pair.get("user")), text_message("assistant", pair.get("assistant"))]
    return messages


def question_turns(values: dict[str, Any]) -> list[dict[str, Any]]:
    """A list of accepted answers stands for its first."""
    answer = values.get("answer")
    if isinstance(answer, list) and answer:
        answer = answer[0]
    if answer is None:
        raise BadRecord("missing key", f"a question but no answer: {values['question']!r:.80}")
    return [*system_message(values), text_message("user", values["question"]), text_message("assistant", answer)]


TURN_READERS = {"conversations": shared_turns, "texts": paired_turns, "question": question_turns}


def caption_messages(caption: Any, images: list[dict[str, Any]], prompt: str | None) -> list[dict[str, Any]]:
    if not images:
        raise BadRecord("missing key", f"a caption but no image: {caption!r:.80}")
    question = [{"type": "text", "text": prompt}] if prompt else []
    return [{"role": "user", "content": [*images, *question]}, text_message("assistant", caption)]


def system_message(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [text_message("system", values["system"])] if values.get("system") else []


def text_message(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": expect(f"the text of {role}", text, str)}


def place_images(messages: list[dict[str, Any]], images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Texts with each `<image>` replaced by an image's part. Without any, the images go before the first question."""
    for message in messages:
        expect("content of a record with <image>", message["content"], str)
        if message["role"] == "assistant" and IMAGE_PLACEHOLDER in message["content"]:
            raise BadRecord("image in an answer", f"{IMAGE_PLACEHOLDER} in {message['content']!r:.80}")
    count = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)
    if count not in (0, len(images)) or count and not images:
        raise BadRecord("image count", f"{count} {IMAGE_PLACEHOLDER} but {len(images)} images")
    if count == 0:
        return images_first(messages, images)
    remaining = iter(images)
    return [
        {**message, "content": split_at_placeholders(message["content"], remaining)}
        if IMAGE_PLACEHOLDER in message["content"]
        else message
        for message in messages
    ]


def images_first(messages: list[dict[str, Any]], images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    asked = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if not images or asked is None:
        return messages
    parts = [*images, {"type": "text", "text": messages[asked]["content"]}]
    return [*messages[:asked], {**messages[asked], "content": parts}, *messages[asked + 1 :]]


def split_at_placeholders(text: str, images: Any) -> list[dict[str, Any]]:
    """Parts of a text. The chat template ends each image with a line break, so one behind `<image>` is dropped."""
    first, *rest = re.split(f"{IMAGE_PLACEHOLDER}\n?", text)
    parts = [{"type": "text", "text": first}]
    for piece in rest:
        parts += [next(images), {"type": "text", "text": piece}]
    return [part for part in parts if part["type"] != "text" or part["text"]]


def list_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def check_conversation(messages: Sequence[dict[str, Any]]) -> None:
    """A question first, an answer last, and in every answer text and no image."""
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    if not spoken or spoken[0] != "user" or spoken[-1] != "assistant":
        raise BadRecord("turn order", f"a question comes first and an answer last, got {', '.join(spoken) or 'none'}")
    for message in messages:
        if message["role"] != "assistant":
            continue
        parts = list_parts(message)
        if any(part["type"] != "text" for part in parts):
            raise BadRecord("image in an answer", f"{message['content']!r:.80}")
        if not "".join(part["text"] for part in parts).strip():
            raise BadRecord("empty answer", f"after {spoken.count('user')} questions")


def expect(name: str, value: Any, *types: type) -> Any:
    """The value, if it is of one of the types."""
    if value is None:
        raise BadRecord("missing key", f"no {name}")
    if not isinstance(value, types):
        allowed = " or ".join(kind.__name__ for kind in types)
        raise BadRecord("wrong type", f"{name} must be {allowed}, got {value!r:.80}")
    return value
