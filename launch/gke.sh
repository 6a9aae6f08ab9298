#!/usr/bin/env bash
# Fills in launch/gke_jobset.yaml and applies it; --dry-run prints the manifest.
# Usage: IMAGE=REGISTRY/motif_jax:TAG [CLAIM=VOLUME_CLAIM] launch/gke.sh [--dry-run] --config=... --workdir=gs://BUCKET/RUN ...
# To continue a run whose JobSet has ended, delete that first: kubectl delete jobset motif.
#   IMAGE: a checkout as working directory, installed with `pip install -e '.[tpu,gs]'`. Work directory, data and weights are in gs://, or
#   CLAIM is a volume that every pod may write, mounted at /shared.
set -euo pipefail
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
if [ $# -lt 2 ] || [ -z "${IMAGE:-}" ]; then
  sed -n '2,6s/^# //p' "$0" >&2
  exit 2
fi
cd "$(dirname "$0")"
# The arguments as a JSON list, which YAML reads.
arguments="$("${PYTHON:-python3}" -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@")"
manifest="$(grep -v '^#' gke_jobset.yaml)"
[ -n "${CLAIM:-}" ] || manifest="${manifest%%volumeMounts:*}" # the volume is at the end
# Quoted: bash 5.2 takes & and \ of a replacement for its own otherwise.
manifest="${manifest//\$\{IMAGE\}/"$IMAGE"}"
manifest="${manifest//\$\{CLAIM\}/"${CLAIM:-}"}"
manifest="${manifest//\$\{ARGUMENTS\}/"$arguments"}"
if [ -n "$dry" ]; then
  printf '%s\n' "$manifest"
else
  printf '%s\n' "$manifest" | kubectl apply -f -
fi
