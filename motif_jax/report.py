"""`<workdir>/report.html`: curves, heatmaps over frames, and truth beside generated clips, in one file."""

import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from motif_jax import html
from motif_jax.config import Config, read_json
from motif_jax.data.storage import write_whole
from motif_jax.errors import UserError
from motif_jax.training.metrics import read_lines

STYLE = """figure{display:inline-block;max-width:calc(100% - 1rem);margin:.5rem;vertical-align:top}figcaption{max-width:40rem}
.clip img{width:40rem}.small img{width:20rem;image-rendering:pixelated}
.small figcaption{max-width:20rem}td:nth-child(n+3){white-space:nowrap}"""


def write(workdir: str | pathlib.Path) -> pathlib.Path:
    """Collects what a work directory holds (metrics.jsonl, the newest sample sheet, judged samples) and returns the page's path."""
    workdir = pathlib.Path(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir}: no config.json there; expected a work directory of motif_jax.main")
    config = read_json(workdir / "config.json")
    lines = read_lines(workdir / "metrics.jsonl")
    body = [f"<h1>{html.escape(config.name)}</h1>", _summary(config, lines), "<h2>Samples</h2>", _samples(workdir), _judged(workdir)]
    body += ["<h2>Training</h2>", _curves(lines), "<h2>What the loss looks at</h2>", _heatmaps(config)]
    path = workdir / "report.html"
    write_whole(path, html.page(config.name, body, 60, STYLE))
    return path


def _summary(config: Config, lines: list[dict]) -> str:
    last = {}
    for line in lines:
        last |= line
    rows = [
        ("steps", f"{last.get('step', 0):,} of {config.steps:,}"),
        ("clip", f"{config.data.frames} frames of {config.data.height}x{config.data.width}"),
        ("loss", f"{config.loss.heatmap} heatmap, lambda {config.loss.motion_weight:g}"),
    ]
    shown = {
        "loss": "training loss, with the motion term",
        "loss_diffusion": "training loss without it",
        "eval/loss": "validation loss without it",
        "eval/ratio": "validation loss in the moving region / overall",
        "sample/mean_flow": "mean flow of samples, px per frame",
        "sample/mean_flow_data": "mean flow of the data, px per frame",
        "seconds_per_step": "seconds per step",
    }
    rows += [(label, f"{last[key]:.3g}") for key, label in shown.items() if last.get(key) is not None]
    if last.get("input_wait") is not None:
        rows.append(("time waiting for data", f"{100 * last['input_wait']:.1f} %"))
    return html.facts(rows)


