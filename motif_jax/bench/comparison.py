"""Arms of an experiment against each other: per-clip measures of several seeds in, rates, preferences and intervals out.

Every array is [seeds, clips]: the same clips for all seeds and arms, so that every comparison is paired.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

# The rule of preference, fixed before any test clip was sampled.
MARGIN = 1 / 64  # path errors (over the width) that differ by less are a tie
LOST = 0.9  # a clip that shows the object in a smaller share of its frames has the path error 1
VETO_DB = 3.0  # strict: a background this much worse wins nothing
GHOSTS = (0.5, 2.0)  # strict: nor does an object whose colour covers less or more of its true area in the last frame

Measures = dict[str, Float[np.ndarray, "S N"]]


def path_error(m: Measures) -> Float[np.ndarray, "S N"]:
    """Path error over the width, 1 where the named object is lost."""
    return np.where(m["presence"] >= LOST, m["path_error"], 1.0)


def prefer(a: Measures, b: Measures, strict: bool = False) -> Float[np.ndarray, "S N"]:
    """1 where a is preferred to b, 0 where b is, 0.5 for a tie.

    The clip wins whose named object keeps nearer to its true path by more than MARGIN. strict: no win with a background more
    than VETO_DB worse than the other's, or with ghosts that the other clip does not have; such a win becomes a tie.
    """
    difference = path_error(b) - path_error(a)
    wins_a, wins_b = difference > MARGIN, difference < -MARGIN
    if strict:
        worse = b["background_psnr"] - a["background_psnr"]
        ghost_a, ghost_b = (~((m["area_ratio"] >= GHOSTS[0]) & (m["area_ratio"] <= GHOSTS[1])) for m in (a, b))
        wins_a &= (worse <= VETO_DB) & ~(ghost_a & ~ghost_b)
        wins_b &= (worse >= -VETO_DB) & ~(ghost_b & ~ghost_a)
    return 0.5 + 0.5 * wins_a - 0.5 * wins_b


def estimate(x: Float[np.ndarray, "S N"], use: Bool[np.ndarray, " N"] | None = None, draws: int = 4000) -> dict[str, Any]:
    """Mean of x, its 95 % bootstrap interval over clips and seeds (both drawn with replacement), and the mean of each seed.

    Values that are not finite are left out. With one seed the interval speaks of clips alone.
    """
    x = np.asarray(x, float)[:, slice(None) if use is None else use]
    seeds, clips = x.shape
    if not np.isfinite(x).any():
        return {"mean": None, "low": None, "high": None, "seeds": [None] * seeds, "clips": clips}
    rng = np.random.default_rng(0)
    weight_N = rng.multinomial(clips, np.full(clips, 1 / clips), draws).astype(float)  # [draws, N]
    weight_S = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws).astype(float)
    known = np.isfinite(x)
    total = np.einsum("ds,sn,dn->d", weight_S, np.where(known, x, 0.0), weight_N, optimize=True)
    count = np.einsum("ds,sn,dn->d", weight_S, known.astype(float), weight_N, optimize=True)
    low, high = np.quantile(total[count > 0] / count[count > 0], [0.025, 0.975])
    each = [float(row[ok].mean()) if ok.any() else None for row, ok in zip(x, known, strict=True)]
    return {"mean": float(x[known].mean()), "low": float(low), "high": float(high), "seeds": each, "clips": clips}
