"""The offline job: videos and captions, or a synthetic world, in; a dataset directory of clips with optical flow out.

The unit of work is the shard. Which clips a shard holds and every byte of it follow from the source, the seed and the
settings, so tasks share the work by index, and a job killed at any moment continues where a shard is missing.
"""

import collections
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from motif_jax.config import Config
from motif_jax.data import captions, shards, verification
from motif_jax.data.shards import Shard, Skipped
from motif_jax.data.sources import FlowEstimator, Source, SpriteClips, VideoClips, gone, identities
from motif_jax.data.storage import BUCKETS, Path, local_path, location, sweep
from motif_jax.data.tokens import too_long
from motif_jax.errors import UserError, enumerate_first

if TYPE_CHECKING:
    from motif_jax.towers import Towers

_SECONDS_BETWEEN_LINES = 5.0

Log = Callable[[str], None]
_say: Log = functools.partial(print, flush=True)


@dataclass(frozen=True)
class Summary:
    """What one call did: clips per split of the whole dataset once it is complete, and why clips were left out."""

    clips: dict[str, int]
    written: int
    kept: int
    missing: int
    skipped: dict[str, int]


def prepare(
    config: Config,
    source: str,
    output: str | os.PathLike,
    task_index: int = 0,
    task_count: int = 1,
    preview: int = 0,
    estimator: FlowEstimator | None = None,
    log: Log = _say,
    beam_options: Sequence[str] | None = None,
) -> Summary:
    """Writes the shards task_index, task_index + task_count, ... of the dataset, and its metadata if these were the last.

    `estimator` replaces the one that `config.prepare.flow` names. Shards that are there and whole are kept, others written again.
    `beam_options` hands the shards to Apache Beam instead of working through them here.
    Raises UserError, naming what is wrong and the remedy, when the source or the output cannot be used or no clip is left.
    """
    if not 0 <= task_index < task_count:
        raise UserError(f"task_index={task_index}: must be in [0, task_count={task_count})")
    if not source or not str(output):
        raise UserError("--source and --output must not be empty")
    if _same_folder(source, str(output)):
        raise UserError(f"--output={output}: is the folder of the videos; choose another, which can be deleted")
    if preview and local_path(str(output)) is None and not str(output).startswith(BUCKETS):
        raise UserError(f"--preview reads shards on a disk or in gs://: leave it out, copy {output} to a disk and prepare there once more")
    if estimator and beam_options is not None:
        raise ValueError("Beam's workers make the estimator that config.prepare.flow names: give no other")
    began = time.monotonic()
    job = Job(config, source, output, estimator, log)
    for directory in (job.directory, job.directory / "manifests", job.directory / "preview"):
        sweep(directory)
    mine = range(task_index, len(job.plan), task_count)
    clips = sum(len(job.plan[i].items) for i in mine)
    if long := too_long(config.text, "captions of clips", {item.clip_id: item.caption for shard in job.plan for item in shard.items}):
        log(long)
    share = f", task {task_index} of {task_count}" if task_count > 1 else ""
    log(f"{clips} clips in {len(mine)} shards to {job.directory}{share}")
    if beam_options is None:
        progress = _Progress(clips, log)
        written = sum(job.run(i, progress) for i in mine)
        progress.line()
        lost = len(job.lost)
    else:
        written, lost = _run_on_beam(config, source, output, mine, beam_options)
    if lost:
        log(f"{lost} clips are kept though their files are gone" + (f", the first: {job.lost[0]}" if job.lost else ""))

    missing = job.finish()
    summary = job.summary(written, len(mine) - written, missing)
    log(_summary_line(summary, job.directory, time.monotonic() - began))
    if config.prepare.validation_share and not missing and not summary.clips.get("validation"):
        share = f"prepare.validation_share={config.prepare.validation_share:g}"
        log(f"no clip is held out for validation: {share} took none that can be used; another --output may have a larger share")
    if missing:
        log(f"{missing} of {len(job.plan)} shards belong to other tasks and are not there yet; the last task to end completes the dataset")
    elif preview:
        from motif_jax import preview as pages  # loads JAX

        pages.write(config, job.directory, preview, job.towers.decode if job.towers else None, summary.skipped, log)
    return summary


def _same_folder(source: str, output: str) -> bool:
    here, there = local_path(source), local_path(output)
    if here is None or there is None:
        return source.rstrip("/") == output.rstrip("/")
    return os.path.isdir(here) and os.path.realpath(here) == os.path.realpath(there)


def verify(output: str | os.PathLike, log: Log = _say) -> None:
    """Reads everything that a finished dataset holds. Raises UserError naming every file that is missing, damaged or outdated."""
    directory = location(str(output))
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log(f"{done} of {total} shards read")

    try:
        bad = verification.verify(directory, progress)
    except OSError as error:
        raise UserError(f"--output={output} cannot be read: {error}") from error
    for line in bad:
        log(line)
    if bad:
        names = enumerate_first([line.split()[0] for line in bad], 5, ", ")
        raise UserError(f"{directory}: {len(bad)} files are not as they should be ({names}); the command that made them repairs these only")
    log(f"{directory}: every record is as it was written")


