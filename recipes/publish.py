"""Makes a trained checkpoint the repository's embedded model, with its numbers in its model card.

python -m recipes.publish runs/s2.pairs/final tiny
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from . import evaluate
from .blueprint import load
from .train import DIALS_FILE

WEIGHTS = "model.safetensors"
KEPT = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", DIALS_FILE),
)
"""Files of a published model besides its weights; its code is in the repository's root."""

CARD = """\
---
license: mit
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- navil
- custom_code
---

# A small NaViL

{parameters:.1f} M parameters, trained from nothing by `recipes/` on pictures that it draws itself: text, receipts,
charts, shapes, boxes, two images, two turns, and arithmetic without a picture. It knows nothing else of the world.

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(".", subfolder="tiny", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(".", subfolder="tiny", trust_remote_code=True)
print(model.chat(tokenizer, "picture.png", "What does the text say?"))
```

## Held-out results

{count} samples per task at full difficulty; exact match but for case, chart values that are not written on top within
2, boxes by IoU of at least 0.5. `majority` always gives the most frequent answer, `blind` is this model on blank images
of the same sizes, `one scale` is this model without multi-scale packing.
Command: `python -m recipes.evaluate tiny --count {count}`.

{table}
{answers:,} answers given in training. How far each task's difficulty dial had opened (1 is the
full distribution): {dials}.
"""

TABLE_AT_DIALS = """
The same table at these difficulties, by
`python -m recipes.evaluate tiny --count {count} --dials tiny/dials.json`:

{table}"""


def publish(checkpoint: Path, destination: Path, count: int) -> None:
    """Copies the model's files, its weights in bf16, and writes its card, about the weights as they are then.

    Raises:
        ValueError: the checkpoint lacks a file.
    """
    missing = [name for name in (WEIGHTS, *KEPT) if not (checkpoint / name).is_file()]
    if missing:
        raise ValueError(f"{checkpoint} lacks {', '.join(missing)}")
    model, processor = load(checkpoint)
    model.bfloat16().float()  # with the precision that is published
    state = json.loads((checkpoint / DIALS_FILE).read_text())
    difficulty = state["difficulty"]
    full = evaluate.evaluate(model, processor, count)
    partly_open = [task for task in full if difficulty[task] < 1]
    report = {"full": full}
    if partly_open:
        report["at dials"] = full | evaluate.evaluate(model, processor, count, partly_open, difficulty)
    destination.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(checkpoint / name, destination / name)
    weights = {name: weight.bfloat16() for name, weight in load_file(checkpoint / WEIGHTS).items()}
    save_file(weights, destination / WEIGHTS, {"format": "pt"})
    (destination / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    card = CARD.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        count=count,
        table=evaluate.as_markdown(report["full"]),
        answers=state["num_answers"],
        dials=", ".join(f"{task} {difficulty:.2f}" for task, difficulty in state["difficulty"].items()),
    )
    if partly_open:
        card += TABLE_AT_DIALS.format(count=count, table=evaluate.as_markdown(report["at dials"]))
    (destination / "README.md").write_text(card)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Publish a checkpoint with its held-out results.",
        epilog="example: python -m recipes.publish runs/s2.pairs/final tiny --count 300",
    )
    parser.add_argument("checkpoint", type=Path, help="folder that recipes.train wrote, a checkpoint or final")
    parser.add_argument("destination", type=Path, help="folder to write, tiny")
    parser.add_argument("--count", type=int, default=300, help="held-out samples per task (%(default)s)")
    options = parser.parse_args(arguments)
    publish(options.checkpoint, options.destination, options.count)
    print(f"wrote {options.destination}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
