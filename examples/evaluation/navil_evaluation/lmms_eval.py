"""NaViL in lmms-eval, which finds it by the entry point of this project, and a command line that runs the kit with it.

    python -m navil_evaluation.lmms_eval --model navil --model_args path=weights/navil-2b --tasks chartqa,docvqa_val

All options are the kit's own.
"""

import sys
from typing import Any

from . import make_torchvision_importable

make_torchvision_importable()

from lmms_eval.api.model import lmms  # noqa: E402
from lmms_eval.models.registry_v2 import ModelManifest  # noqa: E402
from tqdm import tqdm  # noqa: E402

from . import NaViLAnswers  # noqa: E402

MANIFEST = ModelManifest(model_id="navil", simple_class_path=f"{__name__}.NaViL")
TAKEN_SETTINGS = ("max_new_tokens", "num_beams")
SAMPLING_SETTINGS = ("do_sample", "temperature", "top_p")  # taken where the task asks for sampling


class NaViL(lmms):
    """The kit's model; `--model_args path=...,subfolder=...,device=...,max_new_tokens=...`, batches of one."""

    def __init__(
        self, path: str, subfolder: str = "", batch_size: int | str = 1, device: str | None = None, **settings: Any
    ):
        super().__init__()
        if int(batch_size) != 1:
            raise ValueError(f"batch_size must be 1, got {batch_size}")
        limit = int(settings.pop("max_new_tokens", 1024))
        if unknown := set(settings) - {"max_batch_size"}:
            raise ValueError(f"model_args may be path, subfolder, device and max_new_tokens; got {sorted(unknown)}")
        self.answers = NaViLAnswers(path, subfolder, device, limit)

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = []
        for request in tqdm(requests, desc="answering", disable=self.rank != 0):
            question, settings, doc_to_visual, doc_id, task, split = request.args
            images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            names = TAKEN_SETTINGS + (SAMPLING_SETTINGS if settings.get("do_sample") else ())
            taken = {name: settings[name] for name in names if settings.get(name) is not None}
            answer = self.answers.answer([*(("image", image) for image in images), ("text", question)], **taken)
            for end in _texts(settings.get("until")):
                answer = answer.split(end)[0]
            answers.append(answer)
            self.cache_hook.add_partial("generate_until", (question, settings), answer)
        return answers

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("multi-round tasks are not supported")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks that score by likelihood are not supported; choose one that generates")


def _texts(until: str | list[str] | None) -> list[str]:
    return [until] if isinstance(until, str) else [end for end in until or [] if end.strip()]


def main() -> int:
    from lmms_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
