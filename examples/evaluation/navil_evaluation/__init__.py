"""NaViL in the evaluation kits that others compare models with: what both wrappers share."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

IMAGE_PLACEHOLDER = "<image>"


class NaViLAnswers:
    """A loaded model that answers interleaved texts and images.

    Args:
        path: model folder or name on the Hub.
        subfolder: where in it the weights are, as `tiny`.
        device: `cuda`, `cpu`, ...; None takes the GPU where there is one.
        max_new_tokens: limit of an answer unless a question has its own.
    """

    def __init__(self, path: str, subfolder: str = "", device: str | None = None, max_new_tokens: int = 1024):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        options = {"subfolder": subfolder, "trust_remote_code": True}
        self.tokenizer = AutoTokenizer.from_pretrained(path, **options)
        self.model = AutoModel.from_pretrained(path, torch_dtype=dtype, **options).eval().to(device)
        self.max_new_tokens = max_new_tokens

    def answer(self, parts: Sequence[tuple[str, Any]], **settings: Any) -> str:
        """Answers one question.

        Args:
            parts: ("text", text) and ("image", PIL image or path), in the order in which they are to be read.
            settings: for `generate`; the default is greedy.

        Raises:
            ValueError: a part of another kind, or a text that contains `<image>` itself.
        """
        question, images = "", []
        for kind, value in parts:
            if kind not in ("text", "image"):
                raise ValueError(f"a part must be text or image, got {kind!r}")
            if kind == "text" and IMAGE_PLACEHOLDER in value:
                raise ValueError(f"a text may not contain {IMAGE_PLACEHOLDER}: {value!r:.80}")
            question += f"{IMAGE_PLACEHOLDER}\n" if kind == "image" else value
            images += [value] if kind == "image" else []
        settings = {"do_sample": False, "max_new_tokens": self.max_new_tokens, **settings}
        return self.model.chat(self.tokenizer, images or None, question, settings)


def make_torchvision_importable() -> None:
    """Gives torchvision the two operator schemas that it lacks beside a torch of another build.

    Both kits import torchvision, neither needs its operators for NaViL. Without torchvision nothing is done.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        schemas = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(schemas)  # an operator lives as long as its library


_kept: list[Any] = []
