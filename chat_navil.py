"""Conversations with NaViL: `model.chat`, and a session that keeps its key/value cache from turn to turn."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import BaseStreamer, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from .image_processing_navil import IMAGE_INPUTS, ImagePlan, count_slot_tokens, flatten_images
from .processing_navil import draw_boxes
from .tokenization_navil import (
    END_OF_TURN,
    IMAGE_END_TOKEN,
    IMAGE_PLACEHOLDER,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    NaViLTokenizer,
    expand_image_slots,
    hide_placeholders,
)

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of the cache in transformers, which 5.24 changed."""

MAX_NEW_TOKENS = 1024
PIECE_LENGTH = 65536  # characters
TOKENS_PER_CUT = 64  # upper bound of the tokens that cutting a text in two adds

# Settings of `generate` that a session needs.
SESSION_SETTINGS = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
SESSION_SETTINGS |= {"cache_implementation": None, "past_key_values": None}

GenerationSettings = dict[str, Any] | GenerationConfig | None
ImageInputs = dict[str, Tensor]  # IMAGE_INPUTS, or nothing


class NaViLChatSession:
    """A conversation that keeps its key/value cache, so that each turn prefills only the tokens that it adds.

    The answers are those of `model.chat` with the same history and images. If re-tokenization of an answer differs from
    the generated ids, the cache is cropped to the common prefix.

    Args:
        model, tokenizer: a `NaViLForConditionalGeneration` and its `NaViLTokenizer`.
        generation_config, options: for all turns, as in `chat`.

    Attributes:
        history: (question, answer) of the turns so far, as in `chat`.
        images: `pixel_values`, `image_grid_thw` and `num_scales` of all images so far.
        num_prefilled: tokens of the last turn's prompt that were not in the cache.

    Raises:
        ValueError: settings that rule out a cache of one sequence (beams, several answers, another cache).
    """

    def __init__(
        self,
        model: "NaViLChat",
        tokenizer: NaViLTokenizer,
        generation_config: GenerationSettings = None,
        **options: Any,
    ):
        settings = model._chat_settings(tokenizer, generation_config)
        for name, required in SESSION_SETTINGS.items():
            given = settings.get(name, getattr(model.generation_config, name, None))
            if given not in (None, required):
                raise ValueError(f"a session keeps the cache of one sequence: {name} must be {required}, got {given!r}")
        chat_options(**options)  # raises for an unknown one
        self.model = model
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.options = options
        self.history: list[tuple[str, str]] = []
        self.images: ImageInputs = {}
        self.num_prefilled = 0
        self._capacity = 0  # tokens, of a static cache
        self._reset_cache()

    def ask(self, question: str, images: Any = None, streamer: BaseStreamer | None = None) -> str:
        """Answers the next question.

        Args:
            question: `<image>` marks where the new images go; without any, they go in front of the question.
            images: this turn's new images, as `pixel_values` of `chat` without `num_patches_list`.
            streamer: receives tokens as they are generated, as in `generate`.

        Raises:
            ValueError: as in `chat`. The question and its images are then not part of the session.
        """
        model, tokenizer = self.model, self.tokenizer
        with end_on_error(streamer):
            question, input_ids, images = model._prepare(
                tokenizer, self.options, question, images, self.history, earlier_images=self.images
            )
            settings = model._chat_settings(tokenizer, self.generation_config, None, input_ids.shape[1])
            num_new = settings["max_new_tokens"] or settings["max_length"] - input_ids.shape[1]
            cache, num_cached = self._reusable_cache(input_ids, num_new)
            self._reset_cache()  # if generation fails, the cache is incomplete
            output_ids, [answer] = model._answer(
                tokenizer, [input_ids], images | {CACHE: cache}, self.generation_config, streamer
            )
        self._cache, self._cached_ids = cache, output_ids[0, : int(cache.get_seq_length())]
        self.num_prefilled = input_ids.shape[1] - num_cached
        self.images = images
        self.history.append((question, answer))
        return answer

    def _reset_cache(self) -> None:
        self._cache, self._cached_ids = None, torch.tensor([], dtype=torch.long)

    def _reusable_cache(self, input_ids: Tensor, num_new: int) -> tuple[Cache, int]:
        """A cache for a prompt (1, L) and `num_new` tokens, and how many of the prompt's tokens it holds, less than L.

        It is the cache so far, cropped to the common prefix; static caches can neither be cropped nor grow.
        """
        prompt, cached = input_ids[0, :-1], self._cached_ids.to(input_ids.device)
        length = min(len(prompt), len(cached))
        num_shared = int((prompt[:length] == cached[:length]).cumprod(0).sum())
        text = self.model.config.text_config
        if text.rope_type == "dynamic" and input_ids.shape[1] > text.max_position_embeddings:
            num_shared = 0  # dynamic NTK: the rotation of every key depends on the length
        num_tokens = input_ids.shape[1] + num_new
        is_static = self._cache is not None and not isinstance(self._cache, DynamicCache)
        if is_static and (num_shared < len(cached) or num_tokens > self._capacity):
            num_shared = 0
        if num_shared == 0:
            self._capacity = self.model.static_cache_length(num_tokens)
            return self.model.new_session_cache(num_tokens), 0
        if num_shared < len(cached):
            self._cache.crop(num_shared - len(cached))  # negative: tokens to remove
        return self._cache, num_shared


