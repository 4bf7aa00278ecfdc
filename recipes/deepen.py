"""Gives a trained model more layers and the same answers, so that training goes on with more capacity.

    python -m recipes.deepen tiny runs/deeper --vision 10 --text 8
    python -m recipes.train --runs runs --init runs/deeper

A new layer is a copy of the one before it whose output projections are 0, so that it adds nothing until it is trained
(block expansion: Wu et al. 2024, "LLaMA Pro", arXiv 2401.02415).
"""

import argparse
import copy
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .blueprint import load
from .train import DIALS_FILE

LAYER = re.compile(r"(model\.vision_model\.blocks|model\.language_model\.layers)\.(\d+)\.")
OUTPUTS = re.compile(r"\.(proj|fc2|o_proj|down_proj)\.")


def sources(old: int, new: int) -> list[int]:
    """Which of `old` layers each of `new` ones is, or is a copy of.

    Raises:
        ValueError: there would be fewer layers.
    """
    if new < old:
        raise ValueError(f"a model of {old} layers can be given {old} or more, got {new}")
    return [index * old // new for index in range(new)]


def deepen(model: nn.Module, vision_layers: int, text_layers: int) -> nn.Module:
    """A model of so many vision blocks and decoder layers, in eval mode, that gives the same logits.

    Raises:
        ValueError: the model has more layers already.
    """
    config = copy.deepcopy(model.config)
    vision, text = config.vision_config, config.text_config
    of_blocks = sources(vision.num_hidden_layers, vision_layers)
    of_layers = sources(text.num_hidden_layers, text_layers)
    if vision.fullatt_block_indexes is not None:
        vision.fullatt_block_indexes = [i for i, old in enumerate(of_blocks) if old in vision.fullatt_block_indexes]
    vision.num_hidden_layers, text.num_hidden_layers = vision_layers, text_layers
    deeper = type(model)(config).to(model.dtype)
    deeper.generation_config = copy.deepcopy(model.generation_config)
    old_weights, weights = model.state_dict(), deeper.state_dict()
    for name, weight in weights.items():
        source, is_new = name, False
        if match := LAYER.match(name):
            of = of_blocks if "vision" in match[1] else of_layers
            index = int(match[2])
            source = LAYER.sub(f"{match[1]}.{of[index]}.", name)
            is_new = index > 0 and of[index] == of[index - 1]
        if is_new and OUTPUTS.search(name):
            weight.zero_()
        else:
            weight.copy_(old_weights[source])
    return deeper.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Give a trained model more layers and the same answers.",
        epilog="example: python -m recipes.deepen tiny runs/deeper --vision 10 --text 8",
    )
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("destination", type=Path, help="folder to write, for recipes.train --init")
    parser.add_argument("--vision", type=int, required=True, help="blocks of the vision encoder")
    parser.add_argument("--text", type=int, required=True, help="layers of the decoder")
    options = parser.parse_args(arguments)
    model, processor = load(options.model)
    deepen(model, options.vision, options.text).save_pretrained(options.destination)
    processor.save_pretrained(options.destination)
    if (options.model / DIALS_FILE).is_file():
        shutil.copyfile(options.model / DIALS_FILE, options.destination / DIALS_FILE)
    print(f"wrote {options.destination}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
