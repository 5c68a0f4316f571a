#!/usr/bin/env bash
# The test on a laptop of what train.sbatch does on a cluster: two processes on this machine's CPU.
set -euo pipefail
cd "$(dirname "$0")"
effprof() { "${PYTHON:-python}" -m effprof "$@"; }

out=${OUT:-$(mktemp -d)}
effprof estimate --model 1b --method galore --gpu a100-80gb --gpus 8 --parallel fsdp
effprof train --model "${MODEL:-9m}" --method galore --device cpu --dtype fp32 --micro-batch 1 --seq-len 32 \
    --gpus 2 --parallel fsdp --steps "${STEPS:-20}" --out "$out/run"
