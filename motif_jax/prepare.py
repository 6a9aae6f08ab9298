"""Makes a dataset: python -m motif_jax.prepare --config=configs/X.py[:args] --source=SRC --output=DIR

SRC is a captions file (.csv with the columns video,caption, or .jsonl with the same keys; paths relative to it, or URLs), a
folder of videos with same-named .txt captions or of .tar files with such pairs, or `synthetic:NAME[:count]`, the built-in world.
SRC and DIR may lie in gs:// or s3://. Run it again after an interruption: it continues. Many machines share the work with
--task_index=I --task_count=N; SLURM arrays and TPU pods say both themselves, Kubernetes indexed jobs with MOTIF_TASK_COUNT set.
--preview=N draws N clips with their flow. --verify reads everything again and names what is broken.
"""

import os
import shlex
import signal
import sys

from absl import flags
from ml_collections import config_flags

from motif_jax import commands
from motif_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/X.py[:args]", lock_config=True)
SOURCE = flags.DEFINE_string("source", None, "captions file or folder of videos, also gs:// or s3://, or synthetic:NAME[:count]")
OUTPUT = flags.DEFINE_string("output", None, "dataset directory, also gs:// or s3://; data.path of a training run")
TASK_INDEX = flags.DEFINE_integer("task_index", None, "which share of the shards this call makes, from 0 (default: as the cluster says)")
TASK_COUNT = flags.DEFINE_integer("task_count", None, "number of shares (default: as the cluster says, or 1)", lower_bound=1)
RUNNER = flags.DEFINE_enum("runner", "local", ["local", "beam"], "work through the shards here, or hand them to Apache Beam")
BEAM = flags.DEFINE_string("beam_options", "", "options of the Beam pipeline, such as '--runner=FlinkRunner --parallelism=8'")
PREVIEW = flags.DEFINE_integer("preview", 0, "draw this many clips under DIR/preview", lower_bound=0)
VERIFY = flags.DEFINE_bool("verify", False, "make nothing: read every record of --output and exit with 1 if anything is broken")
flags.mark_flag_as_required("output")


def main(argv: list[str]) -> None:
    commands.no_more(argv)
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: sys.exit("motif_jax.prepare: stopped; the same command continues"))
    if VERIFY.value:
        from motif_jax import preparation

        preparation.verify(OUTPUT.value)
        return
    if absent := [name for name, given in (("config", CONFIG.value), ("source", SOURCE.value is not None)) if not given]:
        raise UserError(f"--{' and --'.join(absent)} must be given")
    config = commands.configuration(CONFIG)
    index, count = _share()
    try:
        beam_options = shlex.split(BEAM.value) if RUNNER.value == "beam" else None
    except ValueError as error:
        raise UserError(f"--beam_options={BEAM.value!r}: {error}") from error
    from motif_jax import preparation

    try:
        preparation.prepare(config, SOURCE.value, OUTPUT.value, index, count, PREVIEW.value, beam_options=beam_options)
    except SystemExit as stopped:
        print(stopped.code, file=sys.stderr, flush=True)
        os._exit(1)  # what is half done is removed; a clip that a thread is still at may take a minute
    except OSError as error:  # a full disk, a share that went away
        raise UserError(f"{error}; what is done is kept, the same command continues") from error


def _share() -> tuple[int, int]:
    if TASK_INDEX.value is None and TASK_COUNT.value is None:
        from motif_jax.dist import tasks

        return tasks.share()
    if TASK_INDEX.value is None and TASK_COUNT.value > 1:
        raise UserError(f"--task_count={TASK_COUNT.value} needs --task_index: which share is this call's, or every call makes the first")
    return TASK_INDEX.value or 0, TASK_COUNT.value or 1


if __name__ == "__main__":
    commands.run("motif_jax.prepare", main)
