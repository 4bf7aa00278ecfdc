#!/usr/bin/env bash
# Runs load, chat, sessions, all of generate, save and reload, and a training step under other transformers versions,
# each in a virtual environment of its own that is kept for the next run.
#
#   bash tests/compat.sh                    # 4.57.x, 5.0.0 and the newest 5.x
#   bash tests/compat.sh 4.51.0 '5.*'       # these versions, as pip writes them
#   TESTS=tests bash tests/compat.sh        # the whole suite instead of the files that speak for it
set -euo pipefail
cd "$(dirname "$0")/.."

versions=("$@")
if [ ${#versions[@]} -eq 0 ]; then versions=('4.57.*' '5.0.0' '5.*'); fi
environments=${COMPAT_ENVIRONMENTS:-.venv-compat}
tests=${TESTS:-$(echo tests/test_{compatibility,reference_parity,chat,generation}.py)}
failed=()

for version in "${versions[@]}"; do
    environment="$environments/transformers-${version//\*/x}"
    [ -d "$environment" ] || python3 -m venv "$environment"
    # What requirements-dev.txt names, without the versions that go with transformers 4.51.
    "$environment/bin/pip" install --quiet --upgrade "transformers==$version" torch==2.13.0 accelerate safetensors pillow \
        numpy jinja2 tqdm sentencepiece protobuf pytest pytest-timeout matplotlib
    echo "== $("$environment/bin/python" -c 'import transformers; print("transformers", transformers.__version__)')"
    # shellcheck disable=SC2086  # several files
    "$environment/bin/python" -m pytest -q $tests || failed+=("$version")
done

if [ ${#failed[@]} -gt 0 ]; then echo "failed under transformers ${failed[*]}" >&2; exit 1; fi
