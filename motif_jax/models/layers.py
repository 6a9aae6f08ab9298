"""The layers of every network here: dense, convolution, norms, dropout, sinusoids; arrays in, arrays out, channels last.

Parameters are float32 and are cast to the layer's `dtype` where they meet the activations; norms compute in float32.
Initial values are PyTorch's defaults, U(+-1/sqrt(fan_in)) for weights and biases, unless a layer is made with `zero=True`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, UInt

from motif_jax.models.placement import constrain, platform

CPU_SLICE = 2**17  # activations per slice of a kernel gradient on CPU: 512 KB, half of a common second-level cache


def gathered(kernel: nnx.Param, dtype: Any) -> Array:
    """A kernel as it meets the activations: in their type, whole but for its output channels, which stay over `tensor`."""
    kernel = kernel[...].astype(dtype)
    return constrain(kernel, *(None,) * (kernel.ndim - 1), "tensor")


class Initializer:
    """The source of a network's initial values: its n-th parameter comes from a generator seeded with (key, n).

    NumPy draws on the host: XLA needs minutes to compile a thousand small generators, and these values are the same on
    every platform and mesh. Under `jax.jit` the draw happens at run time with the same result.
    """

    def __init__(self, rngs: nnx.Rngs):
        self.key = jax.random.key_data(rngs.params())
        self.count = itertools.count()

    def __call__(self, shape: tuple[int, ...], sample: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]) -> nnx.Param:
        """A float32 parameter with the values `sample(generator, shape)`."""
        number = next(self.count)

        def on_host(key) -> np.ndarray:
            return np.asarray(sample(np.random.default_rng([*np.asarray(key).tolist(), number]), shape), np.float32)

        if isinstance(self.key, jax.core.Tracer):
            return nnx.Param(jax.pure_callback(on_host, jax.ShapeDtypeStruct(shape, jnp.float32), self.key))
        return nnx.Param(jnp.asarray(on_host(self.key)))

    def uniform(self, shape: tuple[int, ...], fan_in: int, zero: bool = False) -> nnx.Param:
        """U(+-1/sqrt(fan_in)), or zeros."""
        if zero:
            return nnx.Param(jnp.zeros(shape, jnp.float32))
        bound = np.float32(1 / math.sqrt(fan_in))
        return self(shape, lambda generator, shape: (2 * generator.random(shape, np.float32) - 1) * bound)

    def normal(self, shape: tuple[int, ...], deviation: float) -> nnx.Param:
        """Gaussian values of mean 0."""
        return self(shape, lambda generator, shape: generator.standard_normal(shape, np.float32) * np.float32(deviation))


class Dense(nnx.Module):
    """y = x @ kernel + bias over the last axis; `kernel` [in, out]; y is `dtype`, or float32 with `float32_out`."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        init: Initializer,
        dtype=jnp.float32,
        bias: bool = True,
        zero: bool = False,
        float32_out: bool = False,
    ):
        self.kernel = init.uniform((features_in, features_out), features_in, zero)
        self.bias = init.uniform((features_out,), features_in, zero) if bias else None
        self.dtype, self.float32_out = dtype, float32_out

    def __call__(self, x: Float[Array, "*n I"]) -> Float[Array, "*n O"]:
        y = self.without_bias(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def without_bias(self, x: Float[Array, "*n I"]) -> Float[Array, "*n O"]:
        """The product alone, for what adds `bias` itself."""
        return product(x.astype(self.dtype), gathered(self.kernel, self.dtype), self.float32_out)


def product(x: Float[Array, "*n I"], kernel: Float[Array, "I *o"], float32_out: bool = False) -> Array:
    """The matrix product, [*n, *o], in the type of its operands, or float32 with `float32_out`."""
    if float32_out and x.dtype != jnp.float32:
        return _float32_product(x, kernel)
    if platform() == "cpu":  # XLA's CPU backend runs the kernel's gradient as one matrix product only when it is written as one
        return (x.reshape(-1, x.shape[-1]) @ kernel.reshape(len(kernel), -1)).reshape(*x.shape[:-1], *kernel.shape[1:])
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


@jax.custom_vjp
def _float32_product(x: Float[Array, "*n I"], kernel: Float[Array, "I O"]) -> Float[Array, "*n O"]:
    """Half precision is summed in float32 anyway. The gradient is rounded to it first: the backward products are of half precision."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _float32_gradients(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    return jax.vjp(product, *saved)[1](g.astype(saved[0].dtype))


_float32_product.defvjp(lambda x, kernel: (_float32_product(x, kernel), (x, kernel)), _float32_gradients)


class Conv(nnx.Module):
    """Convolution with `kernel` [*window, in, out]; `padding` is symmetric, or one (before, after) pair per spatial axis.

    `float32_out`, for a window of 1: as in `Dense`.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        window: Sequence[int],
        *,
        init: Initializer,
        dtype=jnp.float32,
        stride: int = 1,
        padding: tuple[tuple[int, int], ...] | None = None,
        zero: bool = False,
        float32_out: bool = False,
    ):
        fan_in = channels_in * math.prod(window)
        self.kernel = init.uniform((*window, channels_in, channels_out), fan_in, zero)
        self.bias = init.uniform((channels_out,), fan_in, zero)
        self.stride = stride
        self.padding = tuple((n // 2, n // 2) for n in window) if padding is None else padding
        self.dtype, self.float32_out = dtype, float32_out

    def __call__(self, x: Float[Array, "N *hw I"]) -> Float[Array, "N *hw2 O"]:
        return (self.without_bias(x) + self.bias[...]).astype(jnp.float32 if self.float32_out else self.dtype)

    def without_bias(self, x: Float[Array, "N *hw I"]) -> Float[Array, "N *hw2 O"]:
        """The convolution alone, for what adds `bias` itself."""
        x = x.astype(self.dtype)
        if self.float32_out:
            return product(x, gathered(self.kernel, self.dtype).reshape(self.kernel.shape[-2:]), float32_out=True)
        if platform() == "gpu" and math.prod(self.kernel.shape[:-2]) > 1:  # a TPU makes what comes before it part of a convolution
            x = checkpoint_name(x, "conv_input")
        return convolve(x, gathered(self.kernel, self.dtype), self.stride, self.padding)


def convolve(
    x: Float[Array, "N *hw I"], kernel: Float[Array, "*k I O"], stride: int, padding: tuple[tuple[int, int], ...]
) -> Float[Array, "N *hw2 O"]:
    """Cross-correlation over the spatial axes between batch and channels; the one place where a convolution is carried out."""
    if platform() == "cpu":
        kernel, padding = _inner_taps(x.shape[1:-1], kernel, stride, padding)
    window = kernel.shape[:-2]
    if math.prod(window) == 1 and stride == 1 and not np.any(padding):
        y = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[-2:])
        return y.reshape(*x.shape[:-1], kernel.shape[-1])
    if len(window) == 3 and window[1:] == (1, 1) and stride == 1 and not np.any(padding[1:]):
        return _convolve_over_frames(x, kernel[:, 0, 0], padding[0])
    if platform() != "cpu":
        return _convolve(x, kernel, stride, padding)
    if math.prod(x.shape[1:-1]) < math.prod(window):
        return _convolve_small(x, kernel, stride, padding)
    return _convolve_on_cpu(x, kernel, stride, padding)


def _convolve(x: Array, kernel: Array, stride: int, padding: tuple[tuple[int, int], ...]) -> Array:
    spatial = "DHW"[-(kernel.ndim - 2) :]
    layout = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * len(spatial), padding, dimension_numbers=layout)