class Job:
    """A source, its division into shards and the directory they go to: the same for every task and every run."""

    def __init__(self, config: Config, source: str, output: str | os.PathLike, estimator: FlowEstimator | None = None, log: Log = _say):
        self.towers = _make_towers(config)
        self.source = open_source(config, source, estimator, self.towers)
        self.plan = shards.plan_shards(self.source.items, config.prepare.clips_per_shard)
        self.directory, self._log = location(str(output)), log
        self.lost: list[str] = []  # videos that are gone, of clips that are kept
        for problem in self.source.problems:
            log(f"skipped {problem.video}: {problem.kind}: {problem.reason}")
        if not self.plan:
            counts = collections.Counter(p.kind for p in self.source.problems)
            raise UserError(f"source {source!r} has no usable clip: {', '.join(f'{kind}: {n}' for kind, n in sorted(counts.items()))}")
        self.plan_id = _claim(self.directory, self.source, self.plan)

    def run(self, index: int, progress: "_Progress | None" = None) -> bool:
        """Writes shard `index` unless it is there and whole; whether it did."""
        shard = self.plan[index]
        files = identities(shard.items)
        wrong = verification.check_shard(self.directory, shard, self.source.layout) or self._stale(shard, files)
        if not wrong:
            if progress:
                progress.kept(len(shard.items))
            return False
        if wrong != "missing":
            self._log(f"{shard.name} is {wrong}: written again")
        (self.directory / "dataset.json").unlink(missing_ok=True)  # it vouches for every shard
        outcomes = self.source.outcomes(shard.items)
        fingerprint = shards.digest([self.plan_id, files])
        watched = progress.watch(outcomes) if progress else outcomes
        shards.write_shard(self.directory, shard, self.plan_id, fingerprint, watched)
        return True

    def _stale(self, shard: Shard, files: list[list[Any]]) -> str:
        """Why a whole shard is made again all the same; "" when it is kept, as it is when a video that was there is gone."""
        manifest = shards.shard_manifest(self.directory, shard.name)
        if manifest["plan"] == self.plan_id:
            if manifest["fingerprint"] == shards.digest([self.plan_id, files]):
                return ""
            skipped = {s["clip_id"] for s in manifest["skipped"]}  # these have no record to lose
            lost = [item.video for item in shard.items if item.clip_id not in skipped and gone(item)]
            if lost:
                self.lost += lost
                return ""
        return "made from other videos"

    def finish(self) -> int:
        """Completes the dataset if every shard is there; returns how many are missing."""
        return shards.finish(self.directory, self.plan, self.plan_id, self.source.layout, self.source.settings)

    def summary(self, written: int, kept: int, missing: int) -> Summary:
        """What there is now, by the manifests of all tasks."""
        skipped = collections.Counter(p.kind for p in self.source.problems)
        count = collections.Counter({s.split: 0 for s in self.plan})
        for shard, manifest in zip(self.plan, shards.shard_manifests(self.directory, [s.name for s in self.plan]), strict=True):
            if manifest:
                count[shard.split] += manifest["records"]
                skipped.update(s["kind"] for s in manifest["skipped"])
        return Summary(dict(count), written, kept, missing, dict(skipped))


