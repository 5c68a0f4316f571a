#!/usr/bin/env bash
# usage: PYTHON=.venv/bin/python bash examples/lm-eval/run.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
PYTHON=${PYTHON:-python}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
texts=$("$PYTHON" -c "import email, os; print(os.path.dirname(email.__file__))")
"$PYTHON" -m effprof train --model 9m --method lowrank --micro-batch 4 --seq-len 64 --steps "${STEPS:-30}" \
  --device cpu --data "$texts" --out "$out/run"
if ! "$PYTHON" -c "import lm_eval" 2> /dev/null; then
  echo "The model is in $out/run/model; to score it: pip install lm_eval"
  exit 0
fi
sed "s|SENTENCES|$here/sentences.jsonl|" "$here/task.yaml" > "$out/task.yaml"
HF_HUB_OFFLINE=1 "$PYTHON" -m lm_eval --model hf --model_args "pretrained=$out/run/model,dtype=float32" \
  --include_path "$out" --tasks sentences --device cpu --batch_size 1
