"""Numbers about one video that need no network: frames, the image it was made from and a flow function in, one row of floats out.

Nothing here knows the prompt, and a video that does not move wins most of it: read agreement and smoothness beside the flow only.
"""

import itertools
import math
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Float, UInt8

# uint8 [T, H, W, 3] -> float32 [T-1, H, W, 2], pixels (right, down) from each frame to the next; see `flows.make_flow`
FlowFn = Callable[[np.ndarray], np.ndarray]
Frames = UInt8[np.ndarray, "T H W 3"]
Image = UInt8[np.ndarray, "H W 3"]

DECAY = (1, 5, 10, 15)  # frames at which the likeness to frame 0 is told
MOVING = 0.5  # pixels per frame from which a pixel counts as moving
SAME = 100.0  # dB for pictures that do not differ at all: the true value, infinity, would swallow every mean
WINDOW, SIGMA = 11, 1.5  # of SSIM


def measure(frames_THW3: Frames, image_HW3: Image, fps: float, flow_fn: FlowFn) -> dict[str, float]:
    """Every measure of a video; NaN where it is too short for one.

    Most are of successive frames, or of frames by their number: they compare between videos of one frame rate only.

    Motion (flow in pixels per frame at the video's own size):
      dynamic_degree   1 or 0 by VBench's rule, see `dynamic_degree`
      mean_flow, top5_flow   mean |flow|; mean over the frames of the mean of the largest 5 %
      residual_flow    mean |flow - its median over the frame|: what is left when the whole picture's shift is taken out
      moving_area      share of pixels with |flow| > 0.5
      camera_shift     mean over the frames of |median flow|
    Steadiness:
      flicker          1 - mean |x_{t+1} - x_t| / 255 (VBench's temporal_flickering; falls with motion)
      luma_flicker     mean |m_{t+1} - 2 m_t + m_{t-1}| of the frames' mean grey m, grey levels
      warp_error       see `warp_error`, grey levels
      smoothness       see `smoothness`
    Likeness, as SSIM (of grey) and PSNR in dB (of RGB; 100 for equal pictures):
      ssim0_image, psnr0_image   frame 0 to the image; ssim_image, psnr_image the mean over all frames
      best_frame, best_ssim      the frame most like the image: not 0 when a model does not start at its image
      ssim_first_1, _5, _10, _15, ssim_first, psnr_first   to frame 0: single frames, and the mean over all but frame 0

    Raises ValueError for fewer than two frames, an image of another size, frames under 11 pixels or fps <= 0.
    """
    frames, image = np.asarray(frames_THW3), np.asarray(image_HW3)
    if frames.ndim != 4 or frames.dtype != np.uint8 or len(frames) < 2 or frames.shape[1:] != image.shape:
        raise ValueError(
            f"needs two or more frames as uint8 [T, H, W, 3] and an image of their size, got {list(frames.shape)} and {list(image.shape)}"
        )
    if min(image.shape[:2]) < WINDOW or not fps > 0:
        raise ValueError(f"frames of {image.shape[1]}x{image.shape[0]} at {fps} frames a second: needs {WINDOW} pixels and fps > 0")
    flow = flow_fn(frames)
    length = np.sqrt(_square(flow))
    shift = np.median(flow, axis=(1, 2))
    grey = np.stack([_grey(f) for f in frames])
    luma = grey.mean((1, 2), dtype=np.float64)
    to_image = np.array([ssim(g, _grey(image)) for g in grey])
    to_first = np.array([ssim(g, grey[0]) for g in grey[1:]])
    row = {
        "dynamic_degree": dynamic_degree(frames, fps, flow_fn, flow),
        "mean_flow": length.mean(dtype=np.float64),
        "top5_flow": np.mean([_top5(one) for one in length]),
        "residual_flow": np.sqrt(_square(flow - shift[:, None, None])).mean(dtype=np.float64),
        "moving_area": (length > MOVING).mean(),
        "camera_shift": np.linalg.norm(shift, axis=-1).mean(),
        "flicker": 1 - np.mean([cv2.absdiff(a, b).mean() for a, b in itertools.pairwise(frames)]) / 255,
        "luma_flicker": np.abs(np.diff(luma, 2)).mean() if len(frames) > 2 else math.nan,
        "warp_error": warp_error(frames, flow, flow_fn(frames[::-1])[::-1]),
        "smoothness": smoothness(frames, flow_fn),
        "ssim0_image": to_image[0],
        "psnr0_image": psnr(frames[0], image),
        "ssim_image": to_image.mean(),
        "psnr_image": np.mean([psnr(f, image) for f in frames]),
        "best_frame": to_image.argmax(),
        "best_ssim": to_image.max(),
        **{f"ssim_first_{k}": to_first[k - 1] if k < len(frames) else math.nan for k in DECAY},
        "ssim_first": to_first.mean(),
        "psnr_first": np.mean([psnr(f, frames[0]) for f in frames[1:]]),
    }
    return {name: float(value) for name, value in row.items()}


