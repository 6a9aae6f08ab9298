"""The TPU's kernel for attention along the frames, interpreted, against attention written out: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from motif_jax.models import along_frames
from motif_jax.models.attention import Attention, attention
from motif_jax.models.layers import Initializer
from motif_jax.models.placement import target_platform, use_kernels
from motif_jax.models.transformer import TemporalTransformer

pytestmark = pytest.mark.usefixtures("tpu_memory", "quick_compile")


def inputs(B: int, T: int, P: int, H: int, K: int) -> list[np.ndarray]:
    rng = np.random.default_rng(T)
    return [rng.normal(size=(B, T, P, H * K)).astype(np.float32) for _ in range(3)]


def by_hand(width: int, *x):
    """As one sequence per pixel."""
    B, T, P, C = x[0].shape
    q, k, v = (a.swapaxes(1, 2).reshape(B * P, T, C // width, width) for a in x)
    return attention(q, k, v, "reference").reshape(B, P, T, C).swapaxes(1, 2)


@pytest.mark.parametrize("B, T, P, H, K", [(2, 16, 16, 3, 16), (1, 2, 24, 1, 8), (1, 25, 8, 2, 32)])
def test_equal_to_the_reference(with_gradients, monkeypatch, B, T, P, H, K):
    """Float32: only the order of sums differs. Clips, several programs, in each several products and heads, any number of frames."""
    assert along_frames.fits(T, P)
    x = inputs(B, T, P, H, K)
    for elements in (1, 2**18):  # eight pixels to a program, and all of them
        monkeypatch.setattr(along_frames, "ELEMENTS", elements)
        found, wanted = (with_gradients(lambda *x, f=f: f(K, *x), *x) for f in (along_frames.attend, by_hand))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-6)


def test_bfloat16(with_gradients):
    x = inputs(1, 16, 16, 2, 64)
    wanted = with_gradients(lambda *x: by_hand(64, *x), *x)
    found = with_gradients(lambda *x: along_frames.attend(64, *x), *(jnp.asarray(a, jnp.bfloat16) for a in x))
    for a, exact in zip(found, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(a, np.float32) - exact) < 1e-2 * np.linalg.norm(exact)  # bfloat16 in, out and between


def layer(**options) -> Attention:
    return Attention(64, 64, 4, 16, **{"init": Initializer(nnx.Rngs(0)), "dtype": jnp.bfloat16, "implementation": "auto"} | options)


def test_which_layers_take_it():
    """On a TPU, in half precision, unless told otherwise; few frames, and pixels in eights."""
    with target_platform("tpu"):
        assert layer().takes_frames(16, 40) and layer(implementation="splash").takes_frames(2, 8)
        assert not layer().takes_frames(16, 36) and not layer().takes_frames(33, 40) and not layer().takes_frames(1, 40)
        assert not layer(dtype=jnp.float32).takes_frames(16, 40) and not layer(implementation="xla").takes_frames(16, 40)
        with use_kernels(False):  # --config.kernels=xla
            assert not layer().takes_frames(16, 40)
        for context, taken in ((1, True), (5, True), (2, False), (3, True)):  # 20 pixels of a device are no eights; by threes all have all
            mesh, made = AbstractMesh((1, 1, context, 1), ("data", "fsdp", "context", "tensor")), layer()
            with jax.sharding.use_abstract_mesh(mesh):
                assert made.takes_frames(16, 40) == taken
    for where in ("cpu", "gpu"):
        with target_platform(where):
            assert not layer().takes_frames(16, 40)


@pytest.mark.parametrize("conv_projections", [True, False])
def test_a_transformer_takes_it(conv_projections):
    """The same values and gradients as by sequences of frames, on clips as they lie: nothing is transposed."""
    kwargs = {"init": Initializer(nnx.Rngs(0)), "dtype": jnp.bfloat16, "implementation": "auto"}
    block = TemporalTransformer(32, 2, 16, 1, 8, conv_projections=conv_projections, **kwargs)
    graph, state = nnx.split(block)
    noise = np.random.default_rng(1)
    state = jax.tree.map(lambda p: p + 0.1 * noise.normal(size=p.shape).astype(np.float32), state)  # the last layer begins with zeros
    x = jnp.asarray(noise.normal(size=(2, 4, 4, 8, 32)), jnp.float32)

    def loss(state, x):
        out = nnx.merge(graph, state)(x)
        return jnp.sum(jnp.sin(out)), out

    def run():
        """A function of its own each time: another trace."""
        return jax.jit(jax.value_and_grad(lambda *given: loss(*given), (0, 1), has_aux=True))

    (_, wanted), wanted_slopes = run()(state, x)
    with target_platform("tpu", interpret=True):
        jaxpr = str(jax.make_jaxpr(run())(state, x))
        (_, found), slopes = run()(state, x)
    assert jaxpr.count("name=along_frames_result") == jaxpr.count("name=along_frames_gradients") == 2
    assert "transpose[permutation=(0, 2, 1" not in jaxpr
    for a, b in zip(jax.tree.leaves((found, slopes)), jax.tree.leaves((wanted, wanted_slopes)), strict=True):
        assert np.linalg.norm(a - b) < 2e-2 * np.linalg.norm(b)  # bfloat16, rounded in other places
