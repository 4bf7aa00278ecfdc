"""The wrappers for VLMEvalKit and lmms-eval, over a small benchmark of the recipe's generator."""

import base64
import csv
import importlib
import json
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

pytest.importorskip("matplotlib")

from recipes.tasks import TASKS, make_sample  # noqa: E402

sys.path.insert(0, str(ROOT / "examples" / "evaluation"))

from navil_evaluation import NaViLAnswers, drawn, vlmevalkit  # noqa: E402

COUNT, DIFFICULTY, MAX_NEW_TOKENS = 2, 0.25, 8
PLAIN_SETS = {"chart": "ChartQA_TEST", "two_images": "DocVQA_VAL"}  # question and answer as they were drawn


@pytest.fixture(scope="module")
def wrapper():
    return vlmevalkit.NaViLMessages(str(ROOT), subfolder="tiny", device="cpu", max_new_tokens=MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    curriculum = folder / "curriculum.json"
    curriculum.write_text(json.dumps({"difficulty": dict.fromkeys(TASKS, DIFFICULTY)}))
    assert drawn.main([str(folder), "--count", str(COUNT), "--curriculum", str(curriculum)]) == 0
    csv.field_size_limit(2**31 - 1)
    tables = {}
    for task, name in PLAIN_SETS.items():
        with (folder / f"{name}.tsv").open(newline="", encoding="utf-8") as file:
            tables[task] = list(csv.DictReader(file, delimiter="\t"))
    return tables


def message(row, folder):
    """As the kit makes it: images written to files, then the question."""
    encoded = eval(row["image"]) if row["image"].startswith("[") else [row["image"]]  # as the kit does
    paths = [folder / f"{row['index']}_{number}.png" for number in range(len(encoded))]
    for path, image in zip(paths, encoded, strict=True):
        path.write_bytes(base64.b64decode(image))
    images = [{"type": "image", "value": str(path)} for path in paths]
    return [*images, {"type": "text", "value": row["question"]}]


@pytest.mark.parametrize("task", PLAIN_SETS)
def test_a_table_of_held_out_samples_is_answered_as_chat_does(wrapper, tables, tmp_path, task):
    samples = [make_sample(task, seed, DIFFICULTY, split="heldout") for seed in range(COUNT)]
    model, tokenizer = wrapper.answers.model, wrapper.answers.tokenizer
    for row, sample in zip(tables[task], samples, strict=True):
        [(question, answer)] = sample.turns
        assert list(row) == ["index", "image", "question", "answer"]
        assert (row["question"], row["answer"]) == (question, answer) and "<image>" not in question
        expected = model.chat(tokenizer, sample.images, question, {"max_new_tokens": MAX_NEW_TOKENS})
        assert wrapper.generate_inner(message(row, tmp_path), dataset="any") == expected


def test_images_are_read_where_the_message_has_them(wrapper, tables, tmp_path, monkeypatch):
    first, second, question = message(tables["two_images"][0], tmp_path)
    seen = []
    monkeypatch.setattr(wrapper.answers.model, "chat", lambda *given: seen.append(given[1:3]) or "")
    wrapper.generate_inner([first, {"type": "text", "value": "and then "}, second, question])
    wrapper.generate_inner([question])
    assert seen[0] == ([first["value"], second["value"]], f"<image>\nand then <image>\n{question['value']}")
    assert seen[1] == (None, question["value"])


@pytest.mark.parametrize("part", [("video", "a.mp4"), ("text", "see <image>")])
def test_other_parts_are_refused(wrapper, part):
    with pytest.raises(ValueError, match="must be text or image|may not contain"):
        wrapper.answers.answer([part])


def test_lmms_eval_model():
    pytest.importorskip("lmms_eval")
    module = importlib.import_module("navil_evaluation.lmms_eval")
    model = module.NaViL(str(ROOT), subfolder="tiny", device="cpu", max_new_tokens="8")
    sample = make_sample("chart", 0, 0.2, split="heldout")
    model.task_dict = {"drawn": {"test": [sample]}}
    question = sample.turns[0][0]

    def ask(settings):
        request = SimpleNamespace(args=(question, settings, lambda doc: doc.images, 0, "drawn", "test"))
        return model.generate_until([request])

    expected = NaViLAnswers(str(ROOT), "tiny", "cpu", 8).answer([("image", sample.images[0]), ("text", question)])
    assert ask({"until": ["\n"]}) == [expected]
    seen = []
    model.answers.model.chat = lambda *given: seen.append(given[3]) or ""
    sampling = {"temperature": 0.5, "top_p": 0.9}
    ask({"num_beams": 2, "do_sample": False, **sampling})
    ask({"max_new_tokens": 3, "do_sample": True, **sampling})
    assert seen[0] == {"do_sample": False, "max_new_tokens": 8, "num_beams": 2}
    assert seen[1] == {"do_sample": True, "max_new_tokens": 3, **sampling}


def test_vlmevalkit_takes_the_wrapper():
    pytest.importorskip("vlmeval")
    base = importlib.import_module("vlmeval.vlm.base").BaseModel
    assert issubclass(vlmevalkit.wrapper_class(), base) and vlmevalkit.wrapper_class().INTERLEAVE
