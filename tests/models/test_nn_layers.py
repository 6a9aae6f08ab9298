"""The layers against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.signal import correlate
from scipy.special import erf

from motif_jax.models import layers, placement
from motif_jax.models.layers import Conv, Dense, Dropout, GroupNorm, Initializer, LayerNorm, convolve, gelu, sinusoids

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def direct(x, kernel, stride, padding):
    """Cross-correlation by SciPy, one pair of channels at a time, float64."""
    x = np.pad(x.astype(np.float64), ((0, 0), *padding, (0, 0)))
    full = [[sum(correlate(image[..., i], kernel[..., i, o].astype(np.float64), "valid") for i in range(x.shape[-1]))
             for o in range(kernel.shape[-1])] for image in x]  # fmt: skip
    step = (slice(None), slice(None), *[slice(None, None, stride)] * len(padding))
    return np.moveaxis(np.asarray(full)[step], 1, -1)


@pytest.mark.parametrize("where", ["cpu", "tpu"])
@pytest.mark.parametrize(
    "window, stride, padding, size",
    [
        ((3, 3), 1, ((1, 1), (1, 1)), (6, 5)),
        ((3, 3), 2, ((1, 1), (1, 1)), (6, 8)),
        ((3, 3), 2, ((0, 1), (0, 1)), (6, 8)),
        ((1, 1), 1, ((0, 0), (0, 0)), (3, 4)),
        ((3, 1, 1), 1, ((1, 1), (0, 0), (0, 0)), (5, 3, 2)),
        ((1,), 1, ((0, 0),), (7,)),
        ((1,), 1, ((1, 0),), (7,)),
        ((3, 1, 1), 1, ((1, 1), (2, 1), (0, 2)), (5, 3, 2)),
        # Images smaller than the window: on CPU one product, without the taps that see padding alone.
        ((3, 3), 1, ((1, 1), (1, 1)), (2, 2)),
        ((3, 3), 1, ((1, 1), (1, 1)), (1, 1)),
        ((3, 3), 1, ((1, 1), (1, 1)), (1, 4)),
        ((3, 3), 2, ((1, 1), (1, 1)), (2, 2)),
        ((3, 3), 2, ((1, 1), (1, 1)), (1, 1)),
        ((3, 3), 2, ((0, 1), (0, 1)), (2, 2)),
        ((3, 1, 1), 1, ((1, 1), (0, 0), (0, 0)), (1, 1, 2)),
    ],
)
def test_convolutions_are_scipy_s(where, window, stride, padding, size):
    """Values, and both gradients through the identity <g, conv(x, k)>, which is linear in x and in k."""
    x, kernel = normal(9, *size, 3), normal(*window, 3, 4)
    expected = direct(x, kernel, stride, padding)
    with placement.target_platform(where):
        out, pull = jax.vjp(lambda x, kernel: convolve(x, kernel, stride, padding), x, kernel)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    g, dx, dk = normal(*out.shape), normal(*x.shape), normal(*kernel.shape)
    gx, gk = pull(g)
    np.testing.assert_allclose(np.vdot(gx, dx), np.vdot(g, direct(dx, kernel, stride, padding)), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(np.vdot(gk, dk), np.vdot(g, direct(x, dk, stride, padding)), rtol=1e-4, atol=1e-3)


def test_kernel_gradient_in_slices_of_the_batch(monkeypatch):
    """Slices that do not divide the batch."""
    x, kernel = normal(11, 4, 4, 3), normal(3, 3, 3, 5)
    monkeypatch.setattr(layers, "CPU_SLICE", x.size / 4)
    padding = ((1, 1), (1, 1))
    loss = lambda kernel: jnp.sum(jnp.square(convolve(x, kernel, 1, padding)))  # noqa: E731
    with placement.target_platform("cpu"):
        sliced = jax.grad(loss)(kernel)
    text = str(jax.make_jaxpr(jax.grad(loss))(kernel))
    assert text.count("conv_general_dilated[") >= 5
    with placement.target_platform("gpu"):
        np.testing.assert_allclose(sliced, jax.grad(loss)(kernel), rtol=1e-4)


def test_dense_is_the_same_on_every_platform():
    layer, x = Dense(4, 6, init=Initializer(nnx.Rngs(0))), normal(2, 3, 4)
    for where in ("cpu", "tpu"):
        with placement.target_platform(where):
            np.testing.assert_allclose(layer(x), x @ layer.kernel[...] + layer.bias[...], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_float32_out_rounds_operands_only(kind):
    """1e-6 is what float32 loses in sums of 64 terms; bfloat16 would lose 2e-3. Gradients are those of the layer in bfloat16."""
    rng = np.random.default_rng(0)

    def make(**options):
        options |= {"init": Initializer(nnx.Rngs(0)), "dtype": jnp.bfloat16}
        return Dense(64, 32, **options) if kind == "dense" else Conv(64, 32, (1, 1), **options)

    layer, plain = make(float32_out=True), make()
    x, g = (rng.standard_normal((2, 3, 5, n)).astype(np.float32) for n in (64, 32))
    rounded = [np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (jnp.asarray(x), layer.kernel[...])]
    out, pull = jax.vjp(lambda x, kernel: _with(layer, kernel)(x), x, layer.kernel[...])
    assert out.dtype == jnp.float32
    wanted = rounded[0] @ rounded[1].reshape(64, 32) + np.asarray(layer.bias[...], np.float64)
    np.testing.assert_allclose(out, wanted, atol=1e-6)
    out, pull_plain = jax.vjp(lambda x, kernel: _with(plain, kernel)(x), x, layer.kernel[...])
    for ours, theirs in zip(pull(g), pull_plain(g.astype(out.dtype)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def _with(layer, kernel):
    graph, params = nnx.split(layer, nnx.Param)
    params["kernel"] = params["kernel"].replace(kernel)
    return nnx.merge(graph, params)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_group_norm(groups):
    """Statistics over all axes between batch and channels, and over a group's channels; a mean far from 0 costs no digits."""
    norm, x = GroupNorm(8, groups, 1e-5), 300 + normal(2, 3, 4, 5, 8)
    norm.scale[...], norm.bias[...] = normal(8), normal(8)
    y = x.astype(np.float64).reshape(2, 60, groups, -1)
    y = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + 1e-5)
    expected = y.reshape(x.shape) * norm.scale[...] + norm.bias[...]
    np.testing.assert_allclose(norm(x), expected, atol=1e-3)  # float32 holds 300 + x to 3e-5, times the scale


