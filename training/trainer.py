"""A `Trainer` with learning rates of parts and generated answers in its evaluation; checkpoints to resume from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from .evaluation import TOLERANCES, expected_answer, generate_answers, is_correct
from .parts import split_groups

# Before transformers 5, several processes on a CPU restore an optimizer to `cpu:0` or `cpu:1`, names that torch's own
# restore function refuses.
torch.serialization.register_package(
    30, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


class FineTuner(Trainer):
    """A `Trainer` whose evaluation generates answers.

    Args:
        processor: the model's.
        rates: learning rates by part, a key of `PARTS`; the others have that of the arguments.
        metric: `exact` or `relaxed` adds `eval_accuracy`, the share of right answers; `none` leaves it out.
        answer_tokens: the most that an answer may have.
        arguments: of `Trainer`; an evaluation set is a list of examples.

    Raises:
        ValueError: generated answers with FSDP 1, which cannot generate.
    """

    def __init__(
        self,
        processor: Any,
        rates: Mapping[str, float] | None = None,
        metric: str = "exact",
        answer_tokens: int = 64,
        **arguments: Any,
    ):
        super().__init__(**arguments)
        self.processor, self.rates = processor, dict(rates or {})
        self.tolerance, self.answer_tokens = TOLERANCES.get(metric), answer_tokens
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        is_fsdp1 = plugin is not None and getattr(plugin, "fsdp_version", 1) == 1
        if is_fsdp1 and self.eval_dataset is not None and self.tolerance is not None:
            raise ValueError("FSDP 1 cannot generate answers: use FSDP 2, or evaluate the loss alone (--metric none)")

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds only a part of each weight, so that all must generate the same answers together."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def create_optimizer(self, *model: Any) -> torch.optim.Optimizer:
        """As `Trainer`'s, which takes the model since transformers 5."""
        optimizer = super().create_optimizer(*model)
        if self.rates:
            split_groups(optimizer, model[0] if model and model[0] is not None else self.model, self.rates)
        return optimizer

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.tolerance is not None:
            output.metrics[f"{metric_key_prefix}_accuracy"] = self.accuracy(dataloader.dataset)
        return output

    def accuracy(self, examples: Sequence[dict[str, Any]]) -> float:
        """The share of examples whose generated answer is right. All processes must call it at once."""
        return sum(map(self.is_right, examples, self.answers(examples))) / len(examples)

    def is_right(self, example: dict[str, Any], answer: str) -> bool:
        return is_correct(answer, expected_answer(example, self.processor), self.tolerance or 0.0)

    def answers(self, examples: Sequence[dict[str, Any]]) -> list[str]:
        """Generated answers, of all processes together, which must all call it."""
        args = self.args
        rank, world_size = (0, 1) if self.is_sharded else (args.process_index, args.world_size)
        self.model.eval()
        with self.accelerator.autocast():
            own = generate_answers(
                self.model,
                self.processor,
                examples[rank::world_size],
                args.per_device_eval_batch_size,
                self.answer_tokens,
            )
        if world_size == 1:
            return own
        answers = [""] * len(examples)
        for other, part in enumerate(gather_object([own])):
            answers[other::world_size] = part
        return answers


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint of a run. A run that was killed while it saved leaves an incomplete one."""
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if is_complete(path)}
    return found[max(found)] if found else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has `trainer_state.json`, which `Trainer` writes last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
