"""The training run: a validated `Config` and a work directory in; checkpoints, metrics, samples and a report out.

Order, which makes a resumed run equal to an undisturbed one:
restore or init -> [evaluate and sample with the state before the update -> save (then stop if asked to) -> next batch ->
step -> log the previous step] -> wait for the save, write the report, mark done.
"""

import hashlib
import json
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import motif_jax
from motif_jax import report
from motif_jax.config import Config, UserError, from_json, to_json
from motif_jax.data import pipeline
from motif_jax.data.tokens import make_tokenizer
from motif_jax.dist.mesh import global_batch, make_mesh, shard_like_params
from motif_jax.dist.preemption import StopSignal
from motif_jax.models.networks import Networks, Params
from motif_jax.training import state as train_state
from motif_jax.training.checkpoint import CheckpointError, Checkpoints, latest_step
from motif_jax.training.evaluation import validate
from motif_jax.training.metrics import MetricWriter
from motif_jax.training.optimizer import make_optimizer
from motif_jax.training.samples import SampleSheets
from motif_jax.training.step import empty_sentence, make_eval_step, make_train_step
from motif_jax.training.weights import initial_weights

# A run may be continued with other values of these; everything else decides what the parameters become.
FREE_TO_CHANGE = (
    "steps",
    "log_every",
    "checkpoint",
    "eval",
    "sample",
    "mesh",
    "remat",
    "attention",
    "init_from",
    "data",
    "prepare",
    "name",
)


def run_fingerprint(config: Config) -> str:
    """sha256 over the settings that a continued run must share with its beginning."""
    fixed = {k: v for k, v in json.loads(to_json(config)).items() if k not in FREE_TO_CHANGE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def prepare_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Makes the directory and writes config.json; refuses to continue a run whose fixed settings differ."""
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists() and (workdir / "checkpoints").is_dir() and any((workdir / "checkpoints").iterdir()):
            before = from_json(path.read_text())
            if run_fingerprint(before) != run_fingerprint(config):
                old, new = json.loads(to_json(before)), json.loads(to_json(config))
                changed = [k for k in new if k not in FREE_TO_CHANGE and old[k] != new[k]]
                raise UserError(
                    f"{workdir} holds a run with other settings ({', '.join(changed)} differ); use its settings, or another --workdir"
                )
        temporary = path.with_suffix(".tmp")
        temporary.write_text(to_json(config))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write to the work directory {workdir}: {error}") from error


class Log:
    """Collects step metrics on the device and writes their means: one status line and one metrics line per window."""

    def __init__(self, writer: MetricWriter | None, config: Config) -> None:
        self._writer, self._config = writer, config
        self._window: list[dict[str, Any]] = []
        self._wait = 0.0
        self._untimed = 0
        self._start = time.perf_counter()

    def add(self, metrics: dict[str, Any], wait: float) -> None:
        self._window.append(metrics)
        self._wait += wait

    def flush(self, step: int) -> None:
        """Writes the window that ends with update number `step`. Raises UserError when a metric is not finite."""
        if not self._window:
            return
        window = jax.device_get(self._window)
        elapsed = time.perf_counter() - self._start
        means = {k: float(np.mean([m[k] for m in window])) for k in window[0]}
        for name, value in means.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} is {value} in steps {step - len(window) + 1} to {step}: training stops. The checkpoints before are good; "
                    "lower learning_rate, set optimizer.grad_clip, or check the data, then run the same command again"
                )
        means["clips"] = step * self._config.batch_size
        status = f"step {step}/{self._config.steps}  loss {means['loss']:.4f}"
        timed = len(window) - self._untimed
        if timed:
            per_step = elapsed / timed
            speed = self._config.batch_size / per_step
            means |= {"seconds_per_step": per_step, "clips_per_second": speed, "input_wait": self._wait / elapsed}
            status += f"  {per_step:.3f} s/step  {speed:.1f} clips/s  input wait {100 * means['input_wait']:.1f} %"
            status += f"  {(self._config.steps - step) * per_step / 60:.1f} min left"
        if self._writer:
            self._writer.write(step, means)
            print(status, flush=True)
        self.restart()

    def restart(self) -> None:
        """Starts the next window now, so that time spent on evaluation or saving is not counted as training."""
        self._window, self._wait, self._untimed, self._start = [], 0.0, 0, time.perf_counter()

    def compiled(self) -> None:
        """Says how long the process' first step took and leaves it out of the speed of its window."""
        seconds = time.perf_counter() - self._start
        self._wait, self._untimed, self._start = 0.0, len(self._window), time.perf_counter()
        print(f"first step after {seconds:.1f} s (compilation)", flush=True)


def make_state(config: Config, networks: Networks, mesh: Mesh, optimizer: optax.GradientTransformation):
    """(the state's shapes with their shardings, a jitted function from parameters to the state of step 0)."""

    def create(params: Params) -> train_state.TrainState:
        return train_state.create(params, optimizer, config.ema.decay > 0)

    abstract = jax.eval_shape(create, networks.denoiser.shapes)
    shardings = shard_like_params(abstract, set(networks.denoiser.shapes), mesh)
    template = jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), abstract, shardings)
    return template, jax.jit(create, out_shardings=shardings)


