"""The judge of the synthetic world: generated clips and the exact truth in, one row of measures per clip out.

Objects are found by colour, frame by frame; every motion is measured against the clip's own first frame as it truly was,
minus the shift of the background. No measure alone is safe (a static clip wins every PSNR, a camera pan every position, a
clip in which everything moves every direction): `success` asks for all of them.
"""

import math
from typing import Any

import numpy as np
import scipy

from motif_jax.data import sprites

# Thresholds of `success`. Lengths are shares of the shorter side: 4 pixels of 64 is 1/16.
MAX_ANGLE = 45.0  # degrees between the way of the object and the one named
MIN_WAY = 0.3  # of the true way, below which there is no direction
SPEED_RATIO = (0.6, 1.5)
MAX_PATH_ERROR = 0.06
MIN_PRESENCE = 0.9
MAX_DRIFT = 1 / 16  # of bystanders, of the background, and of an object that should stay still
MAX_BACKGROUND_MAE = 4.0  # grey levels above the ceiling
MAX_COLOUR_ERROR = 75.0
MIN_SELECTIVITY = 0.5
MIN_SHAPE_IOU = 0.93  # of the ceiling's
LEAK = 1.1  # a frame counts as a copy of the image when it is hardly further from it than the clip's own first frame (squares)
SHAPE_RADIUS = 6.0  # pixels; smaller circles and squares cannot be told apart
MIN_AREA = 0.3  # smallest blob that counts as the object, over the object's area


def colour_masks(frames: np.ndarray, palette_C3: np.ndarray) -> np.ndarray:
    """Which pixels show which colour: uint8 [..., H, W, 3] -> int8 [..., H, W], an index into the palette or -1 for none.

    A pixel has the nearest colour of the palette when that is nearer than its own grey: a blend of a colour with the grey
    background counts from one half on, blurred or not.
    """
    rgb = frames.astype(np.float32)
    to_grey = np.square(rgb - rgb.mean(-1, keepdims=True)).sum(-1)
    to_colour = np.stack([np.square(rgb - c).sum(-1) for c in palette_C3.astype(np.float32)], -1)
    nearest = to_colour.argmin(-1)
    return np.where(to_colour.min(-1) < to_grey, nearest, -1).astype(np.int8)


def locate(mask_THW: np.ndarray, start_2: np.ndarray, min_pixels: float) -> tuple[np.ndarray, np.ndarray]:
    """The centre of one object in every frame, float64 (x, y) [T, 2], NaN where it is missing, and its pixels, bool [T, H, W].

    Of the blobs of at least `min_pixels` in a frame the one nearest to the last known centre is taken, not the largest:
    a smear elsewhere must not pull the object away.
    """
    centres, pixels = np.full((len(mask_THW), 2), np.nan), np.zeros(mask_THW.shape, bool)
    last = np.asarray(start_2, float)
    for t, mask in enumerate(mask_THW):
        labels, count = scipy.ndimage.label(mask, np.ones((3, 3)))
        if count == 0:
            continue
        index = np.arange(1, count + 1)
        large = index[np.bincount(labels.reshape(-1), minlength=count + 1)[1:] >= min_pixels]
        if not len(large):
            continue
        found = np.array(scipy.ndimage.center_of_mass(mask, labels, large))[:, ::-1]
        best = np.hypot(*(found - last).T).argmin()
        centres[t] = last = found[best]
        pixels[t] = labels == large[best]
    return centres, pixels


def background_shift(reference_HW: np.ndarray, mask_HW: np.ndarray, frames_THW: np.ndarray, masks_THW: np.ndarray) -> np.ndarray:
    """How far the background of each frame lies from the reference's, whole pixels (x, y) [T, 2].

    The shift with the smallest mean squared difference over the pixels that are background (mask True) in both, found by
    FFT among those that leave half of them in common. It counts only when it explains at least half of the difference:
    noise and blur are no camera motion.
    """
    height, width = reference_HW.shape
    size = (2 * height, 2 * width)
    mean = reference_HW[mask_HW].mean() if mask_HW.any() else 0.0

    def transform(x):
        return np.fft.rfft2(x, size, axes=(-2, -1))

    a, m = (reference_HW - mean) * mask_HW, mask_HW.astype(float)
    b, n = (frames_THW - mean) * masks_THW, masks_THW.astype(float)
    fa, fa2, fm, fb, fb2, fn = map(transform, (a, a * a, m, b, b * b, n))
    # Cross-correlations: entry s is the sum over x of left(x) right(x + s).
    difference = np.fft.irfft2(fa2.conj() * fn - 2 * fa.conj() * fb + fm.conj() * fb2, size, axes=(-2, -1))
    common = np.fft.irfft2(fm.conj() * fn, size, axes=(-2, -1))
    allowed = common > 0.5 * common[..., :1, :1]
    mse = np.where(allowed, difference / np.maximum(common, 0.5), np.inf).reshape(len(frames_THW), -1)
    best = mse.argmin(1)
    counts = mse[np.arange(len(mse)), best] < 0.5 * (mse[:, 0] - 1.0)
    rows, columns = np.unravel_index(best, size)
    shift = np.stack([columns - size[1] * (columns >= width), rows - size[0] * (rows >= height)], -1)
    return np.where(counts[:, None], shift, 0).astype(float)


