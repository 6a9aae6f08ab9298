"""Batches for training: dataset directories and a step in; numpy batches out, the same for any number of processes and workers.

The data state is the step. Batch s of the run is a function of (dataset, global batch, seed, s): nothing of the iterator is
saved, and a run may continue on another number of hosts. Nothing is filtered here; that is `prepare`'s business.
"""

import bisect
import itertools
import math
import multiprocessing
import os
import pathlib
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16, UInt8

from motif_jax.config import DataConfig
from motif_jax.data import records
from motif_jax.data.shards import Manifest, digest, read_manifest
from motif_jax.data.storage import Path
from motif_jax.errors import UserError

Batch = dict[str, np.ndarray]
Tokenizer = Callable[[Sequence[str]], np.ndarray]

_OTHER_OPEN_FILES = 512  # libraries, logs, checkpoints, connections
_FILES_PER_THREAD = 3  # that ArrayRecord holds open at most for a shard in a store and each thread that reads it: its connections stay


@dataclass(frozen=True)
class Example:
    """One record as it is shown to people; `fps` are the clip's own frames per second. Frames are None where only latents are stored."""

    clip_id: str
    caption: str
    fps: float
    frames: UInt8[np.ndarray, "T H W 3"] | None
    flow: Float16[np.ndarray, "T h w 2"]
    motion_mask: UInt8[np.ndarray, "T h w"] | None = None
    latent_moments: Float16[np.ndarray, "T h2 w2 C2"] | None = None


class _Records(Sequence):
    """The raw records of one split of some datasets, by index. Raises UserError that names the shard which cannot be read."""

    def __init__(self, manifests: Sequence[Manifest], split: str, threads: int) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        _allow_open_files(manifests, threads)
        self._split = split
        shards = [(manifest.directory / name, count) for manifest in manifests for name, count, _ in manifest.shards[split]]
        self._paths = [path for path, _ in shards]
        self._ends = list(itertools.accumulate(count for _, count in shards))
        # With a count nothing is opened until it is read: an object in a store would cost a request, and appears whole or not at all.
        named = [str(path) if isinstance(path, pathlib.Path) else f"{path}[0:{count}]" for path, count in shards]
        try:
            self._source = ArrayRecordDataSource(named)
            if len(self._source) == self._ends[-1]:
                return
        except RuntimeError:
            pass
        for name, (path, count) in zip(named, shards, strict=True):
            try:
                found = len(ArrayRecordDataSource([name]))
            except RuntimeError as error:
                raise self._fault(path, error) from error
            if found != count:  # a file that was never closed opens as an empty one, without an error
                raise self._fault(path, f"{found} records of {count}")

    def _fault(self, path: Path, reason: Exception | str) -> UserError:
        allowed = "" if isinstance(path, pathlib.Path) else "if the store lets you read it, "
        reason = " ".join(str(reason).split())  # a store answers in many lines
        return UserError(
            f"dataset {path.parent}: split {self._split}, shard {path.name} cannot be read ({reason}): {allowed}run the same "
            "motif_jax.prepare command again, which repairs it"
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return self._source[index]
        except RuntimeError as error:
            raise self._fault(self._paths[bisect.bisect_right(self._ends, index)], error) from error


def _allow_open_files(manifests: Sequence[Manifest], threads: int) -> None:
    """Lets the process and its workers hold all shards open, as reading in random order does; the usual limit is 1,024 files.

    Without a descriptor to spare, ArrayRecord would wait for one. Raises UserError where the system does not allow as many.
    """
    shards = objects = 0
    for manifest in manifests:
        count = sum(map(len, manifest.shards.values()))
        shards += count
        objects += 0 if isinstance(manifest.directory, pathlib.Path) else count
    # How many threads meet in one shard is chance: the limit is raised for all of them, and refused if it does not bear one.
    least, wanted = (_OTHER_OPEN_FILES + shards + (_FILES_PER_THREAD * n - 1) * objects for n in (1, threads))
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft >= wanted:
        return
    if hard >= least:
        try:
            return resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), resource.RLIM_INFINITY if hard == math.inf else hard))
        except ValueError:  # macOS names no limit, and takes none over kern.maxfilesperproc
            hard = soft
    raise UserError(
        f"dataset {_directories(manifests)} has {shards} shards, which training holds open, and this process may open {hard} files: "
        f"raise the limit (ulimit -Hn) to {wanted}, or prepare with a larger prepare.clips_per_shard"
    )


