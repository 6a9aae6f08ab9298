"""The media of a study: every system's videos in, files out that differ in nothing but what they show.

Same size (covered, centre crop), frame rate, number of frames, codec and quality; opaque names, no dates. Also the damaged
versions that training and gold items need.
"""

import concurrent.futures
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from motif_jax.data import images, videos
from motif_jax.errors import UserError, enumerate_first

# A frame rate this close to a whole multiple of the study's is taken for it: GIFs round their delays to 1/100 s.
RATE_TOLERANCE = 0.1


@dataclass(frozen=True)
class Format:
    """What all videos of a study are brought to."""

    height: int
    width: int
    frames: int
    fps: float


def on_threads(
    function: Callable, jobs: Sequence[tuple], workers: int | None, progress: Callable[[int], None] = lambda done: None
) -> Iterator[Any]:
    """function(*job) of each job in their order, or the MediaError that it raised; decoders, encoders and filters leave the interpreter.

    progress: called with the number of jobs that are done. Whatever else is raised, an interrupt for one, waits for running jobs alone.
    """
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for n, future in enumerate(futures, 1):
                try:
                    result = future.result()
                except images.MediaError as error:
                    result = error
                yield result
                progress(n)
        finally:
            pool.shutdown(cancel_futures=True)


def parallel(function: Callable, jobs: Sequence[tuple], what: str = "") -> list[Any]:
    """`on_threads` on all cores. Raises UserError that names the first files that could not be used; a job's first entry is the path.

    what: the name of the jobs, to print how many are done.
    """

    def progress(done: int) -> None:
        if what and (done % 100 == 0 or done == len(jobs)):
            print(f"{what}: {done} of {len(jobs)}", flush=True)

    results = list(on_threads(function, jobs, os.cpu_count(), progress))
    faults = [f"{job[0]}: {found}" for job, found in zip(jobs, results, strict=True) if isinstance(found, images.MediaError)]
    if faults:
        raise UserError(f"{len(faults)} of {len(jobs)} files cannot be used: {enumerate_first(faults, 5)}")
    return results


def length(path: pathlib.Path) -> tuple[int, float]:
    """(frames, frames per second) of a video. Raises MediaError."""
    if path.is_dir():
        raise images.MediaError("is a folder", "frames have no frame rate, a study needs video files")
    counts = []

    def first_frame(count: int) -> tuple[int, int]:
        counts.append(count)
        return 0, 1

    clip = videos.read_clip(path, 1, 16, 16, first_frame)
    return counts[-1], clip.fps


