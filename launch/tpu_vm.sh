#!/usr/bin/env bash
# Trains on a Cloud TPU slice over ssh: the same command on every host, which find each other by themselves.
# Usage: launch/tpu_vm.sh [--dry-run] TPU_NAME --config=configs/X.py --workdir=DIR [--config.a.b=value ...]
#   Copies this checkout to ~/motif_jax of each host, installs it with the extra `tpu`, and runs motif_jax.main in the
#   foreground. DIR and the data must be on storage that every host mounts (Filestore, gcsfuse).
#   ZONE, PROJECT: of the slice (default: those of gcloud's configuration).
#   ACCELERATOR=v5litepod-64: makes the slice as a queued resource first and waits for it; RUNTIME (default
#   v2-alpha-tpuv5-lite), SPOT=1. Run the same command again after a preemption: it continues.
set -euo pipefail
cd "$(dirname "$0")/.."
least_arguments=3
source launch/tpu_hosts.sh

if [ -n "${ACCELERATOR:-}" ]; then
  spot=()
  [ -z "${SPOT:-}" ] || spot=(--spot)
  if [ -n "$dry" ] || ! gcloud compute tpus queued-resources describe "$name" "${where[@]}" >/dev/null 2>&1; then
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$ACCELERATOR" \
      --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" "${spot[@]}" "${where[@]}"
  fi
  until [ -n "$dry" ] || [ "$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)')" = ACTIVE ]; do
    echo "waiting for $name"
    sleep 30
  done
fi

on_every_host tpu "exec python -m motif_jax.main $arguments"
