"""The paper's table: published averages, the plan before a run, and, where VLMEvalKit is installed, the run itself."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, refused

pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "examples" / "evaluation"))

from navil_evaluation import drawn, kit, plan, rows, table  # noqa: E402
from navil_evaluation.benchmarks import AVERAGED, BENCHMARKS, mean_normalized  # noqa: E402

NAMES = [benchmark.name for benchmark in AVERAGED]
ROUNDING = (9 * 0.05 + 0.5 / 28 + 0.5 / 10) / 11 + 0.05  # largest error of a mean of rounded metrics, itself rounded


# ----------------------------------------------------------------------------------------------------- published rows


@pytest.mark.parametrize("row", rows.PUBLISHED, ids=lambda row: row["model"])
def test_published_average_follows_from_the_published_metrics(row):
    mean = mean_normalized(row["metrics"])
    assert abs(mean - row["average"]) <= ROUNDING < 0.1
    assert (round(mean, 1) == row["average"]) == ("average_note" not in row)


def test_the_one_average_that_rounds_otherwise_is_named_in_data_and_document():
    [row] = [row for row in rows.PUBLISHED if "average_note" in row]
    assert row["model"] == "InternVL-2.5"
    mean = f"{mean_normalized(row['metrics']):.3f}"
    assert mean in row["average_note"] and mean in (ROOT / "docs" / "evaluation.md").read_text()


def test_normalized_average_divides_mme_by_28_and_ocrbench_by_10():
    assert mean_normalized(dict.fromkeys(NAMES, 50.0) | {"MME": 1400, "OCRBench": 500}) == pytest.approx(50)


def test_the_document_has_the_table_of_the_data_file():
    document = (ROOT / "docs" / "evaluation.md").read_text()
    assert rows.published_table() in document
    assert "CCBench 83.9, ScienceQA-IMG 95.0, GQA 59.8" in document
    [others] = [row["metrics"] for row in rows.PUBLISHED if row["model"] == "NaViL-2B"]
    assert [others[name] for name in ("CCBench", "ScienceQA", "GQA")] == [83.9, 95.0, 59.8]


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda benchmark: benchmark.name)
def test_the_document_says_what_was_chosen(benchmark):
    judge = benchmark.judge + ("" if benchmark.judge_required else " for unclear answers") if benchmark.judge else "-"
    cells = [benchmark.name, benchmark.dataset, str(benchmark.questions), judge, benchmark.choice]
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs" / "evaluation.md").read_text()


def test_a_row_has_an_average_only_with_all_eleven():
    metrics = dict.fromkeys(NAMES, 50.0) | {"MME": 1400.4, "OCRBench": 500}
    complete = rows.published_table("mine", metrics).splitlines()[-1]
    assert complete == "| mine | - | 50.0 | 50.0 | 50.0 | 50.0 | 1400 | 50.0 | 500 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |"
    assert rows.average_sentence(metrics) == "Average over the 11 benchmarks, MME / 28 and OCRBench / 10: 50.0."
    part = {"MME": 1400, "AI2D": 20.0, "GQA": 90.0}
    assert rows.published_table("mine", part).splitlines()[-1].startswith("| mine | - | - | - | - | - | 1400 |")
    assert rows.average_sentence(part) == "Mean over 2 of the 11 (MME, AI2D): 35.0. Not comparable with the avg column."
    assert rows.other_table("mine", part).splitlines()[-1] == "| mine | - | - | 90.0 |"


def test_metrics_are_found_in_what_the_kit_reports():
    assert BENCHMARKS["MME"].value({"perception": 1500.0, "reasoning": 300.0, "OCR": 100.0}) == 1800
    assert BENCHMARKS["MMMU"].value({"split=dev|Overall": 0.1, "split=validation|Overall": 0.4}) == pytest.approx(40)
    assert BENCHMARKS["AI2D"].value({"split=none|Overall": 0.5, "split=none|food": 0.9}) == 50
    assert BENCHMARKS["MMVet"].value({"Category=ocr|acc": 1.0, "Category=Overall|acc": 30.0}) == 30
    with refused("must report"):
        BENCHMARKS["AI2D"].value({"split=dev|Overall": 0.1, "split=test|Overall": 0.4})
    with refused("must report"):
        BENCHMARKS["MME"].value({"perception": 1500.0})


# --------------------------------------------------------------------------------------------------------------- plan


def steps(*names, done=(), data="", judge="", may_download=False):
    benchmarks = [BENCHMARKS[name] for name in names]
    finished = [BENCHMARKS[name] for name in done]
    return plan.make_steps(benchmarks, finished, lambda _: data, lambda _: judge, may_download)


def test_what_is_done_needs_nothing_more():
    [first, second] = steps("MME", "MMVet", done=["MME"], data="no data", judge="no key")
    assert (first.state, first.missing, first.download) == ("done", (), "")
    assert (second.state, second.missing) == ("cannot run", ("no key", "no data"))
    assert plan.runnable([first], leave_out_missing=False) == []


def test_missing_data_stop_a_run_unless_they_may_be_downloaded():
    [step] = steps("MME", data="MME.tsv is missing", may_download=True)
    assert (step.state, step.download) == ("to run", "MME.tsv is missing")
    [incomplete], [complete] = steps("MME", data="MME.tsv is missing"), steps("GQA")
    with refused("MME: MME.tsv is missing"):
        plan.runnable([incomplete, complete], leave_out_missing=False)
    assert plan.runnable([incomplete, complete], leave_out_missing=True) == [complete]
    with refused("nothing was run"):
        plan.runnable([incomplete], leave_out_missing=True)


def test_a_judge_needs_its_key():
    vet, mme, chart = (BENCHMARKS[name] for name in ("MMVet", "MME", "ChartQA"))
    assert "OPENAI_API_KEY is not set, for the judge gpt-4-turbo" in plan.judge_problem(vet, False, {})
    assert "--exact-matching does without" in plan.judge_problem(mme, False, {"OPENAI_API_KEY": ""})
    assert plan.judge_problem(vet, False, {"OPENAI_API_KEY": "k"}) == plan.judge_problem(chart, False, {}) == ""
    assert plan.judge_problem(mme, True, {}) == ""
    assert "excludes" in plan.judge_problem(vet, True, {"OPENAI_API_KEY": "k"})


def test_the_plan_names_state_judge_and_needs():
    lines = plan.describe(steps("MMVet", "MME", "GQA", done=["GQA"], judge="no key"), exact_matching=False).splitlines()
    assert lines[2] == "| MMVet | MMVet | 218 | cannot run | gpt-4-turbo | no key |"
    assert lines[3] == "| MME | MME | 2374 | cannot run | gpt-4o-mini for unclear answers | no key |"
    assert lines[4] == "| GQA | GQA_TestDev_Balanced | 12578 | done | - | - |"


def test_a_score_counts_if_it_is_complete_and_of_the_judge_in_question():
    entry = {"status": "done", "metrics": {"perception": 1.0}, "judge_model": "exact_matching"}
    mme, chart = BENCHMARKS["MME"], BENCHMARKS["ChartQA"]
    assert kit.is_scored(mme, entry, exact_matching=True) and not kit.is_scored(mme, entry, exact_matching=False)
    assert kit.is_scored(chart, entry, exact_matching=False)
    assert not kit.is_scored(chart, entry | {"error_message": "failed"}, False)
    assert not kit.is_scored(chart, entry | {"status": "eval"}, False)
    assert not kit.is_scored(chart, {"status": "done", "skip_reason": "no answers"}, False)


def test_only_the_scoring_of_another_judge_is_forgotten(tmp_path):
    folder = tmp_path / kit.RUN
    folder.mkdir()
    entry = {"status": "done", "metrics": {"x": 1.0}, "judge_model": "exact_matching"}
    (folder / "status.json").write_text(json.dumps({"datasets": {"MME": entry, "AI2D_TEST": entry}}))
    for name in ("NaViL_MME.xlsx", "NaViL_MME_auxmatch.xlsx", "NaViL_AI2D_TEST_acc.csv"):
        (folder / name).touch()
    kit.forget_score_of_another_judge(BENCHMARKS["MME"], True, tmp_path)
    assert (folder / "NaViL_MME_auxmatch.xlsx").exists()
    kit.forget_score_of_another_judge(BENCHMARKS["MME"], False, tmp_path)
    assert sorted(path.name for path in folder.glob("N*")) == ["NaViL_AI2D_TEST_acc.csv", "NaViL_MME.xlsx"]
    assert list(kit.read_status(tmp_path)) == ["AI2D_TEST"]


def test_answers_of_other_settings_are_not_continued(tmp_path):
    settings = {"model": "a", "limit": None}
    table.check_settings(settings, tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    table.check_settings(settings, tmp_path)
    with refused("limit None -> 5"):
        table.check_settings(settings | {"limit": 5}, tmp_path)


@pytest.mark.parametrize(
    ("variables", "message"), [({"MMEVAL_ROOT": "x"}, "unset it"), ({"LMUData": "nowhere"}, "must be a folder")]
)
def test_variables_that_would_redirect_the_kit_are_refused(variables, message):
    with refused(message):
        table.check_environment(variables)


def test_a_folder_without_a_model_fails_before_anything_else(tmp_path, capsys):
    assert table.main(["--model-path", str(tmp_path), "--work-dir", str(tmp_path / "work")]) == 1
    assert "must be a model folder" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(("option", "value"), [("--limit", "0"), ("--limit", "-3"), ("--benchmarks", "MMB")])
def test_wrong_options_are_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        table.main(["--model-path", "m", "--work-dir", "w", option, value])
    assert value in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- drawn sets


@pytest.mark.parametrize("name", ["AI2D_TEST", "MMBench_DEV_EN"])
def test_the_right_option_is_the_answer_in_every_rotation(name):
    task, fits, make_rows = drawn.SETS[name]
    for number, sample in enumerate(drawn.samples_of(task, 3, 0.25, fits)):
        made = make_rows(sample, number)
        assert {row[row["answer"]] for row in made} == {sample.turns[0][1]}
        options = sum(bool(made[0][letter]) for letter in "ABCD")
        assert len({row["answer"] for row in made}) == len(made) == (options if name.startswith("MMB") else 1)


def test_every_benchmark_has_a_drawn_set_and_old_pictures_stop_it(tmp_path, capsys):
    assert list(drawn.SETS) == [benchmark.dataset for benchmark in BENCHMARKS.values()]
    (tmp_path / "images").mkdir()
    assert drawn.main([str(tmp_path)]) == 1
    assert "other pictures" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ with the kit


class ExactJudge(BaseHTTPRequestHandler):
    """Answers the kit's judge prompts by comparing texts, as an OpenAI server would be asked."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        self.server.models.append(body["model"])
        answer = "hello"
        if "| Correctness" in prompt:
            _, truth, given, _ = prompt.splitlines()[-1].split(" | ")
            answer = "1.0" if truth.strip().lower() == given.strip().lower() else "0.0"
        elif "Model respone: " in prompt:
            answer = prompt.split("Model respone: ")[-1].removesuffix("Extracted answer:")
        reply = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments):
        pass


