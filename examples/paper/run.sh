#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
for size in tiny 60m 130m 350m 1b; do
  "${PYTHON:-python}" -m effprof bench "paper-$size.toml" --dry-run
done
