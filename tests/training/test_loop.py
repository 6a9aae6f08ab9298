"""Whole runs in this process: a signal at every place that takes time, a damaged checkpoint, a disk that is full."""

import collections
import dataclasses
import os
import re
import signal

import jax
import numpy as np
import pytest

from motif_jax import preparation
from motif_jax.config import MeshConfig, ProfileConfig, UserError
from motif_jax.dist.preemption import Interrupted, StopSignal
from motif_jax.training import checkpoint, loop
from motif_jax.training.metrics import read_lines


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """Four steps with everything on; runs share their compiled programmes."""
    small = tiny(
        backbone="dit",
        dit={"width": 16, "depth": 1, "num_head_channels": 8, "patch": [4, 2, 2]},
        prepare={"validation_share": 0.3},
        checkpoint={"every": 2, "keep": 9},
        eval={"every": 2, "batches": 2, "buckets": 1},
        sample={"every": 2, "count": 1, "steps": 1},
    )
    data = tmp_path_factory.mktemp("data")
    preparation.prepare(small, "synthetic:shapes:40", data, log=lambda line: None)
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield dataclasses.replace(small, data=dataclasses.replace(small.data, path=str(data)), mesh=MeshConfig())
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    loop.train(config, workdir)
    return workdir


def evaluations(workdir):
    return {line["step"]: line["eval/loss"] for line in read_lines(workdir / "metrics.jsonl") if "eval/loss" in line}


def parameters(workdir):
    return checkpoint.read_arrays(workdir / "checkpoints" / "4", ("params", "ema", "opt_state"), np.ndarray)


@pytest.mark.parametrize("place", ["validate", "SampleSheets.write", "checkpoint.Checkpoints.save", "global_batch"])
def test_a_signal_at_any_place_saves_and_the_run_continues(config, undisturbed, tmp_path, monkeypatch, capsys, place):
    """Sent at the second visit of the place; what it cut short is made up for."""
    *path, name = place.split(".")
    owner = loop
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), []

    def with_signal(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, with_signal)
    loop.train(config, tmp_path)
    assert "it is saved, the same command continues" in capsys.readouterr().out or place == "checkpoint.Checkpoints.save"
    monkeypatch.undo()
    loop.train(config, tmp_path)
    assert (tmp_path / "DONE").exists()
    assert evaluations(tmp_path) == evaluations(undisturbed) and len(evaluations(undisturbed)) == 3
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["0", "2", "4"]
    for a, b in zip(jax.tree.leaves(parameters(tmp_path)), jax.tree.leaves(parameters(undisturbed)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_each_function_is_compiled_once_and_traced_on_request(config, tmp_path, caplog):
    """With evaluation, sampling and saves between the steps; the XProf trace is of steps 2 and 3."""
    with jax.log_compiles():
        loop.train(dataclasses.replace(config, profile=ProfileConfig(start=2, steps=2)), tmp_path)
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


def test_guarded_work_ends_at_the_next_item():
    seen = []
    with pytest.raises(Interrupted), StopSignal() as stop:
        for item in stop.guard(range(5)):
            seen.append(item)
            if item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [0, 1, 2] and stop.check()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