def _run_on_beam(config: Config, source: str, output: str | os.PathLike, indices: Sequence[int], options: Sequence[str]) -> tuple[int, int]:
    """The shards as one Beam pipeline; each worker opens the source and the flow network once.

    Returns how many were written, and how many clips are kept though their files are gone.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("--runner=beam needs Apache Beam: pip install -e '.[beam]'; or share the work with --task_index") from error

    class MakeShard(beam.DoFn):
        def setup(self) -> None:
            self._job = Job(config, source, output, log=lambda line: None)

        def process(self, index: int) -> Iterator[int]:
            self._job.lost.clear()
            beam.metrics.Metrics.counter("motif_jax", "written").inc(int(self._job.run(index)))
            beam.metrics.Metrics.counter("motif_jax", "lost").inc(len(self._job.lost))
            yield index

    pipeline_run = beam.Pipeline(options=PipelineOptions(list(options)))
    pipeline_run | beam.Create(list(indices)) | beam.Reshuffle() | beam.ParDo(MakeShard())
    result = pipeline_run.run()
    result.wait_until_finish()

    def total(name: str) -> int:
        counters = result.metrics().query(beam.metrics.MetricsFilter().with_name(name))["counters"]
        return sum(c.committed or c.attempted or 0 for c in counters)

    return total("written"), total("lost")


def open_source(config: Config, source: str, estimator: FlowEstimator | None = None, towers: "Towers | None" = None) -> Source:
    """The clips that `source` (see `prepare`) gives under `config`. Raises UserError when it gives none."""
    if source.startswith("synthetic:"):
        return SpriteClips(config, source, estimator or (None if config.prepare.flow == "exact" else _make_estimator(config)), towers)
    listed = captions.read_source(source)
    if config.prepare.flow == "exact" and estimator is None:
        raise UserError(
            "prepare.flow='exact': only a synthetic:NAME source knows its exact flow; use raft_small, raft_large or dis for videos"
        )
    return VideoClips(config, listed, estimator or _make_estimator(config), towers)


def _make_towers(config: Config) -> "Towers | None":
    if not (config.prepare.latents or config.prepare.text_embeddings):
        return None
    from motif_jax.towers import Towers  # loads JAX

    return Towers(config)


def _make_estimator(config: Config) -> FlowEstimator:
    from motif_jax.motion.estimators import make_flow_estimator  # loads JAX

    p = config.prepare
    if p.flow == "dis" and p.flow_weights:
        raise UserError(f"prepare.flow_weights={p.flow_weights}: prepare.flow='dis' has none; use raft_small or raft_large, or set ''")
    try:
        return make_flow_estimator(p.flow, p.flow_weights, p.flow_iterations, p.flow_stride, dtype=p.flow_dtype)
    except FileNotFoundError as error:
        raise UserError(f"prepare.flow_weights={p.flow_weights!r}: there is no such file") from error
    except (ValueError, OSError) as error:
        raise UserError(f"prepare.flow={p.flow!r}: {error}") from error


def _claim(directory: Path, clips: Source, plan: Sequence[Shard]) -> str:
    """Writes plan.json, or compares with the one that is there; returns the plan's fingerprint.

    Where there is none or it is damaged, the shards' manifests say whether they are of this plan.
    """
    listed = hashlib.sha256()
    for shard in plan:
        for item in shard.items:
            listed.update(json.dumps([shard.split, item.clip_id, item.caption, item.mask is not None]).encode())
    wanted = {"settings": clips.settings, "clips": {split: len(items) for split, items in clips.items.items()}, "list": listed.hexdigest()}
    wanted["fingerprint"] = shards.digest(wanted)
    wanted |= {"layout": clips.layout.to_dict(), "shards": dict(collections.Counter(shard.split for shard in plan))}
    try:
        (directory / "manifests").mkdir(parents=True, exist_ok=True)
        # Looked for before the plan: another task's plan is there before its shards are.
        filled = any(directory.glob("*.array_record-*")) or (directory / "features.json").exists()
        found = shards.read_object(directory / "plan.json")
        plans = {found["fingerprint"]} if found else shards.plans(directory)
        if plans <= {wanted["fingerprint"]}:
            if filled and not plans:
                raise UserError(f"--output={directory} holds a dataset that is not from motif_jax.prepare; use another directory")
            shards.write_object(directory / "plan.json", wanted)
            return wanted["fingerprint"]
    except OSError as error:
        raise UserError(f"cannot write to --output={directory}: {error}") from error
    if not found:
        raise UserError(f"--output={directory}: its plan.json is lost, its shards are of another plan. Use another --output, or delete it")
    old, new = found["settings"], wanted["settings"]
    differs = [f"{k} was {old.get(k)!r} and is now {new.get(k)!r}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if not differs:
        differs = [f"another list of videos or captions (clips: {found['clips']} then, {wanted['clips']} now)"]
    how = "; ".join(differs)
    raise UserError(f"--output={directory} holds a dataset made differently: {how}. Use another --output, or delete this one")


class _Progress:
    """A line every few seconds: clips done, speed, time left."""

    def __init__(self, total: int, log: Log) -> None:
        self._total, self._log = total, log
        self._kept = self._made = self._skipped = 0
        self._began = self._last = time.monotonic()

    def kept(self, clips: int) -> None:
        self._kept += clips
        self._line_if_due()

    def watch(self, outcomes: Iterable[bytes | Skipped]) -> Iterator[bytes | Skipped]:
        for outcome in outcomes:
            self._made += 1
            if isinstance(outcome, Skipped):
                self._skipped += 1
                self._log(f"skipped {outcome.video}: {outcome.reason}")
            self._line_if_due()
            yield outcome

    def _line_if_due(self) -> None:
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self.line()

    def line(self) -> None:
        self._last = time.monotonic()
        done = self._kept + self._made
        rate = self._made / max(self._last - self._began, 1e-9)
        left = f", {(self._total - done) / rate / 60:.1f} min left" if rate and done < self._total else ""
        self._log(
            f"{done} of {self._total} clips ({100 * done // max(self._total, 1)} %), {self._skipped} skipped, {rate:.2f} clips/s{left}"
        )


def _summary_line(summary: Summary, directory: Path, seconds: float) -> str:
    clips = ", ".join(f"{split} {n}" for split, n in summary.clips.items())
    reasons = ", ".join(f"{kind}: {n}" for kind, n in sorted(summary.skipped.items()))
    return (
        f"{directory}: {clips} clips; {summary.written} shards written and {summary.kept} kept in {seconds:.1f} s; "
        f"{sum(summary.skipped.values())} skipped{f' ({reasons})' if reasons else ''}"
    )
