"""Pictures of clips, flow and heatmaps for people to look at.

In: numpy frames (uint8 RGB), flow (pixels) and heatmaps (0..1). Out: uint8 RGB images and a PNG writer; nothing is normalised in secret:
every scale is an argument or written into the picture.
"""

import bisect
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from jaxtyping import Float, Num, UInt8
from PIL import Image, ImageDraw, ImageFont

Picture = UInt8[np.ndarray, "H W 3"]

GAP = 4  # pixels between tiles
TILE = 160  # smallest tile width, below which frames are enlarged by whole factors
FONT = 14  # pixels, of pictures narrower than WIDE; wider ones are looked at scaled down
WIDE = 90 * FONT
# For what Pillow's own font lacks, which is all but ASCII: Matplotlib's, then what usual systems have for Chinese, Japanese, Korean.
FAMILIES = ("DejaVu Sans", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Hiragino Sans GB", "Microsoft YaHei", "Arial Unicode MS")
PAPER, INK = 232, 20  # grey: flow that stands still is white
MARKED = 0.5  # cells with a heatmap above this count as moving (the paper's figures do the same)

# Hue steps of the Middlebury wheel (Baker et al., IJCV 2011): the eye tells reds and yellows apart better than greens and blues.
_WHEEL = ((15, (255, 0, 0)), (6, (255, 255, 0)), (4, (0, 255, 0)), (11, (0, 255, 255)), (13, (0, 0, 255)), (6, (255, 0, 255)))
_HEAT = np.array([(0, 0, 0), (105, 30, 165), (225, 45, 95), (255, 140, 25), (255, 245, 130)], np.float64)


def flow_colours(flow: Num[np.ndarray, "*shape 2"], largest: float | None = None) -> UInt8[np.ndarray, "*shape 3"]:
    """Flow (u right, v down) as colours: hue is the direction, saturation |f| / `largest`, standing still is white.

    The Middlebury wheel: right is red, down yellow, left cyan, up violet. `largest` is in the flow's unit, by default the
    largest |f| given; anything longer is darkened.
    """
    flow = np.asarray(flow, np.float64)
    radius = np.hypot(flow[..., 0], flow[..., 1])
    largest = float(radius.max(initial=0.0)) if largest is None else float(largest)
    radius = radius / largest if largest > 0 else np.zeros_like(radius)
    wheel = _wheel_colours()
    # Angle 0 is to the right and grows downwards, once around the wheel.
    position = (np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi) % 1.0) * len(wheel)
    low = np.floor(position).astype(int) % len(wheel)
    share = (position - np.floor(position))[..., None]
    hue = (1 - share) * wheel[low] + share * wheel[(low + 1) % len(wheel)]
    pale = 1 - np.minimum(radius, 1)[..., None] * (1 - hue)
    return _to_uint8(np.where(radius[..., None] <= 1 + 1e-9, pale, 0.75 * hue))


def wheel(side: int = 96) -> Picture:
    """The legend of `flow_colours`: the colour of the flow that points from the centre to each pixel."""
    axis = np.linspace(-1, 1, side)
    flow = np.stack(np.meshgrid(axis, axis), -1)
    picture = flow_colours(flow, 1.0)
    picture[np.hypot(flow[..., 0], flow[..., 1]) > 1] = PAPER
    return picture


