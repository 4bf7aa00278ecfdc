"""Publishes a trained checkpoint as a model folder: weights in bf16, with held-out scores in its model card.

python -m recipes.publish runs/s2.rebalanced/final tiny
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from .curriculum import CURRICULUM_FILE
from .evaluate import as_markdown, evaluate
from .model import load

WEIGHTS = "model.safetensors"
COPIED = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", CURRICULUM_FILE),
)
"""Files of a published model besides its weights. Its code is in the root of the repository."""

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

{parameters:.1f} M parameters, trained from scratch by `recipes/` on pictures that it draws itself: text, receipts,
charts, shapes, boxes, two images, two turns, and arithmetic without a picture. It was trained on nothing else.

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(".", subfolder="tiny", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(".", subfolder="tiny", trust_remote_code=True)
print(model.chat(tokenizer, "picture.png", "What does the text say?"))
```

## Held-out results

{count} samples per task at full difficulty. Answers count by exact match but for case; chart values without labels may
differ by 2; boxes need an IoU of at least 0.5. `majority` always gives the most frequent answer, `blind` is this model
on blank images of the same sizes, `one scale` is this model without multi-scale packing.
Command: `python -m recipes.evaluate tiny --count {count}`.

{table}
Answers seen in training: {answers:,}. Curriculum difficulty reached by each task (1 is the full range): {difficulty}.
"""

TABLE_AT_DIFFICULTY = """
The same table at these difficulties, by
`python -m recipes.evaluate tiny --count {count} --curriculum tiny/curriculum.json`:

{table}"""


def publish(checkpoint: Path, destination: Path, count: int) -> None:
    """Copies the model's files, saves its weights in bf16, scores these, and writes the model card.

    Args:
        count: held-out samples per task.

    Raises:
        ValueError: the checkpoint lacks a file.
    """
    missing = [name for name in (WEIGHTS, *COPIED) if not (checkpoint / name).is_file()]
    if missing:
        raise ValueError(f"{checkpoint} lacks {', '.join(missing)}")
    model, processor = load(checkpoint)
    model.bfloat16().float()  # scores are those of the published precision
    state = json.loads((checkpoint / CURRICULUM_FILE).read_text())
    difficulty = state["difficulty"]
    full = evaluate(model, processor, count)
    unfinished = [task for task in full if difficulty[task] < 1]
    report = {"full": full}
    if unfinished:
        report["at curriculum difficulty"] = full | evaluate(model, processor, count, unfinished, difficulty)
    destination.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(checkpoint / name, destination / name)
    weights = {name: weight.bfloat16() for name, weight in load_file(checkpoint / WEIGHTS).items()}
    save_file(weights, destination / WEIGHTS, {"format": "pt"})
    (destination / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    card = CARD.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        count=count,
        table=as_markdown(full),
        answers=state["num_answers"],
        difficulty=", ".join(f"{task} {level:.2f}" for task, level in difficulty.items()),
    )
    if unfinished:
        card += TABLE_AT_DIFFICULTY.format(count=count, table=as_markdown(report["at curriculum difficulty"]))
    (destination / "README.md").write_text(card)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Publish a checkpoint with its held-out scores.",
        epilog="example: python -m recipes.publish runs/s2.rebalanced/final tiny --count 300",
    )
    parser.add_argument("checkpoint", type=Path, help="folder that recipes.train wrote, a checkpoint or final")
    parser.add_argument("destination", type=Path, help="model folder to write, such as tiny")
    parser.add_argument("--count", type=int, default=300, help="held-out samples per task (%(default)s)")
    options = parser.parse_args(arguments)
    publish(options.checkpoint, options.destination, options.count)
    print(f"wrote {options.destination}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
