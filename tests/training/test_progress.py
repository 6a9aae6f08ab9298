"""The status line and its metrics; a run that diverges names metric, step and the last good checkpoint."""

import types

import jax
import jax.numpy as jnp
import pytest

from motif_jax.errors import UserError
from motif_jax.training import progress as module
from motif_jax.training.metrics import MetricWriter, read_lines
from motif_jax.training.progress import Progress


@pytest.fixture
def progress(tiny, tmp_path):
    writer = MetricWriter(tmp_path)
    yield Progress(writer, tiny(steps=100), 10**9, None)
    writer.close()


def test_a_window(progress, tmp_path, capsys):
    progress.add(1, {"loss": jnp.float32(1.0)}, 0.5)
    progress.compiled()
    progress.add(2, {"loss": jnp.float32(3.0)}, 0.0)
    progress.add(3, {"loss": jnp.float32(9.0)}, 0.0)  # under way: it belongs to the next window
    progress.flush(2)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["step"] == 2 and line["loss"] == 2.0 and line["clips"] == 8 and line["compile_seconds"] > 0
    assert line["input_wait"] == 0.0  # the wait of the first step belongs to the compilation
    assert line["clips_per_second"] == pytest.approx(4 / line["seconds_per_step"])
    assert line["tflops_per_device"] == pytest.approx(1e-3 / line["seconds_per_step"])
    assert line["memory_gib"] > 0.05
    assert "mfu" not in line  # nobody knows the peak of this CPU
    text = capsys.readouterr().out
    for part in (
        "(compilation)",
        "step 2/100",
        "loss 2.0000",
        "8 clips",
        "s/step",
        "clips/s",
        "model TFLOP/s per device",
        "GiB",
        "input wait",
    ):
        assert part in text
    assert "MFU" not in text
    progress.flush(2)
    progress.flush(3)
    assert [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")] == [2.0, 9.0]


def test_what_lies_between_windows_is_not_training(progress, tmp_path, monkeypatch):
    """An evaluation of 100 s, then a first step with a second of compilation and one of 2 s, on a quarter of the job's devices."""
    now = [100.0]
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(jax, "device_count", lambda: 4 * jax.local_device_count())
    progress.restart()
    now[0] = 101.0
    progress.add(1, {"loss": jnp.float32(1.0)}, 9.0)
    progress.compiled()
    now[0] = 103.0
    progress.add(2, {"loss": jnp.float32(1.0)}, 0.5)
    progress.flush(2)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert (line["compile_seconds"], line["seconds_per_step"], line["clips_per_second"], line["input_wait"]) == (1.0, 2.0, 2.0, 0.25)
    assert line["tflops_per_device"] == pytest.approx(1e-3 / 2 / jax.device_count())


def test_mfu_is_stated_with_its_peak(progress, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_peak", 197.0)
    progress.add(1, {"loss": jnp.float32(1.0)}, 0.0)
    progress.flush(1)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["mfu"] == pytest.approx(line["tflops_per_device"] / 197.0)
    assert "% of 197" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("last", "message"), [(None, "no checkpoint was written before"), (4, "the last checkpoint is step 4; .* move checkpoints/4 away")]
)
def test_a_value_that_is_not_finite_stops_the_run(progress, last, message):
    progress.last = last
    for step, loss in enumerate((1.0, float("nan"), 2.0), start=5):
        progress.add(step, {"grad_norm": jnp.float32(1.0), "loss": jnp.float32(loss)}, 0.0)
    with pytest.raises(UserError, match=f"loss is nan in step 6: training stops.*; {message}"):
        progress.flush(7)