class NaViLChat:
    """`chat`, `batch_chat` and `chat_session` of `NaViLForConditionalGeneration`, a thin layer on its `generate`."""

    draw_boxes = staticmethod(draw_boxes)

    def chat(
        self,
        tokenizer: NaViLTokenizer,
        pixel_values: Any,
        question: str,
        generation_config: GenerationSettings = None,
        history: Iterable[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: Any = None,
        num_scales: Any = None,
        verbose: bool = False,
        streamer: BaseStreamer | None = None,
        **options: Any,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """Answers a question, with or without images.

        Args:
            tokenizer: a `NaViLTokenizer`.
            pixel_values: None; an image in any form that the image processor reads (PIL, path, URL, bytes, array) or a
                list of them, which may be empty; the image processor's output; or patches (N, 3*p*p) or
                (N, 3, p, p) with `num_patches_list`.
            question: `<image>` marks where the images go; without any, they go in front of a first question.
            generation_config: settings of `generate`; the default is greedy, up to 1024 new tokens, one answer.
            history: earlier (question, answer) turns; `<image>` in their questions stands for the first images.
            return_history: return (answer, history with this turn) instead of the answer.
            num_patches_list: (S, 3) grids of the patches, `image_grid_thw` of the image processor.
            num_scales: (images,) scales of each image; None means one each.
            verbose: write the question and the answer to the standard output.
            streamer: receives tokens as they are generated, as in `generate`; errors end it too.
            options: see `chat_options`.

        Raises:
            ValueError: an empty question, a history that is not pairs of texts, special tokens in the text, different
                numbers of `<image>` and images, image inputs that do not fit together, or more tokens than the context
                holds.
            TypeError: an unknown option.
        """
        with end_on_error(streamer):
            history = as_turns(history)
            packed = {"grids": num_patches_list, "num_scales": num_scales}
            question, input_ids, images = self._prepare(tokenizer, options, question, pixel_values, history, **packed)
            _, [answer] = self._answer(tokenizer, [input_ids], images, generation_config, streamer)
        if verbose:
            sys.stdout.write(f"{question}\n{answer}\n")
        return (answer, [*history, (question, answer)]) if return_history else answer

    def batch_chat(
        self,
        tokenizer: NaViLTokenizer,
        pixel_values: Any,
        questions: Sequence[str],
        generation_config: GenerationSettings = None,
        num_patches_list: Any = None,
        num_scales: Any = None,
        history: None = None,
        return_history: bool = False,
        verbose: bool = False,
        image_counts: Sequence[int] | None = None,
        **options: Any,
    ) -> list[str]:
        """Answers several questions in one batch, each as in `chat`.

        Args:
            pixel_values: None, or a list with one entry per question, each as in `chat`. Packed images (the image
                processor's output, or patches with `num_patches_list`) are assigned to the questions by
                `image_counts`; without it, by the questions' `<image>`; without any, one to each question.
            history, return_history: always None and False (InternVL's interface has them).
            options: see `chat_options`.

        Raises:
            ValueError: as in `chat`, or different numbers of images and questions.
        """
        if history is not None or return_history:
            raise ValueError("batch_chat has no history: history must be None and return_history False")
        questions = list(questions)
        if not questions:
            return []
        images = self._images_of_questions(questions, pixel_values, num_patches_list, num_scales, image_counts)
        pairs = zip(questions, images, strict=True)
        prepared = [self._prepare(tokenizer, options, question, own_images) for question, own_images in pairs]
        questions, prompts, images = zip(*prepared, strict=True)
        _, answers = self._answer(tokenizer, prompts, join_images(images), generation_config)
        if verbose:
            turns = zip(questions, answers, strict=True)
            sys.stdout.writelines(f"{question}\n{answer}\n" for question, answer in turns)
        return answers

    def chat_session(
        self, tokenizer: NaViLTokenizer, generation_config: GenerationSettings = None, **options: Any
    ) -> NaViLChatSession:
        """Starts a `NaViLChatSession`, whose arguments and errors it has."""
        return NaViLChatSession(self, tokenizer, generation_config, **options)

    def _prepare(
        self,
        tokenizer: NaViLTokenizer,
        options: dict[str, Any],
        question: str,
        pixel_values: Any,
        history: Sequence[tuple[str, str]] = (),
        grids: Any = None,
        num_scales: Any = None,
        earlier_images: ImageInputs | None = None,
    ) -> tuple[str, Tensor, ImageInputs]:
        """The question with its `<image>`, the conversation's ids (1, L) and the inputs of all its images.

        `earlier_images` are the inputs of the history's images; if None, `pixel_values` begins with these images.
        """
        template, image_settings = chat_options(**options)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"question must be a text that is not empty, got {question!r:.80}")
        if self.config.image_token_id is None:
            self.init_special_token_ids(tokenizer)
        plans, images = self.plan_images(pixel_values, grids, num_scales, **image_settings)
        if IMAGE_PLACEHOLDER not in question and not (history and earlier_images is None):
            question = f"{IMAGE_PLACEHOLDER}\n" * len(plans) + question
        earlier = self._plans_of(earlier_images) if earlier_images else []
        input_ids = self.encode_chat(tokenizer, [*history, (question, None)], [*earlier, *plans], **template)
        if plans and not images:
            packed = self.image_processor.pack(plans, return_tensors="pt", device=self.device)
            images = {name: tensor.to(self.device) for name, tensor in packed.items()}
        return question, input_ids, join_images([earlier_images, images])

    def _answer(
        self,
        tokenizer: NaViLTokenizer,
        prompts: Sequence[Tensor],
        inputs: dict[str, Any],
        generation_config: GenerationSettings,
        streamer: BaseStreamer | None = None,
    ) -> tuple[Tensor, list[str]]:
        """Generates from prompts (1, L) each; ids of prompts and answers (B, L + new), and the answers as texts."""
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        input_ids = pad([ids[0] for ids in prompts], padding_value=tokenizer.pad_token_id or 0)
        attention_mask = pad([torch.ones_like(ids[0]) for ids in prompts])
        length = input_ids.shape[1]
        settings = self._chat_settings(tokenizer, generation_config, streamer, length)
        if settings.get("num_return_sequences", self.generation_config.num_return_sequences) not in (None, 1):
            raise ValueError("chat gives one answer per question: num_return_sequences must be 1")
        output_ids = self.generate(input_ids=input_ids, attention_mask=attention_mask, **settings | inputs)
        answers = tokenizer.batch_decode(output_ids[:, length:], skip_special_tokens=True)
        return output_ids, [answer.strip() for answer in answers]

    def _chat_settings(
        self,
        tokenizer: NaViLTokenizer,
        generation_config: GenerationSettings,
        streamer: BaseStreamer | None = None,
        prompt_length: int = 0,
    ) -> dict[str, Any]:
        """Arguments of `generate`: defaults of chat, the caller's settings, and what chat itself needs."""
        if isinstance(generation_config, GenerationConfig):
            # transformers 4's default max_length is 20. With a longer prompt it cannot be the caller's choice.
            max_length, default = generation_config.max_length, GenerationConfig().max_length
            is_chosen = max_length is not None and (max_length != default or prompt_length < max_length)
            counts = is_chosen and generation_config.max_new_tokens is None
            generation_config = {**generation_config.to_diff_dict(), "max_length": max_length if counts else None}
        settings = {
            "do_sample": False,
            "eos_token_id": tokenizer.convert_tokens_to_ids(END_OF_TURN),
            "pad_token_id": tokenizer.pad_token_id,
            **(generation_config or {}),
        }
        if settings.get("max_new_tokens") is None:  # transformers ignores max_length if both are given
            settings["max_new_tokens"] = MAX_NEW_TOKENS if settings.get("max_length") is None else None
        if settings.get("stop_strings") is not None:
            settings.setdefault("tokenizer", tokenizer)
        if streamer is not None:
            settings["streamer"] = streamer
        return {**settings, "return_dict_in_generate": False}

    def encode_chat(
        self,
        tokenizer: NaViLTokenizer,
        turns: Sequence[tuple[str, str | None]],
        plans: Sequence[ImagePlan],
        allow_control_tokens: bool = False,
        **template: Any,
    ) -> Tensor:
        """Ids (1, L) of a conversation of (question, answer) turns, the last answer None; images as planned.

        Raises:
            ValueError: special tokens in a text, different numbers of `<image>` and plans, or too many tokens.
        """
        texts = [text for turn in turns for text in turn if text is not None]
        roles = cycle(("user", "assistant"))
        messages = [{"role": next(roles), "content": text} for text in texts]
        template |= {"allow_control_tokens": allow_control_tokens, "add_generation_prompt": True}
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, **template)
        scales, cell = [plan.scales for plan in plans], self.image_processor.cell
        if plans or len(prompt) > PIECE_LENGTH:  # `generate` checks short texts without tokenizing them again
            [text] = expand_image_slots([prompt], [[] for _ in plans], cell, allow_control_tokens)
            num_tokens = count_tokens(tokenizer, text, self.config.text_config.context_length)
            num_tokens += sum(count_slot_tokens(of_image, cell) - 2 for of_image in scales)  # `text` has both ends
            self.check_context(num_tokens, plans)
        [prompt] = expand_image_slots([prompt], scales, cell, allow_control_tokens)
        input_ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        return input_ids.to(self.device)

    def plan_images(
        self, pixel_values: Any, grids: Any = None, num_scales: Any = None, **settings: Any
    ) -> tuple[list[ImagePlan], ImageInputs]:
        """Plans of image inputs in any form that `chat` takes; and the inputs themselves if they are packed already."""
        if isinstance(pixel_values, Mapping) and "pixel_values" in pixel_values:  # the image processor's output
            grids = pixel_values.get("image_grid_thw") if grids is None else grids
            num_scales = pixel_values.get("num_scales") if num_scales is None else num_scales
            pixel_values = pixel_values["pixel_values"]
            if grids is None:
                raise ValueError("the image processor's output lacks image_grid_thw")
        if grids is not None:
            if pixel_values is None:
                raise ValueError("num_patches_list and num_scales need pixel_values")
            if settings:
                raise ValueError(f"{', '.join(settings)} cannot change patches that are packed already")
            images = self._packed_inputs(pixel_values, grids, num_scales)
            return self._plans_of(images), images
        if num_scales is not None or self._are_patches(pixel_values):
            raise ValueError("patches and num_scales need num_patches_list, the image processor's image_grid_thw")
        pictures = [] if pixel_values is None else flatten_images(pixel_values)
        return self.image_processor.plan(pictures, multi_scale=True, **settings) if pictures else [], {}

    def _plans_of(self, images: ImageInputs) -> list[ImagePlan]:
        return self.image_processor.plans_of_grids(images["image_grid_thw"], images["num_scales"])

    def _are_patches(self, pixel_values: Any) -> bool:
        """Whether an array or tensor is floating point and has the shape of patches."""
        vision = self.config.vision_config
        is_float = "float" in str(getattr(pixel_values, "dtype", ""))
        return is_float and pixel_values.shape[1:] in ((vision.patch_dim,), (3, vision.patch_size, vision.patch_size))

    def _packed_inputs(self, pixel_values: Any, grids: Any, num_scales: Any) -> ImageInputs:
        """Packed images as tensors on the model's device; without `num_scales`, each grid is an image."""
        grids = whole_numbers("num_patches_list", grids)
        num_scales = whole_numbers("num_scales", [1] * len(grids) if num_scales is None else num_scales).reshape(-1)
        patches = self.vision_model.check_inputs(torch.as_tensor(pixel_values), grids)
        images = {"pixel_values": patches, "image_grid_thw": grids, "num_scales": num_scales}
        return {name: tensor.to(self.device) for name, tensor in images.items()}

    def _images_of_questions(
        self, questions: list[str], pixel_values: Any, grids: Any, num_scales: Any, image_counts: Sequence[int] | None
    ) -> list:
        """Each question's `pixel_values` for `chat`."""
        if grids is None and not isinstance(pixel_values, Mapping):
            images = [None] * len(questions) if pixel_values is None else pixel_values
            if not isinstance(images, list | tuple) or len(images) != len(questions):
                raise ValueError(
                    f"expected a list with images for each of {len(questions)} questions, got {images!r:.80}"
                )
            return list(images)
        _, packed = self.plan_images(pixel_values, grids, num_scales)
        counts = [question.count(IMAGE_PLACEHOLDER) for question in questions]
        counts = counts if any(counts) else [1] * len(questions)
        counts = counts if image_counts is None else whole_numbers("image_counts", image_counts).reshape(-1).tolist()
        if len(counts) != len(questions) or min(counts) < 0 or sum(counts) != len(packed["num_scales"]):
            raise ValueError(f"{len(questions)} questions take {counts} of {len(packed['num_scales'])} images")
        num_scales = packed["num_scales"].split(counts)
        grids = packed["image_grid_thw"].split([int(scales.sum()) for scales in num_scales])
        patches = packed["pixel_values"].split([int(rows.prod(-1).sum()) for rows in grids])
        parts = zip(patches, grids, num_scales, strict=True)
        return [dict(zip(IMAGE_INPUTS, part, strict=True)) if len(part[0]) else None for part in parts]


