"""Where clips come from: videos with captions, or a synthetic world. A source's clips in; one record each, or why not, out.

Everything a record holds is a function of its item and the source's settings, whatever is made before or beside it.
"""

import abc
import collections
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from motif_jax.config import Config
from motif_jax.data import records, scenes, sprites, storage, videos
from motif_jax.data.captions import Entry, Problem
from motif_jax.data.images import MediaError
from motif_jax.data.shards import Skipped
from motif_jax.errors import StoreError, UserError

DEFAULT_SYNTHETIC_CLIPS, MOST_SYNTHETIC_CLIPS = 1000, 9_999_999  # ids have seven digits
_ATTEMPTS = 8  # clips that are drawn from a video until one crosses no cut
_PIXELS_AT_ONCE = 2**24  # of a synthetic world, which makes many clips in one go


@dataclass(frozen=True, slots=True)
class Item:
    """A clip to be made: the `number`-th of a video, or of a synthetic world."""

    clip_id: str
    video: str
    caption: str
    number: int
    path: storage.File | None = None
    mask: storage.File | None = None


class FlowEstimator(Protocol):
    """See `motion.estimators.make_flow_estimator`."""

    def flow(self, frames_THW3: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "T h w 2"]: ...

    def describe(self) -> dict[str, Any]: ...


class Towers(Protocol):
    """See `motif_jax.towers.Towers`."""

    latent: tuple[int, ...]
    text: tuple[int, ...]

    def encode(self, frames_THW3: UInt8[np.ndarray, "T H W 3"], caption: str) -> dict[str, np.ndarray]: ...

    def describe(self) -> dict[str, Any]: ...


class Source(abc.ABC):
    """What the offline job needs to know about its input. Without an `estimator` clips come with their flow; masks: and with a mask."""

    items: dict[str, Sequence[Item]]  # split -> clips
    problems: Sequence[Problem] = ()  # lines of the source that cannot become clips
    layout: records.Layout
    settings: dict[str, Any]  # everything besides the items that decides the bytes; weights count by content, not by where they lie

    def __init__(
        self, config: Config, kind: str, items: Sequence[Item], masks: bool, estimator: FlowEstimator | None, towers: Towers | None
    ) -> None:
        d, p = self._data, self._prepare = config.data, config.prepare
        self._seed, self._estimator, self._towers = config.seed, estimator, towers
        self.items = _split(items, p.validation_share)
        latent, text = (towers.latent, towers.text) if towers else ((), ())
        pixels = p.frames or not latent
        self.layout = records.Layout(
            d.frames, d.height, d.width, p.flow_stride, p.image_format, p.jpeg_quality, masks, pixels, latent, text
        )
        self.settings = {"source": kind, "seed": config.seed} | {f"data.{k}": getattr(d, k) for k in ("frames", "height", "width")}
        for name, values in (("prepare", dataclasses.asdict(p)), ("estimator", estimator.describe() if estimator else {})):
            self.settings |= {f"{name}.{k}": v for k, v in values.items() if k != "flow_weights"}
        self.settings |= towers.describe() if towers else {}

    @abc.abstractmethod
    def outcomes(self, items: Sequence[Item]) -> Iterator[bytes | Skipped]:
        """One record, or the reason for none, per item and in their order. Raises UserError for what no clip of the source can have."""

    def _record(self, item: Item, clip: dict[str, Any]) -> bytes | Skipped:
        """`clip` is what `records.encode_clip` takes, but for the item's fields; its flow is estimated where there is an estimator.

        Several threads may call it: the flow of one clip is computed while others are decoded and compressed.
        """
        clip = {"caption": item.caption} | clip | {"clip_id": item.clip_id, "video": item.video}
        if self._estimator is not None:
            try:
                clip["flow"] = self._estimator.flow(clip["frames"])
            except ValueError as error:  # about the clips' size, so the next clip would fail as well
                raise UserError(f"flow: {error}") from error
        moved, p = motion(clip["flow"], self.layout.height, self.layout.width), self._prepare
        kind = "too little motion" if moved < p.motion_min else "too much motion" if moved > (p.motion_max or math.inf) else ""
        if kind:
            reason = f"{kind}: {moved:.4f} of the diagonal a frame; prepare.motion_min={p.motion_min:g}, motion_max={p.motion_max:g}"
            return Skipped(item.clip_id, item.video, kind, reason)
        if self._towers is not None:
            clip |= self._towers.encode(clip["frames"], clip["caption"])
        try:
            return records.encode_clip(self.layout, clip)
        except ValueError as error:
            return Skipped(item.clip_id, item.video, "unusable values", str(error))


