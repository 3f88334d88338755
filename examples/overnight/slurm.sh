#!/bin/bash
#SBATCH --job-name=rlaif
#SBATCH --gres=gpu:1
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Five minutes before the time is up the shell is told, and has rlaif keep what is in flight.
#SBATCH --signal=B:TERM@300
#
#   sbatch examples/overnight/slurm.sh RUN [further options of rlaif run]
#
# A job that was interrupted (out of time, or preempted) is queued again and goes on from there; one that is done, or
# failed for a reason that will not pass by itself, is not.
set -u
RUN=${1:?usage: sbatch slurm.sh RUN [options]}
shift
RLAIF=${RLAIF:-.venv/bin/rlaif}

"$RLAIF" run "$RUN" "$@" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT
wait "$child"
code=$?
# A trap ends `wait` at once: wait again for the end itself.
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done

if [ "$code" -eq 130 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
