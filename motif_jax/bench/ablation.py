"""The ablation on the synthetic world: runs of several arms and seeds in, which arm follows the sentence better, and at what cost, out.

Under --runs lie <arm>/<seed>/, work directories of motif_jax.main (configs/ablation.py; launch/ablation.sh makes them all).
Every kept checkpoint from half of the run on is sampled and judged (results stay in <run>/judged/, so that a stopped call continues), then
<runs>/report.html, report.md and report.json compare the arms. --only=ARM/SEED judges one run and writes no report.
"""

import argparse
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from motif_jax.bench import comparison
from motif_jax.bench.arguments import at_least, local
from motif_jax.bench.judge import judge
from motif_jax.bench.synthetic import SPLITS, sample_all
from motif_jax.data import sprites
from motif_jax.data.storage import replacing
from motif_jax.errors import UserError
from motif_jax.training.metrics import read_lines

ALONG = ("validation", "heldout")  # the splits judged along training; the others at its end only
SHOWN = 6  # clips of the test split kept as pictures: the first ones, whatever they look like
RATES = ("success", "direction_ok", "wrong_object", "lost", "ghost")
MEANS = ("speed_ratio", "path_error", "background_psnr", "area_ratio", "others_drift", "leak")
DIFFERENCES = {  # of every pair of arms, paired by clip and seed: title, scale, format, sign of a gain
    "direction_ok": ("direction, points", 100, "+.0f", 1),
    "lost": ("object lost, points", 100, "+.0f", -1),
    "ghost": ("ghosts, points", 100, "+.0f", -1),
    "background_psnr": ("background dB", 1, "+.2f", 1),
}
BOUNDS = dict.fromkeys((*RATES, "leak"), comparison.RATE)  # of the other measures nothing is known
ORDER = ("none", "flow", "inverse")  # first rows; the other arms follow by name, then other backbones' three

Run = tuple[str, str]  # arm, seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", required=True, type=local, help="directory of <arm>/<seed>/ work directories")
    parser.add_argument("--only", default="", help="ARM/SEED: judge this run alone and write no report")
    parser.add_argument("--count", default=96, type=at_least(SHOWN), help="clips per split")
    parser.add_argument("--world", default="shapes", choices=sprites.WORLDS, help="name of the synthetic world")
    parser.add_argument("--seed", default=1, type=int, help="seed of the test clips; training uses another (prepare: config.seed)")


def run(arguments: argparse.Namespace) -> None:
    """Judges what is not judged yet, then writes the report."""
    from motif_jax.bench import ablation_report

    runs = find_runs(arguments.runs)
    if arguments.only:
        runs = {name: path for name, path in runs.items() if f"{name[0]}/{name[1]}" == arguments.only}
        if not runs:
            raise UserError(f"--only={arguments.only}: no such run under {arguments.runs}")
    steps_of_arms(runs)  # before hours of judging
    broken = judge_runs(runs, arguments.world, arguments.seed, arguments.count)
    sound = {name: path for name, path in runs.items() if name not in broken}
    if sound and not arguments.only:
        result = summarise(sound, arguments.world, arguments.seed, arguments.count)
        print(ablation_report.write(arguments.runs, result, sound, broken))
    if broken:
        named = ", ".join(f"{arm}/{number}" for arm, number in broken)
        raise UserError(f"{named}: NaN or infinity in the clips, so no result; train with a lower learning_rate, or move it elsewhere")


def find_runs(directory: pathlib.Path) -> dict[Run, pathlib.Path]:
    """{(arm, seed): work directory} of <directory>/<arm>/<seed>. Raises UserError when there is none."""
    found = {(p.parent.parent.name, p.parent.name): p.parent for p in sorted(directory.glob("*/*/config.json"))}
    if not found:
        raise UserError(f"{directory}: holds no <arm>/<seed>/config.json; launch/ablation.sh trains the arms")

    def rank(arm: str) -> tuple:
        prefix, _, base = arm.rpartition("_")
        return (prefix, ORDER.index(base)) if base in ORDER else ("", len(ORDER), arm)

    return dict(sorted(found.items(), key=lambda item: (rank(item[0][0]), item[0][1])))


def steps_of(run: pathlib.Path) -> list[int]:
    """The checkpoints of a run from half of it on, in order (before that nothing moves). Raises UserError when there is none."""
    steps = sorted(int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit())
    if not steps:
        raise UserError(f"{run}: holds no checkpoint yet; train it first")
    return [step for step in steps if 2 * step >= steps[-1]]


