"""The report of the ablation: what `ablation.summarise` returned in; report.html, report.md and report.json out."""

import html
import io
import pathlib
from typing import Any

import numpy as np

from motif_jax import report
from motif_jax.bench import ablation, comparison
from motif_jax.data import sprites

RULE = (
    "Rule of preference, fixed before the test clips were sampled: the clip wins whose named object keeps nearer to its true path, by more "
    f"than {comparison.MARGIN:.3f} of the width (a clip that shows the object in less than {100 * comparison.LOST:.0f} % of its frames "
    f"counts as lost). Strict: no win with a background more than {comparison.VETO_DB:g} dB worse, or with a ghost or a smear that "
    "the other clip has not. Ties count half. Brackets: 95 % bootstrap interval over clips and seeds."
)
ROWS = {
    "direction_ok": ("direction %", 100, ".0f"),
    "wrong_object": ("wrong object %", 100, ".0f"),
    "lost": ("object lost %", 100, ".0f"),
    "success": ("all measures at once %", 100, ".0f"),
    "still_kept": ("still kept %", 100, ".0f"),
    "path_error": ("path error where found, % of width", 100, ".1f"),
    "speed_ratio": ("speed / true", 1, ".2f"),
    "background_psnr": ("background dB", 1, ".1f"),
    "area_ratio": ("colour's area / true (ghosts)", 1, ".2f"),
    "others_drift": ("others' drift px", 1, ".1f"),
    "leak": ("frames that copy the image %", 100, ".0f"),
}
TITLES = {
    "validation": "New clips of combinations seen in training",
    "heldout": "Combinations never seen in training",
    "several": "Three shapes",
    "backgrounds": "Backgrounds of another kind",
}


