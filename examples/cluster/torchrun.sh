#!/bin/bash
# Training on several machines without a scheduler: run this on each of them, with its own NODE.
#
#     NODES=2 NODE=0 MASTER=first-machine:29500 GPUS=8 examples/cluster/torchrun.sh --data.root FOLDER ...
#     NODES=2 NODE=1 MASTER=first-machine:29500 GPUS=8 examples/cluster/torchrun.sh --data.root FOLDER ...
#
# All machines need the same software, the same arguments, and a --trainer.default_root_dir that they share. If a
# process fails, torchrun ends the others; run the same command with --ckpt_path last to resume. To try it on one
# machine without GPUs, set ACCELERATOR=cpu; GPUS is then the number of processes.

set -euo pipefail

: "${MASTER:?the first machine, as host:port}"
nodes=${NODES:-1}
gpus=${GPUS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# --max-restarts=0: a restart would begin a new run; whether to resume from a checkpoint is up to you
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
