#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
effprof() { "${PYTHON:-python}" -m effprof "$@"; }

out=${OUT:-$(mktemp -d)}
effprof compare --model 350m --gpu rtx-4090 --tokens 6.4B
effprof compare --model 350m --methods full,galore,lowrank,sltrain --ranks 128:512 --json >"$out/compare.json"
effprof report "$out/compare.json" --out "$out/pareto.html"
effprof compare --model 350m --methods full,galore,lowrank,sltrain --ranks 128:512 --csv >"$out/rows.csv"
echo "In $out: compare.json, pareto.html, rows.csv"