def _convolve_over_frames(x: Float[Array, "B T h w I"], kernel: Float[Array, "k I O"], padding: tuple[int, int]) -> Array:
    """Convolution along T alone, as the platform has it fastest."""
    if platform() == "tpu":
        # The axis that XLA calls the batch should be long: it would cut a short one's neighbours into pieces and copy them about.
        layout = ("DHWNC", "DHWIO", "DHWNC")
        return jax.lax.conv_general_dilated(x, kernel[None, :, None], (1, 1, 1), ((0, 0), padding, (0, 0)), dimension_numbers=layout)
    # Height and width are one axis: two-dimensional convolutions are the fast ones on CPU and GPU.
    y = convolve(x.reshape(*x.shape[:2], -1, x.shape[-1]), kernel[:, None], 1, (padding, (0, 0)))
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _inner_taps(
    spatial: tuple[int, ...], kernel: Array, stride: int, padding: tuple[tuple[int, int], ...]
) -> tuple[Array, tuple[tuple[int, int], ...]]:
    """(kernel, padding) without the taps that meet padding alone, which are most of them where the image is one pixel."""
    cut, left = [], []
    for n, k, (before, after) in zip(spatial, kernel.shape, padding, strict=False):
        steps = (n + before + after - k) // stride
        first, last = max(0, before - steps * stride), min(k, n + before)
        cut.append(slice(first, last))
        left.append((before - first, after - (k - last)))
    return kernel[tuple(cut)], tuple(left)