def write_overview(workdir: pathlib.Path, params: Params) -> None:
    """parameters.txt: name, shape and size of every weight."""
    from clu import parameter_overview

    if jax.process_index() == 0:
        (workdir / "parameters.txt").write_text(parameter_overview.get_parameter_overview(params, include_stats=False) + "\n")


def check_position(saved: dict, expected: dict, directory: pathlib.Path) -> None:
    """Refuses a checkpoint whose place in the data order means other clips now."""
    differs = [f"{k}: {saved.get(k)} then, {v} now" for k, v in expected.items() if saved.get(k) != v]
    if differs:
        raise CheckpointError(f"checkpoint {directory} was made with other data ({', '.join(differs)}); use the same, or another --workdir")


def finish(workdir: pathlib.Path, step: int) -> None:
    """Writes the report and the mark DONE, unless an earlier call did."""
    done = workdir / "DONE"
    if jax.process_index() == 0 and not (done.exists() and done.read_text() == f"{step}\n"):
        page = report.write(workdir)
        done.write_text(f"{step}\n")
        print(f"done: {step} steps; {page}", flush=True)


def train(config: Config, workdir: str | pathlib.Path) -> None:
    """Trains until `config.steps`, continuing what `workdir` holds. Raises UserError with the remedy on bad input."""
    workdir = pathlib.Path(workdir)
    first_process = jax.process_index() == 0
    dataset = pipeline.open_dataset(config.data, "train")
    mesh = make_mesh(config.mesh)
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * config.grad_accumulation
    if config.batch_size % unit:
        raise UserError(
            f"batch_size={config.batch_size}: must be a multiple of {unit}, the devices of data and fsdp times grad_accumulation"
        )
    prepare_workdir(config, workdir)

    restored = latest_step(workdir)
    if restored is not None and restored >= config.steps:
        print(f"nothing to train: {restored} of {config.steps} steps are done", flush=True)
        finish(workdir, restored)
        return

    tokenizer = make_tokenizer(config.text)
    empty_L = empty_sentence(config, tokenizer)
    networks = Networks.of(config)
    optimizer = make_optimizer(config)
    template, create = make_state(config, networks, mesh, optimizer)
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda s: s.sharding, template)
    train_step = jax.jit(make_train_step(networks, optimizer, empty_L), donate_argnums=0, out_shardings=(shardings, replicated))
    eval_step = jax.jit(make_eval_step(networks, empty_L), out_shardings=replicated)

    position = {"global_batch": config.batch_size, "seed": config.seed, "dataset": dataset.fingerprint}
    meta = {"version": motif_jax.__version__, "run": run_fingerprint(config)}
    checkpoints = Checkpoints(workdir, config.checkpoint)
    weights = initial_weights(config, networks, trained=restored is None)
    if restored is None:
        state, step = create(weights.denoiser), 0
        size = sum(math.prod(s.shape) for s in networks.denoiser.shapes.values())
        write_overview(workdir, state.params)
        print(f"starting: {size:,} parameters, {len(dataset):,} clips, {workdir}", flush=True)
    else:
        state, saved, _ = checkpoints.restore(restored, template)
        check_position(saved, {"step": restored, **position}, checkpoints.directory / str(restored))
        step = restored
        print(f"continuing at step {step} of {config.steps}, {workdir}", flush=True)
    frozen = jax.device_put(weights.frozen, replicated)
    del weights

    writer = MetricWriter(workdir, step) if first_process else None
    log = Log(writer, config)
    validation = pipeline.validation_batches(config.data, config.batch_size, config.eval.batches, tokenizer) if config.eval.every else ()
    sheets = SampleSheets(config, networks, tokenizer, empty_L, workdir, writer)
    batches = pipeline.make_iterator(dataset, config.batch_size, config.seed, step, tokenizer)

    def due(every: int) -> bool:
        return every > 0 and (step == config.steps or step % every == 0)

    def visit(save: bool) -> None:
        """What happens between two updates: evaluate, sample, save."""
        if due(config.eval.every) and validation:
            scalars = validate(eval_step, state.best, frozen, validation, config, mesh)
            if writer:
                writer.write(step, scalars)
            shown = "  ".join(f"{k} {v:.4f}" for k, v in scalars.items() if "_t" not in k)
            print(f"step {step}/{config.steps}  {shown}", flush=True)
        if due(config.sample.every):
            sheets.write(step, state.best, frozen)
        if save:
            checkpoints.save(step, state, {"step": step, **position}, meta)

    with StopSignal() as stop:
        before = None
        try:
            while True:
                save = step > 0 and (due(config.checkpoint.every) or stop.requested)
                # A restored step was visited before it was saved.
                if step != restored and (save or due(config.eval.every) or due(config.sample.every)):
                    log.flush(step)
                    visit(save)
                    log.restart()
                if stop.requested or step >= config.steps:
                    break
                began = time.perf_counter()
                batch = next(batches)
                wait = time.perf_counter() - began
                state, metrics = train_step(state, frozen, global_batch(batch, mesh))
                step += 1
                log.add(metrics, wait)
                if before is None:
                    jax.block_until_ready(metrics)
                    log.compiled()
                jax.block_until_ready(before)  # the host runs one step ahead, no more
                before = metrics
                if step % config.log_every == 0:
                    log.flush(step)
        finally:
            batches.close()
            checkpoints.close()
            if writer:
                writer.close()
    if step < config.steps:
        print(f"stopped by a signal at step {step}; it is saved, the same command continues")
    else:
        finish(workdir, step)
