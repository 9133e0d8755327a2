#!/usr/bin/env bash
# Trains a recipe under SLURM: sbatch [--nodes N] slurm.sh RECIPE [OPTIONS OF popi train]
#SBATCH --job-name=popi
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=popi-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

recipe=${1:-recipes/cluster/llama_3b.yaml}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Before the time is over, the job goes back into the queue. The same command then resumes from the last checkpoint.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m popi train "$recipe" "${@:2}" &

# A shell runs a trap only while it waits, not while a command runs in the foreground.
wait $!
