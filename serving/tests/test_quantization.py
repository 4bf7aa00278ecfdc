"""Half precision and weight-only quantization: the answers are the package's own with the same weights."""

import gc
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import conversations
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from engine import ask, start
from navil_vllm.model import FULL_PRECISION
from package import answers, load
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchao.core.config import AOBaseConfig, config_to_dict
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import TorchAoConfig
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

GROUP = 32  # weights that share a scale
NAMES = ["1 x 1", "640 x 480", "1000 x 50", "3 pictures [(200, 100), (100, 300), (64, 64)]", "a picture between texts"]
NAMES += ["alpha", "history with a second picture", "text: Hello!", "text: long"]
CHATS = {name: chat for name, chat in conversations().items() if name in NAMES}
LIKELY = -8  # logprob of the tokens that are compared; those of unlikely ones differ more


def check_close(expected: dict, actual: dict, tolerance: float) -> None:
    """Compares logprobs of likely tokens, until another token is chosen, which must be almost as likely."""
    for name, answer in actual.items():
        reference = expected[name]
        assert answer["prompt_ids"] == reference["prompt_ids"], name
        for step, (logprobs, id) in enumerate(zip(answer["logprobs"], answer["ids"], strict=True)):
            exact = reference["logprobs"][step]
            errors = [abs(exact[other].item() - own) for other, own in logprobs.items() if exact[other] > LIKELY]
            assert max(errors) < tolerance, (name, step, max(errors))
            if id != reference["ids"][step]:
                assert exact.max() - exact[id] < 2 * tolerance, (name, step)
                break


@contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[LLM]:
    llm = start(folder, max_num_seqs=8, max_model_len=4096, **settings)
    yield llm
    del llm
    gc.collect()


def check_quantized_modules(llm: LLM) -> None:
    """All linear layers of both experts are quantized; encoder, connector, embeddings and output head are not."""

    def quantized(model: torch.nn.Module) -> list[str]:
        linear = [(name, module) for name, module in model.named_modules() if isinstance(module, LinearBase)]
        assert len(linear) == 8 * model.config.text_config.num_hidden_layers
        others = [*model.vision_model.parameters(), *model.connector.parameters(), model.lm_head.weight]
        assert {type(weight.data) for weight in others} == {Tensor} and {weight.dtype for weight in others} <= FLOATS
        return [name for name, module in linear if not isinstance(module.quant_method, UnquantizedLinearMethod)]

    [names] = llm.apply_model(quantized)
    assert len(names) == len(set(names)) == 64


FLOATS = {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tiny, dtype):
    names = {"bfloat16": NAMES, "float16": NAMES[-3:]}[dtype]  # CPUs multiply float16 slowly
    chats = {name: CHATS[name] for name in names}
    expected = answers(load(tiny.folder, getattr(torch, dtype)), tiny.folder, chats)
    with engine(tiny.folder, dtype=dtype) as llm:
        check_close(expected, ask(llm, chats), {"bfloat16": 0.3, "float16": 0.05}[dtype])


NOT_CONVERTED = [*FULL_PRECISION, "lm_head"]
SCHEMES = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torchao_quantizes_at_the_start(tiny, scheme):
    """As the package with `TorchAoConfig`, in float32."""
    quantization = TorchAoConfig(SCHEMES[scheme], modules_to_not_convert=NOT_CONVERTED)
    expected = answers(load(tiny.folder, quantization_config=quantization), tiny.folder, CHATS)
    overrides = {"quantization_config_dict_json": json.dumps(config_to_dict(SCHEMES[scheme]))}
    with engine(tiny.folder, quantization="torchao", hf_overrides=overrides) as llm:
        check_quantized_modules(llm)
        check_close(expected, ask(llm, CHATS), 1e-3)


def save_quantized(source: Path, folder: Path, config: AOBaseConfig, full_precision: list[str]) -> Any:
    """Saves the model of a folder as the package does, quantized."""
    shutil.copytree(source, folder)
    model = load(source, quantization_config=TorchAoConfig(config, modules_to_not_convert=full_precision))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torchao_folders(tiny, tmp_path, scheme):
    folder = tmp_path / f"navil-tiny-{scheme}"
    model = save_quantized(tiny.folder, folder, SCHEMES[scheme], NOT_CONVERTED)
    expected = answers(model, tiny.folder, CHATS)
    with engine(folder) as llm:
        check_quantized_modules(llm)
        check_close(expected, ask(llm, CHATS), 1e-3)


def compress(source: Path, folder: Path) -> dict[str, Tensor]:
    """A folder with the experts' weights in 4 bits, in the layout of llm-compressor (W4A16).

    Returns the tensors that the package needs for the same weights.
    """
    shutil.copytree(source, folder)
    tensors, same = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = same[name] = tensor
            continue
        groups = tensor.unflatten(1, (-1, GROUP))
        scale = (groups.abs().amax(-1) / 7.5).bfloat16()
        quantized = (groups / scale[..., None].float()).round().clamp(-8, 7)
        same[name] = (quantized * scale[..., None].float()).flatten(1)
        module = name.removesuffix("weight")
        tensors[f"{module}weight_packed"] = pack_to_int32(quantized.flatten(1).to(torch.int8), 4)
        tensors[f"{module}weight_scale"] = scale
        tensors[f"{module}weight_shape"] = torch.tensor(tensor.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*vision_model.*", "re:.*connector.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return same


def test_compressed_tensors(tiny, tmp_path):
    folder = tmp_path / "navil-tiny-w4a16"
    same = compress(tiny.folder, folder)
    model = load(tiny.folder)
    assert not model.load_state_dict(same, strict=False).unexpected_keys
    expected = answers(model, tiny.folder, CHATS)
    with engine(folder, dtype="bfloat16") as llm:
        check_quantized_modules(llm)
        check_close(expected, ask(llm, CHATS), 0.3)
    with pytest.raises(ValueError, match="on a CPU, packed 4-bit weights need --dtype bfloat16 or float16"):
        start(folder, dtype="float32")


@pytest.mark.parametrize("name", ["bitsandbytes", "gguf"])
def test_other_quantization_is_refused(tiny, name):
    arguments = {"trust_remote_code": True, "quantization": name}
    with pytest.raises(ValueError, match="quantization"):
        EngineArgs(str(tiny.folder), **arguments).create_engine_config()


def test_a_quantized_connector_is_refused(tiny, tmp_path):
    folder = tmp_path / "navil-tiny-quantized"
    save_quantized(tiny.folder, folder, SCHEMES["int8"], ["model.vision_model", "lm_head"])
    with pytest.raises(ValueError, match="'model.connector.fc1.weight' is quantized: quantize with modules_to_not_"):
        start(folder)


def test_quantization_of_other_layers_is_refused(tiny):
    with pytest.raises(ValueError, match="'int8_per_channel_weight_only' quantizes none of NaViL's linear layers"):
        start(tiny.folder, dtype="bfloat16", quantization="int8_per_channel_weight_only")