def steps_of_arms(runs: dict[Run, pathlib.Path]) -> dict[str, list[int]]:
    """The checkpoints of `steps_of` that all seeds of an arm have. Raises UserError for a seed that was not trained as far as another."""
    found: dict[str, dict[pathlib.Path, list[int]]] = {}
    for (arm, _), path in runs.items():
        found.setdefault(arm, {})[path] = steps_of(path)
    for arm, seeds in found.items():
        end = max(steps[-1] for steps in seeds.values())
        for path, steps in seeds.items():
            if steps[-1] < end:
                raise UserError(f"{path}: ends at step {steps[-1]}, another seed of {arm} at {end}: train it on, or move it elsewhere")
    return {arm: sorted(set.intersection(*map(set, seeds.values()))) for arm, seeds in found.items()}


def _file(run: pathlib.Path, step: int, split: str, world: str, seed: int, count: int) -> pathlib.Path:
    return run / "judged" / f"{step}_{world}_{split}_{seed}_{count}.npz"


def judge_runs(runs: dict[Run, pathlib.Path], world: str, seed: int, count: int) -> dict[Run, int]:
    """Samples and judges what `steps_of` says of every run and has not been; writes <run>/judged/*.npz.

    Returns {(arm, seed): step} of the runs that cannot be judged, because clips of that step have NaN or infinity.
    """
    from motif_jax.animation import Animator, NotFiniteError
    from motif_jax.training import weights

    broken = {}
    for (arm, number), path in runs.items():
        steps = steps_of(path)
        wanted = [(step, split) for step in steps for split in SPLITS if split in ALONG or step == steps[-1]]
        todo = [(step, split) for step, split in wanted if not _file(path, step, split, world, seed, count).exists()]
        if not todo:
            continue
        animator = Animator.load(path)
        d = animator.config.data
        (path / "judged").mkdir(exist_ok=True)
        for step, split in todo:
            animator.params = weights.load(path / "checkpoints" / str(step))["denoiser"]
            clips = sprites.make_clips(world, seed, range(count), d.frames, d.height, d.width, split)
            try:
                made = sample_all(animator, clips, clips["captions"])
            except NotFiniteError:
                broken[arm, number] = step
                print(f"{arm}/{number} step {step} {split}: NaN or infinity in the clips", flush=True)
                break
            measures = judge(made, clips)
            with replacing(_file(path, step, split, world, seed, count)) as temporary:
                np.savez_compressed(temporary, shown=made[:SHOWN], **measures)
            moving = measures["still"] == 0
            print(f"{arm}/{number} step {step} {split}: direction {100 * measures['direction_ok'][moving].mean():.0f} %", flush=True)
    return broken


def load(runs: Sequence[pathlib.Path], step: int, split: str, world: str, seed: int, count: int) -> dict[str, np.ndarray]:
    """What `judge_runs` wrote for the seeds of one arm: {measure: [seeds, clips]}, and the first clips as "shown"."""
    found = [dict(np.load(_file(run, step, split, world, seed, count))) for run in runs]
    return {name: np.stack([f[name] for f in found]) for name in found[0]}


