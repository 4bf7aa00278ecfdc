"""Processor of NaViL: images and prompts, or chat messages, to inputs for `model.generate(**inputs)`."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import load_image as fetch_image
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import BatchEncoding

from .image_processing_navil import flatten_images
from .tokenization_navil import IMAGE_PLACEHOLDER, check_texts, content_parts, expand_image_slots, list_conversations

IGNORE_INDEX = -100


class NaViLImagesKwargs(ImagesKwargs, total=False):
    min_pixels: int | None
    max_pixels: int | None
    scale_downsample_ratio: float | None
    multi_scale: bool | None


class NaViLProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: NaViLImagesKwargs
    _defaults = {"images_kwargs": {"multi_scale": True}, "text_kwargs": {"padding": False}}


class NaViLProcessor(ProcessorMixin):
    """Image processor and tokenizer in one.

    Args:
        image_processor: a `NaViLImageProcessor`.
        tokenizer: a `NaViLTokenizer`; its chat template is the processor's.
    """

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        audio: None = None,
        videos: None = None,
        allow_control_tokens: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Packs images and tokenizes prompts that say `<image>` once per image.

        Args:
            images: an image (PIL, path or array) or a list of them in the order of their placeholders, or one such
                list per prompt.
            text: a prompt or a list of prompts.
            audio, videos: not supported, must be None.
            allow_control_tokens: let slot tokens through that are in a prompt already.
            kwargs: settings of the image processor (`multi_scale`, True by default, `min_pixels`, `max_pixels`,
                `scale_downsample_ratio`) and of the tokenizer (`padding`, `return_tensors`, ...).

        Returns:
            `input_ids` and `attention_mask` (B, L); with images also `pixel_values` (patches, 3 * p * p),
            `image_grid_thw` (scales, 3) and `num_scales` (images,).

        Raises:
            ValueError: no text, another number of images than of placeholders, slot tokens in the text, audio or video.
        """
        if text is None or not isinstance(text, str) and not text:
            raise ValueError("text is required")
        check_texts(text)
        if audio is not None or videos is not None:
            raise ValueError("NaViL takes images and text, not audio or video")
        options = self._merge_kwargs(NaViLProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        features: dict[str, Any] = {}
        grids, num_scales = [], []
        if images is not None and flatten_images(images):
            _check_rows(images, texts)
            features = dict(self.image_processor(images, **options["images_kwargs"]))
            grids, num_scales = features["image_grid_thw"].tolist(), features["num_scales"].tolist()
        texts = expand_image_slots(texts, grids, num_scales, self.image_processor.merge_size, allow_control_tokens)
        return_tensors = options["text_kwargs"].pop("return_tensors", None)
        encoded = self._tokenize(texts, **options["text_kwargs"])
        return BatchFeature({**encoded, **features}, tensor_type=return_tensors)

    def _tokenize(self, texts: Sequence[str], **options: Any) -> BatchEncoding:
        # The chat template writes <s> itself where the tokenizer does.
        bos_token = self.tokenizer.bos_token
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
        **kwargs: Any,
    ) -> Any:
        """As in transformers, images in the messages included.

        Args:
            conversation: messages, or a batch of conversations. A message's content is a text or a list of
                `{"type": "text", "text": ...}` and `{"type": "image", "image" | "path" | "url" | "base64": ...}`.
            add_generation_prompt: None adds it when a user speaks last, so that the result goes into `generate`.
            allow_control_tokens: let special tokens through that are typed in a message.
            kwargs: for `__call__`, when `tokenize`.

        Raises:
            ValueError: no message, content of an unknown kind, an unreadable image, or a special token in a message.
        """
        conversations = list_conversations(conversation)
        is_batched = not isinstance(conversation[0], dict)
        if add_generation_prompt is None:
            asked = [messages[-1]["role"] == "user" for messages in conversations]
            add_generation_prompt = all(asked) and not continue_final_message
        prompts = self.tokenizer.apply_chat_template(
            conversations,
            chat_template=chat_template or self.chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            allow_control_tokens=allow_control_tokens,
            tokenize=False,
        )
        if not tokenize:
            return prompts if is_batched else prompts[0]
        images = [[image for message in messages for image in _images_of(message)] for messages in conversations]
        features = self(images=images, text=prompts, allow_control_tokens=allow_control_tokens, **kwargs)
        return features if return_dict else features["input_ids"]

    def training_batch(
        self, examples: Sequence[dict[str, Any]], row_length: int | None = None, **images_kwargs: Any
    ) -> BatchFeature:
        """Conversations to a batch that trains on their answers: the `data_collator` of a `Trainer`.

        Args:
            examples: `{"messages": ...}` each, a conversation as `apply_chat_template` takes it.
            row_length: None gives every conversation its own row. A number packs several into a row of up to so many
                tokens, and they do not see each other.
            images_kwargs: settings of the image processor, as in `__call__`.

        Returns:
            `input_ids` and `labels` (B, L), padded on the right; labels are every answer with the token that ends it,
            and -100 elsewhere. `attention_mask` (B, L); packed, (B, 1, L, L) bool, block-diagonal and causal, with
            `position_ids` (B, L) that start anew. The images' inputs as in `__call__`, if there are any.

        Raises:
            ValueError: an example whose messages do not end with an answer, an image in an answer, or more than
                `row_length` tokens.
        """
        if not examples:
            raise ValueError("expected at least one example, got none")
        encoded = [self.encode_conversation(example, **images_kwargs) for example in examples]
        rows = [[conversation] for conversation in encoded] if row_length is None else fill_rows(encoded, row_length)
        batch = join_rows(rows, self.tokenizer.pad_token_id)
        sample_index, position_ids = batch.pop("sample_index"), batch.pop("position_ids")
        if row_length is None:
            return BatchFeature({**batch, "attention_mask": (sample_index >= 0).long()})
        attention_mask = block_diagonal_mask(sample_index)
        return BatchFeature({**batch, "attention_mask": attention_mask, "position_ids": position_ids})

    def encode_conversation(self, example: dict[str, Any], **images_kwargs: Any) -> "Conversation":
        """One example of a `training_batch`: its ids, its labels and its images' inputs; arguments as there.

        Raises:
            ValueError: an example whose messages do not end with an answer, or an image in an answer.
        """
        images_kwargs = {**NaViLProcessorKwargs._defaults["images_kwargs"], **images_kwargs}
        messages = example.get("messages") if isinstance(example, dict) else None
        if not messages:
            raise ValueError(f"an example is a dict with a conversation as its `messages`, got {example!r:.80}")
        stretches = self._split_at_answers(messages)
        images = [image for message in messages for image in _images_of(message)]
        features = dict(self.image_processor(images, **images_kwargs, return_tensors="pt")) if images else {}
        grids, num_scales = (features[name].tolist() if images else [] for name in ("image_grid_thw", "num_scales"))
        stretches = expand_image_slots(stretches, grids, num_scales, self.image_processor.merge_size)
        ends = list(accumulate(map(len, stretches)))
        answers = list(zip(ends[::2], ends[1::2], strict=True))  # prompt and answer take turns
        encoding = self._tokenize(["".join(stretches)], return_offsets_mapping=True)
        [input_ids], [offsets] = encoding["input_ids"], encoding["offset_mapping"]
        labels = [
            token_id if any(start <= left < right <= end for start, end in answers) else IGNORE_INDEX
            for token_id, (left, right) in zip(input_ids, offsets, strict=True)
        ]
        return Conversation(torch.tensor(input_ids), torch.tensor(labels), features)

    def _split_at_answers(self, messages: Sequence[dict[str, Any]]) -> list[str]:
        """The text of a conversation, cut where an answer begins and behind the token that ends it."""
        answers = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        is_whole = answers and answers[0] > 0 and answers[-1] == len(messages) - 1
        if not is_whole or any(_images_of(messages[index]) for index in answers):
            raise ValueError(
                f"training needs a question first and an answer last, and no image in answers; got {messages!r:.200}"
            )
        stretches, written = [], ""
        for index in answers:
            for known, is_prompt in ((messages[:index], True), (messages[: index + 1], False)):
                text = self.apply_chat_template(known, add_generation_prompt=is_prompt)
                if not text.startswith(written):
                    raise ValueError("the chat template writes a conversation's beginning anew after each message")
                stretches.append(text[len(written) :])
                written = text
        return stretches

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


