"""Votes in, every number of the report out, as plain dictionaries for JSON.

Win rates are majority verdicts per pair (the paper's TI2V score) and shares of single votes; the reasons are shares of single
votes (its figure 4). Only votes of kind "pair" count for them; repeats, gold and training items tell about annotators.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from motif_jax.bench import preference
from motif_jax.bench.preference import MIN_CLUSTERS
from motif_jax.bench.study import REASONS
from motif_jax.bench.votes import Vote
from motif_jax.errors import UserError

LOW_AGREEMENT = 0.2  # below that a majority is hardly more than a coin
BALANCED = (0.4, 0.6)  # shares of the votes with a system on the left; outside, liking a side looks like liking a system


def analyse(
    votes: Sequence[Vote],
    models: Sequence[str] = (),
    reference: str | None = None,
    samples: int = 2000,
    seed: int = 0,
    refused: Sequence[str] = (),
) -> dict[str, Any]:
    """All statistics of a study.

    models: order of the systems; reference: the one that wins or loses (default: the first, or the one that met most others).
    samples: of every bootstrap, but for agreement, which takes a quarter. refused: why other votes do not count. Raises UserError
    without votes on pairs, and when the reference has none.
    """
    counted = [v for v in votes if v.kind == "pair"]
    if not counted:
        others = f"; {len(refused)} refused, the first: {refused[0][:200]}" if refused else ""
        raise UserError(f"no votes on pairs among {len(votes)} votes{others}")
    met = Counter(name for pair in {frozenset((v.left, v.right)) for v in counted} for name in pair)
    names = [m for m in models if m in met] + sorted(set(met) - set(models), key=lambda name: (-met[name], name))
    reference = reference or names[0]
    if reference not in met:
        raise UserError(f"--reference={reference}: has no votes; the systems are {', '.join(names)}")
    names.sort(key=lambda name: name != reference)
    groups = defaultdict(list)
    for v in counted:
        groups[tuple(sorted((v.left, v.right), key=names.index))].append(v)
    rows = [compare(a, b, groups[a, b], samples, seed) for a, b in sorted(groups, key=lambda g: [names.index(n) for n in g])]
    for p, name in (("p", "p_holm"), ("p_images", "p_images_holm")):
        for row, adjusted in zip(rows, preference.holm([row["majority"][p] for row in rows]), strict=True):
            row["majority"][name] = adjusted
    seconds = [v.seconds for v in counted if v.seconds is not None]
    return {
        "reference": reference,
        "models": names,
        "votes": dict(Counter(v.kind for v in votes)),
        "comparisons": rows,
        "side": side_bias(counted),
        "repeats": consistency(votes),
        "gold": gold(votes),
        "seconds": {"quartiles": np.quantile(seconds, [0.25, 0.5, 0.75]).tolist(), "hours": sum(seconds) / 3600} if seconds else None,
        "annotators": annotators(votes),
        "bradley_terry": ranking(counted, names, samples, seed) if len(names) > 2 else None,
        "refused": list(refused),
    }


def _known(low: float | None, high: float | None) -> list[float] | None:
    return None if low is None else [low, high]


def score(vote: Vote, model: str) -> float:
    """1 when the vote is for `model`, 0 when against it, 0.5 for a tie."""
    return 0.5 if vote.choice == "tie" else float((vote.left if vote.choice == "left" else vote.right) == model)


def compare(a: str, b: str, votes: Sequence[Vote], samples: int, seed: int) -> dict[str, Any]:
    """`a` against `b`: rates of `a` with intervals, reasons, agreement, and what a study of this size can detect.

    A pair whose votes are split evenly is half a win for both in the rate, and counts for neither in the test. p is the exact
    binomial test of the others, as if pairs had nothing in common; p_images takes the pairs of an image for one.
    """
    by_pair = defaultdict(list)
    for v in votes:
        by_pair[v.pair].append(v)
    pairs = list(by_pair.values())
    scores = [[score(v, a) for v in group] for group in pairs]
    totals = np.array([len(s) for s in scores], float)
    for_a = np.array([sum(s) for s in scores])
    verdicts = np.where(for_a * 2 == totals, 0.5, for_a * 2 > totals)
    clusters = [group[0].image or group[0].pair for group in pairs]
    scenarios = [group[0].scenario for group in pairs] if all(group[0].scenario for group in pairs) else []
    weights = preference.cluster_weights(clusters, samples, seed)
    by_scenario = preference.cluster_weights(scenarios, samples, seed) if scenarios else None
    images, people = len(set(clusters)), [v.annotator for group in pairs for v in group]

    def limits(*counted: Any) -> list[float] | None:
        return _known(*preference.share_interval(*counted)[1:])

    def rate(hits: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
        return {
            "rate": float(hits.sum() / counts.sum()),
            "wilson": preference.wilson(float(hits.sum()), int(counts.sum())),
            "bootstrap": limits(hits, counts, weights, images),
            "bootstrap_scenarios": limits(hits, counts, by_scenario, len(set(scenarios))),
        }

    each = np.concatenate(scores)
    crossed = preference.crossed_weights(np.repeat(clusters, totals.astype(int)), people, samples, seed)
    wins, losses = int((verdicts == 1).sum()), int((verdicts == 0).sum())
    effect = preference.design_effect(verdicts, weights) if images >= MIN_CLUSTERS else None  # fewer do not tell how alike pairs are
    independent = preference.minimum_detectable(len(pairs))
    clustered = effect and preference.minimum_detectable(len(pairs) / effect)
    return {
        "a": a,
        "b": b,
        "pairs": len(pairs),
        "images": images,
        "scenarios": len(set(scenarios)),
        "votes": int(totals.sum()),
        "votes_per_pair": [int(totals.min()), int(totals.max())],
        "annotators": len(set(people)),
        "majority": rate(verdicts, np.ones(len(pairs)))
        | {"wins": wins, "losses": losses, "even": len(pairs) - wins - losses}
        | {"p": preference.binomial_p(wins, wins + losses), "p_images": preference.sign_flip_p(2 * verdicts - 1, clusters)},
        "vote_share": rate(for_a, totals)
        | {"bootstrap_annotators": limits(each, np.ones(len(each)), crossed, min(images, len(set(people))))},
        "sides": sides(a, votes),
        # Votes none of which has a reason are of a study that did not ask for any.
        "reasons": {name: _reason(name, pairs, scores, weights, images) for name in REASONS} if any(v.reasons for v in votes) else {},
        "agreement": agreement(scores, weights[: max(1, samples // 4) if images >= MIN_CLUSTERS else 0]),
        "detectable": {
            "independent": independent,
            "clustered": clustered and max(independent, clustered),  # exact tests move in steps: fewer pairs may seem to do better
            "design_effect": effect,
        },
    }


def sides(a: str, votes: Sequence[Vote]) -> dict[str, Any]:
    """How often `a` was shown on the left, and its share of the votes on either side (None where it never was)."""
    left = [score(v, a) for v in votes if v.left == a]
    right = [score(v, a) for v in votes if v.left != a]
    share = {name: float(np.mean(x)) if x else None for name, x in (("when_left", left), ("when_right", right))}
    return {"a_left": len(left) / len(votes)} | share


def _reason(name: str, pairs: list[list[Vote]], scores: list[list[float]], weights: np.ndarray, images: int) -> dict[str, Any]:
    """Shares of single votes: `a` chosen for this reason, `b` chosen for it, neither; and how often who chose a system ticked it."""
    totals = np.array([len(group) for group in pairs], float)

    def ticked(which: float) -> np.ndarray:
        return np.array(
            [sum(s == which and name in v.reasons for v, s in zip(*both, strict=True)) for both in zip(pairs, scores, strict=True)]
        )

    won, lost = ticked(1.0), ticked(0.0)
    neither = totals - won - lost  # a tie has no reasons
    chose_a, chose_b = (sum(own.count(which) for own in scores) for which in (1.0, 0.0))
    found = {}
    for label, hits in (("win", won), ("none", neither), ("lose", lost)):
        rate, low, high = preference.share_interval(hits, totals, weights, images)
        found[label] = {"rate": rate, "low": low, "high": high}
    given = {"a": won.sum() / chose_a if chose_a else None, "b": lost.sum() / chose_b if chose_b else None}
    return found | {"given_choice": given, "alpha": preference.krippendorff_alpha(np.stack([won, neither, lost], 1))}


def agreement(scores: list[list[float]], weights: np.ndarray) -> dict[str, Any]:
    """Krippendorff's alpha over all pairs, Fleiss' kappa over those with the usual number of votes, and how votes split."""
    counts = np.array([[own.count(which) for which in (1.0, 0.0, 0.5)] for own in scores])
    totals = counts.sum(1)
    several = totals >= 2
    if not several.any():
        return {"alpha": None, "kappa": None}
    usual = Counter(totals[several].tolist()).most_common(1)[0][0]
    full = totals == usual
    margin = np.abs(counts[several, 0] - counts[several, 1])
    return {
        "alpha": preference.krippendorff_alpha(counts),
        "alpha_interval": preference.bootstrap(preference.krippendorff_alpha, counts, weights),
        "kappa": preference.fleiss_kappa(counts[full]),
        "kappa_interval": preference.bootstrap(preference.fleiss_kappa, counts[full], weights[:, full]),
        "kappa_pairs": int(full.sum()),
        "kappa_raters": usual,
        "unanimous": float((counts[several].max(1) == totals[several]).mean()),
        "split": float((margin <= 1).mean()),
    }


def side_bias(votes: Sequence[Vote]) -> dict[str, Any]:
    """How often the left video was chosen (ties aside), with Wilson's interval and exact p against one half."""
    left = [float(v.choice == "left") for v in votes if v.choice != "tie"]
    return preference.rate(left) | {"p": preference.binomial_p(int(sum(left)), len(left))}


