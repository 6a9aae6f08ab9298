"""What a person sees of a running training: step metrics in; one status line and one metrics line per window out."""

import concurrent.futures
import math
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from motif_jax.config import Config
from motif_jax.errors import UserError
from motif_jax.training.flops import peak_tflops
from motif_jax.training.metrics import MetricWriter


class Progress:
    """Collects metrics on the device and writes their means, with speed, memory and waiting time.

    flops: of one step of the model over all devices. `last` is the newest checkpoint, for the message of a run that diverged.
    """

    def __init__(self, writer: MetricWriter | None, config: Config, flops: int, last: int | None) -> None:
        self._writer, self._config, self._flops = writer, config, flops
        self.last = last
        self._peak = peak_tflops(jax.devices()[0].device_kind)
        self._window: list[_Step] = []
        self._clock = concurrent.futures.ThreadPoolExecutor(1, "clock")  # sees when a step ends, which the loop does not wait for
        self._untimed, self._compilation = 0, 0.0
        self._start = time.perf_counter()

    def add(self, step: int, metrics: dict[str, Any], wait: float) -> None:
        """Takes the metrics of update number `step` (arrays that may not be computed yet) and the seconds waited for its batch."""
        self._window.append(_Step(step, metrics, wait, self._clock.submit(_when_computed, metrics)))

    def flush(self, step: int) -> None:
        """Writes the means since the last call up to update `step`; keeps later ones. Raises UserError when a metric is not finite."""
        window, later = ([entry for entry in self._window if (entry.number > step) == after] for after in (False, True))
        if not window:
            return
        metrics = jax.device_get([entry.metrics for entry in window])
        end = window[-1].end.result()
        elapsed = end - self._start
        for entry, found in zip(window, metrics, strict=True):
            self.check(entry.number, found)
        means = {k: float(np.mean([m[k] for m in metrics])) for k in metrics[0]}
        means["clips"] = step * self._config.batch_size
        if self._compilation:
            means["compile_seconds"] = self._compilation
        status = f"step {step}/{self._config.steps}  loss {means['loss']:.4f}  {means['clips']:,} clips"
        timed = len(window) - self._untimed
        if timed:
            means |= self._speed(elapsed / timed, sum(entry.wait for entry in window[self._untimed :]) / elapsed)
            status += f"  {means['seconds_per_step']:.3f} s/step  {means['clips_per_second']:.1f} clips/s"
            status += f"  {means['tflops_per_device']:.3g} model TFLOP/s per device"
            if "mfu" in means:
                status += f"  MFU {100 * means['mfu']:.1f} % of {self._peak:g}"
            status += f"  {means['memory_gib']:.1f} GiB  input wait {100 * means['input_wait']:.1f} %"
            minutes = (self._config.steps - step) * means["seconds_per_step"] / 60
            status += f"  {minutes:.1f} min left" if minutes < 120 else f"  {minutes / 60:.1f} h left"
        if self._writer:
            self._writer.write(step, means)
            print(status, flush=True)
        self._compilation = 0.0
        self._window, self._untimed, self._start = later, 0, end

    def _speed(self, per_step: float, wait: float) -> dict[str, float]:
        tflops = self._flops / per_step / jax.device_count() / 1e12
        found = {
            "seconds_per_step": per_step,
            "clips_per_second": self._config.batch_size / per_step,
            "tflops_per_device": tflops,
            "memory_gib": peak_memory() / 2**30,
            "input_wait": wait,
        }
        return found | ({"mfu": tflops / self._peak} if self._peak else {})

    def check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raises UserError when a metric of `step` is not finite."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                last = "no checkpoint was written before"
                if self.last is not None:
                    last = f"the last checkpoint is step {self.last}; to continue from an earlier one, move checkpoints/{self.last} away"
                raise UserError(
                    f"{name} is {float(value)} in step {step}: training stops. Run the command again with a lower learning_rate or "
                    f"optimizer.grad_clip set, or check the data; {last}"
                )

    def restart(self) -> None:
        """Starts the next window now, so that time spent on evaluation or saving is not counted as training."""
        self._window, self._untimed, self._start = [], 0, time.perf_counter()

    def compiled(self) -> None:
        """Takes note of how long the process' first step took and leaves it out of the speed of its window."""
        self._compilation = time.perf_counter() - self._start
        self._untimed, self._start = len(self._window), time.perf_counter()
        if self._writer:
            print(f"first step after {self._compilation:.1f} s (compilation)", flush=True)


class _Step(NamedTuple):
    number: int
    metrics: dict[str, Any]
    wait: float
    end: concurrent.futures.Future


def _when_computed(metrics: dict[str, Any]) -> float:
    jax.block_until_ready(metrics)
    return time.perf_counter()


def peak_memory() -> int:
    """Largest number of bytes in use so far: of this process' first device where it keeps count, else of the process."""
    stats = jax.local_devices()[0].memory_stats()
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    return stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
