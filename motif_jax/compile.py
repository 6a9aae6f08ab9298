"""Compiles the train step for TPUs ahead of time: python -m motif_jax.compile --config=configs/X.py[:args] --topology=v5e:4x4

Needs no TPU, but the TPU compiler (docs/compile.md). Prints memory per chip, FLOPs, collectives and the MFU bound of a step;
fails with what would help when the step does not fit. Takes overrides, --config.a.b=value, as motif_jax.main does.
"""

import json
import pathlib

from absl import flags
from ml_collections import config_flags

from motif_jax import commands
from motif_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/X.py[:args]", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice: v5e, v5p or v6e, and its shape in chips, such as v5e:4x4 or v5p:2x2x4")
EFFORT = flags.DEFINE_float("effort", -1.0, "how hard XLA tries: -1 compiles fastest, 0 is its default", lower_bound=-1.0, upper_bound=1.0)
JSON = flags.DEFINE_string("json", None, "also write the numbers to this file")
flags.mark_flags_as_required(["config", "topology"])


def main(argv: list[str]) -> None:
    commands.no_more(argv)
    config = commands.configuration(CONFIG)
    if JSON.value:
        try:
            pathlib.Path(JSON.value).touch()  # before the minutes of compilation
        except OSError as error:
            raise UserError(f"--json={JSON.value}: cannot be written: {error}") from error
    from motif_jax import compilation

    devices = compilation.tpu_devices(TOPOLOGY.value)
    fields = ", ".join(compilation.stored(config).batch(config.image_tokens))
    print(f"{config.name} on {TOPOLOGY.value}, from shards with {fields}: compiling, minutes at the paper's size", flush=True)
    report = compilation.compile_step(config, devices, EFFORT.value)
    print(report)
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    commands.run("motif_jax.compile", main)
