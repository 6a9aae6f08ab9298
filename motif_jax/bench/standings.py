"""Rows of numbers, one per video, in; what may be said of each model and of each two models out, with intervals.

A pair's value is the mean over its seeds. Intervals are 95 % bootstrap intervals over images, since pairs that share an image are not
independent, and none of fewer than five images; no number here says which model is better, see the notes.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from motif_jax.bench.preference import MIN_CLUSTERS, bootstrap, cluster_weights, share_interval

STATIC = "static"  # the row of the image repeated
SAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True)
class Metric:
    """How a measure of `video_metrics` or `clip_alignment` is shown; `scale` times the value, e.g. 100 for per cent."""

    name: str
    label: str
    note: str
    digits: int = 2
    scale: float = 1
    statistic: Callable[[np.ndarray], float] = np.mean
    rate: bool = False  # of videos that do a thing: its mean lies between 0 and 1


DYNAMIC_DEGREE = "videos that move by VBench's rule; camera shake and artefacts count too"
LUMA_FLICKER = "jumps of the mean brightness, grey levels; median, as one blinking lamp outweighs all others"
METRICS = (
    Metric("dynamic_degree", "dynamic degree %", DYNAMIC_DEGREE, 1, 100, rate=True),
    Metric("mean_flow", "mean flow px", "pixels per frame"),
    Metric("top5_flow", "top-5 % flow px", "mean of the fastest 5 % of pixels, per frame, which the dynamic degree asks for"),
    Metric("residual_flow", "residual flow px", "what is left of the flow without the whole picture's shift: objects, not the camera"),
    Metric("moving_area", "moving area %", "pixels that move by more than half a pixel a frame", 1, 100),
    Metric("camera_shift", "camera shift px", "shift of the whole picture, pixels per frame"),
    Metric("flicker", "flicker %", "1 - mean difference of successive frames: falls with motion, 100 for a still", 2, 100),
    Metric("luma_flicker", "luma flicker", LUMA_FLICKER, statistic=np.median),
    Metric("warp_error", "warp error", "difference of successive frames with the motion taken out, grey levels"),
    Metric("smoothness", "smoothness %", "how well a frame is guessed from its neighbours: falls with motion, 100 for a still", 2, 100),
    Metric("ssim0_image", "SSIM frame 0", "does it start at the image?", 3),
    Metric("psnr0_image", "PSNR frame 0 dB", "the same in dB", 1),
    Metric("ssim_image", "SSIM all frames", "likeness to the image over all frames: a still has 1", 3),
    Metric("psnr_image", "PSNR all frames dB", "the same in dB; 100 for equal pictures", 1),
    Metric("best_ssim", "best SSIM", "the frame most like the image: hides that a video does not start there", 3),
    Metric("best_frame", "best frame", "number of that frame, 0 is the first", 1),
    Metric("ssim_first_1", "SSIM 1 to 0", "how fast a video leaves its own first frame: frame 1", 2),
    Metric("ssim_first_5", "SSIM 5 to 0", "frame 5", 2),
    Metric("ssim_first_10", "SSIM 10 to 0", "frame 10", 2),
    Metric("ssim_first_15", "SSIM 15 to 0", "frame 15", 2),
    Metric("ssim_first", "SSIM to frame 0", "mean over all frames but the first", 3),
    Metric("psnr_first", "PSNR to frame 0 dB", "the same in dB", 1),
    Metric("clip_image", "CLIP image", "100 x mean cosine of frames and image: a still has 100"),
    Metric("clip_text", "CLIP text", "100 x mean cosine of frames and prompt: a still has its image's"),
)


def standings(rows: Sequence[Mapping[str, Any]], images: Mapping[str, str], names: Sequence[str] = (), seed: int = 0) -> dict[str, Any]:
    """{"models": {model: {"videos", "pairs", "images", "metrics": {name: {"value", "low", "high", "pairs"}}}},
    "common_pairs": how many all models with rows have, "differences": [...]}.

    rows: dicts with `model`, `id`, `seed` and the measures, NaN or absent where there is none. images: pair id -> its image. names: models
    that stand in the result with or without rows. low and high are None where there is no interval. A difference is of the pairs that both
    models have: value and interval of `a` minus `b`, the shares of pairs in which either is larger.
    """
    values: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        for metric in METRICS:
            if np.isfinite(row.get(metric.name, np.nan)):
                values[row["model"]][metric.name][row["id"]].append(row[metric.name])
    means = {model: {name: {i: float(np.mean(v)) for i, v in of.items()} for name, of in found.items()} for model, found in values.items()}

    models = {}
    for model in dict.fromkeys([*names, *means]):
        found, own = means.get(model, {}), [row for row in rows if row["model"] == model]
        models[model] = {
            "videos": len(own),
            "pairs": len({row["id"] for row in own}),
            "images": len({images[row["id"]] for row in own}),
            "metrics": {
                m.name: _estimate(found[m.name], images, m, seed, (0.0, 1.0) if m.rate and model != STATIC else None)
                for m in METRICS
                if m.name in found
            },
        }
    differences = []
    for a, b in combinations(means, 2):
        for m in METRICS:
            of_a, of_b = means[a].get(m.name, {}), means[b].get(m.name, {})
            if gap := {i: of_a[i] - of_b[i] for i in of_a if i in of_b}:
                estimate = _estimate(gap, images, m, seed, (-1.0, 1.0) if m.rate else None)
                shares = {
                    "a_larger": float(np.mean([g > 0 for g in gap.values()])),
                    "b_larger": float(np.mean([g < 0 for g in gap.values()])),
                }
                differences.append({"metric": m.name, "a": a, "b": b, **estimate, **shares})
    own = [{row["id"] for row in rows if row["model"] == model} for model in means if model != STATIC]
    return {"models": models, "common_pairs": len(set.intersection(*own)) if own else 0, "differences": differences}


def _estimate(
    of_pair: Mapping[str, float], images: Mapping[str, str], metric: Metric, seed: int, bounds: tuple[float, float] | None
) -> dict[str, float | None]:
    values = np.array(list(of_pair.values()))
    clusters = [images[i] for i in of_pair]
    count, weights = len(set(clusters)), cluster_weights(clusters, SAMPLES, seed)
    if metric.statistic is np.mean:
        _, low, high = share_interval(values, np.ones(len(values)), weights, count, bounds)
    else:
        low, high = bootstrap(metric.statistic, values, weights if count >= MIN_CLUSTERS else weights[:0])
    return {"value": float(metric.statistic(values)), "low": low, "high": high, "pairs": len(values)}
