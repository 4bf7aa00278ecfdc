"""Two processes on the CPU (gloo), for test_finetuning.py and test_large_models.py: their tasks, and how to start them.

accelerate uses DDP on a CPU even if asked for FSDP, so models are wrapped with torch's own FSDP here.
"""

import gc
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import ROOT
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments


def torchrun(script: str, *arguments: Any) -> None:
    """Runs a script of this repository as two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*command, str(ROOT / script), *map(str, arguments)], capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr[-4000:]


def start_two(script: str, *arguments: Any) -> list[subprocess.Popen]:
    """Starts a script of this repository as two processes without a launcher, so that a test can kill them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}, **quiet)
        for rank in "01"
    ]


def decoder_and_vision_blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


def fsdp1(model: nn.Module) -> nn.Module:
    kinds = {type(module) for module in decoder_and_vision_blocks(model)}
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id="cpu")


def fsdp2(model: nn.Module) -> nn.Module:
    for block in decoder_and_vision_blocks(model):
        fully_shard(block)
    return fully_shard(model)


STRATEGIES = {"ddp": DistributedDataParallel, "fsdp1": fsdp1, "fsdp2": fsdp2}


def losses(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """Losses of training steps, each over one batch per process, then of the first step's batches without gradients."""
    is_alone = not dist.is_initialized()
    rank, world_size = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    result = []
    steps = [batches[start : start + world_size] for start in range(0, len(batches), world_size)]
    for number, parts in enumerate([*steps, steps[0]]):
        model.train(number < len(steps))
        num_items = sum((part["labels"][:, 1:] != -100).sum() for part in parts)
        with torch.set_grad_enabled(model.training):
            # Gradients are averaged over the processes, so each one's part of the loss is scaled up.
            loss = model(**parts[rank], num_items_in_batch=num_items).loss * world_size
        if model.training:
            loss.backward()
            assert all(parameter.grad is not None for parameter in model.parameters() if parameter.numel())
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach().clone()
        if not is_alone:
            dist.all_reduce(mean)
        result.append(mean.item() / world_size)
    return result


def train(folder: str, data: dict[str, Any]) -> dict[str, list[float]]:
    """Losses of each strategy over `data["batches"]`, and of Trainer over the stream `data["examples"]`."""
    result = {"stream": train_on_stream(folder, data["examples"])}
    for name, wrap in STRATEGIES.items():
        model = wrap(AutoModel.from_pretrained(folder, trust_remote_code=True))
        result[name] = losses(model, data["batches"])
    return result


class Stream(torch.utils.data.IterableDataset):
    """Examples without a length."""

    def __init__(self, examples: list[dict]):
        self.examples = examples

    def __iter__(self) -> Iterator[dict]:
        return iter(self.examples)


def fit(
    folder: str | Path, examples: Any, row_length: int | None = None, **options: Any
) -> tuple[list[tuple[float, float | None]], nn.Module]:
    """Loss and gradient norm (None if gradients are not clipped) of Trainer's steps by plain SGD, and the model."""
    settings = {"use_cpu": True, "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_steps": 2}
    settings |= {"remove_unused_columns": False, "logging_steps": 1, "save_strategy": "no", "report_to": []}
    model, processor = (auto.from_pretrained(folder, trust_remote_code=True) for auto in (AutoModel, AutoProcessor))
    collate = partial(processor.training_batch, row_length=row_length)
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArguments(output, disable_tqdm=True, **settings | options)
        trainer = Trainer(model=model, args=args, data_collator=collate, train_dataset=examples)
        trainer.train()
    return [(row["loss"], row.get("grad_norm")) for row in trainer.state.log_history if "loss" in row], model


def train_on_stream(folder: str | Path, examples: list[dict], **options: Any) -> list[float]:
    """Losses that Trainer logs for one pass over streamed examples, two of them in each step over all processes."""
    num_processes = dist.get_world_size() if dist.is_initialized() else 1
    settings = {"accelerator_config": {"dispatch_batches": False}, "average_tokens_across_devices": True}
    settings |= {"per_device_train_batch_size": 2 // num_processes, "max_steps": len(examples) // 2, "max_grad_norm": 0}
    rows, _ = fit(folder, Stream(examples), **settings | options)
    return [loss for loss, _ in rows]


def tensor_parallel(folder: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, tp_plan="auto").eval()
    with torch.no_grad():
        return {
            "logits": model(**inputs).logits,
            "generated": model.generate(**inputs, max_new_tokens=6, do_sample=False),
            "local_rows": torch.tensor(local_rows(model)),
        }


def local_rows(model: nn.Module) -> list[int]:
    """Rows of the first layer's query projections, text and visual, that this process holds."""
    attention = model.language_model.layers[0].self_attn
    weights = [expert.q_proj.weight for expert in (attention.text, attention.visual)]
    return [len(weight.to_local() if hasattr(weight, "to_local") else weight) for weight in weights]


if __name__ == "__main__":
    task, folder, inputs, output = sys.argv[1:]
    dist.init_process_group("gloo")
    outcome = {"train": train, "tensor_parallel": tensor_parallel}[task](folder, torch.load(inputs))
    if dist.get_rank() == 0:
        torch.save(outcome, output)
    dist.barrier()  # a process that exits early aborts the other
    gc.collect()  # a DDP wrapper that outlives the process group can deadlock at exit
    dist.destroy_process_group()