def heat_colours(heat: Num[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """Values 0..1 as colours from black over violet, red and orange to pale yellow, ever brighter; values outside are clipped."""
    position = np.clip(np.asarray(heat, np.float64), 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(position.astype(int), len(_HEAT) - 2)
    share = (position - low)[..., None]
    return np.rint((1 - share) * _HEAT[low] + share * _HEAT[low + 1]).astype(np.uint8)


def overlay(frames_THW3: UInt8[np.ndarray, "T H W 3"], heat_Thw: Num[np.ndarray, "T h w"]) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames in dim grey with the heatmap's colours over them: opacity rises with the heat, to 3/4 at one half.

    The heatmap's cells are drawn as they are, unsmoothed. Raises ValueError when the numbers of frames differ.
    """
    frames, heat = np.asarray(frames_THW3), np.asarray(heat_Thw, np.float64)
    if heat.ndim != 3 or len(heat) != len(frames):
        raise ValueError(f"{len(frames)} frames need a heatmap [{len(frames)}, h, w], got {list(heat.shape)}")
    heat = np.stack([_resize_cells(h, *frames.shape[1:3]) for h in heat])
    grey = np.repeat((frames @ np.array([0.299, 0.587, 0.114]))[..., None], 3, -1)
    opacity = 0.75 * np.clip(heat / MARKED, 0, 1)[..., None]
    return np.rint((1 - opacity) * 0.75 * grey + opacity * heat_colours(heat)).astype(np.uint8)


def moving_share(heat: Num[np.ndarray, "*shape"]) -> float:
    """Share of cells whose heat exceeds 0.5."""
    return float((np.asarray(heat) > MARKED).mean())


def _moving(heat: Num[np.ndarray, "*shape"]) -> str:
    return f"{100 * moving_share(heat):.1f} %"


def label(picture: Picture, text: str, end: str = "", size: int = 0) -> Picture:
    """The picture under a line of text and `end`; `size` of the letters is by default what suits the picture's width.

    Text that is too long is cut before `end`; characters that no font of `FAMILIES` has are shown as boxes.
    """
    size = size or _size(picture.shape[1])
    font = _font(text[: picture.shape[1]] + end, size)
    room = picture.shape[1] - 2 * GAP - font.getlength(end)
    text = text[: picture.shape[1]]  # no character is narrower than a pixel
    if font.getlength(text) > room:
        fit = bisect.bisect(range(len(text)), room, key=lambda n: font.getlength(text[:n].rstrip() + "…"))
        text = text[: fit - 1].rstrip() + "…" if fit else ""
    band = Image.new("RGB", (picture.shape[1], size + 8), (PAPER,) * 3)
    ImageDraw.Draw(band).text((GAP, 3), (text + end).lstrip(), (INK,) * 3, font)
    return np.concatenate([np.asarray(band), picture])


def _size(width: int) -> int:
    return max(FONT, FONT * width // WIDE)


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font for ASCII, else the first of those with most of the characters."""
    if text.isascii():
        return ImageFont.load_default(size)
    return ImageFont.truetype(max(_fonts(), key=lambda font: sum(ord(c) in font[1] for c in text))[0], size)


@functools.cache
def _fonts() -> list[tuple[str, frozenset[int]]]:
    """Files of those of `FAMILIES` that this machine has, with their characters."""
    from matplotlib import font_manager, ft2font

    found = []
    for family in FAMILIES:
        try:
            path = font_manager.findfont(family, fallback_to_default=False)
            ImageFont.truetype(path, FONT)
            found.append((path, frozenset(ft2font.FT2Font(path).get_charmap())))
        except (ValueError, OSError, RuntimeError):  # not here, or of a kind that one of the two cannot read
            continue
    return found


def row(pictures: Sequence[Picture]) -> Picture:
    """Pictures of one height, side by side."""
    return _join(pictures, 1)


def stack(pictures: Sequence[Picture]) -> Picture:
    """Pictures of any width, one under the other, left-aligned."""
    return _join(pictures, 0)


def strip(frames_THW3: UInt8[np.ndarray, "T H W 3"], text: str = "", columns: int = 8, end: str = "") -> Picture:
    """At most `columns` frames of a clip, evenly spaced from the first to the last, in one row under `text` and `end` (see `label`)."""
    picture = row([_tile(frames_THW3[t]) for t in _spaced(len(frames_THW3), columns)])
    return label(picture, text, end) if text or end else picture


def side_by_side(clips: Mapping[str, UInt8[np.ndarray, "T H W 3"]]) -> UInt8[np.ndarray, "T H2 W2 3"]:
    """Clips of one height next to each other, each under its name, as the frames of one video; short clips hold their last frame."""
    length = max(len(clip) for clip in clips.values())
    return np.stack([row([label(_tile(clip[min(t, len(clip) - 1)]), name) for name, clip in clips.items()]) for t in range(length)])


def clip_sheet(
    frames_THW3: UInt8[np.ndarray, "T H W 3"],
    flow_Thw2: Float[np.ndarray, "T h w 2"],
    heat_Thw: Float[np.ndarray, "T h w"],
    text: str = "",
    columns: int = 6,
) -> Picture:
    """A clip at a glance: frames, flow, heatmap over the frames; each frame's share of moving cells is written under it.

    Flow is in pixels at the frames' size. The most saturated colour is that of the clip's 99.5th percentile, or of one pixel in a
    still clip, so that its noise stays pale; that length is written into the sheet.
    """
    import cv2

    frames, flow = np.asarray(frames_THW3), np.asarray(flow_Thw2, np.float64)
    if len(flow) != len(frames):
        raise ValueError(f"{len(frames)} frames need as many flow fields, got {len(flow)}")
    length = np.hypot(flow[..., 0], flow[..., 1])
    largest = max(1.0, float(np.quantile(length, 0.995)))
    chosen = _spaced(len(frames), columns)
    height, width = frames.shape[1:3]
    colours = [_tile(flow_colours(cv2.resize(flow[t], (width, height), interpolation=cv2.INTER_LINEAR), largest)) for t in chosen]
    size = _size(row(colours).shape[1])
    side = min(72 * size // FONT, colours[0].shape[0] // 2)
    colours[0] = colours[0].copy()
    _inset(colours[0], wheel(side))
    heated = [_footer(_tile(o), _moving(heat_Thw[t]), size) for t, o in zip(chosen, overlay(frames, heat_Thw)[chosen], strict=True)]
    heading = f"heatmap over frames, bar: 0 to 1; share above {MARKED:g}: {_moving(heat_Thw)} of the clip, per frame below"
    heats = label(row(heated), heading, " " * 30)  # room for the bar
    bar = overlay(np.full((1, size, 7 * size, 3), 128, np.uint8), np.linspace(0, 1, 7 * size)[None, None])[0]
    heats[4 : 4 + size, -7 * size - GAP : -GAP] = bar
    spans = f"mean {length.mean():.2f} px, max {length.max():.1f} px; full colour at {largest:.1f} px"
    return stack(
        [
            label(row([_tile(frames[t]) for t in chosen]), text, f"   frames {', '.join(map(str, chosen))} of {len(frames)}"),
            label(row(colours), f"flow to the next frame (the last repeats): {spans}"),
            heats,
        ]
    )


def save_png(path: str | pathlib.Path | BinaryIO, picture: Picture) -> None:
    """Writes an RGB picture to a path or an open file. Raises ValueError for anything but uint8 [H, W, 3]."""
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"{path}: a picture is uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    Image.fromarray(picture).save(path, format="PNG")


def _wheel_colours() -> Float[np.ndarray, "55 3"]:
    ends = [np.array(colour, np.float64) / 255 for _, colour in _WHEEL]
    steps = [steps for steps, _ in _WHEEL]
    return np.concatenate([a + (b - a) * np.arange(n)[:, None] / n for n, a, b in zip(steps, ends, ends[1:] + ends[:1], strict=True)])


def _to_uint8(x: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    return np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8)


def _resize_cells(x_hw: np.ndarray, height: int, width: int) -> np.ndarray:
    """Every pixel takes the value of the cell its centre lies in."""
    y = (np.arange(height) + 0.5) * x_hw.shape[0] / height
    x = (np.arange(width) + 0.5) * x_hw.shape[1] / width
    return x_hw[y.astype(int)[:, None], x.astype(int)]


def _tile(picture: Picture) -> Picture:
    factor = -(-TILE // picture.shape[1])
    return picture.repeat(factor, 0).repeat(factor, 1)


def _spaced(length: int, columns: int) -> list[int]:
    return sorted({round(t) for t in np.linspace(0, length - 1, min(columns, length))})


def _inset(picture: Picture, small: Picture) -> None:
    """Lays `small` into the lower right corner, leaving out its background."""
    corner = picture[-small.shape[0] :, -small.shape[1] :]
    inside = (small != PAPER).any(-1)
    corner[inside] = small[inside]


def _footer(picture: Picture, text: str, size: int) -> Picture:
    return np.roll(label(picture, text, "", size), picture.shape[0], axis=0)


def _join(pictures: Sequence[Picture], axis: int) -> Picture:
    other = 1 - axis
    longest = max(p.shape[other] for p in pictures)
    parts = []
    for picture in pictures:
        fill = [(0, 0), (0, 0), (0, 0)]
        fill[other] = (0, longest - picture.shape[other])
        parts.append(np.pad(picture, fill, constant_values=PAPER))
        gap = [longest, longest, 3]
        gap[axis] = GAP
        parts.append(np.full(gap, PAPER, np.uint8))
    return np.concatenate(parts[:-1], axis)
