"""A conversation with NaViL that keeps its key/value cache from turn to turn."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationConfig

from .tokenization_navil import put_images_in_front

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
