"""Video files in and out of arrays.

In: a file of any container and codec that FFmpeg reads. Out: T frames of one size, uint8 RGB, taken at equal distances in
time; which ones is a function of the seed and the video's id alone. A file that cannot give them raises `MediaError`.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from jaxtyping import UInt8
from PIL import Image

from motif_jax.data.images import MediaError, cover, on_white
from motif_jax.data.storage import replacing

Choose = Callable[[int], tuple[int, int]]

THUMBNAIL = (64, 36)  # width, height
# A pause longer than this many seconds and ten frames is a jump of the clock (a cut, a paused recorder), not a still.
_LONGEST_STILL = 1.0
# Where a frame lasts this many usual steps on average, clips would be stills, and a list of all steps larger than memory.
_LONGEST_HOLD = 100
_MOST_PIXELS = 100_000_000  # of a frame; a few megabytes of PNG can hold more, and many threads decode side by side
# What a damaged file makes FFmpeg, its Python binding and arithmetic with the file's numbers raise.
_DAMAGE = (av.error.FFmpegError, OSError, ValueError, LookupError, ArithmeticError, MemoryError)

# Tags may be in any encoding, and are not used; PyAV 19 reads none before it is asked.
_ANY_TAGS = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


@dataclass(frozen=True)
class Clip:
    """T frames and how they were taken: every `frame_stride`-th from `first_frame` of a video of `length` frames, `fps` a second.

    `thumbnails` are small pictures of every source frame from the first to the last of them, if asked for.
    """

    frames: UInt8[np.ndarray, "T H W 3"]
    fps: float
    frame_stride: int
    first_frame: int
    length: int
    thumbnails: UInt8[np.ndarray, "N h w 3"] | None = None


@dataclass(frozen=True)
class Timeline:
    """The frames of one stream in the order of presentation.

    `pts` are the file's own time stamps (None: it has none, frames are counted), `frame_at` is the frame shown at each
    point of a regular grid of `fps` points a second. For a constant frame rate the grid is the frames themselves.
    """

    pts: list[int] | None
    frame_at: np.ndarray
    fps: float


def stable_draw(n: int, *key: Any) -> int:
    """An integer in [0, n), uniform over keys and the same for equal keys on every machine and version."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") % n


def choose_clip(available: int, frames: int, stride_min: int, stride_max: int, *key: Any) -> tuple[int, int]:
    """(first frame, stride) of a clip: the stride uniform over those that fit, then the start uniform over what is left.

    `key` decides, usually (seed, video id, clip number). Reference: DynamiCrafter's loader draws from the whole range and
    falls back to one small stride in a short video; drawing from those that fit keeps the range's spread there too.
    Raises MediaError when not even the smallest stride fits.
    """
    fitting = [s for s in range(stride_min, stride_max + 1) if (frames - 1) * s < available]
    if not fitting:
        need = (frames - 1) * stride_min + 1
        raise MediaError("too short", f"{available} frame{'s'[: available != 1]}, a clip of {frames} at stride {stride_min} needs {need}")
    stride = fitting[stable_draw(len(fitting), "stride", *key)]
    return stable_draw(available - (frames - 1) * stride, "start", *key), stride


def read_clip(path: str | os.PathLike, frames: int, height: int, width: int, choose: Choose, thumbnails: bool = False) -> Clip:
    """The one clip of `read_clips`."""
    return next(read_clips(path, frames, height, width, [choose], thumbnails))


def read_clips(
    path: str | os.PathLike, frames: int, height: int, width: int, choices: Iterable[Choose], thumbnails: bool = False
) -> Iterator[Clip]:
    """Decodes a clip for each of `choices` when it is asked for, from the first video stream that can give it.

    `choose(available)` returns (first frame, stride) for a video of that many frames (see `choose_clip`). Frames are
    turned as the file's display matrix says, transparent parts laid on white, then covered (`cover`).
    Raises MediaError with the reason; the file's name is left to the caller.
    """
    # Packets are only read, not decoded, to learn the timeline. Some formats time or split packets in ways that do not
    # map to frames one to one (raw streams, interlaced fields); for those everything is decoded once instead.
    timelines = [functools.cache(functools.partial(find, path)) for find in (_packet_timeline, _decoded_timeline)]

    def read(stream: int, choose: Choose) -> Clip:
        for timeline in (find(stream) for find in timelines):
            clip = timeline and _read_stream(path, stream, timeline, frames, height, width, choose, thumbnails)
            if clip:
                return clip
        raise MediaError("does not decode", "its time stamps do not repeat from one reading to the next")

    for choose in choices:
        yield _first_stream(path, functools.partial(read, choose=choose))


