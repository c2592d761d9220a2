#!/usr/bin/env bash
# Train, by environment variables: `blt-titan train` for those who know torchtitan.
#
#   ./run_train.sh                                                  the debug model; makes its data when missing
#   NGPU=8 CONFIG_FILE=train_configs/blt_1b.toml ./run_train.sh --training.steps=100
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 MASTER_PORT=29500 NGPU=8 CONFIG_FILE=... ./run_train.sh    (on each node)
#
# NGPU         ranks on this node (GPUs, or processes on a CPU)   default 1
# NNODES       nodes                                              default 1
# NODE_RANK    number of this node                                default 0
# MASTER_ADDR, MASTER_PORT   where node 0 listens                 default localhost, 29500 (one node: any free port)
# RENDEZVOUS_TIMEOUT   seconds in which all nodes must be there   default 900
# MAX_RESTARTS failures without a new checkpoint between them after which ranks are started again   default 0
# CONFIG_FILE  the run's TOML, or the name of a shipped one       default train_configs/debug.toml
# LOG_RANK     ranks of this node that print, as in 0,1           default 0
# PYTHON       the interpreter                                    default .venv/bin/python, where make setup made it
# PYTORCH_ALLOC_CONF   of torch's GPU allocator                   default expandable_segments:True, unless this
#              or PYTORCH_CUDA_ALLOC_CONF, its name of old, is set
# "$@"         overrides, --section.key=value; `blt-titan config --keys` lists every key with what it means
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

for argument in "$@"; do
    if [[ "$argument" == -h || "$argument" == --help ]]; then
        sed -n '2,/^set /s/^# \{0,1\}//p' run_train.sh
        exit
    fi
done

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

ranks=(--nproc="${NGPU:-1}" --nnodes="${NNODES:-1}" --log-rank="${LOG_RANK:-0}")
[[ "${NNODES:-1}" == 1 ]] || ranks+=(--node-rank="${NODE_RANK:-0}")
[[ -z "${MASTER_ADDR:-}" ]] || ranks+=(--master-addr="$MASTER_ADDR")
[[ -z "${MASTER_PORT:-}" ]] || ranks+=(--master-port="$MASTER_PORT")
[[ -z "${RENDEZVOUS_TIMEOUT:-}" ]] || ranks+=(--rendezvous-timeout="$RENDEZVOUS_TIMEOUT")
[[ -z "${MAX_RESTARTS:-}" ]] || ranks+=(--max-restarts="$MAX_RESTARTS")
exec "$PYTHON" -m blt_titan train "${CONFIG_FILE:-train_configs/debug.toml}" "${ranks[@]}" "$@"
