"""Loads a model folder through the Auto classes, as its users will; `verify` runs this in a fresh process.

    python checkpoint_loading.py FOLDER SUBFOLDER EXPECTED RESULT

FOLDER/SUBFOLDER is the model and FOLDER has its code, which is run; EXPECTED is a folder of settings to read too, or
empty. RESULT is a file for `torch.save`: the settings of both by name, and inputs and logits of a text and a picture.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, GenerationConfig

TEXT = (
    "The capital of France is Paris, and the Seine flows through it. 12 x 12 = 144; 人工智能 is written in Chinese. "
    "def add(a, b): return a + b"
)
QUESTION, PICTURE = "What is in this picture?", Path(__file__).with_name("examples") / "shapes.png"
BOOKKEEPING = {
    *("transformers_version", "name_or_path", "_name_or_path", "_commit_hash", "_from_model_config", "tokenizer_file"),
    *("_attn_implementation_autoset", "torch_dtype", "dtype", "is_local", "local_files_only"),
}
"""Names of settings that say where a file comes from. The weights' dtype is compared with the weights."""


def load(loader: Any, folder: str, subfolder: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(folder, subfolder=subfolder, **options)
    except Exception as error:  # whatever the folder's files make of the libraries
        raise ValueError(f"{loader.__name__} does not load: {type(error).__name__}: {error}") from error


def read_settings(folder: str, subfolder: str) -> tuple[Any, dict[str, Any]]:
    """The processor, and every effective setting under the name of the file that it belongs to."""
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
    """Nested settings as (dotted name, value), the values as JSON has them."""
    flat = []
    for name, value in settings.items():
        if isinstance(value, dict):
            flat += [(f"{name}.{inner}", part) for inner, part in flatten(value)]
        elif name not in BOOKKEEPING:
            flat.append((str(name), json.loads(json.dumps(value, default=repr))))
    return flat


@torch.no_grad()
def answer(model: Any, processor: Any) -> dict[str, dict[str, Any]]:
    """Inputs and logits, (L, vocabulary) in float64, of a fixed text and a fixed picture."""
    content = [{"type": "image", "path": str(PICTURE)}, {"type": "text", "text": QUESTION}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = {
        "text": {"input_ids": processor.tokenizer(TEXT, return_tensors="pt").input_ids},
        "picture": dict(processor.apply_chat_template([{"role": "user", "content": content}], **options)),
    }
    return {name: {"inputs": i, "logits": model(**i).logits[0].double()} for name, i in inputs.items()}


def main(folder: str, subfolder: str, expected: str, result: str) -> int:
    try:
        processor, settings = read_settings(folder, subfolder)
        wanted = read_settings(expected, "")[1] if expected else None
        model = load(AutoModel, folder, subfolder, trust_remote_code=True, torch_dtype="auto").eval()
    except ValueError as error:
        sys.stderr.write(" ".join(f"\n{error}".split()))
        return 1
    torch.save({"settings": settings, "expected": wanted, "answers": answer(model, processor)}, Path(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
