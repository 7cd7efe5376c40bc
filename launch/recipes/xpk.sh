#!/bin/bash
# @config@ on @slices@ slice(s) of @chips@: @devices@ chips, @hosts@ hosts, mesh @mesh@.
# Made by: @made@
set -euo pipefail
: "${CLUSTER:?a GKE cluster that xpk made}" "${IMAGE:?an image with cir_jax[tpu,gs] in /cir_jax}"
: "${ZONE:?such as us-central1-a}" "${PROJECT:?}"

xpk workload create --workload=@job@ --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
  --tpu-type=@accelerator@ --num-slices=@slices@ --docker-image="$IMAGE" --max-restarts=100 \
  --command=@in_image@
