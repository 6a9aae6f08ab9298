"""The training run: a validated `Config` and a work directory in; checkpoints, metrics, samples and a report out.

Order, which makes a resumed run equal to an undisturbed one:
restore or init -> [evaluate and sample with the state before the update -> save (then stop if asked to) -> next batch ->
step -> log the steps before] -> wait for the save, write the report, mark done.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import motif_jax
from motif_jax.config import Config, to_json
from motif_jax.consistency import surprises
from motif_jax.data import pipeline
from motif_jax.data.storage import Path, run_location
from motif_jax.data.tokens import make_tokenizer
from motif_jax.dist import startup
from motif_jax.dist.mesh import batch_rows, check_fits, check_split, global_batch, make_mesh, place, repeated_work, shard_networks
from motif_jax.dist.preemption import Interrupted, StopSignal
from motif_jax.errors import UserError
from motif_jax.method import DEFAULT, Method
from motif_jax.models.attention import check_kernel
from motif_jax.models.networks import Networks, Params
from motif_jax.towers import check_towers
from motif_jax.training import checkpoint, finetune, workdir
from motif_jax.training.evaluation import validate
from motif_jax.training.flops import training_flops
from motif_jax.training.metrics import MetricWriter
from motif_jax.training.mirror import METRICS, Mirror
from motif_jax.training.progress import Progress
from motif_jax.training.samples import SampleSheets
from motif_jax.training.sharded import jit_train_step, make_state
from motif_jax.training.state import TrainState
from motif_jax.training.step import make_eval_step
from motif_jax.training.weights import Weights, frozen_weights, initial_weights, params_checksum


def newest_checkpoint(directory: Path) -> int | None:
    """The newest checkpoint, once all processes have agreed on it and on whether it ends the run."""
    newest = checkpoint.latest_step(directory)
    found = f"{newest}{', done' * workdir.is_done(directory, newest)}"
    startup.agree({f"the newest checkpoint in {directory} (is it on a file system that all share?)": found})
    return newest


def find_start(config: Config, directory: Path) -> int | None:
    """The checkpoint to continue from; tells of unfinished ones, and sets damaged ones aside when asked to."""
    if jax.process_index() == 0:
        for name in checkpoint.unfinished(directory):
            print(f"{directory / 'checkpoints' / name}: an unfinished save, left out", flush=True)
        if config.checkpoint.fallback:
            for reason in checkpoint.set_damaged_aside(directory):
                print(reason, flush=True)
    startup.check_shared(directory)
    return newest_checkpoint(directory)


def finished(config: Config, directory: Path, step: int | None) -> bool:
    """Whether a run whose newest checkpoint is `step` has nothing left to do; then it is marked done."""
    if step is None or step < config.steps:
        return False
    if not (workdir.is_done(directory, step) or checkpoint.read_meta(directory / "checkpoints" / str(step))["visited"]):
        return False
    if jax.process_index() == 0:
        print(f"nothing to train: {step} of {config.steps} steps are done", flush=True)
        workdir.finish(directory, step)
    return True


def train(config: Config, directory: str | Path, method: Method = DEFAULT) -> bool:
    """Trains until `config.steps`, continuing what `directory` holds; False when a signal ended it before.

    method: functions in place of the library's own, the same whenever a run goes on. Raises UserError with the remedy on bad input; then
    the directory's run is as it was.
    """
    directory = run_location(directory)
    check_kernel(config.attention, jax.default_backend())
    workdir.check(config, directory)
    facts = {"the configuration": to_json(config), "the code": startup.code_version()}
    startup.agree({name: startup.digest(text) for name, text in facts.items()})
    with workdir.disk_errors_reported(directory):
        if not config.checkpoint.fallback:
            newest = newest_checkpoint(directory)
            if workdir.is_done(directory, newest) and finished(config, directory, newest):  # needs no data, and writes nothing
                return True
        dataset = pipeline.open_dataset(config.data, "train")
        if config.loss.heatmap == "mask" and not dataset.layout.motion_mask:
            raise UserError(f"loss.heatmap='mask': the clips of {config.data.path} have no masks; prepare them with some (docs/data.md)")
        mesh = make_mesh(config.mesh)
        check_fits(mesh, config.batch_size, config.grad_accumulation, config.data.frames)
        startup.agree({"the data": dataset.fingerprint})
        with workdir.lock(directory) if jax.process_index() == 0 else contextlib.nullcontext():
            restored = find_start(config, directory)
            return finished(config, directory, restored) or _Run(config, directory, dataset, mesh, restored, method).train()


def say(text: str) -> None:
    """Prints a line, once however many processes there are."""
    if jax.process_index() == 0:
        print(text, flush=True)


class _Run:
    """This process's part of a run, from the new or `restored` state to the last step."""

    def __init__(
        self, config: Config, directory: Path, dataset: pipeline.Dataset, mesh: Mesh, restored: int | None, method: Method
    ) -> None:
        self.config, self.directory, self.dataset, self.mesh, self.method = config, directory, dataset, mesh, method
        self.tokenizer, self.networks = make_tokenizer(config.text), Networks.of(config, method.denoiser)
        learning_rate = method.learning_rate(config)
        optimizer = method.optimizer(config, learning_rate)
        template, create = make_state(config, self.networks, mesh, optimizer)
        check_split(mesh, template.params)
        replicated = NamedSharding(mesh, PartitionSpec())
        self.train_step = jit_train_step(self.networks, optimizer, mesh, template, method.loss, learning_rate)
        self.eval_step = jax.jit(make_eval_step(self.networks, mesh), out_shardings=replicated)

        weights = initial_weights(config, self.networks) if restored is None else Weights({}, frozen_weights(self.networks))
        sums = {name: params_checksum(params) for name, params in weights.frozen.items()}
        check_towers(config, dataset.manifests, sums)
        pretrained = {name: sums[name] for name in self.networks.pretrained}
        drawn_or_read = {"denoiser": params_checksum(weights.denoiser)} if restored is None and jax.process_count() > 1 else {}
        startup.agree({"the weights to start from": startup.digest(json.dumps(pretrained | drawn_or_read))})
        self.position = {"global_batch": config.batch_size, "seed": config.seed, "dataset": dataset.fingerprint}
        settings = workdir.settings(config) | method.names
        self.meta = {"version": motif_jax.__version__, "settings": settings, "pretrained": pretrained}
        self.checkpoints = checkpoint.Checkpoints(directory, config.checkpoint)
        if restored is None:
            shardings = jax.tree.map(lambda s: s.sharding, template.params)
            self.state = create(place(finetune.add_updates(config, weights.denoiser, jax.random.key(config.seed)), shardings))
            self.step, self.visited = 0, False  # visited: evaluated and sampled at this step
            say(f"starting: {_sizes(config, template.params)}, {len(dataset):,} clips, {directory}")
        else:
            self._restore(restored, template)
            say(f"continuing at step {self.step} of {config.steps}, {directory}")
            if 0 < config.profile.start < self.step:
                say(f"profile.start={config.profile.start}: that step is done, nothing is traced; use {self.step} or a later one")
        for text in [*surprises(config), *repeated_work(mesh, config.batch_size, config.grad_accumulation)]:
            say(text)
        self.saved = restored  # the newest step that is
        self.inputs = self.tokenizer, batch_rows(mesh, config.batch_size), config.image_tokens
        self.validation, self.sheets = (), SampleSheets(config, self.networks, self.tokenizer, mesh, method.sampler)
        if config.eval.every:
            self.validation = pipeline.validation_batches(config.data, config.batch_size, config.eval.batches, *self.inputs)
        if (config.eval.every or config.sample.every) and not pipeline.holds_out(config.data):
            say(f"no validation: {config.data.path} holds no clip out (docs/data.md), sample sheets show training clips")
        if jax.process_index() == 0:
            workdir.begin(config, directory)
            if restored is None:
                workdir.write_overview(directory, self.state.params)
        self.checkpoints.prepare(self.state)
        shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        say(f"{jax.device_count()} x {jax.devices()[0].device_kind} ({shape}) in {jax.process_count()} processes; compiling")
        frozen = place(weights.frozen, shard_networks(weights.frozen, mesh))
        self.frozen = self.networks.with_unconditional(frozen, self.tokenizer, replicated)

    def _restore(self, step: int, template: TrainState) -> None:
        """Takes the state of a checkpoint; raises UserError when it is one of other data or weights."""
        self.state, saved, meta = self.checkpoints.restore(step, template)
        source = self.checkpoints.directory / str(step)
        for text in workdir.other_start(self.config, self.directory):
            say(text)
        for text in workdir.compare(meta.get("settings", {}), self.meta["settings"], self.directory):
            say(text)
        workdir.check_position(saved, {"step": step, **self.position}, source)
        workdir.check_pretrained(meta.get("pretrained", {}), self.meta["pretrained"], source)
        self.step, self.visited = step, meta["visited"]

    def train(self) -> bool:
        """Steps until the last, or until a signal: then False. Evaluates, samples, saves and logs what is due on the way."""
        config, first_process = self.config, jax.process_index() == 0
        with contextlib.ExitStack() as opened:  # whatever is opened is closed, in the opposite order; a signal cuts no closing short
            self.stop = opened.enter_context(StopSignal())
            self.mirror = Mirror(self.directory)
            opened.callback(self.mirror.close)
            if first_process:
                self.mirror.fetch(METRICS)
            begin = -1 if self.saved is None else self.step  # -1: nothing was done before
            self.writer = MetricWriter(self.mirror.local, begin, self.visited) if first_process else None
            if self.writer:
                opened.callback(self.writer.close)
            self.progress = Progress(self.writer, config, training_flops(config, self.method.denoiser), self.saved)
            opened.callback(self._close_checkpoints)
            batches = pipeline.make_iterator(self.dataset, config.batch_size, config.seed, self.step, *self.inputs)
            opened.callback(batches.close)
            self._train(batches)
            self.checkpoints.wait()
        complete = self.step >= config.steps and self.visited
        if not complete:
            say(f"stopped by a signal at step {self.step}; " + ("it is saved, " if self.step else "") + "the same command continues")
        elif first_process:
            workdir.finish(self.directory, self.step)
        return complete

    def _close_checkpoints(self) -> None:
        if jax.process_count() == 1 or sys.exception() is None:  # else a save would wait for those who fail, too
            self.checkpoints.close()

    def _train(self, batches: Iterator[pipeline.Batch]) -> None:
        config, before = self.config, None
        with contextlib.ExitStack() as trace:
            while True:
                self.visited = self.visited or self._visit()
                stopping = self.stop.check()
                if self.step != self.saved and (self.step or not config.steps) and (self._due(config.checkpoint.every) or stopping):
                    self._save()
                if stopping or self.step >= config.steps:
                    self.progress.flush(self.step)
                    break
                if self.step == config.profile.start and self.step > 0:
                    jax.profiler.start_trace(self.mirror.local)
                    trace.callback(jax.profiler.stop_trace)
                began = time.perf_counter()
                batch = next(batches)
                wait = time.perf_counter() - began
                # A step on CPU that has to wait for its batch would run in another thread (startup.keep_memory).
                arrays = jax.block_until_ready(global_batch(batch, self.mesh, config.batch_size))
                self.state, metrics = self.train_step(self.state, self.frozen, arrays)
                self.step, self.visited = self.step + 1, False
                self.progress.add(self.step, metrics, wait)
                if before is None:
                    jax.block_until_ready(metrics)
                    self.progress.compiled()
                jax.block_until_ready(before)  # the host runs one step ahead, no more
                before = metrics
                if 0 < config.profile.start == self.step - config.profile.steps:
                    self.progress.flush(self.step)
                    trace.close()
                    self.progress.restart()
                if (self.step - 1) % config.log_every == 0:  # while the device works on this step
                    self.progress.flush(self.step - 1)
                    self.checkpoints.check()
                    self.mirror.copy_sometimes()

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step == self.config.steps or self.step % every == 0)

    def _visit(self) -> bool:
        """Evaluates and samples what is due at this step; False when it was interrupted."""
        evaluate, sample = self._due(self.config.eval.every) and self.validation, self._due(self.config.sample.every)
        if not (evaluate or sample):
            return True
        self.progress.flush(self.step)
        try:
            if evaluate:
                batches, best = self.stop.guard(self.validation), self.state.best
                scalars = validate(self.eval_step, best, self.frozen, batches, self.config, self.mesh, self.validation.distinct)
                self.progress.check(self.step, scalars)
                shown = "  ".join(f"{name} {value:.4f}" for name, value in scalars.items() if not name[-1].isdigit())
                say(f"step {self.step}/{self.config.steps}  {shown}")
            if sample:
                if self.stop.check():
                    return False
                self.sheets.write(self.step, self.state.best, self.frozen, self.mirror.local, self.writer)
            if evaluate and self.writer:  # not before: what is cut short is evaluated again
                self.writer.write(self.step, scalars)
        except Interrupted:
            return False
        self.progress.restart()
        return True

    def _save(self) -> None:
        self.progress.flush(self.step)
        began = time.perf_counter()
        data = {"step": self.step, **self.position}
        self.checkpoints.save(self.step, self.state, data, self.meta | {"visited": self.visited}, before=self.mirror.copy_first)
        self.saved = self.progress.last = self.step
        if self.writer:
            self.writer.write(self.step, {"save_seconds": time.perf_counter() - began})
        self.progress.restart()


def _sizes(config: Config, params: Params) -> str:
    """How many parameters there are and are trained, for people."""
    sizes = [sum(math.prod(s.shape) for s in tree.values()) for tree in (params, finetune.trained(config, params))]
    text = f"{sizes[0]:,} parameters"
    if config.finetune != "all":
        rest = "" if config.init_from else ", the others as they were drawn (no init_from)"
        text += f", {sizes[1]:,} of them trained ({config.finetune}){rest}"
    return text
