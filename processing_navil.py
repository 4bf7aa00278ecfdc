"""Processor of NaViL: images and prompts, or chat messages, to inputs for `model.generate(**inputs)`.

And back: `draw_boxes` finds the boxes in an answer and draws them on the picture.
"""

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs, ProcessorMixin, TextKwargs
from transformers.tokenization_utils_base import BatchEncoding

from .image_processing_navil import NaViLImageProcessor, flatten_images, load_image, whole_number
from .tokenization_navil import (
    IMAGE_PLACEHOLDER,
    check_keywords,
    content_parts,
    expand_image_slots,
    hide_placeholders,
    list_conversations,
)

IGNORE_INDEX = -100

# Keywords of `NaViLProcessor` for the image processor, which rejects unsupported ones, and for the tokenizer.
IMAGE_SETTINGS = {*ImagesKwargs.__annotations__, *inspect.signature(NaViLImageProcessor.plan).parameters}
IMAGE_SETTINGS -= {"self", "images", "return_tensors", "switches"}
TEXT_SETTINGS = {*TextKwargs.__annotations__, "return_tensors"}
TEXT_SETTINGS -= {"return_mm_token_type_ids", "return_text_replacement_offsets", "sanitize_control_tokens"}
KNOWN_SETTINGS = "a setting of the image processor or the tokenizer"


