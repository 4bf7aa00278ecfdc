"""The benchmarks run, compare like with like, and count what they say they count."""

import json
import mmap

import pytest
import torch
from conftest import relative_error

pytest.importorskip("matplotlib")  # as all of the recipes' packages, whose loader the benchmarks use

from benchmarks import baselines, limits, memory, profiling, run  # noqa: E402
from navil import configuration_navil as configuration  # noqa: E402
from navil import modeling_navil as modeling

CPU = torch.device("cpu")


def tiny_config():
    config = run.small_config()
    vision = config.vision_config.to_dict() | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = config.text_config.to_dict() | {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    return configuration.NaViLConfig(vision_config=vision, text_config=text, min_dynamic_patch=16, max_dynamic_patch=64)


@pytest.fixture
def tiny_benchmark(monkeypatch):
    monkeypatch.setitem(run.SIZES, "small", tiny_config)
    monkeypatch.setattr(run, "PHOTO_SIZES", ((64, 48),))
    monkeypatch.setattr(run, "VISION_CASES", ((1, (64, 48)), (2, (64, 48))))
    quick = limits.Yardstick(1e6, lambda: torch.ones(64) @ torch.ones(64))
    monkeypatch.setattr(limits, "products", lambda *_: quick)
    monkeypatch.setattr(limits, "reads", lambda *_: quick)


@torch.no_grad()
def test_baselines_compute_the_same():
    model = modeling.NaViLForConditionalGeneration._from_config(tiny_config()).eval()
    pixels, grids = torch.randn(88, 768), torch.tensor([[1, 4, 6], [1, 8, 8]])
    features = model.get_image_features(pixels, grids)
    for attend in (baselines.dense_mask_fused, baselines.dense_mask_equations):
        with baselines.dense_mask(attend):
            assert relative_error(model.get_image_features(pixels, grids), features) < 1e-5
    ids, visual = torch.randint(64, (1, 12)), torch.zeros(1, 12, dtype=torch.bool)
    visual[:, 3:9] = True
    logits = model(ids, visual_token_mask=visual).logits
    with baselines.both_experts():
        assert relative_error(model(ids, visual_token_mask=visual).logits, logits) < 1e-5


def test_counted_operations_are_those_of_the_matrices():
    config = tiny_config()
    model = modeling.NaViLForConditionalGeneration._from_config(config)
    matrices = sum(p.numel() for name, p in model.vision_model.named_parameters() if p.ndim == 2)
    connector = sum(p.numel() for p in model.connector.parameters() if p.ndim == 2)
    patches = 24
    linear = 2 * (patches * matrices + patches // 4 * connector)
    attention = 2 * 2 * config.vision_config.num_hidden_layers * config.vision_config.hidden_size * patches**2
    assert limits.vision_operations(config, [[1, 4, 6]]) == linear + attention
    text = config.text_config
    layers = model.language_model.layers
    weights = sum(p.numel() for name, p in layers.named_parameters() if p.ndim == 2 and ".text." in name)
    head = text.vocab_size * text.hidden_size
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 5 * 3
    assert limits.decode_bytes(text, 3, 5, torch.bfloat16) == 2 * (weights + head + cache)
    attention = 2 * 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * 10**2 // 2
    assert limits.prefill_operations(text, 10) == 2 * (10 * weights + head) + attention


def test_shares_of_the_limit_are_taken_round_by_round(monkeypatch):
    bench = run.Bench(tiny_config(), CPU, torch.float32, rounds=3)
    bench.products = limits.Yardstick(10, lambda: None)
    bench.reads = limits.Yardstick(100, lambda: None)
    times = {"navil": [8.0, 4.0, 16.0], "other": [8.0, 8.0, 8.0], "products": [1.0, 1.0, 2.0], "reads": [1.0, 4.0, 1.0]}
    monkeypatch.setattr(run, "alternate", lambda contestants, *_: {name: times[name] for name in contestants})
    row = bench.row("part", "case", print, {"other": print}, operations=20, repeats=2)
    assert (row.seconds, row.speedups, row.floor, row.share_of_limit) == (4, {"other": 1}, 2, 0.5)
    row = bench.row("part", "case", print, {}, operations=20, bytes_read=100)  # floors of 2, 4 and 4
    assert (row.seconds, row.floor, row.share_of_limit) == (8, 4, 0.25)


def test_every_part_runs_and_reports(tiny_benchmark, tmp_path):
    lengths = ["--lengths", "16", "--batches", "2", "--contexts", "16"]
    assert run.main(["--device", "cpu", "--rounds", "1", *lengths, "--output", str(tmp_path / "result")]) == 0
    report = json.loads((tmp_path / "result.json").read_text())
    assert {row["part"] for row in report["rows"]} == set(run.PARTS)
    assert all(row["seconds"] > 0 and all(x > 0 for x in row["speedups"].values()) for row in report["rows"])
    assert {"command", "hardware", "commit", "torch", "transformers"} <= set(report)
    limited = {row["part"] for row in report["rows"] if row["share_of_limit"] and row["floor"]}
    assert limited == {"vision", "prefill", "decode"}
    table = (tmp_path / "result.md").read_text()
    assert all(f"| {part} |" in table for part in run.PARTS)


def test_memory_is_measured_over_what_was_there(tiny_benchmark):
    before = memory.Peak(CPU)
    held = mmap.mmap(-1, 64 * memory.MIB)  # an allocator might have as much left over from another test
    torch.frombuffer(held, dtype=torch.uint8).fill_(1)
    assert 60 < before.mib() < 128
    assert memory.Peak(CPU).mib() < 8
    measured = memory.measure_forward("small", 64, dense=False, device=CPU, dtype=torch.float32)
    assert measured["patches"] == 64 and measured["peak"] > 0


def test_profiles_count_kernels_and_host_waits():
    x = torch.ones(256, 256)
    quiet = profiling.measure(lambda: (x @ x) @ x, CPU)
    assert quiet.num_waits == 0 and quiet.num_kernels >= 2 and quiet.longest[0][0] == "aten::mm"
    assert 0 < quiet.longest[0][1] <= quiet.busy
    assert profiling.measure(lambda: (x @ x).sum().item(), CPU).num_waits == 1


def test_profiles_of_every_case(tiny_benchmark, monkeypatch, capsys):
    monkeypatch.setattr(profiling, "PHOTO", (64, 48))
    monkeypatch.setattr(profiling, "LENGTH", 16)
    monkeypatch.setattr(profiling, "CONTEXT", 8)
    compiled = []
    monkeypatch.setattr(run, "compile_encoder", compiled.append)
    monkeypatch.setattr(run, "compile_prefill", compiled.append)
    decoders = []
    monkeypatch.setattr(torch, "compile", lambda model, **settings: decoders.append(settings) or model)
    assert profiling.main(["--device", "cpu"]) == 0
    names = [line.split(" | ")[0].removeprefix("| ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == [
        "attention, flash by run",
        "vision",
        "vision, compiled",
        "prefill",
        "prefill, compiled",
        "decode 4 tokens, NaViL, compiled",
        "decode 4 tokens, NaViL, compiled and tuned",
        "decode 4 tokens, Qwen3, compiled",
        "decode 4 tokens, Qwen3, compiled and tuned",
    ]
    assert len(compiled) == 2
    assert [settings.get("options") for settings in decoders] == [None, run.TUNED["cpu"]] * 2
