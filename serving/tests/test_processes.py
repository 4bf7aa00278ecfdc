"""vLLM gives the package's own ids and logprobs in processes of its own: two devices, and drafts from the prompt."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from package import check


@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        ({"tensor_parallel_size": 2}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}, {}),
    ],
    ids=["tensor parallel", "speculative decoding"],  # the latter leaves a numba that stops later engines
)
def test_in_other_processes(tiny, tmp_path, settings, environment):
    script = Path(__file__).with_name("engine.py")
    command = [sys.executable, script, tiny.folder, tmp_path / "result", json.dumps(settings)]
    subprocess.run(command, env={**os.environ, **environment}, check=True, timeout=300)
    check(tiny.answers, torch.load(tmp_path / "result"))