def read_video(path: str | os.PathLike) -> Clip:
    """Every frame of the first video stream with more than one, at its own size, at equal distances in time (a frame that is shown
    longer is repeated).

    Raises MediaError with the reason.
    """
    return _first_stream(path, lambda stream: _whole_stream(path, stream))


def _open(path: Any) -> Any:
    # Absolute, because FFmpeg takes what stands before a colon for a protocol; a playlist (HLS) that does not say that it is complete is
    # not waited for.
    return av.open(os.path.abspath(path), options={"max_reload": "1"}, **_ANY_TAGS)


def _first_stream(path: Any, read: Callable[[int], Clip]) -> Clip:
    """`read` of the first video stream that can give it. Raises MediaError: the first stream's, or that there is none."""
    if not os.path.isfile(path):
        raise MediaError("missing file")
    errors = []
    try:
        with _open(path) as container:
            pictures = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            streams = [s.index for s in pictures if s.codec_context is not None]
    except _DAMAGE as error:
        raise _unreadable(error) from error
    for stream in streams:
        try:
            return read(stream)
        except MediaError as error:
            errors.append(error)
        except _DAMAGE as error:
            errors.append(_unreadable(error))
    raise errors[0] if errors else MediaError("no video stream")


def _unreadable(error: Exception) -> MediaError:
    # Without the path that FFmpeg adds: what a dataset says must not depend on where its videos lay.
    return MediaError("cannot be read", (getattr(error, "strerror", None) or str(error)).split("\n")[0])


def _whole_stream(path: Any, index: int) -> Clip:
    _packet_timeline(path, index)  # says when a file is cut off
    with _open(path) as container:
        stream = container.streams[index]
        pictures, pts = [], []
        for frame in _frames(container, stream):
            if frame.is_corrupt:
                raise MediaError("does not decode", f"frame {len(pts)} is damaged")
            pictures.append(_picture(frame)[0])
            pts.append(frame.pts)
        if len({p.shape for p in pictures}) > 1:
            raise MediaError("changes size", " then ".join(dict.fromkeys(f"{p.shape[1]}x{p.shape[0]}" for p in pictures)))
        if len(pictures) < 2:
            raise MediaError("too short", f"{len(pictures)} frame{'s'[: len(pictures) != 1]}")
        timeline = _timeline(_increasing(pts), stream, len(pts))
    return Clip(np.stack([pictures[i] for i in timeline.frame_at]), timeline.fps, 1, 0, len(timeline.frame_at))


def _read_stream(
    path: Any, index: int, timeline: Timeline, frames: int, height: int, width: int, choose: Choose, thumbnails: bool
) -> Clip | None:
    """None when the stream does not hold the frames that its timeline promised."""
    length = len(timeline.frame_at)
    first, stride = choose(length)
    if first < 0 or stride < 1 or first + (frames - 1) * stride >= length:
        raise MediaError("too short", f"{length} frames, asked for frames {first} to {first + (frames - 1) * stride}")
    wanted = timeline.frame_at[first + stride * np.arange(frames)].tolist()
    names = {p: i for i, p in enumerate(timeline.pts)} if timeline.pts else None
    decode = functools.partial(_decode, path, index, names, set(wanted), height, width, thumbnails)
    found = None
    if timeline.pts and wanted[0] > 0:
        # A seek can land behind the frame or where the decoder cannot start cleanly; then the way leads through the whole file.
        with contextlib.suppress(*_DAMAGE):
            found = decode(timeline.pts[wanted[0]])
    found = found or decode(None)
    if not found:
        return None
    pictures, small = found
    return Clip(np.stack([pictures[i] for i in wanted]), timeline.fps, stride, first, length, np.stack(small) if thumbnails else None)


