#!/usr/bin/env bash
# The offline job (motif_jax.prepare) on a Cloud TPU slice over ssh: every host makes its share of the shards on its own chips.
# Usage: launch/flow_tpu.sh [--dry-run] TPU_NAME --config=configs/X.py --source=SRC --output=DIR [...]
#   Copies this checkout to ~/motif_jax of each host and installs it with the extras `tpu` and `gs`. SRC and DIR are gs://, or
#   mounted on every host. ZONE, PROJECT: of the slice (default: those of gcloud's configuration).
# Run the same command again after a preemption: it continues.
set -euo pipefail
cd "$(dirname "$0")/.."
least_arguments=4
source launch/tpu_hosts.sh

# A host asks the metadata server who it is and how many there are (one address each); $ is expanded there.
# shellcheck disable=SC2016
about='about() { curl -sf -H Metadata-Flavor:Google "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"; }'
# shellcheck disable=SC2016
share='index=$(about agent-worker-number) && count=$(about worker-network-endpoints | tr , "\n" | grep -c .)'
job="python -m motif_jax.prepare --task_index=\$index --task_count=\$count $arguments"
on_every_host tpu,gs "$about && $share && exec $job"
