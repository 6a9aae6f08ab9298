"""A request to stop (SIGTERM, SIGINT, the platform's notice) as an answer that all processes of a job get at the same place."""

import signal
import types
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

T = TypeVar("T")


class Interrupted(Exception):
    """Raised inside work that `StopSignal.guard` watches over."""


class StopSignal:
    """Context manager. One process has a flag of its own, for SIGTERM and SIGINT; the same signal once more acts as usual.

    In a job of several, SIGINT ends the process. Of a SIGTERM JAX's coordination service tells all of them, and picks a check that none
    has reached yet; so each must call `check` (or consume `guard`) in the same order.
    """

    def __init__(self) -> None:
        self._requested, self._checks = False, 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1:  # else the coordination service has its own handler, which must stay
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self._requested = True
        signal.signal(number, self._previous[number])

    def check(self) -> bool:
        """Whether to save and leave now; stays True."""
        if not self._requested and jax.process_count() > 1:
            from jax.experimental import multihost_utils

            self._checks += 1
            self._requested = multihost_utils.reached_preemption_sync_point(self._checks)
        return self._requested

    def guard(self, items: Iterable[T]) -> Iterator[T]:
        """The items, with a check before each. Raises Interrupted."""
        for item in items:
            if self.check():
                raise Interrupted
            yield item

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
