#!/usr/bin/env bash
# Sourced by the other scripts: a virtual environment with the package and the extras named as first argument.
# VENV says where (default .venv); PYTHON which interpreter (default python3.11, else python3). Returns 1 when a step fails: -e does
# nothing in a list of && and ||, where the TPU hosts run this.
venv="${VENV:-.venv}"
extras="${1:-}"
if [ ! -x "$venv/bin/python" ]; then
  python="${PYTHON:-$(command -v python3.11 || command -v python3)}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "motif_jax needs Python 3.11 or newer; set PYTHON")' || return 1
  "$python" -m venv "$venv" || return 1
fi
# shellcheck disable=SC1091
source "$venv/bin/activate" || return 1
stamp="$venv/installed-$(printf '%s' "$extras" | tr -c '[:lower:]' '-')"
if [ ! -e "$stamp" ] || [ requirements.txt -nt "$stamp" ] || [ setup.py -nt "$stamp" ]; then
  echo "installing motif_jax${extras:+[$extras]} into $venv"
  python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}" || return 1
  touch "$stamp"
fi
