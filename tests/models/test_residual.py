"""The Triton kernels of the transformers' layer norms, interpreted, against the layers in float32: values and gradients of a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from motif_jax.models.layers import Dense, Initializer
from motif_jax.models.placement import target_platform
from motif_jax.models.residual import Residual, fits
from motif_jax.models.transformer import TransformerBlock

pytestmark = pytest.mark.usefixtures("quick_compile")

WORDS, HEAD = 24, 16


def parts(shape: tuple[int, int, int], dtype, words: bool) -> tuple[Dense, TransformerBlock]:
    kwargs = {"init": Initializer(nnx.Rngs(0)), "dtype": dtype}
    C = shape[-1]
    block = TransformerBlock(C, WORDS if words else C, C // HEAD, HEAD, implementation="reference", **kwargs)
    return Dense(32, C, **kwargs), block


def run(shape: tuple[int, int, int], dtype, rows: tuple | None, words: bool) -> dict[str, np.ndarray]:
    """The sum after attention, attention (to words, or once more to itself) and the gated layer, and the gradients of everything."""
    rng = np.random.default_rng(0)

    def draw(*size, mean=0.0, deviation=1.0):
        return jnp.asarray(rng.normal(mean, deviation, size), jnp.float32)

    graph, state = nnx.split(parts(shape, dtype, words))
    state = jax.tree.map(lambda p: p + draw(*p.shape, deviation=0.03), state)
    inputs, context, weight = draw(*shape[:2], 32), draw(1, 6, WORDS), draw(*shape)
    lead = (1, shape[0] * shape[1])

    def loss(state, inputs, context):
        first, block = nnx.merge(graph, state)
        total = Residual(first, inputs, rows)
        total.add(block.attn1, block.norm1)
        total.add(block.attn2, block.norm2, *[context.astype(dtype)] * words, lead=lead if words else ())
        total.add(block.ff, block.norm3)
        return jnp.sum(total.sum * weight), total.sum

    gradients, found = jax.jit(jax.grad(loss, (0, 1, 2) if words else (0, 1), has_aux=True))(state, inputs, context)
    leaves = jax.tree_util.tree_leaves_with_path((found, gradients))
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float32) for path, leaf in leaves}


@pytest.mark.parametrize("shape, words", [((2, 64, 64), False), ((3, 32, 320), True), ((1, 64, 96), True)])
def test_equal_to_the_layers(shape, words):
    """Channels of one, five and three slices; tokens that are and are not a power of two; three products of a norm, two and one."""
    assert fits(shape)
    found, wanted = run(shape, jnp.bfloat16, (), words), run(shape, jnp.float32, None, words)
    errors = {name: np.linalg.norm(found[name] - exact) / np.linalg.norm(exact) for name, exact in wanted.items()}
    # A dozen roundings to bfloat16 in a row, of 1.7e-3 on average each; a query's and a key's gradient is a small difference of large sums.
    assert max(error for name, error in errors.items() if "to_q" not in name and "to_k" not in name) < 0.015, errors
    assert max(errors.values()) < 0.03, errors


def test_where_the_kernels_are_taken():
    def taken(shape, platform="gpu", dtype=jnp.bfloat16) -> bool:
        first, block = parts(shape, dtype, words=False)

        def call(x):
            total = Residual(first, x)
            total.add(block.ff, block.norm3)
            return total.sum

        with target_platform(platform):
            return "layer_norm_forward" in str(jax.make_jaxpr(call)(jnp.ones((*shape[:-1], 32))))

    assert taken((2, 64, 64)) and not taken((2, 64, 64), "cpu") and not taken((2, 64, 64), "tpu")
    assert not taken((2, 64, 64), dtype=jnp.float32)
    assert (
        not taken((3, 5, 64)) and not taken((2, 64, 11 * 64)) and not taken((2, 64, 24))
    )  # no whole programs, too many slices, too narrow