def _packet_timeline(path: Any, index: int) -> Timeline | None:
    """The timeline from the container alone; None when its time stamps cannot be those of the frames."""
    with _open(path) as container:
        stream = container.streams[index]
        # Mp4 and mov list every frame in front of the data, other formats do not. An empty one shows the frame before for longer.
        declared = sum(entry.size > 0 for entry in stream.index_entries)
        pts, dts, read, end = [], [], 0, 0.0
        for packet in container.demux():
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == index and packet.size:
                read += 1
                if packet.dts is not None:
                    dts.append(packet.dts)
                if not packet.is_discard:
                    pts.append(packet.pts)
        if read < declared:
            raise MediaError("truncated", f"{read} of {declared} frames are in the file")
        whole = (container.duration or 0) / av.time_base
        if "matroska" in container.format.name and end < 0.9 * whole:
            raise MediaError("truncated", f"{end:.1f} of {whole:.1f} seconds are in the file")
        # Where the clock goes back, files were joined (transport streams, DVDs).
        if not pts or None in pts or len(set(pts)) < len(pts) or dts != sorted(dts):
            return None
        shown = sorted(pts)
        # B-frames are stored behind the later frames they lean on: stamps that rise all the same are not theirs (AVI has none, and old DivX
        # packs two frames into one).
        return None if shown == pts and stream.codec_context.has_b_frames else _timeline(shown, stream)


def _decoded_timeline(path: Any, index: int) -> Timeline:
    with _open(path) as container:
        stream = container.streams[index]
        pts = [frame.pts for frame in _frames(container, stream)]
        if not pts:
            raise MediaError("no frames")
        return _timeline(_increasing(pts), stream, len(pts))


def _increasing(pts: list[int | None]) -> list[int] | None:
    return pts if None not in pts and all(a < b for a, b in itertools.pairwise(pts)) else None


def _timeline(pts: list[int] | None, stream: Any, count: int = 0) -> Timeline:
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    if pts is None or len(pts) == 1:
        return Timeline(pts, np.arange(count if pts is None else 1), rate)
    steps = np.diff(np.array(pts, np.float64)) * float(stream.time_base)
    usual = np.median(steps)
    steps = np.where(steps > max(_LONGEST_STILL, 10 * usual), usual, steps)
    seconds = np.concatenate([[0.0], np.cumsum(steps)])
    # The mean over ordinary steps, because time stamps are often rounded to milliseconds.
    ordinary = np.abs(steps - usual) <= usual / 2
    # A median between a short and a long step has neither beside it; then the short ones count.
    period = steps[ordinary if ordinary.any() else steps <= usual].mean()
    if ordinary.all():
        return Timeline(pts, np.arange(len(pts)), round(1 / period, 6))
    if seconds[-1] > _LONGEST_HOLD * period * len(pts):
        raise MediaError("no frame rate", f"{len(pts)} frames in {seconds[-1]:.4g} s, most of them {period:.2g} s apart")
    grid = np.arange(int(seconds[-1] / period + 0.5) + 1) * period
    after = np.clip(np.searchsorted(seconds, grid), 1, len(pts) - 1)
    nearest = np.where(grid - seconds[after - 1] <= seconds[after] - grid, after - 1, after)
    return Timeline(pts, nearest, round(1 / period, 6))


def _frames(container: Any, stream: Any):
    """Decoded frames; a packet that does not decode raises, except before the first frame (a stream cut off at its head)."""
    stream.codec_context.thread_count = 1  # videos are decoded side by side instead
    started = False
    for packet in container.demux(stream):
        if not packet.size and packet.dts is not None:
            continue  # an empty sample: the frame before it is shown for longer
        try:
            for frame in packet.decode():
                if frame.width * frame.height > _MOST_PIXELS:
                    raise MediaError("too large", f"frames of {frame.width}x{frame.height}, more than {_MOST_PIXELS:,} pixels")
                started = True
                yield frame
        except av.error.InvalidDataError as error:
            if started:
                raise MediaError("does not decode", "a packet is damaged") from error


