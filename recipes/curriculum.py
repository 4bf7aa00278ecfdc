"""The curriculum: each task has a difficulty level from 0 to 1 that follows the model's own progress.

Level 0 is one digit, one font, black on white; level 1 the full range that the model is scored on. At full difficulty
from the start a small model learns nothing.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .labels import TARGET_GROUPS
from .packing import answer_index
from .tasks import ALL_TASKS, DESCRIBE, PAGE

CURRICULUM_FILE = "curriculum.json"

SCORED_BY_TOKEN = ("grounding", DESCRIBE)
"""Tasks with long answers: see `answer_scores`."""
RAISE_AT = dict.fromkeys(ALL_TASKS, 0.5) | {"grounding": 0.55, DESCRIBE: 0.65, "chart": 0.45, "text_only": 0.85}
RAISE_AT |= dict.fromkeys(("scene", "two_images", "two_turns"), 0.7)
"""Running score from which a task gets harder: lower where values must be estimated (charts), higher where half of the
answers can be guessed."""


def initial_difficulty() -> Tensor:
    """(tasks,) 0; but 1 for PAGE, which has no questions and so no score."""
    return torch.tensor([float(task == PAGE) for task in ALL_TASKS])


def answer_scores(logits: Tensor, labels: Tensor, tasks: Tensor, digit_ids: Tensor) -> Tensor:
    """(answers,) scores of 0 to 1.

    1 if every label is the most likely token, else 0. A description scores the share of its labels; a box the share of
    the first digits of its four numbers, which place a side within a tenth of the picture.

    Args:
        logits, labels: (B, L, vocabulary) and (B, L).
        tasks: (answers,) index of each answer's task in ALL_TASKS.
        digit_ids: ids of the ten digits.
    """
    labels = labels[:, 1:]
    answer = answer_index(labels)
    task = F.pad(tasks, (0, 1), value=-1)[answer]  # -1 outside answers
    is_digit = torch.isin(labels, digit_ids)
    is_first_digit = is_digit & ~F.pad(is_digit[:, :-1], (1, 0))
    counted = (task >= 0) & (is_first_digit | (task != ALL_TASKS.index("grounding")))
    right = (logits[:, :-1].argmax(-1) == labels)[counted].float()
    total, hits = torch.zeros(2, len(tasks), device=right.device)
    share = hits.index_add(0, answer[counted], right) / total.index_add(0, answer[counted], torch.ones_like(right))
    by_token = torch.tensor([ALL_TASKS.index(task) for task in SCORED_BY_TOKEN], device=tasks.device)
    return torch.where(torch.isin(tasks, by_token), share, (share == 1).float())


@dataclass
class Curriculum:
    """Difficulty of each task: raised while the running score of its answers is high, lowered when it is far too low.

    With `is_fixed` the difficulties stay, and only scores are kept.
    """

    difficulty: Tensor = field(default_factory=lambda: initial_difficulty().share_memory_())  # workers read it
    score: list[float] = field(default_factory=lambda: [0.0] * len(ALL_TASKS))  # running means
    answers_since_change: list[int] = field(default_factory=lambda: [0] * len(ALL_TASKS))
    num_answers: int = 0
    dense_accuracy: float = 0.0  # running mean
    regression_errors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TARGET_GROUPS, 0.0))  # the same
    is_fixed: bool = False

    SMOOTHING = 0.02
    STEP = 0.01
    ANSWERS_PER_STEP = 48
    LOWER_MARGIN = 0.2  # below RAISE_AT; the noise of a running score is a quarter of this

    def record(self, tasks: Tensor, scores: Tensor) -> None:
        """Counts answers: their tasks' indices and their scores."""
        for task, score in zip(tasks.tolist(), scores.tolist(), strict=True):
            self.num_answers += 1
            self.score[task] += self.SMOOTHING * (score - self.score[task])
            self.answers_since_change[task] += 1
            if not self.is_fixed and self.answers_since_change[task] >= self.ANSWERS_PER_STEP:
                self._adjust(task)

    def _adjust(self, task: int) -> None:
        raise_at, difficulty = RAISE_AT[ALL_TASKS[task]], float(self.difficulty[task])
        if self.score[task] >= raise_at:
            changed = min(1.0, round(difficulty + self.STEP, 4))  # rounded: float32 would drift
        elif self.score[task] < raise_at - self.LOWER_MARGIN:
            changed = max(0.0, round(difficulty - self.STEP, 4))
        else:
            return
        self.difficulty[task], self.answers_since_change[task] = changed, 0

    def record_auxiliary(self, dense_accuracy: float, regression_errors: Tensor) -> None:
        """Counts one batch's auxiliary labels; `regression_errors` (NUM_TARGETS,) are 0 where there is no target."""
        self.dense_accuracy += self.SMOOTHING * (dense_accuracy - self.dense_accuracy)
        for name, group in zip(TARGET_GROUPS, regression_errors.split([*TARGET_GROUPS.values()]), strict=True):
            if group.any():
                self.regression_errors[name] += self.SMOOTHING * (float(group.mean()) - self.regression_errors[name])

    def save(self, folder: Path) -> None:
        """Writes the file atomically: a checkpoint that has it is complete."""
        state = {
            "num_answers": self.num_answers,
            "difficulty": dict(zip(ALL_TASKS, self.difficulty.tolist(), strict=True)),
            "score": dict(zip(ALL_TASKS, self.score, strict=True)),
            "dense_accuracy": self.dense_accuracy,
            "regression_errors": self.regression_errors,
        }
        part = folder / f"{CURRICULUM_FILE}.part"
        part.write_text(json.dumps(state, indent=2) + "\n")
        part.replace(folder / CURRICULUM_FILE)

    def load(self, folder: Path) -> None:
        """A task that the saved run did not have keeps its initial difficulty."""
        state = json.loads((folder / CURRICULUM_FILE).read_text())
        self.num_answers, self.dense_accuracy = state["num_answers"], state["dense_accuracy"]
        self.regression_errors |= state["regression_errors"]
        for index, task in enumerate(ALL_TASKS):
            if task in state["difficulty"]:
                self.difficulty[index], self.score[index] = state["difficulty"][task], state["score"][task]


def read_difficulty(path: Path) -> dict[str, float]:
    """Difficulty by task of a curriculum.json."""
    return json.loads(path.read_text())["difficulty"]
