"""The Triton kernels of the transformers' layer norms, interpreted, against the layers in float32: a chain's values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from motif_jax.models.layers import Dense, Initializer, LayerNorm, target_platform
from motif_jax.models.residual import Residual, fits

INNER = 32


def run(shape: tuple[int, int, int], dtype, rows: tuple | None):
    """Four layers are added up, with a norm after each of the first three: (norms and sum, gradients of all parameters and inputs)."""
    rng = np.random.default_rng(0)

    def draw(*size, mean=0.0, deviation=1.0):
        return jnp.asarray(rng.normal(mean, deviation, size), jnp.float32)

    C = shape[-1]
    layers, norms = (
        [Dense(INNER, C, init=Initializer(nnx.Rngs(i)), dtype=dtype) for i in range(4)],
        [LayerNorm(C, dtype=dtype) for _ in range(3)],
    )
    for norm in norms:
        norm.scale, norm.bias = nnx.Param(draw(C, mean=1, deviation=0.3)), nnx.Param(draw(C, deviation=0.3))
    inputs = [draw(*shape[:2], INNER, deviation=3) for _ in layers]
    weights = [draw(*shape) for _ in layers]
    graph, state = nnx.split((layers, norms))

    def loss(state, inputs):
        layers, norms = nnx.merge(graph, state)
        total, found = Residual(layers[0], inputs[0], rows), []
        for norm, layer, x in zip(norms, layers[1:], inputs[1:], strict=True):
            found.append(total.normed(norm))
            total.add(layer, x)
        found.append(total.sum)
        return sum(jnp.sum(y * weight) for y, weight in zip(found, weights, strict=True)), found

    gradients, found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(state, inputs)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path((found, gradients))]
    return dict(zip(names, map(np.asarray, jax.tree.leaves((found, gradients))), strict=True))


@pytest.mark.parametrize("shape", [(2, 64, 64), (3, 32, 320), (1, 64, 96)])
def test_equal_to_the_layers(shape):
    """Channels of one, five and three slices; tokens that are and are not a power of two."""
    assert fits(shape)
    found, wanted = run(shape, jnp.bfloat16, ()), run(shape, jnp.float32, None)
    for name, exact in wanted.items():
        # What enters a product and what leaves it are rounded to bfloat16, 1.7e-3 each on average.
        assert np.linalg.norm(found[name] - exact) < 6e-3 * np.linalg.norm(exact), name


def test_a_norm_without_a_new_part():
    """Two norms of one sum, and two parts with no norm between: XLA's norm and the kernels see the same sum."""
    layer, norm = Dense(INNER, 64, init=Initializer(nnx.Rngs(0)), dtype=jnp.bfloat16), LayerNorm(64, dtype=jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, INNER)), jnp.float32)
    total = Residual(layer, x, rows=())
    total.add(layer, 2 * x)
    first, second = total.normed(norm), total.normed(norm)
    other = Residual(layer, x, rows=None)
    other.add(layer, 2 * x)
    for y in (first, second):
        np.testing.assert_allclose(np.float32(y), np.float32(other.normed(norm)), atol=0.03)  # up to 4: two roundings to bfloat16


def test_where_the_kernels_are_taken():
    def taken(shape, platform="gpu", dtype=jnp.bfloat16) -> bool:
        layer, norm = Dense(INNER, shape[-1], init=Initializer(nnx.Rngs(0)), dtype=dtype), LayerNorm(shape[-1], dtype=dtype)
        with target_platform(platform):
            return "layer_norm_forward" in str(jax.make_jaxpr(lambda x: Residual(layer, x).normed(norm))(jnp.ones((*shape[:-1], INNER))))

    assert taken((2, 64, 64)) and not taken((2, 64, 64), "cpu") and not taken((2, 64, 64), "tpu")
    assert not taken((2, 64, 64), dtype=jnp.float32)
    assert (
        not taken((3, 5, 64)) and not taken((2, 64, 11 * 64)) and not taken((2, 64, 24))
    )  # no whole programs, too many slices, too narrow
