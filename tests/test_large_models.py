"""Models larger than one device: placement, offload, tensor parallelism, quantized weights."""

import fnmatch

import pytest
import torch
from conftest import ROOT, load_model, recorded_image, relative_error
from distributed_worker import torchrun
from torch import nn
from transformers import TorchAoConfig


@pytest.mark.parametrize("share", [0.4, 0.8])
def test_a_model_larger_than_memory_is_offloaded_to_disk(recording, tmp_path, share):
    """The split falls in the vision encoder with 40 % of the weights in memory, in the decoder with 80 %."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in recording.model.parameters())
    placement = {"device_map": "auto", "max_memory": {"cpu": int(share * size)}, "offload_folder": tmp_path}
    model = load_model(recording.folder, **placement)
    placed = model.hf_device_map
    cut = "model.vision_model.blocks." if share < 0.5 else "model.language_model.layers."
    assert {placed[name] for name in placed if name.startswith(cut)} == {"cpu", "disk"} == set(placed.values())
    modules = recording.model.named_modules()
    blocks = [name for name, module in modules if type(module).__name__ in model._no_split_modules]
    config = model.config
    assert len(blocks) == config.text_config.num_hidden_layers + config.vision_config.num_hidden_layers
    assert not any(name.startswith(f"{block}.") for name in placed for block in blocks)
    inputs = recording.inputs("single")
    with torch.no_grad():
        assert relative_error(model(**inputs).logits, recording.model(**inputs).logits) < 1e-6
        text = {"input_ids": inputs["input_ids"][:, :4], "labels": inputs["input_ids"][:, :4]}
        assert torch.allclose(model(**text).loss, recording.model(**text).loss)
    image, settings = recorded_image(90, 60, 0), {"max_new_tokens": 6}
    assert model.chat(recording.tokenizer, image, "What?", settings) == recording.chat(image, "What?")


def test_tensor_parallel_plan_covers_every_expert(recording):
    plan = recording.model._tp_plan
    linear = [name for name, part in recording.model.language_model.named_modules() if isinstance(part, nn.Linear)]
    assert len(linear) == 14 * recording.model.config.text_config.num_hidden_layers
    for name in (f"model.language_model.{name}" for name in linear):
        styles = [style for pattern, style in plan.items() if fnmatch.fnmatch(name, pattern)]
        assert styles == ["rowwise" if name.endswith(("o_proj", "down_proj")) else "colwise"], name
    assert not any("vision_model" in pattern or "connector" in pattern for pattern in plan)


def test_two_processes_hold_half_of_each_expert(recordings, tmp_path):
    recording = recordings["qwen3"]
    inputs = recording.inputs("single") | {"attention_mask": torch.ones_like(recording.inputs("single")["input_ids"])}
    torch.save(inputs, tmp_path / "inputs.pt")
    paths = (recording.folder, tmp_path / "inputs.pt", tmp_path / "outputs.pt")
    torchrun("tests/distributed_worker.py", "tensor_parallel", *paths)
    outputs = torch.load(tmp_path / "outputs.pt")
    text = recording.model.config.text_config
    assert outputs["local_rows"].tolist() == [text.num_attention_heads * text.head_dim // 2] * 2
    with torch.no_grad():
        assert relative_error(outputs["logits"], recording.model(**inputs).logits) < 1e-5
    assert torch.equal(outputs["generated"], recording.model.generate(**inputs, max_new_tokens=6, do_sample=False))


def test_quantized_experts_change_logits_little_and_vision_not_at_all(recording):
    quantization = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    schemes = {
        "int8": quantization.Int8WeightOnlyConfig(),
        "int4": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity.PerGroup(32)),
    }
    inputs, divergence = recording.inputs("single"), {}
    features = (inputs["pixel_values"], inputs["image_grid_thw"])
    for name, scheme in schemes.items():
        config = TorchAoConfig(scheme, modules_to_not_convert=["vision_model", "connector", "lm_head"])
        model = load_model(recording.folder, quantization_config=config)
        weights = {name: module.weight for name, module in model.named_modules() if hasattr(module, "weight")}
        quantized = [name for name, weight in weights.items() if type(weight) not in (nn.Parameter, torch.Tensor)]
        assert len(quantized) == 14 * model.config.text_config.num_hidden_layers
        assert all(name.endswith("_proj") for name in quantized)
        with torch.no_grad():
            assert torch.equal(model.get_image_features(*features), recording.model.get_image_features(*features))
            exact, actual = (m(**inputs).logits.log_softmax(-1) for m in (recording.model, model))
        divergence[name] = (exact.exp() * (exact - actual)).sum(-1).mean().item()
    assert 0 < divergence["int8"] < 1e-3 and divergence["int8"] < divergence["int4"] < 0.1


def test_quantization_benchmark_prints_its_table(capsys):
    pytest.importorskip("torchao.quantization")
    pytest.importorskip("matplotlib")
    from benchmarks import quantization

    assert quantization.main([str(ROOT / "tiny"), "--count", "1", "--difficulty", "0"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["| float32", "| int8", "| int4"]
    assert 0 < float(rows[1][1]) < float(rows[2][1]) < 1
    assert all(row[2].endswith(" of 9 |") for row in rows)
