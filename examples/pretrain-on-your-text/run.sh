#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
effprof() { "${PYTHON:-python}" -m effprof "$@"; }

out=${OUT:-$(mktemp -d)}
run=$out/run
data=${DATA:-$out/texts}
if [ ! -e "$data" ]; then
  mkdir -p "$data"
  library=$("${PYTHON:-python}" -c 'import json, pathlib; print(pathlib.Path(json.__file__).parent.parent)')
  for file in "$library"/[a-d]*.py; do cp "$file" "$data/$(basename "$file" .py).txt"; done
fi
effprof train --model "${MODEL:-9m}" --method lowrank --micro-batch 4 --steps "${STEPS:-40}" --device "${DEVICE:-cpu}" \
  --data "$data" --out "$run"
effprof report "$run" --out "$out/run.html"
"${PYTHON:-python}" - "$run/model" <<'PYTHON'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
start = tokenizer("def main(", return_tensors="pt")
print(tokenizer.decode(model.generate(**start, max_new_tokens=8, do_sample=False)[0]))
PYTHON
