"""benchmarks/serving.py runs both engines on equal requests."""

import json

import pytest

from benchmarks import serving, workloads
from navil.configuration_navil import NaViLConfig


def tiny_config() -> NaViLConfig:
    """Heads of 32 features, the least that vLLM's kernels for CPUs take."""
    config = workloads.small_config().to_dict()
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = config["text_config"] | sizes | {"num_key_value_heads": 1, "head_dim": 32}
    return NaViLConfig(
        vision_config=config["vision_config"] | sizes, text_config=text, min_dynamic_patch=16, max_dynamic_patch=64
    )


def test_every_engine_runs_and_reports(monkeypatch, tmp_path):
    monkeypatch.setitem(workloads.SIZES, "small", tiny_config)
    options = "--device cpu --requests 3 --batch 2 --photo 64x48 --new-tokens 4 --rounds 1 --eager --output".split()
    assert serving.main([*options, str(tmp_path / "result")]) == 0
    report = json.loads((tmp_path / "result.json").read_text())
    names = ["generate, one by one", "generate, batches of 2", "vLLM, one by one", "vLLM, 2 at once"]
    assert [row["engine"] for row in report["rows"]] == names
    assert report["rows"][0]["speedup"] == 1
    assert all(row[name] > 0 for row in report["rows"] for name in ("requests_per_second", "first_token", "per_token"))
    assert {"command", "hardware", "commit", "torch", "transformers", "vllm"} <= set(report)
    assert all(f"| {name} |" in (tmp_path / "result.md").read_text() for name in names)


def test_latencies():
    latencies = serving.Latencies()
    latencies.add(1.0, [1.5, 1.7, 2.1])
    latencies.add(1.0, [3.0])
    assert latencies.first_token == [0.5, 2.0] and latencies.per_token == pytest.approx([0.3, 0])


def test_photos_differ():
    requests = serving.Requests((64, 48), 3, 4)
    batches = requests.batches(2) + requests.batches(2)
    assert [len(batch) for batch in batches] == [2, 1, 2, 1]
    assert len({photo.tobytes() for batch in batches for photo in batch}) == 6
