"""Two devices that share the decoder give the package's own ids and logprobs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from package import check


def test_two_devices(tiny, tmp_path):
    script = Path(__file__).with_name("engine.py")
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    command = [sys.executable, script, tiny.folder, tmp_path / "result", json.dumps({"tensor_parallel_size": 2})]
    subprocess.run(command, env={**os.environ, **own}, check=True, timeout=300)
    check(tiny.answers, torch.load(tmp_path / "result"))