def _check_rows(images: Any, texts: Sequence[str]) -> None:
    """Where images are given as one list per prompt, each prompt has a placeholder for each of its own."""
    rows = [isinstance(row, list | tuple) for row in images] if isinstance(images, list | tuple) else []
    if not any(rows):
        return
    if not all(rows) or len(rows) != len(texts):
        raise ValueError(
            f"expected one list of images per prompt; {len(texts)} prompts got {sum(rows)} lists"
            f" and {len(rows) - sum(rows)} single images"
        )
    for index, (row, text) in enumerate(zip(images, texts, strict=True)):
        if text.count(IMAGE_PLACEHOLDER) != len(row):
            raise ValueError(
                f"prompt {index} has {text.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} placeholders "
                f"but {len(row)} images were given for it"
            )


def _images_of(message: dict[str, Any]) -> list[Any]:
    """A message's images, as the image processor takes them."""
    return [_image_source(part) for part in content_parts(message) if part["type"] == "image"]


def _image_source(part: dict[str, Any]) -> Any:
    source = next((part[key] for key in ("image", "path", "url", "base64") if key in part), None)
    if source is None:
        raise ValueError(f"an image part needs one of image, path, url or base64; got {part!r:.80}")
    if isinstance(source, str) and ("base64" in part or source.startswith(("http://", "https://", "data:"))):
        try:
            source = fetch_image(source)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read an image from {source!r:.80}: {error}") from error
    return source


