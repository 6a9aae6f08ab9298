#!/usr/bin/env bash
# From a bare machine with Python 3.11 to an animated image: install, prepare the synthetic world, train, sample sentences
# with combinations that training never showed, write runs/quickstart/report.html. Run it again to continue after a stop.
# Environment: RUN (default runs/quickstart), VENV (default .venv), PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
run="${RUN:-runs/quickstart}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
config=configs/quickstart.py
python -m motif_jax.prepare --config="$config" --source=synthetic:quickstart:8000 --output="$run/data"
python -m motif_jax.main --config="$config" --workdir="$run" --config.data.path="$run/data"
python -m motif_jax.bench synthetic --workdir="$run" --count=64
echo "open $run/report.html"
