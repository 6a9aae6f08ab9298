"""One function on every local device of this process, for work that comes clip by clip from several threads."""

import queue
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


class Replicas:
    """`function(params, *arrays)` on whichever local device is free.

    A clip is worked on by one device alone, and all devices run the same program: its result does not depend on how many
    there are. Calls beyond the number of devices wait for their turn.
    """

    def __init__(self, function: Callable[..., Any], params: Any) -> None:
        self._function = jax.jit(function)
        self._free: queue.SimpleQueue = queue.SimpleQueue()
        for device in jax.local_devices():
            self._free.put(jax.device_put(params, device))

    def __call__(self, *arrays: np.ndarray) -> Any:
        """The result as numpy arrays; inputs follow the parameters to their device."""
        params = self._free.get()
        try:
            return jax.tree.map(np.asarray, self._function(params, *arrays))
        finally:
            self._free.put(params)
