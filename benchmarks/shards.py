"""The offline job step by step, reading its shards against other ways of reading, and its memory over many clips.

    python benchmarks/shards.py [--video=FILE] [--weights=RAFT_SMALL_FILE] [--tables memory steps reading]

One table each: resident memory while `prepare` makes 1000 small clips; seconds per clip of 16 frames of 320x512 for decoding, JPEG,
flow and shard writing; clips/s of reading latents (16x40x64x8 moments, 77x1024 embedding, flow) in batches of 8, in random order as
training does, against the same records made into the same batches from WebDataset and TFRecord (sequential with a shuffle buffer of
50, which is all they offer) and against decoding and estimating flow on the fly. Ways take turns; one is left out where its packages
(webdataset and torch; crc32c with tfrecord or tensorflow-cpu) are not installed. Exits with 1 when memory grows by more than a tenth
after a quarter of the clips, or when reading is under 100 x the flow on the fly or under 1 x another container.
"""

import argparse
import dataclasses
import importlib.util
import io
import itertools
import os
import pathlib
import statistics
import struct
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from common import cores, run, texture, timed, write_dataset

from motif_jax.config import Config, DataConfig, PrepareConfig
from motif_jax.data import records, shards

FRAMES, HEIGHT, WIDTH = 16, 320, 512
SHUFFLE = 50  # elements of the shuffle buffers
BATCH = 8  # clips


def seconds(call: Callable[[], object], rounds: int = 3, parts: int = 1) -> tuple[float, float]:
    """Median (wall-clock, CPU) time of a call, over its number of parts."""
    taken = [timed(call) for _ in range(rounds)]
    wall, cpu = (statistics.median(column) / parts for column in zip(*taken, strict=True))
    return wall, cpu


