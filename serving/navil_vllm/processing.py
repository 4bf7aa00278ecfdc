"""Images and prompts of requests, by the image processor and the tokenizer of the model folder.

    request -> chat template: one `<image>` per image          vLLM, with the folder's tokenizer
            -> plan and pack: patches of all scales            image_processing_navil.py of the folder
            -> `<image>` replaced by the image's slot          tokenization_navil.py of the folder

vLLM then asks the model for embeddings of `<img>` and of each `<IMG_CONTEXT>` of a slot: the visual tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.feature_extraction_utils import BatchFeature
from vllm.config import ModelConfig
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict, MultiModalInput
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
    TimingContext,
)
from vllm.multimodal.processing.processor import MultiModalPromptUpdates, PlaceholderFeaturesInfo

IMAGE_PLACEHOLDER = "<image>"
MAX_ASPECT_RATIO = 200
# To find the image with the most visual tokens:
OVERSIZE = 16  # sides of the sampled images, compared with the pixel budget's
NUM_RATIOS = 2000  # aspect ratios that are sampled
MARGIN = 1.05  # for those in between


def from_model_folder(name: str, model_config: ModelConfig) -> Any:
    """A class or function of the code in the model folder, `"module.name"`."""
    return get_class_from_dynamic_module(
        name, model_config.model, revision=model_config.revision, code_revision=model_config.code_revision
    )


class ImageItems(ImageProcessorItems):
    """Images as files where the request brought files: the image processor decodes them itself."""

    def _unwrap(self, item: Any) -> Any:
        return item.original_bytes if isinstance(item, MediaWithBytes) else item


class DataParser(MultiModalDataParser):
    def _parse_image_data(self, data: Any) -> ImageProcessorItems | None:
        """Keeps images as they are, where vLLM would paste transparent ones onto white."""
        if data is None:
            return None
        if self.is_embeddings(data):
            raise ValueError("NaViL takes images, not embeddings of images")
        is_batch = isinstance(data, list | tuple) or getattr(data, "ndim", 3) == 4
        return ImageItems(list(data) if is_batch else [data])


class NaViLProcessingInfo(BaseProcessingInfo):
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}  # settings stay as they came; `plan` refuses those that it does not know

    def get_data_parser(self) -> MultiModalDataParser:
        return DataParser()

    @cached_property
    def image_slot(self) -> Callable:
        return from_model_folder("tokenization_navil.image_slot", self.ctx.model_config)

    @cached_property
    def count_slot_tokens(self) -> Callable:
        count = from_model_folder("image_processing_navil.count_slot_tokens", self.ctx.model_config)
        return partial(count, cell=self.get_hf_processor().image_processor.cell)

    @cached_property
    def reject_slot_tokens(self) -> Callable:
        """Raises a ValueError for a text that contains a token of an image's slot."""
        reject_tokens = from_model_folder("tokenization_navil.reject_tokens", self.ctx.model_config)
        return partial(reject_tokens, tokens=from_model_folder("tokenization_navil.SLOT_TOKENS", self.ctx.model_config))

    def plan(self, images: Sequence[Any], settings: Mapping[str, object]) -> list[Any]:
        """The plans of images under the settings of the request, of the server and of the folder, in this order."""
        processor = self.get_hf_processor()
        settings = self.ctx.get_merged_mm_kwargs(settings)
        settings |= settings.pop("images_kwargs", {})
        return processor.image_processor.plan(list(images), **{"multi_scale": processor.multi_scale, **settings})

    @cached_property
    def largest_plan(self) -> Any:
        """The plan of the image with the most visual tokens, among images far above the budget of all aspect ratios."""
        plan_scales = from_model_folder("image_processing_navil.plan_scales", self.ctx.model_config)
        cell = self.get_hf_processor().image_processor.cell
        [plan] = self.plan([Image.new("RGB", (1, 1))], {})
        side = OVERSIZE * math.sqrt(plan.max_pixels)
        ratios = np.geomspace(1, MAX_ASPECT_RATIO, NUM_RATIOS).tolist()
        sizes = [(math.floor(side * math.sqrt(ratio)), math.ceil(side / math.sqrt(ratio))) for ratio in ratios]
        scales = {size: plan_scales(*size, cell, plan.min_pixels, plan.max_pixels, plan.tau) for size in sizes}
        most = max(sizes, key=lambda size: num_embeddings(scales[size], cell))
        return replace(plan, sizes=[most], scales=scales[most])

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        cell = self.get_hf_processor().image_processor.cell
        return {"image": min(seq_len, math.ceil(MARGIN * num_embeddings(self.largest_plan.scales, cell)))}


def num_embeddings(scales: Sequence[tuple[int, int]], cell: int) -> int:
    """Embeddings of an image that the model computes: of `<img>` and of each merged cell."""
    return 1 + sum(math.ceil(height / cell) * math.ceil(width / cell) for height, width in scales)


