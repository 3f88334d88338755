#!/bin/bash
#SBATCH --job-name=rlaif-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
#   sbatch [--nodes=4] examples/train/slurm.sh RUN [options of rlaif train]
#
# One task per node. Each runs the same command and reads its rank from the variables of srun. RUN must be on a file
# system that all nodes share. A requeued job resumes from the newest checkpoint.
set -eu
RUN=${1:?usage: sbatch slurm.sh RUN [options]}
shift
RLAIF=${RLAIF:-.venv/bin/rlaif}

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

srun --kill-on-bad-exit=1 "$RLAIF" train "$RUN" --launcher accelerate --sharding fsdp "$@"
