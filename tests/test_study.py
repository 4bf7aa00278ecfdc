"""The study of the paper's observations: its samples, its runs, and what it concludes from numbers that are known."""

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from navil.modeling_navil import NaViLForConditionalGeneration  # noqa: E402
from navil.processing_navil import NaViLProcessor  # noqa: E402
from recipes.packing import messages  # noqa: E402
from recipes.study import __main__ as study  # noqa: E402
from recipes.study import analysis, data, run  # noqa: E402
from recipes.study.observations import DECODERS, ENCODERS, EXPERTS, RUNS, SHAPES  # noqa: E402
from recipes.study.run import Run  # noqa: E402
from recipes.tasks import make_sample  # noqa: E402

SMALL = {"decoder": (1, 32), "encoder": (1, 32)}


@pytest.fixture(scope="module")
def processor() -> NaViLProcessor:
    return data.build_study_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "runs").mkdir()
    return folder


def build(processor, **settings) -> NaViLForConditionalGeneration:
    chosen = Run(**{**SMALL, **settings})
    return NaViLForConditionalGeneration(data.study_config(processor, chosen.decoder, chosen.encoder, chosen.experts))


# -- samples and runs --------------------------------------------------------------------------------------------------


def test_samples_are_the_recipes_at_one_difficulty(processor, folder):
    samples = data.load_samples(folder, "pictures", 40)
    assert sum(map(len, samples.values())) == 40 and all(samples.values())
    [first] = [seed for seed in range(40) if data.draw(data.PICTURES, seed + 1, 0, processor)["text"]][:1]
    sample = make_sample("text", first, data.DIFFICULTY)
    expected = processor.training_batch(
        [{"messages": messages(sample.turns, sample.images)}], row_length=data.ROW_LENGTH
    )
    batch = data.collate(samples["text"][:1], processor, "cpu")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"])
    again = data.load_samples(folder, "pictures", 40)
    assert torch.equal(samples["scene"][0].input_ids, again["scene"][0].input_ids)


def test_compared_models_have_equal_sizes(processor):
    by_experts = [run.count_parameters(build(processor, decoder=(3, 96), experts=experts)) for experts in EXPERTS]
    assert len({(count["encoder"], count["decoder"]) for count in by_experts}) == 1
    assert by_experts[0]["all"] < by_experts[1]["all"] < by_experts[2]["all"]
    shapes = [run.count_parameters(build(processor, encoder=shape))["encoder"] for shape in SHAPES]
    assert max(shapes) < 1.15 * min(shapes)
    sizes = [run.count_parameters(build(processor, decoder=d))["decoder"] for d in DECODERS]
    assert sizes == sorted(sizes) and sizes[-1] > 20 * sizes[0]


def test_an_llm_from_text_lends_its_experts_to_pictures(processor, folder):
    assert not any(one.images for one in run.load_training(folder, "texts", 64))
    pretrained = run.pretrain(SMALL["decoder"], 0, folder, 64, "cpu")
    assert pretrained["samples"] == 64 and not any("vision_model" in name for name in pretrained["weights"])
    model = build(processor)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run.start_from_text(model, pretrained["weights"])
    after = dict(model.named_parameters())
    for name, parameter in after.items():
        if "vision_model" in name or "connector" in name:
            assert torch.equal(parameter, before[name])
        elif ".visual." in name:
            assert torch.equal(parameter, after[name.replace(".visual.", ".text.")])
        else:
            assert torch.equal(parameter, pretrained["weights"][name])


def test_a_run_is_measured_and_resumed(folder, monkeypatch):
    monkeypatch.setattr(run, "NUM_HELDOUT", 48)
    run.load_heldout.cache_clear()
    chosen = Run(**SMALL, experts=("ffn",), from_text=False, seed=3)
    result = run.execute(chosen, folder, 100)
    assert [row["samples"] for row in result["measured"]] == [32, 64, 96]
    losses = [row["loss"] for row in result["measured"]]
    assert losses[0]["all"] > losses[-1]["all"] and set(losses[0]) == {*data.PICTURES, "all"}
    assert len(result["feature_scale"]["visual"]) == 1 + 1
    saved = folder / "runs" / f"{chosen.name}_100"
    model = NaViLForConditionalGeneration.from_pretrained(saved, torch_dtype=torch.float32)
    assert model.config.text_config.visual_experts == ["ffn"]
    assert run.heldout_losses(model, run.load_heldout(folder, "cpu")[1]) == pytest.approx(losses[-1], rel=1e-5)
    monkeypatch.setattr(run, "train_once", None)
    assert run.execute(chosen, folder, 100) == json.loads(json.dumps(result))
    run.load_heldout.cache_clear()