@pytest.mark.parametrize("mean", [0, 30])
def test_norms_in_half_precision(mean):
    """Their statistics come out of one pass: with a mean of 30 deviations nothing is lost that bfloat16 could hold (2^-8 of a value)."""
    x = mean + normal(2, 16, 16, 8)
    for norm, axes, shape in [(GroupNorm(8, 4, 1e-5, dtype=jnp.bfloat16), (1, 3), (2, 256, 4, 2)),
                              (LayerNorm(8, dtype=jnp.bfloat16), (3,), x.shape)]:  # fmt: skip
        y = x.astype(np.float64).reshape(shape)
        y = ((y - y.mean(axes, keepdims=True)) / np.sqrt(y.var(axes, keepdims=True) + 1e-5)).reshape(x.shape)
        found = norm(x)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), y, rtol=2**-8, atol=1e-3)


def test_norms_of_a_constant_are_finite():
    """E[x^2] - E[x]^2 may come out below zero, as it does for some of these."""
    x = jnp.broadcast_to(jnp.linspace(1.0, 1000.0, 99)[:, None, None, None], (99, 7, 7, 48))
    layer_norm = LayerNorm(48, dtype=jnp.bfloat16)
    layer_norm.epsilon = 1e-6
    for norm in (GroupNorm(48, 4, 1e-6, dtype=jnp.bfloat16), layer_norm):
        value, gradient = jax.value_and_grad(lambda x, norm=norm: norm(x).astype(jnp.float32).sum())(x)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="32 groups do not divide 48 channels"):
        GroupNorm(48, 32, 1e-5)


def test_layer_norm():
    norm, x = LayerNorm(8), normal(2, 3, 8) * 1e-3
    norm.scale[...], norm.bias[...] = normal(8), normal(8)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.astype(np.float64).var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(x), y * norm.scale[...] + norm.bias[...], rtol=1e-4, atol=1e-6)


def test_gelu_is_the_exact_one():
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    np.testing.assert_allclose(gelu(x), 0.5 * x * (1 + erf(x / np.sqrt(2))), atol=1e-6)


def test_sinusoids():
    """Cosines first; the last frequency is period ** (-(half - 1) / half); an odd width ends in zeros."""
    out = np.asarray(sinusoids(jnp.asarray([0.0, 3.0]), 7))
    frequency = 10_000 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(out[1], [*np.cos(3 * frequency), *np.sin(3 * frequency), 0], atol=1e-6)
    np.testing.assert_array_equal(out[0], [1, 1, 1, 0, 0, 0, 0])


def test_dropout_share_and_mean():
    x = jnp.ones((400, 500))
    layer, key = Dropout(0.1, stream=5), jax.random.key(0)
    y = np.asarray(layer(x, key))
    values = np.unique(y)
    np.testing.assert_allclose(values, [0, 1 / 0.9], rtol=1e-4)
    np.testing.assert_allclose((y == 0).mean(), 0.1, atol=5 * (0.09 / y.size) ** 0.5)  # five standard errors
    assert not np.array_equal(y, Dropout(0.1, stream=6)(x, key))
    np.testing.assert_array_equal(layer(x, None), x)
    assert Dropout(0.1, 0)(x.astype(jnp.bfloat16), key).dtype == jnp.bfloat16


def test_dropout_masks_are_independent():
    """Of neighbours along every axis, of layers and of keys: both dropped as often as chance has it, rate squared."""
    x, keys = jnp.ones((16, 40, 50, 40)), jax.random.split(jax.random.key(3))
    first = np.asarray(Dropout(0.1, stream=5)(x, keys[0])) == 0
    pairs = {
        "layer": (first, np.asarray(Dropout(0.1, stream=6)(x, keys[0])) == 0),
        "key": (first, np.asarray(Dropout(0.1, 5)(x, keys[1])) == 0),
    }
    pairs |= {axis: (np.delete(first, 0, axis), np.delete(first, -1, axis)) for axis in range(4)}
    for name, (a, b) in pairs.items():
        np.testing.assert_allclose((a & b).mean(), 0.01, atol=5 * (0.01 * 0.99 / a.size) ** 0.5, err_msg=str(name))  # five standard errors


def test_initial_values_do_not_depend_on_jit():
    def make(seed):
        return nnx.to_pure_dict(nnx.state(Conv(3, 4, (3, 3), init=Initializer(nnx.Rngs(seed))), nnx.Param))

    eager, jitted, other = make(0), jax.jit(make, static_argnums=0)(0), make(1)
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(eager[name], jitted[name])
        assert not np.array_equal(eager[name], other[name])
        assert np.abs(eager[name]).max() <= 27**-0.5
