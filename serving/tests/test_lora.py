"""Adapters that PEFT wrote, served by vLLM: the package's own answers with the adapter, in mixed batches too."""

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from cases import conversations
from engine import ask, start
from package import TOLERANCE, answers, largest_error, load
from peft import PeftModel
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest

from training.parts import LORA_TARGETS, add_adapters

CHATS = conversations()
NAMES = ["1 x 1", "640 x 480", "1000 x 50", "3 pictures [(200, 100), (100, 300), (64, 64)]", "a picture between texts"]
NAMES += ["history with a second picture", "text: Hello!", "text: long"]
RANKS = {"text": 8, "visual": 4, "both": 16}


@dataclass
class Adapter:
    folder: Path
    model: Path

    @cached_property
    def answers(self) -> dict[str, dict]:
        """The package's own, with the adapter as PEFT loads it."""
        model = PeftModel.from_pretrained(load(self.model), self.folder).eval()
        return answers(model, self.model, {name: CHATS[name] for name in NAMES})

    @property
    def request(self) -> LoRARequest:
        name = self.folder.name
        return LoRARequest(name, 1 + list(LORA_TARGETS).index(name), str(self.folder))


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory) -> dict[str, Adapter]:
    """Adapters on the text experts, the visual experts and both, as examples/finetune.py makes and saves them.

    Random weights, which change all answers.
    """
    made = {}
    for seed, experts in enumerate(LORA_TARGETS):
        torch.manual_seed(seed)
        model = add_adapters(load(tiny.folder), experts, RANKS[experts])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        folder = tmp_path_factory.mktemp("adapters") / experts
        model.save_pretrained(folder, save_embedding_layers=False)
        made[experts] = Adapter(folder, tiny.folder)
    return made


@pytest.fixture(scope="module")
def engine(tiny):
    """As many places as adapters: none is left free for requests without adapter."""
    llm = start(tiny.folder, enable_lora=True, max_loras=3, max_lora_rank=16)
    yield llm
    del llm
    gc.collect()


def test_mixed_batch(tiny, adapters, engine):
    """All adapters and none, in turn and at once."""
    expected = {"none": tiny.answers, **{name: adapter.answers for name, adapter in adapters.items()}}
    for name in NAMES:
        steps = [tuple(answer[name]["logprobs"][0].tolist()) for answer in expected.values()]
        assert name.startswith("text") or len(set(steps)) == 4, name
    pairs = [(name, adapter) for name in NAMES for adapter in expected]
    chats = {pair: CHATS[pair[0]] for pair in pairs}
    requests = [adapters[adapter].request if adapter in adapters else None for _, adapter in pairs]
    for (name, adapter), answer in ask(engine, chats, lora_request=requests).items():
        error = largest_error(expected[adapter], {name: answer})
        assert error < TOLERANCE, (name, adapter, error)


def changed(adapter: Adapter, folder: Path, config: dict, rename: Callable[[str], str], columns: slice) -> LoRARequest:
    """The adapter with other settings, names of tensors, and columns of lora_A."""
    shutil.copytree(adapter.folder, folder)
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: own[:, columns].clone() if "lora_A" in name else own for name, own in tensors.items()}, file)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
    return LoRARequest(folder.name, 10, str(folder))


@pytest.mark.parametrize(
    ("config", "name", "new_name", "columns", "sentence"),
    [
        (
            {},
            "language_model.layers.7.mlp.text.down_proj",
            "vision_model.blocks.0.mlp.fc1",
            None,
            "expected target mod",
        ),
        ({}, "language_model.layers.7.mlp.text.down_proj", "connector.fc1", None, "received .'connector.fc1'"),
        ({}, "model.language_model.layers.7.mlp.text.down_proj", "lm_head", None, "received .'lm_head'"),
        ({"modules_to_save": ["lm_head"]}, "", "", None, "Unsupported modules_to_save: .'lm_head'"),
        ({"use_dora": True}, "", "", None, "does not yet support DoRA"),
        ({"r": 64}, "", "", None, "LoRA rank 64 is greater than max_lora_rank 16"),
        (
            {},
            "self_attn.text",
            "self_attn",
            None,
            "the adapter changes 'language_model.layers.0.self_attn.k_proj'; adap",
        ),
        ({}, "layers.7.", "layers.8.", None, "the adapter changes 'language_model.layers.8.mlp.text.down_proj'; adap"),
        ({}, "", "", 128, r"down_proj' has \(128, 256\) input and output features, the model's \(640, 256\)"),
    ],
)
def test_other_adapters_are_refused(adapters, engine, tmp_path, config, name, new_name, columns, sentence):
    def rename(tensor: str) -> str:
        return tensor.replace(name, new_name)

    request = changed(adapters["text"], tmp_path / "other", config, rename, slice(columns))
    with pytest.raises(ValueError, match=sentence):
        engine.llm_engine.add_lora(request)