def common_format(lengths: dict[pathlib.Path, tuple[int, float]], height: int, width: int, frames: int | None, fps: float | None) -> Format:
    """The format that all videos can be brought to: the lowest frame rate and the shortest duration, unless given.

    Frames are dropped, never made up: a frame rate that is no whole multiple of the study's, or too few frames, raises UserError; so does
    a lowest rate or shortest length that only the exceptions of a folder have.
    """
    if fps is None:
        fps = _lowest({path: rate for path, (_, rate) in lengths.items()}, "--fps={:g}", RATE_TOLERANCE)
    faults = [f"{path} has {rate:g}" for path, (_, rate) in lengths.items() if not reaches(rate, fps)]
    if faults:
        raise UserError(
            f"--fps={fps:g}: {len(faults)} videos run at no whole multiple of it ({enumerate_first(faults, 3)}); "
            "choose a common divisor with --fps, or convert them first"
        )
    usable = {path: (count - 1) // stride(rate, fps) + 1 for path, (count, rate) in lengths.items()}
    shortest = min(usable, key=usable.get)
    if usable[shortest] < 2:
        raise UserError(f"{shortest}: one frame is no video")
    if frames is None:
        frames = _lowest(usable, "--frames={}")
    if usable[shortest] < frames:
        raise UserError(f"--frames={frames}: {shortest} has only {usable[shortest]} at {fps:g} frames a second")
    return Format(height, width, frames, round(fps, 3))


def _lowest(values: dict[pathlib.Path, float], option: str, tolerance: float = 0) -> float:
    """The lowest value. Raises UserError when no folder has it, give or take, in at least half of its files: it is some files' fault."""
    lowest = min(values.values())
    low = [path for path, value in values.items() if value <= (1 + tolerance) * lowest]
    files, of_those = Counter(path.parent for path in values), Counter(path.parent for path in low)
    if any(2 * count >= files[folder] for folder, count in of_those.items()):
        return lowest
    option = option.format(lowest)
    raise UserError(
        f"{len(low)} of {len(values)} videos would bring the whole study to {option} ({enumerate_first([*map(str, low)], 3)}); "
        f"make them anew, take their pairs out of --list, or give {option} if that is meant"
    )


def stride(rate: float, fps: float) -> int:
    """n such that every n-th frame of a video at `rate` frames a second gives about `fps`."""
    return max(1, round(rate / fps))


def reaches(rate: float, fps: float) -> bool:
    """Whether `stride` brings `rate` to about `fps`: whether it is a whole multiple, within a tenth of `fps`."""
    return abs(rate / fps - stride(rate, fps)) <= RATE_TOLERANCE


def read(path: pathlib.Path, rate: float, form: Format) -> UInt8[np.ndarray, "T H W 3"]:
    """The first frames of a video in the study's format. Raises MediaError."""
    return videos.read_clip(path, form.frames, form.height, form.width, lambda _: (0, stride(rate, form.fps))).frames


def write(folder: pathlib.Path, name: str, frames: UInt8[np.ndarray, "T H W 3"], fps: float) -> None:
    """`<folder>/<name>`, an H.264 mp4 at the quality of all others. The date is wiped: the order of encoding would tell systems apart."""
    videos.save_video(folder / name, frames, fps)
    os.utime(folder / name, (0, 0))


def convert(path: pathlib.Path, rate: float, form: Format, folder: pathlib.Path, name: str) -> float:
    """Reads, writes, and returns the mean absolute difference of successive frames in grey levels, a rough measure of motion."""
    frames = read(path, rate, form)
    write(folder, name, frames, form.fps)
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())


def convert_image(path: pathlib.Path, form: Format, folder: pathlib.Path, name: str) -> None:
    """The starting image at the videos' size, without its metadata. Raises MediaError."""
    picture = images.read_image(path, form.height, form.width)
    Image.fromarray(picture).save(folder / name, quality=95)
    os.utime(folder / name, (0, 0))


def recoloured(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Nothing has the colour it has in the starting image."""
    return 255 - frames  # exchanged channels would leave grey as it is


def frozen(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The first frame throughout."""
    return np.repeat(frames[:1], len(frames), axis=0)


def shuffled(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The frames in random order."""
    return frames[rng.permutation(len(frames))]


def coarse(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blocks of a sixteenth of the height, and noise."""
    side = max(2, frames.shape[1] // 16)
    blocks = np.repeat(np.repeat(frames[:, ::side, ::side], side, 1), side, 2)[:, : frames.shape[1], : frames.shape[2]]
    return np.clip(blocks + rng.normal(0, 20, blocks.shape), 0, 255).astype(np.uint8)


def torn(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """After the first quarter every frame falls into sixteen strips in random order: wrong whatever the video shows."""
    out = frames.copy()
    for t in range(max(1, len(frames) // 4), len(frames)):
        strips = np.array_split(frames[t], 16, axis=1)
        out[t] = np.concatenate([strips[i] for i in rng.permutation(len(strips))], axis=1)
    return out


# What training shows for each of the paper's reasons, and gold items.
DAMAGE = {"image_alignment": recoloured, "text_alignment": frozen, "object_motion": shuffled, "overall_quality": coarse}
GOLD_DAMAGE = torn