class VideoClips(Source):
    """Clips cut from the videos of a captions file or a folder; `listed` is what `captions.read_source` made of it."""

    def __init__(
        self, config: Config, listed: tuple[list[Entry], list[Problem]], estimator: FlowEstimator, towers: Towers | None = None
    ) -> None:
        entries, self.problems = listed
        masks = any(e.mask for e in entries)
        if config.loss.heatmap == "mask" and not masks:
            raise UserError("loss.heatmap='mask': no line names a mask; the captions file needs a column `mask` (docs/data.md)")
        if masks:
            reason = "other lines name one, and a dataset has masks for all clips or for none"
            self.problems = self.problems + [Problem(e.video, "no mask", reason) for e in entries if not e.mask]
            entries = [e for e in entries if e.mask]
        numbers = range(config.prepare.clips_per_video)
        items = [Item(_clip_id(e, k), e.video, e.caption, k, e.path, e.mask) for e in entries for k in numbers]
        super().__init__(config, "videos", items, masks, estimator, towers)

    def outcomes(self, items: Sequence[Item]) -> Iterator[bytes | Skipped]:
        return _ahead(self._outcome, items)

    def _outcome(self, item: Item) -> bytes | Skipped:
        d = self._data
        try:
            with _on_disk(item.path) as video:
                clip = self._within_a_scene(item, video)
        except MediaError as error:
            return Skipped(item.clip_id, item.video, error.kind, str(error))
        values = dict(vars(clip))
        if item.mask is not None:

            def same_frames(available: int) -> tuple[int, int]:
                if abs(available - clip.length) > 1 + clip.length // 50:  # containers may disagree about the last ones
                    raise MediaError("another length", f"{available} frames, the video has {clip.length}")
                return clip.first_frame, clip.frame_stride

            try:
                with _on_disk(item.mask) as mask:
                    same = videos.read_clip(mask, d.frames, d.height, d.width, same_frames)
            except MediaError as error:
                return Skipped(item.clip_id, item.video, "unusable mask", f"mask {item.mask.name}: {error}")
            grey = same.frames.astype(np.float32).mean(-1, keepdims=True)
            values["motion_mask"] = np.rint(pool(grey, self._prepare.flow_stride)[..., 0]).astype(np.uint8)
        return self._record(item, values)

    def _within_a_scene(self, item: Item, video: pathlib.Path) -> videos.Clip:
        """The first of a few drawn clips that crosses no cut. Raises MediaError."""
        d, p = self._data, self._prepare

        def choose(available: int, attempt: int) -> tuple[int, int]:
            key = (self._seed, item.video, item.number, *([attempt] if attempt else []))
            return videos.choose_clip(available, d.frames, p.frame_stride_min, p.frame_stride_max, *key)

        choices = [functools.partial(choose, attempt=attempt) for attempt in range(_ATTEMPTS if p.cut_threshold else 1)]
        for clip in videos.read_clips(video, d.frames, d.height, d.width, choices, thumbnails=p.cut_threshold > 0):
            if clip.thumbnails is None or not len(scenes.cuts(clip.thumbnails, p.cut_threshold)):
                return clip
        raise MediaError("scene cut", f"in each of {_ATTEMPTS} clips that were tried")