def _curves(lines: list[dict]) -> str:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    buckets = sorted({int(k.removeprefix("eval/ratio_t")) for line in lines for k in line if k.startswith("eval/ratio_t")})
    panels = {
        "loss": ("loss_diffusion", "loss_motif", "eval/loss", "eval/loss_moving"),
        "moving / overall loss, t0 clean to noise (figure 6)": tuple(f"eval/ratio_t{bucket}" for bucket in buckets),
        "mean flow, px per frame": ("sample/mean_flow", "sample/mean_flow_data"),
    }
    known = {name for line in lines for name, value in line.items() if value is not None}
    panels = {title: names for title, names in panels.items() if known & set(names)}
    if not panels:
        return "<p>Nothing was logged yet.</p>"
    figure = Figure(figsize=(14 / 3 * len(panels), 4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        if names[0].startswith("eval/ratio_t"):  # in order
            axes.set_prop_cycle(color=colormaps["viridis"](np.linspace(0, 0.9, len(names))))
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                steps, values = np.array(points).T
                axes.plot(steps, values, label=name, linewidth=1.2, marker="o" if len(points) < 20 else "", markersize=3)
        axes.set(title=title, xlabel="step")
        if axes.lines:
            axes.legend(fontsize=8)
            if title == "loss":
                axes.set_yscale("log")
    return html.plot(figure, "training curves")


def _heatmaps(config: Config) -> str:
    """Frames, flow and heatmap of the first held-out clips (or training clips, where there are none), if the data is still there."""
    from motif_jax.data import pipeline
    from motif_jax.motion import pictures
    from motif_jax.preview import clip_heatmap

    try:
        examples = pipeline.examples(config.data, 3)
    except UserError as error:
        return f"<p>{html.escape(str(error))}</p>"
    parts = []
    for example in examples:
        if example.frames is None:
            return "<p>The dataset holds latents and no frames; motif_jax.prepare --preview shows its clips.</p>"
        sheet = io.BytesIO()
        pictures.save_png(sheet, pictures.clip_sheet(example.frames, example.flow, clip_heatmap(config, example), example.caption))
        parts.append(html.picture(sheet.getvalue(), "png", f"frames, flow and heatmap: {example.caption}"))
    kind = config.loss.heatmap
    heat = f"the heatmap ({'flow; latent_difference is not drawn' if kind == 'latent_difference' else kind}) over the frames"
    return f"<p>Rows: frames, optical flow (colour is direction, saturation is speed), {heat}.</p>" + "".join(parts)


def _samples(workdir: pathlib.Path) -> str:
    found = [p.parent for p in (workdir / "samples").glob("*/captions.json") if p.parent.name.isdigit()]
    if not found:
        return "<p>No samples were made (sample.every=0).</p>"
    directory = max(found, key=lambda p: int(p.name))
    step = int(directory.name)
    return (
        "<p>Left: a real clip, one that was not trained on if the dataset holds any out. "
        f"Right: made from its first frame and the sentence, after {step:,} steps.</p>" + _clips(directory)
    )


def _clips(directory: pathlib.Path) -> str:
    """The GIFs of a comparison (see `training.samples.save_comparison`) with their captions; or what is damaged."""
    parts = []
    try:
        captions = json.loads((directory / "captions.json").read_text(encoding="utf-8"))
        clips = [(directory / f"{index:02d}.gif").read_bytes() for index in range(len(captions))]
    except (OSError, ValueError, TypeError) as error:
        return f"<p>{html.escape(f'{directory}: cannot be read: {error}')}</p>"
    for caption, data in zip(captions, clips, strict=True):
        parts.append(f"<figure>{html.picture(data, 'gif', caption)}<figcaption>{html.escape(caption)}</figcaption></figure>")
    small = " small" if any(int.from_bytes(data[6:8], "little") < 400 for data in clips) else ""  # a GIF's width
    return f'<div class="clip{small}">{"".join(parts)}</div>'


def _judged(workdir: pathlib.Path) -> str:
    """Rates of `motif_jax.bench synthetic`, where it was run."""
    path = workdir / "synthetic.json"
    if not path.exists():
        return ""
    try:
        rows = _rates(json.loads(path.read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"<p>{html.escape(f'{path}: cannot be read: {error!r}; motif_jax.bench synthetic writes it')}</p>"
    page = "<h2>How often it does what it is told</h2>" + html.table(("clips", "measure", "rate", "95 % interval", "n"), rows)
    if (workdir / "synthetic").is_dir():
        page += "<p>Sentences with combinations never seen in training; left the truth, right the sample:</p>" + _clips(
            workdir / "synthetic"
        )
    return page


def _rates(splits: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    labels = {"heldout": "combinations never seen in training", "several": "three shapes", "backgrounds": "backgrounds of another kind"}
    for split, label in {"validation": "new clips", **labels}.items():
        for kind, name, measure in (
            ("moving", "direction_ok", "the named object moves the way the sentence says"),
            ("moving", "wrong_object", "another object moves instead"),
            ("still", "direction_ok", "it stays still when told to"),
            ("moving", "success", "all measures at once"),
        ):
            r = splits[split]["model"][kind]["rates"][name]
            if r["rate"] is not None:
                interval = f"{100 * r['low']:.0f} to {100 * r['high']:.0f}"
                rows.append((label, measure, f"{100 * r['rate']:.0f} %", interval, str(r["count"])))
    return rows
