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

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import motif_jax
from motif_jax.config import Config, UserError, to_json
from motif_jax.data import pipeline
from motif_jax.data.storage import Path, run_location
from motif_jax.data.tokens import make_tokenizer
from motif_jax.dist import startup
from motif_jax.dist.mesh import batch_rows, check_fits, global_batch, make_mesh, place, shard_like_params, shard_networks
from motif_jax.dist.preemption import Interrupted, StopSignal
from motif_jax.models.attention import missing_for
from motif_jax.models.networks import Networks, Params
from motif_jax.towers import check_towers, checksum
from motif_jax.training import checkpoint, finetune, workdir
from motif_jax.training import state as train_state
from motif_jax.training.evaluation import validate
from motif_jax.training.flops import training_flops
from motif_jax.training.metrics import MetricWriter
from motif_jax.training.mirror import METRICS, Mirror
from motif_jax.training.optimizer import make_optimizer
from motif_jax.training.progress import Progress
from motif_jax.training.samples import SampleSheets
from motif_jax.training.step import empty_sentence, make_eval_step, make_train_step
from motif_jax.training.weights import initial_weights


def make_state(config: Config, networks: Networks, mesh: Mesh, optimizer: optax.GradientTransformation):
    """(the state's shapes with their shardings, a jitted function from placed parameters to the state of step 0)."""
    shapes = finetune.shapes(config, networks)

    def create(params: Params) -> train_state.TrainState:
        return train_state.create(params, optimizer, config.ema.decay > 0, finetune.trained(config, params))

    abstract = jax.eval_shape(create, shapes)
    shardings = shard_like_params(abstract, set(shapes), mesh)
    template = jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), abstract, shardings)
    return template, jax.jit(create, out_shardings=shardings, donate_argnums=0)


def check_kernel(config: Config, platform: str) -> None:
    """Raises UserError when the attention kernel is not one of `platform`."""
    if missing := missing_for(config.attention, platform):
        raise UserError(f"attention={config.attention!r}: {missing}; use 'auto'")


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


def train(config: Config, directory: str | Path) -> bool:
    """Trains until `config.steps`, continuing what `directory` holds; False when a signal ended it before.

    Raises UserError with the remedy on bad input; then the directory's run is as it was.
    """
    directory = run_location(directory)
    check_kernel(config, jax.default_backend())
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
            return finished(config, directory, restored) or _train(config, directory, dataset, mesh, restored)


