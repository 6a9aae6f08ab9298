"""The Triton kernel for short sequences, interpreted, against attention written out: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from motif_jax.models import packed
from motif_jax.models.attention import Attention, attention
from motif_jax.models.layers import Initializer
from motif_jax.models.placement import target_platform, use_kernels

pytestmark = pytest.mark.usefixtures("quick_compile")


def inputs(N: int, L: int, H: int = 3, K: int = 16) -> list[np.ndarray]:
    rng = np.random.default_rng(N)
    return [rng.normal(size=(N, L, H, K)).astype(np.float32) for _ in range(3)]


def joint(q, k, v):
    return packed.attend(jnp.stack([q, k, v], 2))


@pytest.mark.parametrize("N, L", [(8, 16), (16, 8), (4, 32), (96, 2)])
def test_equal_to_the_reference(with_gradients, N, L):
    """Float32, several programs and heads: only the order of sums differs."""
    x = inputs(N, L)
    assert packed.fits(N, L, 16)
    for found, wanted in zip(with_gradients(joint, *x), with_gradients(lambda *x: attention(*x, "reference"), *x), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_bfloat16(with_gradients):
    x = inputs(8, 16, K=64)
    wanted = with_gradients(lambda *x: attention(*x, "reference"), *x)
    for found, exact in zip(with_gradients(joint, *(jnp.asarray(a, jnp.bfloat16) for a in x)), wanted, strict=True):
        assert found.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(found, np.float32) - exact) < 1e-2 * np.linalg.norm(exact)  # bfloat16 in, out and between


def test_what_fits():
    """A few tokens, a power of two, in whole programs."""
    assert [packed.fits(N, L, 64) for N, L in [(8, 16), (2, 32), (6, 16), (8, 15)]] == [True, True, False, False]
    assert not packed.fits(1, 64, 64) and not packed.fits(64, 1, 64) and not packed.fits(8, 16, 40)


def test_a_layer_takes_it():
    """With one product of queries, keys and values, on a GPU in half precision; the same values as without."""
    layer = Attention(64, 64, 4, 16, init=Initializer(nnx.Rngs(0)), dtype=jnp.bfloat16, implementation="auto")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 64)), jnp.bfloat16)
    with target_platform("gpu"):
        traced = str(jax.make_jaxpr(layer)(x))
        with use_kernels(False):  # --config.kernels=xla
            assert not layer._packed(x.shape)
    assert "attention_forward" in traced and traced.count("dot_general[") == 4  # two of the kernel, one before and one after
    wanted = layer(x)
    with target_platform("gpu", interpret=True):
        found = layer(x)
    np.testing.assert_allclose(np.float32(found), np.float32(wanted), atol=0.02)  # up to 1: bfloat16 in three places


@pytest.mark.parametrize("devices, taken", [(1, True), (4, True), (8, False), (3, True)])
def test_a_device_must_have_whole_programs(devices, taken):
    """16 sequences of 16 tokens are four programs: eight devices would leave results unwritten. What does not divide, all compute."""
    layer = Attention(64, 64, 4, 16, init=Initializer(nnx.Rngs(0)), dtype=jnp.bfloat16, implementation="auto")
    mesh = AbstractMesh((1, 1, devices, 1), ("data", "fsdp", "context", "tensor"))
    with target_platform("gpu"), jax.sharding.use_abstract_mesh(mesh):
        assert layer._packed((16, 16, 64)) == taken
