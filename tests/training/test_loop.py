"""Whole runs in this process: a signal at every place that takes time, a damaged checkpoint, a disk that is full."""

import base64
import collections
import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import weakref

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import motif_jax
from motif_jax import preparation, report
from motif_jax.config import ProfileConfig
from motif_jax.data import pipeline
from motif_jax.data.tokens import make_tokenizer
from motif_jax.data.videos import save_video
from motif_jax.dist.mesh import make_mesh
from motif_jax.dist.preemption import Interrupted, StopSignal
from motif_jax.errors import UserError
from motif_jax.interop.files import write_safetensors
from motif_jax.method import Method
from motif_jax.models.networks import Networks
from motif_jax.motion.dis import mean_flow
from motif_jax.training import checkpoint, loop, samples, weights, workdir
from motif_jax.training.metrics import MetricWriter, read_lines
from motif_jax.training.weights import initial_weights

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def config(eventful, tmp_path_factory):
    """Runs share their compiled programs."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield eventful
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    loop.train(config, directory)
    return directory


def evaluations(run):
    return {line["step"]: line["eval/loss"] for line in read_lines(run / "metrics.jsonl") if "eval/loss" in line}


def parameters(run):
    return checkpoint.read_arrays(run / "checkpoints" / "4", ("params", "ema", "opt_state"), np.ndarray)


@pytest.mark.parametrize(
    ("place", "call"),
    [("validate", 2), ("validate", 3), ("SampleSheets.write", 2), ("checkpoint.Checkpoints.save", 2), ("global_batch", 2)],
)
@pytest.mark.slow
def test_a_signal_at_any_place_saves_and_the_run_continues(config, undisturbed, tmp_path, monkeypatch, capsys, place, call):
    """Sent at one visit of the place (the third validation is the last); what it cut short is made up for."""
    *path, name = place.split(".")
    owner = loop
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), []

    def with_signal(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, with_signal)
    complete = loop.train(config, tmp_path)
    assert complete == (tmp_path / "DONE").exists() == (place == "checkpoint.Checkpoints.save")
    assert complete or "it is saved, the same command continues" in capsys.readouterr().out
    monkeypatch.undo()
    assert loop.train(config, tmp_path)
    assert (tmp_path / "DONE").exists()
    assert evaluations(tmp_path) == evaluations(undisturbed) and len(evaluations(undisturbed)) == 3
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["0", "2", "4"]
    for a, b in zip(jax.tree.leaves(parameters(tmp_path)), jax.tree.leaves(parameters(undisturbed)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_evaluation_that_a_signal_follows_is_written_once(config, undisturbed, tmp_path, monkeypatch):
    """Between evaluation and sample sheet of step 2: both are made after the restart, also where that dies, and count once."""
    validate, write = loop.validate, loop.SampleSheets.write
    steps = []

    def and_a_signal(*args):
        steps.append(args)
        found = validate(*args)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(loop, "validate", and_a_signal)
    assert not loop.train(config, tmp_path) and checkpoint.latest_step(tmp_path) == 2
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(loop.SampleSheets, "write", lambda *args: write(*args) or 1 / 0)
        loop.train(config, tmp_path)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl") if "sample/mean_flow" in line] == [0, 2]
    assert loop.train(config, tmp_path)
    counts = [collections.Counter(line["step"] for line in read_lines(run / "metrics.jsonl")) for run in (tmp_path, undisturbed)]
    assert counts[0] == counts[1]


def test_a_run_whose_validation_clips_cannot_be_read_is_left_as_it_was(config, undisturbed, tmp_path, monkeypatch):
    def broken(*args):
        raise UserError("no such shard")

    shutil.copytree(undisturbed, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    monkeypatch.setattr(loop.pipeline, "validation_batches", broken)
    with pytest.raises(UserError, match="no such shard"):
        loop.train(dataclasses.replace(config, steps=6), tmp_path / "run")
    after = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert before.pop(tmp_path / "run/lock") and after.pop(tmp_path / "run/lock") and after == before
    assert (tmp_path / "run/DONE").exists()


def test_weights_are_told_apart_by_their_content(undisturbed, tmp_path):
    """A model that was trained again into the same directory, to the same step, is another one."""
    two, four = (weights.find(undisturbed / "checkpoints" / step).checksum for step in "24")
    shutil.copytree(undisturbed, tmp_path / "run")
    assert two != four == weights.find(tmp_path / "run").checksum


def test_a_new_run_does_not_keep_its_initial_weights(config, tmp_path, monkeypatch):
    """They live on in the state; a second copy, on the first device of each process, would last as long as the run."""
    initial, validate, alive, seen = loop.initial_weights, loop.validate, [], []

    def watched(*args, **kwargs):
        weights = initial(*args, **kwargs)
        alive.extend(weakref.ref(x) for x in weights.denoiser.values())
        return weights

    def look(*args):
        seen.append(sum(ref() is not None for ref in alive))
        return validate(*args)

    monkeypatch.setattr(loop, "initial_weights", watched)
    monkeypatch.setattr(loop, "validate", look)
    loop.train(dataclasses.replace(config, steps=2), tmp_path)
    assert seen and not any(seen)


def test_the_average_is_evaluated_and_sampled(config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "validate", lambda eval_step, params, *rest: seen.append(jax.device_get(params)) or {})
    monkeypatch.setattr(loop.SampleSheets, "write", lambda sheets, step, params, *rest: seen.append(jax.device_get(params)))
    loop.train(changed(config, steps=2), tmp_path)
    saved = checkpoint.read_arrays(tmp_path / "checkpoints" / "2", ("params", "ema"), np.ndarray)
    assert len(seen) == 4  # both at steps 0 and 2
    for found in seen[2:]:
        assert all(np.array_equal(found[name], value) for name, value in saved["ema"].items())
        assert not all(np.array_equal(found[name], value) for name, value in saved["params"].items())


def test_an_evaluation_that_is_not_finite_stops_the_run(config, tmp_path, monkeypatch):
    """And names the last checkpoint that this process wrote."""
    losses = iter([1.0, 1.0, float("nan")])
    monkeypatch.setattr(loop, "validate", lambda *_: {"eval/loss": next(losses)})
    with pytest.raises(UserError, match=r"eval/loss is nan in step 4: training stops\..* the last checkpoint is step 2;"):
        loop.train(changed(config, sample={"every": 0}), tmp_path)
    assert checkpoint.latest_step(tmp_path) == 2


def test_each_function_is_compiled_once_and_traced_on_request(config, tmp_path, caplog):
    """With evaluation, sampling and saves between the steps; the XProf trace is of updates 2 and 3, and the time to write it of none."""
    with jax.log_compiles():
        loop.train(dataclasses.replace(config, log_every=4, profile=ProfileConfig(start=1, steps=2)), tmp_path)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl") if "seconds_per_step" in line] == [2, 3, 4]
    names = re.findall(r"Compiling jit\((\w+)\) with global shapes", caplog.text)
    counts = collections.Counter(names)
    assert {name: counts[name] for name in ("train_step", "eval_step", "generate")} == {"train_step": 1, "eval_step": 1, "generate": 1}
    assert len(list((tmp_path / "plugins" / "profile").rglob("*.xplane.pb"))) == 1


def test_a_damaged_checkpoint_stops_the_run_unless_told_otherwise(config, undisturbed, tmp_path, capsys):
    loop.train(config, tmp_path)
    for path in (tmp_path / "checkpoints" / "4" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 2000:
            path.write_bytes(path.read_bytes()[:1000])
    longer = dataclasses.replace(config, steps=6)
    with pytest.raises(UserError, match=r"checkpoints/4 cannot be restored(.|\n)*checkpoint\.fallback=True"):
        loop.train(longer, tmp_path)
    capsys.readouterr()
    loop.train(dataclasses.replace(longer, checkpoint=dataclasses.replace(config.checkpoint, fallback=True)), tmp_path)
    text = capsys.readouterr().out
    assert "checkpoints/4" in text and "continuing at step 2 of 6" in text and (tmp_path / "damaged" / "4").is_dir()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [2, 4, 6]
    for a, b in zip(jax.tree.leaves(parameters(tmp_path)), jax.tree.leaves(parameters(undisturbed)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_kernel_of_another_platform_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="attention='splash': runs on tpu and this is cpu"):
        loop.train(dataclasses.replace(config, attention="splash"), tmp_path)


def test_a_directory_that_orbax_cannot_write_to_is_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"--workdir=.*lr\[1e-4\]: a path with \[ or \] cannot hold checkpoints"):
        loop.train(config, tmp_path / "lr[1e-4]")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left for .*: make room, then"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left for .*: make room, then"),
        (PermissionError(errno.EACCES, "Permission denied", "/run/DONE"), "Permission denied: '/run/DONE': mend that, then"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system: mend that, then run the same command again"),
    ],
)
def test_errors_of_the_disk_are_clear(config, undisturbed, tmp_path, monkeypatch, error, message):
    """Here the report's, of a run that is finished but for its mark."""
    shutil.copytree(undisturbed, run := tmp_path / "run")
    (run / "DONE").unlink()
    monkeypatch.setattr(report, "write", lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=message):
        loop.train(config, run)