# -- training batches --------------------------------------------------------------------------------------------------


class Conversation(NamedTuple):
    """A conversation to train on: ids and labels (L,), -100 outside its answers, and its images' inputs, if any."""

    input_ids: Tensor
    labels: Tensor
    images: dict[str, Tensor]


def fill_rows(conversations: Sequence[Conversation], row_length: int) -> list[list[Conversation]]:
    """Puts each conversation into the first row that has room for it, of `row_length` tokens."""
    rows: list[list[Conversation]] = []
    for conversation in conversations:
        length = len(conversation.input_ids)
        if length > row_length:
            raise ValueError(f"a conversation has {length} tokens but row_length is {row_length}")
        for row in rows:
            if sum(len(other.input_ids) for other in row) + length <= row_length:
                row.append(conversation)
                break
        else:
            rows.append([conversation])
    return rows


def join_rows(rows: Sequence[Sequence[Conversation]], pad_token_id: int) -> dict[str, Tensor]:
    """Rows of conversations to tensors, padded on the right.

    Returns:
        `input_ids`, `labels`, `position_ids` and `sample_index` (B, L), the last -1 on padding; the images' inputs.
    """

    def pad(parts: Sequence[Sequence[Tensor]], value: int) -> Tensor:
        return pad_sequence([torch.cat(list(row)) for row in parts], batch_first=True, padding_value=value)

    lengths = [[len(conversation.input_ids) for conversation in row] for row in rows]
    batch = {
        "input_ids": pad([[conversation.input_ids for conversation in row] for row in rows], pad_token_id),
        "labels": pad([[conversation.labels for conversation in row] for row in rows], IGNORE_INDEX),
        "position_ids": pad([[torch.arange(length) for length in row] for row in lengths], 0),
        "sample_index": pad([[torch.full((n,), i) for i, n in enumerate(row)] for row in lengths], -1),
    }
    images = [conversation.images for row in rows for conversation in row if conversation.images]
    return batch | {name: torch.cat([features[name] for features in images]) for name in (images[0] if images else ())}


def block_diagonal_mask(sample_index: Tensor) -> Tensor:
    """(B, L) sample of each token -> (B, 1, L, L) bool: causal, and only inside a sample."""
    same_sample = sample_index[:, None, :, None] == sample_index[:, None, None, :]
    return same_sample.tril()


NaViLProcessor.register_for_auto_class()