def gold(votes: Sequence[Vote]) -> dict[str, Any]:
    """How often gold items were answered right."""
    return preference.rate([float(v.choice == v.better) for v in votes if v.kind == "gold"])


def consistency(votes: Sequence[Vote]) -> dict[str, Any]:
    """How often an annotator chose the same system again when a pair came back with the sides swapped.

    The first vote is theirs on the same pair and systems; one of another task than the repeat names tells nothing.
    """

    first = {(v.annotator, v.subject): v for v in votes if v.kind == "pair"}
    again = [(v, first.get((v.annotator, v.subject))) for v in votes if v.kind == "repeat"]
    again = [(v, before) for v, before in again if before and v.repeats in ("", before.task)]
    return preference.rate([float(score(v, v.left) == score(before, v.left)) for v, before in again])


def annotators(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """One row per annotator: votes, time, side, gold, repeats, and agreement with the majority of the others on the same pair."""
    everyone, by_name = defaultdict(list), defaultdict(list)
    for v in votes:
        by_name[v.annotator].append(v)
        if v.kind == "pair":
            everyone[v.subject].append(v)
    rows = []
    for name, own in sorted(by_name.items()):
        judged = [v for v in own if v.kind == "pair"]
        agrees = []
        for v in judged:
            others = [score(o, v.left) for o in everyone[v.subject] if o.annotator != name]
            if v.choice != "tie" and others and sum(others) * 2 != len(others):
                agrees.append(float((sum(others) * 2 > len(others)) == (v.choice == "left")))
        seconds = [v.seconds for v in judged if v.seconds is not None]
        rows.append(
            {
                "annotator": name,
                "votes": len(judged),
                "median_seconds": float(np.median(seconds)) if seconds else None,
                "left": side_bias(judged),
                "gold": gold(own),
                "repeats": consistency(own),
                "agreement": preference.rate(agrees),
            }
        )
    return rows


def ranking(votes: Sequence[Vote], names: Sequence[str], samples: int, seed: int) -> list[dict[str, Any]] | None:
    """Bradley-Terry strengths of all systems, best first: in points (400 for odds of ten to one, mean zero) with bootstrap intervals
    over images, and over images and annotators. None when the systems fall into groups that never met: nothing ranks one group against
    the other.
    """
    cells = {cell: n for n, cell in enumerate(sorted({(v.image or v.pair, v.annotator) for v in votes}))}
    wins = np.zeros((len(cells), len(names), len(names)))
    for v in votes:
        i, j, c = names.index(v.left), names.index(v.right), cells[v.image or v.pair, v.annotator]
        wins[c, i, j] += score(v, v.left)
        wins[c, j, i] += score(v, v.right)
    reached = np.linalg.matrix_power((wins.sum(0) + wins.sum(0).T > 0) + np.eye(len(names)), len(names)) > 0
    if not reached.all():
        return None
    points = 400 / np.log(10)
    strength = points * preference.bradley_terry(wins.sum(0))
    images, people = zip(*cells, strict=True)

    def drawn(weights: np.ndarray, clusters: int) -> np.ndarray:
        """Strengths [draws, systems]; no draws where there are too few clusters."""
        return points * preference.bradley_terry(np.tensordot(weights if clusters >= MIN_CLUSTERS else weights[:0], wins, 1))

    over_images = drawn(preference.cluster_weights(images, samples, seed), len(set(images)))
    crossed = preference.crossed_weights(images, people, samples, seed)
    over_both = drawn(crossed, min(len(set(images)), len(set(people))))
    rows = []
    for i in np.argsort(-strength):
        low, high = preference.interval(over_images[:, i])
        rows.append(
            {
                "model": names[i],
                "points": float(strength[i]),
                "low": low,
                "high": high,
                "bootstrap_annotators": _known(*preference.interval(over_both[:, i])),
                "votes": float((wins + wins.swapaxes(1, 2))[:, i].sum()),
            }
        )
    return rows
