#!/bin/sh
# Submit `rlaif run` as a job to a running Ray cluster, from any machine: ray-job.sh RUN [options of rlaif run]
# RUN is a directory that all nodes of the cluster share; its rlaif.toml has backend = "ray" under [cluster].
# RAY_API_SERVER_ADDRESS is the address of the cluster's dashboard, like http://head:8265.
set -eu
run=$1
shift
exec ray job submit --no-wait --submission-id "rlaif-$(basename "$run")-$(date +%s)" -- rlaif run "$run" "$@"
