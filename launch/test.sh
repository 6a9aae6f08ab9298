#!/usr/bin/env bash
# Makes a virtual environment (VENV, default .venv), installs the package with its test extra, and passes the checks and tests,
# a process per core. Usage: launch/test.sh [pytest arguments]; with -n0 the tests run in one process, as --pdb needs it.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh test
# The TPU compiler of this JAX, in a directory of its own: in the environment, JAX would look for a TPU whenever it starts.
MOTIF_LIBTPU="$VIRTUAL_ENV/libtpu"
if [ ! -d "$MOTIF_LIBTPU" ]; then
  wanted="$(python -c 'import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')"
  python -m pip install --quiet --disable-pip-version-check --no-deps --target "$MOTIF_LIBTPU.new" "$wanted" && mv "$MOTIF_LIBTPU.new" "$MOTIF_LIBTPU"
fi
[ ! -d "$MOTIF_LIBTPU" ] || export MOTIF_LIBTPU # there is none for macOS
ruff check .
ruff format --check .
processes="$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)"
processes=$((processes < 8 ? processes : 8)) # each may take 4 GB
JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" exec python -m pytest -n "$processes" --dist loadscope --no-loadscope-reorder "$@"
