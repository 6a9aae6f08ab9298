"""One html page about scored videos: table, intervals, decay, differences, what was missing, and the first pairs to look at."""

import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from motif_jax import html
from motif_jax.bench import tables
from motif_jax.bench.standings import METRICS, STATIC
from motif_jax.bench.video_metrics import DECAY
from motif_jax.data.images import MediaError, read_image
from motif_jax.data.storage import write_whole
from motif_jax.motion import pictures
from motif_jax.requested import Pair

MOTION = "dynamic_degree mean_flow top5_flow residual_flow moving_area camera_shift flicker luma_flicker smoothness warp_error".split()
LIKENESS = "ssim0_image psnr0_image ssim_image psnr_image best_ssim best_frame ssim_first psnr_first clip_image clip_text".split()
PLOTS = "dynamic_degree mean_flow top5_flow residual_flow camera_shift flicker smoothness warp_error ssim0_image ssim_image".split()
COMPARED = "dynamic_degree mean_flow top5_flow residual_flow smoothness ssim_image clip_text".split()
SHAPES = ("other size", "other length", "other frame rate")  # kinds of problem
ONE_SHAPE = (
    "Flow, steadiness and likeness over time cannot be compared between sizes, lengths and frame rates: "
    "--size=HEIGHTxWIDTH, --rate=FPS and --frames=N bring all to one."
)
GROUPS, COLUMNS, TILE = 3, 8, 160  # of the strips: pairs, frames, pixels
BY_NAME = {m.name: m for m in METRICS}
STYLE = """small{color:#666;display:block;white-space:nowrap}tr.static td{background:#f3f3f3}
dt{font-weight:600}dd{margin:0 0 .3rem 1rem}"""


def text_table(result: Mapping[str, Any]) -> str:
    """The models' values as a Markdown table, without intervals; above it what `unequal` has to say."""
    names = [n for n in MOTION + LIKENESS if any(n in model["metrics"] for model in result["models"].values())]
    rows = []
    for name, model in result["models"].items():
        cells = (_number(n, model["metrics"][n]["value"]) if n in model["metrics"] else "-" for n in names)
        rows.append([name, str(model["pairs"]), *cells])
    table = tables.markdown(["model", "pairs", *(BY_NAME[n].label for n in names)], rows)
    return f"{note}\n\n{table}" if (note := unequal(result)) else table


def unequal(result: Mapping[str, Any]) -> str:
    """A sentence when the rows of the models are not of the same pairs."""
    counts = {model: found["pairs"] for model, found in result["models"].items() if model != STATIC and found["pairs"]}
    if set(counts.values()) <= {result["common_pairs"]}:
        return ""
    listed = ", ".join(f"{model} {n}" for model, n in counts.items())
    return (
        f"The rows are not of the same pairs ({listed}; all have {result['common_pairs']}) and cannot be compared: "
        "the differences of two models are of the pairs that both have."
    )


def write(
    path: pathlib.Path,
    pairs: Sequence[Pair],
    rows: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
    load: Callable[[pathlib.Path], np.ndarray],
) -> None:
    """Writes the page of what `standings` returned; `load` reads the frames of a video again, for the strips."""
    models = result["models"]
    flow = result["settings"]["flow"]["flow"]
    shapes = sorted({f"{r['frames']} frames of {r['height']}x{r['width']} at {r['fps']:g} fps" for r in rows})
    shown = html.escape("; ".join(shapes[:4]) + (" ..." if shapes[4:] else ""))
    notes = [m for m in METRICS if any(m.name in found["metrics"] for found in models.values())]
    body = [
        "<h1>Scores of videos</h1>",
        f"<p>{len(models) - (STATIC in models)} models, {result['pairs']} pairs in the list; {shown}; optical flow: {html.escape(flow)}. "
        "In brackets 95&nbsp;% bootstrap intervals over images, none of fewer than five.</p>",
        "<p><b>A video that does not move wins all likeness and steadiness columns</b>: the row <i>static</i> is the image repeated. "
        "Read them beside the flow. No column knows whether the prompt was followed.</p>",
        f"<p><b>{html.escape(unequal(result))}</b></p>" if unequal(result) else "",
        "<h2>Motion and steadiness</h2>",
        _table(models, MOTION),
        "<h2>Likeness to the image and to the first frame</h2>",
        _table(models, LIKENESS),
        _plots(models),
        _decay(models),
        "<h2>Two models on the same pairs</h2>",
        _differences(result["differences"]),
        "<h2>What is missing or unlike the rest</h2>",
        _problems(result),
        f"<h2>The first {GROUPS} pairs of the list</h2><p>Not chosen. Left the image, then frames from first to last.</p>",
        _strips(pairs, rows, load),
        "<h2>What the numbers mean</h2><dl>",
        *(f"<dt>{html.escape(m.label)}<dd>{html.escape(m.note)}" for m in notes),
        "</dl>",
    ]
    write_whole(path, html.page("Scores of videos", body, 84, html.NUMBERS + STYLE))


