"""The stages of training: what trains, on which mix of tasks, how long and how fast (paper, section 4.2).

`text` stands in for the paper's pretrained LLM; `s1.1`, `s1.2` and `s2` are the paper's; the others continue `s2`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from navil.modeling_navil import NaViLForConditionalGeneration

from .tasks import ALL_TASKS, DESCRIBE, PAGE, TEXT_PRETRAINING


@dataclass(frozen=True)
class Stage:
    mix: Mapping[str, float]  # share of each task in the samples
    steps: int
    learning_rate: float
    weight_decay: float
    lr_decay: float = 0.0  # share of the steps, the last ones, over which the learning rate falls to 0
    crop_share: Mapping[str, float] = field(default_factory=dict)  # of each task's samples
    start_weight: float = 0.0  # share of its initial weights in its final ones, which are an average of both
    rows: int = 4  # of a batch
    row_length: int = 768  # tokens
    patches_per_row: int = 2048
    needs_gpu: bool = False


PICTURES = {"text": 0.32, "receipt": 0.2, "chart": 0.14, "scene": 0.1, "grounding": 0.26}
PICTURES |= {"two_images": 0.14, "two_turns": 0.08, DESCRIBE: 0.06, PAGE: 0.22}
WITH_TEXT = PICTURES | {"text_only": 0.14, TEXT_PRETRAINING: 0.05}
# A crop of a text costs at most a third of what other pictures cost, and reading is what most tasks depend on.
CROPS = {"text": 0.55, "receipt": 0.11, "chart": 0.04, "scene": 0.035, "grounding": 0.13, "two_images": 0.05}
CROPS |= {"two_turns": 0.01, DESCRIBE: 0.005, PAGE: 0.02, "text_only": 0.04, TEXT_PRETRAINING: 0.01}
MOSTLY_CROPPED = dict.fromkeys(ALL_TASKS, 0.8) | {"text": 0.93, "grounding": 0.55}
# On a GPU the CPU cores that draw are the bottleneck; a whole picture costs them twice as much as a crop.
LARGE_BATCH = {"text": 0.36, "receipt": 0.14, "chart": 0.1, "scene": 0.06, "grounding": 0.16, "two_images": 0.07}
LARGE_BATCH |= {"two_turns": 0.02, DESCRIBE: 0.01, PAGE: 0.03, "text_only": 0.04, TEXT_PRETRAINING: 0.01}
HALF_CROPPED = dict.fromkeys(ALL_TASKS, 0.5) | {"text": 0.7}
# More of what is hardest for a model that can read: comparisons, counts, prices of items that it has no token for.
REBALANCED = {"text": 0.27, "receipt": 0.24, "chart": 0.03, "scene": 0.12, "grounding": 0.05, "two_images": 0.22}
REBALANCED |= {"two_turns": 0.03, DESCRIBE: 0.005, PAGE: 0.005, "text_only": 0.025, TEXT_PRETRAINING: 0.005}

STAGES = {
    "text": Stage({TEXT_PRETRAINING: 0.5, "text_only": 0.5}, 3000, 1e-3, 0.05),
    "s1.1": Stage(PICTURES, 1000, 1e-3, 0.05),
    "s1.2": Stage(WITH_TEXT, 500, 1e-3, 0.1),
    "s2": Stage(WITH_TEXT, 60000, 7e-4, 0.01, lr_decay=0.3),
    "s2.crops": Stage(CROPS, 10000, 7e-4, 0.01, lr_decay=0.5, crop_share=MOSTLY_CROPPED, start_weight=0.5),
    "s2.large_batch": Stage(
        LARGE_BATCH,
        1500,
        1.5e-3,
        0.01,
        lr_decay=0.5,
        crop_share=HALF_CROPPED,
        start_weight=0.25,
        rows=64,
        needs_gpu=True,
    ),
    # A higher rate in batches of 4 rows would undo what large batches have learned.
    "s2.rebalanced": Stage(REBALANCED, 1200, 1.5e-4, 0.01, lr_decay=0.7, crop_share=MOSTLY_CROPPED, start_weight=0.25),
}


def available_stages() -> dict[str, Stage]:
    """The stages in their order, without those that need a GPU if there is none."""
    return {name: stage for name, stage in STAGES.items() if torch.cuda.is_available() or not stage.needs_gpu}


def shrink(stage: Stage) -> Stage:
    """The stage for a smoke test: two steps of small batches."""
    return replace(stage, steps=2, rows=1, row_length=64, patches_per_row=256)


def set_trainable(model: NaViLForConditionalGeneration, name: str) -> None:
    """Freezes all parameters but those that a stage trains; `text` trains the text experts and the embeddings."""
    if name != "text":
        model.set_training_stage("s2" if name.startswith("s2.") else name)
        return
    for parameter_name, parameter in model.named_parameters():
        is_text = parameter_name.startswith(("model.language_model.", "lm_head.")) and ".visual." not in parameter_name
        parameter.requires_grad_(is_text)


def copy_text_experts(model: NaViLForConditionalGeneration) -> None:
    """Initializes the visual experts as copies of the text experts, which is how the paper uses its pretrained LLM."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".visual." in name:
                parameter.copy_(parameters[name.replace(".visual.", ".text.")])
