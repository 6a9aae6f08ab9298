"""One function on every local device."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.dist.replicas import Replicas


def test_a_call_that_fails_gives_its_device_back():
    """Else the next one would wait for ever."""
    product, found = Replicas(jnp.dot, jnp.ones((2, 3))), []
    for _ in jax.local_devices():
        with pytest.raises(TypeError):
            product(np.ones(5))
    thread = threading.Thread(target=lambda: found.append(product(np.ones(3))), daemon=True)
    thread.start()
    thread.join(60)
    np.testing.assert_array_equal(found, [[3.0, 3.0]])
