#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
effprof() { "${PYTHON:-python}" -m effprof "$@"; }

# Plainly: exit code 3, and by how much.
if effprof estimate --model 7b --method full --micro-batch 1 --gpu rtx-4090; then exit 1; else test $? -eq 3; fi

# What the last lines of that answer recommend, put together.
effprof estimate --model 7b --method galore --state-dtype 8bit --per-layer-update --micro-batch 1 --gpu rtx-4090

# A card that is in no catalog, and a model of your own.
effprof estimate --model config.json --method lowrank --gpu mem=24GB --seq-len 1024 --micro-batch 8

# For a program: one JSON document; its schema is effprof/schemas/estimate.json.
effprof estimate --model 1b --method sltrain --gpu rtx-4090 --json |
  "${PYTHON:-python}" -c 'import json, sys; print(json.load(sys.stdin)["fits"][0])'
