"""The synthetic benchmark: something that turns images and sentences into clips in, rates of the judge with intervals out.

Two splits: `validation` (new clips of combinations seen in training) and `heldout` (the named shape or colour moves in the
one direction in which training never shows it). Beside the model stand the static clip, which no measure of text may reward,
and the ceiling, the true clips (through the autoencoder, where one is given).
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from motif_jax.bench.judge import judge, wilson
from motif_jax.config import UserError
from motif_jax.data import sprites

# images uint8 [N,H,W,3], sentences, seeds [N] -> clips uint8 [N,T,H,W,3]
SampleFn = Callable[[np.ndarray, list[str], np.ndarray], np.ndarray]

RATES = ("success", "direction_ok", "wrong_object")
MEANS = (
    "speed_ratio",
    "path_error",
    "selectivity",
    "presence",
    "others_presence",
    "others_drift",
    "background_shift",
    "background_mae",
    "background_psnr",
    "colour_error",
    "shape_iou",
    "psnr",
    "psnr_to_first",
)
_OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def _rate(hits: np.ndarray) -> dict[str, Any]:
    low, high = wilson(float(hits.sum()), len(hits))
    return {"rate": float(hits.mean()) if len(hits) else None, "low": low, "high": high, "count": len(hits)}


def summarise(measures: dict[str, np.ndarray]) -> dict[str, Any]:
    """Rates with 95 % Wilson intervals, and means, of what `judge` returned; sentences that ask for motion and for stillness apart."""
    still = measures["still"] > 0

    def mean(name: str) -> float | None:
        values = measures[name][~still]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None

    return {
        "moving": {"rates": {n: _rate(measures[n][~still]) for n in RATES}, "means": {n: mean(n) for n in MEANS}},
        "still": {"rates": {n: _rate(measures[n][still]) for n in ("success", "direction_ok")}},
    }


def antonym_contrast(measures: dict[str, np.ndarray], opposite: dict[str, np.ndarray], clips: dict[str, Any]) -> dict[str, Any]:
    """Does the sentence decide? The same image and noise with the opposite direction: 1 when the object goes its way both
    times, 0 when the text is ignored. Mean of ((way - opposite way) . direction) / (2 true ways), and clips in which both were found.
    """
    difference = np.stack([measures[n] - opposite[n] for n in ("way_x", "way_y")], -1)
    travel = sprites.WORLDS[clips["world"]].travel * min(clips["height"], clips["width"])
    contrast = (difference * sprites.UNIT[clips["direction"]]).sum(-1) / (2 * travel)
    contrast = contrast[(measures["still"] == 0) & np.isfinite(contrast)]
    return {"mean": float(contrast.mean()) if len(contrast) else None, "count": len(contrast)}


def evaluate(
    sample_fn: SampleFn,
    world: str,
    seed: int,
    count: int,
    frames: int,
    height: int,
    width: int,
    splits: Sequence[str] = ("validation", "heldout"),
    batch_size: int = 32,
    round_trip: Callable[[np.ndarray], np.ndarray] | None = None,
    antonyms: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Samples the first `count` clips of each split of a world (seed: that of the world), judges them, and returns plain
    numbers for JSON: {"world", "seed", "count", ..., "splits": {split: {"model", "static", "ceiling", "antonym_contrast"}}}.

    The clip i is sampled with the seed i. sample_fn is called with `batch_size` clips, the last batch filled up with
    repeats, so that it compiles once. round_trip: clips through the autoencoder, for the ceiling. antonyms: also sample each
    moving clip with the opposite direction (twice the work). Raises ValueError on a count below 1 or clips of a wrong shape.
    """
    if count < 1:
        raise ValueError(f"count={count}: at least one clip is needed")
    result = {"world": world, "seed": seed, "count": count, "frames": frames, "height": height, "width": width, "splits": {}}

    def sample(clips: dict[str, Any], captions: list[str], what: str) -> np.ndarray:
        images, out = clips["frames"][:, 0], []
        for start in range(0, len(images), batch_size):
            index = np.minimum(np.arange(start, start + batch_size), len(images) - 1)
            made = np.asarray(sample_fn(images[index], [captions[i] for i in index], index))
            out.append(made[: len(images) - start])
            progress(f"{what}: {min(start + batch_size, len(images))} of {len(images)}")
        return np.concatenate(out)

    for split in splits:
        clips = sprites.make_clips(world, seed, range(count), frames, height, width, split)
        ceiling = judge(clips["frames"] if round_trip is None else round_trip(clips["frames"]), clips)
        ceiling_mae = float(ceiling["background_mae"].mean())
        static = judge(np.repeat(clips["frames"][:, :1], frames, axis=1), clips)
        measures = judge(sample(clips, clips["captions"], split), clips, ceiling_mae)
        rows = {"model": summarise(measures), "static": summarise(static), "ceiling": summarise(ceiling)}
        if antonyms:
            turned = [" ".join(_OPPOSITE.get(word, word) for word in text.split()) for text in clips["captions"]]
            rows["antonym_contrast"] = antonym_contrast(measures, judge(sample(clips, turned, f"{split}, opposite"), clips), clips)
        result["splits"][split] = rows
    return result