def _grey(picture: Image) -> UInt8[np.ndarray, "H W"]:
    return cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)


def _square(flow: np.ndarray) -> np.ndarray:
    """|flow|^2 of [..., 2]: NumPy's sum over so short an axis takes far longer."""
    return flow[..., 0] ** 2 + flow[..., 1] ** 2


def _top5(length_HW: np.ndarray) -> float:
    count = max(1, int(0.05 * length_HW.size))
    return float(np.partition(length_HW, length_HW.size - count, axis=None)[-count:].mean(dtype=np.float64))


def dynamic_degree(frames_THW3: Frames, fps: float, flow_fn: FlowFn, flow: np.ndarray | None = None) -> float:
    """VBench's rule: 1 when round(4 T / 16) of the steps have a top-5 % flow above 6 min(H, W) / 256 pixels, else 0.

    Videos of more than 8 frames a second are thinned to about 8 first; for slower ones the threshold grows by 8 / fps. `flow` is that of
    the frames as given, if it is known already. Source: dynamic_degree.py of VBench, which asks RAFT.
    """
    stride = max(1, round(fps / 8))
    frames = frames_THW3[::stride]
    if len(frames) < 2:
        return math.nan
    if stride > 1 or flow is None:
        flow = flow_fn(frames)
    threshold = max(1.0, 8 / fps) * 6 * min(frames.shape[1:3]) / 256
    fast = sum(_top5(np.sqrt(_square(one))) > threshold for one in flow)
    return float(fast >= max(1, round(4 * len(frames) / 16)))


def _warped(picture: np.ndarray, flow_HW2: np.ndarray) -> np.ndarray:
    """picture(p + flow(p)), bilinear; beyond the border its outermost pixels."""
    height, width = flow_HW2.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(picture, x + flow_HW2[..., 0], y + flow_HW2[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def warp_error(frames_THW3: Frames, forward: Float[np.ndarray, "T-1 H W 2"], backward: Float[np.ndarray, "T-1 H W 2"]) -> float:
    """Mean |x_{t+1}(p + f(p)) - x_t(p)| in grey levels: flicker with the motion taken out.

    Over pixels where the flow to the next frame and back agree, |f + b(p + f)|^2 <= 0.01 (|f|^2 + |b|^2) + 0.5; NaN where none do.
    """
    total, count = 0.0, 0
    for first, second, f, b in zip(frames_THW3[:-1], frames_THW3[1:], forward, backward, strict=True):
        back = _warped(np.ascontiguousarray(b), f)
        agree = _square(f + back) <= 0.01 * (_square(f) + _square(back)) + 0.5
        error = np.abs(_warped(second.astype(np.float32), f) - first)[agree]
        total, count = total + float(error.sum(dtype=np.float64)), count + error.size
    return total / count if count else math.nan


def smoothness(frames_THW3: Frames, flow_fn: FlowFn) -> float:
    """1 - mean |x_t - its guess| / 255 over odd t, the guess being the mean of both neighbours, each warped half way to the other.

    VBench's motion_smoothness, with optical flow in place of its interpolation network. NaN for two frames.
    """
    even = frames_THW3[::2]
    if len(even) < 2:
        return math.nan
    forward, backward = flow_fn(even), flow_fn(even[::-1])[::-1]
    errors = []
    for before, after, middle, f, b in zip(even[:-1], even[1:], frames_THW3[1::2], forward, backward, strict=False):
        guess = (_warped(before.astype(np.float32), b / 2) + _warped(after.astype(np.float32), f / 2)) / 2
        errors.append(np.abs(guess - middle).mean(dtype=np.float64))
    return 1 - float(np.mean(errors)) / 255


def ssim(first_HW: UInt8[np.ndarray, "H W"], second_HW: UInt8[np.ndarray, "H W"]) -> float:
    """Structural similarity of two grey pictures (Wang et al. 2004): Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03,
    L = 255, mean over the map without the 5 pixels at its border.
    """
    a, b = first_HW.astype(np.float64), second_HW.astype(np.float64)

    def local_mean(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, (WINDOW, WINDOW), SIGMA)

    mean_a, mean_b = local_mean(a), local_mean(b)
    spread = local_mean(a * a) - mean_a**2 + local_mean(b * b) - mean_b**2
    both = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    map_HW = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (spread + c2))
    edge = WINDOW // 2
    return float(map_HW[edge:-edge, edge:-edge].mean())


def psnr(first: UInt8[np.ndarray, "*shape"], second: UInt8[np.ndarray, "*shape"]) -> float:
    """dB at 8 bits; at most 100, the value of equal pictures."""
    error = np.square(first.astype(np.float32) - second).mean(dtype=np.float64)
    return min(SAME, 10 * math.log10(255**2 / error)) if error else SAME
