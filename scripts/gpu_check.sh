#!/usr/bin/env bash
# For whoever has a GPU: one command, one JSON file to send back.
#
#   scripts/gpu_check.sh [OUT.json] [MODEL …]      default: gpu_check.json 60m 1b
#
# It runs the tests that need a GPU, then measures every method at each model and holds it against its estimate.
# EFFPROF names another command than the one in .venv or on PATH, METHODS=a,b fewer methods, SECONDS_EACH another time;
# DEVICE=cpu rehearses it without a GPU.
set -uo pipefail
out=$(realpath -m "${1:-gpu_check.json}")
cd "$(dirname "$0")/.." || exit 1
[ $# -gt 0 ] && shift
models=("$@")
[ ${#models[@]} -gt 0 ] || models=(60m 1b)
effprof=${EFFPROF:-$([ -x .venv/bin/effprof ] && echo .venv/bin/effprof || command -v effprof)}
python=$(dirname "$effprof")/python
device=${DEVICE:-cuda}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export EFFPROF_HOME="$work/home"  # what was measured here before decides nothing, and is not added to

"$effprof" doctor | tee "$work/doctor.txt" >&2
"$effprof" doctor --json >"$work/doctor.json"

tests=skipped
if [ "$device" = cuda ]; then
  if "$python" -m pytest -q -m gpu tests/test_gpu.py 2>&1 | tee "$work/tests.txt" >&2; then
    tests=passed
  else
    tests=failed
  fi
else
  echo "DEVICE=$device: the tests that need a GPU are left out" >"$work/tests.txt"
fi

"$python" - "$device" "${models[@]}" >"$work/plans.jsonl" <<'PYTHON'
import json
import os
import sys

from effprof import registry

device, models = sys.argv[1], sys.argv[2:]
methods = os.environ.get("METHODS", "").split(",") if os.environ.get("METHODS") else registry.names()
for model in models:
    for method in methods:
        plan = {"model": model, "method": method, "micro_batch": 4, "device": device}
        print(json.dumps(plan))
PYTHON

"$effprof" validate --plans "$work/plans.jsonl" --seconds "${SECONDS_EACH:-10}" --tolerance 0.05 --json \
  >"$work/validation.json"
validation=$?

"$python" - "$out" "$tests" "$validation" "$work" <<'PYTHON'
import json
import sys
from pathlib import Path

out, tests, code, work = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])


def read(name):
    """A document, or its text where a command failed half-way: better than nothing."""
    text = (work / name).read_text()
    try:
        return json.loads(text)
    except ValueError:
        return {"failed": text[-2000:]}


document = {
    "schema": "effprof.gpu_check/1",
    "doctor": read("doctor.json"),
    "tests": {"result": tests, "output": (work / "tests.txt").read_text()[-20_000:]},
    "validation": read("validation.json"),
    "validation_exit_code": code,
}
temporary = out.with_suffix(".tmp")
temporary.write_text(json.dumps(document))
temporary.replace(out)
results = document["validation"].get("results", [])
full = [one for one in results if one["outcome"] == "oom"]
foreseen = [one for one in full if (one["estimated"]["memory"]["process_total"] or 0) > (one["limit"] or 2**63)]
good = sum(one["within"] for one in results)
print(f"{out}: tests {tests}; {good} of {len(results) - len(full)} plans within 5 %, {len(full)} ran out of memory, "
      f"{len(foreseen)} of them as estimated. Send this file back.")
sys.exit(not results or good + len(foreseen) < len(results) or tests == "failed")
PYTHON