def to_json(result: dict[str, Any]) -> str:
    """The text of a result file."""
    return json.dumps(result, indent=2) + "\n"


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, one row per split and system; rates in per cent with their 95 % intervals."""

    def percent(r: dict[str, Any]) -> str:
        return "-" if r["rate"] is None else f"{100 * r['rate']:.0f} [{100 * r['low']:.0f}, {100 * r['high']:.0f}]"

    def number(x: float | None, form: str) -> str:
        return "-" if x is None else format(x, form)

    lines = [
        f"{result['world']}, {result['count']} clips per split, {result['frames']} frames of {result['height']}x{result['width']}",
        "",
        "| split | clips | success % | direction % | wrong object % | speed ratio | path error | background dB | still kept % | contrast |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for split, rows in result["splits"].items():
        for system in ("model", "static", "ceiling"):
            moving, still = rows[system]["moving"], rows[system]["still"]
            rates, means = moving["rates"], moving["means"]
            contrast = rows.get("antonym_contrast", {}).get("mean") if system == "model" else None
            cells = [
                split,
                system,
                *(percent(rates[n]) for n in RATES),
                number(means["speed_ratio"], ".2f"),
                number(means["path_error"], ".3f"),
            ]
            cells += [number(means["background_psnr"], ".1f"), percent(still["rates"]["direction_ok"]), number(contrast, ".2f")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="work directory of a run; gets synthetic.json and the report")
    parser.add_argument("--world", default="quickstart", help="name of the synthetic world")
    parser.add_argument("--count", default=128, type=int, help="clips per split")
    parser.add_argument("--seed", default=0, type=int, help="seed of the world")


def run(arguments: argparse.Namespace) -> None:
    """Judges the samples of a trained run; writes <workdir>/synthetic.json, strips of the first clips and the report."""
    from motif_jax import animation, report
    from motif_jax.training.samples import save_comparison

    workdir, world, seed = arguments.workdir, arguments.world, arguments.seed
    if world not in sprites.WORLDS:
        raise UserError(f"--world={world}: no such world; known: {', '.join(sprites.WORLDS)}")
    if arguments.count < 1:
        raise UserError(f"--count={arguments.count}: at least one clip is needed")
    animator = animation.Animator.load(workdir)
    d = animator.config.data
    result = evaluate(
        lambda images, prompts, seeds: animator(list(images), prompts, list(seeds)),
        world,
        seed,
        arguments.count,
        d.frames,
        d.height,
        d.width,
        progress=lambda text: print(text, flush=True),
    )
    (workdir / "synthetic.json").write_text(to_json(result))
    show = sprites.make_clips(world, seed, range(8), d.frames, d.height, d.width, "heldout")
    made = animator(list(show["frames"][:, 0]), show["captions"], list(range(8)))
    save_comparison(workdir / "synthetic", show["frames"], made, show["captions"], animator.config.sample.fps)
    report.write(workdir)
    print(table(result))
