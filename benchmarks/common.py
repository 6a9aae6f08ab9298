"""What the benchmarks share and needs no PyTorch: made-up weights, datasets and clips, the clock, and how a script ends on a mistake."""

import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from motif_jax.config import Config
from motif_jax.data import records, shards
from motif_jax.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Calls `main`; a mistake of the user's, or a file that cannot be read, ends it with one line."""
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"{sys.argv[0]}: {error}")


def cores() -> int:
    """Of those that this process may use, where the system tells them apart, as Linux does."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """(wall-clock, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def texture(frames: int, height: int, width: int, motion: tuple[int, int] = (0, 2), seed: int = 0) -> np.ndarray:
    """A window on a picture of coarse cells, which moves by `motion` pixels a frame (down, right), uint8 [T,H,W,3]."""
    down, right = motion
    cells = (height + down * frames) // 8 + 2, (width + right * frames) // 8 + 2, 3
    picture = np.random.default_rng(seed).integers(0, 256, cells, np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([picture[down * t :, right * t :][:height, :width] for t in range(frames)])


def random_weights(shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Of the shape of each of `shapes`, none zero: a fresh network puts out zeros, and would not show a difference."""
    count = 2**22  # numbers for all: a billion draws would take a minute
    pool = np.tile(np.random.default_rng(0).standard_normal(count, np.float32), 2)

    def one(number: int, shape: tuple[int, ...]) -> np.ndarray:
        fan_in = max(1, int(np.prod(shape[:-1])))
        return np.resize(pool[-7919 * number % count :][: min(count, int(np.prod(shape)))], shape) / np.float32(fan_in**0.5)

    return {name: one(i, s.shape) + np.float32(name.endswith("scale")) for i, (name, s) in enumerate(shapes.items())}


def write_dataset(config: Config, directory: pathlib.Path, clips: int, per_shard: int) -> list[bytes]:
    """A dataset as `prepare.latents` and `prepare.text_embeddings` make it, of random numbers; its records."""
    d, latent = config.data, (config.latent_height, config.latent_width, 2 * config.autoencoder.z_channels)
    text = config.text.context_length, config.text.width
    layout = records.Layout(d.frames, d.height, d.width, config.prepare.flow_stride, pixels=False, latent=latent, text=text)
    rng = np.random.default_rng(0)
    made = []
    for i in range(clips):
        clip = {name: rng.standard_normal(shape, np.float32) for name, (shape, _) in layout.arrays().items()}
        clip["latent_moments"][..., latent[-1] // 2 :] = -20.0  # log-variance
        clip["flow"] *= 20
        clip |= {"clip_id": f"clip{i}", "video": "v", "caption": "c", "fps": 24.0, "frame_stride": 3, "first_frame": 0}
        made.append(records.encode_clip(layout, clip))
    (directory / "manifests").mkdir(parents=True, exist_ok=True)
    plan = shards.plan_shards({"train": made, "validation": ()}, per_shard)
    for shard in plan:
        shards.write_shard(directory, shard, "made up", "made up", shard.items)
    shards.finish(directory, plan, "made up", layout, {})
    return made
