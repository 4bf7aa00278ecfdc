"""recipes/evaluate.py: what is asked of a model, and how its answers are counted."""

import pytest
from conftest import ROOT
from torch import nn

pytest.importorskip("matplotlib")

from recipes import blueprint, evaluate  # noqa: E402
from recipes.tasks import make_sample  # noqa: E402

COUNT = 12


@pytest.fixture(scope="module")
def processor():
    return blueprint.load(ROOT / "tiny")[1]


class AnswersAll:
    """In the place of `answer_batch`: answers truly what it has seen but for `wrong(turns, settings)`, and keeps what
    was asked."""

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


def evaluated(monkeypatch, processor, task, wrong=lambda turns, settings: False, **options):
    answers = AnswersAll(evaluate.held_out(task, COUNT, *options.get("difficulty", {}).values()), wrong)
    monkeypatch.setattr(evaluate, "answer_batch", answers)
    return evaluate.evaluate(nn.Identity(), processor, COUNT, [task], **options)[task], answers.asked


def test_who_sees_scores_and_who_is_blind_does_not(monkeypatch, processor):
    row, asked = evaluated(monkeypatch, processor, "text")
    assert (row["questions"], row["score"], row["blind"], row["one scale"]) == (COUNT, 1, 0, 1)
    blank = [images for _, images, _ in asked if all(image.getcolors(1) for image in images)]
    assert len(blank) == COUNT
    sizes = [
        sorted(image.size for images in group for image in images)
        for group in (blank, [s.images for s in evaluate.held_out("text", COUNT)])
    ]
    assert sizes[0] == sizes[1]
    assert row["small (up to 256 x 256)"] in (1, None) and row["majority"] < 0.3


def test_a_second_question_follows_the_answer_that_was_given(monkeypatch, processor):
    row, asked = evaluated(monkeypatch, processor, "two_turns", wrong=lambda turns, settings: len(turns) == 1)
    assert row["questions"] == 2 * COUNT and row["score"] == 0.5
    second = [turns for turns, _, _ in asked if len(turns) == 2]
    assert second and all([answer for _, answer in turns] == ["?", None] for turns in second)


def test_without_packing_only_what_several_scales_change_is_asked_again(monkeypatch, processor):
    row, asked = evaluated(monkeypatch, processor, "scene", wrong=lambda turns, settings: bool(settings))
    again = [images for _, images, settings in asked if settings == {"multi_scale": False}]
    scales = lambda image: len(processor.image_processor([image], multi_scale=True)["image_grid_thw"])  # noqa: E731
    changed = [s.images for s in evaluate.held_out("scene", COUNT) if scales(s.images[0]) > 1]
    assert 0 < len(again) < COUNT
    assert sorted(image.tobytes() for [image] in again) == sorted(image.tobytes() for [image] in changed)
    assert row["score"] == 1 and row["one scale"] == 1 - len(changed) / COUNT


def test_without_pictures_there_is_nothing_to_be_blind_for(monkeypatch, processor):
    row, asked = evaluated(monkeypatch, processor, "text_only")
    assert row.keys() == {"questions", "score", "majority"} and len(asked) == COUNT


def test_easier_than_the_full_set(monkeypatch, processor):
    row, asked = evaluated(monkeypatch, processor, "text", difficulty={"text": 0.0})
    assert row["score"] == 1 and max(max(image.size) for _, images, _ in asked for image in images) < 128


def test_held_out_pictures_are_not_those_of_training():
    held_out = {sample.images[0].tobytes() for sample in evaluate.held_out("text", 40)}
    assert len(held_out) == 40
    assert not held_out & {make_sample("text", seed, 1.0).images[0].tobytes() for seed in range(40)}


def test_majority_is_the_most_frequent_answer():
    samples = evaluate.held_out("scene", 40)
    answers = [sample.turns[0][1] for sample in samples]
    assert evaluate.majority(samples) == max(map(answers.count, answers)) / 40


def test_table():
    report = {"text": {"questions": 8, "score": 0.5, "majority": 0.125, "blind": None}}
    lines = evaluate.as_markdown(report).splitlines()
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| text | 8 | 50.0 % | 12.5 % | - | - |")
