#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What a machine with an NVIDIA GPU answers: the tests marked gpu, then real training steps.
# Results go to bench/results/<gpu>/. PYTHON names the interpreter (default: .venv's, else python3).
# Where no fused kernel serves a layer the reference in PyTorch runs: the table's last line,
# "layers on", says which; a figure of the reference path is a figure of PyTorch.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'gpu.sh: %s\n' "$*" >&2; exit 1; }

python=${PYTHON:-}
if [ -z "$python" ]; then
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
command -v "$python" >/dev/null 2>&1 || fail "'$python' not found; run make setup, or set PYTHON"
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0))' 2>/dev/null) ||
    fail "no CUDA device that torch of '$python' can use"
slug=$(printf '%s' "$name" | tr '[:upper:] ' '[:lower:]-' | tr -cd 'a-z0-9-')
out=bench/results/$slug
mkdir -p "$out" || fail "cannot write $out"
echo "gpu.sh: $name -> $out"

failed=()
"$python" -m pytest -m gpu 2>&1 | tee "$out/tests.txt"
code=${PIPESTATUS[0]}
# pytest's 5: no test is marked gpu, which is no failure
if [ "$code" -ne 0 ] && [ "$code" -ne 5 ]; then failed+=("tests"); fi

for shapes in ${SHAPES:-smollm2-8 llama-1b llama-8b-4}; do
    echo "gpu.sh: $shapes"
    "$python" bench/train.py --device cuda --shapes "$shapes" --rounds "${ROUNDS:-20}" \
        --batch "${BATCH:-4}" --length "${LENGTH:-1024}" --out "$out/train-$shapes.json" 2>&1 |
        tee "$out/train-$shapes.txt"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$shapes")
done

echo "gpu.sh: methods"
"$python" bench/bench_methods.py --device cuda --rounds "${ROUNDS:-10}" --out "$out/methods.json" 2>&1 |
    tee "$out/methods.txt"
[ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("methods")

if [ "${#failed[@]}" -gt 0 ]; then fail "failed: ${failed[*]} (see $out)"; fi
echo "gpu.sh: done, see $out"