class NaViLProcessor(ProcessorMixin):
    """Image processor and tokenizer in one.

    Args:
        image_processor: a `NaViLImageProcessor`.
        tokenizer: a `NaViLTokenizer`; its chat template is the processor's.
        multi_scale: whether to pack images at several scales, as NaViL was trained, unless a call says otherwise. TRL's
            GRPO assumes one row of `image_grid_thw` per image and so needs False.
        chat_template: replaces the tokenizer's.
    """

    if not hasattr(ProcessorMixin, "get_attributes"):  # transformers 4; 5 reads the signature of `__init__`
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, multi_scale: bool = True, **kwargs: Any):
        chat_template = kwargs.pop("chat_template", None)
        super().__init__(image_processor, tokenizer, **kwargs)
        self.multi_scale = bool(multi_scale)
        self.chat_template = chat_template

    @property
    def chat_template(self) -> Any:
        """The tokenizer's chat template."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: Any) -> None:
        if template is not None:
            self.tokenizer.chat_template = template

    @classmethod
    def get_processor_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, without the chat template, which the tokenizer loads."""
        settings, kwargs = super().get_processor_dict(*args, **kwargs)
        settings.pop("chat_template", None)
        return settings, kwargs

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, without the image processor, which all versions read from `preprocessor_config.json`."""
        return {name: value for name, value in super().to_dict(*args, **kwargs).items() if name != "image_processor"}

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """As in transformers, but both transformers 4 and 5 can read the files, and each setting is saved once."""
        saved = super().save_pretrained(str(save_directory), **kwargs)
        self.image_processor.save_pretrained(save_directory)
        Path(save_directory, "chat_template.json").unlink(missing_ok=True)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return saved

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        audio: None = None,
        videos: None = None,
        allow_control_tokens: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Packs images and tokenizes prompts with one `<image>` per image.

        Args:
            images: an image in any form that the image processor reads, a list of images in the order of their
                placeholders, or one such list per prompt.
            text: a prompt or a list of prompts.
            audio, videos: not supported, must be None.
            allow_control_tokens: accept prompts that contain slot tokens already.
            kwargs: settings of `NaViLImageProcessor.plan`, its `device` and settings of the tokenizer (`padding`,
                `return_tensors`, ...), flat or in `images_kwargs` and `text_kwargs`.

        Returns:
            `input_ids` and `attention_mask` (B, L); with images also `pixel_values`, `image_grid_thw` and `num_scales`
            as in `NaViLImageProcessor.pack`.

        Raises:
            ValueError: no text, different numbers of images and placeholders, slot tokens in the text, audio, video or
                an unknown keyword.
        """
        texts = list(text) if isinstance(text, list | tuple) else [text]
        if not texts or not all(isinstance(prompt, str) for prompt in texts):
            raise ValueError(f"text must be a prompt or a list of prompts, got {text!r:.80}")
        if audio is not None or videos is not None:
            raise ValueError("NaViL takes images and text, not audio or video")
        image_settings, text_settings, others = split_settings(kwargs)
        check_keywords(others, (), KNOWN_SETTINGS)
        images = _images_in_order(images, texts)
        return_tensors = text_settings.pop("return_tensors", None)
        texts, features = self._fill_slots(texts, images, image_settings, allow_control_tokens, return_tensors)
        encoded = self._tokenize(texts, **text_settings)
        return BatchFeature({**encoded, **features}, tensor_type=return_tensors)

    def _fill_slots(
        self,
        texts: Sequence[str],
        images: list[Any],
        settings: dict[str, Any],
        allow_control_tokens: bool,
        return_tensors: str | None,
    ) -> tuple[list[str], dict[str, Any]]:
        """The texts with a slot for each image, and the images' inputs."""
        check_keywords(settings, IMAGE_SETTINGS, KNOWN_SETTINGS)
        settings = {"multi_scale": self.multi_scale, **settings}
        device = settings.pop("device", None)
        plans = self.image_processor.plan(images, **settings) if images else []
        scales = [plan.scales for plan in plans]
        texts = expand_image_slots(texts, scales, self.image_processor.cell, allow_control_tokens)
        return texts, dict(self.image_processor.pack(plans, return_tensors, device)) if plans else {}

    def _tokenize(self, texts: Sequence[str], **options: Any) -> BatchEncoding:
        bos_token = self.tokenizer.bos_token  # the chat template writes it itself
        has_bos = bos_token is not None and all(prompt.startswith(bos_token) for prompt in texts)
        return self.tokenizer(texts, **{"add_special_tokens": not has_bos, **options})

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        allow_control_tokens: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, including the images in the messages. `<image>` in a text is text.

        Args:
            conversation: messages, or a batch of conversations, as in `list_conversations`; an image part may have its
                own `min_pixels` and `max_pixels`.
            add_generation_prompt: None adds it if all last messages are a user's.
            allow_control_tokens: accept special tokens in texts.
            processor_kwargs, kwargs: settings of `__call__`, if `tokenize`; other `kwargs` are variables of the
                template, such as `tools`, `system_message` and `enable_thinking`.

        Raises:
            ValueError: no message, content of an unknown kind, an unreadable image, a special token in a message, or a
                keyword that neither the processor nor the template knows.
        """
        *_, variables = split_settings(kwargs)
        if tokenize and "system_message" in variables:
            kwargs["system_message"] = variables["system_message"] = hide_placeholders(variables["system_message"])
        conversations = list_conversations(conversation)
        if add_generation_prompt is None:
            ends_with_user = all(messages[-1]["role"] == "user" for messages in conversations)
            add_generation_prompt = ends_with_user and not continue_final_message
        prompts = self.tokenizer.apply_chat_template(
            hide_placeholders(conversations) if tokenize else conversations,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            allow_control_tokens=allow_control_tokens,
            tokenize=False,
            **variables,
        )
        if not tokenize:
            return prompts[0] if isinstance(conversation[0], dict) else prompts
        images = [_images_of(messages) for messages in conversations]
        settings = {name: value for name, value in kwargs.items() if name not in variables} | (processor_kwargs or {})
        features = self(images=images, text=prompts, allow_control_tokens=allow_control_tokens, **settings)
        return features if return_dict else features["input_ids"]

    def training_batch(
        self,
        examples: "Sequence[dict[str, Any] | Conversation]",
        row_length: int | None = None,
        allow_control_tokens: bool = False,
        **image_settings: Any,
    ) -> BatchFeature:
        """Conversations to a training batch with their answers as labels: the `data_collator` of a `Trainer`.

        Args:
            examples: `{"messages": ...}` each, a conversation as in `apply_chat_template`; or those of
                `encode_conversation`.
            row_length: None gives each conversation its own row. A number (set with `functools.partial`) packs several
                into a row of at most this many tokens; they do not attend to each other.
            allow_control_tokens: accept special tokens in texts, such as tokens added for training.
            image_settings: settings of the image processor and its `device`, as in `__call__`.

        Returns:
            `input_ids` and `labels` (B, L), padded on the right; labels are the ids of each answer and its end token,
            -100 elsewhere. `attention_mask` (B, L); if packed, `position_ids` (B, L) instead, which restart at 0 in
            each conversation and in a row's padding, with `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and
            `max_length_k`, as `forward` takes them. With images, their inputs as in `__call__`.

        Raises:
            ValueError: no example, one that does not end with an answer, an image in an answer, or a conversation of
                more than `row_length` tokens.
        """
        if not examples:
            raise ValueError("expected at least one example, got none")
        encoded = [self.encode_conversation(example, allow_control_tokens, **image_settings) for example in examples]
        is_packed = row_length is not None
        rows = fill_rows(encoded, whole_number(row_length, "row_length")) if is_packed else [[one] for one in encoded]
        batch = join_rows(rows, self.tokenizer.pad_token_id)
        if is_packed:
            return BatchFeature({**batch, **document_inputs(rows)})
        length = batch["input_ids"].shape[1]
        attention_mask = [torch.arange(length) < len(one.input_ids) for [one] in rows]
        return BatchFeature({**batch, "attention_mask": torch.stack(attention_mask).long()})

    def encode_conversation(
        self, example: "dict[str, Any] | Conversation", allow_control_tokens: bool = False, **image_settings: Any
    ) -> "Conversation":
        """Encodes one example of a `training_batch`, whose arguments and errors it has. An encoded one is returned."""
        if isinstance(example, Conversation):
            return example
        if not isinstance(example, dict) or "messages" not in example:
            raise ValueError(
                f"an example is a dict with a conversation as its `messages`, got {example!r:.80}; "
                "Trainer drops them unless its remove_unused_columns is False"
            )
        [messages] = list_conversations(example["messages"])
        texts = self._split_at_answers(hide_placeholders(messages), allow_control_tokens)
        texts, images = self._fill_slots(texts, _images_of(messages), image_settings, allow_control_tokens, "pt")
        ends = list(accumulate(map(len, texts)))
        answers = list(zip(ends[::2], ends[1::2], strict=True))  # (start, end) of each answer, in characters
        encoding = self._tokenize(["".join(texts)], return_offsets_mapping=True)
        [input_ids], [offsets] = encoding["input_ids"], encoding["offset_mapping"]
        labels = [
            token_id if any(start <= left < right <= end for start, end in answers) else IGNORE_INDEX
            for token_id, (left, right) in zip(input_ids, offsets, strict=True)
        ]
        return Conversation(torch.tensor(input_ids), torch.tensor(labels), images)

    def _split_at_answers(self, messages: Sequence[dict[str, Any]], allow_control_tokens: bool) -> list[str]:
        """The text of a conversation, split into prompts and answers: prompt, answer, prompt, answer, ..."""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        is_whole = answers and answers[0] > 0 and answers[-1] == len(messages) - 1
        if not is_whole or _images_of([messages[index] for index in answers]):
            raise ValueError(
                f"training needs a question first and an answer last, and no image in answers; got {messages!r:.200}"
            )
        settings = {"allow_control_tokens": allow_control_tokens, "tokenize": False}
        texts, prefix = [], ""
        for end, is_prompt in ((index + offset, offset == 0) for index in answers for offset in (0, 1)):
            text = self.tokenizer.apply_chat_template(messages[:end], add_generation_prompt=is_prompt, **settings)
            if not text.startswith(prefix):
                raise ValueError("the chat template is not prefix-stable: a message changes the text before it")
            texts.append(text[len(prefix) :])
            prefix = text
        return texts

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """As the tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