def _decode(
    path: Any, index: int, names: dict[int, int] | None, wanted: set[int], height: int, width: int, thumbnails: bool, seek: int | None
) -> tuple[dict[int, np.ndarray], list[np.ndarray]] | None:
    """Frame number -> picture, and thumbnails of all frames between the wanted ones; None when not all of these came."""
    found, small, damaged, first = {}, [], False, min(wanted)
    with _open(path) as container:
        stream = container.streams[index]
        if seek is not None:
            container.seek(seek, stream=stream)
        aspect = float(stream.sample_aspect_ratio or 1) or 1.0
        for n, frame in enumerate(_frames(container, stream)):
            i = n if names is None else names.get(frame.pts)
            # The decoder hides damage by painting over it, and what it painted lives on until the next key frame.
            damaged = bool(frame.is_corrupt) or (damaged and not frame.key_frame)
            if thumbnails and i is not None and i >= first:
                small.append(frame.reformat(*THUMBNAIL, format="rgb24", interpolation="AREA", threads=1).to_ndarray())
            if i in wanted:
                if damaged:
                    raise MediaError("does not decode", f"frame {i} is damaged")
                picture, turned = _picture(frame)
                found[i] = cover(picture, height, width, 1 / aspect if turned else aspect)
            if len(found) == len(wanted):
                return found, small
    return None


def _picture(frame: Any) -> tuple[np.ndarray, bool]:
    """(RGB as it is to be seen, whether its rows were columns)."""
    # By default every conversion of a frame starts a thread per processor, which takes longer than the conversion.
    if frame.format.name == "pal8" or any(c.is_alpha for c in frame.format.components):
        picture = on_white(frame.to_ndarray(format="rgba", threads=1))
    else:
        picture = frame.to_ndarray(format="rgb24", threads=1)
    try:
        # The attribute `side_data` would keep the frame, and the frame it, until Python looks for cycles: hundreds of frames.
        side_data = SideDataContainer(frame).get(SideDataType.DISPLAYMATRIX)
    except ValueError:  # beside it lies what PyAV has no name for, such as Exif; what is left tells turns, but no mirrors
        quarters = round(frame.rotation / 90)
        return np.ascontiguousarray(np.rot90(picture, quarters)), bool(quarters % 2)
    if side_data is None:
        return picture, False
    # A pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift; only quarter turns and mirrors are followed.
    a, b, _, c, d = np.frombuffer(bytes(side_data), "<i4")[:5].tolist()
    turned = abs(b) > abs(a)
    across, down = (c, b) if turned else (a, d)
    if turned:
        picture = picture.transpose(1, 0, 2)
    return np.ascontiguousarray(picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]), turned


def save_video(path: str | os.PathLike, frames: Sequence[np.ndarray] | UInt8[np.ndarray, "T H W 3"], fps: float) -> None:
    """Writes .mp4 (H.264, 4:2:0; an odd size gets its last row or column twice) or .gif (one palette, endless).

    The file appears under its name only when complete. Raises ValueError on another ending, no frames, or a frame rate
    that is not positive.
    """
    path, frames = pathlib.Path(path), np.asarray(frames, np.uint8)
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise ValueError(f"{path}: a video is written as .mp4 or .gif")
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape or not fps > 0:
        raise ValueError(f"{path}: needs frames [T, H, W, 3] and fps > 0, got {frames.shape} and {fps}")
    with replacing(path) as temporary:  # absolute: FFmpeg takes a relative "a:b" for a protocol
        (_save_mp4 if path.suffix.lower() == ".mp4" else _save_gif)(temporary, frames, fps)


def _save_mp4(path: pathlib.Path, frames: np.ndarray, fps: float) -> None:
    frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], mode="edge")
    with av.open(os.fspath(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "17"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.colorspace = 6  # BT.601, which is what the conversion to 4:2:0 uses
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _save_gif(path: pathlib.Path, frames: np.ndarray, fps: float) -> None:
    # One palette of the whole clip, so that still parts do not flicker.
    palette = Image.fromarray(frames.reshape(-1, *frames.shape[2:])).quantize(256, Image.Quantize.MEDIANCUT)
    indices = np.stack([np.asarray(Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE)) for f in frames])
    colours = np.full((256, 4), 255, np.uint8)  # alpha, red, green, blue
    given = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)
    colours[: len(given), 1:] = given
    # FFmpeg's writer keeps a frame that equals the one before, Pillow's would drop it.
    with av.open(os.fspath(path), "w", format="gif", options={"loop": "0"}) as container:
        stream = container.add_stream("gif", rate=Fraction(min(fps, 50)).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "pal8"
        for frame in indices:
            container.mux(stream.encode(av.VideoFrame.from_ndarray((frame, colours), format="pal8")))
        container.mux(stream.encode())