def test_the_command_writes_plot_and_json(tmp_path, capsys, monkeypatch):
    runs = [Run(**SMALL, experts=experts) for experts in EXPERTS]
    monkeypatch.setitem(study.RUNS, "experts", lambda seeds: runs)
    assert study.main(["experts", "--samples", "32", "--workers", "1", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "[3/3]" in printed and "attention and ffn: final loss" in printed
    written = json.loads((tmp_path / "experts.json").read_text())
    assert [one["name"] for one in written["runs"]] == [one.name for one in runs]
    assert (tmp_path / "experts.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("option", "value"), [("--samples", "31"), ("--seeds", "0"), ("--workers", "-1")])
def test_the_command_refuses_sizes_that_are_too_small(option, value, capsys):
    with pytest.raises(SystemExit):
        study.main(["experts", option, value])
    assert f"got {value}" in capsys.readouterr().err


# -- conclusions -------------------------------------------------------------------------------------------------------


def made_up(observation: str, loss, scale=lambda one: 1.0) -> list[dict]:
    """Results of an observation's runs, three seeds, whose loss at a share of the samples is `loss(run, share)`."""
    return [
        {
            "run": {"decoder": one.decoder, "encoder": one.encoder, "experts": one.experts, "from_text": one.from_text},
            "parameters": {
                part: 12 * getattr(one, part)[0] * getattr(one, part)[1] ** 2 for part in ("decoder", "encoder")
            },
            "measured": [
                {"samples": int(1000 * share), "loss": {"all": loss(one, share) + one.seed / 10000}}
                for share in (0.01, 0.1, 0.22, 0.46, 1.0)
            ],
            "feature_scale": {"text": [1.0] * 4, "visual": [scale(one) + one.seed / 1000] * 4},
        }
        for one in RUNS[observation](range(3))
    ]


def outcomes(finding: analysis.Finding) -> list[str]:
    return [outcome.partition(":")[0] for outcome in finding.claims.values()]


def test_samples_to_reach_a_loss():
    curve = analysis.Curve(np.array([10, 100, 1000]), np.array([[4.0, 2.0, 1.0], [6.0, 2.0, 1.0]]))
    assert curve.samples_to_reach(1.5) == pytest.approx([10**2.5] * 2)
    assert curve.samples_to_reach(5.0) == pytest.approx([10, 10**1.25]) and set(curve.samples_to_reach(0.5)) == {
        math.inf
    }
    assert curve.error[0] == pytest.approx(12.71) and curve.error[2] == 0


def test_a_loss_that_is_reached_at_once_or_never():
    at_once = analysis.Curve(np.array([10, 100]), np.array([[0.3, 0.5]]))
    assert at_once.samples_to_reach(0.4) == [10]
    runs = made_up("initialization", lambda one, share: (0.3 if one.from_text else 0.9) - 0.3 * math.log10(share) / 2)
    finding = analysis.compare_initialization(runs)
    assert outcomes(finding) == ["agrees", "undecided"]  # scratch never reaches the loss, so the factor is unknown


def test_a_claim_within_the_noise_is_undecided():
    finding = analysis.Finding(None)
    for margins in ([1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [1.0, -0.5, 0.2], [1.0]):
        finding.check(str(margins), margins)
    assert outcomes(finding) == ["agrees", "does not agree", "undecided", "undecided"]


@pytest.mark.parametrize(
    ("head_start", "expected"),
    [(20, ["agrees", "agrees"]), (2, ["agrees", "does not agree"]), (0.8, ["does not agree", "does not agree"])],
)
def test_initialization(head_start, expected):
    runs = made_up(
        "initialization", lambda one, share: 0.3 - 0.3 * math.log(share * (head_start if one.from_text else 1))
    )
    finding = analysis.compare_initialization(runs)
    assert outcomes(finding) == expected
    [factor, _] = finding.claims.values()
    assert f": margin {math.log(head_start):.3g} ±" in factor


@pytest.mark.parametrize("sign", [1, -1])
def test_experts(sign):
    finding = analysis.compare_experts(
        made_up(
            "experts",
            lambda one, share: (1.5 + 0.1 * (2 - sign * len(one.experts))) * (1 - 0.9 * share),
            lambda one: 4.0 if (len(one.experts) == 1) == (sign > 0) else 1.1,
        )
    )
    assert set(outcomes(finding)) == {"agrees" if sign > 0 else "does not agree"}


def test_shapes():
    deeper_is_worse = analysis.compare_shapes(made_up("shape", lambda one, share: one.encoder[0] / 10))
    assert outcomes(deeper_is_worse) == ["does not agree", "agrees", "agrees"]
    middle = made_up("shape", lambda one, share: 1 + float(one.encoder in (SHAPES[0], SHAPES[-1])) * share)
    assert outcomes(analysis.compare_shapes(middle))[:2] == ["agrees"] * 2


def test_scaling_and_the_optimal_encoder():
    def loss(one, share):
        llm, encoder = (math.log2(depth * width**2) for depth, width in (one.decoder, one.encoder))
        enough = 9.5 + (llm - 11.5) / 2  # log2 of the encoder's size beyond which nothing is gained
        return 3 - 0.1 * llm + 0.2 * max(0.0, enough - encoder) - share / 100

    runs = made_up("scaling", loss)
    assert len(runs) == 3 * len(DECODERS) * len(ENCODERS)
    assert outcomes(analysis.compare_scaling(runs)) == ["agrees"] * 4
    growing = analysis.compare_encoder_sizes(runs)
    assert outcomes(growing) == ["agrees"]
    sizes = np.array([1.0, 2, 4, 8])
    assert analysis.optimal_encoder(sizes, np.array([2.0, 1.0, 0.99, 0.985])) == pytest.approx(
        2 ** (1 - 0.01 / 0.99), rel=0.02
    )
    assert analysis.optimal_encoder(sizes, np.array([4.0, 3, 2, 1])) == pytest.approx(4)
