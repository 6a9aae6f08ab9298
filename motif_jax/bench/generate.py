"""Makes the videos of a list of image-text pairs with a trained run: <output>/<id>_<seed>.mp4 and manifest.json.

Files that are there are kept, so that a stopped run continues. The noise of a video depends on its (seed, id) alone: stops and jobs
change nothing, batch size, devices and the rest of the list nothing but rounding. --vbench names the files for VBench-I2V
(docs/evaluate.md).
"""

import argparse
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from motif_jax.bench.arguments import at_least, local
from motif_jax.config import load_config
from motif_jax.data.storage import replacing
from motif_jax.errors import UserError
from motif_jax.pairs import read_pairs, vbench_names
from motif_jax.requested import Pair, Request, write_json, writing

VBENCH_INFO = "vbench_info.json"
# Of VBench-I2V: those that need no instruction for the camera in the prompt
DIMENSIONS = (
    "i2v_subject i2v_background subject_consistency background_consistency motion_smoothness dynamic_degree aesthetic_quality "
    "imaging_quality temporal_flickering"
).split()


def requests_of(pairs: Sequence[Pair], seeds: Sequence[int], vbench: bool) -> list[Request]:
    """One for every seed and pair, so that more seeds come last. Raises UserError when two of them would have one file."""
    names = vbench_names(pairs) if vbench else [p.id for p in pairs]
    made = [Request(p, s, f"{name}{'-' if vbench else '_'}{s}.mp4") for s in seeds for p, name in zip(pairs, names, strict=True)]
    by_file: dict[str, Request] = {}
    for r in made:
        other = by_file.setdefault(r.file, r)
        if other is not r:
            raise UserError(f"{r.file} would be the video of two pairs, {other.pair.id!r} and {r.pair.id!r}: change an id")
    return made


def write_vbench(output: pathlib.Path, requests: Sequence[Request], height: int, width: int) -> None:
    """images/<name>.jpg, the image as the model saw it, and vbench_info.json, which VBench-I2V takes as its full_info.json.

    Raises UserError for an image that cannot be read, OSError.
    """
    from PIL import Image

    from motif_jax.animation import open_image
    from motif_jax.data.images import cover

    (output / "images").mkdir(exist_ok=True)
    entries: dict[str, dict[str, Any]] = {}
    for r in requests:
        name = r.file.rpartition("-")[0]
        image = (output / "images" / f"{name}.jpg").resolve()
        if name not in entries:
            entries[name] = {"prompt_en": name, "dimension": DIMENSIONS, "custom_image_path": str(image), "video_list": []}
            picture = Image.fromarray(cover(open_image(str(r.pair.image)), height, width))
            with replacing(image) as temporary:
                picture.save(temporary, format="JPEG", quality=95, subsampling=0)
        entries[name]["video_list"].append(str((output / r.file).resolve()))
    write_json(output / VBENCH_INFO, list(entries.values()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", help="work directory of a run")
    parser.add_argument("--checkpoint", help="weights to load instead of a work directory's (needs --config)")
    parser.add_argument("--config", help="configuration of --checkpoint: configs/X.py or a config.json")
    parser.add_argument("--list", required=True, help="pairs: the benchmark's folder (images and prompt.csv), a .jsonl or a .csv file")
    parser.add_argument("--output", required=True, type=local, help="directory of the videos")
    parser.add_argument("--seeds", default="0", help="comma-separated; a video for each (default: 0)")
    parser.add_argument("--batch_size", default=4, type=at_least(1), help="videos made together on each device (default: 4)")
    parser.add_argument("--steps", type=at_least(1), help="denoising steps (default: the configuration's)")
    parser.add_argument("--guidance", type=at_least(0, float), help="classifier-free guidance scale (default: the configuration's)")
    parser.add_argument("--frame_stride", type=at_least(1), help="source frames between two frames, at 24 fps (default: 24 / sample.fps)")
    parser.add_argument("--task_index", type=at_least(0), help="number of this job, from 0")
    parser.add_argument("--task_count", default=1, type=at_least(1), help="jobs that share the list, every N-th batch each")
    parser.add_argument("--vbench", action="store_true", help="name files <prompt>-<seed>.mp4 and add images/ and vbench_info.json")


def run(arguments: argparse.Namespace) -> None:
    """Makes the videos of this job's share of the list."""
    if (arguments.workdir is None) == (arguments.checkpoint is None):
        raise UserError("give either --workdir, or --checkpoint with --config")
    if (arguments.checkpoint is None) != (arguments.config is None):
        raise UserError("--checkpoint and --config go together")
    try:
        seeds = [int(s) for s in arguments.seeds.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={arguments.seeds}: must be different whole numbers from 0, such as 0,1")
    if arguments.task_index is None and arguments.task_count > 1:
        raise UserError(f"--task_count={arguments.task_count} needs --task_index: which share is this job's, or every job makes the first")
    task = arguments.task_index or 0
    if task >= arguments.task_count:
        raise UserError(f"--task_index={task}: must be from 0 to --task_count - 1 = {arguments.task_count - 1}")
    config = load_config(arguments.config) if arguments.config else None
    everything = requests_of(read_pairs(arguments.list), seeds, arguments.vbench)

    import jax

    from motif_jax.animation import Animator, generate, open_output
    from motif_jax.config import MeshConfig
    from motif_jax.dist.mesh import make_mesh

    devices = jax.local_devices()
    load = functools.partial(
        Animator.load,
        arguments.workdir or arguments.checkpoint,
        config,
        steps=arguments.steps,
        guidance=arguments.guidance,
        frame_stride=arguments.frame_stride,
        mesh=make_mesh(MeshConfig(), devices),
    )
    output, batch_size = arguments.output, arguments.batch_size * len(devices)
    animator = open_output(load, everything, output)
    config = animator.config
    if arguments.vbench:  # first: some videos may have NaN
        with writing(output):
            write_vbench(output, everything, config.data.height, config.data.width)
    say = functools.partial(print, flush=True)
    generate(animator, everything, output, config.sample.fps, batch_size, say, task, arguments.task_count)
