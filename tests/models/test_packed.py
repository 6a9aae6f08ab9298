"""The Triton kernel for short sequences, interpreted, against attention written out: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.models import packed
from motif_jax.models.attention import attention


def inputs(N: int, L: int, H: int = 3, K: int = 16) -> list[np.ndarray]:
    rng = np.random.default_rng(N)
    return [rng.normal(size=(N, L, H, K)).astype(np.float32) for _ in range(3)]


def with_gradients(attend, *x):
    def loss(*x):
        out = attend(*x)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*x)
    return [out, *gradients]


@pytest.mark.parametrize("N, L", [(8, 16), (16, 8), (4, 32), (96, 2)])
def test_equal_to_the_reference(N, L):
    """Float32, several programs and heads: only the order of sums differs."""
    x = inputs(N, L)
    assert packed.fits(x[0].shape, x[1].shape)
    for found, wanted in zip(with_gradients(packed.attend, *x), with_gradients(lambda *x: attention(*x, "reference"), *x), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_bfloat16():
    x = inputs(8, 16, K=64)
    wanted = with_gradients(lambda *x: attention(*x, "reference"), *x)
    for found, exact in zip(with_gradients(packed.attend, *(jnp.asarray(a, jnp.bfloat16) for a in x)), wanted, strict=True):
        assert found.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(found, np.float32) - exact) < 1e-2 * np.linalg.norm(exact)  # bfloat16 in, out and between


def test_what_fits():
    """Self-attention of few tokens, in whole programs of a power of two of rows."""
    found = {
        (N, L, S): packed.fits((N, L, 5, 64), (N, S, 5, 64))
        for N, L, S in [(8, 16, 16), (2, 32, 32), (6, 16, 16), (8, 15, 15), (8, 16, 77)]
    }
    assert list(found.values()) == [True, True, False, False, False]
    assert not packed.fits((1, 64, 5, 64), (1, 64, 5, 64)) and not packed.fits((64, 1, 5, 64), (64, 1, 5, 64))
    assert not packed.fits((8, 16, 5, 40), (8, 16, 5, 40))