def _directories(manifests: Sequence[Manifest]) -> str:
    return ",".join(str(manifest.directory) for manifest in manifests)


class Dataset(Sequence):
    """The records of one split of one or several prepared datasets, by index; what `make_iterator` shuffles."""

    def __init__(self, manifests: Sequence[Manifest], split: str, data: DataConfig | None = None) -> None:
        self.manifests, self.split, self.data = manifests, split, data or DataConfig()
        self.layout = manifests[0].layout
        self.source = _Records(manifests, split, self.data.threads)  # the raw records

    @property
    def fingerprint(self) -> str:
        """sha256 of the layout and of every byte of every shard."""
        fingerprints = [manifest.fingerprint for manifest in self.manifests]
        return fingerprints[0] if len(fingerprints) == 1 else digest(fingerprints)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        clip = records.decode_clip(self.layout, self.source[index])
        fps = clip["fps"] / clip["frame_stride"]
        optional = (clip.get(name) for name in ("motion_mask", "latent_moments"))
        return Example(clip["clip_id"], clip["caption"], fps, clip.get("frames"), clip["flow"], *optional)


def read_manifests(data: DataConfig) -> list[Manifest]:
    """The datasets at `data.path`, one directory or URL of gs:// or several with commas between, in its order.

    Raises UserError unless they are whole, of the configured shape and alike in fields.
    """
    manifests = [read_manifest(path.strip()) for path in ([data.path] if os.path.isdir(data.path) else data.path.split(","))]
    first = manifests[0].layout
    for manifest in manifests:
        layout = manifest.layout
        for name in ("frames", "height", "width"):
            if getattr(layout, name) != getattr(data, name):
                raise UserError(
                    f"dataset {manifest.directory} has clips of {layout.frames} frames of {layout.height}x{layout.width}, the "
                    f"configuration says data.{name}={getattr(data, name)}; use the one it was prepared with, or prepare again into "
                    "another directory"
                )
        if (layout.names(), layout.arrays()) != (first.names(), first.arrays()):
            raise UserError(
                f"data.path={data.path}: the records of {manifest.directory} hold {_fields(layout)}, those of {manifests[0].directory} "
                f"{_fields(first)}; prepare both with the same settings for masks, latents, text_embeddings, frames and flow_stride"
            )
    return manifests


def _fields(layout: records.Layout) -> str:
    shapes = {name: shape for name, (shape, _) in layout.arrays().items()}
    return ", ".join([*(["frames"] if layout.pixels else []), *(f"{name} {shape}" for name, shape in shapes.items())])


def open_dataset(data: DataConfig, split: str = "train") -> Dataset:
    """Opens a split of the dataset, or datasets, at `data.path` and checks that each is whole and has the configured shape.

    Raises UserError with the remedy when one is missing, unfinished, damaged or of another shape, or none has such a split.
    """
    manifests = read_manifests(data)
    having = [manifest for manifest in manifests if split in manifest.shards]
    if not having:
        raise UserError(f"dataset {_directories(manifests)} has no split {split!r}; it has {', '.join(manifests[0].shards)}")
    return Dataset(having, split, data)


