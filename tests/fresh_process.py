"""Loads models in a process that knows nothing of this repository, and compares them with what was saved.

python tests/fresh_process.py EXPECTED.pt ...            each names a folder or a repository of a Hub
python tests/fresh_process.py --repository ROOT IMAGE    weights in a subfolder, code at the root
"""

import copy
import pickle
import sys

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline

TEXT = "Was ist das? 你好"


def load(auto_class, name, **options):
    return auto_class.from_pretrained(name, trust_remote_code=True, **options)


def settings_of(image_processor) -> dict:
    """All but the code's place, which is that of the repository."""
    return {name: value for name, value in image_processor.to_dict().items() if name != "auto_map"}


def save_expected(original, name, path, image) -> str:
    """Saves what the model of that name has to give: what the original gives, a model with its processor."""
    image.save(f"{path}.png")
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": TEXT}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = dict(original.processor.apply_chat_template(messages, **options))
    with torch.no_grad():
        logits = original.model(**inputs).logits
    answer = original.model.chat(original.tokenizer, image, TEXT, {"max_new_tokens": 6})
    expected = {"name": str(name), "inputs": inputs, "logits": logits, "image": f"{path}.png", "answer": answer}
    expected |= {
        "ids": original.tokenizer(TEXT)["input_ids"],
        "settings": settings_of(original.processor.image_processor),
    }
    torch.save(expected, path)
    return str(path)


def check_model(path: str, processor_first: bool) -> None:
    expected = torch.load(path)
    name = expected["name"]
    classes = (AutoProcessor, AutoModel) if processor_first else (AutoModel, AutoProcessor)
    loaded = {auto_class: load(auto_class, name) for auto_class in classes}
    model, processor = loaded[AutoModel].eval(), loaded[AutoProcessor]
    tokenizer, image_processor = load(AutoTokenizer, name), load(AutoImageProcessor, name)
    for copied in (model, pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            logits = copied(**expected["inputs"]).logits
        assert torch.equal(logits, expected["logits"]), (logits - expected["logits"]).abs().max()
    assert model.vision_model.config._attn_implementation == model.language_model.config._attn_implementation == "sdpa"
    assert processor.tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"] == expected["ids"]
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert settings_of(processor.image_processor) == expected["settings"]
    for original in (model.image_processor, processor.image_processor, image_processor):
        for copied in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
            assert copied.to_dict() == original.to_dict()
            assert copied(np.zeros((9, 9)))["num_scales"].tolist() == [1]
    assert model.chat(tokenizer, expected["image"], TEXT, {"max_new_tokens": 6}) == expected["answer"]


def check_repository(root: str, image: str) -> None:
    """Prints three answers: by chat, by generate and by the pipeline."""
    tiny = {"subfolder": "tiny"}
    processor, model = load(AutoProcessor, root, **tiny), load(AutoModel, root, **tiny).eval()
    tokenizer = load(AutoTokenizer, root, **tiny)
    load(AutoImageProcessor, root, **tiny)
    content = [{"type": "image", "url": image}, {"type": "text", "text": "Which bar is the highest?"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    new_ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    print(model.chat(tokenizer, image, content[1]["text"]), processor.decode(new_ids, skip_special_tokens=True))  # noqa: T201
    print("pipeline", file=sys.stderr)  # noqa: T201 - it says its device
    pipe = pipeline("image-text-to-text", model=root, trust_remote_code=True, model_kwargs=tiny)
    print(pipe(text=messages, return_full_text=False)[0]["generated_text"])  # noqa: T201


if __name__ == "__main__":
    if sys.argv[1] == "--repository":
        check_repository(*sys.argv[2:])
    else:
        for number, path in enumerate(sys.argv[1:]):
            check_model(path, processor_first=number == 0)