def _number(name: str, value: float, sign: str = "-") -> str:
    metric = BY_NAME[name]
    return f"{metric.scale * value:{sign}.{metric.digits}f}"


def _cell(name: str, found: Mapping[str, float] | None, sign: str = "-") -> str:
    """A difference has the `sign` "+", and is bold where its interval excludes zero."""
    if found is None:
        return "<td>-"
    value = _number(name, found["value"], sign)
    if sign == "+" and found["low"] is not None and (found["low"] > 0 or found["high"] < 0):
        value = f"<b>{value}</b>"
    limits = "" if found["low"] is None else f"<small>[{_number(name, found['low'])}, {_number(name, found['high'])}]</small>"
    return f"<td>{value}{limits}"


def _table(models: Mapping[str, Any], names: Sequence[str]) -> str:
    names = [n for n in names if any(n in found["metrics"] for found in models.values())]
    head = "<tr><th>model<th>videos" + "".join(f"<th title='{html.escape(BY_NAME[n].note)}'>{html.escape(BY_NAME[n].label)}" for n in names)
    lines = []
    for model, found in models.items():
        cells = "".join(_cell(n, found["metrics"].get(n)) for n in names)
        kind = " class=static" if model == STATIC else ""
        lines.append(f"<tr{kind}><td>{html.escape(model)}<td>{found['videos']}<small>{found['images']} images</small>{cells}")
    return f"<table>{head}{''.join(lines)}</table>"