def make_iterator(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    start_step: int,
    tokenizer: Tokenizer,
    rows: Sequence[int] | None = None,
    image: bool = False,
) -> Iterator[Batch]:
    """The batches start_step, start_step + 1, ... without end; close() it when done.

    batch_size is the global one; `rows` are the positions in it that this process reads (default: all), so that processes
    together see exactly what one would, each clip in its place. Every epoch is a new permutation of all records. Yields frames
    uint8 [R,T,H,W,3], tokens int32 [R,L], flow float16 [R,T,h,w,2], fps float32 [R] (frames shown per second: source rate over
    stride), and motion_mask uint8 [R,T,h,w] if stored. Where they are stored, latent_moments float16 [R,T,h,w,2C] take the place
    of frames, of which `image` keeps the first (image uint8 [R,H,W,3]), and text_embedding float16 [R,L,D] that of tokens.
    """
    import grain

    data = dataset.data
    # Of indices: nothing is read yet. Grain's endless repeat has a length of 2^63 - 1, of which batches of one cannot be counted.
    order = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat(2**60 // len(dataset))
    batches = order.batch(batch_size).map(_Read(dataset, tokenizer, range(batch_size) if rows is None else rows, image))
    # The buffer counts whole batches; Grain's default of 500 would hold gigabytes.
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.prefetch)
    stream = batches[start_step:].to_iter_dataset(options)
    if data.workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which only absl's own main parses
        options = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2)
        stream = stream.mp_prefetch(options, worker_init_fn=_leave_signals_to_the_parent)
    return iter(stream)


def _leave_signals_to_the_parent(index: int, count: int) -> None:
    """A worker goes on until its iterator is closed, or the parent is gone: on its way to a save the loop may need more batches."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def validation_batches(
    data: DataConfig, batch_size: int, batches: int, tokenizer: Tokenizer, rows: Sequence[int] | None = None, image: bool = False
) -> "_Batches | tuple[()]":
    """The rows `rows` (default: all) of the first `batches` whole batches of the validation split, decoded when asked for.

    Always the same, with arrays as in `make_iterator`. A split smaller than one batch is repeated to fill it; without a validation split
    the sequence is empty. `distinct` of it says how many clips of the whole batches are different ones, which come first.
    """
    if not holds_out(data):
        return ()
    dataset = open_dataset(data, "validation")
    total = max(1, min(batches, len(dataset) // batch_size))
    read = _Read(dataset, tokenizer, range(batch_size) if rows is None else rows, image)
    indices = [[i % len(dataset) for i in range(b * batch_size, (b + 1) * batch_size)] for b in range(total)]
    return _Batches(read, indices, min(len(dataset), total * batch_size))


def holds_out(data: DataConfig) -> bool:
    """Whether the dataset at `data.path` has validation clips. Raises UserError, as `read_manifests` does."""
    return any("validation" in manifest.shards for manifest in read_manifests(data))


def examples(data: DataConfig, count: int) -> list[Example]:
    """The first `count` validation clips, or training clips where nothing is held out; fewer if there are fewer."""
    dataset = open_dataset(data, "validation" if holds_out(data) else "train")
    return [dataset[i] for i in range(min(count, len(dataset)))]


class Collate:
    """Records of one batch -> its arrays. Every record goes into its row as soon as it is read, while it is in the processor's cache."""

    def __init__(self, layout: records.Layout, tokenizer: Tokenizer, image: bool = False) -> None:
        self._layout, self._tokenizer, self._fields = layout, tokenizer, layout.batch(image)

    def __call__(self, found: Iterable[bytes], count: int) -> Batch:
        names = ("caption", "frame_stride", *self._fields)
        batch = {name: np.empty((count, *shape), dtype) for name, (shape, dtype) in self._fields.items()}
        captions = []
        for row, record in enumerate(found):
            clip = records.decode_clip(self._layout, record, names)
            for name in self._fields:
                batch[name][row] = clip[name]
            batch["fps"][row] /= clip["frame_stride"]
            captions.append(clip["caption"])
        if "text_embedding" not in batch:
            batch["tokens"] = np.asarray(self._tokenizer(captions), np.int32)
        return batch


class _Read:
    """Indices of a global batch -> the clips of some of its rows; a class, so that worker processes can receive it."""

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, rows: Sequence[int], image: bool) -> None:
        self._source, self._rows, self._collate = dataset.source, rows, Collate(dataset.layout, tokenizer, image)

    def __call__(self, indices: Sequence[int]) -> Batch:
        return self._collate((self._source[int(indices[row])] for row in self._rows), len(self._rows))


class _Batches(Sequence):
    def __init__(self, read: _Read, indices: list[list[int]], distinct: int) -> None:
        self._read, self._indices, self.distinct = read, indices, distinct

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, batch: int) -> Batch:
        return self._read(self._indices[batch])
