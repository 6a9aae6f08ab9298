"""The Triton kernels of the gated feed-forward layer, interpreted, against the layers in float32: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from motif_jax.models import gated
from motif_jax.models.layers import Initializer, product
from motif_jax.models.placement import target_platform
from motif_jax.models.transformer import FeedForward

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_the_normal_distribution():
    """The polynomial is off by 1.5e-7 at most; float32 adds two units of its last place at 1."""
    x = np.linspace(-9, 9, 4001, dtype=np.float32)
    share, density = jax.jit(gated._normal)(x)
    np.testing.assert_allclose(share, scipy.stats.norm.cdf(x.astype(np.float64)), atol=2.7e-7, rtol=0)
    np.testing.assert_allclose(density, scipy.stats.norm.pdf(x.astype(np.float64)), atol=1e-7, rtol=0)


def products(layer, x):
    return [product(x.astype(jnp.bfloat16), kernel) for kernel in layer.kernels(x.shape)]


@pytest.mark.parametrize("shape", [(2, 64, 64), (1, 160, 320)])
def test_equal_to_the_layers(shape):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(0, scale, shape), jnp.float32) for scale in (2, 1))

    def found(dtype, call):
        graph, state = nnx.split(FeedForward(shape[-1], init=Initializer(nnx.Rngs(0)), dtype=dtype))

        def loss(state, x):
            y = call(nnx.merge(graph, state), x).astype(jnp.float32)
            return jnp.sum(y * weight), y

        return jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss, (0, 1), has_aux=True))(state, x))

    without = found(jnp.bfloat16, lambda layer, x: layer.from_products(products(layer, x), None) + layer.bias[...])
    kernels = found(jnp.bfloat16, lambda layer, x: layer.from_products(products(layer, x), ()) + layer.bias[...])
    for (path, a), (_, b), (_, exact) in zip(kernels, without, found(jnp.float32, lambda layer, x: layer(x)), strict=True):
        # Five roundings to bfloat16 in a row, of 1.7e-3 on average each; without kernels some more.
        assert np.linalg.norm(a - exact) < 8e-3 * np.linalg.norm(exact), jax.tree_util.keystr(path)
        assert np.linalg.norm(b - exact) < 1.2e-2 * np.linalg.norm(exact), jax.tree_util.keystr(path)


def test_where_the_kernels_are_taken():
    def taken(shape, platform="gpu", dtype=jnp.bfloat16) -> bool:
        layer = FeedForward(shape[-1], init=Initializer(nnx.Rngs(0)), dtype=dtype)
        with target_platform(platform):
            return "geglu_forward" in str(jax.make_jaxpr(lambda x: layer.from_products(products(layer, x)))(jnp.ones(shape)))

    assert taken((2, 64, 64)) and not taken((2, 64, 64), "cpu") and not taken((2, 64, 64), "tpu")
    assert not taken((2, 64, 64), dtype=jnp.float32) and not taken((3, 5, 64))
