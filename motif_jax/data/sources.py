"""Where clips come from: videos with captions, or a synthetic world. A source's clips in; one record each, or why not, out.

Everything a record holds is a function of its item and the source's settings, whatever is made before or beside it.
"""

import collections
import dataclasses
import hashlib
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

from motif_jax.config import Config, UserError
from motif_jax.data import records, sprites, videos
from motif_jax.data.captions import Entry, Problem
from motif_jax.data.shards import Skipped

DEFAULT_SYNTHETIC_CLIPS = 1000
_PIXELS_AT_ONCE = 2**24  # of a synthetic world, which makes many clips in one go


@dataclass(frozen=True, slots=True)
class Item:
    """A clip to be made: the `number`-th of a video, or of a synthetic world."""

    clip_id: str
    video: str
    caption: str
    number: int
    path: pathlib.Path | None = None
    mask: pathlib.Path | None = None


class FlowEstimator(Protocol):
    """See `motion.estimators.make_flow_estimator`."""

    def flow(self, frames_THW3: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "T h w 2"]: ...

    def describe(self) -> dict[str, Any]: ...


class Source(Protocol):
    """What the offline job needs to know about its input."""

    items: dict[str, Sequence[Item]]  # split -> clips
    problems: list[Problem]  # lines of the source that cannot become clips
    layout: records.Layout
    settings: dict[str, Any]  # everything besides the items that decides the bytes

    def outcomes(self, items: Sequence[Item]) -> Iterator[bytes | Skipped]:
        """One record, or the reason for none, per item and in their order."""


class VideoClips:
    """Clips cut from the videos of a captions file or a folder; `listed` is what `captions.read_source` made of it."""

    def __init__(self, config: Config, listed: tuple[list[Entry], list[Problem]], estimator: FlowEstimator) -> None:
        entries, self.problems = listed
        self._data, self._prepare, self._seed = config.data, config.prepare, config.seed
        masks = any(e.mask for e in entries)
        if masks:
            reason = "other lines name one, and a dataset has masks for all clips or for none"
            self.problems = self.problems + [Problem(e.video, "no mask", reason) for e in entries if not e.mask]
            entries = [e for e in entries if e.mask]
        numbers = range(config.prepare.clips_per_video)
        items = [Item(_clip_id(e, k), e.video, e.caption, k, e.path, e.mask) for e in entries for k in numbers]
        self.items = _split(items, config.prepare.validation_share)
        self._estimator = estimator
        self.layout = _layout(config, masks)
        self.settings = _settings(config, "videos", estimator)

    def outcomes(self, items: Sequence[Item]) -> Iterator[bytes | Skipped]:
        for item, decoded in zip(items, _ahead(self._decode, items), strict=True):
            if isinstance(decoded, Skipped):
                yield decoded
                continue
            clip, mask = decoded
            flow = _estimate(self._estimator, clip.frames)
            try:
                named = {"clip_id": item.clip_id, "video": item.video, "caption": item.caption}
                yield records.encode_clip(self.layout, vars(clip) | named | {"flow": flow, "motion_mask": mask})
            except ValueError as error:
                yield Skipped(item.clip_id, item.video, "unusable flow", str(error))

    def _decode(self, item: Item) -> tuple[videos.Clip, np.ndarray | None] | Skipped:
        data, p = self._data, self._prepare

        def choose(available: int) -> tuple[int, int]:
            return videos.choose_clip(available, data.frames, p.frame_stride_min, p.frame_stride_max, self._seed, item.video, item.number)

        try:
            clip = videos.read_clip(item.path, data.frames, data.height, data.width, choose)
        except videos.VideoError as error:
            return Skipped(item.clip_id, item.video, error.kind, str(error))
        if item.mask is None:
            return clip, None
        try:
            same = videos.read_clip(item.mask, data.frames, data.height, data.width, lambda _: (clip.first_frame, clip.frame_stride))
        except videos.VideoError as error:
            return Skipped(item.clip_id, item.video, "unusable mask", str(error))
        grey = same.frames.astype(np.float32).mean(-1, keepdims=True)
        return clip, np.rint(pool(grey, p.flow_stride)[..., 0]).astype(np.uint8)


