"""Animates images with a trained run: python -m motif_jax.sample --workdir=RUN --image=FILE --prompt=TEXT --output=FILE.mp4|.gif

or a whole list: --requests=FILE.jsonl (keys image, prompt, id; or any --list of docs/evaluate.md) --output=DIR. The same command continues
a stopped one; DIR/manifest.json says how its clips were made, and what would be made otherwise is refused. Options: --seed --steps
--guidance --frame_stride (how many source frames the steps of the clip are apart).
--workdir=RUN/checkpoints/STEP takes another checkpoint than the newest.
--checkpoint=DIR --config=configs/X.py samples with a configuration of your own from an import, a run, or a run's checkpoint.
"""

import functools

from absl import flags
from ml_collections import config_flags

from motif_jax import commands
from motif_jax.data.storage import here
from motif_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "configuration of --checkpoint", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a run")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "weights to load instead of a work directory's (needs --config)")
IMAGE = flags.DEFINE_string("image", None, "the first frame (any image file)")
PROMPT = flags.DEFINE_string("prompt", None, "what happens")
REQUESTS = flags.DEFINE_string("requests", None, "jsonl file with keys image, prompt, id, or another list of pairs")
OUTPUT = flags.DEFINE_string("output", None, "FILE.mp4 or FILE.gif; with --requests a directory")
SEED = flags.DEFINE_integer("seed", 0, "noise seed", lower_bound=0, upper_bound=2**31 - 1)
STEPS = flags.DEFINE_integer("steps", None, "denoising steps (default: the configuration's)", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance", None, "classifier-free guidance scale (default: the configuration's)", lower_bound=0.0)
FRAME_STRIDE = flags.DEFINE_integer(
    "frame_stride", None, "source frames between two frames, at 24 fps (default: 24 / sample.fps)", lower_bound=1
)
BATCH = flags.DEFINE_integer("batch_size", 4, "clips generated together", lower_bound=1)
FORMAT = flags.DEFINE_enum("format", "mp4", ["mp4", "gif"], "file type with --requests")
flags.mark_flag_as_required("output")


def main(argv: list[str]) -> None:
    commands.no_more(argv)
    if not OUTPUT.value:
        raise UserError("--output is empty: name a file, or with --requests a directory")
    if bool(WORKDIR.value) == bool(CHECKPOINT.value):
        raise UserError("give either --workdir, or --checkpoint with --config")
    if CHECKPOINT.value and CONFIG.value is None:
        raise UserError("--checkpoint needs --config")
    one = [IMAGE.value is not None, PROMPT.value is not None]
    if any(one) if REQUESTS.value else not (all(one) and IMAGE.value):
        raise UserError("give either --image and --prompt, or --requests")
    output, config = here(OUTPUT.value), commands.configuration(CONFIG) if CONFIG.value else None
    from motif_jax import animation

    options = {"steps": STEPS.value, "guidance": GUIDANCE.value, "frame_stride": FRAME_STRIDE.value}
    load = functools.partial(animation.Animator.load, WORKDIR.value or CHECKPOINT.value, config, **options)
    if REQUESTS.value:
        animation.animate_list(load, REQUESTS.value, output, SEED.value, BATCH.value, FORMAT.value)
    else:
        animation.animate_one(load, IMAGE.value, PROMPT.value, output, SEED.value)


if __name__ == "__main__":
    commands.run("motif_jax.sample", main)
