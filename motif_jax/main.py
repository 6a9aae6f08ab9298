"""Trains: python -m motif_jax.main --config=configs/motif.py --workdir=DIR [--config.a.b=value ...]

Continues by itself when DIR holds a checkpoint; exits 0 at once when `config.steps` are done.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/X.py[:args]", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "directory of checkpoints, metrics and samples")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell every detail
    from motif_jax.config import UserError, from_config_dict

    try:
        config = from_config_dict(CONFIG.value)
        from motif_jax.training import loop

        loop.train(config, WORKDIR.value)
    except UserError as error:
        sys.exit(f"motif_jax.main: {error}")


if __name__ == "__main__":
    app.run(main)
