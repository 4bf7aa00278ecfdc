"""The benchmarks run, their baselines compute the same function, and their analytic counts match the model."""

import json
import mmap

import numpy as np
import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file

from benchmarks import (
    baselines,
    conversion,
    fast_images,
    first_token,
    memory,
    profiling,
    roofline,
    run,
    training,
    workloads,
)
from navil.configuration_navil import NaViLConfig
from navil.image_processing_navil import NaViLImageProcessor
from navil.modeling_navil import NaViLForConditionalGeneration

CPU = torch.device("cpu")


def tiny_config() -> NaViLConfig:
    config = workloads.small_config()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text_sizes = {**sizes, "vocab_size": 64, "num_key_value_heads": 1, "head_dim": 16}
    return NaViLConfig(
        vision_config=config.vision_config.to_dict() | sizes,
        text_config=config.text_config.to_dict() | text_sizes,
        min_dynamic_patch=16,
        max_dynamic_patch=64,
    )


@pytest.fixture
def tiny_benchmark(monkeypatch):
    monkeypatch.setitem(workloads.SIZES, "small", tiny_config)
    monkeypatch.setattr(run, "PHOTO_SIZES", ((64, 48),))
    monkeypatch.setattr(run, "VISION_CASES", ((1, (64, 48)), (2, (64, 48))))
    quick = roofline.PeakProbe(1e6, lambda: torch.ones(64) @ torch.ones(64))
    monkeypatch.setattr(roofline, "matmul_probe", lambda *_: quick)
    monkeypatch.setattr(roofline, "bandwidth_probe", lambda *_: quick)


@torch.no_grad()
def test_baselines_compute_the_same():
    model = NaViLForConditionalGeneration._from_config(tiny_config()).eval()
    pixels, grids = torch.randn(88, 768), torch.tensor([[1, 4, 6], [1, 8, 8]])
    features = model.get_image_features(pixels, grids)
    for attend in (baselines.dense_mask_sdpa, baselines.dense_mask_eager):
        with baselines.dense_mask(attend):
            assert relative_error(model.get_image_features(pixels, grids), features) < 1e-5
    ids, visual = torch.randint(64, (1, 12)), torch.zeros(1, 12, dtype=torch.bool)
    visual[:, 3:9] = True
    logits = model(ids, visual_token_mask=visual).logits
    with baselines.both_experts():
        assert relative_error(model(ids, visual_token_mask=visual).logits, logits) < 1e-5