def _convolve_small(x: Array, kernel: Array, stride: int, padding: tuple[tuple[int, int], ...]) -> Array:
    """As `_convolve`, as one matrix product over all taps.

    Where the image is smaller than the window, XLA's CPU backend lets them change places and takes several times as long (docs/speed.md).
    """
    window = kernel.shape[:-2]
    sizes = [(n + sum(p) - k) // stride + 1 for n, p, k in zip(x.shape[1:], padding, window, strict=False)]
    # The barrier keeps XLA from computing what comes before anew for every tap.
    padded = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), *padding, (0, 0))))

    def tap(offset: tuple[int, ...]) -> Array:
        return padded[(slice(None), *(slice(o, o + stride * (n - 1) + 1, stride) for o, n in zip(offset, sizes, strict=True)))]

    taps = jnp.concatenate([tap(offset) for offset in itertools.product(*map(range, window))], axis=-1)
    return (taps.reshape(-1, taps.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])).reshape(*taps.shape[:-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_on_cpu(x: Array, kernel: Array, stride: int, padding: tuple[tuple[int, int], ...]) -> Array:
    """As `_convolve`, with a kernel gradient that is summed over slices of the batch: one XLA convolution would leave the cache."""
    return _convolve(x, kernel, stride, padding)


def _forward_on_cpu(x: Array, kernel: Array, stride: int, padding: tuple[tuple[int, int], ...]) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _backward_on_cpu(stride: int, padding: tuple[tuple[int, int], ...], saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: _convolve(x, kernel, stride, padding), x)(g)
    slices = max(1, min(8, round(x.size / CPU_SLICE), x.shape[0]))
    size = -(-x.shape[0] // slices)
    dkernel = jnp.zeros_like(kernel)
    for i in range(0, x.shape[0], size):
        part = x[i : i + size]
        dkernel += jax.linear_transpose(lambda kernel, part=part: _convolve(part, kernel, stride, padding), kernel)(g[i : i + size])[0]
    return dx, dkernel


_convolve_on_cpu.defvjp(_forward_on_cpu, _backward_on_cpu)


def _moments(x: Float[Array, "*n"], average: Callable, dtype: Any) -> tuple[Array, Array]:
    """(x - mean, variance) of float32 `x` by `average`, for a result of type `dtype`.

    In float32 the variance is that of x - mean, which costs no digits. For half precision it is E[x^2] - E[x]^2: both averages come out of
    one pass, which XLA makes part of the product or convolution before it. It loses what float32 loses of mean^2 beside the variance:
    with a mean of 30 deviations, 1e-4 of it, where bfloat16 keeps 4e-3.
    """
    mean = checkpoint_name(average(x), "moments")
    centred = x - mean
    if jnp.dtype(dtype).itemsize >= 4:
        return centred, checkpoint_name(average(jnp.square(centred)), "moments")
    return centred, jnp.maximum(checkpoint_name(average(jnp.square(x)), "moments") - jnp.square(mean), 0)


class GroupNorm(nnx.Module):
    """Normalises groups of channels over all axes between batch and channels; statistics in float32 (`_moments`).

    Give it [(B T), h, w, C] for statistics per frame and [B, T, h, w, C] for statistics over the clip.
    """

    def __init__(self, channels: int, groups: int, epsilon: float, *, dtype=jnp.float32):
        if channels % groups:
            raise ValueError(f"GroupNorm: {groups} groups do not divide {channels} channels; choose norm_groups that divides every width")
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.groups, self.epsilon, self.dtype = groups, epsilon, dtype

    def __call__(self, x: Float[Array, "N *s C"]) -> Float[Array, "N *s C"]:
        x = x.astype(jnp.float32)
        axes = tuple(range(1, x.ndim - 1))
        # Channels are averaged before groups: splitting the last axis of the activations would spoil its tiling on TPU.
        x, variance = _moments(x, lambda x: self._group_mean(x.mean(axes, keepdims=True)), self.dtype)
        y = x * (jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]) + self.bias[...]
        return y.astype(self.dtype)

    def _group_mean(self, m: Float[Array, "N *one C"]) -> Float[Array, "N *one C"]:
        grouped = m.reshape(*m.shape[:-1], self.groups, -1)
        return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(m.shape)


class LayerNorm(nnx.Module):
    """Normalises the last axis; statistics in float32 (`_moments`)."""

    epsilon = 1e-5

    def __init__(self, channels: int, *, dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        x = x.astype(jnp.float32)
        x, variance = _moments(x, lambda x: x.mean(-1, keepdims=True), self.dtype)
        y = x * jax.lax.rsqrt(variance + self.epsilon)
        return (y * self.scale[...] + self.bias[...]).astype(self.dtype)


def silu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """x * sigmoid(x)."""
    # XLA's CPU backend would round half precision after every operation. The others' fusions do not, and this form costs a GPU memory.
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype) if platform() == "cpu" else jax.nn.silu(x)


def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The exact (erf) GELU, computed in float32; jax.nn's uses erfc, which costs several times as much."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + jax.lax.erf(x32 * 0.5**0.5))).astype(x.dtype)


class Dropout(nnx.Module):
    """Zeroes a share `rate` of x and scales the rest, with the key `rng` folded with this layer's own `stream`; None is off."""

    def __init__(self, rate: float, stream: int):
        self.rate, self.stream = rate, stream

    def key(self, rng: Array) -> UInt[Array, "2"]:
        """The two words that this layer's mask comes from."""
        return jax.random.key_data(jax.random.fold_in(rng, self.stream))[:2]

    def __call__(self, x: Array, rng: Array | None) -> Array:
        if rng is None or self.rate == 0:
            return x
        position = jnp.zeros((), jnp.uint32)
        for axis in range(x.ndim):
            position = position * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        keep = random_bits(*self.key(rng), position) >= jnp.uint32(round(self.rate * 2**32))
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


def random_bits(first: Array, second: Array, position: UInt[Array, "*n"]) -> UInt[Array, "*n"]:
    """An integer hash of a key's two words and the position.

    Good enough for a mask, and it needs no communication on a mesh; `jax.random.bits` ran and compiled 3.5 times slower.
    """

    def mix(x: Array) -> Array:  # "lowbias32" (C. Wellons, Prospecting for hash functions)
        x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        return x ^ (x >> 16)

    return mix(mix(position + first) ^ second)


def _keep(*names: str) -> Callable[..., bool]:
    """A policy of `jax.checkpoint`: keep what `checkpoint_name` gave one of these names, and the results of primitives of these names.

    Of matrix products those of layers, not those of attention.
    """

    def policy(primitive, *args, **params) -> bool:
        if primitive.name == "dot_general":
            return "dot_general" in names and jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
        return (params["name"] if primitive.name == "name" else primitive.name) in names

    return policy


# What the backward pass keeps of a block; the rest of it is computed again.
REMAT = {
    "block": _keep("moments"),  # its input, and the moments of norms, which are few
    "convs": _keep("moments", "conv_general_dilated"),  # and the results of its convolutions
    # and those of its dense layers, and on a GPU of attention and what goes into convolutions: next to no product is computed twice
    "dots": _keep("moments", "conv_general_dilated", "conv_input", "dot_general", "dot_product_attention_fwd_wrapper", "attention"),
}


def recompute(call: Callable, remat: str) -> Callable:
    """`call`, to be recomputed in the backward pass as `remat` says; "none" is `call` itself."""
    return call if remat == "none" else jax.checkpoint(call, policy=REMAT[remat])


def apply(layers: nnx.List, x: Array, rng: Array | None = None) -> Array:
    """Runs `layers` in order; dropout layers receive `rng`."""
    for layer in layers:
        x = layer(x, rng) if isinstance(layer, Dropout) else layer(x)
    return x


def sinusoids(position: Float[Array, "*n"], width: int) -> Float[Array, "*n width"]:
    """Transformer sinusoids in float32, cosines first: frequency i is 10,000 ** (-i / half), half = width // 2; an odd width ends in 0."""
    half = width // 2
    frequency = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[..., None] * frequency
    out = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
    return jnp.pad(out, [(0, 0)] * position.ndim + [(0, width % 2)])
