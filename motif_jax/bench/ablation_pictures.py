"""The pictures of the ablation's report: learning curves and figure 6, gains beside costs, and the first clips of every arm."""

import pathlib
from typing import Any

import numpy as np

from motif_jax import html
from motif_jax.bench import ablation
from motif_jax.data import sprites

COLOURS = {"none": "#4477aa", "flow": "#cc6611", "inverse": "#228833"}
CURVES = {"direction_ok": "direction accuracy", "lost": "share of clips that lose the object", "background_psnr": "background dB"}
LINES = {"validation": "-", "heldout": ":"}  # of the curves, by split
COLUMNS = 8  # clips in a row of the moving pictures


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

    arms = [arm for arm in result["arms"] if arm != ablation.reference(result, arm)]
    figure = Figure(figsize=(17, 1.5 + 0.34 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(ablation.DIFFERENCES), sharey=True)
    for axes, (name, (title, scale, _, gain)) in zip(panels, ablation.DIFFERENCES.items(), strict=True):
        for split, offset, colour in (("validation", -0.15, "#333333"), ("heldout", 0.15, "#aa3377")):
            found = [ablation.difference(result, arm, ablation.reference(result, arm), split, f"{name}_difference") for arm in arms]
            for y, e in enumerate(found):
                if e["mean"] is not None:
                    mean, low, high = scale * np.array([e[k] for k in ("mean", "low", "high")], float)
                    axes.errorbar(mean, y + offset, xerr=[[mean - low], [high - mean]], fmt="o", markersize=4, color=colour, linewidth=1.2)
        axes.axvline(0, color="#999999", linewidth=1)
        if gain < 0:
            axes.invert_xaxis()
        axes.grid(axis="y", alpha=0.2)
        axes.set(title=title)
    panels[0].set_yticks(range(len(arms)), [f"{a} ({len(result['arms'][a]['seeds'])})" for a in arms])
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    note = (
        "<p>Each arm minus its family's flow on the same clips and seeds (number of seeds in brackets). Right of the line is better, "
        "left is worse. Black: combinations seen, purple: never seen. Bars: 95 %, too narrow for two or "
        "three seeds.</p>"
    )
    return "<h2>Gains and costs</h2>" + note + html.plot(figure, "differences of every arm to the paper's loss, with intervals")


def clips(directory: pathlib.Path, result: dict[str, Any], runs: dict[tuple[str, str], pathlib.Path]) -> str:
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
