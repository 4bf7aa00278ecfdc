"""Processor of NaViL: images and prompts, or chat messages, to inputs for `model.generate(**inputs)`."""

from collections.abc import Sequence
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin

from .image_processing_navil import load_image
from .tokenization_navil import expand_image_slots


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
        **kwargs: Any,
    ) -> BatchFeature:
        """Packs images and tokenizes prompts that say `<image>` once per image.

        Args:
            images: an image (PIL, path or array) or a (nested) list of them, in the order of their placeholders.
            text: a prompt or a list of prompts.
            audio, videos: not supported, must be None.
            kwargs: settings of the image processor (`multi_scale`, True by default, `min_pixels`, `max_pixels`,
                `scale_downsample_ratio`) and of the tokenizer (`padding`, `return_tensors`, ...).

        Returns:
            `input_ids` and `attention_mask` (B, L); with images also `pixel_values` (patches, 3 * p * p),
            `image_grid_thw` (scales, 3) and `num_scales` (images,).

        Raises:
            ValueError: another number of images than of placeholders, slot tokens in the text, audio or video.
        """
        if text is None:
            raise ValueError("text is required")
        if audio is not None or videos is not None:
            raise ValueError("NaViL takes images and text, not audio or video")
        options = self._merge_kwargs(NaViLProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        features: dict[str, Any] = {}
        grids, num_scales = [], []
        if images is not None:
            features = dict(self.image_processor(images, **options["images_kwargs"]))
            grids, num_scales = features["image_grid_thw"].tolist(), features["num_scales"].tolist()
        texts = expand_image_slots(texts, grids, num_scales, self.image_processor.merge_size)
        text_options = options["text_kwargs"]
        return_tensors = text_options.pop("return_tensors", None)
        # The chat template writes <s> itself where the tokenizer has one.
        bos_token = self.tokenizer.bos_token
        has_bos = bos_token is not None and all(prompt.startswith(bos_token) for prompt in texts)
        text_options.setdefault("add_special_tokens", not has_bos)
        encoded = self.tokenizer(texts, **text_options)
        return BatchFeature({**encoded, **features}, tensor_type=return_tensors)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As in transformers, images in the messages included.

        A message's content is a text or a list of `{"type": "text", "text": ...}` and
        `{"type": "image", "image" | "path" | "url": ...}`. The generation prompt is added by default when a user
        speaks last, so that the result goes straight into `generate`.

        Raises:
            ValueError: no message, an unreadable image, or a control token in a message.
        """
        if not conversation:
            raise ValueError("expected at least one message, got none")
        is_batched = not isinstance(conversation[0], dict)
        conversations = [
            [_normalised(message) for message in messages]
            for messages in (conversation if is_batched else [conversation])
        ]
        kwargs.setdefault("add_generation_prompt", all(messages[-1]["role"] == "user" for messages in conversations))
        chat_template = chat_template or self.chat_template or self.tokenizer.chat_template
        conversations = conversations if is_batched else conversations[0]
        return super().apply_chat_template(conversations, chat_template=chat_template, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


def _normalised(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its content as a list and its images loaded."""
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return {**message, "content": [_with_loaded_image(part) for part in content]}


def _with_loaded_image(part: dict[str, Any]) -> dict[str, Any]:
    source = next((part[key] for key in ("image", "path") if key in part), None)
    is_remote = isinstance(source, str) and source.startswith(("http://", "https://", "data:"))
    if part.get("type") != "image" or source is None or is_remote:
        return part  # transformers fetches URLs itself
    return {"type": "image", "image": load_image(source)}


NaViLProcessor.register_for_auto_class()
