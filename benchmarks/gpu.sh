#!/usr/bin/env bash
# Everything that only a GPU can tell, most important first: its tests, the way to the first token, encoder and prefill with
# and without flash-attn-4, decoding, batches, a training step. About 15 minutes on an H100 or H200; each part has a limit.
#
#   bash benchmarks/gpu.sh results/          # writes one file per part into the folder
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: bash benchmarks/gpu.sh FOLDER}
mkdir -p "$folder"
on_gpu=(--size 2b --device cuda --dtype bfloat16)

run() { # name, seconds, command
    local name=$1 seconds=$2
    shift 2
    timeout "$seconds" "$@" > "$folder/$name.txt" 2>&1 || echo "$name ended with status $?" >&2
    tail -n 20 "$folder/$name.txt"
}

run tests 180 python -m pytest -q tests/test_gpu.py
run first-token 120 python -m benchmarks.first_token "${on_gpu[@]}" --optimize
run vision 120 python -m benchmarks.run "${on_gpu[@]}" --part vision --vision-cases 5 --compile
run prefill 90 python -m benchmarks.run "${on_gpu[@]}" --part prefill --lengths 4096 8192 --compile
run decode 200 python -m benchmarks.run "${on_gpu[@]}" --part decode --batches 1 --tune --skip-baseline
run flash-decoding 200 python -m benchmarks.run "${on_gpu[@]}" --part decode --batches 1 --tune --skip-baseline --flash-decoding
run training 90 python -m benchmarks.training "${on_gpu[@]}" --part step --lengths 16384 --checkpointing
run throughput 90 python -m benchmarks.first_token "${on_gpu[@]}" --part throughput --optimize
