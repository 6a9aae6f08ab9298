"""Scalars to `metrics.jsonl` and TensorBoard event files, without TensorFlow; curves to read back."""

import contextlib
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from motif_jax.data.storage import write_whole


class MetricWriter:
    """Appends one JSON line and one TensorBoard event per call of `write`.

    On resume, lines of steps after `start_step` are dropped, and of that step what evaluation wrote unless `evaluated`: they belong to
    work that was lost with the process that wrote them and will be written again, equal.
    """

    def __init__(self, workdir: str | pathlib.Path, start_step: int = 0, evaluated: bool = True) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        kept = [
            line
            for line in read_lines(self._path)
            if line["step"] < start_step
            or (line["step"] == start_step and (evaluated or not any(name.startswith(("eval/", "sample/")) for name in line)))
        ]
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        # Not EventFileWriter: its thread would tell of a full disk, too, and at length.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._events = RecordWriter((pathlib.Path(workdir) / name).open("wb"))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # TensorBoard then drops what earlier files say of later steps.
        self._add(Event(wall_time=time.time(), step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def _add(self, event: Any) -> None:
        self._events.write(event.SerializeToString())
        self._events.flush()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = {name: float(value) for name, value in scalars.items()}
        # JSON has no NaN: a value that is not finite is written as null.
        self._file.write(json.dumps({"step": step, **{k: v if math.isfinite(v) else None for k, v in scalars.items()}}) + "\n")
        self._file.flush()
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()])
        self._add(Event(step=step, wall_time=time.time(), summary=summary))

    def write_image(self, step: int, name: str, image_HW3: np.ndarray) -> None:
        import cv2
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        encoded = cv2.imencode(".png", image_HW3[..., ::-1])[1].tobytes()
        image = Summary.Image(height=image_HW3.shape[0], width=image_HW3.shape[1], colorspace=3, encoded_image_string=encoded)
        self._add(Event(step=step, wall_time=time.time(), summary=Summary(value=[Summary.Value(tag=name, image=image)])))

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read_lines(path: str | pathlib.Path) -> list[dict]:
    """The lines of a metrics.jsonl; what is none, such as a last line cut off by a killed writer, is left out."""
    path = pathlib.Path(path)
    lines = []
    for text in path.read_text(errors="replace", encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and "step" in line]
