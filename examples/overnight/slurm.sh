#!/bin/bash
#SBATCH --job-name=rlaif
#SBATCH --gres=gpu:1
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Five minutes before the time limit, Slurm sends SIGTERM to this shell, which passes it on to rlaif.
#SBATCH --signal=B:TERM@300
#
#   sbatch examples/overnight/slurm.sh RUN [options of rlaif run]
#
# An interrupted job (time limit, preemption) is requeued and resumes. A job that is done or has failed is not requeued.
set -u
RUN=${1:?usage: sbatch slurm.sh RUN [options]}
shift
RLAIF=${RLAIF:-.venv/bin/rlaif}

"$RLAIF" run "$RUN" "$@" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT
wait "$child"
code=$?
# The trap ends `wait` early: wait again until rlaif has exited.
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done

if [ "$code" -eq 130 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
