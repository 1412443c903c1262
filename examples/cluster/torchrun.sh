#!/bin/bash
# Training on several machines without a scheduler: run this on each of them, with its own number.
#
#     NODES=2 NODE=0 MASTER=first-machine:29500 GPUS=8 examples/cluster/torchrun.sh --data.root FOLDER ...
#     NODES=2 NODE=1 MASTER=first-machine:29500 GPUS=8 examples/cluster/torchrun.sh --data.root FOLDER ...
#
# All machines need the same software, the same words here, and a --trainer.default_root_dir that all see.
# When one process fails torchrun ends the others; the same command with --ckpt_path last goes on. Without
# GPUs, to try it on one machine: ACCELERATOR=cpu, and GPUS is then the number of processes.

set -euo pipefail

: "${MASTER:?the first machine, as host:port}"
nodes=${NODES:-1}
gpus=${GPUS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# --max-restarts=0: a restart would begin anew; going on from a checkpoint is a decision
exec torchrun \
    --nnodes="$nodes" \
    --node-rank="${NODE:-0}" \
    --nproc-per-node="$gpus" \
    --master-addr="${MASTER%:*}" \
    --master-port="${MASTER##*:}" \
    --max-restarts=0 \
    -m clip_lightning fit \
    --trainer.accelerator "${ACCELERATOR:-gpu}" \
    --trainer.num_nodes "$nodes" \
    --trainer.devices "$gpus" \
    --trainer.strategy ddp \
    "$@"
