"""Conversations with NaViL: `model.chat`, and a session that keeps its key/value cache from turn to turn."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationConfig

from .image_processing_navil import flatten_images
from .tokenization_navil import END_OF_TURN, expand_image_slots, put_images_in_front

ONE_SEQUENCE = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "cache_implementation": None,
    "past_key_values": None,
}
"""The settings of `generate` that a session cannot leave open."""


class NaViLChatSession:
    """Asks a model question after question; a turn runs only what it adds to the conversation through the model.

    The answers are those of `model.chat` with the same history and images. What is kept is compared token by token:
    where an answer's text is tokenized otherwise than it was generated, the cache is cut back to the last equal token.

    Args:
        model: a `NaViLForConditionalGeneration`.
        tokenizer: a `NaViLTokenizer`.
        generation_config: settings for `generate`, for all turns; the defaults are `chat`'s.

    Attributes:
        history: (question, answer) of the turns so far, as `chat` takes and returns it.
        images: `pixel_values`, `image_grid_thw` and `num_scales` of all images so far, as `chat` takes them.
        num_prefilled: tokens of the last turn's prompt that were not in the cache.

    Raises:
        ValueError: settings under which there is no cache of one sequence (beams, several answers, another cache).
    """

    def __init__(self, model: Any, tokenizer: Any, generation_config: dict[str, Any] | GenerationConfig | None = None):
        settings = model._chat_settings(tokenizer, generation_config, None)
        for name, required in ONE_SEQUENCE.items():
            given = settings.get(name, getattr(model.generation_config, name, None))
            if given not in (None, required):
                raise ValueError(f"a session keeps the cache of one sequence: {name} must be {required}, got {given!r}")
        if model.config.image_token_id is None:
            model.init_special_token_ids(tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.history: list[tuple[str, str]] = []
        self.images: dict[str, Tensor] = {}
        self.num_prefilled = 0
        self._forget()

    def ask(self, question: str, images: Any = None, streamer: Any = None) -> str:
        """Answers the next question.

        Args:
            question: may say where the new images go by `<image>`; else they go in front of it.
            images: None, or this turn's new images: an image (PIL, path or array), a list of them, or the image
                processor's output.
            streamer: receives tokens as they are generated, as in `generate`.

        Raises:
            ValueError: as `chat` does. The session is then as it was before the question.
        """
        model, tokenizer = self.model, self.tokenizer
        model._check_question(question)
        new_images = model._image_inputs(images, None, None)
        question = put_images_in_front(question, len(new_images.get("num_scales", ())))
        all_images = self._with(new_images)
        input_ids = model._encode_chat(tokenizer, [*self.history, (question, None)], all_images)

        cache, num_cached = self._cut_to_prefix_of(input_ids)
        self._forget()  # a turn that fails leaves no cache that is half written
        images = new_images if num_cached else all_images
        settings = model._chat_settings(tokenizer, self.generation_config, streamer)
        output_ids, answer = model._answer(tokenizer, input_ids, images | settings | {"past_key_values": cache})
        self._cache, self._cached_ids = cache, output_ids[0, : cache.get_seq_length()]
        self.num_prefilled = input_ids.shape[1] - num_cached
        self.images = all_images
        self.history.append((question, answer))
        return answer

    def _forget(self) -> None:
        self._cache, self._cached_ids = DynamicCache(), torch.tensor([], dtype=torch.long)

    def _with(self, new_images: dict[str, Tensor]) -> dict[str, Tensor]:
        """The images so far and the new ones."""
        if not (self.images and new_images):
            return self.images or new_images
        return {name: torch.cat([images, new_images[name]]) for name, images in self.images.items()}

    def _cut_to_prefix_of(self, input_ids: Tensor) -> tuple[DynamicCache, int]:
        """The cache, cut to the tokens that it shares with a prompt (1, L), and their number, less than L."""
        prompt, cached = input_ids[0, :-1], self._cached_ids.to(input_ids.device)
        length = min(len(prompt), len(cached))
        num_shared = int((prompt[:length] == cached[:length]).cumprod(0).sum())
        text = self.model.config.text_config
        if text.rope_type == "dynamic" and input_ids.shape[1] > text.max_position_embeddings:
            num_shared = 0  # beyond the trained context, every key's rotation depends on the length
        if num_shared == 0:
            return DynamicCache(), 0
        if num_shared < len(cached):
            self._cache.crop(num_shared - len(cached))  # less than 0: so many from the end
        return self._cache, num_shared


class NaViLChat:
    """`chat` and `chat_session` of `NaViLForConditionalGeneration`, a thin layer on its `generate`."""

    @torch.no_grad()
    def chat(
        self,
        tokenizer: Any,
        pixel_values: Any,
        question: str,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        history: Sequence[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: Any = None,
        num_scales: Any = None,
        anyres_image_size: bool = True,
        verbose: bool = False,
        streamer: Any = None,
        allow_control_tokens: bool = False,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """Answers a question about images, or about none.

        Args:
            tokenizer: a `NaViLTokenizer`.
            pixel_values: None; an image (PIL, path or array) or a list of them, which may be empty; the image
                processor's output; or patches (N, 3*p*p) or (N, 3, p, p) with `num_patches_list`.
            question: may say where the images go by `<image>`; else they go in front of a first question.
            generation_config: settings for `generate`; the default is greedy, up to 1024 new tokens, one answer.
            history: earlier (question, answer) turns; `<image>` in their questions takes the first images.
            return_history: return (answer, history with this turn) instead of the answer.
            num_patches_list: (S, 3) grids of patches given as a tensor, `image_grid_thw` of the image processor.
            num_scales: (images,) scales of each image; None means one each.
            anyres_image_size: always True, the only mode that NaViL has.
            verbose: write the question and the answer to the standard output.
            streamer: receives tokens as they are generated, as in `generate`.
            allow_control_tokens: let special tokens through that are typed in the question or the history, as the
                released code does.

        Raises:
            ValueError: an empty question, a history that is not pairs of texts, special tokens in the text, another
                number of `<image>` than of images, image inputs that do not fit together, or more tokens than the
                context holds.
        """
        if not anyres_image_size:
            raise ValueError("anyres_image_size must be True: NaViL sees images at their own resolution only")
        self._check_question(question)
        if self.config.image_token_id is None:
            self.init_special_token_ids(tokenizer)
        history = list(history or [])
        for turn in history:
            if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
                raise ValueError(f"history must be (question, answer) pairs of texts, got {turn!r:.80}")

        def count_text(num_images: int) -> int:
            asked = question if history else put_images_in_front(question, num_images)
            empty = {"image_grid_thw": torch.empty(0, 3), "num_scales": torch.zeros(num_images, dtype=torch.long)}
            ids = self._encode_chat(tokenizer, [*history, (asked, None)], empty, allow_control_tokens)
            return ids.shape[1] - 2 * num_images  # <img> and </img> are there already

        images = self._image_inputs(pixel_values, num_patches_list, num_scales, count_text)
        if not history:
            question = put_images_in_front(question, len(images.get("num_scales", ())))

        input_ids = self._encode_chat(tokenizer, [*history, (question, None)], images, allow_control_tokens)
        settings = self._chat_settings(tokenizer, generation_config, streamer)
        _, answer = self._answer(tokenizer, input_ids, images | settings)
        if verbose:
            sys.stdout.write(f"{question}\n{answer}\n")
        return (answer, [*history, (question, answer)]) if return_history else answer

    def chat_session(
        self, tokenizer: Any, generation_config: dict[str, Any] | GenerationConfig | None = None
    ) -> NaViLChatSession:
        """A conversation that keeps its cache from turn to turn; arguments and errors are `NaViLChatSession`'s."""
        return NaViLChatSession(self, tokenizer, generation_config)

    @staticmethod
    def _check_question(question: Any) -> None:
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"question must be a text that is not empty, got {question!r}")

    def _answer(self, tokenizer: Any, input_ids: Tensor, options: dict[str, Any]) -> tuple[Tensor, str]:
        """Generates from a prompt (1, L); the ids of prompt and answer (1, L + new), and the answer as a text."""
        output_ids = self.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)
        answer_ids = output_ids[0, input_ids.shape[1] :]
        return output_ids, tokenizer.decode(answer_ids, skip_special_tokens=True).strip()

    def _chat_settings(
        self, tokenizer: Any, generation_config: dict[str, Any] | GenerationConfig | None, streamer: Any
    ) -> dict[str, Any]:
        """Arguments of `generate`: chat's defaults, the caller's settings, and what chat itself relies on."""
        if isinstance(generation_config, GenerationConfig):
            generation_config = generation_config.to_diff_dict()
        settings = {
            "do_sample": False,
            "eos_token_id": tokenizer.convert_tokens_to_ids(END_OF_TURN),
            "pad_token_id": tokenizer.pad_token_id,
            **(generation_config or {}),
        }
        if settings.get("max_new_tokens") is None:  # a max_length counts only where the other limit is off
            settings["max_new_tokens"] = 1024 if settings.get("max_length") is None else None
        if settings.get("stop_strings") is not None:
            settings.setdefault("tokenizer", tokenizer)
        if streamer is not None:
            settings["streamer"] = streamer
        return {**settings, "return_dict_in_generate": False}

    def _encode_chat(
        self,
        tokenizer: Any,
        turns: Sequence[tuple[str, str | None]],
        images: dict[str, Tensor],
        allow_control_tokens: bool = False,
    ) -> Tensor:
        """Ids (1, L) of a conversation whose last turn has no answer yet."""
        messages = []
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        prompt = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, allow_control_tokens=allow_control_tokens
        )
        grids = images["image_grid_thw"].tolist() if images else []
        num_scales = images["num_scales"].tolist() if images else []
        merge_size = self.config.vision_config.spatial_merge_size
        [prompt] = expand_image_slots([prompt], grids, num_scales, merge_size, allow_control_tokens)
        input_ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        return input_ids.to(self.device)

    def _image_inputs(
        self, pixel_values: Any, grids: Any, num_scales: Any, count_text: Callable[[int], int] | None = None
    ) -> dict[str, Tensor]:
        """Every form of image input that `chat` takes -> `pixel_values`, `image_grid_thw` and `num_scales`.

        `count_text` says how many tokens of text there are beside so many images, to refuse images beyond the context
        before they fill the memory.
        """
        if pixel_values is None or isinstance(pixel_values, list | tuple) and not pixel_values:
            if grids is not None or num_scales is not None:
                raise ValueError("num_patches_list and num_scales need pixel_values")
            return {}
        if hasattr(pixel_values, "keys"):  # the image processor's output
            missing = [name for name in ("pixel_values", "image_grid_thw") if name not in pixel_values]
            if missing:
                raise ValueError(f"the image processor's output lacks {', '.join(missing)}")
            grids = pixel_values["image_grid_thw"] if grids is None else grids
            num_scales = pixel_values.get("num_scales") if num_scales is None else num_scales
            pixel_values = pixel_values["pixel_values"]
        elif grids is None:
            if num_scales is not None or self._are_patches(pixel_values):
                raise ValueError("patches and num_scales need num_patches_list, the image processor's image_grid_thw")
            context = {}
            if count_text is not None:
                num_text_tokens = count_text(len(flatten_images(pixel_values)))
                context = {
                    "context_length": self.config.text_config.context_length,
                    "num_text_tokens": num_text_tokens,
                }
            images = self.image_processor(pixel_values, multi_scale=True, return_tensors="pt", **context)
            return {name: tensor.to(self.device) for name, tensor in images.items()}
        images = self._packed_inputs(pixel_values, grids, num_scales)
        return {name: tensor.to(self.device) for name, tensor in images.items()}

    def _are_patches(self, pixel_values: Any) -> bool:
        """Whether an array or tensor can only be patches: floating point and of their shape."""
        shape = tuple(getattr(pixel_values, "shape", ()))
        vision = self.config.vision_config
        is_float = "float" in str(getattr(pixel_values, "dtype", ""))
        return is_float and shape[1:] in ((vision.patch_dim,), (3, vision.patch_size, vision.patch_size))

    @staticmethod
    def _packed_inputs(pixel_values: Any, grids: Any, num_scales: Any) -> dict[str, Tensor]:
        """Patches and their grids as tensors; without `num_scales`, every grid is an image of its own."""
        try:
            patches, grids = torch.as_tensor(pixel_values), torch.as_tensor(grids)
            num_scales = torch.ones(len(grids), dtype=torch.long) if num_scales is None else torch.as_tensor(num_scales)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"patches, num_patches_list and num_scales must be tensors or numbers: {error}") from error
        if grids.ndim != 2 or grids.shape[1:] != (3,) or not len(grids) or grids.is_floating_point():
            raise ValueError(
                f"num_patches_list must be (scales, 3) whole numbers, got {tuple(grids.shape)} {grids.dtype}"
            )
        if num_scales.ndim != 1 or num_scales.is_floating_point() or (num_scales < 1).any():
            raise ValueError(f"num_scales must be one whole number of at least 1 per image, got {num_scales.tolist()}")
        if patches.ndim not in (2, 4):
            raise ValueError(f"patches must be (N, 3*p*p) or (N, 3, p, p), got {tuple(patches.shape)}")
        return {"pixel_values": patches.flatten(1), "image_grid_thw": grids, "num_scales": num_scales}