def _psnr(mse: float) -> float:
    """dB at 8 bits, at most 60: an exact copy would otherwise make every mean infinite."""
    return min(60.0, 10 * math.log10(255.0**2 / max(mse, 1e-9)))


def _shape_iou(clips: dict[str, Any], i: int, offsets_T2: np.ndarray, pixels_THW: np.ndarray) -> float:
    """Mean overlap of the named object's pixels with its outline drawn `offsets` from its true place; 0 when it is never found."""
    frames, height, width = pixels_THW.shape
    shape = np.repeat(clips["shape"][i, 0], frames)
    outline = sprites.coverage(shape, clips["positions"][i, 0] + offsets_T2, height, width) >= 0.5
    both = [(o & p).sum() / max((o | p).sum(), 1) for o, p in zip(outline, pixels_THW, strict=True) if p.any()]
    return float(np.mean(both)) if both else 0.0


def _tracks(colours_THW: np.ndarray, clips: dict[str, Any], i: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres [K, T, 2] of the clip's objects, the named one first, NaN where one is not found, and the named one's pixels [T, H, W].

    Truth and clip go through this alike: what it gets wrong about a shape cancels.
    """
    smallest = MIN_AREA * sprites.MOVING_SHARE * math.prod(colours_THW.shape[1:])
    objects = np.flatnonzero(clips["present"][i])
    found = [locate(colours_THW == clips["colour"][i, k], clips["positions"][i, k, 0], smallest) for k in objects]
    return np.stack([centres for centres, _ in found]), found[0][1]


def _motion(
    true_KT2: np.ndarray, centres_KT2: np.ndarray, shift_T2: np.ndarray, still: bool, side: int, width: int, travel: float
) -> dict[str, float]:
    """The measures of `judge` that follow from where the objects are and how far the background shifted."""
    moved = centres_KT2 - true_KT2[:, :1] - shift_T2
    true_way = true_KT2[0, -1] - true_KT2[0, 0]
    true_length = float(np.hypot(*true_way))
    way = moved[0, -1]
    here = bool(np.isfinite(way).all())
    length = float(np.hypot(*way)) if here else 0.0
    drifts = np.hypot(moved[1:, :, 0], moved[1:, :, 1])
    others_way = float(np.nansum(drifts[:, -1]))
    if still:
        direction_ok, speed_ratio, selectivity = here and length < MAX_DRIFT * side, math.nan, math.nan
    else:
        along = float(way @ true_way) / true_length if here else 0.0
        direction_ok = length > MIN_WAY * true_length and along > length * math.cos(math.radians(MAX_ANGLE))
        speed_ratio = along / true_length
        selectivity = length / (length + others_way) if length + others_way > 0 else 0.0
    presence = float(np.isfinite(centres_KT2[0, :, 0]).mean())
    path = np.hypot(*(centres_KT2[0] - shift_T2 - true_KT2[0]).T) / width
    return {
        "direction_ok": float(direction_ok),
        "way_x": float(way[0]),
        "way_y": float(way[1]),
        "speed_ratio": speed_ratio,
        "path_error": float(np.nanmean(path)) if presence else 1.0,
        "presence": presence,
        "selectivity": selectivity,
        "wrong_object": float(others_way > MIN_WAY * travel * side and others_way > length),
        "others_drift": float(np.nanmax(np.append(drifts, 0.0))),
        "others_presence": float(np.isfinite(centres_KT2[1:, :, 0]).mean()) if len(centres_KT2) > 1 else 1.0,
        "background_shift": float(np.hypot(*shift_T2.T).max()),
    }


def _judge_one(frames: np.ndarray, clips: dict[str, Any], i: int, ceiling: dict[str, float] | None) -> dict[str, float]:
    height, width = frames.shape[1:3]
    side = min(height, width)
    spec = sprites.WORLDS[clips["world"]]
    palette = np.array([sprites.COLOURS[c] for c in spec.colours])
    truth, named = clips["frames"][i], clips["colour"][i, 0]
    true_colours, colours = colour_masks(truth, palette), colour_masks(frames, palette)
    true_centres, true_pixels = _tracks(true_colours, clips, i)
    centres, pixels = _tracks(colours, clips, i)
    if ceiling is None:
        ceiling = {"background_mae": 0.0, "shape_iou": _shape_iou(clips, i, np.zeros_like(true_centres[0]), true_pixels)}

    around = np.ones((1, 3, 3))  # outlines are mixtures, neither object nor background
    true_background, background_THW = (~scipy.ndimage.binary_dilation(found >= 0, around) for found in (true_colours[:1], colours))
    shift = background_shift(truth[0].mean(-1), true_background[0], frames.mean(-1), background_THW)
    still = bool(clips["direction"][i] == sprites.STILL)
    motion = _motion(true_centres, centres, shift, still, side, width, spec.travel)

    # Pixels that no object ever covers, one pixel beyond their outlines included.
    covered = scipy.ndimage.binary_dilation((true_colours >= 0).any(0), np.ones((3, 3)))
    difference = frames.astype(np.float32) - truth.astype(np.float32)
    background = difference[:, ~covered]
    seen = frames[pixels].astype(np.float32)
    leak = np.square(frames.astype(np.float32) - truth[0]).mean((1, 2, 3))
    row = {"still": float(still)} | motion
    row |= {
        "background_mae": float(np.abs(background).mean()),
        "background_psnr": _psnr(float(np.square(background).mean())),
        "colour_error": float(np.sqrt(np.square(seen.mean(0) - palette[named]).sum())) if len(seen) else 441.0,
        "shape_iou": _shape_iou(clips, i, np.nan_to_num(centres[0] - true_centres[0]), pixels),
        "area_ratio": float((colours[-1] == named).sum() / max((true_colours[-1] == named).sum(), 1)),
        "leak": float((leak[1:] <= leak[0] * LEAK + 1e-6).mean()),
        "psnr": _psnr(float(np.square(difference).mean())),
        "psnr_to_first": _psnr(float(np.square(frames.astype(np.float32) - truth[0]).mean())),
    }
    far = MAX_DRIFT * side
    row["success"] = float(
        row["direction_ok"]
        and (still or (SPEED_RATIO[0] <= row["speed_ratio"] <= SPEED_RATIO[1] and row["selectivity"] > MIN_SELECTIVITY))
        and row["path_error"] < MAX_PATH_ERROR
        and row["presence"] > MIN_PRESENCE
        and row["others_presence"] > MIN_PRESENCE
        and row["others_drift"] < far
        and row["background_shift"] < far
        and row["background_mae"] < ceiling["background_mae"] + MAX_BACKGROUND_MAE
        and row["colour_error"] < MAX_COLOUR_ERROR
        and (row["shape_iou"] > MIN_SHAPE_IOU * ceiling["shape_iou"] or sprites.radius(height, width) < SHAPE_RADIUS)
    )
    return row


def judge(frames: np.ndarray, clips: dict[str, Any], ceiling: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Measures of generated clips: uint8 [N,T,H,W,3] and what `sprites.make_clips` returned for the same clips -> {name: [N]}.

      direction_ok   1 when the named object ends within 45 degrees of the named direction and beyond 30 % of the true way;
                     of a still one, when it ends within 1/16 of the side
      way_x, way_y   way of the named object from first to last frame, pixels (NaN when it is lost)
      speed_ratio    way along the true direction over the true way (NaN for still ones)
      path_error     mean distance to the true place over the frames, over the width
      presence       share of frames in which the named object is found; others_presence likewise for the bystanders
      selectivity    its way over the ways of all objects (NaN for still ones); wrong_object: 1 when the others went further
      others_drift, background_shift   largest distance in any frame, pixels
      background_mae, background_psnr   where no object ever is, against the truth; psnr: everywhere; psnr_to_first: to frame 0
      colour_error   RGB distance of the object's mean colour to the palette's; shape_iou   its pixels against its true outline
      area_ratio     pixels of its colour in the last frame, ghosts and smears included, over the truth's
      leak           condition-leak index: share of the later frames as near to the image as the clip's first frame is
      success        all of direction, speed, path, presence, selectivity, drift, shift, background, colour, and of shapes of
                     6 pixels' radius or more the outline

    ceiling: what `judge` says of the true clips through the autoencoder; without it they are the truth itself.
    Raises ValueError on shapes that do not fit.
    """
    if frames.shape != clips["frames"].shape or frames.dtype != np.uint8:
        raise ValueError(f"clips to judge are {frames.dtype}{list(frames.shape)}, the truth is uint8{list(clips['frames'].shape)}")
    rows = [
        _judge_one(frames[i], clips, i, ceiling and {name: ceiling[name][i] for name in ("background_mae", "shape_iou")})
        for i in range(len(frames))
    ]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]} if rows else {}
