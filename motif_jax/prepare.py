"""Makes a dataset: python -m motif_jax.prepare --config=configs/X.py[:args] --source=SRC --output=DIR

SRC is a captions file (.csv with the columns video,caption, or .jsonl with the same keys; paths relative to it), a folder of
videos with same-named .txt captions, or `synthetic:NAME[:count]`, the built-in world. Run it again after an interruption: it
continues. Many machines share the work with --task_index=I --task_count=N. --preview=N draws N clips with their flow.
"""

import shlex
import signal
import sys

from absl import flags
from ml_collections import config_flags

from motif_jax import commands
from motif_jax.config import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/X.py[:args]", lock_config=True)
SOURCE = flags.DEFINE_string("source", None, "captions file, folder of videos, or synthetic:NAME[:count]")
OUTPUT = flags.DEFINE_string("output", None, "dataset directory; data.path of a training run")
TASK_INDEX = flags.DEFINE_integer("task_index", 0, "which share of the shards this call makes", lower_bound=0)
TASK_COUNT = flags.DEFINE_integer("task_count", 1, "number of shares", lower_bound=1)
RUNNER = flags.DEFINE_enum("runner", "local", ["local", "beam"], "work through the shards here, or hand them to Apache Beam")
BEAM = flags.DEFINE_string("beam_options", "", "options of the Beam pipeline, such as '--runner=FlinkRunner --parallelism=8'")
PREVIEW = flags.DEFINE_integer("preview", 0, "draw this many clips under DIR/preview", lower_bound=0)
flags.mark_flags_as_required(["config", "source", "output"])


def main(argv: list[str]) -> None:
    commands.no_more(argv)
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: sys.exit("motif_jax.prepare: stopped; the same command continues"))
    config = commands.configuration(CONFIG)
    beam_options = shlex.split(BEAM.value) if RUNNER.value == "beam" else None
    from motif_jax import preparation

    try:
        preparation.prepare(
            config, SOURCE.value, OUTPUT.value, TASK_INDEX.value, TASK_COUNT.value, PREVIEW.value, beam_options=beam_options
        )
    except OSError as error:  # a full disk, a share that went away
        raise UserError(f"{error}; what is done is kept, the same command continues") from error


if __name__ == "__main__":
    commands.run("motif_jax.prepare", main)
