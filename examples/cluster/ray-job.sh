#!/bin/sh
# A whole night on a Ray cluster that is there, from anywhere: ray-job.sh RUN [rlaif run's options]
# RUN is a directory that the cluster's nodes see too, and its rlaif.toml has backend = "ray" under [cluster].
# RAY_API_SERVER_ADDRESS names the cluster's dashboard, like http://head:8265.
set -eu
run=$1
shift
exec ray job submit --no-wait --submission-id "rlaif-$(basename "$run")-$(date +%s)" -- rlaif run "$run" "$@"
