#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
effprof() { "${PYTHON:-python}" -m effprof "$@"; }

out=${OUT:-$(mktemp -d)}
export EFFPROF_HOME=$out/home
effprof probe --model 9m --method galore --micro-batch 2 --device cpu --seconds "${SECONDS_EACH:-5}" --record "$out/record.jsonl"
effprof report "$out/record.jsonl" --out "$out/probe.html"
effprof validate --model 9m --method sltrain --micro-batch 2 --device cpu --seconds "${SECONDS_EACH:-5}" --tolerance 0.01
effprof probe --list