def chat_options(
    allow_control_tokens: bool = False,
    system_message: str | None = None,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
    scale_downsample_ratio: float | None = None,
    IMG_START_TOKEN: str = IMAGE_START_TOKEN,
    IMG_END_TOKEN: str = IMAGE_END_TOKEN,
    IMG_CONTEXT_TOKEN: str = IMAGE_TOKEN,
    anyres_image_size: bool = True,
    **unknown: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of `chat`: settings of the chat template, and those settings of the image processor that are given.

    Args:
        allow_control_tokens: accept special tokens in the question and the history, as the released code does.
        system_message: replaces the tokenizer's.
        min_pixels, max_pixels, scale_downsample_ratio: as in `NaViLImageProcessor`.
        IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN: the image tokens, which cannot be changed.
        anyres_image_size: always True, the only mode of NaViL.

    Raises:
        ValueError: other image tokens, or `anyres_image_size=False`.
        TypeError: an unknown option.
    """
    if unknown:
        raise TypeError(f"unknown option {', '.join(unknown)}; settings of `generate` go into generation_config")
    if not anyres_image_size:
        raise ValueError("anyres_image_size must be True: NaViL always uses an image's own resolution")
    if (IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN) != (IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_TOKEN):
        raise ValueError(f"the image tokens are {IMAGE_START_TOKEN}, {IMAGE_END_TOKEN} and {IMAGE_TOKEN}")
    template = {"allow_control_tokens": allow_control_tokens, "system_message": hide_placeholders(system_message)}
    budget = {"min_pixels": min_pixels, "max_pixels": max_pixels, "scale_downsample_ratio": scale_downsample_ratio}
    return template, {name: value for name, value in budget.items() if value is not None}


def as_turns(history: Iterable[tuple[str, str]] | None) -> list[tuple[str, str]]:
    """A history, in any kind of sequence, as pairs of texts; a ValueError for anything else."""
    turns = [] if history is None else list(history)
    for turn in turns:
        if isinstance(turn, str | Mapping) or [isinstance(text, str) for text in turn] != [True, True]:
            raise ValueError(f"history must be (question, answer) pairs of texts, got {turn!r:.80}")
    return [tuple(turn) for turn in turns]


def whole_numbers(name: str, values: Any) -> Tensor:
    """A number, tensor, array or (nested) sequence of them as an int64 tensor; a ValueError for fractions."""

    def as_list(values: Any) -> Any:
        if hasattr(values, "tolist"):  # arrays, and tensors on any device
            return values.tolist()
        is_sequence = isinstance(values, Iterable) and not isinstance(values, str)
        return [as_list(value) for value in values] if is_sequence else values

    numbers = torch.tensor(as_list(values), dtype=torch.float64)
    if (numbers != numbers.long()).any():
        raise ValueError(f"{name} must be whole numbers, got {values!r:.80}")
    return numbers.long()


def count_tokens(tokenizer: NaViLTokenizer, text: str, limit: int) -> int:
    """Number of tokens of a text; of a long one a lower bound, counted piece by piece.

    Raises:
        ValueError: more than `limit` tokens before the last piece: tokenizing a far longer text would take gigabytes.
    """
    num_tokens = 0
    for start in range(0, len(text), PIECE_LENGTH):
        piece = text[start : start + PIECE_LENGTH]
        num_tokens += len(tokenizer(piece, add_special_tokens=False).input_ids) - (TOKENS_PER_CUT if start else 0)
        if num_tokens > limit and start + PIECE_LENGTH < len(text):
            raise ValueError(
                f"the prompt has more than {num_tokens} tokens but the context holds {limit}: shorten the text"
            )
    return num_tokens


@contextmanager
def end_on_error(streamer: BaseStreamer | None) -> Iterator[None]:
    """Ends a streamer if an error occurs, so that its reader does not wait forever."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise


def join_images(images: Iterable[ImageInputs]) -> ImageInputs:
    """Concatenates the image inputs of several prompts, some of which may have none."""
    images = [inputs for inputs in images if inputs]
    return {name: torch.cat([inputs[name] for inputs in images]) for name in IMAGE_INPUTS} if images else {}
