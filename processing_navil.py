"""Processor of NaViL: images and prompts, or chat messages, to inputs for `model.generate(**inputs)`."""

from collections.abc import Sequence
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import load_image as fetch_image
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin

from .image_processing_navil import flatten_images
from .tokenization_navil import IMAGE_PLACEHOLDER, check_texts, content_parts, expand_image_slots, list_conversations


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
        text_options = options["text_kwargs"]
        return_tensors = text_options.pop("return_tensors", None)
        # The chat template writes <s> itself where the tokenizer does.
        bos_token = self.tokenizer.bos_token
        has_bos = bos_token is not None and all(prompt.startswith(bos_token) for prompt in texts)
        text_options.setdefault("add_special_tokens", not has_bos)
        encoded = self.tokenizer(texts, **text_options)
        return BatchFeature({**encoded, **features}, tensor_type=return_tensors)

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
    if not (isinstance(images, list | tuple) and len(images) == len(texts)):
        return
    if all(isinstance(row, list | tuple) for row in images):
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


NaViLProcessor.register_for_auto_class()
