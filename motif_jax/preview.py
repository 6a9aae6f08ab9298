"""Pictures of a finished dataset: a sheet per clip and a page with histograms, under DIR/preview, for people to look at."""

import collections
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, UInt8

from motif_jax import html
from motif_jax.config import Config
from motif_jax.data import pipeline, records, shards
from motif_jax.data.storage import Path, replacing, write_whole
from motif_jax.motion import heatmap, pictures

Decode = Callable[[np.ndarray], UInt8[np.ndarray, "T H W 3"]]

_MEASURED = 10_000  # clips at most, evenly spaced: a dataset may hold a terabyte


def clip_heatmap(config: Config, clip: pipeline.Example) -> Float[np.ndarray, "T h w"]:
    """m' as the configured loss would weigh this clip; for "latent_difference", which the network's own latents make, that of the flow."""
    from motif_jax.training.step import motion_heatmap

    kind = "flow" if config.loss.heatmap == "latent_difference" else config.loss.heatmap
    stored = {"flow": clip.flow, "motion_mask": clip.motion_mask}
    return np.asarray(motion_heatmap(config, {name: x[None] for name, x in stored.items() if x is not None}, kind))[0]


def write(
    config: Config, directory: Path, count: int, decode: Decode | None, skipped: Mapping[str, int], log: Callable[[str], None]
) -> Path:
    """Writes preview/<clip_id>.png for the first `count` training clips, and preview/index.html about all of them (or `_MEASURED`).

    A sheet shows frames, flow, the heatmap that the configured loss would use, and the share of pixels that move. `decode` makes
    frames of latents where only those are stored; `skipped` counts what was left out by reason.
    """
    manifest, loss = shards.read_manifest(directory), config.loss
    dataset = pipeline.Dataset([manifest], "train")
    folder = directory / "preview"
    folder.mkdir(exist_ok=True)

    def heat(flow: np.ndarray, reading: str) -> np.ndarray:
        x = heatmap.intensity(flow[None], manifest.layout.height, manifest.layout.width, reading)
        return np.asarray(heatmap.sigma(x, loss.sharpness, loss.threshold))[0]

    shares, sheets = [], []
    for i in range(min(count, len(dataset))):
        clip = dataset[i]
        frames = clip.frames if clip.frames is not None else decode(clip.latent_moments)
        heats = {reading: heat(clip.flow, reading) for reading in heatmap.READINGS}
        shares.append({reading: pictures.moving_share(h) for reading, h in heats.items()})
        path = folder / f"{clip.clip_id}.png"
        with replacing(path) as temporary:
            pictures.save_png(temporary, pictures.clip_sheet(frames, clip.flow, clip_heatmap(config, clip), clip.caption))
        sheets.append((path.name, clip.caption))
        log(f"{path}: {100 * shares[-1][loss.intensity]:.1f} % moves: {clip.caption}")
    if loss.heatmap != "flow":
        shown = "not drawn, the sheets show that of the flow" if loss.heatmap == "latent_difference" else "what the sheets show"
        log(f"loss.heatmap={loss.heatmap!r} is {shown}; shares of moving pixels are those of the flow")
    mean = {reading: 100 * sum(s[reading] for s in shares) / len(shares) for reading in heatmap.READINGS}
    log(
        f"share of moving pixels in {len(shares)} clips: {mean[loss.intensity]:.1f} % (flow over {loss.threshold:g} by loss.intensity="
        f"{loss.intensity!r}); by the others: {', '.join(f'{r} {m:.1f} %' for r, m in mean.items() if r != loss.intensity)}"
    )
    found = _measure(dataset, lambda flow: pictures.moving_share(heat(flow, loss.intensity)))
    page = folder / "index.html"
    write_whole(page, _page(config, manifest, found, skipped, sheets))
    log(f"{page}: strides, motion and captions of {len(found['frame stride'])} clips")
    return page


def _measure(dataset: pipeline.Dataset, moving: Callable[[np.ndarray], float]) -> dict[str, Float[np.ndarray, " N"]]:
    """Stride, share of moving pixels and caption length of clips evenly spaced; frames are not decoded for it."""
    found = collections.defaultdict(list)
    count = min(len(dataset), _MEASURED)
    for i in range(count):
        record = dataset.source[i * len(dataset) // count]
        clip = records.decode_clip(dataset.layout, record, ("frame_stride", "caption", "flow"))
        found["frame stride"].append(clip["frame_stride"])
        found["moving pixels, %"].append(100 * moving(clip["flow"]))
        found["words in the caption"].append(len(clip["caption"].split()))
    return {name: np.array(values, np.float64) for name, values in found.items()}


def _page(
    config: Config,
    manifest: shards.Manifest,
    found: Mapping[str, np.ndarray],
    skipped: Mapping[str, int],
    sheets: list[tuple[str, str]],
) -> str:
    layout, shown = manifest.layout, ("source", "prepare.flow")
    clips = ", ".join(f"{split} {manifest.count(split):,}" for split in manifest.shards)
    rows = [
        ("clips", clips),
        ("clip", f"{layout.frames} frames of {layout.height}x{layout.width}, flow in cells of {layout.flow_stride} pixels"),
        ("stored", ", ".join(name for name in layout.names() if name not in (*records.TEXTS, *records.INTEGERS, "fps"))),
        *((name, values) for name, values in sorted(manifest.settings.items()) if name in shown or name.startswith("estimator.")),
        ("moving", f"intensity {config.loss.intensity!r} above {config.loss.threshold:g}, the configured loss's reading"),
    ]
    left_out = [(kind, f"{n:,}") for kind, n in sorted(skipped.items())]
    figures = "".join(
        f'<figure><a href="{html.escape(name)}"><img src="{html.escape(name)}" alt="{html.escape(caption)}"></a>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for name, caption in sheets
    )
    body = [
        f"<h1>{html.escape(config.name)}: dataset</h1>{html.facts(rows)}",
        f"<h2>Training clips</h2>{_histograms(found)}<p>Of {len(found['frame stride']):,} clips.</p>",
        f"<h2>Left out</h2>{html.facts(left_out) if left_out else '<p>Nothing.</p>'}",
        "<h2>First clips</h2><p>A click shows a sheet at full size. Rows: frames; optical flow (colour is direction, saturation is speed); "
        f"heatmap over the frames, with the share of moving pixels.</p>{figures}",
    ]
    return html.page(f"{config.name}: dataset", body, 70, "figure{margin:2rem 0}")


def _histograms(found: Mapping[str, np.ndarray]) -> str:
    """One picture of a histogram each, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        whole = bool((values == np.rint(values)).all())
        bins = np.arange(values.min(), values.max() + 2) - 0.5 if whole and np.ptp(values) < 40 else 30
        axes.hist(values, bins, color="#3b6ea5")
        axes.set_xlabel(f"{name} (mean {values.mean():.1f})")
        axes.set_ylabel("clips")
        axes.yaxis.get_major_locator().set_params(integer=True)
        if whole:
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return html.plot(figure, "histograms: " + ", ".join(found), "svg")
