"""The report of the ablation: what `ablation.summarise` returned in; report.html, report.md and report.json out."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from motif_jax import html
from motif_jax.bench import ablation, ablation_pictures, comparison
from motif_jax.data.storage import write_whole

RULE = (
    "Rule of preference, fixed before the test clips were sampled: the clip wins whose named object keeps nearer to its true path, by more "
    f"than {comparison.MARGIN:.3f} of the width (a clip that shows the object in less than {100 * comparison.LOST:.0f} % of its frames "
    f"counts as lost). Strict: no win with a background more than {comparison.VETO_DB:g} dB worse, or whose object ends on less than "
    "half of its true area (it faded) or more than twice of it (ghosts, smears) where the other's does not. Ties count half. "
    "Brackets: 95 % bootstrap interval over clips and seeds. Of one seed it speaks of clips alone, and another seed may differ by more; of "
    "three it is too narrow, and holds the truth in some 85 to 90 %. Two seeds say next to nothing of others: parentheses give the two."
)
ROWS = {
    "direction_ok": ("direction %", 100, ".0f"),
    "wrong_object": ("wrong object %", 100, ".0f"),
    "lost": ("object lost %", 100, ".0f"),
    "ghost": ("ghost or smear %", 100, ".0f"),
    "background_psnr": ("background dB", 1, ".1f"),
    "area_ratio": ("colour's area / true", 1, ".2f"),
    "path_error": ("path error where found, % of width", 100, ".1f"),
    "speed_ratio": ("speed / true", 1, ".2f"),
    "others_drift": ("others' drift px", 1, ".1f"),
    "still_kept": ("still kept %", 100, ".0f"),
    "leak": ("frames that copy the image %", 100, ".0f"),
    "success": ("all measures at once %", 100, ".0f"),
}
TITLES = {
    "validation": "New clips of combinations seen in training",
    "heldout": "Combinations never seen in training",
    "several": "Three shapes",
    "backgrounds": "Backgrounds of another kind",
}
SPLIT_NAMES = {"validation": "seen", "heldout": "never seen"}  # the splits on which pairs are compared
Table = tuple[str, list[str], list[list[str]]]


def cell(e: dict[str, Any], scale: float, form: str, interval: bool = True) -> str:
    """The mean of an estimate and its interval, where it has one, or both seeds where there are two, as text; "-" where nothing was
    counted."""
    if e["mean"] is None:
        return "-"
    text = format(scale * e["mean"], form)
    if interval and len(e["seeds"]) == 2:
        return f"{text} ({', '.join('-' if s is None else format(scale * s, form) for s in e['seeds'])})"
    return text + (f" [{scale * e['low']:{form}}, {scale * e['high']:{form}}]" if interval and e["low"] is not None else "")


def claims(result: dict[str, Any]) -> list[list[str]]:
    """What the paper says of its loss, for every backbone: claim, measured, does it hold."""
    rows = []
    for better, worse in ablation.claimed(result):
        ratios = [result["arms"][arm]["ratio"] for arm in (better, worse)]
        for step in sorted(set(ratios[0]) & set(ratios[1]))[-1:]:
            a, b = (found[step] for found in ratios)
            buckets = [k for k in a if k in b and k != "all"]
            gaps = [np.mean(b[k]) - np.mean(a[k]) for k in buckets]
            apart = all(min(b[k]) > max(a[k]) for k in buckets)
            seeds = (
                f"largest difference of seeds {max(_spread(a), _spread(b)):.2f}" if min(len(a["all"]), len(b["all"])) > 1 else "one seed"
            )
            measured = f"gaps {min(gaps):.2f} to {max(gaps):.2f}; {seeds}" if gaps else "-"
            rows.append([f"figure 6: {better} below {worse} at every timestep", measured, "yes" if gaps and apart else "no"])
        for split, name in SPLIT_NAMES.items():
            e = ablation.difference(result, better, worse, split, "direction_ok_difference")
            rows.append([f"direction, {better} over {worse}, {name}, points", cell(e, 100, "+.1f"), verdict(e, 0.0)])
        if not better.endswith("flow"):
            continue
        for kind in ("motion", "strict"):
            for split, name in SPLIT_NAMES.items():
                e = ablation.difference(result, better, worse, split, kind)
                rows.append([f"{better} preferred to {worse}, {kind} rule, {name}, %", cell(e, 100, ".1f"), verdict(e, 0.5)])
        for measure, what, unit, form in (
            ("background_psnr", "background", "dB", "+.2f"),
            ("ghost", "ghosts and smears", "points", "+.1f"),
        ):
            _, scale, _, gain = ablation.DIFFERENCES[measure]
            for split, name in SPLIT_NAMES.items():
                e = ablation.difference(result, better, worse, split, f"{measure}_difference")
                costly = e["low"] is not None and max(gain * e["low"], gain * e["high"]) < 0
                claim = f"cost of {better} over {worse}: {what}, {name}, {unit}"
                rows.append([claim, cell(e, scale, form), "costs" if costly else "no cost shown"])
    return rows


def verdict(e: dict[str, Any], bound: float) -> str:
    """Whether an estimate lies above a bound with its whole interval; of two seeds that is said of these two alone."""
    if e["mean"] is None or e["mean"] <= bound:
        return "no"
    if e["low"] is None:
        return "not shown: fewer than five clips"
    if e["low"] <= bound:
        return "not shown: the interval reaches it"
    return "yes, in these two seeds" if len(e["seeds"]) == 2 else "yes"


def shown_steps(result: dict[str, Any], arm: str) -> list[int]:
    """The steps of an arm that the tables show: its last, and those at which another of its family is compared with it."""
    return sorted({result["arms"][arm]["step"]} | {pair["step"] for pair in result["pairs"] if arm in (pair["a"], pair["b"])})


def tables(result: dict[str, Any]) -> list[Table]:
    """(title, heads, rows) of every table of the report."""
    arms = result["arms"]
    claimed = ("What the paper claims, and what was measured", ["claim", "measured", "holds"], claims(result))
    splits = [_measures(result, split, title) for split, title in TITLES.items()]
    preferences = []
    for split, name in SPLIT_NAMES.items():
        for kind in ("motion", "strict"):
            rows = [[a, *(cell(ablation.difference(result, a, b, split, kind), 100, ".0f", False) for b in arms)] for a in arms]
            preferences.append((f"How often the row is preferred to the column, {kind} rule, combinations {name}, %", ["", *arms], rows))
    return [claimed, _gains_and_costs(result), *splits, _along(result), _figure6(result), *preferences]


def _gains_and_costs(result: dict[str, Any]) -> Table:
    rows = []
    for pair in (p for p in result["pairs"] if ablation.reference(result, p["a"]) in (p["a"], p["b"])):
        base = ablation.reference(result, pair["a"])
        arm = pair["b"] if pair["a"] == base else pair["a"]
        row = [arm, base, str(len(pair["seeds"])), str(pair["step"])]
        for split in SPLIT_NAMES:
            row += [cell(ablation.difference(result, arm, base, split, kind), 100, ".0f") for kind in ("motion", "strict")]
            for name, (_, scale, form, _) in ablation.DIFFERENCES.items():
                row.append(cell(ablation.difference(result, arm, base, split, f"{name}_difference"), scale, form))
        rows.append(row)
    names = ("preferred, motion %", "preferred, strict %", *(title for title, *_ in ablation.DIFFERENCES.values()))
    heads = ["arm", "against", "seeds", "step", *(f"{split}: {name}" for split in SPLIT_NAMES.values() for name in names)]
    return "Every arm against the paper's loss: gains and costs", heads, rows


def _measures(result: dict[str, Any], split: str, title: str) -> Table:
    rows = []
    for arm, row in result["arms"].items():
        for step in (s for s in shown_steps(result, arm) if s in row["splits"][split]):
            found = row["splits"][split][step]
            rows.append([arm, str(len(row["seeds"])), str(step), *(cell(found[n], s, f) for n, (_, s, f) in ROWS.items())])
    clips, still = (found[n]["clips"] for n in ("direction_ok", "still_kept"))
    return (
        f"{title}: {clips} clips that move, {still} that stay still",
        ["arm", "seeds", "step", *(name for name, _, _ in ROWS.values())],
        rows,
    )


def _along(result: dict[str, Any]) -> Table:
    steps = sorted({step for pair in result["along"] for split in SPLIT_NAMES for step in pair[split]})
    rows = []
    for pair in result["along"]:
        for split, name in SPLIT_NAMES.items():
            cells = (cell(pair[split][s], 100, "+.0f") if s in pair[split] else "" for s in steps)
            rows.append([f"{pair['a']} over {pair['b']}, {name}", str(len(pair["seeds"])), *cells])
    return "Difference of direction along training, points, by step", ["pair", "seeds", *map(str, steps)], rows


def _figure6(result: dict[str, Any]) -> Table:
    arms = result["arms"]
    ratios = [(arm, step, arms[arm]["ratio"][step]) for arm in arms for step in shown_steps(result, arm) if step in arms[arm]["ratio"]]
    buckets = dict.fromkeys(k for *_, found in ratios for k in found)
    rows = []
    for arm, step, found in ratios:
        spread = f"{_spread(found):.2f}" if len(arms[arm]["seeds"]) > 1 else "-"
        rows.append([arm, str(step), *(f"{np.mean(found[k]):.2f}" if k in found else "-" for k in buckets), spread])
    heads = ["arm", "step", *("all" if k == "all" else f"bucket {k}" for k in buckets), "largest difference of seeds"]
    return "Loss in the moving region over loss (figure 6), by timestep from clean to noise", heads, rows


def _spread(ratios: dict[str, list[float]]) -> float:
    """The largest difference between seeds, over the timesteps."""
    return max(float(np.ptp(values)) for values in ratios.values())


def left_out(broken: Mapping[tuple[str, str], int]) -> list[str]:
    """A sentence that names the runs of `ablation.judge_runs` that could not be judged, if there are any."""
    named = ", ".join(f"{arm}/{number} (step {step})" for (arm, number), step in broken.items())
    return [f"Left out, because their clips have NaN or infinity: {named}."] if named else []


def markdown(result: dict[str, Any], broken: Mapping[tuple[str, str], int]) -> str:
    """The rule and the tables as Markdown."""
    parts = [f"# Ablation: world {result['world']}, test seed {result['seed']}, {result['count']} clips a split", RULE, *left_out(broken)]
    for title, heads, rows in tables(result):
        lines = ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *rows)]
        parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def write(
    directory: pathlib.Path,
    result: dict[str, Any],
    runs: dict[tuple[str, str], pathlib.Path],
    broken: Mapping[tuple[str, str], int],
) -> str:
    """Writes report.json, report.md and report.html, and returns the Markdown text."""
    text = markdown(result, broken)
    body = [f"<h1>{html.escape(text.splitlines()[0].lstrip('# '))}</h1>"]
    body += [f"<p>{html.escape(paragraph)}</p>" for paragraph in (RULE, *left_out(broken))]
    listed = [f"<h2>{html.escape(title)}</h2>{html.table(heads, rows)}" for title, heads, rows in tables(result)]
    body += [listed[0], ablation_pictures.curves(result), listed[1], ablation_pictures.gains_and_costs(result)]
    body += [ablation_pictures.clips(directory, result, runs), *listed[2:]]
    page = html.page("Ablation", body, 110, "table{font-size:.85rem}td,th{padding:.15rem .4rem}")
    for name, content in (("report.json", ablation.to_json(result)), ("report.md", text), ("report.html", page)):
        write_whole(directory / name, content)
    return text
