"""The splash kernel, interpreted, against `jax.nn.dot_product_attention`: values and gradients, with lengths that need padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.models import splash
from motif_jax.models.attention import attention


def test_equal_to_xla():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, n, 1, 64)), jnp.float32) for n in (120, 150, 150))

    def run(attend):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v))), argnums=(0, 1, 2)))(q, k, v)

    (value, gradients), (expected, expected_gradients) = (
        run(lambda *x: splash.attend(*x, interpret=True)),
        run(jax.nn.dot_product_attention),
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))  # sums in another order


def test_refused_where_there_is_no_tpu():
    x = jnp.zeros((1, 600, 1, 8))
    with pytest.raises(ValueError, match="attention='splash' is a TPU kernel and this is cpu"):
        attention(x, x, x, "splash")
