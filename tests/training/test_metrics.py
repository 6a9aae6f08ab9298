"""Metrics on disk: what was written is read back, lines of lost work are dropped, TensorBoard's own reader agrees."""

import io
import threading

import numpy as np
import pytest
from PIL import Image

from motif_jax.training.metrics import MetricWriter, read_lines


def test_lines_and_events_agree(tmp_path):
    """Also before the writer is closed, which one that is killed never does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 2.0, "bad": float("nan")})
    writer.write(2, {"loss": np.float32(1.5)})
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    writer.write_image(2, "sheet", image)
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0, "bad": None}, {"step": 2, "loss": 1.5}]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.5)]
    (shown,) = events.Images("sheet")
    assert (shown.width, shown.height) == (6, 4)
    np.testing.assert_array_equal(Image.open(io.BytesIO(shown.encoded_image_string)), image)
    writer.close()


def test_resuming_drops_lines_of_lost_work_and_half_a_line(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 1.0}\n{"step": 6, "lo')
    MetricWriter(tmp_path, start_step=3).close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_tensorboard_drops_lost_work_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in (-1, range(3)), (-1, range(6)), (3, range(4, 6)):  # the first was killed before anything was saved
        writer = MetricWriter(tmp_path, start)
        for step in steps:
            writer.write(step, {"loss": start + step})
        writer.close()
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in found] == [(0, -1), (1, 0), (2, 1), (3, 2), (4, 7), (5, 8)]


def test_resuming_drops_an_evaluation_that_was_cut_short(tmp_path):
    writer = MetricWriter(tmp_path)
    for line in ({"loss": 1.0}, {"sample/mean_flow": 2.0}, {"eval/loss": 3.0}):
        writer.write(1, line)
    writer.close()
    MetricWriter(tmp_path, start_step=1, evaluated=True).close()
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3
    MetricWriter(tmp_path, start_step=1, evaluated=False).close()
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_no_other_thread_writes(tmp_path):
    """It would tell of a full disk in its own way, beside the one clear error."""
    threads = threading.active_count()
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    assert threading.active_count() == threads
    writer.close()


@pytest.mark.parametrize("text", ["", '{"step": 1', "[1]", '{"loss": 1.0}', "\x00"])
def test_nothing_complete(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_lines(tmp_path / "metrics.jsonl") == []