def changed(config, **fields):
    """The configuration with other values; those of a group as a dictionary."""
    return dataclasses.replace(
        config, **{k: dataclasses.replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in fields.items()}
    )


def files(run):
    """What a refused run must leave as it is; the lock is not a part of it."""
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"}


def test_a_run_keeps_its_pretrained_networks_wherever_they_lie(config, tmp_path, capsys):
    kl = {"kind": "kl", "factor": 1, "z_channels": 4, "ch": 32, "ch_mult": (1,), "num_res_blocks": 1}
    config = changed(config, steps=2, autoencoder=kl, dit={"patch": (4, 8, 8)}, eval={"every": 0}, sample={"every": 0})
    networks, rng = Networks.of(config), np.random.default_rng(0)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        contents = {}
        for part, shapes in {"denoiser": networks.denoiser.shapes, "autoencoder": networks.autoencoder.shapes}.items():
            weights = {key: rng.normal(size=s.shape, scale=0.1).astype(np.float32) for key, s in shapes.items()}
            contents[part] = {"config": {}, "sha256": write_safetensors(tmp_path / name / f"{part}.safetensors", weights)}
        (tmp_path / name / "imported.json").write_text(json.dumps({"networks": contents}))
    run = tmp_path / "run"
    loop.train(changed(config, init_from=str(tmp_path / "one")), run)
    before = files(run)
    with pytest.raises(UserError, match="checkpoints/2 was made with another autoencoder: set init_from to the weights"):
        loop.train(changed(config, init_from=str(tmp_path / "other"), steps=4), run)
    assert files(run) == before
    with pytest.raises(UserError, match=r"init_from: a run would start from itself \(.*run -> .*run\)"):
        loop.train(changed(config, init_from=str(run), steps=4), run)
    assert files(run) == before
    (tmp_path / "one").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=rf"init_from={tmp_path}/one: there is no such directory, from which the autoencoder of"):
        loop.train(changed(config, init_from=str(run), steps=4), tmp_path / "new")
    loop.train(changed(config, init_from=str(tmp_path / "moved"), steps=4), run)
    assert "/moved': the run goes on with the weights of its checkpoint" in capsys.readouterr().out
    assert (run / "DONE").read_text() == "4\n"


