#!/usr/bin/env bash
# Trains on a Cloud TPU slice over ssh: the same command on every host, which find each other by themselves.
# Usage: launch/tpu_vm.sh [--dry-run] TPU_NAME --config=configs/X.py --workdir=DIR [--config.a.b=value ...]
#   Copies this checkout to ~/motif_jax of each host, installs it with the extra `tpu`, and runs motif_jax.main in the
#   foreground. DIR and the data must be on storage that every host mounts (Filestore, gcsfuse).
#   ZONE, PROJECT: of the slice (default: those of gcloud's configuration).
#   ACCELERATOR=v5litepod-64: makes the slice as a queued resource first and waits for it; RUNTIME (default
#   v2-alpha-tpuv5-lite), SPOT=1. Run the same command again after a preemption: it continues.
set -euo pipefail
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
if [ $# -lt 3 ]; then
  sed -n '2,9s/^# //p' "$0" >&2
  exit 2
fi
name="$1"
shift
cd "$(dirname "$0")/.."
where=()
[ -z "${ZONE:-}" ] || where+=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || where+=(--project="$PROJECT")

run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

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

archive="$(mktemp)"
trap 'rm -f "$archive"' EXIT
run git archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name":motif_jax.tar.gz --worker=all "${where[@]}"
install='rm -rf motif_jax && mkdir motif_jax && tar -xzf motif_jax.tar.gz -C motif_jax && cd motif_jax && source launch/environment.sh tpu'
printf -v arguments '%q ' "$@"
run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" --command="$install && exec python -m motif_jax.main $arguments"
