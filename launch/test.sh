#!/usr/bin/env bash
# Makes a virtual environment (VENV, default .venv), installs the package with its test extra, and passes the checks and tests,
# a process per core. Usage: launch/test.sh [pytest arguments]; with -n0 the tests run in one process, as --pdb needs it.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh test
ruff check .
ruff format --check .
processes="$(nproc)"
processes=$((processes < 8 ? processes : 8)) # each may take 4 GB
JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" exec python -m pytest -n "$processes" --dist loadscope --no-loadscope-reorder "$@"
