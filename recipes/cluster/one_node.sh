#!/usr/bin/env bash
# Trains a recipe on all GPUs of this machine: ./one_node.sh RECIPE [OPTIONS OF popi train]
set -euo pipefail

recipe=${1:-recipes/cluster/llama_3b.yaml}

exec torchrun --standalone --nproc-per-node "${GPUS:-8}" -m popi train "$recipe" "${@:2}"
