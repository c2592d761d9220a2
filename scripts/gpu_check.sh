#!/usr/bin/env bash
# Check everything that needs a CUDA device, in stages; each writes outputs/gpu_check/STAGE.json as it goes.
#
#   scripts/gpu_check.sh --list                    the stages
#   scripts/gpu_check.sh                           all of them, each in a process of its own
#   scripts/gpu_check.sh --stage train-1b --out DIR
#   scripts/gpu_check.sh --device cpu --tiny       the same code on a CPU, in the sizes of a test
#   PYTHON=/path/to/python scripts/gpu_check.sh
#
# Without a GPU it says so and exits with code 3. Works on torch 2.11 (CUDA 13) and 2.13, Python 3.11 and 3.12.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
"$PYTHON" -c 'import torch' || { echo "gpu_check: $PYTHON has no torch; run make setup, or set PYTHON" >&2; exit 2; }
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
exec "$PYTHON" -m scripts.gpu_check "$@"
