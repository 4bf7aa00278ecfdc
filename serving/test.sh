#!/usr/bin/env bash
# Tests the vLLM plugin on a CPU, in a virtual environment of its own (2.5 GB) that is kept for the next run.
#
#   bash serving/test.sh                  # all tests, by two processes with one thread each
#   bash serving/test.sh -k chunked       # any arguments of pytest
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${SERVING_ENVIRONMENT:-.venv-serving}
if [ ! -x "$venv/bin/pytest" ]; then
    python3 -m venv "$venv"
    bash serving/install_cpu.sh "$venv/bin/python" pytest pytest-timeout pytest-xdist accelerate peft torchao==0.18.0
fi
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_CPU_KVCACHE_SPACE=1 TQDM_DISABLE=1
exec "$venv/bin/python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder serving/tests "$@"
