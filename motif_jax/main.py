"""Trains: python -m motif_jax.main --config=configs/motif.py --workdir=DIR [--config.a.b=value ...]

Continues by itself when DIR holds a checkpoint; exits 0 at once when `config.steps` are done.
"""

import os
import sys

from absl import flags
from ml_collections import config_flags

from motif_jax import commands
from motif_jax.data.storage import run_location
from motif_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/X.py[:args]", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "directory of checkpoints, metrics and samples, also gs://")
STOPPED_STATUS = flags.DEFINE_integer("stopped_status", 0, "exit status when a signal stopped the run, for what starts it again", 0, 255)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    commands.no_more(argv)
    if not WORKDIR.value:
        raise UserError("--workdir= is empty: name the directory of the run")
    workdir = run_location(WORKDIR.value)
    config = commands.configuration(CONFIG)
    # A GPU is this process' alone; JAX would take three quarters of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    from motif_jax.dist import startup
    from motif_jax.training import loop

    with startup.job(), commands.memory_errors_reported():  # the job prints what ends a process
        commands.share_compiled_programs(str((workdir / "compiled").absolute()))
        done = loop.train(config, workdir)
    if not done:
        sys.exit(STOPPED_STATUS.value)


if __name__ == "__main__":
    commands.run("motif_jax.main", main)
