#!/usr/bin/env bash
# The laptop-size ablation: trains and judges the U-Net's arms of configs/ablation.py on the synthetic world, two runs at a time on
# one core each, and writes runs/ablation/report.{html,md,json}. Run it again to continue after a stop; a run that is done is kept.
# Environment: RUNS (default runs/ablation), SEEDS (of the arms none, flow and inverse; default "0 1 2"), ARMS (default all
# others but the transformer's dit_none, dit_flow and dit_inverse), ARM_SEEDS (of those; default 0), JOBS (default: number of cores),
# VENV (default .venv), PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
# glibc keeps what a step has freed for the next one, which then needs no fresh pages: a fifth less time a step (docs/speed.md).
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592
runs="${RUNS:-runs/ablation}"
jobs="${JOBS:-$(nproc)}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" runs
config=configs/ablation.py
python -m motif_jax.prepare --config="$config" --source=synthetic:shapes:8000 --output="$runs/data"

one_run() ( # SLOT ARM/SEED: on one core, so that the numbers do not depend on how many runs there are at a time
  log="$runs/$2.log" pin=()
  if command -v taskset > /dev/null; then pin=(taskset -c "$1"); fi
  mkdir -p "$runs/$2"
  echo "$(date +%T) $2"
  trap 'echo "$2 failed; see $log" >&2; exit 255' ERR # 255 ends xargs
  "${pin[@]}" python -m motif_jax.main --config="configs/ablation.py:${2%/*}" --workdir="$runs/$2" \
    --config.seed="${2#*/}" --config.data.path="$runs/data" > "$log" 2>&1
  "${pin[@]}" python -m motif_jax.bench ablation --runs="$runs" --only="$2" >> "$log" 2>&1
  echo "$(date +%T) $2: done in $SECONDS s"
)
export -f one_run

others=$(python -c "import runpy; print(*(a for a in runpy.run_path('$config')['ARMS'] if a not in ('none', 'flow', 'inverse') and not a.startswith('dit_')))")
# shellcheck disable=SC2016  # the inner shell expands them
{
  for seed in ${SEEDS:-0 1 2}; do printf '%s\n' "none/$seed" "flow/$seed" "inverse/$seed"; done
  for seed in ${ARM_SEEDS:-0}; do for arm in ${ARMS-$others}; do echo "$arm/$seed"; done; done
} | xargs -P "$jobs" --process-slot-var=SLOT -I{} bash -c 'one_run "$SLOT" "$1"' _ {}
python -m motif_jax.bench ablation --runs="$runs"
echo "$((SECONDS / 60)) minutes in all"