def steps(video: pathlib.Path, weights: str, folder: pathlib.Path) -> float:
    """Prints the table of steps; returns the seconds of decoding and flow on the fly, by the fastest estimator."""
    from motif_jax.data import videos
    from motif_jax.motion.estimators import make_flow_estimator

    def decode() -> videos.Clip:
        return videos.read_clip(video, FRAMES, HEIGHT, WIDTH, lambda n: (n // 3, 4))

    clip = decode()
    layout = records.Layout(FRAMES, HEIGHT, WIDTH, 8)
    encoded = [records.encode_image(f, "jpeg") for f in clip.frames]
    values = vars(clip) | {"clip_id": "a", "video": "a.mp4", "caption": "a texture moves", "flow": np.zeros((FRAMES, *layout.grid, 2))}
    record = records.encode_clip(layout, values)
    shard = shards.Shard("train", 0, 1, (0,))
    (folder / "manifests").mkdir()
    rows = {
        "decode a clip": seconds(decode),
        "decode a clip, watching for cuts": seconds(
            lambda: videos.read_clip(video, FRAMES, HEIGHT, WIDTH, lambda n: (n // 3, 4), thumbnails=True)
        ),
        "16 JPEG encoded": seconds(lambda: [records.encode_image(f, "jpeg") for f in clip.frames]),
        "16 JPEG decoded": seconds(lambda: records.decode_clip(layout, record, ("frames",))),
        f"write a record of {len(record) / 1e3:.0f} kB, synced": seconds(
            lambda: shards.write_shard(folder, shard, "", "", [record] * 50), parts=50
        ),
        "flow by DIS": seconds(lambda: make_flow_estimator("dis").flow(clip.frames), 1),
    }
    if weights:
        estimator = make_flow_estimator("raft_small", weights)
        estimator.flow(clip.frames)
        rows["flow by RAFT-small, 12 iterations"] = seconds(lambda: estimator.flow(clip.frames), 1)
    print(f"| step ({sum(map(len, encoded)) / 1e3:.0f} kB of JPEG a clip) | s per clip | CPU s | clips/s |\n|---|---|---|---|")
    for name, (wall, cpu) in rows.items():
        print(f"| {name} | {wall:.3f} | {cpu:.3f} | {1 / wall:.2f} |", flush=True)
    return rows["decode a clip"][0] + rows["flow by DIS"][0]


def write_tfrecord(path: str, made: list[bytes]) -> None:
    """The records as a TFRecord file: length, its checksum, content, its checksum."""
    import crc32c

    def masked(data: bytes) -> bytes:
        value = crc32c.crc32c(data)
        return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    with open(path, "wb") as file:
        for record in made:
            length = struct.pack("<Q", len(record))
            file.write(length + masked(length) + record + masked(record))


def tf_data(path: str, layout: records.Layout) -> Iterator[dict]:
    """The same batches by TensorFlow's input pipeline, parsed by its own operations on all cores."""
    import tensorflow as tf

    arrays = layout.arrays()
    features = {name: tf.io.FixedLenFeature((), tf.string) for name in ("caption", *arrays)}
    features |= {"fps": tf.io.FixedLenFeature((), tf.float32), "frame_stride": tf.io.FixedLenFeature((), tf.int64)}

    def parse(batch: object) -> dict:
        found = tf.io.parse_example(batch, features)
        for name, (shape, dtype) in arrays.items():
            found[name] = tf.reshape(tf.io.decode_raw(found[name], tf.as_dtype(np.dtype(dtype))), (-1, *shape))
        return found

    data = tf.data.TFRecordDataset(path).shuffle(SHUFFLE).batch(BATCH, drop_remainder=True)
    return data.map(parse, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def reading(count: int, folder: pathlib.Path, on_the_fly: float | None) -> list[str]:
    """Prints the table of containers; returns what falls short. Every way gives the same batches of BATCH clips."""
    from motif_jax.data import pipeline

    config = Config()  # the paper's sizes
    made = write_dataset(config, folder / "dataset", count, 50)
    dataset = pipeline.open_dataset(dataclasses.replace(config.data, path=str(folder / "dataset")))
    collate = pipeline.Collate(dataset.layout, len)  # captions are stored as embeddings: nothing is tokenized

    def ours() -> Iterator[dict]:
        batches = pipeline.make_iterator(dataset, BATCH, 0, 0, len)
        try:
            yield from itertools.islice(batches, count // BATCH)
        finally:
            batches.close()

    def batched(found: Iterable[bytes]) -> Iterator[dict]:
        found = iter(found)
        return (collate(itertools.islice(found, BATCH), BATCH) for _ in range(count // BATCH))

    ways = {"ours: ArrayRecord through Grain, random order": ours}
    if importlib.util.find_spec("webdataset") and importlib.util.find_spec("torch"):
        import webdataset

        with tarfile.open(folder / "a.tar", "w") as tar:
            for i, record in enumerate(made):
                member = tarfile.TarInfo(f"{i:06d}.clip")
                member.size = len(record)
                tar.addfile(member, io.BytesIO(record))
        ways["WebDataset, shuffle buffer"] = lambda: batched(
            x["clip"] for x in webdataset.WebDataset(str(folder / "a.tar"), shardshuffle=False).shuffle(SHUFFLE)
        )
    if importlib.util.find_spec("crc32c"):
        path = str(folder / "a.tfrecord")
        write_tfrecord(path, made)
        if importlib.util.find_spec("tensorflow"):  # which cannot be in one process with the package tfrecord
            ways["TFRecord through tf.data, shuffle buffer, checksums verified"] = lambda: tf_data(path, dataset.layout)
        elif importlib.util.find_spec("tfrecord"):
            from tfrecord.iterator_utils import shuffle_iterator
            from tfrecord.reader import tfrecord_iterator

            # Its buffer is reused, so that what waits in the shuffle buffer has to be copied.
            ways["TFRecord through the package tfrecord, shuffle buffer, checksums not read"] = lambda: batched(
                shuffle_iterator(map(bytes, tfrecord_iterator(path)), SHUFFLE)
            )
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(7):
        for name, way in ways.items():
            began = time.perf_counter()
            assert sum(len(batch["flow"]) for batch in way()) == count
            taken[name].append(time.perf_counter() - began)
    rates = {name: count / statistics.median(times) for name, times in taken.items()}
    if on_the_fly:
        rates["decode and DIS on the fly"] = 1 / on_the_fly
    rate, *_ = rates.values()
    print(f"\n| reading records of {len(made[0]) / 1e3:.0f} kB | clips/s | ours is faster by |\n|---|---|---|")
    for name, other in rates.items():
        print(f"| {name} | {other:.1f} | {rate / other:.2f} |", flush=True)
    return [f"{name}: {rate / other:.2f} x" for name, other in rates.items() if rate / other < (100 if "fly" in name else 1)]


def memory(count: int, folder: pathlib.Path) -> list[str]:
    """Prints resident memory while `prepare` makes `count` clips of videos; returns a complaint when it grows."""
    from motif_jax import preparation
    from motif_jax.data.videos import save_video
    from motif_jax.motion.estimators import make_flow_estimator

    lines = ["video,caption"]
    for i in range(10):
        save_video(folder / f"{i}.mp4", texture(60, 128, 128, seed=i), 24)
        lines.append(f"{i}.mp4,texture {i}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    at: dict[int, float] = {}

    class Watched:
        """DIS that notes the memory of the process at every clip."""

        def __init__(self) -> None:
            self._estimator, self._calls = make_flow_estimator("dis"), itertools.count(1)

        def flow(self, frames: np.ndarray) -> np.ndarray:
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])  # of Linux alone
            at[next(self._calls)] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
            return self._estimator.flow(frames)

        def describe(self) -> dict:
            return self._estimator.describe()

    p = PrepareConfig(flow="dis", clips_per_video=-(-count // 10), clips_per_shard=50, validation_share=0.0)
    config = dataclasses.replace(Config(), data=DataConfig(frames=8, height=96, width=96), prepare=p)
    preparation.prepare(config, str(folder / "list.csv"), folder / "out", estimator=Watched(), log=lambda line: None)
    done = sorted(at)[-1]
    shown = [max(1, done // part) for part in (10, 4, 2, 1)]
    print("\n| clips made | resident memory, MB |\n|---|---|")
    for n in shown:
        print(f"| {n} | {at[n]:.0f} |", flush=True)
    growth = at[done] / at[shown[1]]  # buffers and caches have their size by then
    return [f"memory grew by {growth:.2f} x from clip {shown[1]} to {done}"] if growth > 1.1 else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", help="decode this file (default: a texture of 1280x720)")
    parser.add_argument("--weights", default="", help="RAFT-small's, to time its flow too")
    parser.add_argument(
        "--clips", type=int, default=2000, help="records to read; of a few hundred, Grain's shuffle is slow to find the next"
    )
    parser.add_argument("--memory_clips", type=int, default=1000)
    parser.add_argument("--tables", nargs="+", default=["memory", "steps", "reading"], choices=["memory", "steps", "reading"])
    options = parser.parse_args()
    from motif_jax.data.videos import save_video

    print(f"{cores()} cores, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        video = pathlib.Path(options.video).resolve(strict=True) if options.video else folder / "video.mp4"
        if not options.video:
            save_video(video, texture(200, 720, 1280), 24)
        short = memory(options.memory_clips, folder) if "memory" in options.tables else []  # first, in a small process
        on_the_fly = steps(video, options.weights, folder) if "steps" in options.tables else None
        short += reading(options.clips, folder, on_the_fly) if "reading" in options.tables else []
    if short:
        sys.exit(f"benchmarks/shards.py: {'; '.join(short)}")


if __name__ == "__main__":
    run(main)
