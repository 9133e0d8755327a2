#!/usr/bin/env bash
# Trains a recipe on several machines. Start it on each of them, with the same HEAD, in a folder that all of them share:
#   HEAD=first-machine NODES=2 ./several_nodes.sh RECIPE [OPTIONS OF popi train]
set -euo pipefail

recipe=${1:-recipes/cluster/llama_70b.yaml}

exec torchrun --nnodes "${NODES:-2}" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?name the first machine}:${PORT:-29500}" --rdzv-id "${RUN:-popi}" \
    -m popi train "$recipe" "${@:2}"
