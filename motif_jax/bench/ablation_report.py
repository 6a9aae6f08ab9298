"""The report of the ablation: what `ablation.summarise` returned in; report.html, report.md and report.json out."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from motif_jax import html
from motif_jax.bench import ablation, comparison, tables
from motif_jax.data import sprites
from motif_jax.data.storage import write_whole

RULE = (
    "Rule of preference, fixed before the test clips were sampled: the clip wins whose named object keeps nearer to its true path, by more "
    f"than {comparison.MARGIN:.3f} of the width (a clip that shows the object in less than {100 * comparison.LOST:.0f} % of its frames "
    f"counts as lost). Strict: no win with a background more than {comparison.VETO_DB:g} dB worse, or whose object ends on less than "
    "half of its true area (it faded) or more than twice of it (ghosts, smears) where the other's does not. Ties count half. "
    "Brackets: 95 % bootstrap interval over clips and seeds. Of one seed it speaks of clips alone, and another seed may differ by more; of "
    "three it is too narrow, and holds the truth in some 85 to 90 %. Two seeds say next to nothing of others: parentheses give the two."
)
ROWS = {  # title, scale, format
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
COLOURS = {"none": "#4477aa", "flow": "#cc6611", "inverse": "#228833"}
CURVES = {"direction_ok": "direction accuracy", "lost": "share of clips that lose the object", "background_psnr": "background dB"}
LINES = {"validation": "-", "heldout": ":"}  # of the curves, by split
COLUMNS = 8  # clips in a row of the moving pictures
Table = tuple[str, list[str], list[list[str]]]


def cell(e: dict[str, Any], scale: float, form: str, interval: bool = True) -> str:
    """The mean of an estimate and its interval, where it has one, or both seeds where there are two, as text; "-" where nothing was
    counted."""
    if interval and len(e["seeds"]) == 2 and e["mean"] is not None:
        return f"{tables.number(e['mean'], form, scale)} ({', '.join(tables.number(s, form, scale) for s in e['seeds'])})"
    return tables.estimate(e["mean"], (e["low"], e["high"]) if interval else None, form, scale)


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
            several = min(len(a["all"]), len(b["all"])) > 1
            seeds = f"largest difference of seeds {max(_spread(a), _spread(b)):.2f}" if several else "one seed"
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
        costs = ("background_psnr", "background", "dB", "+.2f"), ("ghost", "ghosts and smears", "points", "+.1f")
        for measure, what, unit, form in costs:
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


def all_tables(result: dict[str, Any]) -> list[Table]:
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
    heads = ["arm", "seeds", "step", *(name for name, *_ in ROWS.values())]
    return f"{title}: {clips} clips that move, {still} that stay still", heads, rows


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


def curves(result: dict[str, Any]) -> str:
    """A row of panels for each backbone: direction, loss of the object and background along training, and figure 6 at its end."""
    from matplotlib.figure import Figure

    rows = ablation.families(result) or [""]
    figure = Figure(figsize=(17, 4 * len(rows)), layout="constrained")
    for prefix, panels in zip(rows, figure.subplots(len(rows), 4, squeeze=False), strict=True):
        for name in (n for n in ablation.ORDER if prefix + n in result["arms"]):
            row, colour = result["arms"][prefix + name], COLOURS[name]
            for axes, (measure, title) in zip(panels, CURVES.items(), strict=False):
                for split, line in LINES.items():
                    steps = sorted(row["splits"][split])
                    found = [row["splits"][split][step][measure] for step in steps]
                    if split == "validation":
                        low, high = (np.array([e[k] for e in found], float) for k in ("low", "high"))
                        axes.fill_between(steps, low, high, alpha=0.15, color=colour, linewidth=0)
                    label = prefix + name if split == "validation" else None
                    axes.plot(steps, [e["mean"] for e in found], line, marker="o", markersize=3, color=colour, label=label)
                axes.set(title=title, xlabel="step")
            if row["ratio"]:
                found = row["ratio"][max(row["ratio"])]
                buckets = [key for key in found if key != "all"]
                for seed in range(len(row["seeds"])):
                    panels[3].plot(buckets, [found[b][seed] for b in buckets], marker="o", markersize=3, linewidth=1, color=colour)
        panels[3].set(title="loss in the moving region / loss (figure 6)", xlabel="timestep bucket, clean to noise")
        if panels[0].lines:
            panels[0].legend(fontsize=9)
    note = (
        "Full lines: combinations seen, dotted: never seen. Bands: 95 % over clips and seeds (of one seed: clips; of two or three: too "
        "narrow). Figure 6: a line a seed."
    )
    return f"<h2>Learning curves</h2><p>{note}</p>" + html.plot(figure, "learning curves and figure 6 of the main arms")


def gains_and_costs(result: dict[str, Any]) -> str:
    """Every arm minus the one it is compared with: a gain is a point to the right of the line, a cost one to its left."""
    from matplotlib.figure import Figure

    if not (arms := [arm for arm in result["arms"] if arm != ablation.reference(result, arm)]):
        return ""
    figure = Figure(figsize=(17, 1.5 + 0.34 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(ablation.DIFFERENCES), sharey=True)
    for axes, (name, (title, scale, _, gain)) in zip(panels, ablation.DIFFERENCES.items(), strict=True):
        for split, offset, colour in (("validation", -0.15, "#333333"), ("heldout", 0.15, "#aa3377")):
            found = [ablation.difference(result, arm, ablation.reference(result, arm), split, f"{name}_difference") for arm in arms]
            for y, e in enumerate(found):
                if e["mean"] is not None:
                    mean, low, high = scale * np.array([e[k] for k in ("mean", "low", "high")], float)
                    bars = np.maximum([[mean - low], [high - mean]], 0)  # where all clips are alike, rounding may leave less
                    axes.errorbar(mean, y + offset, xerr=bars, fmt="o", markersize=4, color=colour, linewidth=1.2)
        axes.axvline(0, color="#999999", linewidth=1)
        if gain < 0:
            axes.invert_xaxis()
        axes.grid(axis="y", alpha=0.2)
        axes.set(title=title)
    panels[0].set_yticks(range(len(arms)), [f"{arm} ({len(e['seeds'])})" for arm, e in zip(arms, found, strict=True)])
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    note = (
        "<p>Each arm minus its family's flow on the same clips and seeds (how many seeds in brackets). Right of the line is better, "
        "left is worse. Black: combinations seen, purple: never seen. Bars: 95 %, too narrow for two or "
        "three seeds.</p>"
    )
    return "<h2>Gains and costs</h2>" + note + html.plot(figure, "differences of every arm to the paper's loss, with intervals")


def clips(directory: pathlib.Path, result: dict[str, Any], runs: dict[ablation.Run, pathlib.Path]) -> str:
    """The first clips of the held-out split: truth and every arm at the step at which its family is compared, one GIF and
    one strip a clip, also as files."""
    from motif_jax.data.videos import save_video
    from motif_jax.motion import pictures

    world, seed, count = result["world"], result["seed"], result["count"]
    shown = {}
    for arm, row in result["arms"].items():
        step = min([row["step"], *(pair["step"] for pair in result["pairs"] if arm in (pair["a"], pair["b"]))])
        shown[arm] = ablation.load([runs[arm, row["seeds"][0]]], step, "heldout", world, seed, count)["shown"][0]
    frames, height, width = next(iter(shown.values())).shape[1:4]
    made = sprites.make_clips(world, seed, range(ablation.SHOWN), frames, height, width, "heldout")
    (directory / "clips").mkdir(exist_ok=True)
    parts = ["<h2>The first clips of combinations never seen, as they came</h2><div>"]
    for i, caption in enumerate(made["captions"]):
        row = {"truth": made["frames"][i]} | {arm: of[i] for arm, of in shown.items()}
        path = directory / "clips" / f"{i:02d}.gif"
        names = list(row)
        lines = [pictures.side_by_side({name: row[name] for name in names[k : k + COLUMNS]}) for k in range(0, len(names), COLUMNS)]
        save_video(path, np.stack([pictures.stack(line) for line in zip(*lines, strict=True)]), made["fps"])
        sheet = pictures.stack([pictures.strip(clip, caption, end=f" ({name})") for name, clip in row.items()])
        pictures.save_png(path.with_suffix(".png"), sheet)
        parts.append(f"<h3>{html.escape(caption)}</h3>{html.picture(path.read_bytes(), 'gif', caption)}")
    return "".join(parts) + "</div>"


def left_out(broken: Mapping[ablation.Run, int]) -> list[str]:
    """A sentence that names the runs of `ablation.judge_runs` that could not be judged, if there are any."""
    named = ", ".join(f"{arm}/{number} (step {step})" for (arm, number), step in broken.items())
    return [f"Left out, because their clips have NaN or infinity: {named}."] if named else []


def markdown(result: dict[str, Any], broken: Mapping[ablation.Run, int]) -> str:
    """The rule and the tables as Markdown."""
    parts = [f"# Ablation: world {result['world']}, test seed {result['seed']}, {result['count']} clips a split", RULE, *left_out(broken)]
    for title, heads, rows in all_tables(result):
        parts += [f"## {title}", tables.markdown(heads, rows)]
    return "\n\n".join(parts) + "\n"


def write(
    directory: pathlib.Path, result: dict[str, Any], runs: dict[ablation.Run, pathlib.Path], broken: Mapping[ablation.Run, int]
) -> str:
    """Writes report.json, report.md and report.html, and returns the Markdown text."""
    text = markdown(result, broken)
    body = [f"<h1>{html.escape(text.splitlines()[0].lstrip('# '))}</h1>"]
    body += [f"<p>{html.escape(paragraph)}</p>" for paragraph in (RULE, *left_out(broken))]
    listed = [f"<h2>{html.escape(title)}</h2>{html.table(heads, rows)}" for title, heads, rows in all_tables(result)]
    body += [listed[0], curves(result), listed[1], gains_and_costs(result)]
    body += [clips(directory, result, runs), *listed[2:]]
    page = html.page("Ablation", body, 110, "table{font-size:.85rem}td,th{padding:.15rem .4rem}")
    for name, content in (("report.json", json.dumps(result, indent=1) + "\n"), ("report.md", text), ("report.html", page)):
        write_whole(directory / name, content)
    return text
