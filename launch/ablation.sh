#!/usr/bin/env bash
# The laptop-size ablation: trains and judges the U-Net's arms of configs/ablation.py on the synthetic world, two runs at a time on
# one core each, and writes runs/ablation/report.{html,md,json}. Run it again to continue after a stop; a run that is done is kept.
# Environment: RUNS (default runs/ablation), SEEDS (of the arms none, flow and inverse; default "0 1 2"), ARMS (default all others, but
# for the transformer's, dit_none, dit_flow and dit_inverse, and those of the loss on v, v_none, v_flow and v_inverse), ARM_SEEDS (of
# those; default 0), JOBS (default: number of cores), VENV (default .venv), PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
runs="${RUNS:-runs/ablation}"
jobs="${JOBS:-$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" runs
config=configs/ablation.py
python -m motif_jax.prepare --config="$config" --source=synthetic:shapes:8000 --output="$runs/data"

one_run() ( # ARM/SEED: on one core where there is taskset, so that the numbers do not depend on how many runs there are at a time
  log="$runs/$1.log"
  mkdir -p "$runs/$1"
  echo "$(date +%T) $1"
  trap 'echo "$1 failed; see $log" >&2; exit 255' ERR # 255 ends xargs
  if [ -n "${SLOT:-}" ]; then
    read -ra mine <<< "$cores"
    taskset -cp "${mine[SLOT % ${#mine[@]}]}" "$BASHPID" > /dev/null
  fi
  python -m motif_jax.main --config="configs/ablation.py:${1%/*}" --workdir="$runs/$1" \
    --config.seed="${1#*/}" --config.data.path="$runs/data" > "$log" 2>&1
  python -m motif_jax.bench ablation --runs="$runs" --only="$1" >> "$log" 2>&1 || echo "$1 was not judged; see $log" >&2 # the end tells why
  echo "$(date +%T) $1: done in $SECONDS s"
)
export -f one_run

others=$(python -c "import runpy; print(*(a for a in runpy.run_path('$config')['ARMS'] if a not in ('none', 'flow', 'inverse') and not a.startswith(('dit_', 'v_'))))")
taskset=$(command -v taskset || true) # Linux has it, and the xargs that numbers its slots; macOS neither
export cores="${taskset:+$(python -c 'import os; print(*sorted(os.sched_getaffinity(0)))')}"
# shellcheck disable=SC2016  # the inner shell expands it
{
  for seed in ${SEEDS-0 1 2}; do printf '%s\n' "none/$seed" "flow/$seed" "inverse/$seed"; done
  for seed in ${ARM_SEEDS:-0}; do for arm in ${ARMS-$others}; do echo "$arm/$seed"; done; done
} | xargs -P "$jobs" ${taskset:+--process-slot-var=SLOT} -I{} bash -c 'one_run "$1"' _ {}
python -m motif_jax.bench ablation --runs="$runs"
echo "$((SECONDS / 60)) minutes in all"
