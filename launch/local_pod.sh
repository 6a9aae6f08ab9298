#!/usr/bin/env bash
# N real processes of motif_jax.main on this machine, one job: a rehearsal of a pod on CPUs.
# Usage: launch/local_pod.sh [--dry-run] N --config=configs/X.py --workdir=DIR [--config.a.b=value ...]
# Each process sees DEVICES (default 1) fake CPU devices. When one process fails or dies, the others are ended and the
# script fails; SIGTERM to the script goes to all of them, so that they save and leave.
set -euo pipefail
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
((BASH_VERSINFO[0] > 4)) || { echo "local_pod: needs bash 5 (macOS has 3.2; brew install bash)" >&2; exit 2; }
count="${1:-}"
if ! [[ "$count" =~ ^[1-9][0-9]*$ ]] || [ $# -lt 3 ]; then
  sed -n '2,5s/^# //p' "$0" >&2
  exit 2
fi
shift
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
port="${PORT:-$((20000 + RANDOM % 20000))}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" MOTIF_PROCESS_COUNT="$count"
processes=()
for ((i = 0; i < count; i++)); do
  if [ -n "$dry" ]; then
    echo "MOTIF_PROCESS_INDEX=$i MOTIF_PROCESS_COUNT=$count JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS $python -m motif_jax.main $*"
  else
    MOTIF_PROCESS_INDEX=$i "$python" -m motif_jax.main "$@" &
    processes+=("$!")
  fi
done
[ -z "$dry" ] || exit 0
stopping=""
trap 'stopping=1; kill -TERM "${processes[@]}" 2>/dev/null || true' TERM INT
status=0
for ((left = count; left > 0; )); do
  if wait -n "${processes[@]}" 2>/dev/null; then # it complains of those that have ended before
    left=$((left - 1))
  else
    code=$?
    # An interrupted wait is no process' end.
    if [ -n "$stopping" ] && [ "$code" -gt 128 ]; then stopping=""; continue; fi
    status=$code
    echo "local_pod: a process ended with $status; ending the others" >&2
    sleep "${GRACE:-10}" # they find out by themselves and say so
    kill -KILL "${processes[@]}" 2>/dev/null || true
    break
  fi
done
exit "$status"
