#!/usr/bin/env bash
# Check everything that needs a CUDA device, and write what it found to benchmarks/results/gpu_check.json.
#
#   scripts/gpu_check.sh                 the tests marked `gpu`, then short training runs: bf16, compile off and on
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
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: no CUDA device is at hand; nothing was checked" >&2
    exit 3
fi
exec "$PYTHON" -m scripts.gpu_check "$@"