def test_a_refused_run_is_left_as_it_was(config, undisturbed, tmp_path):
    """Refused by the settings, by those of the checkpoint alone, by another loss, by its place in the data; or with nothing to do."""

    def mine(config, batch, found, t_B):
        return (found.prediction**2).mean(), {}

    shutil.copytree(undisturbed, run := tmp_path / "run")
    before = files(run)
    with pytest.raises(UserError, match=r"other settings: loss\.motion_weight was 1\.0 and is now 2\.0\. Use"):
        loop.train(changed(config, steps=6, loss={"motion_weight": 2.0}), run)
    with pytest.raises(UserError, match=r"other settings: method\.loss was \"the library's\" and is now '.*mine'\. Use"):
        loop.train(changed(config, steps=6), run, Method(loss=mine))
    loop.train(changed(config, steps=2), run)
    small = tmp_path / "small"
    preparation.prepare(config, "synthetic:shapes:20", small, log=lambda line: None)
    with pytest.raises(UserError, match=r"checkpoints/4 was made with other data \(dataset"):
        loop.train(changed(config, steps=6, data={"path": str(small)}), run)
    assert files(run) == before
    (run / "config.json").unlink()
    with pytest.raises(UserError, match=r"other settings: seed was 0 and is now 1\."):
        loop.train(changed(config, steps=6, seed=1), run)
    assert not (run / "config.json").exists()


