#!/usr/bin/env bash
# Dry runs on CUDA without a GPU: makes .venv-cuda-$TORCH if it is missing (about 6 GB), then runs scripts/check_cuda.py.
#
#   TORCH=2.13.0 scripts/check_cuda.sh [--only blt_1b]
#
# PYTHON            the interpreter to use            default: python3.12
# TORCH_INDEX_URL   where a CUDA build of torch comes from    default: pip's own index
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
TORCH=${TORCH:-2.13.0}
venv=.venv-cuda-$TORCH
needed_gib=8

fail() { echo "check-cuda: error: $*" >&2; exit 2; }

if [[ ! -e $venv/.installed ]]; then
    python=${PYTHON:-python3.12}
    "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null ||
        fail "$python is not Python 3.12 with the venv module: make check-cuda PYTHON=/path/to/python3.12"
    free_gib=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024 / 1024))
    ((free_gib >= needed_gib)) || fail "$needed_gib GiB of free disk are needed here, there are $free_gib"
    echo "check-cuda: making $venv with a CUDA build of torch $TORCH" >&2
    "$python" -m venv "$venv"
    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" "torch==$TORCH" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} || fail "torch $TORCH could not be had"
    "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
        fail "the torch $TORCH that was installed is no CUDA build: name an index that has one with TORCH_INDEX_URL"
    # torch brings the triton that fits it.
    grep -v '^triton==' scripts/constraints.txt > "$venv/constraints.txt"
    "${pip[@]}" --constraint "$venv/constraints.txt" --editable ".[check-cuda]" || fail "the project could not be installed"
    touch "$venv/.installed"
fi
exec "$venv/bin/python" -m scripts.check_cuda "$@"
