#!/bin/bash
# @config@ on @slices@ slice(s) of @chips@: @devices@ chips, @hosts@ hosts, mesh @mesh@.
# Made by: @made@
# The same again after a preemption, or where the TPU is there already: the run goes on.
set -euo pipefail
: "${NAME:?what the TPU is to be called}" "${ZONE:?such as us-central1-a}" "${PROJECT:?}"

where=(--zone="$ZONE" --project="$PROJECT")
nodes=(@nodes@)
request=(gcloud compute tpus queued-resources)
state() {
  "${request[@]}" describe "$NAME" "${where[@]}" --format='value(state.state)' 2>/dev/null || true
}
if [[ -z "$(state)" ]]; then
  "${request[@]}" create "$NAME" "${where[@]}" @names@ \
    --accelerator-type=@accelerator@ --runtime-version=@runtime@
fi
until [[ "$(state)" == ACTIVE ]]; do
  [[ "$(state)" != FAILED && "$(state)" != SUSPENDED ]] || { echo "no TPU: $(state)" >&2; exit 1; }
  sleep 30
done

on_all() {  # a command on every host of every slice at a time; fails where one does
  local node pid pids=()
  for node in "${nodes[@]}"; do
    gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
}
for node in "${nodes[@]}"; do
  gcloud compute tpus tpu-vm scp --recurse . "$node":cir_jax "${where[@]}" --worker=all
done
on_all 'cd cir_jax && pip install -e ".[tpu,gs]"'
on_all @in_home@
