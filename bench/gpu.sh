#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What a machine with an NVIDIA GPU answers: correctness first, then figures, then training steps.
#
#     bench/gpu.sh [--device cpu] [--quick] [STAGE ...]
#
# STAGES: tests ops beta dequant_gemm dequant fused auto row_norm layers train methods (default: all but ops).
# Each has a time limit of its own (LIMIT seconds, default 150; tests twice that), so that a machine
# lent for ten minutes gives partial results; methods four times. They go to OUT, default bench/results/<gpu>/.
# Nothing is installed or fetched: the package runs from this tree. PYTHON names the interpreter.
# --device cpu --quick rehearses on tiny sizes; its times mean nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'gpu.sh: %s\n' "$*" >&2; exit 1; }

device=cuda quick=0 stages=()
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=${2:?--device needs cuda or cpu}; shift ;;
        --quick) quick=1 ;;
        -*) fail "unknown option $1" ;;
        *) stages+=("$1") ;;
    esac
    shift
done
[ "${#stages[@]}" -gt 0 ] ||
    stages=(tests beta dequant_gemm dequant fused auto row_norm layers train methods)

python=${PYTHON:-}
if [ -z "$python" ]; then
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
command -v "$python" >/dev/null 2>&1 || fail "'$python' not found; run make setup, or set PYTHON"
name=cpu-rehearsal
if [ "$device" = cuda ]; then
    name=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0))' 2>/dev/null) ||
        fail "no CUDA device that torch of '$python' can use"
fi
slug=$(printf '%s' "$name" | tr '[:upper:] ' '[:lower:]-' | tr -cd 'a-z0-9-')
out=${OUT:-bench/results/$slug}
mkdir -p "$out" || fail "cannot write $out"
out=$(cd "$out" && pwd)

export PYTHONUNBUFFERED=1 DEVICE=$device QUICK=$quick
# an install maps kernels/fused to fastadapt.kernels; without one a link does, while this runs
if ! "$python" -c 'import fastadapt.kernels' 2>/dev/null && [ ! -e fastadapt/kernels ]; then
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
    ln -s ../kernels/fused fastadapt/kernels
    trap 'rm -f fastadapt/kernels' EXIT
fi
"$python" -c 'import fastadapt' || fail "fastadapt cannot be imported by '$python'"
echo "gpu.sh: $name -> $out"
"$python" -c 'import json, sys; sys.path.insert(0, "bench"); import torch; from report import machine
print(json.dumps(machine(torch.device(sys.argv[1])), indent=1))' "$device" >"$out/machine.json"

failed=()
stage() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2; shift 2
    echo "gpu.sh: $name (at most $limit s)"
    timeout -k 10 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || failed+=("$name ($code)")
}
limit=${LIMIT:-150}
for each in "${stages[@]}"; do
    case $each in
        tests)
            if [ "$device" = cuda ]; then
                stage tests $((2 * limit)) "$python" -m pytest -q -m gpu tests/test_gpu.py
            else
                stage tests "$limit" "$python" -m pytest -q tests/test_gpu.py -k "learns or dropout"
            fi ;;
        ops) # every test of an op that runs over implementations; needs bitsandbytes
            stage ops $((2 * limit)) "$python" -m pytest -q -m gpu tests ;;
        beta | dequant_gemm | dequant | fused | auto | row_norm)
            stage "$each" "$limit" "$python" -m pytest -q -p no:cacheprovider bench/bench_ops.py \
                -k "test_$each and not (test_${each}_)" --benchmark-json "$out/$each.json" \
                --benchmark-columns median,iqr,rounds ;;
        layers)
            more=(); [ "$quick" -eq 0 ] || more=(--quick)
            stage layers "$limit" "$python" bench/layers.py --device "$device" \
                --out "$out/layers.json" "${more[@]}" ;;
        train)
            shapes=${SHAPES:-smollm2-8 llama-1b llama-8b-4} rounds=${ROUNDS:-20}
            sizes=(--batch "${BATCH:-4}" --length "${LENGTH:-1024}")
            if [ "$quick" -eq 1 ]; then shapes=smollm2-8 rounds=1 sizes=(--batch 1 --length 8); fi
            for one in $shapes; do
                stage "train-$one" "$limit" "$python" bench/train.py --device "$device" \
                    --shapes "$one" --rounds "$rounds" "${sizes[@]}" --out "$out/train-$one.json"
            done ;;
        methods)
            more=(--rounds "${ROUNDS:-7}"); [ "$quick" -eq 0 ] || more=(--quick)
            stage methods $((4 * limit)) "$python" bench/bench_methods.py --device "$device" \
                --out "$out/methods.json" "${more[@]}" ;;
        *) fail "unknown stage $each" ;;
    esac
done

if [ "${#failed[@]}" -gt 0 ]; then fail "failed: ${failed[*]} (see $out)"; fi
echo "gpu.sh: done, see $out"
