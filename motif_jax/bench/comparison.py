"""Arms of an experiment against each other: per-clip measures of several seeds in, rates, preferences and intervals out.

Every array is [seeds, clips]: the same clips for all seeds and arms, so that every comparison is paired.
"""

import functools
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from motif_jax.bench.preference import crossed_weights, share_interval

# The rule of preference, fixed before any test clip was sampled.
MARGIN = 1 / 64  # path errors (over the width) that differ by less are a tie
LOST = 0.9  # a clip that shows the object in a smaller share of its frames has the path error 1
VETO_DB = 3.0  # strict: a background this much worse wins nothing
AREA_RANGE = (0.5, 2.0)  # strict: nor does an object whose colour covers less or more of its true area in the last frame

RATE, GAP = (0.0, 1.0), (-1.0, 1.0)  # bounds of a rate or a preference, and of the difference of two rates

Measures = dict[str, Float[np.ndarray, "S N"]]


def path_error(m: Measures) -> Float[np.ndarray, "S N"]:
    """Path error over the width, 1 where the named object is lost."""
    return np.where(m["presence"] >= LOST, m["path_error"], 1.0)


def prefer(a: Measures, b: Measures, strict: bool = False) -> Float[np.ndarray, "S N"]:
    """1 where a is preferred to b, 0 where b is, 0.5 for a tie.

    The clip wins whose named object keeps nearer to its true path by more than MARGIN. strict: no win with a background more
    than VETO_DB worse than the other's, or with an area of the object outside AREA_RANGE (it faded, or left ghosts) where the other's
    is inside; such a win becomes a tie.
    """
    difference = path_error(b) - path_error(a)
    wins_a, wins_b = difference > MARGIN, difference < -MARGIN
    if strict:
        worse = b["background_psnr"] - a["background_psnr"]
        wrong_a, wrong_b = (~((m["area_ratio"] >= AREA_RANGE[0]) & (m["area_ratio"] <= AREA_RANGE[1])) for m in (a, b))
        wins_a &= (worse <= VETO_DB) & ~(wrong_a & ~wrong_b)
        wins_b &= (worse >= -VETO_DB) & ~(wrong_b & ~wrong_a)
    return 0.5 + 0.5 * wins_a - 0.5 * wins_b


def estimate(
    x: Float[np.ndarray, "S N"], use: Bool[np.ndarray, " N"] | None = None, bounds: tuple[float, float] | None = None, draws: int = 4000
) -> dict[str, Any]:
    """Mean of x, its 95 % bootstrap interval over clips and seeds (both drawn with replacement), and the mean of each seed.

    Values that are not finite are left out. With one seed the interval speaks of clips alone; with two or three it is too narrow, and
    holds the mean of all seeds in some 80 to 90 %. Of fewer than five clips there is none.
    bounds: between which every value lies, see `share_interval`.
    """
    x = np.asarray(x, float)[:, slice(None) if use is None else use]
    clips = x.shape[1]
    counted = np.isfinite(x)
    each = [float(row[ok].mean()) if ok.any() else None for row, ok in zip(x, counted, strict=True)]
    if not counted.any():
        return {"mean": None, "low": None, "high": None, "seeds": each, "clips": clips}
    used = int(counted.any(0).sum())
    mean, low, high = share_interval(np.where(counted, x, 0.0).ravel(), counted.ravel(), _weights(x.shape, draws), used, bounds)
    return {"mean": mean, "low": low, "high": high, "seeds": each, "clips": clips}


@functools.lru_cache(maxsize=16)
def _weights(shape: tuple[int, int], draws: int) -> Float[np.ndarray, "D S*N"]:
    """How often each draw takes a clip of a seed: a report asks for the same shapes hundreds of times."""
    seed, clip = (index.ravel() for index in np.indices(shape))
    return crossed_weights(seed, clip, draws, seed=0)