class SpriteClips:
    """Clips of a synthetic world, `synthetic:NAME[:count]`; without an estimator the flow is the exact one.

    The motion mask of a cell is its share of moving pixels.
    """

    def __init__(self, config: Config, source: str, estimator: FlowEstimator | None = None) -> None:
        name, _, count = source.removeprefix("synthetic:").partition(":")
        if name not in sprites.WORLDS:
            raise UserError(f"source {source!r}: no synthetic world {name!r}; there are {', '.join(sorted(sprites.WORLDS))}")
        if count and not (count.isdecimal() and int(count) > 0):
            raise UserError(
                f"source {source!r}: {count!r} is no number of clips; write for example synthetic:{name}:{DEFAULT_SYNTHETIC_CLIPS}"
            )
        ids = [f"{name}-{i:07d}" for i in range(int(count) if count else DEFAULT_SYNTHETIC_CLIPS)]
        self._data, self._stride, self._world, self._seed = config.data, config.prepare.flow_stride, name, config.seed
        self.problems: list[Problem] = []
        self.items = _split([Item(clip_id, clip_id, "", i) for i, clip_id in enumerate(ids)], config.prepare.validation_share)
        self._held_out = {item.number for item in self.items["validation"]}
        self._estimator = estimator
        self.layout = _layout(config, motion_mask=True)
        self.settings = _settings(config, f"synthetic:{name}", estimator)

    def outcomes(self, items: Sequence[Item]) -> Iterator[bytes | Skipped]:
        at_once = max(1, _PIXELS_AT_ONCE // (self._data.frames * self._data.height * self._data.width))
        for start in range(0, len(items), at_once):
            yield from self._records(items[start : start + at_once])

    def _records(self, items: Sequence[Item]) -> Iterator[bytes]:
        d = self._data
        split = "validation" if items[0].number in self._held_out else "train"  # the same for all: a shard is of one split
        try:
            clips = sprites.make_clips(self._world, self._seed, [i.number for i in items], d.frames, d.height, d.width, split)
        except ValueError as error:
            raise UserError(f"synthetic:{self._world}: {error}") from error
        masks = np.rint(255 * pool((clips["flow"] != 0).any(-1, keepdims=True), self._stride)[..., 0]).astype(np.uint8)
        exact = pool(clips["flow"], self._stride)
        for n, item in enumerate(items):
            frames = clips["frames"][n]
            yield records.encode_clip(
                self.layout,
                {
                    "clip_id": item.clip_id,
                    "video": item.video,
                    "caption": clips["captions"][n],
                    "fps": clips["fps"],
                    "frame_stride": 1,
                    "first_frame": 0,
                    "frames": frames,
                    "flow": exact[n] if self._estimator is None else _estimate(self._estimator, frames),
                    "motion_mask": masks[n],
                },
            )


def pool(field: Float[np.ndarray, "*B H W C"], stride: int) -> Float[np.ndarray, "*B h w C"]:
    """The mean over cells of stride x stride pixels."""
    *batch, height, width, channels = field.shape
    return field.reshape(*batch, height // stride, stride, width // stride, stride, channels).mean((-4, -2), dtype=np.float32)


def identity(item: Item) -> list[Any]:
    """What a shard's fingerprint knows of a clip: a file that was replaced, or has arrived at last, makes its shard stale."""
    return [item.clip_id, item.caption, *(p.stat().st_size if p and p.exists() else None for p in (item.path, item.mask))]


def _estimate(estimator: FlowEstimator, frames: np.ndarray) -> np.ndarray:
    try:
        return estimator.flow(frames)
    except ValueError as error:  # about the clips' size, so the next clip would fail as well
        raise UserError(f"flow: {error}") from error


def _layout(config: Config, motion_mask: bool) -> records.Layout:
    d, p = config.data, config.prepare
    return records.Layout(d.frames, d.height, d.width, p.flow_stride, p.image_format, p.jpeg_quality, motion_mask)


def _settings(config: Config, source: str, estimator: FlowEstimator | None) -> dict[str, Any]:
    """All that decides the bytes besides the list of clips; weights count by content, not by where they lie."""
    settings = {"source": source, "seed": config.seed}
    settings |= {f"data.{k}": getattr(config.data, k) for k in ("frames", "height", "width")}
    settings |= {f"prepare.{k}": v for k, v in dataclasses.asdict(config.prepare).items() if k != "flow_weights"}
    described = {} if estimator is None else estimator.describe()
    return settings | {f"estimator.{k}": v for k, v in described.items() if k != "flow_weights"}


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
    """function(item) in the order of the items, worked out by a few threads a few items ahead (decoding frees the interpreter)."""
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as threads:
        waiting: collections.deque = collections.deque()
        try:
            for item in items:
                waiting.append(threads.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)
