#!/usr/bin/env bash
# The offline job (motif_jax.prepare) on a Cloud TPU slice over ssh: every host makes its share of the shards on its own chips.
# Usage: launch/flow_tpu.sh [--dry-run] TPU_NAME --config=configs/X.py --source=SRC --output=DIR [...]
#   Copies this checkout to ~/motif_jax of each host and installs it with the extras `tpu` and `gs`. SRC must be mounted on every
#   host; DIR may be gs://. ZONE, PROJECT: of the slice (default: those of gcloud's configuration).
# Run the same command again after a preemption: it continues.
set -euo pipefail
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
if [ $# -lt 4 ]; then
  sed -n '2,6s/^# //p' "$0" >&2
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

archive="$(mktemp)"
trap 'rm -f "$archive"' EXIT
run git archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name":motif_jax.tar.gz --worker=all "${where[@]}"
install='rm -rf motif_jax && mkdir motif_jax && tar -xzf motif_jax.tar.gz -C motif_jax && cd motif_jax && source launch/environment.sh tpu,gs'
# A host asks the metadata server who it is and how many there are (one address each); $ is expanded there.
# shellcheck disable=SC2016
about='about() { curl -sf -H Metadata-Flavor:Google "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"; }'
# shellcheck disable=SC2016
share='index=$(about agent-worker-number) && count=$(about worker-network-endpoints | tr , "\n" | grep -c .)'
printf -v arguments '%q ' "$@"
job="python -m motif_jax.prepare --task_index=\$index --task_count=\$count $arguments"
run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" --command="$install && $about && $share && exec $job"
