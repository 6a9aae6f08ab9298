"""The splash kernel, interpreted, against `jax.nn.dot_product_attention`: values and gradients, with lengths that need padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.models import splash
from motif_jax.models.attention import attention

pytestmark = pytest.mark.usefixtures("tpu_memory")


@pytest.mark.parametrize("queries, keys, width", [(120, 150, 64), (1280, 3200, 8)])
def test_equal_to_xla(queries, keys, width):
    """With padding; in two blocks of queries and two of keys, whose parts of the queries' gradient are added up."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, n, 1, width)), jnp.float32) for n in (queries, keys, keys))

    def run(attend):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v))), argnums=(0, 1, 2)))(q, k, v)

    (value, gradients), (expected, expected_gradients) = run(splash.attend), run(jax.nn.dot_product_attention)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))  # sums in another order


def test_tiles():
    """Whole sequences where they fit: 2560 keys are the paper's finest level, 640 queries and keys the next; else little padding."""
    assert [splash.tiles(n, 640) for n in (640, 2560, 512, 896, 9216)] == [(640, 1), (640, 4), (512, 1), (512, 2), (640, 15)]


def test_refused_where_there_is_no_tpu():
    x = jnp.zeros((1, 600, 1, 8))
    with pytest.raises(ValueError, match="attention='splash' is a TPU kernel and this is cpu"):
        attention(x, x, x, "splash")