def summarise(runs: dict[Run, pathlib.Path], world: str, seed: int, count: int) -> dict[str, Any]:
    """Plain numbers for JSON: per arm, split and step rates and means, figure 6, preferences of all pairs of arms of a family, and
    along training the differences of the pairs that the paper speaks of.

    Arms are compared on the seeds that both have, at the last step that both have. Every number is what `comparison.estimate` returns.
    """
    arms: dict[str, list[str]] = {}
    for arm, number in runs:
        arms.setdefault(arm, []).append(number)
    steps = steps_of_arms(runs)
    result: dict[str, Any] = {"world": world, "seed": seed, "count": count, "arms": {}, "pairs": [], "along": []}

    def measures(arm: str, numbers: list[str], split: str, step: int) -> dict[str, np.ndarray]:
        found = load([runs[arm, n] for n in numbers], step, split, world, seed, count)
        lost, ghost = found["presence"] < comparison.LOST, found["area_ratio"] > comparison.AREA_RANGE[1]
        return found | {"lost": lost.astype(float), "ghost": ghost.astype(float)}

    for arm, numbers in arms.items():
        row: dict[str, Any] = {"seeds": numbers, "step": steps[arm][-1], "splits": {split: {} for split in SPLITS}}
        for split in SPLITS:
            for step in steps[arm] if split in ALONG else steps[arm][-1:]:
                m = measures(arm, numbers, split, step)
                moving = m["still"][0] == 0
                row["splits"][split][step] = {n: comparison.estimate(m[n], moving, BOUNDS.get(n)) for n in RATES + MEANS} | {
                    "still_kept": comparison.estimate(m["direction_ok"], ~moving, comparison.RATE)
                }
        row["ratio"] = figure6([runs[arm, n] for n in numbers])
        result["arms"][arm] = row

    def shared(a: str, b: str) -> tuple[list[str], list[int]]:
        return [n for n in arms[a] if n in arms[b]], [step for step in steps[a] if step in steps[b]]

    def compared(a: str, b: str, seeds: list[str], split: str, step: int) -> dict[str, Any]:
        m_a, m_b = (measures(arm, seeds, split, step) for arm in (a, b))
        moving = m_a["still"][0] == 0
        rules = {"motion": comparison.prefer(m_a, m_b), "strict": comparison.prefer(m_a, m_b, strict=True)}
        return {name: comparison.estimate(preferred, moving, comparison.RATE) for name, preferred in rules.items()} | {
            f"{n}_difference": comparison.estimate(m_a[n] - m_b[n], moving, BOUNDS.get(n) and comparison.GAP) for n in DIFFERENCES
        }

    for a, b in itertools.combinations(arms, 2):
        seeds, both = shared(a, b)
        if seeds and both and family(result, a) == family(result, b):
            found = {split: compared(a, b, seeds, split, both[-1]) for split in ALONG}
            result["pairs"].append({"a": a, "b": b, "seeds": seeds, "step": both[-1]} | found)
    for a, b in claimed(result):
        seeds, both = shared(a, b)
        along = {s: {n: compared(a, b, seeds, s, n)["direction_ok_difference"] for n in both if seeds} for s in ALONG}
        result["along"].append({"a": a, "b": b, "seeds": seeds} | along)
    return result


def family(result: dict[str, Any], arm: str) -> str:
    """The family of an arm: the longest prefix of `families` that its name begins with."""
    return max((p for p in families(result) if arm.startswith(p)), key=len, default="")


def families(result: dict[str, Any]) -> list[str]:
    """The prefixes under which arms "flow" were run: "" for the U-Net's, "dit_" for the transformer's."""
    return [arm.removesuffix("flow") for arm in result["arms"] if arm == "flow" or arm.endswith("_flow")]


def claimed(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs (better, worse) of the paper's claim that were run: flow over none and none over inverse, in every family."""
    pairs = [(p + a, p + b) for p in families(result) for a, b in (("flow", "none"), ("none", "inverse"))]
    return [(a, b) for a, b in pairs if a in result["arms"] and b in result["arms"]]


def reference(result: dict[str, Any], arm: str) -> str:
    """The arm that another is compared with: its family's flow; where that was not run, the first arm."""
    flow = family(result, arm) + "flow"
    return flow if flow in result["arms"] else next(iter(result["arms"]))


def difference(result: dict[str, Any], a: str, b: str, split: str, name: str) -> dict[str, Any]:
    """An estimate of the pair a, b seen from a: what stands for the pair b, a is turned around."""
    whole = 0.0 if name.endswith("difference") else 1.0

    def turned(x: float | None) -> float | None:
        return None if x is None else whole - x

    for pair in result["pairs"]:
        if (pair["a"], pair["b"]) == (a, b):
            return pair[split][name]
        if (pair["a"], pair["b"]) == (b, a):
            e = pair[split][name]
            limits = {"low": turned(e["high"]), "high": turned(e["low"])}
            return {"mean": turned(e["mean"]), **limits, "seeds": [turned(s) for s in e["seeds"]]}
    return {"mean": None, "low": None, "high": None, "seeds": []}


def figure6(runs: Sequence[pathlib.Path]) -> dict[int, dict[str, list[float]]]:
    """{step: {"all", "0", "1", ...}: [one ratio per seed]}: mean loss in the moving region over mean loss, by timestep bucket.

    Only what all seeds have: a ratio that was not finite is null in metrics.jsonl.
    """
    per_seed = [{line["step"]: line for line in read_lines(path / "metrics.jsonl") if line.get("eval/ratio") is not None} for path in runs]
    ratios = {}
    for step in sorted(set.intersection(*map(set, per_seed))):
        found = {k: [lines[step].get(k) for lines in per_seed] for k in per_seed[0][step] if k.startswith("eval/ratio")}
        ratios[step] = {k.removeprefix("eval/ratio").removeprefix("_t") or "all": v for k, v in found.items() if None not in v}
    return ratios