@contextmanager
def judge_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), ExactJudge)
    server.models = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()


def draw(folder: Path, count: int) -> None:
    curriculum = folder.with_suffix(".json")
    curriculum.write_text(json.dumps({"difficulty": {task: 0.0 for task, _, _ in drawn.SETS.values()}}))
    assert drawn.main([str(folder), "--count", str(count), "--curriculum", str(curriculum)]) == 0


def start(data: Path, work_dir: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    model = ["--model-path", str(ROOT), "--subfolder", "tiny", "--max-new-tokens", "8"]
    command = [sys.executable, "-m", "navil_evaluation.table", *model, "--plain-prompt", "--own-data", "--work-dir"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples" / "evaluation")])
    environment = kept | {"LMUData": str(data), "PYTHONPATH": path, "NO_PROXY": "127.0.0.1"} | variables
    command += [str(work_dir), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=500)
    return process.returncode, output, errors


def test_the_kit_has_the_data_sets_and_the_judges_of_the_table():
    pytest.importorskip("vlmeval")
    from vlmeval.run import get_judge_kwargs, parse_args

    installed = kit.Kit(own_data=False)
    from vlmeval.dataset import DATASET_CLASSES

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run"])
        arguments = parse_args()
    for benchmark in BENCHMARKS.values():
        url, checksum = installed._source(benchmark.dataset)
        assert url.endswith(f"/{benchmark.dataset}.tsv") and len(checksum) == 32
        kind = next(kind for kind in DATASET_CLASSES if benchmark.dataset in kind.supported_datasets())
        assert get_judge_kwargs(benchmark.dataset, kind.TYPE, arguments).get("model", "") == benchmark.judge


@pytest.mark.timeout(1500)
def test_all_benchmarks_are_run_scored_and_continued(tmp_path):
    """First by exact matching, then by a judge, then once more without anything to do."""
    pytest.importorskip("vlmeval")
    from vlmeval.smp import dump, load

    data, work_dir = tmp_path / "data", tmp_path / "work"
    draw(data, count=2)

    code, output, errors = finish(start(data, work_dir))
    assert code == 1 and "MMVet: OPENAI_API_KEY is not set" in errors and not work_dir.exists()

    code, output, errors = finish(start(data, work_dir, "--exact-matching", "--leave-out-missing"))
    assert code == 0, output + errors
    result = json.loads((work_dir / "table.json").read_text())
    assert set(BENCHMARKS) - set(result["metrics"]) == {"MMVet", "MathVista"} and result["average"] is None
    assert "Not comparable with the avg column." in output

    answers = work_dir / kit.RUN / "NaViL_AI2D_TEST.xlsx"
    dump(load(str(answers)).assign(prediction="A"), str(answers))
    with judge_server() as server:
        address = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
        judge = {"OPENAI_API_KEY": "secret-of-the-test", "OPENAI_API_BASE": address}
        code, output, errors = finish(start(data, work_dir, **judge))
        assert code == 0, output + errors
        assert {"gpt-4-1106-preview", "gpt-4o-mini-2024-07-18"} <= set(server.models)
        result = json.loads((work_dir / "table.json").read_text())
        assert set(result["metrics"]) == set(BENCHMARKS)
        assert result["average"] == pytest.approx(mean_normalized(result["metrics"]))
        assert kit.read_status(work_dir)["AI2D_TEST"]["judge_model"] == "gpt-4o-mini"
        assert (work_dir / "table.md").read_text().strip() in output
        assert not any(judge["OPENAI_API_KEY"] in path.read_text() for path in (work_dir / "logs").iterdir())

        code, output, errors = finish(start(data, work_dir, **judge))
        assert code == 0 and output.count("| done |") == len(BENCHMARKS) and "vlmeval.run" not in output
    kept = load(str(answers))
    assert set(kept["prediction"]) == {"A"}  # scored again, not asked again
    assert result["metrics"]["AI2D"] == pytest.approx(100 * (kept["answer"] == "A").mean())
    asked = load(str(work_dir / kit.RUN / "NaViL_GQA_TestDev_Balanced.xlsx")).astype(str)
    assert result["metrics"]["GQA"] == pytest.approx(100 * (asked["prediction"] == asked["answer"]).mean())


def first_answers(saved: Path, process: subprocess.Popen) -> dict:
    """What the kit has saved of the running benchmark, as soon as it can be read."""
    deadline = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError, EOFError, pickle.UnpicklingError):
            return pickle.loads(saved.read_bytes())
        time.sleep(0.05)
    raise AssertionError(f"no {saved}: {process.communicate()[1] if process.poll() is not None else 'too slow'}")


@pytest.mark.timeout(1500)
def test_a_killed_run_continues_within_a_benchmark(tmp_path):
    pytest.importorskip("vlmeval")
    data, work_dir = tmp_path / "data", tmp_path / "work"
    draw(data, count=40)
    arguments = ("--benchmarks", "GQA")
    saved = work_dir / kit.RUN / "01_GQA_TestDev_Balanced.pkl"
    process = start(data, work_dir, *arguments)
    answers = first_answers(saved, process)
    process.kill()
    process.communicate()
    assert 10 <= len(answers) < 40
    saved.write_bytes(pickle.dumps(answers | {0: "an answer of the first run"}))

    code, output, errors = finish(start(data, work_dir, *arguments))
    assert code == 0, output + errors
    from vlmeval.smp import load

    answered = load(str(work_dir / kit.RUN / "NaViL_GQA_TestDev_Balanced.xlsx"))
    assert len(answered) == 40 and answered["prediction"][0] == "an answer of the first run"
