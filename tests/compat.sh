#!/usr/bin/env bash
# Runs load, chat, sessions, all of generate, save and reload, PEFT, a training step and TRL's trainers under other
# transformers versions, each in a virtual environment of its own that is kept for the next run; under the newest one
# also `transformers serve`; and last, in another environment, serving/test.sh.
#
#   bash tests/compat.sh                    # 4.57.x with TRL 0.25, 5.0.0, the newest 5.x with TRL 1.16, and vLLM
#   bash tests/compat.sh 4.51.0 '5.*'       # these versions, as pip writes them
#   TESTS=tests bash tests/compat.sh        # the whole suite instead of the files that speak for it
set -euo pipefail
cd "$(dirname "$0")/.."

versions=("$@")
if [ ${#versions[@]} -eq 0 ]; then versions=('4.57.*' '5.0.0' '5.*'); fi
environments=${COMPAT_ENVIRONMENTS:-.venv-compat}
tests=${TESTS:-$(echo tests/test_{compatibility,tiny,reference_parity,image_processing,tokenization,processing,pipeline,chat,generation,trl}.py)}
server=serving/tests/test_transformers_serve.py
declare -A extra=(['4.57.*']='trl==0.25.1 datasets' ['5.*']='trl==1.16.0 datasets transformers[serving] openai psutil requests')
failed=()

for version in "${versions[@]}"; do
    environment="$environments/transformers-${version//\*/x}"
    [ -d "$environment" ] || python3 -m venv "$environment"
    # What requirements-dev.txt names, without the versions that go with transformers 4.51.
    # shellcheck disable=SC2086  # several packages
    "$environment/bin/python" -m pip install --quiet --upgrade "transformers==$version" torch==2.13.0 accelerate \
        safetensors pillow numpy jinja2 tqdm sentencepiece protobuf pytest pytest-timeout matplotlib peft ${extra[$version]:-}
    echo "== $("$environment/bin/python" -c 'import transformers; print("transformers", transformers.__version__)')"
    # shellcheck disable=SC2086  # several files
    "$environment/bin/python" -m pytest -q $tests || failed+=("$version")
    if [ "$version" = '5.*' ]; then "$environment/bin/python" -m pytest -q "$server" || failed+=("$server"); fi
done
if [ $# -eq 0 ]; then bash serving/test.sh || failed+=(vLLM); fi

if [ ${#failed[@]} -gt 0 ]; then printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; fi