def _train(config: Config, directory: Path, dataset: pipeline.Dataset, mesh: Mesh, restored: int | None) -> bool:
    first_process = jax.process_index() == 0

    def say(text: str) -> None:
        if first_process:
            print(text, flush=True)

    tokenizer = make_tokenizer(config.text)
    empty_L = empty_sentence(config, tokenizer)
    networks = Networks.of(config)
    optimizer = make_optimizer(config)
    template, create = make_state(config, networks, mesh, optimizer)
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda s: s.sharding, template)
    train_step = jax.jit(make_train_step(networks, optimizer, empty_L, mesh), donate_argnums=0, out_shardings=(shardings, replicated))
    eval_step = jax.jit(make_eval_step(networks, empty_L, mesh), out_shardings=replicated)

    position = {"global_batch": config.batch_size, "seed": config.seed, "dataset": dataset.fingerprint}
    weights = initial_weights(config, networks, trained=restored is None)
    check_towers(config, dataset.manifest, weights.frozen)
    pretrained = {name: checksum(weights.frozen[name]) for name in networks.pretrained}
    drawn_or_read = {"denoiser": checksum(weights.denoiser)} if restored is None and jax.process_count() > 1 else {}
    startup.agree({"the weights to start from": startup.digest(json.dumps(pretrained | drawn_or_read))})
    meta = {"version": motif_jax.__version__, "settings": workdir.settings(config), "pretrained": pretrained}
    checkpoints = checkpoint.Checkpoints(directory, config.checkpoint)
    if restored is None:
        params = place(finetune.add_updates(config, weights.denoiser, jax.random.key(config.seed)), shardings.params)
        state, step, visited = create(params), 0, False
        sizes = [sum(math.prod(s.shape) for s in tree.values()) for tree in (template.params, finetune.trained(config, template.params))]
        share = f"{sizes[0]:,} parameters"
        if config.finetune != "all":
            rest = "" if config.init_from else ", the others as they were drawn (no init_from)"
            share += f", {sizes[1]:,} of them trained ({config.finetune}){rest}"
        say(f"starting: {share}, {len(dataset):,} clips, {directory}")
    else:
        state, saved, meta_saved = checkpoints.restore(restored, template)
        source = checkpoints.directory / str(restored)
        for text in workdir.compare(meta_saved.get("settings", {}), meta["settings"], directory):
            say(text)
        workdir.check_position(saved, {"step": restored, **position}, source)
        workdir.check_pretrained(meta_saved.get("pretrained", {}), pretrained, source)
        step, visited = restored, meta_saved["visited"]
        say(f"continuing at step {step} of {config.steps}, {directory}")
    if first_process:
        workdir.begin(config, directory)
        if restored is None:
            workdir.write_overview(directory, state.params)
    checkpoints.prepare(state)
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    say(f"{jax.device_count()} x {jax.devices()[0].device_kind} ({shape}) in {jax.process_count()} processes; compiling")
    frozen = place(weights.frozen, shard_networks(weights.frozen, mesh))
    frozen["unconditional"] = jax.jit(networks.unconditional, out_shardings=replicated)(frozen, empty_L)
    weights = params = None  # the denoiser's lives on in the state

    rows = batch_rows(mesh, config.batch_size)
    mirror = Mirror(directory)
    if first_process:
        mirror.fetch(METRICS)
    writer = MetricWriter(mirror.local, -1 if restored is None else step, visited) if first_process else None  # -1: nothing was done before
    progress = Progress(writer, config, training_flops(config, networks), restored)
    validation = (
        pipeline.validation_batches(config.data, config.batch_size, config.eval.batches, tokenizer, rows, config.image_tokens)
        if config.eval.every
        else ()
    )
    if config.eval.every and not validation:
        say(f"no validation: {config.data.path} holds no clip out (docs/data.md), sample sheets show training clips")
    sheets = SampleSheets(config, networks, tokenizer, empty_L, mirror.local, writer, mesh)
    batches = pipeline.make_iterator(dataset, config.batch_size, config.seed, step, tokenizer, rows, config.image_tokens)
    stop = StopSignal()

    def due(every: int) -> bool:
        return every > 0 and (step == config.steps or step % every == 0)

    def visit() -> bool:
        """Evaluates and samples what is due at this step; False when it was interrupted."""
        work = due(config.eval.every) and validation, due(config.sample.every)
        if not any(work):
            return True
        progress.flush(step)
        try:
            if work[0]:
                scalars = validate(eval_step, state.best, frozen, stop.guard(validation), config, mesh)
                progress.check(step, scalars)
                say(f"step {step}/{config.steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in scalars.items() if not k[-1].isdigit()))
            for _ in stop.guard(range(bool(work[1]))):
                sheets.write(step, state.best, frozen)
            if work[0] and writer:  # not before: what is cut short is evaluated again
                writer.write(step, scalars)
        except Interrupted:
            return False
        progress.restart()
        return True

    def save() -> None:
        progress.flush(step)
        began = time.perf_counter()
        checkpoints.save(step, state, {"step": step, **position}, meta | {"visited": visited}, before=mirror.copy_first)
        progress.last = step
        if writer:
            writer.write(step, {"save_seconds": time.perf_counter() - began})
        progress.restart()

    with stop:
        before, tracing = None, False
        kept = restored  # the newest step that is saved
        try:
            while True:
                visited = visited or visit()
                stopping = stop.check()
                if step != kept and (step or not config.steps) and (due(config.checkpoint.every) or stopping):
                    save()
                    kept = step
                if stopping or step >= config.steps:
                    progress.flush(step)
                    break
                if step == config.profile.start and step > 0:
                    jax.profiler.start_trace(mirror.local)
                    tracing = True
                began = time.perf_counter()
                batch = next(batches)
                wait = time.perf_counter() - began
                # A step on CPU that has to wait for its batch would run in another thread (startup.keep_memory).
                arrays = jax.block_until_ready(global_batch(batch, mesh, config.batch_size))
                state, metrics = train_step(state, frozen, arrays)
                step, visited = step + 1, False
                progress.add(step, metrics, wait)
                if before is None:
                    jax.block_until_ready(metrics)
                    progress.compiled()
                jax.block_until_ready(before)  # the host runs one step ahead, no more
                before = metrics
                if tracing and step == config.profile.start + config.profile.steps:
                    jax.block_until_ready(metrics)
                    jax.profiler.stop_trace()
                    tracing = False
                if (step - 1) % config.log_every == 0:  # while the device works on this step
                    progress.flush(step - 1)
                    checkpoints.check()
                    mirror.copy_sometimes()
            checkpoints.wait()
        finally:
            if tracing:
                jax.profiler.stop_trace()
            batches.close()
            if jax.process_count() == 1 or sys.exc_info()[0] is None:  # else a save would wait for those who fail, too
                checkpoints.close()
            if writer:
                writer.close()
            mirror.close()
    complete = step >= config.steps and visited
    if not complete:
        say(f"stopped by a signal at step {step}; " + ("it is saved, " if step else "") + "the same command continues")
    elif first_process:
        workdir.finish(directory, step)
    return complete
