"""Loads a model folder through the Auto classes, as users do. `verify` runs this in a fresh process:

    python -m conversion.loading FOLDER SUBFOLDER EXPECTED RESULT

The model is in FOLDER/SUBFOLDER, and its code, which is run, in FOLDER. EXPECTED is empty or a folder of settings to
compare with. RESULT is the file for `torch.save` of what `inspect_folder` returns.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)

TEXT = (
    "The capital of France is Paris, and the Seine flows through it. 12 x 12 = 144; 人工智能 is written in Chinese. "
    "def add(a, b): return a + b"
)
QUESTION = "What is in this picture?"
BOOKKEEPING = {
    *("transformers_version", "name_or_path", "_name_or_path", "_commit_hash", "_from_model_config", "tokenizer_file"),
    *("_attn_implementation_autoset", "torch_dtype", "dtype", "is_local", "local_files_only"),
}
"""Settings that say where a file comes from, and the dtype, which is compared with the weights."""


def inspect_folder(folder: str, subfolder: str = "", expected: str = "") -> dict[str, Any]:
    """What a model folder gives its users.

    Returns:
        `settings` of the folder and `expected` settings, by name; `answers` to a text and a picture (see `answer`).

    Raises:
        ValueError: a part that does not load.
    """
    processor, settings = read_settings(folder, subfolder)
    expected_settings = read_settings(expected, "")[1] if expected else None
    model = load(AutoModel, folder, subfolder, trust_remote_code=True, torch_dtype="auto").eval()
    return {"settings": settings, "expected": expected_settings, "answers": answer(model, processor)}


def load(loader: Any, folder: str, subfolder: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(folder, subfolder=subfolder, **options)
    except Exception as error:  # damaged files make libraries raise exceptions of any kind
        raise ValueError(f"{loader.__name__} does not load: {type(error).__name__}: {error}") from error


def read_settings(folder: str, subfolder: str) -> tuple[ProcessorMixin, dict[str, Any]]:
    """The processor, and each setting in effect, by file and name."""
    config, tokenizer, image_processor, processor = (
        load(loader, folder, subfolder, trust_remote_code=True)
        for loader in (AutoConfig, AutoTokenizer, AutoImageProcessor, AutoProcessor)
    )
    special = {
        "special_tokens_map": tokenizer.special_tokens_map,
        "added_tokens_decoder": tokenizer.added_tokens_decoder,
    }
    files = {
        "config.json": config.to_dict(),
        "generation_config.json": load(GenerationConfig, folder, subfolder).to_dict(),
        "preprocessor_config.json": image_processor.to_dict(),
        "chat template": {"in use": processor.chat_template or processor.tokenizer.chat_template},
        "tokenizer_config.json": {**tokenizer.init_kwargs, **special, "padding_side": tokenizer.padding_side},
        "tokenizer.json": json.loads(tokenizer.backend_tokenizer.to_str()),
    }
    return processor, {f"{file}: {name}": value for file, content in files.items() for name, value in flatten(content)}


def flatten(settings: dict[Any, Any]) -> list[tuple[str, Any]]:
    """Nested settings as pairs of a dotted name and a JSON value."""
    flat = []
    for name, value in settings.items():
        if isinstance(value, dict):
            flat += [(f"{name}.{inner}", part) for inner, part in flatten(value)]
        elif name not in BOOKKEEPING:
            flat.append((str(name), json.loads(json.dumps(value, default=repr))))
    return flat


@torch.no_grad()
def answer(model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, dict[str, Any]]:
    """`inputs` and `logits`, (L, vocabulary) in float64, for a fixed text and a fixed picture."""
    gradient = Image.linear_gradient("L")  # 256 x 256 pixels
    picture = Image.merge("RGB", (gradient, gradient.rotate(90), Image.radial_gradient("L")))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = {
        "text": {"input_ids": processor.tokenizer(TEXT, return_tensors="pt").input_ids},
        "picture": dict(processor.apply_chat_template([{"role": "user", "content": content}], **options)),
    }
    return {name: {"inputs": i, "logits": model(**i).logits[0].double()} for name, i in inputs.items()}


def main(folder: str, subfolder: str, expected: str, result: str) -> int:
    try:
        inspected = inspect_folder(folder, subfolder, expected)
    except ValueError as error:
        sys.stderr.write("\n" + " ".join(str(error).split()))
        return 1
    torch.save(inspected, Path(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
