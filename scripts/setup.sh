#!/usr/bin/env bash
# Install the project into .venv: `scripts/setup.sh demo` for running, `scripts/setup.sh dev` for working on it.
#
# PYTHON            the interpreter to use            default: the first of python3.12, python3.11, python3 that fits
# TORCH_INDEX_URL   where torch comes from            default: pip's own index. On Linux that may be the CUDA build of
#                   several GB; https://download.pytorch.org/whl/cpu has the small one for machines without a GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=$1
needed_gib=3  # of the CPU build; a CUDA build of torch needs several more

fail() { echo "setup: error: $*" >&2; exit 1; }

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }

if [[ ! -x .venv/bin/python ]]; then
    if [[ -n "${PYTHON:-}" ]]; then
        fits "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or 3.12 with the venv module"
        python=$PYTHON
    else
        for python in python3.12 python3.11 python3 none; do fits "$python" && break; done
        [[ $python != none ]] || fail "no Python 3.11 or 3.12 with the venv module was found; install one (Debian:" \
            "apt install python3.11-venv), or name it: make setup PYTHON=/path/to/python3.12"
    fi
    free_gib=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024 / 1024))
    ((free_gib >= needed_gib)) || fail "$needed_gib GiB of free disk are needed here, there are $free_gib"
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv .venv || fail "could not make .venv"
fi
fits .venv/bin/python || fail ".venv holds another Python than 3.11 or 3.12: remove it and try again"

install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" 2>.venv/pip.log && return
    grep -v '^WARNING' .venv/pip.log | tail -n 5 >&2 || true
    fail "pip could not install $*: see .venv/pip.log. It needs a package index (network or PIP_INDEX_URL) and disk"
}

echo "setup: installing torch"
install torch==2.13.0 ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
echo "setup: installing blt_titan and what it needs"
install --constraint scripts/constraints.txt --editable ".[$extra]"
touch ".venv/.installed-$extra"
[[ $extra != dev ]] || touch .venv/.installed-demo
echo "setup: done"
