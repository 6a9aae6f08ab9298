"""The Triton kernels of group norm, SiLU and dropout, interpreted, against the layers in float32: values, gradients, masks."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from motif_jax.models import group_norm, layers
from motif_jax.models.layers import Dropout, GroupNorm
from motif_jax.models.placement import target_platform, use_kernels

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(5)


def chain(scale, bias, dtype=jnp.bfloat16, silu: bool = True, rate: float = 0.0) -> list[nnx.Module]:
    norm = GroupNorm(scale.size, 8, 1e-5, dtype=dtype)
    norm.scale, norm.bias = nnx.Param(scale), nnx.Param(bias)
    return [norm, *[layers.silu] * silu, *[Dropout(rate, 3)] * (rate > 0)]


def inputs(shape: tuple[int, ...], dtype) -> tuple[list[jax.Array], list[jax.Array]]:
    """(x, shift, scale, bias), and weights of the loss for both results."""
    rng = np.random.default_rng(0)
    N, C = shape[0], shape[-1]
    x = jnp.asarray(rng.normal(0.5, 2, shape), dtype)
    small = (rng.normal(0, 1, (N, C)), rng.normal(1, 0.3, C), rng.normal(0, 0.3, C))
    return [x, *(jnp.asarray(a, jnp.float32) for a in small)], [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)]


def with_gradients(run, given, weights) -> list[np.ndarray]:
    """y, and the gradients of x, shift, scale and bias; x in float32 is used again, as the residual is."""

    def loss(x, shift, scale, bias):
        y, again = run(x, shift, scale, bias)
        out = jnp.sum(y.astype(jnp.float32) * weights[0])
        return out + (jnp.sum(again * weights[1]) if x.dtype == jnp.float32 else 0), y

    gradients, y = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*given)
    return [np.asarray(a, np.float32) for a in (y, *gradients)]


CASES = {
    "convolution's output, with dropout": ((2, 8, 16, 64), jnp.bfloat16, True, 0.1),
    "residual of a clip": ((2, 4, 8, 16, 64), jnp.float32, True, 0.0),
    "norm alone, 320 channels": ((2, 8, 40, 320), jnp.float32, False, 0.0),
    "several programs per clip": ((1, 4, 8, 16, 320), jnp.bfloat16, True, 0.1),
    "by pixel": ((2, 4, 8, 20, 320), jnp.float32, False, 0.1),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_layers(case):
    shape, dtype, silu, rate = CASES[case]
    given, weights = inputs(shape, dtype)
    by_pixel = case == "by pixel"

    def kernels(x, shift, *norm):
        y, again = group_norm.in_kernels(chain(*norm, silu=silu, rate=rate), x, KEY, shift, by_pixel=by_pixel)
        return jnp.einsum("btpc->bptc", y).reshape(shape) if by_pixel else y, again

    def layers(x, shift, *norm):
        return group_norm.normalised(chain(*norm, jnp.float32, silu, rate), x.astype(jnp.float32), KEY, shift)[0], x

    found, wanted = with_gradients(kernels, given, weights), with_gradients(layers, given, weights)
    if rate:
        np.testing.assert_array_equal(found[0] == 0, wanted[0] == 0)  # the same mask: what is kept is not zero in either
    for name, a, b in zip(("y", "x", "shift", "scale", "bias"), found, wanted, strict=True):
        # y and its gradient pass through bfloat16 (2^-9 at most, 1.7e-3 on average), a gradient of x in bfloat16 once more.
        assert np.linalg.norm(a - b) < 4e-3 * np.linalg.norm(b), name


def test_where_the_kernels_are_taken():
    """On a GPU, in half precision, where images are whole; elsewhere the layers, with the same meaning."""
    frames, clips = (8, 8, 16, 64), (8, 4, 8, 16, 64)

    def taken(shape, platform="gpu", dtype=jnp.bfloat16, **mesh) -> bool:
        sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | mesh
        abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 4)
        on = jax.sharding.use_abstract_mesh(abstract) if mesh else contextlib.nullcontext()
        layers, x = chain(jnp.ones(shape[-1]), jnp.ones(shape[-1]), dtype), jax.ShapeDtypeStruct(shape, jnp.float32)
        with target_platform(platform), on:
            return "group_norm_forward" in str(jax.make_jaxpr(lambda x: group_norm.normalised(layers, x))(x))

    assert taken(frames) and taken(clips) and taken(clips, data=2, fsdp=2) and taken(frames, context=4)
    assert not taken(frames, "cpu") and not taken(frames, "tpu") and not taken(frames, dtype=jnp.float32)
    assert not taken(clips, context=4) and not taken(frames, tensor=4) and not taken((3, 8, 16, 64), data=2)
    with use_kernels(False):  # --config.kernels=xla
        assert not taken(frames)
    assert not taken((8, 3, 5, 64)) and not taken((8, 8, 8, 8))  # no powers of two of some size
