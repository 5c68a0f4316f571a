#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
effprof() { "${PYTHON:-python}" -m effprof "$@"; }

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
"${PYTHON:-python}" - "$copy" <<'PYTHON'
import shutil
import sys
from pathlib import Path

import effprof.methods

package, methods = Path(effprof.__file__).parent, Path(effprof.methods.__file__).parent
shutil.copytree(package, Path(sys.argv[1]) / "effprof")
shutil.copytree(methods, Path(sys.argv[1]) / "effprof" / "methods", dirs_exist_ok=True)
PYTHON
cp signum.py "$copy/effprof/methods/" # in a checkout: cp signum.py methods/
export PYTHONPATH=$copy

effprof methods signum
effprof estimate --model 1b --method signum
effprof estimate --model 1b --method sltrain --update signum # its update on another's layers
effprof compare --model 1b --methods full,galore,signum --gpu rtx-4090
effprof train --model "${MODEL:-9m}" --method signum --micro-batch 2 --steps "${STEPS:-10}" --device cpu --out "$copy/run"