def test_a_heatmap_of_masks_needs_clips_with_masks(config, tmp_path):
    """Of a run that is refused for it nothing is begun."""
    (tmp_path / "videos").mkdir()
    save_video(tmp_path / "videos" / "a.mp4", np.zeros((9, 24, 24, 3), np.uint8), 8)
    (tmp_path / "videos" / "a.txt").write_text("nothing moves")
    plain = changed(config, prepare={"flow": "dis", "validation_share": 0.0}, data={"path": str(tmp_path / "data")})
    preparation.prepare(plain, str(tmp_path / "videos"), tmp_path / "data", log=lambda line: None)
    with pytest.raises(UserError, match=rf"loss\.heatmap='mask': the clips of {tmp_path / 'data'} have no masks; prepare them with some"):
        loop.train(changed(plain, loss={"heatmap": "mask"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverged_continues_with_another_learning_rate(config, undisturbed, tmp_path, capsys):
    """As its message says, here in micro-batches from then on. What an update has blown up is not saved: the parameters, too, have to be
    finite, and so their norm."""
    shutil.copytree(undisturbed, run := tmp_path / "run")
    config = changed(config, steps=5, eval={"every": 0}, sample={"every": 0})
    with pytest.raises(UserError, match=r"parameter_norm is inf in step 5: .* lower learning_rate or optimizer\.grad_clip .* is step 4;"):
        loop.train(changed(config, learning_rate=1e30), run)
    capsys.readouterr()
    loop.train(changed(config, learning_rate=1e-4, grad_accumulation=2, optimizer={"grad_clip": 1.0, "schedule": "cosine"}), run)
    text = capsys.readouterr().out
    assert "steps was 4 and is now 5" in text  # where a cosine ends
    assert "learning_rate was 0.001 and is now 0.0001" in text and "optimizer.grad_clip was 0.0 and is now 1.0" in text
    assert "continuing at step 4 of 5" in text and "done: 5 steps" in text


def test_fine_tuning_of_random_weights_is_said(config, undisturbed, tmp_path, capsys):
    config = changed(config, finetune="lora", steps=0, eval={"every": 0}, sample={"every": 0})
    told = []
    for name, source in (("random", ""), ("trained", str(undisturbed))):
        loop.train(changed(config, init_from=source), tmp_path / name)
        told.append("(lora), the others as they were drawn (no init_from)," in capsys.readouterr().out)
    assert told == [True, False]


def test_no_step_is_a_run_too(config, tmp_path, capsys):
    """Its checkpoint is of step 0: what sampling and export read, and what more steps continue."""
    none = changed(config, steps=0, eval={"every": 0})
    assert loop.train(none, tmp_path) and checkpoint.latest_step(tmp_path) == 0
    assert loop.train(none, tmp_path) and "nothing to train: 0 of 0 steps are done" in capsys.readouterr().out
    assert loop.train(changed(none, steps=1), tmp_path) and "continuing at step 0 of 1" in capsys.readouterr().out


def test_a_finished_run_needs_no_data_and_more_steps_take_its_mark(config, undisturbed, tmp_path, monkeypatch):
    shutil.copytree(undisturbed, run := tmp_path / "run")
    assert loop.train(changed(config, data={"path": str(tmp_path / "gone")}), run)
    monkeypatch.setattr(loop, "validate", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or {})
    assert not loop.train(changed(config, steps=6, eval={"every": 5}), run)
    assert checkpoint.latest_step(run) == 5 and not (run / "DONE").exists()


def test_the_motion_of_samples_stands_beside_that_of_the_data(config, undisturbed):
    (example,) = pipeline.examples(config.data, 1)
    lines = [line for line in read_lines(undisturbed / "metrics.jsonl") if "sample/mean_flow" in line]
    assert [line["sample/mean_flow_data"] for line in lines] == pytest.approx([mean_flow(example.frames)] * 3)
    assert not any(line["sample/mean_flow"] == pytest.approx(line["sample/mean_flow_data"]) for line in lines)


def test_a_sample_sheet_appears_whole(config, undisturbed, tmp_path, monkeypatch):
    """The report shows the newest whole one, also where an earlier version left a part of one."""
    shutil.copytree(undisturbed, run := tmp_path / "run")
    (run / "samples" / "5").mkdir()
    clips = np.zeros((1, 2, 8, 8, 3), np.uint8)
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(samples.pictures, "save_png", lambda *_: 1 / 0)
        samples.save_comparison(run / "samples" / "10", clips, clips, ["x"], 8.0)
    assert not (run / "samples" / "10").exists()
    assert "after 4 steps" in report.write(run).read_text()
    for name, text in ("00.gif", None), ("captions.json", ""):  # lost, and cut off by a power cut
        (run / "samples" / "4" / name).unlink() if text is None else (run / "samples" / "4" / name).write_text(text)
        assert "samples/4: cannot be read: " in report.write(run).read_text()
    for damaged in ({}, {"splits": {"validation": {"model": {}}}}):
        (run / "synthetic.json").write_text(json.dumps(damaged))
        assert "synthetic.json: cannot be read: KeyError" in report.write(run).read_text()
    for caption in "xy":
        samples.save_comparison(run / "samples" / "10", clips, clips, [caption], 8.0)
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["0", "10", "2", "4", "5"]
    assert json.loads((run / "samples" / "10" / "captions.json").read_text()) == ["y"]
    assert "after 10 steps" in report.write(run).read_text()


def test_a_run_without_held_out_clips_says_so(config, tmp_path, capsys):
    """And its report does not claim otherwise; it has no panel of what was not measured."""
    few = changed(config, prepare={"validation_share": 0.0}, data={"path": str(tmp_path / "data")}, steps=2)
    preparation.prepare(few, "synthetic:shapes:5", tmp_path / "data", log=lambda line: None)
    run = tmp_path / "run"
    assert loop.train(few, run)
    assert f"no validation: {tmp_path / 'data'} holds no clip out" in capsys.readouterr().out
    assert not evaluations(run)
    page = report.write(run).read_text()
    assert "one that was not trained on if the dataset holds any out" in page and "time waiting for data<td>" in page
    panels = [report._curves(lines) for lines in (read_lines(run / "metrics.jsonl"), [{"step": 1, "eval/ratio_t0": 1.0}], [])]
    widths = [Image.open(io.BytesIO(base64.b64decode(p.split("base64,")[1].split('"')[0]))).width if "<img" in p else 0 for p in panels]
    assert widths[0] == 2 * widths[1] > widths[2] == 0
    assert loop.train(changed(few, steps=3, eval={"every": 0}, sample={"every": 9}), run)
    assert "sample sheets show training clips" in capsys.readouterr().out


def test_samples_with_nan_are_told(config, tmp_path, capsys):
    """The training goes on, and so does the sheet."""
    networks, mesh = Networks.of(config), make_mesh(config.mesh, jax.devices()[:1])
    tokenizer = make_tokenizer(config.text)
    frozen = networks.with_unconditional(networks.init_frozen(), tokenizer)
    sheets = samples.SampleSheets(config, networks, tokenizer, mesh, lambda config, schedule, denoise, x_BThwC, keys_B: x_BThwC * np.nan)
    with contextlib.closing(MetricWriter(tmp_path, -1, False)) as writer:
        sheets.write(3, networks.denoiser.init(jax.random.key(0)), frozen, tmp_path, writer)
    assert "step 3  NaN or infinity in 1 of 1 samples, which show nothing of the model" in capsys.readouterr().out
    assert (tmp_path / "samples" / "3" / "sheet.png").exists()


def test_a_sheet_is_made_from_first_frames_at_the_frame_rate_of_its_clips(config, tmp_path, monkeypatch):
    """Which is 8, whatever that of the written video."""
    given = []

    def generate(params, frozen, images, tokens, fps, seeds):
        given.append((np.asarray(images), fps.tolist()))
        return jax.numpy.repeat(images[:, None], config.data.frames, 1), jax.numpy.ones(len(images), bool)

    monkeypatch.setattr(samples, "make_generator", lambda *_: generate)
    slow, networks, mesh = changed(config, sample={"fps": 5.0}), Networks.of(config), make_mesh(config.mesh, jax.devices()[:1])
    samples.SampleSheets(slow, networks, make_tokenizer(config.text), mesh).write(1, {}, {}, tmp_path, None)
    ((images, rates),) = given
    np.testing.assert_array_equal(images, [clip.frames[0] for clip in pipeline.examples(slow.data, 1)])
    assert rates == [8.0]


def test_curves_of_many_buckets_go_from_clean_to_noise(monkeypatch):
    monkeypatch.setattr(report.html, "plot", lambda figure, description: figure)
    (axes,) = report._curves([{"step": 1, **{f"eval/ratio_t{bucket}": 1.0 for bucket in range(12)}}]).axes
    assert [line.get_label() for line in axes.lines] == [f"eval/ratio_t{bucket}" for bucket in range(12)]


def test_held_out_clips_that_fill_a_batch_by_repetition_make_no_deciles(config, tmp_path):
    """Of motion: fewer than ten clips, in a batch of sixteen rows."""
    few = changed(config, batch_size=16, steps=0, data={"path": str(tmp_path / "data")}, sample={"every": 0})
    summary = preparation.prepare(few, "synthetic:shapes:20", tmp_path / "data", log=lambda line: None)
    assert 0 < summary.clips["validation"] < 10
    assert loop.train(few, tmp_path / "run")
    (names,) = (line.keys() for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in line)
    assert not [name for name in names if name.startswith("eval/loss_motion_d")]


def test_a_long_caption_leaves_room_for_what_its_row_shows(tmp_path):
    clips, caption = np.zeros((1, 2, 8, 8, 3), np.uint8), "word " * 200
    truth = samples.pictures.strip(clips[0], caption, end=" (truth)")
    sheet = samples.save_comparison(tmp_path / "6", clips, clips, [caption], 8.0)
    np.testing.assert_array_equal(sheet[: len(truth)], truth)


def test_one_process_at_a_time(config, undisturbed, tmp_path, monkeypatch):
    """Also where the second has fewer steps to do than the first has done; a training that goes on has no mark."""
    shutil.copytree(undisturbed, run := tmp_path / "run")
    (run / "DONE").unlink()
    before = files(run)
    monkeypatch.setattr(workdir, "LOCK_SECONDS", 0)
    for steps in (6, 2):
        with workdir.lock(run), pytest.raises(UserError, match=f"another process trains in {run}: wait until it ends") as found:
            loop.train(changed(config, steps=steps), run)
        assert f"if process {os.getpid()} on {socket.gethostname()} is gone, delete {run}/lock" in str(found.value)
    assert files(run) == before
    with workdir.lock(run):
        pass


def test_a_process_that_is_about_to_end_is_waited_for(tmp_path, monkeypatch, capsys):
    held = workdir.lock(tmp_path)
    monkeypatch.setattr(workdir.time, "sleep", lambda _: held.close())
    with workdir.lock(tmp_path):
        assert "waiting up to 60 s" in capsys.readouterr().out


def test_a_checkpoint_of_another_optimizer_is_not_called_damaged(config, undisturbed, tmp_path):
    """Its weights are there for a new run, as the message says."""
    shutil.copytree(undisturbed, run := tmp_path / "run")
    before = files(run)
    with pytest.raises(UserError, match=rf"checkpoints/4 holds another training state .*--config\.init_from={run} takes") as found:
        loop.train(changed(config, steps=6), run, Method(optimizer=lambda _, learning_rate: optax.adamw(learning_rate)))
    assert f"motif_jax ({motif_jax.__version__})" in str(found.value) and "fallback" not in str(found.value)
    assert files(run) == before
    initial_weights(changed(config, init_from=str(run)), Networks.of(config))


def test_a_trace_that_the_end_cuts_short_is_written(config, tmp_path, capsys):
    """A run that goes on makes none of a step that is done, and says so, as it says what else would surprise."""
    config = changed(config, eval={"every": 0}, sample={"every": 0, "guidance": 0.0})
    for steps in (4, 5):
        loop.train(changed(config, steps=steps, profile={"start": 3, "steps": 5}), tmp_path)
        said = capsys.readouterr().out
        assert ("profile.start=3: that step is done, nothing is traced; use 4" in said) == (steps == 5)
        assert "sample.guidance=0: samples do not see their sentence" in said
        assert len(list((tmp_path / "plugins" / "profile").rglob("*.xplane.pb"))) == 1


def test_guarded_work_ends_at_the_next_item():
    """A second signal acts as usual, and so does every one afterwards."""
    seen, usual = [], [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted), StopSignal() as stop:
        for item in stop.guard(range(5)):
            seen.append(item)
            if item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                assert signal.getsignal(signal.SIGTERM) == usual[0] and signal.getsignal(signal.SIGINT) != usual[1]
    assert seen == [0, 1, 2] and stop.check()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == usual
