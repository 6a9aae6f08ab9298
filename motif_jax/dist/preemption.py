"""Turns SIGTERM and SIGINT into a flag that the loop reads between steps."""

import signal
import types


class StopSignal:
    """Context manager: `requested` becomes True at the first SIGTERM or SIGINT; a second one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._previous[number])

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
