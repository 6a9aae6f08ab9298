#!/usr/bin/env bash
# Makes a virtual environment (VENV, default .venv), installs the package with its test extra, and passes the checks and tests.
# Usage: launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh test
ruff check .
ruff format --check .
JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" exec python -m pytest "$@"
