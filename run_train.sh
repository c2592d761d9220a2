#!/usr/bin/env bash
# Train with torchrun.
#
#   ./run_train.sh                                                  the debug model; prepares its data when missing
#   NGPU=8 CONFIG_FILE=train_configs/blt_1b.toml ./run_train.sh --training.steps=100
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 MASTER_PORT=29500 NGPU=8 CONFIG_FILE=... ./run_train.sh    (on each node)
#
# NGPU         ranks on this node (GPUs, or processes on a CPU)   default 1
# NNODES       nodes                                              default 1
# NODE_RANK    number of this node                                default 0
# MASTER_ADDR, MASTER_PORT   where node 0 listens                 default localhost, 29500 (one node: any free port)
# CONFIG_FILE  the run's TOML                                     default train_configs/debug.toml
# LOG_RANK     ranks of this node that print, as in 0,1           default 0
# PYTHON       the interpreter                                    default .venv/bin/python, where make setup made it
# "$@"         overrides, --section.key=value
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

export NGPU=${NGPU:-1} NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
CONFIG_FILE=${CONFIG_FILE:-train_configs/debug.toml}
LOG_RANK=${LOG_RANK:-0}
# Threads that wait should sleep: spinning ones, on cores that another process wants too, made steps 20 times slower.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

if [[ "$CONFIG_FILE" == train_configs/*debug.toml && ! -e data/stdlib/manifest.json ]]; then
    "$PYTHON" -m scripts.prepare_data --source python-stdlib --out data/stdlib \
        --validation-fraction 0.05 --seed 0 --max-bytes 6MB --record-batch-bytes 16KiB
fi

# One sentence for what is wrong, before any rank starts.
"$PYTHON" -m blt_titan.config.check --job.config_file "$CONFIG_FILE" "$@"

if [[ "$NNODES" == 1 && -z "${MASTER_PORT:-}" ]]; then
    rendezvous=(--rdzv_backend c10d --rdzv_endpoint localhost:0)
else
    rendezvous=(--node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-29500}")
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$NGPU" "${rendezvous[@]}" \
    --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
    -m blt_titan.train --job.config_file "$CONFIG_FILE" "$@"
