"""Statistics of pairwise votes: tables of votes in, rates, intervals, agreement and rankings out. Arrays and plain numbers only.

Pairs that share an image are not independent (TI2V-Bench: 320 pairs, 88 images), so intervals resample images, not pairs; nor are the
votes of one person, so that an interval that is to speak of other people resamples them too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import scipy
from jaxtyping import Float, Int

CONFIDENCE = 0.95
MIN_CLUSTERS = 5  # fewer say nothing of those that were not drawn: no interval


def finite(tree: Any) -> Any:
    """Of nested dicts and sequences for JSON, which has no NaN and no infinity: None instead."""
    if isinstance(tree, Mapping):
        return {k: finite(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(v) for v in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a rate; (0, 1) when nothing was counted. Raises ValueError unless 0 <= successes <= count."""
    if not 0 <= successes <= count:
        raise ValueError(f"{successes} successes in {count} trials: must lie between 0 and the number of trials")
    if count == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    p, scale = successes / count, 1 + z * z / count
    middle = (p + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(hits_N: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Share of hits (each 0 to 1; None when there are none) with Wilson's interval, and their number."""
    low, high = wilson(float(np.sum(hits_N)), len(hits_N))
    return {"rate": float(np.mean(hits_N)) if len(hits_N) else None, "low": low, "high": high, "count": len(hits_N)}


def binomial_p(wins: int, count: int) -> float:
    """Two-sided exact p of `wins` out of `count` against one half; 1 when nothing was counted."""
    return float(scipy.stats.binomtest(wins, count).pvalue) if count else 1.0


def sign_flip_p(leads_N: Sequence[int] | np.ndarray, clusters_N: Sequence) -> float:
    """Two-sided exact p of pairs won (1), lost (-1) or even (0), when the names of the two systems mean nothing: all pairs of a cluster
    exchange them together or not, in all 2^clusters ways. Where no two pairs share a cluster it is `binomial_p` without the even pairs.
    """
    _, index = np.unique(np.asarray(clusters_N), return_inverse=True)
    leads = np.bincount(index, np.asarray(leads_N, float)).astype(int)
    chances = np.ones(1)  # of all sums from the lowest to the highest
    for lead in np.abs(leads):
        more = np.zeros(2 * lead)
        chances = (np.append(chances, more) + np.append(more, chances)) / 2
    highest = np.abs(leads).sum()
    return min(1.0, float(chances[np.abs(np.arange(-highest, highest + 1)) >= abs(leads.sum())].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family of p values, in their order. Source: Holm, Scand. J. Statist. 6 (1979) 65-70."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted.tolist()


def cluster_weights(clusters_N: Sequence, samples: int, seed: int) -> Int[np.ndarray, "B N"]:
    """How often each observation is in each bootstrap sample: whole clusters are drawn with replacement, as many as there are."""
    names, index = np.unique(np.asarray(clusters_N), return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    return drawn[:, index]


def crossed_weights(first_N: Sequence, second_N: Sequence, samples: int, seed: int) -> Int[np.ndarray, "B N"]:
    """The same for observations in clusters of two kinds, such as images and annotators, each drawn by itself; rather too wide than too
    narrow where both have many clusters. Source: Owen, Annals of Applied Statistics 1 (2007) 386-411.
    """
    return cluster_weights(first_N, samples, seed) * cluster_weights(second_N, samples, seed + 1)


def interval(values_B: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """Percentile interval of bootstrap values; of none where none is a number."""
    values = np.asarray(values_B, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return None, None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def share_interval(
    hits_N: Float[np.ndarray, "N"],
    totals_N: Float[np.ndarray, "N"],
    weights_BN: Int[np.ndarray, "B N"],
    clusters: int,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> tuple[float | None, float | None, float | None]:
    """sum(hits) / sum(totals) with its bootstrap interval: (share, low, high); None where nothing was counted.

    clusters: how many `weights_BN` draw from; fewer than MIN_CLUSTERS have no interval. bounds: between which hits / totals must
    lie. Where they are all alike no draw differs, but what was not seen may: so many of the clusters as Wilson's interval for none of
    them allows lie at one of the bounds (of a rate of 0 or 1 this is Wilson's interval).
    """
    hits, totals = np.asarray(hits_N, float), np.asarray(totals_N, float)
    if not totals.sum() > 0:
        return None, None, None
    share = float(hits.sum() / totals.sum())
    if clusters < MIN_CLUSTERS:
        return share, None, None
    if bounds is not None and np.ptp(hits[totals > 0] / totals[totals > 0]) == 0:
        unseen = wilson(0, clusters)[1]
        return share, share - unseen * (share - bounds[0]), share + unseen * (bounds[1] - share)
    drawn = weights_BN @ np.stack([hits, totals], 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return share, *interval(drawn[:, 0] / drawn[:, 1])


def design_effect(hits_N: Float[np.ndarray, "N"], weights_BN: Int[np.ndarray, "B N"]) -> float:
    """Variance of a mean under the bootstrap over that of as many independent observations: how much the clusters cost. At least 1."""
    hits = np.asarray(hits_N, float)
    if len(hits) < 2 or hits.std() == 0:
        return 1.0
    means = (weights_BN @ hits) / np.maximum(weights_BN.sum(1), 1)
    return max(1.0, float(means.var() / (hits.var() / len(hits))))


def smallest_significant(count: int) -> int | None:
    """The fewest wins of `count` above one half that the two-sided exact test calls significant; None when not even all are."""
    wins = int(scipy.stats.binom.isf((1 - CONFIDENCE) / 2, count, 0.5)) + 1  # the smallest k with P(X >= k) <= 2.5 %
    return wins if wins <= count else None


def minimum_detectable(count: float) -> float | None:
    """The true win rate at which the exact test comes out significant with 80 % power; None when `count` is too small for any."""
    count = int(count)
    wins = smallest_significant(count)
    return wins and float(scipy.optimize.brentq(lambda p: scipy.stats.binom.sf(wins - 1, count, p) - 0.8, 0.5, 1.0))


def fleiss_kappa(counts_NC: Int[np.ndarray, "N C"]) -> float:
    """Agreement of equally many raters per item: votes per item and category -> kappa; nan when only one category was ever chosen.

    Source: Fleiss, Psych. Bull. 76 (1971) 378-382. Raises ValueError when the items differ in their number of votes.
    """
    counts = np.asarray(counts_NC, float)
    raters = counts.sum(1)
    if len(counts) == 0 or raters.min() != raters.max() or raters[0] < 2:
        raise ValueError("Fleiss' kappa needs the same number of votes, at least two, for every item")
    n = raters[0]
    observed = ((counts**2).sum(1) - n).mean() / (n * (n - 1))
    expected = ((counts.sum(0) / counts.sum()) ** 2).sum()
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def krippendorff_alpha(counts_NC: Float[np.ndarray, "N C"]) -> float:
    """Nominal alpha from votes per item and category; items may have any number of votes, those with one say nothing.

    nan when no item has two votes or only one category was ever chosen. Source: Krippendorff, Content Analysis (2004), 11.3.
    """
    counts = np.asarray(counts_NC, float)
    counts = counts[counts.sum(1) >= 2]
    votes = counts.sum()
    if not votes:
        return float("nan")
    raters = counts.sum(1, keepdims=True)
    disagreement = (counts * (raters - counts) / (raters - 1)).sum() / votes
    totals = counts.sum(0)
    expected = (totals * (votes - totals)).sum() / (votes * (votes - 1))
    return float(1 - disagreement / expected) if expected > 0 else float("nan")


def bootstrap(
    statistic: Callable[[np.ndarray], float], rows: np.ndarray, weights_BN: Int[np.ndarray, "B N"]
) -> tuple[float, float] | tuple[None, None]:
    """Interval of a statistic of the rows [N, ...] for which no short cut exists: evaluated on every sample that has any row."""
    return interval(np.array([statistic(np.repeat(rows, weights, axis=0)) for weights in weights_BN if weights.any()]))


def bradley_terry(wins_MM: Float[np.ndarray, "*B M M"], prior: float = 0.5) -> Float[np.ndarray, "*B M"]:
    """Log strengths with mean zero: model i beats j at the rate 1 / (1 + exp(s_j - s_i)).

    wins_MM[..., i, j]: how often i beat j, a tie being half a win for both. `prior` wins are added each way to every pair of
    models that met (in any of the B tables), so that a model that never lost gets a finite strength. Every model must be linked to
    every other through such pairs.
    Source: Hunter, Annals of Statistics 32 (2004) 384-406. Newton's steps, damped as for the logistic loss in Sun and Tran-Dinh,
    Mathematical Programming 178 (2019) 145-213, so that none overshoots.
    """
    wins = np.asarray(wins_MM, float)
    met = (wins + np.swapaxes(wins, -1, -2)).reshape(-1, *wins.shape[-2:]).sum(0) > 0
    wins = wins + prior * met
    played = wins + np.swapaxes(wins, -1, -2)
    strength = np.zeros(wins.shape[:-1])
    for _ in range(1000):
        rate = scipy.special.expit(strength[..., :, None] - strength[..., None, :])
        slope = (wins - played * rate).sum(-1)
        curvature = played * rate * (1 - rate)
        laplacian = np.eye(len(met)) * curvature.sum(-1, keepdims=True) - curvature
        step = np.linalg.solve(laplacian + 1 / len(met), slope[..., None])[..., 0]
        reach = np.ptp(step, -1, keepdims=True)
        strength = strength + step * np.log1p(reach) / np.maximum(reach, np.finfo(float).tiny)
        if reach.max(initial=0) < 1e-10:
            break
    return strength
