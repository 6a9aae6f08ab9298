#!/usr/bin/env bash
# Trains on a Cloud TPU slice over ssh: the same command on every host, which find each other by themselves.
# Usage: launch/tpu_vm.sh [--dry-run] TPU_NAME --config=configs/X.py --workdir=DIR [--config.a.b=value ...]
#   Copies this checkout, as committed, to ~/motif_jax of each host, installs it with the extras `tpu` and `gs`, and runs
#   motif_jax.main in the foreground. DIR, data.path and init_from are gs://BUCKET/..., or on storage that every host mounts (Filestore).
#   ZONE, PROJECT: of the slice (default: those of gcloud's configuration).
#   ACCELERATOR=v5litepod-64: makes the slice as a queued resource first and waits for it; RUNTIME (default:
#   the one for v5e, v5p or v6e), SPOT=1.
#   PYTHON: the interpreter of the hosts (default python3.11, else python3).
#   Run the same command again after a preemption: it continues, on a new slice where ACCELERATOR is set.
set -euo pipefail
cd "$(dirname "$0")/.."
least_arguments=3
source launch/tpu_hosts.sh

if [ -n "${ACCELERATOR:-}" ]; then
  case "$ACCELERATOR" in # https://cloud.google.com/tpu/docs/runtimes
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    *) runtime=v2-alpha-tpuv5-lite ;;
  esac
  spot=()
  [ -z "${SPOT:-}" ] || spot=(--spot)
  queued() { run gcloud compute tpus queued-resources "$1" "$name" ${where[@]+"${where[@]}"} "${@:2}"; }
  create() {
    queued create --node-id="$name" --accelerator-type="$ACCELERATOR" --runtime-version="${RUNTIME:-$runtime}" ${spot[@]+"${spot[@]}"}
  }
  made=""
  if [ -n "$dry" ]; then create; fi
  while [ -z "$dry" ]; do
    state="$(queued describe --format='value(state.state)' 2> /dev/null || true)"
    case "$made$state" in
      ACTIVE | made:ACTIVE) break ;;
      "") create; made=made: ;;
      SUSPENDED | FAILED) queued delete --force --quiet ;; # of an earlier call: preempted, or never there
      made:SUSPENDED | made:FAILED) echo "$name is $state (gcloud compute tpus queued-resources describe $name says why)" >&2; exit 1 ;;
      *) echo "waiting for $name (${state:-no answer})"; sleep 30 ;;
    esac
  done
fi

on_every_host tpu,gs "exec python -m motif_jax.main $arguments"