def cell(e: dict[str, Any], scale: float, form: str, interval: bool = True) -> str:
    if e["mean"] is None:
        return "-"
    text = format(scale * e["mean"], form)
    return text + (f" [{scale * e['low']:{form}}, {scale * e['high']:{form}}]" if interval else "")


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, heads, rows) of every table of the report."""
    out = []
    first = next(iter(result["arms"].values()))
    for split, title in TITLES.items():
        rows = []
        for arm, row in result["arms"].items():
            rows.append([arm, str(len(row["seeds"])), *(cell(row["splits"][split][n], s, f) for n, (_, s, f) in ROWS.items())])
        clips = first["splits"][split]["direction_ok"]["clips"]
        still = first["splits"][split]["still_kept"]["clips"]
        heads = ["arm", "seeds", *(name for name, _, _ in ROWS.values())]
        out.append((f"{title}: {clips} clips that move, {still} that stay still, {first['step']} steps", heads, rows))
    rows = []
    for pair in result["pairs"]:
        row = [f"{pair['a']} over {pair['b']}", str(len(pair["seeds"]))]
        for split in ("validation", "heldout"):
            row += [cell(pair[split][kind], 100, ".1f") for kind in ("motion", "strict")]
            row.append(cell(pair[split]["direction_difference"], 100, "+.1f"))
        rows.append(row)
    heads = ["pair", "seeds"]
    heads += [f"{split}: {kind}" for split in ("seen", "held out") for kind in ("motion %", "strict %", "direction, points")]
    out.append(("Preference of the first arm over the second", heads, rows))
    rows = []
    for arm, row in result["arms"].items():
        if row["ratio"]:
            step, found = max(row["ratio"].items(), key=lambda item: int(item[0]))
            spread = max(np.ptp(values) for values in found.values())
            rows.append([arm, str(step), *(f"{np.mean(found[k]):.2f}" for k in found), f"{spread:.2f}"])
            heads = ["arm", "step", *("all" if k == "all" else f"bucket {k}" for k in found), "largest difference of seeds"]
    out.append(("Loss in the moving region over loss (figure 6), by timestep from clean to noise", heads, rows))
    return out


def markdown(result: dict[str, Any]) -> str:
    """The tables and the rule as Markdown."""
    parts = [f"# Ablation: world {result['world']}, test seed {result['seed']}, {result['count']} clips a split", RULE]
    for title, heads, rows in tables(result):
        lines = ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *rows)]
        parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def write(directory: pathlib.Path, result: dict[str, Any], runs: dict[tuple[str, str], pathlib.Path]) -> str:
    """Writes report.json, report.md and report.html, and returns the Markdown text."""
    text = markdown(result)
    body = [f"<h1>{html.escape(text.splitlines()[0].lstrip('# '))}</h1>", f"<p>{html.escape(RULE)}</p>", _curves(result)]
    for title, heads, rows in tables(result):
        body.append(f"<h2>{html.escape(title)}</h2><table><tr>" + "".join(f"<th>{html.escape(h)}" for h in heads))
        body += ["<tr>" + "".join(f"<td>{html.escape(c)}" for c in row) for row in rows]
        body.append("</table>")
    body.append(_strips(directory, result, runs))
    style = report.STYLE.replace("max-width:60rem", "max-width:100rem")
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>Ablation</title><style>{style}</style>{''.join(body)}</html>\n"
    for name, content in (("report.json", ablation.to_json(result)), ("report.md", text), ("report.html", page)):
        temporary = directory / f"{name}.tmp"
        temporary.write_text(content)
        temporary.replace(directory / name)
    return text


def _curves(result: dict[str, Any]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 4.2), layout="constrained")
    panels = figure.subplots(1, 4)
    labels = {
        "direction_ok": "direction accuracy, seen combinations",
        "lost": "share of clips that lose the object",
        "background_psnr": "background dB",
    }
    for k, (arm, row) in enumerate(result["arms"].items()):
        style = {"color": f"C{k % 10}", "linestyle": "-" if k < 10 else "--"}
        for axes, (name, title) in zip(panels, labels.items(), strict=False):
            steps = sorted(row["curve"], key=int)
            found = [row["curve"][step][name] for step in steps]
            if len(row["seeds"]) > 1:
                axes.fill_between(steps, [e["low"] for e in found], [e["high"] for e in found], alpha=0.15, color=style["color"])
            axes.plot(steps, [e["mean"] for e in found], marker="o", markersize=3, label=arm, **style)
            axes.set(title=title, xlabel="step")
        if row["ratio"]:
            _, found = max(row["ratio"].items(), key=lambda item: int(item[0]))
            buckets = [key for key in found if key != "all"]
            for seed in range(len(row["seeds"])):
                panels[3].plot([int(b) for b in buckets], [found[b][seed] for b in buckets], marker="o", markersize=3, linewidth=1, **style)
    panels[3].set(title="loss in the moving region / loss (figure 6)", xlabel="timestep bucket, clean to noise")
    panels[0].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return report.picture(buffer.getvalue(), "image/png", "learning curves and figure 6 of all arms")


def _strips(directory: pathlib.Path, result: dict[str, Any], runs: dict[tuple[str, str], pathlib.Path]) -> str:
    """The first clips of the held-out split: truth and every arm side by side, one GIF and one strip a clip, also as files."""
    from motif_jax.data.videos import save_video
    from motif_jax.motion import pictures

    world, seed, count = result["world"], result["seed"], result["count"]
    shown = {}
    for arm, row in result["arms"].items():
        shown[arm] = ablation.load([runs[arm, row["seeds"][0]]], row["step"], "heldout", world, seed, count)["shown"][0]
    frames, height, width = next(iter(shown.values())).shape[1:4]
    clips = sprites.make_clips(world, seed, range(ablation.SHOWN), frames, height, width, "heldout")
    (directory / "clips").mkdir(exist_ok=True)
    parts = ["<h2>The first held-out clips, as they came</h2><p>", html.escape(", ".join(["truth", *shown])), "</p><div class=clip>"]
    for i, caption in enumerate(clips["captions"]):
        row = {"truth": clips["frames"][i]} | {arm: made[i] for arm, made in shown.items()}
        large = [np.repeat(np.repeat(clip, 3, axis=1), 3, axis=2) for clip in row.values()]
        path = directory / "clips" / f"{i:02d}.gif"
        save_video(path, np.concatenate(large, axis=2), clips["fps"])
        sheet = pictures.stack([pictures.strip(clip, f"{caption} ({name})") for name, clip in row.items()])
        pictures.save_png(path.with_suffix(".png"), sheet)
        parts.append(
            f"<figure>{report.picture(path.read_bytes(), 'image/gif', caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return "".join(parts).replace("<div class=clip>", "<div>") + "</div>"
