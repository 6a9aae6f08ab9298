"""The synthetic benchmark: something that turns images and sentences into clips in, rates of the judge with intervals out.

Splits: `validation` (new clips of combinations seen in training), `heldout` (the named shape or colour moves in the one
direction in which training never shows it), `several` (three shapes), `backgrounds` (stripes, training has noise). Beside the
model stand the static clip, which no measure of text may reward, and the ceiling, the true clips (through the autoencoder,
where one is given).
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from motif_jax.bench import tables
from motif_jax.bench.arguments import at_least
from motif_jax.bench.judge import MIN_WAY, judge
from motif_jax.bench.preference import rate
from motif_jax.config import DataConfig
from motif_jax.data import pipeline, sprites
from motif_jax.data.storage import run_location
from motif_jax.errors import UserError, enumerate_first

# images uint8 [N,H,W,3], sentences, seeds [N] -> clips uint8 [N,T,H,W,3]
SampleFn = Callable[[np.ndarray, list[str], np.ndarray], np.ndarray]
Measures = dict[str, np.ndarray]

SPLITS = ("validation", "heldout", "several", "backgrounds")
RATES = ("success", "direction_ok", "wrong_object")
MEANS = (
    "speed_ratio path_error selectivity presence others_presence others_drift background_shift background_mae background_psnr "
    "colour_error shape_iou area_ratio leak psnr psnr_to_first"
).split()
MOVES = [d for d in sprites.DIRECTIONS if d != "still"]
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def summarise(measures: Measures) -> dict[str, Any]:
    """Rates with 95 % Wilson intervals, and means, of what `judge` returned; sentences that ask for motion and for stillness apart."""
    still = measures["still"] > 0

    def mean(name: str) -> float | None:
        values = measures[name][~still]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None

    return {
        "moving": {"rates": {n: rate(measures[n][~still]) for n in RATES}, "means": {n: mean(n) for n in MEANS}},
        "still": {"rates": {n: rate(measures[n][still]) for n in ("success", "direction_ok")}},
    }


def turned(captions: list[str], direction: str) -> list[str]:
    """The sentences with another direction; those that ask for stillness stay."""
    return [" ".join(direction if word in MOVES else word for word in text.split()) for text in captions]


def text_sensitivity(ways: dict[str, Measures], clips: dict[str, Any]) -> dict[str, Any]:
    """Does the sentence decide? `ways[d]` judges the same images and noise, told to move in direction d, for all of MOVES.

    antonym_contrast: 1 when the object goes its way whichever of the two opposite ways it is told, 0 when the text is ignored:
    the mean of ((way - way when told the opposite) . direction) / (2 true ways), over clips in which both were found.
    prompt_retrieval: share of sentences that the measured way picks out of the four, 0.25 by chance; the object must have gone
    30 % of its way. Its interval counts images, not sentences, which are not independent.
    """
    moving = clips["direction"] != sprites.STILL
    travel = sprites.WORLDS[clips["world"]].travel * min(clips["height"], clips["width"])
    way = np.stack([np.stack([ways[d]["way_x"], ways[d]["way_y"]], -1)[moving] for d in MOVES], 1)  # [clips, told, 2]
    units = np.stack([sprites.UNIT[sprites.DIRECTIONS.index(d)] for d in MOVES])
    along = np.nan_to_num(way) @ units.T  # [clips, told, direction]
    correct = (along.argmax(-1) == np.arange(len(MOVES))) & (along.max(-1) > MIN_WAY * travel)

    told = np.array([MOVES.index(sprites.DIRECTIONS[d]) for d in clips["direction"][moving]], int)
    against = np.array([MOVES.index(OPPOSITE[d]) for d in MOVES])[told] if len(told) else told
    row = np.arange(len(told))
    contrast = ((way[row, told] - way[row, against]) * units[told]).sum(-1) / (2 * travel)
    contrast = contrast[np.isfinite(contrast)]
    return {
        "antonym_contrast": {"mean": float(contrast.mean()) if len(contrast) else None, "count": len(contrast)},
        "prompt_retrieval": rate(correct.mean(1)),
    }


def sample_all(
    sample_fn: SampleFn,
    clips: dict[str, Any],
    captions: list[str],
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Clips uint8 [N,T,H,W,3] for the first frames of `clips`; the clip i is sampled with the seed i.

    `sample_fn` is called with `batch_size` clips, the last batch filled up with repeats, so that it compiles once.
    """
    images, out = clips["frames"][:, 0], []
    for start in range(0, len(images), batch_size):
        index = np.minimum(np.arange(start, start + batch_size), len(images) - 1)
        made = np.asarray(sample_fn(images[index], [captions[i] for i in index], index))
        out.append(made[: len(images) - start])
        progress(min(start + batch_size, len(images)))
    return np.concatenate(out)


