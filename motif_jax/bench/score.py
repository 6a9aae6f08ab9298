"""Scores folders of videos of any model: motion, steadiness and likeness to the image, beside the image itself as a still video.

In: a list of image-text pairs and folders of mp4, gif, webm or folders of frames, named by pair (docs/evaluate.md). Out, in --output:
index.html to look at, scores.json and scores.csv by model, videos.csv by video. A stopped run continues where it was.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from motif_jax.bench import flows, score_page
from motif_jax.bench.arguments import at_least, folders, local, positive, size
from motif_jax.bench.preference import finite
from motif_jax.bench.standings import METRICS, STATIC, standings
from motif_jax.bench.study_clips import on_threads, reaches, stride
from motif_jax.bench.video_metrics import WINDOW, FlowFn, measure
from motif_jax.data.images import MediaError, cover, read_image
from motif_jax.data.videos import read_video
from motif_jax.errors import UserError
from motif_jax.pairs import Pair, find_videos, frames_in, read_pairs
from motif_jax.requested import make_output

VERSION = 1  # of the measures: a cache of another version is not used
FRAME_RATE = 8.0  # of folders of frames, which do not say theirs
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How videos are read and measured; a result is used again only under the same settings."""

    flow: Mapping[str, str]
    clip: str = ""  # SHA-256 of its files
    frames: int | None = None  # the first so many; None: all
    size: tuple[int, int] | None = None  # (height, width) to cover; None: the video's own
    frame_rate: float = FRAME_RATE
    rate: float | None = None  # to thin faster videos to, before `frames` are counted; None: their own

    @property
    def key(self) -> str:
        """What a result depends on. `rate` is in it only where it is given: results from before there was one stay valid."""
        return json.dumps([VERSION, {k: v for k, v in dataclasses.asdict(self).items() if (k, v) != ("rate", None)}], sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that the numbers do not show by themselves."""

    model: str
    kind: str
    name: str
    detail: str = ""


def load(path: pathlib.Path, settings: Settings) -> tuple[np.ndarray, float]:
    """(uint8 [T, H, W, 3], frames per second) of a video file or a folder of frames. Raises MediaError."""
    if path.is_dir():
        step, fps = _thinning(settings.frame_rate, settings.rate)
        pictures = [_read(p) for p in _frame_files(path)[::step][: settings.frames]]
        if len({p.shape for p in pictures}) > 1:
            raise MediaError("changes size", "its frames are not all of one size")
        frames = np.stack(pictures)
    else:
        clip = read_video(path)
        step, fps = _thinning(clip.fps, settings.rate)
        frames = clip.frames[::step][: settings.frames]
    if settings.size is not None:
        frames = np.stack([cover(f, *settings.size) for f in frames])
    if len(frames) < max(2, settings.frames or 2):
        raise MediaError("too short", f"{len(frames)} frame{'s'[: len(frames) != 1]}")
    if min(frames.shape[1:3]) < WINDOW:
        raise MediaError("too small", f"{frames.shape[1]}x{frames.shape[2]}")
    return frames, fps


def _thinning(fps: float, rate: float | None) -> tuple[int, float]:
    """(n, frames per second of every n-th frame) that --rate asks for. Raises MediaError where no n leads there."""
    if rate is None:
        return 1, fps
    if not reaches(fps, rate):
        raise MediaError("other frame rate", f"{fps:g} frames a second, no whole multiple of --rate={rate:g}; choose a common divisor")
    return stride(fps, rate), fps / stride(fps, rate)


def _frame_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """By the numbers in their names: frame10 comes after frame9."""

    def parts(path: pathlib.Path) -> list[Any]:
        return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"([0-9]+)", path.name))]

    return sorted(frames_in(folder), key=lambda path: (parts(path), path.name))


def _read(path: pathlib.Path, *size: int) -> np.ndarray:
    """`read_image`, whose MediaError names the file: it is another one than that which is measured."""
    try:
        return read_image(path, *size)
    except MediaError as error:
        raise MediaError("unreadable image", f"{path}: {error}") from error


class Scorer:
    """Measures videos on `workers` threads (decoding, flow and filters leave the interpreter), through a cache in a jsonl file.

    The key of a result is the content of the video and of the image, and the settings.
    """

    def __init__(self, settings: Settings, flow_fn: FlowFn, clip: Callable | None, cache: pathlib.Path, workers: int):
        self._settings, self._flow_fn, self._clip, self._workers = settings, flow_fn, clip, workers
        self._cache, self._known = cache, {}
        for line in cache.read_bytes().splitlines() if cache.exists() else []:
            try:
                found = json.loads(line)
                self._known[found["key"]] = {k: math.nan if v is None else v for k, v in found["row"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):  # no result, or one cut off when the run before was stopped
                continue

    def __call__(self, jobs: Sequence[tuple[Pair, Any]], progress: Callable[[str], None]) -> list[Row | MediaError]:
        """One row, or the reason why there is none, for each (pair, path of its video or shape [T, H, W] and rate of the still one)."""

        def told(done: int) -> None:
            if done % 20 == 0 or done == len(jobs):
                progress(f"{done} of {len(jobs)} videos")

        results: list[Row | MediaError] = []
        with self._cache.open("a", encoding="utf-8") as cache:
            if cache.tell():
                cache.write("\n")  # ends a line that was cut off
            for found in on_threads(self._one, jobs, self._workers, told):
                key, row = (None, found) if isinstance(found, MediaError) else found
                results.append(row)
                if key and key not in self._known:
                    self._known[key] = row
                    cache.write(json.dumps({"key": key, "row": finite(row)}) + "\n")
                    cache.flush()
        return results

    def _one(self, pair: Pair, video: Any) -> tuple[str, Row]:
        digest = hashlib.sha256(self._settings.key.encode())
        if self._clip is not None:
            digest.update(pair.prompt.encode())
        try:
            digest.update(pair.image.read_bytes())
            if isinstance(video, pathlib.Path):
                for file in _frame_files(video) if video.is_dir() else [video]:
                    digest.update(f"{file.name if video.is_dir() else ''}:{file.stat().st_size}:".encode() + file.read_bytes())
            else:
                digest.update(repr(video).encode())
        except OSError as error:
            raise MediaError("cannot be read", str(error)) from error
        key = digest.hexdigest()
        if key in self._known:
            return key, self._known[key]
        return key, measure_video(pair, video, self._settings, self._flow_fn, self._clip)


def measure_video(pair: Pair, video: Any, settings: Settings, flow_fn: FlowFn, clip: Callable | None = None) -> Row:
    """Shape and measures of one video: of a path, or of the image repeated for ([T, H, W], rate). Raises MediaError."""
    if isinstance(video, pathlib.Path):
        frames, fps = load(video, settings)
        image = _read(pair.image, *frames.shape[1:3])
    else:
        (count, height, width), fps = video
        image = _read(pair.image, height, width)
        frames = np.repeat(image[None], count, axis=0)
    row = {"frames": len(frames), "height": frames.shape[1], "width": frames.shape[2], "fps": float(fps)}
    row |= measure(frames, image, fps, flow_fn)
    return row | clip(frames, image, pair.prompt) if clip is not None else row


def score(
    pairs: Sequence[Pair], folders: Mapping[str, pathlib.Path], scorer: Scorer, progress: Callable[[str], None] = lambda text: None
) -> tuple[list[Row], list[Problem]]:
    """(a row per video with `model`, `id`, `seed`, `file`; everything that is missing, broken, doubled, unknown or unlike the rest).

    The model `static` is the image of every pair that any model has, in the shape of that model's video. Raises UserError for a folder
    without a video of the list, and when no video can be measured.
    """
    rows, problems, still = [], [], {}
    for model, folder in folders.items():
        found = find_videos(folder, pairs)
        if not found.videos:
            example = f"{pairs[0].id}.mp4 or {pairs[0].id}_0.mp4"
            raise UserError(f"--videos={model}={folder}: no file there is named by a pair of the list, such as {example}")
        problems += [Problem(model, "unknown", p.name, "no pair of the list") for p in found.strays]
        problems += [Problem(model, "double", p.name, "another file shows the same pair and seed") for p in found.doubles]
        seeds = sorted({seed for _, seed in found.videos})
        problems += [Problem(model, "missing", p.id, f"seed {s}") for p in pairs for s in seeds if (p.id, s) not in found.videos]
        order = [(p, s, found.videos[p.id, s]) for p in pairs for s in seeds if (p.id, s) in found.videos]
        measured = scorer([(pair, path) for pair, _, path in order], lambda text, model=model: progress(f"{model}: {text}"))
        for (pair, seed, path), row in zip(order, measured, strict=True):
            if isinstance(row, MediaError):
                problems.append(Problem(model, "broken", path.name, str(row)))
                continue
            rows.append({"model": model, "id": pair.id, "seed": seed, "file": str(path), **row})
            still.setdefault(pair.id, ((row["frames"], row["height"], row["width"]), row["fps"]))
    if not rows:
        first = next(p for p in problems if p.kind == "broken")
        raise UserError(f"--videos: no video can be measured, the first being {folders[first.model] / first.name}: {first.detail}")
    problems += _unlike(rows)
    order = [p for p in pairs if p.id in still]
    for pair, row in zip(order, scorer([(p, still[p.id]) for p in order], lambda text: progress(f"{STATIC}: {text}")), strict=True):
        if isinstance(row, MediaError):
            problems.append(Problem(STATIC, "broken", pair.image.name, str(row)))
        else:
            rows.append({"model": STATIC, "id": pair.id, "seed": 0, "file": str(pair.image), **row})
    return rows, problems


def _unlike(rows: Sequence[Row]) -> list[Problem]:
    """Videos of another length, size or frame rate than most: most measures cannot be compared between them."""
    problems = []
    for kind, form in (("length", "{frames} frames"), ("size", "{height}x{width}"), ("frame rate", "{fps:g} frames a second")):
        texts = [form.format_map(row) for row in rows]
        usual = Counter(texts).most_common(1)[0][0]
        rate = rows[texts.index(usual)]["fps"]
        for row, text in zip(rows, texts, strict=True):
            near = kind == "frame rate" and abs(row["fps"] / rate - 1) <= 0.05  # GIFs count in 1/100 s: 8 are 7.7 or 8.3 there
            if text != usual and not near:
                problems.append(Problem(row["model"], f"other {kind}", pathlib.Path(row["file"]).name, f"{text}, most have {usual}"))
    return problems


def write(
    output: pathlib.Path, pairs: Sequence[Pair], models: Sequence[str], rows: list[Row], problems: list[Problem], settings: Settings
) -> dict[str, Any]:
    """Writes scores.json, scores.csv, videos.csv and index.html, and returns what is in the json."""
    counts = Counter((p.model, p.kind) for p in problems)
    result = {
        "settings": dataclasses.asdict(settings),
        "pairs": len(pairs),
        **standings(rows, {p.id: str(p.image) for p in pairs}, models),
        "problem_counts": [{"model": model, "kind": kind, "count": n} for (model, kind), n in counts.items()],
        "problems": [dataclasses.asdict(p) for p in problems],
    }
    (output / "scores.json").write_text(json.dumps(finite(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with (output / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["model", "metric", "value", "low", "high", "pairs"])
        for model, found in result["models"].items():
            table.writerows([model, name, m["value"], m["low"], m["high"], m["pairs"]] for name, m in found["metrics"].items())
    names = [m.name for m in METRICS if any(m.name in row for row in rows)]
    with (output / "videos.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["model", "id", "seed", "file", "frames", "height", "width", "fps", *names])
        table.writeheader()
        table.writerows(rows)
    score_page.write(output / "index.html", pairs, rows, result, lambda path: load(path, settings)[0])
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", required=True, help="pairs: the benchmark's folder (images and prompt.csv), a .jsonl or a .csv file")
    parser.add_argument("--videos", required=True, action="append", metavar="NAME=DIR", help="a model and its videos; once for each model")
    parser.add_argument("--output", required=True, type=local, help="directory of the results")
    parser.add_argument("--flow", default="dis", choices=("dis", "raft_small", "raft_large"), help="optical flow (default: dis)")
    parser.add_argument("--flow_weights", default="", help="RAFT weights, .safetensors or .pth, a path or URL")
    parser.add_argument("--clip", default="", help="directory of a CLIP model (Hugging Face's layout): adds its alignments; needs PyTorch")
    parser.add_argument("--frames", type=at_least(2), help="use the first so many frames of every video (default: all)")
    parser.add_argument("--rate", type=positive, help="frames a second to thin all videos to, before --frames (default: their own)")
    parser.add_argument("--size", type=size(range(WINDOW, 4097)), help="N or HEIGHTxWIDTH to cover and crop videos to (default: their own)")
    parser.add_argument("--fps", type=positive, default=FRAME_RATE, help="frame rate that folders of frames have (default: 8)")
    parser.add_argument("--workers", type=at_least(0), default=0, help="videos measured at once (default: one per core; RAFT or CLIP: one)")


def run(arguments: argparse.Namespace) -> None:
    """Scores the folders and writes the results into --output."""
    models = folders(arguments.videos)
    if STATIC in models:
        raise UserError(f"--videos={STATIC}={models[STATIC]}: the name {STATIC!r} is taken, by the image repeated")
    pairs = read_pairs(arguments.list)
    flow_fn, described = flows.make_flow(arguments.flow, arguments.flow_weights)
    clip = None
    if arguments.clip:
        from motif_jax.bench.clip_alignment import ClipAlignment

        clip = ClipAlignment(arguments.clip)
    settings = Settings(described, clip.digest if clip else "", arguments.frames, arguments.size, arguments.fps, arguments.rate)
    make_output(arguments.output)
    workers = arguments.workers or (os.cpu_count() if arguments.flow == "dis" and clip is None else 1)
    scorer = Scorer(settings, flow_fn, clip, arguments.output / "cache.jsonl", workers)
    rows, problems = score(pairs, models, scorer, lambda text: print(text, flush=True))
    result = write(arguments.output, pairs, list(models), rows, problems, settings)
    print(score_page.text_table(result))
    for found in result["problem_counts"]:
        print(f"{found['model']}: {found['count']} {found['kind']}")
    if {found["kind"] for found in result["problem_counts"]} & set(score_page.SHAPES):
        print(score_page.ONE_SHAPE)
    print(f"{arguments.output / 'index.html'}")