def test_flops_and_bytes_are_those_of_the_matrices():
    config = tiny_config()
    model = NaViLForConditionalGeneration._from_config(config)

    def matrices(module, expert="") -> int:
        return sum(p.numel() for name, p in module.named_parameters() if p.ndim == 2 and expert in name)

    patches = 24
    linear = 2 * (patches * matrices(model.vision_model) + patches // 4 * matrices(model.model.connector))
    attention = 2 * 2 * config.vision_config.num_hidden_layers * config.vision_config.hidden_size * patches**2
    assert roofline.vision_flops(config, [[1, 4, 6]]) == linear + attention
    text = config.text_config
    weights = matrices(model.language_model.layers, ".text.")
    head = text.vocab_size * text.hidden_size
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 5 * 3
    assert roofline.decode_bytes(text, 3, 5, torch.bfloat16) == 2 * (weights + head + cache)
    attention = 2 * 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * 10**2 // 2
    assert roofline.prefill_flops(text, 10) == 2 * (10 * weights + head) + attention


def test_released_sizes(capsys):
    assert roofline.main(["--bandwidth", "100"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    table = {label: values for label, *values in rows}
    # The paper states 2.4 B and 9.2 B (Table 6).
    assert table["activated parameters"] == ["2.53 B", "9.47 B"]
    assert table["weights, on disk and in memory"] == ["8.1 GB", "32.8 GB"]
    read = [float(value.split()[0]) for value in table["bytes read per decoded token, 4096 tokens"]]
    speeds = [float(value.split()[0]) for value in table["decoding at 100 GB/s, at most"]]
    assert speeds == pytest.approx([100 / gigabytes for gigabytes in read], rel=0.01)
    packed = NaViLImageProcessor()(workloads.photo((640, 480)), multi_scale=True)
    assert table["640x480"][0] == str(len(packed["pixel_values"])) == "2212"


def test_roofline_is_taken_round_by_round(monkeypatch):
    benchmark = run.Benchmark(tiny_config(), CPU, torch.float32, rounds=3)
    benchmark.probes = {"FLOPs": roofline.PeakProbe(10, print), "bytes": roofline.PeakProbe(100, print)}
    times = {"navil": [8.0, 4.0, 16.0], "other": [8.0, 8.0, 8.0], "FLOPs": [1.0, 1.0, 2.0], "bytes": [1.0, 4.0, 1.0]}
    monkeypatch.setattr(run, "time_interleaved", lambda candidates, *_: {name: times[name] for name in candidates})
    row = benchmark.measure("part", "case", print, {"other": print}, {"FLOPs": 20}, repeats=2)
    assert (row.seconds, row.speedups, row.roofline_seconds, row.roofline_fraction) == (4, {"other": 1}, 2, 0.5)
    row = benchmark.measure("part", "case", print, work={"FLOPs": 20, "bytes": 100})  # lower bounds of 2, 4 and 4
    assert (row.seconds, row.roofline_seconds, row.roofline_fraction) == (8, 4, 0.25)


def test_every_part_runs_and_reports(tiny_benchmark, tmp_path):
    lengths = ["--lengths", "16", "--batches", "2", "--contexts", "16"]
    assert run.main(["--device", "cpu", "--rounds", "1", *lengths, "--output", str(tmp_path / "result")]) == 0
    report = json.loads((tmp_path / "result.json").read_text())
    assert {row["part"] for row in report["rows"]} == set(run.PARTS)
    assert all(row["seconds"] > 0 and all(x > 0 for x in row["speedups"].values()) for row in report["rows"])
    assert {"command", "hardware", "commit", "torch", "transformers"} <= set(report)
    bounded = {row["part"] for row in report["rows"] if row["roofline_fraction"] and row["roofline_seconds"]}
    assert bounded == {"vision", "prefill", "decode"}
    table = (tmp_path / "result.md").read_text()
    assert all(f"| {part} |" in table for part in run.PARTS)


def test_memory_is_measured_above_what_was_held(tiny_benchmark):
    before = memory.Peak(CPU)
    held = mmap.mmap(-1, 64 * memory.MIB)  # an allocator might reuse memory of another test
    torch.frombuffer(held, dtype=torch.uint8).fill_(1)
    assert 60 < before.mib() < 128
    assert memory.Peak(CPU).mib() < 8
    minimum, peak = memory.measure_vision(workloads.Setup(tiny_config(), CPU, torch.float32), 8, dense=False)
    assert minimum == 64 * (768 + 32 + 2 * 48) * 4 / memory.MIB and peak > 0


def test_the_fast_image_processor_is_compared(monkeypatch, capsys):
    picture = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    monkeypatch.setattr(fast_images, "PHOTO_SIZES", ((64, 48),))
    monkeypatch.setattr(fast_images, "TASKS", ("scene",))
    monkeypatch.setattr(fast_images, "sample_pictures", lambda: {"noise": [picture]})
    assert fast_images.main(["--rounds", "1", "--count", "1"]) == 0
    tables = [table.splitlines() for table in capsys.readouterr().out.strip().split("\n\n")]
    assert [len(table) for table in tables] == [4, 4, 8, 4]
    assert [line.split(" | ")[1] for line in tables[1][2:]] == ["uint8", "float32"]
    assert [line.split(" | ")[0] for line in tables[3][2:]] == ["| exact", "| fast"]


def test_profiles_count_kernels_and_host_syncs():
    x = torch.ones(256, 256)
    quiet = profiling.measure(lambda: (x @ x) @ x, CPU)
    assert quiet.num_syncs == 0 and quiet.num_kernels >= 2 and quiet.longest[0][0] == "aten::mm"
    assert 0 < quiet.longest[0][1] <= quiet.kernel_time
    assert profiling.measure(lambda: (x @ x).sum().item(), CPU).num_syncs == 1


def test_profiles_of_every_case(tiny_benchmark, monkeypatch, capsys):
    for name, value in {"PHOTO": (64, 48), "LENGTH": 16, "CONTEXT": 8}.items():
        monkeypatch.setattr(profiling, name, value)
    compiled = []
    for name in ("compile_encoder", "compile_prefill"):
        monkeypatch.setattr(profiling, name, compiled.append)
    monkeypatch.setattr(torch, "compile", lambda model, **settings: compiled.append(settings.get("options")) or model)
    assert profiling.main(["--device", "cpu"]) == 0
    names = [line.split(" | ")[0].removeprefix("| ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert names[:5] == [
        "attention, flash, batched by length",
        "vision",
        "vision, compiled",
        "prefill",
        "prefill, compiled",
    ]
    assert [name.removeprefix("decode 4 tokens, ") for name in names[5:]] == [
        f"{model}, compiled{tuned}" for model in ("NaViL", "Qwen3") for tuned in ("", " and tuned")
    ]
    assert len(compiled) == 6 and compiled[2:] == [None, workloads.TUNED_OPTIONS["cpu"]] * 2


def test_random_checkpoint_is_in_the_released_layout(monkeypatch, tmp_path):
    layout, folder = json.loads((conversion.FIXTURES / "official_layout_2b.json").read_text()), tmp_path / "random"
    tensors = {"vision.norm.weight": [8], "vision.proj.bias": [8], "head.weight": [600, 1000]}
    (tmp_path / "official_layout_2b.json").write_text(json.dumps(layout | {"tensors": tensors}))
    (tmp_path / "internlm2").symlink_to(conversion.FIXTURES / "internlm2")
    monkeypatch.setattr(conversion, "FIXTURES", tmp_path)
    conversion.write_random_checkpoint("2b", folder, shard_size="1MB")
    index, written = json.loads((folder / "model.safetensors.index.json").read_text()), {}
    for file in set(index["weight_map"].values()):
        written |= load_file(folder / file)
    assert {name: list(tensor.shape) for name, tensor in written.items()} == tensors
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert written["vision.norm.weight"].mean() > 0.9 and written["vision.proj.bias"].abs().max() < 0.2
    assert json.loads((folder / "config.json").read_text()) == layout["config"]
    with pytest.raises(FileExistsError):
        conversion.write_random_checkpoint("2b", folder)


def test_a_training_step_on_packed_rows_is_measured(tiny_benchmark, monkeypatch, capsys):
    """Both parts; memory is measured in this process here."""
    monkeypatch.setattr(training, "in_fresh_process", lambda measure, *arguments: measure(*arguments))
    assert training.main(["--size", "small", "--lengths", "64", "--rounds", "1"]) == 0
    assert training.main(["--size", "small", "--part", "step", "--lengths", "512", "--rounds", "1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 64 |", "| 512 |"))]
    assert len(rows) == 2 and all("nan" not in row for row in rows)


def test_flops_of_a_training_row_are_those_of_its_documents():
    setup = workloads.Setup(tiny_config(), CPU, torch.float32)
    setup.config.image_token_id, setup.config.image_start_token_id = 1, 2
    inputs, flops = training.mixed_row(setup, 512)
    grids, text = inputs["image_grid_thw"].tolist(), setup.config.text_config
    assert inputs["cu_seq_lens_q"].tolist() == list(range(0, 513, 64)) and len(grids) == 8
    num_labels = int((inputs["labels"] >= 0).sum())
    forward = roofline.vision_flops(setup.config, grids) + 8 * roofline.prefill_flops(text, 64, num_labels / 8)
    assert flops == 3 * forward


def test_the_way_to_the_first_token_is_timed_stage_by_stage(tiny_benchmark, monkeypatch, capsys):
    monkeypatch.setattr(first_token, "PHOTO_SIZES", ((64, 48),))
    assert first_token.main(["--size", "small", "--rounds", "1"]) == 0
    batch = ["--part", "throughput", "--batches", "2", "--new-tokens", "2", "--rounds", "1"]
    assert first_token.main(["--size", "small", *batch]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| 64x48 |")]) == len(first_token.VARIANTS)
    assert lines[-1].startswith("| 2 | as loaded |")