def evaluate(
    sample_fn: SampleFn,
    world: str,
    seed: int,
    count: int,
    frames: int,
    height: int,
    width: int,
    batch_size: int = 32,
    round_trip: Callable[[np.ndarray], np.ndarray] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Samples the first `count` clips of each split of a world (seed: that of the world), judges them, and returns plain numbers
    for JSON: {"world", "seed", "count", ..., "splits": {split: {"model", "static", "ceiling", ...}}}.

    `heldout` also tells combinations of shape and direction from those of colour and direction, and its clips are sampled with all four
    directions too (see `text_sensitivity`). round_trip: clips through the autoencoder, for the ceiling. Raises ValueError on a count
    below 1 or clips of a wrong shape.
    """
    if count < 1:
        raise ValueError(f"count={count}: at least one clip is needed")
    result = {"world": world, "seed": seed, "count": count, "frames": frames, "height": height, "width": width, "splits": {}}
    for split in SPLITS:
        clips = sprites.make_clips(world, seed, range(count), frames, height, width, split)
        ceiling = judge(clips["frames"] if round_trip is None else round_trip(clips["frames"]), clips)

        def judged(captions: list[str], what: str, clips=clips, ceiling=ceiling) -> Measures:
            made = sample_all(sample_fn, clips, captions, batch_size, lambda done: progress(f"{what}: {done} of {count}"))
            return judge(made, clips, ceiling)

        measures = judged(clips["captions"], split)
        static = judge(np.repeat(clips["frames"][:, :1], frames, axis=1), clips, ceiling)
        rows = {"model": summarise(measures), "static": summarise(static), "ceiling": summarise(ceiling)}
        if split == "heldout":
            by_shape = np.array([sprites.HELD_OUT[sprites.DIRECTIONS[d]] in sprites.SHAPES for d in clips["direction"]])
            for name, part in (("shape and direction", by_shape), ("colour and direction", ~by_shape)):
                rows[name] = summarise({k: v[part] for k, v in measures.items()})
            rows |= text_sensitivity({d: judged(turned(clips["captions"], d), f"{split}, {d}") for d in MOVES}, clips)
        result["splits"][split] = rows
    return result


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, one row per split and system; rates in per cent with their 95 % intervals."""
    forms = {"speed_ratio": ".2f", "path_error": ".3f", "background_psnr": ".1f", "area_ratio": ".2f"}
    head = "split|clips|success %|direction %|wrong object %|speed ratio|path error|background dB|area|still kept %".split("|")

    def percent(r: dict[str, Any]) -> str:
        return "-" if r["rate"] is None else tables.estimate(r["rate"], (r["low"], r["high"]), ".0f", 100)

    lines, told = [], []
    for split, rows in result["splits"].items():
        for system, found in ((name, row) for name, row in rows.items() if "moving" in row):
            rates, means = found["moving"]["rates"], found["moving"]["means"]
            cells = [*(percent(rates[n]) for n in RATES), *(tables.number(means[n], form) for n, form in forms.items())]
            lines.append([split, system, *cells, percent(found["still"]["rates"]["direction_ok"])])
        if "prompt_retrieval" in rows:
            told.append(
                f"{split}: told all four ways, the way taken picks the sentence in {percent(rows['prompt_retrieval'])} % (chance 25), "
                f"antonym contrast {tables.number(rows['antonym_contrast']['mean'])} of 1"
            )
    title = f"{result['world']}, {result['count']} clips per split, {result['frames']} frames of {result['height']}x{result['width']}"
    return "\n".join([title, "", tables.markdown(head, lines), "", *told]).rstrip() + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="work directory of a run; gets synthetic.json and the report")
    world = "name of the synthetic world (default: the one that the run was trained on)"
    parser.add_argument("--world", choices=sprites.WORLDS, help=world)
    parser.add_argument("--count", default=128, type=at_least(1), help="clips per split")
    parser.add_argument("--seed", default=0, type=int, help="seed of the world")


def trained_world(data: DataConfig) -> str:
    """The world that a run's clips are of. Raises UserError where they are of none, or of several, or are gone."""
    try:
        sources = sorted({str(manifest.settings["source"]) for manifest in pipeline.read_manifests(data)})
    except UserError as error:
        raise UserError(f"which world was the run trained on? Its clips cannot be read ({error}): name it with --world") from error
    worlds = {source.split(":")[1] if source.startswith("synthetic:") else "" for source in sources}
    if len(worlds) > 1 or worlds - sprites.WORLDS.keys():
        raise UserError(
            f"the run was trained on {enumerate_first(sources, 3, ', ')}, no world of its own: name one to judge it in with --world"
        )
    return worlds.pop()


def run(arguments: argparse.Namespace) -> None:
    """Judges the samples of a trained run; writes <workdir>/synthetic.json, strips of the first clips and the report."""
    from motif_jax import animation, report
    from motif_jax.training import weights
    from motif_jax.training.mirror import mirrored
    from motif_jax.training.samples import save_comparison

    seed = arguments.seed
    workdir = run_location(arguments.workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"--workdir={workdir}: no config.json there; expected a work directory of motif_jax.main")
    d = weights.Run(workdir).config.data
    world = arguments.world or trained_world(d)  # before weights are loaded
    animator = animation.Animator.load(workdir)
    result = evaluate(
        lambda images, prompts, seeds: animator(list(images), prompts, list(seeds)),
        world,
        seed,
        arguments.count,
        d.frames,
        d.height,
        d.width,
        round_trip=animator.round_trip,
        progress=lambda text: print(text, flush=True),
    )
    show = sprites.make_clips(world, seed, range(8), d.frames, d.height, d.width, "heldout")
    made = animator(list(show["frames"][:, 0]), show["captions"], list(range(8)))
    with mirrored(workdir) as local:
        (local / "synthetic.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        save_comparison(local / "synthetic", show["frames"], made, show["captions"], animator.config.sample.fps)
        report.write(local)
    print(table(result))