class NaViLDummyInputsBuilder(BaseDummyInputsBuilder[NaViLProcessingInfo]):
    """The largest images that fit into the context, for vLLM to measure the memory that they need."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE_PLACEHOLDER * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        plans = [self.info.largest_plan] * mm_counts.get("image", 0)
        if not plans:
            return {}
        room = self.info.ctx.model_config.max_model_len
        max_pixels = self.info.get_hf_processor().image_processor.fitting_max_pixels(plans, room)
        if max_pixels is None:
            raise ValueError(
                f"no image fits into a context of {room} tokens: raise --max-model-len, or serve text alone by "
                "--limit-mm-per-prompt '{\"image\": 0}'"
            )
        shrink = math.sqrt(max_pixels / math.prod(plans[0].sizes[0]))
        while len(plans) * self.count_tokens(image := self.dummy_image(plans[0].sizes[0], shrink)) > room:
            shrink *= 0.99  # whole pixels have changed the aspect ratio
        return {"image": [image] * len(plans)}

    @staticmethod
    def dummy_image(size: tuple[int, int], shrink: float) -> Image.Image:
        """An image whose sides are those of size (height, width) times `shrink`, or less where it would be too thin."""
        height, width = (max(1, math.floor(side * shrink)) for side in size)
        longest = MAX_ASPECT_RATIO * min(height, width) - 1
        return Image.new("RGB", (min(width, longest), min(height, longest)))

    def count_tokens(self, image: Image.Image) -> int:
        [plan] = self.info.plan([image], {})
        return self.info.count_slot_tokens(plan.scales)


class NaViLMultiModalProcessor(BaseMultiModalProcessor[NaViLProcessingInfo]):
    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """As in vLLM, but a prompt that is too long is refused before its images are decoded.

        Raises:
            ValueError: with a `max_pixels` that fits; and as `_fill_slots`.
        """
        images = inputs.mm_data_items["image"].get_all() if "image" in inputs.mm_data_items else []
        given = [image for image in images if image is not None]  # the others are in vLLM's cache, by their `uuid`
        plans = self.info.plan(given, inputs.hf_processor_mm_kwargs) if given else []
        empty_slot = self.info.image_slot([], 1)
        num_tokens = len(self._fill_slots(inputs.prompt, [empty_slot] * len(images)))
        num_tokens += sum(self.info.count_slot_tokens(plan.scales) - self.info.count_slot_tokens([]) for plan in plans)
        limit = self.info.ctx.model_config.max_model_len
        if num_tokens > limit:
            raise self.info.get_hf_processor().image_processor.context_error(num_tokens, limit, plans)
        return super().apply(inputs, timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Patches of all images, by the folder's image processor."""
        image_processor = self.info.get_hf_processor().image_processor
        features = image_processor.pack(self.info.plan(hf_data["images"], hf_kwargs), return_tensors="pt")
        features["pixel_values"] = features["pixel_values"].to(self.info.ctx.model_config.dtype)
        return features

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        if not hf_inputs:
            return {}
        num_scales = hf_inputs["num_scales"]
        patches_of_scale = hf_inputs["image_grid_thw"].prod(-1)
        num_patches = torch.stack([scales.sum() for scales in patches_of_scale.split(num_scales.tolist())])
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", num_patches),
            "image_grid_thw": MultiModalFieldConfig.flat_from_sizes("image", num_scales, keep_on_cpu=True),
            "num_scales": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        config, tokenizer = self.info.get_hf_config(), self.info.get_tokenizer()

        def slot(index: int) -> PromptUpdateDetails:
            grids = out_mm_kwargs["image"][index]["image_grid_thw"].data.tolist()
            scales = [(rows, columns) for frames, rows, columns in grids for _ in range(frames)]
            text = self.info.image_slot(scales, config.vision_config.spatial_merge_size)
            embedded = [config.image_start_token_id, config.image_token_id]
            return PromptUpdateDetails.select_token_ids(tokenizer.encode(text, add_special_tokens=False), embedded)

        placeholder = tokenizer.encode(IMAGE_PLACEHOLDER, add_special_tokens=False)
        return [PromptReplacement(modality="image", target=placeholder, replacement=slot)]

    def _apply_prompt_updates(
        self, token_ids: list[int], mm_prompt_updates: MultiModalPromptUpdates
    ) -> tuple[list[int], Mapping[str, list[PlaceholderFeaturesInfo]]]:
        tokenizer = self.info.get_tokenizer()
        slots = [updates[0].content.full for updates in mm_prompt_updates.get("image", [])]
        token_ids = self._fill_slots(token_ids, ["".join(tokenizer.convert_ids_to_tokens(slot)) for slot in slots])
        return token_ids, self._find_mm_placeholders(token_ids, mm_prompt_updates)

    def _fill_slots(self, token_ids: Sequence[int], slots: Sequence[str]) -> list[int]:
        """Fills the slots in the prompt's text, as the package does: a token may reach over the end of `<image>`.

        Raises:
            ValueError: different numbers of images and `<image>`, slot tokens in the prompt, or ids that are not those
                of their text.
        """
        tokenizer = self.info.get_tokenizer()
        text = tokenizer.decode(token_ids, skip_special_tokens=False, spaces_between_special_tokens=False)
        if tokenizer.encode(text, add_special_tokens=False) != list(token_ids):
            raise ValueError("with images, the prompt must be a text, or the ids that the tokenizer gives for its text")
        self.info.reject_slot_tokens(text)
        pieces = text.split(IMAGE_PLACEHOLDER)
        if len(pieces) != len(slots) + 1:
            raise ValueError(
                f"the text has {len(pieces) - 1} {IMAGE_PLACEHOLDER} placeholders but {len(slots)} images were given"
            )
        filled = "".join(part for pair in zip(pieces, [*slots, ""], strict=True) for part in pair)
        return tokenizer.encode(filled, add_special_tokens=False)
