"""recipes/evaluate.py: what a model is asked, and how its answers are counted."""

import pytest
from conftest import ROOT
from torch import nn

pytest.importorskip("matplotlib")

from recipes import evaluate  # noqa: E402
from recipes.model import load  # noqa: E402

COUNT = 12


@pytest.fixture(scope="module")
def processor():
    return load(ROOT / "tiny")[1]


class PerfectAnswers:
    """Stands in for `answer_batch`: right answers to images that it knows, "?" to others and where `wrong` says so.

    It records what was asked: (turns, images, settings).
    """

    def __init__(self, samples, wrong):
        self.wrong = wrong
        self.truth = {self.key(s.images, question): answer for s in samples for question, answer in s.turns}
        self.asked = []

    @staticmethod
    def key(images, question):
        return question, *((image.size, image.tobytes()) for image in images)

    def __call__(self, model, processor, conversations, **settings):
        self.asked += [(turns, images, settings) for turns, images in conversations]
        return [
            "?" if self.wrong(turns, settings) else self.truth.get(self.key(images, turns[-1][0]), "?")
            for turns, images in conversations
        ]


def evaluated(monkeypatch, processor, task, wrong=lambda turns, settings: False, difficulty=1.0):
    answers = PerfectAnswers(evaluate.held_out(task, COUNT, difficulty), wrong)
    monkeypatch.setattr(evaluate, "answer_batch", answers)
    report = evaluate.evaluate(nn.Identity(), processor, COUNT, [task], difficulty={task: difficulty})
    return report[task], answers.asked


def test_right_answers_score_and_blank_images_of_the_same_sizes_do_not(monkeypatch, processor):
    row, asked = evaluated(monkeypatch, processor, "text")
    assert (row["questions"], row["score"], row["blind"], row["one scale"]) == (COUNT, 1, 0, 1)
    assert row["small (up to 256 x 256)"] in (1, None) and row["majority"] < 0.3
    blank = [images for _, images, _ in asked if all(image.getcolors(1) for image in images)]
    held_out = [sample.images for sample in evaluate.held_out("text", COUNT)]
    assert len(blank) == COUNT
    assert sorted(image.size for [image] in blank) == sorted(image.size for [image] in held_out)


def test_a_second_question_follows_the_answer_that_was_given(monkeypatch, processor):
    row, asked = evaluated(monkeypatch, processor, "two_turns", wrong=lambda turns, settings: len(turns) == 1)
    assert row["questions"] == 2 * COUNT and row["score"] == 0.5
    second = [turns for turns, _, _ in asked if len(turns) == 2]
    assert second and all([answer for _, answer in turns] == ["?", None] for turns in second)


def test_without_packing_only_pictures_of_several_scales_are_asked_about_again(monkeypatch, processor):
    row, asked = evaluated(monkeypatch, processor, "scene", wrong=lambda turns, settings: bool(settings))
    again = [image.tobytes() for _, [image], settings in asked if settings == {"multi_scale": False}]
    held_out = [sample.images[0] for sample in evaluate.held_out("scene", COUNT)]
    changed = [
        image.tobytes()
        for image in held_out
        if len(processor.image_processor([image], multi_scale=True)["image_grid_thw"]) > 1
    ]
    assert 0 < len(again) < COUNT and sorted(again) == sorted(changed)
    assert row["score"] == 1 and row["one scale"] == 1 - len(changed) / COUNT


def test_without_pictures_there_are_no_image_baselines(monkeypatch, processor):
    row, asked = evaluated(monkeypatch, processor, "text_only")
    assert row.keys() == {"questions", "score", "majority"} and len(asked) == COUNT


def test_easier_than_the_full_set(monkeypatch, processor):
    row, asked = evaluated(monkeypatch, processor, "text", difficulty=0.0)
    assert row["score"] == 1 and max(max(image.size) for _, images, _ in asked for image in images) < 128


def test_majority_is_the_most_frequent_answer():
    samples = evaluate.held_out("scene", 40)
    answers = [sample.turns[0][1] for sample in samples]
    assert evaluate.majority(samples) == max(map(answers.count, answers)) / 40


def test_table():
    report = {"text": {"questions": 8, "score": 0.5, "majority": 0.125, "blind": None}}
    lines = evaluate.as_markdown(report).splitlines()
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| text | 8 | 50.0 % | 12.5 % | - | - |")