class SpriteClips(Source):
    """Clips of a synthetic world, `synthetic:NAME[:count]`; without an estimator the flow is the exact one.

    The motion mask of a cell is its share of moving pixels.
    """

    def __init__(self, config: Config, source: str, estimator: FlowEstimator | None = None, towers: Towers | None = None) -> None:
        name, _, count = source.removeprefix("synthetic:").partition(":")
        if name not in sprites.WORLDS:
            raise UserError(f"source {source!r}: no synthetic world {name!r}; there are {', '.join(sorted(sprites.WORLDS))}")
        if count and not (count.isdecimal() and 0 < int(count) <= MOST_SYNTHETIC_CLIPS):
            raise UserError(
                f"source {source!r}: {count!r} is no number of clips from 1 to {MOST_SYNTHETIC_CLIPS}; "
                f"write for example synthetic:{name}:{DEFAULT_SYNTHETIC_CLIPS}"
            )
        ids = [f"{name}-{i:07d}" for i in range(int(count) if count else DEFAULT_SYNTHETIC_CLIPS)]
        items = [Item(clip_id, clip_id, "", i) for i, clip_id in enumerate(ids)]
        super().__init__(config, f"synthetic:{name}", items, True, estimator, towers)
        self._world, self._held_out = name, {item.number for item in self.items["validation"]}

    def outcomes(self, items: Sequence[Item]) -> Iterator[bytes | Skipped]:
        at_once = max(1, _PIXELS_AT_ONCE // (self._data.frames * self._data.height * self._data.width))
        for start in range(0, len(items), at_once):
            yield from self._records(items[start : start + at_once])

    def _records(self, items: Sequence[Item]) -> Iterator[bytes | Skipped]:
        d = self._data
        split = "validation" if items[0].number in self._held_out else "train"  # the same for all: a shard is of one split
        try:
            clips = sprites.make_clips(self._world, self._seed, [i.number for i in items], d.frames, d.height, d.width, split)
        except ValueError as error:
            raise UserError(f"synthetic:{self._world}: {error}") from error
        masks = np.rint(255 * pool((clips["flow"] != 0).any(-1, keepdims=True), self._prepare.flow_stride)[..., 0]).astype(np.uint8)
        exact = pool(clips["flow"], self._prepare.flow_stride)
        for n, item in enumerate(items):
            clip = {"caption": clips["captions"][n], "fps": clips["fps"], "frame_stride": 1, "first_frame": 0}
            yield self._record(item, clip | {"frames": clips["frames"][n], "flow": exact[n], "motion_mask": masks[n]})


def motion(flow_Thw2: Float[np.ndarray, "T h w 2"], height: int, width: int) -> float:
    """Mean |flow| over the image diagonal; the last field repeats the one before and does not count."""
    u, v = np.moveaxis(np.asarray(flow_Thw2[:-1], np.float32), -1, 0)
    return float(np.hypot(u, v).mean() / math.hypot(height, width))


def pool(field: Float[np.ndarray, "*B H W C"], stride: int) -> Float[np.ndarray, "*B h w C"]:
    """The mean over cells of stride x stride pixels."""
    *batch, height, width, channels = field.shape
    return field.reshape(*batch, height // stride, stride, width // stride, stride, channels).mean((-4, -2), dtype=np.float32)


@contextlib.contextmanager
def _on_disk(path: storage.File) -> Iterator[pathlib.Path]:
    """The file, or a copy of it for the time of the block. Raises MediaError where there is none; StoreError."""
    try:
        with storage.local_copy(path) as local:
            yield local
    except FileNotFoundError as error:
        raise MediaError("missing file") from error


def identities(items: Sequence[Item]) -> list[list[Any]]:
    """What a shard's fingerprint knows of its clips: a file that was replaced, or has arrived at last, makes the shard stale.

    A file is known by its size and the sha256 of its first and last 64 KiB, wherever it lies. Raises StoreError.
    """
    return storage.side_by_side(lambda item: [item.clip_id, item.caption, *(p and _ends(p) for p in (item.path, item.mask))], items)


def gone(item: Item) -> bool:
    """Whether a file of the clip is not there, or cannot be read."""
    return any(p and _ends(p) is None for p in (item.path, item.mask))


def _ends(path: storage.File) -> list[Any] | None:
    if isinstance(path, pathlib.Path) and not os.path.isfile(path):
        return None
    try:
        return storage.ends(path)
    except StoreError:
        raise
    except OSError:
        return None


def _clip_id(entry: Entry, number: int) -> str:
    stem = re.sub(r"[^A-Za-z0-9_]+", "_", posixpath.splitext(posixpath.basename(entry.video))[0])[:40]
    key = hashlib.sha256(f"{entry.video}\n{entry.caption}".encode()).hexdigest()
    return f"{stem}-{key[:12]}-{number}"


def _split(items: Sequence[Item], validation_share: float) -> dict[str, list[Item]]:
    """A video belongs to validation by its id, so that neither its other clips nor another list bring it into training."""
    split: dict[str, list[Item]] = {"train": [], "validation": []}
    for item in items:
        held_out = videos.stable_draw(2**32, "validation", item.video) < validation_share * 2**32
        split["validation" if held_out else "train"].append(item)
    # Of a handful of videos chance may hold out every one.
    return split if split["train"] else {"train": split["validation"], "validation": []}


def _ahead(function: Callable[[Item], Any], items: Sequence[Item]) -> Iterator[Any]:
    """function(item) in the order of the items, worked out by threads a few items ahead (what takes long frees the interpreter)."""
    workers = min(32, 2 + (os.cpu_count() or 1))
    threads = ThreadPoolExecutor(workers)
    waiting: collections.deque = collections.deque()
    try:
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