def split_settings(keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Splits keywords, flat or in dicts as in transformers, into the image processor's, the tokenizer's and others."""
    others = dict(keywords)
    others |= others.pop("common_kwargs", None) or {}
    image_settings = dict(others.pop("images_kwargs", None) or {})
    text_settings = {"padding": False, **(others.pop("text_kwargs", None) or {})}
    for names, settings in ((IMAGE_SETTINGS, image_settings), (TEXT_SETTINGS, text_settings)):
        settings |= {name: others.pop(name) for name in names & others.keys()}
    return image_settings, text_settings, others


def _images_in_order(images: Any, texts: Sequence[str]) -> list[Any]:
    """All prompts' images, in order. If given per prompt, as a list or None each, their counts are checked."""
    if images is None:
        return []
    if isinstance(images, list | tuple):
        images = [[] if row is None else row for row in images]
        given = [len(row) if isinstance(row, list | tuple) else 1 for row in images]
        placeholders = [text.count(IMAGE_PLACEHOLDER) for text in texts]
        if given != placeholders and any(isinstance(row, list | tuple) for row in images):
            raise ValueError(f"the prompts have {placeholders} {IMAGE_PLACEHOLDER} but {given} images were given")
    return flatten_images(images)


def _images_of(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The image parts of messages of `list_conversations`, a form of image that the image processor reads."""
    return [part for message in messages for part in content_parts(message) if part["type"] == "image"]


# -- training batches --------------------------------------------------------------------------------------------------


class Conversation(NamedTuple):
    """A training example: ids and labels (L,), -100 outside the answers, and the inputs of its images."""

    input_ids: Tensor
    labels: Tensor
    images: dict[str, Tensor]


def fill_rows(conversations: Sequence[Conversation], row_length: int) -> list[list[Conversation]]:
    """Packs conversations into rows of at most `row_length` tokens: best fit, the longest first."""
    lengths = [len(one.input_ids) for one in conversations]
    if max(lengths) > row_length:
        raise ValueError(f"a conversation has {max(lengths)} tokens but row_length is {row_length}")
    rows: list[list[int]] = []
    rooms: list[int] = []  # tokens that still fit into each row
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= lengths[index]]
        if not fitting:
            rows.append([])
            rooms.append(row_length)
        row = min(fitting, key=rooms.__getitem__, default=-1)
        rows[row].append(index)
        rooms[row] -= lengths[index]
    return [[conversations[index] for index in sorted(row)] for row in rows]


def join_rows(rows: Sequence[Sequence[Conversation]], pad_token_id: int) -> dict[str, Tensor]:
    """Concatenates each row's conversations and pads the rows on the right.

    Returns:
        `input_ids` and `labels`, (B, L) each, and the images' inputs.
    """

    def pad(parts: Sequence[Sequence[Tensor]], value: int) -> Tensor:
        return pad_sequence([torch.cat(list(row)) for row in parts], batch_first=True, padding_value=value)

    batch = {
        "input_ids": pad([[one.input_ids for one in row] for row in rows], pad_token_id),
        "labels": pad([[one.labels for one in row] for row in rows], IGNORE_INDEX),
    }
    images = [conversation.images for row in rows for conversation in row if conversation.images]
    return batch | {name: torch.cat([features[name] for features in images]) for name in (images[0] if images else ())}


def document_inputs(rows: Sequence[Sequence[Conversation]]) -> dict[str, Tensor | int]:
    """`position_ids` (B, L), `cu_seq_lens_q`, `max_length_q` and the like, for rows as `join_rows` pads them.

    A row's padding is a document of its own.
    """
    lengths = [[len(one.input_ids) for one in row] for row in rows]
    longest = max(map(sum, lengths))
    documents = [[*row, *([longest - sum(row)] if sum(row) < longest else ())] for row in lengths]
    flat = [length for row in documents for length in row]
    offsets = torch.tensor([0, *accumulate(flat)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in flat]).view(len(rows), longest)
    both = {"cu_seq_lens": offsets, "max_length": max(flat)}
    return {"position_ids": positions, **{f"{name}_{part}": x for name, x in both.items() for part in "qk"}}


# -- boxes of an answer ------------------------------------------------------------------------------------------------

BOX_UNITS = 1000  # coordinates are thousandths of the picture's width and height
BOX = re.compile(r"\[\s*{0}\s*,\s*{0}\s*,\s*{0}\s*,\s*{0}\s*\]".format(r"(\d+(?:\.\d+)?)"))
BOX_LIST = re.compile(r"(?:<box>|\[)\s*\[[-\d\s,.\[\]]*\]")
GROUNDING_TAG = re.compile(r"</?(?:ref|box)>")
BOX_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#7f5f00", "#5b4db1")


class LabeledBox(NamedTuple):
    """A box in pixels of the upright picture, as Pillow's `crop` takes it: `right` and `lower` lie just outside."""

    label: str
    left: int
    upper: int
    right: int
    lower: int


def draw_boxes(image: Any, answer: str, font: Any = None) -> tuple[list[LabeledBox], Image.Image]:
    """Finds the boxes of an answer and draws them with their labels.

    An answer has `<ref>label</ref><box>[[x1, y1, x2, y2], ...]</box>`, in thousandths of the picture's width and
    height. The tags may be missing: released tokenizers count them as special tokens, which `chat` leaves out. The
    label of a box without `<ref>` is the text in front of it in its line. Anything else is no box and is ignored: fewer
    than four numbers, a number below 0 or above 1000, x1 > x2, y1 > y2, and the last box of an answer that was cut off
    in it.

    Args:
        image: the picture of the question, in any form that the image processor reads. It is not changed.
        answer: of the model.
        font: a Pillow font for the labels; None is Pillow's own, which lacks Chinese and most other scripts.

    Returns:
        The boxes in the order of the answer, at least a pixel wide and high; and a new picture, upright and in RGB.

    Raises:
        ValueError: an unreadable image.
        TypeError: an answer that is not text.
    """
    if not isinstance(answer, str):
        raise TypeError(f"answer must be a text, got {answer!r:.80}")
    picture = load_image(image).copy()
    boxes = [_in_pixels(label, corners, picture.size) for label, corners in find_boxes(answer)]
    side = math.sqrt(math.prod(picture.size))
    font = ImageFont.load_default(max(10, round(side / 25))) if font is None else font
    labels = list(dict.fromkeys(box.label for box in boxes))
    for box in boxes:
        color = BOX_COLORS[labels.index(box.label) % len(BOX_COLORS)]
        _draw_box(picture, box, color, max(2, round(side / 200)), font)
    return boxes, picture


def find_boxes(answer: str) -> Iterator[tuple[str, list[float]]]:
    """The label and the corners, x1, y1, x2 and y2 in thousandths, of each box as `draw_boxes` describes it."""
    end = 0
    for found in BOX_LIST.finditer(answer):
        label = _label_at_the_end(answer[end : found.start()])
        end = found.end()
        for match in BOX.finditer(found[0]):
            x1, y1, x2, y2 = map(float, match.groups())
            if x1 <= x2 <= BOX_UNITS and y1 <= y2 <= BOX_UNITS:
                yield label, [x1, y1, x2, y2]


def _label_at_the_end(text: str) -> str:
    """The label of a box behind `text`, which begins behind the box before."""
    _, tag, named = text.rpartition("<ref>")
    label = named.partition("</ref>")[0] if tag else GROUNDING_TAG.sub("", text).rpartition("\n")[2]
    return " ".join(label.split()).strip(" ,;:.")


def _in_pixels(label: str, corners: Sequence[float], size: tuple[int, int]) -> LabeledBox:
    """A box in pixels of a picture of (width, height) `size`."""
    x1, y1, x2, y2 = (round(side * value / BOX_UNITS) for side, value in zip(2 * size, corners, strict=True))
    left, upper = min(x1, size[0] - 1), min(y1, size[1] - 1)
    return LabeledBox(label, left, upper, max(x2, left + 1), max(y2, upper + 1))


def _draw_box(picture: Image.Image, box: LabeledBox, color: str, width: int, font: Any) -> None:
    """An outline inside the box, and its label: above the box, or in its corner if there is no room above."""
    canvas = ImageDraw.Draw(picture)
    canvas.rectangle((box.left, box.upper, box.right - 1, box.lower - 1), outline=color, width=width)
    if not box.label:
        return
    x1, y1, x2, y2 = canvas.textbbox((0, 0), box.label, font=font)
    wide, high = math.ceil(x2 - x1) + 2 * width, math.ceil(y2 - y1) + 2 * width
    left = max(0, min(box.left, picture.width - wide))
    upper = box.upper - high if box.upper >= high else box.upper
    canvas.rectangle((left, upper, left + wide - 1, upper + high - 1), fill=color)
    canvas.text((left + width - x1, upper + width - y1), box.label, fill="white", font=font)


NaViLProcessor.register_for_auto_class()
