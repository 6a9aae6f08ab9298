"""Batches for training: a dataset directory and a step in; numpy batches out, the same for any number of hosts and workers.

The data state is the step. Batch s of the run is a function of (dataset, global batch, seed, s): nothing of the iterator is
saved, and a run may continue on another number of hosts. Nothing is filtered here; that is `prepare`'s business.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float16, UInt8

from motif_jax.config import DataConfig, UserError
from motif_jax.data import records
from motif_jax.data.shards import Manifest, read_manifest

Batch = dict[str, np.ndarray]
Tokenizer = Callable[[Sequence[str]], np.ndarray]
_FIELDS = ("caption", "fps", "frame_stride", "frames")


@dataclass(frozen=True)
class Example:
    """One record as it is shown to people; `fps` are the clip's own frames per second."""

    clip_id: str
    caption: str
    fps: float
    frames: UInt8[np.ndarray, "T H W 3"]
    flow: Float16[np.ndarray, "T h w 2"]
    motion_mask: UInt8[np.ndarray, "T h w"] | None


class Dataset:
    """The records of one split, by index; what `make_iterator` shuffles."""

    def __init__(self, manifest: Manifest, split: str, data: DataConfig | None = None) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.manifest, self.split, self.data = manifest, split, data or DataConfig()
        self._source = ArrayRecordDataSource([str(manifest.directory / name) for name, _, _ in manifest.shards[split]])
        if len(self._source) != manifest.count(split):
            # A file that was never closed opens as an empty one, without an error.
            raise UserError(
                f"dataset {manifest.directory}: {len(self._source)} records in split {split}, {manifest.count(split)} in dataset.json; "
                "run the same motif_jax.prepare again"
            )

    @property
    def fingerprint(self) -> str:
        """sha256 of the layout and of every byte of every shard."""
        return self.manifest.fingerprint

    @property
    def layout(self) -> records.Layout:
        return self.manifest.layout

    @property
    def source(self) -> Any:
        """Random access to the raw records, for Grain."""
        return self._source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        clip = records.decode_clip(self.layout, self._source[index])
        fps = clip["fps"] / clip["frame_stride"]
        return Example(clip["clip_id"], clip["caption"], fps, clip["frames"], clip["flow"], clip.get("motion_mask"))


def open_dataset(data: DataConfig, split: str = "train") -> Dataset:
    """Opens a split of the dataset at `data.path` and checks that it is whole and has the configured shape.

    Raises UserError with the remedy when it is missing, unfinished, damaged, of another shape, or has no such split.
    """
    manifest = read_manifest(data.path)
    layout = manifest.layout
    for name in ("frames", "height", "width"):
        if getattr(layout, name) != getattr(data, name):
            raise UserError(
                f"dataset {manifest.directory} has clips of {layout.frames} frames of {layout.height}x{layout.width}, the configuration "
                f"says data.{name}={getattr(data, name)}; use the one it was prepared with, or prepare again into another directory"
            )
    if split not in manifest.shards:
        raise UserError(f"dataset {manifest.directory} has no split {split!r}; it has {', '.join(manifest.shards)}")
    return Dataset(manifest, split, data)


def make_iterator(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    start_step: int,
    tokenizer: Tokenizer,
    host_index: int | None = None,
    host_count: int | None = None,
) -> Iterator[Batch]:
    """This host's part of the batches start_step, start_step + 1, ... without end; close() it when done.

    Every epoch is a new permutation of all records. Host h of n takes elements h, h + n, ... of the one global order, so that
    n hosts together see exactly what one host would. Yields frames uint8 [B,T,H,W,3], tokens int32 [B,L], flow float16
    [B,T,h,w,2], fps float32 [B] (frames shown per second: source rate over stride), and motion_mask uint8 [B,T,h,w] if stored.
    Raises UserError when batch_size (the global one) does not divide by the number of hosts.
    """
    import grain

    index, count = _hosts(batch_size, host_index, host_count)
    data = dataset.data
    order = grain.MapDataset.source(dataset.source).seed(seed).shuffle()
    # Repeat before slicing: a finite dataset would give hosts epochs of different lengths, and they would fall out of step.
    batches = (
        order.repeat(None)[index::count]
        .map(_Parse(dataset.layout))
        .batch(batch_size // count, batch_fn=_Collate(dataset.layout, tokenizer))
    )
    # The buffer counts whole batches; Grain's default of 500 would hold gigabytes.
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.prefetch)
    stream = batches[start_step:].to_iter_dataset(options)
    if data.workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which only absl's own main parses
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2))
    return iter(stream)


def validation_batches(
    data: DataConfig,
    batch_size: int,
    batches: int,
    tokenizer: Tokenizer,
    host_index: int | None = None,
    host_count: int | None = None,
) -> Sequence[Batch]:
    """This host's part of the first `batches` whole batches of the validation split, always the same; decoded when asked for.

    A split smaller than one batch is repeated to fill it; without a validation split the sequence is empty.
    """
    index, count = _hosts(batch_size, host_index, host_count)
    if "validation" not in read_manifest(data.path).shards:
        return ()
    dataset = open_dataset(data, "validation")
    total = max(1, min(batches, len(dataset) // batch_size))
    return _Batches(
        dataset, tokenizer, [[i % len(dataset) for i in range(b * batch_size + index, (b + 1) * batch_size, count)] for b in range(total)]
    )


def examples(data: DataConfig, count: int) -> list[Example]:
    """The first `count` validation clips, or training clips where nothing is held out; fewer if there are fewer."""
    shards = read_manifest(data.path).shards
    dataset = open_dataset(data, "validation" if "validation" in shards else "train")
    return [dataset[i] for i in range(min(count, len(dataset)))]


class _Parse:
    """Bytes of a record -> dict of one clip; a class, so that worker processes can receive it."""

    def __init__(self, layout: records.Layout) -> None:
        self._layout = layout
        self._names = (*_FIELDS, *layout.arrays())

    def __call__(self, record: bytes) -> dict[str, Any]:
        return records.decode_clip(self._layout, record, self._names)


class _Collate:
    """Clips -> batch."""

    def __init__(self, layout: records.Layout, tokenizer: Tokenizer) -> None:
        self._arrays, self._tokenizer = ("frames", *layout.arrays()), tokenizer

    def __call__(self, clips: Sequence[dict[str, Any]]) -> Batch:
        batch = {name: np.stack([clip[name] for clip in clips]) for name in self._arrays}
        batch["tokens"] = np.asarray(self._tokenizer([clip["caption"] for clip in clips]), np.int32)
        batch["fps"] = np.array([clip["fps"] / clip["frame_stride"] for clip in clips], np.float32)
        return batch


class _Batches(Sequence):
    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, indices: list[list[int]]) -> None:
        self._source, self._indices = dataset.source, indices
        self._parse, self._collate = _Parse(dataset.layout), _Collate(dataset.layout, tokenizer)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, batch: int) -> Batch:
        return self._collate([self._parse(self._source[i]) for i in self._indices[batch]])


def _hosts(batch_size: int, index: int | None, count: int | None) -> tuple[int, int]:
    if index is None or count is None:
        import jax

        index, count = jax.process_index(), jax.process_count()
    if batch_size % count:
        raise UserError(f"batch_size={batch_size}: must be a multiple of the {count} hosts")
    return index, count