def _plots(models: Mapping[str, Any]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 2 * (0.9 + 0.28 * len(models))), layout="constrained")
    for axes, name in zip(figure.subplots(2, len(PLOTS) // 2, sharey=True).flat, PLOTS, strict=True):
        scale = BY_NAME[name].scale
        for y, (model, found) in enumerate(models.items()):
            m = found["metrics"].get(name)
            if m is not None:
                colour = "0.5" if model == STATIC else f"C{y % 10}"
                if m["low"] is not None:
                    axes.plot([scale * m["low"], scale * m["high"]], [y, y], color=colour, linewidth=2)
                axes.plot(scale * m["value"], y, "o", color=colour, markersize=6)
        axes.set_title(BY_NAME[name].label, fontsize=10)
        axes.set_yticks(range(len(models)), [html.short(model) for model in models], parse_math=False)
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].set_ylim(len(models) - 0.5, -0.5)
    return html.plot(figure, "value and 95 % interval of every model")


def _decay(models: Mapping[str, Any]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    shown = {}
    for y, (model, found) in enumerate(models.items()):
        points = [(k, found["metrics"][f"ssim_first_{k}"]["value"]) for k in DECAY if f"ssim_first_{k}" in found["metrics"]]
        colour = "0.5" if model == STATIC else f"C{y % 10}"
        if points:
            marker = "osD^v"[y % 5]
            (shown[model],) = axes.plot(*zip((0, 1.0), *points, strict=True), f"{marker}-", color=colour, markersize=4)
    axes.set(xlabel="frame", ylabel="SSIM to frame 0")
    axes.set_title("How fast videos leave their own first frame", fontsize=10, loc="left")
    legend = figure.legend([*shown.values()], [html.short(model) for model in shown], fontsize=8, loc="outside right upper")
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.grid(alpha=0.3)
    return html.plot(figure, "SSIM of later frames to frame 0")


def _differences(differences: Sequence[Mapping[str, Any]]) -> str:
    shown = [d for d in differences if d["metric"] in COMPARED and STATIC not in (d["a"], d["b"])]
    if not shown:
        return "<p>Needs two models with pairs in common.</p>"
    names = [n for n in COMPARED if any(d["metric"] == n for d in shown)]
    lines = []
    for a, b in dict.fromkeys((d["a"], d["b"]) for d in shown):
        own = {d["metric"]: d for d in shown if (d["a"], d["b"]) == (a, b)}
        cells = ""
        for name in names:
            cells += _cell(name, own.get(name), "+")
            if name in own:
                cells += f"<small>{100 * own[name]['a_larger']:.0f} % : {100 * own[name]['b_larger']:.0f} %</small>"
        lines.append(f"<tr><td>{html.escape(a)} minus {html.escape(b)}<td>{max(d['pairs'] for d in own.values())}{cells}")
    head = "<tr><th>models<th>pairs" + "".join(f"<th>{html.escape(BY_NAME[n].label)}" for n in names)
    return (
        "<p>Difference (bold: its interval excludes zero), its interval, and in how many of the pairs the first and the second is larger."
        f"</p><table>{head}"
        f"{''.join(lines)}</table><p>All measures, and the differences to the static video: scores.json.</p>"
    )


def _problems(result: Mapping[str, Any]) -> str:
    if not result["problems"]:
        return "<p>Nothing: every model has every pair, and all videos are of one length, size and frame rate.</p>"
    parts = [f"<p>{ONE_SHAPE}</p>"] if {p["kind"] for p in result["problems"]} & set(SHAPES) else []
    for found in result["problem_counts"]:
        these = [p for p in result["problems"] if (p["model"], p["kind"]) == (found["model"], found["kind"])]
        names = "".join(f"<li>{html.escape(p['name'])}: {html.escape(p['detail'])}" for p in these)
        summary = f"{html.escape(found['model'])}: {found['count']} {html.escape(found['kind'])}"
        parts.append(f"<details><summary>{summary}</summary><ul>{names}</ul></details>")
    return "".join(parts)


def _strips(pairs: Sequence[Pair], rows: Sequence[Mapping[str, Any]], load: Callable[[pathlib.Path], np.ndarray]) -> str:
    parts = []
    for pair in [p for p in pairs if any(r["id"] == p.id for r in rows)][:GROUPS]:
        of_model = {r["model"]: r for r in reversed(rows) if r["id"] == pair.id and r["model"] != STATIC}  # the first seed of each
        lines = []
        for model, row in reversed(of_model.items()):
            try:
                frames = load(pathlib.Path(row["file"]))
            except MediaError:  # gone since it was measured
                continue
            chosen = frames[np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int)]
            image = read_image(pair.image, *frames.shape[1:3])
            lines.append(pictures.strip(np.stack([_small(f) for f in [image, *chosen]]), f"{model}, seed {row['seed']}", COLUMNS + 1))
        if not lines:
            continue
        buffer = io.BytesIO()
        Image.fromarray(pictures.stack(lines)).save(buffer, format="JPEG", quality=85)
        strip = html.picture(buffer.getvalue(), "jpeg", pair.prompt)
        parts.append(f"<h3>{html.escape(pair.prompt)}</h3><p>{html.escape(pair.id)}</p>{strip}")
    return "".join(parts)


def _small(frame: np.ndarray) -> np.ndarray:
    height = max(1, round(frame.shape[0] * TILE / frame.shape[1]))
    return np.asarray(Image.fromarray(frame).resize((TILE, height), Image.Resampling.LANCZOS))
