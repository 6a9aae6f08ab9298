"""Group normalisation with what surrounds it: the bias of the convolution before, SiLU and dropout after; on a GPU as Triton kernels.

XLA's kernels for this chain are bound by their instructions, and it needs more of them: the bias' gradient alone is one more pass over the
activations. Here forward and backward pass read the activations twice each, and every sum over positions is taken on the way. With
w = x + shift - mean, a = scale / sqrt(variance + epsilon) and z = a w + bias of the norm, all per image and channel (Wu and He 2018):

    y = dropout(silu(z));  dz = dropout'(silu'(z) dy);  dx = a dz + b w + c, where b and c hold the two means over a group that it subtracts
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, UInt

from motif_jax.models.layers import Dropout, apply, random_bits, silu
from motif_jax.models.placement import interpreted, kernel_rows, on_each_device

COLUMNS, ELEMENTS = 256, 8192  # channels, and positions times channels, of one program at most
FEWEST = 1024  # elements of a program, below which XLA's kernels are as good


class Chain(NamedTuple):
    """What is done to x + shift: a group norm, SiLU or not, dropout of a share `rate`; y in `dtype`, by pixel where `frames` is not 0."""

    groups: int
    epsilon: float
    silu: bool
    rate: float
    dtype: str
    frames: int


def normalised(
    layers: Sequence[nnx.Module],
    x: Float[Array, "N *s C"],
    rng: Array | None = None,
    shift: Float[Array, "*N C"] | None = None,
    by_pixel: bool = False,
) -> tuple[Float[Array, "N *s C"], Float[Array, "N *s C"]]:
    """(`layers`(x + shift), x): a GroupNorm, and `silu` and the Dropout with key `rng` where they follow it.

    The second result is x itself. Where x is needed again, use that: its gradient then joins the norm's without a pass of its own.
    by_pixel: x is [N, T, h, w, C] and the first result [N, h w, T, C], as attention along time reads it.
    """
    norm = layers[0]
    rows = kernel_rows(len(x), norm.dtype, frames_apart=x.ndim == 4) if fits(x.shape[by_pixel:]) else None
    if rows is not None:
        return in_kernels(layers, x, rng, shift, rows, by_pixel)
    moved = x if shift is None else x + shift.reshape(*shift.shape[:-1], *(1,) * (x.ndim - shift.ndim), shift.shape[-1])
    y = apply(layers, moved, rng)
    return y.reshape(*x.shape[:2], -1, x.shape[-1]).swapaxes(1, 2) if by_pixel else y, x


def in_kernels(
    layers: Sequence[nnx.Module],
    x: Array,
    rng: Array | None = None,
    shift: Array | None = None,
    rows: tuple[str, ...] = (),
    by_pixel: bool = False,
) -> tuple[Array, Array]:
    """`normalised` by the kernels, on a mesh with images split over its axes `rows`.

    Without a GPU they run in Pallas' interpreter, very slowly.
    """
    norm, *rest = layers
    N, *_, C = x.shape
    dropout = next((layer for layer in rest if isinstance(layer, Dropout) and layer.rate > 0 and rng is not None), None)
    rate, frames = 0.0 if dropout is None else dropout.rate, x.shape[1] if by_pixel else 0
    chain = Chain(norm.groups, norm.epsilon, silu in rest, rate, jnp.dtype(norm.dtype).name, frames)
    shift_NC = jnp.broadcast_to(jnp.zeros(C) if shift is None else shift.astype(jnp.float32), (N, C))
    key_2 = jnp.zeros(2, jnp.uint32) if dropout is None else dropout.key(rng)
    y, x_NSC = _on_each_device(chain, rows)(x.reshape(N, -1, C), shift_NC, norm.scale[...], norm.bias[...], key_2)
    return y if by_pixel else y.reshape(x.shape), x_NSC.reshape(x.shape)


def fits(shape: tuple[int, ...]) -> bool:
    """Whether the kernels take [N, *s, C] of this shape."""
    return math.prod(_tile(math.prod(shape[1:-1]), shape[-1])) >= FEWEST


def _tile(positions: int, channels: int) -> tuple[int, int]:
    """(positions, channels) of one program: powers of two, as Triton has them, that divide the array."""
    columns = min(channels & -channels, COLUMNS)
    return min(positions & -positions, ELEMENTS // columns), columns


def _on_each_device(chain: Chain, rows: tuple[str, ...]) -> Callable[..., tuple[Array, Array]]:
    """`_normalise` on the images of each device."""

    def call(x_NSC: Array, shift_NC: Array, scale_C: Array, bias_C: Array, key_2: Array) -> tuple[Array, Array]:
        first = jax.lax.axis_index(rows) * x_NSC.size if rows else 0  # number of the first element in the whole batch
        seed_4 = jnp.stack([*key_2, jnp.uint32(first), jnp.uint32(0)])
        if x_NSC.dtype == jnp.float32:
            return _normalise_and_return(chain, x_NSC, shift_NC, scale_C, bias_C, seed_4)
        return _normalise(chain, x_NSC, shift_NC, scale_C, bias_C, seed_4), x_NSC

    return on_each_device(call, rows, (True, True, False, False, False), (True, True))


def _run(chain: Chain, kernel: Callable, like: Array, operands: Sequence[Array], outputs: Sequence[Any]) -> list[Array]:
    """`kernel` on the tiles of `operands`: [N, S, C], by pixel [N, P, T, C], [N, C], [C] or a seed; of `outputs` None is a sum over S."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    N, S, C = like.shape
    P = S // max(chain.frames, 1)  # of a frame, where y is by pixel
    rows, columns = _tile(P, C)
    tiles = P // rows  # of a frame
    specs = {
        (N, S, C): pallas.BlockSpec((None, rows, columns), lambda j, i, n: (n, i, j)),
        (N, P, S // P, C): pallas.BlockSpec((None, rows, None, columns), lambda j, i, n: (n, i % tiles, i // tiles, j)),
        (N, C): pallas.BlockSpec((1, columns), lambda j, i, n: (n, j)),
        (1, C): pallas.BlockSpec((1, columns), lambda j, i, n: (0, j)),
        (4,): pallas.BlockSpec((4,), lambda j, i, n: (0,)),
    }
    part = pallas.BlockSpec((None, 1, columns), lambda j, i, n: (n, i, j))
    operands = [x[None] if x.shape == (C,) else x for x in operands]
    sums = jax.ShapeDtypeStruct((N, S // rows, C), jnp.float32)
    found = pallas.pallas_call(
        kernel,
        grid=(C // columns, S // rows, N),  # a GPU starts them with the first index fastest: neighbours read on in the same rows
        in_specs=[specs[x.shape] for x in operands],
        out_specs=[part if out is None else specs[out.shape] for out in outputs],
        out_shape=[sums if out is None else out for out in outputs],
        name=f"group_norm{getattr(kernel, 'func', kernel).__name__}",  # as traces show it
        compiler_params=triton.CompilerParams(num_warps=8 if rows * columns == ELEMENTS else 4),
        interpret=interpreted(),
    )(*operands)
    return [x.sum(1) if out is None else x for x, out in zip(found, outputs, strict=True)]


def _sums(x, shift, total, squares) -> None:
    u = x[...].astype(jnp.float32) + shift[...]
    total[...] = u.sum(0, keepdims=True)
    squares[...] = (u * u).sum(0, keepdims=True)


def _kept(rate: float, shape: tuple[int, ...], tile: tuple[int, int], seed) -> Array:
    """Which elements of the tile dropout keeps: as `Dropout` has it, by the element's number."""
    from jax.experimental import pallas

    j, i, n = map(pallas.program_id, range(3))
    row = (n * shape[1] + i * tile[0] + jax.lax.broadcasted_iota(jnp.int32, tile, 0)).astype(jnp.uint32)
    column = (j * tile[1] + jax.lax.broadcasted_iota(jnp.int32, tile, 1)).astype(jnp.uint32)
    return random_bits(seed[0], seed[1], row * jnp.uint32(shape[2]) + column + seed[2]) >= jnp.uint32(round(rate * 2**32))


def _forward(chain: Chain, shape: tuple[int, ...], x, shift, gain, bias, seed, y) -> None:
    z = (x[...].astype(jnp.float32) + shift[...]) * gain[...] + bias[...]
    if chain.silu:
        z = z * jax.nn.sigmoid(z)
    if chain.rate:
        z = jnp.where(_kept(chain.rate, shape, z.shape, seed), z * (1 / (1 - chain.rate)), 0)
    y[...] = z.astype(y.dtype)


def _backward(chain: Chain, shape: tuple[int, ...], x, shift, gain, bias, seed, g) -> tuple[Array, Array]:
    """(w, dz) of the tile."""
    w, dz = x[...].astype(jnp.float32) + shift[...], g[...].astype(jnp.float32)
    if chain.rate:
        dz = jnp.where(_kept(chain.rate, shape, dz.shape, seed), dz * (1 / (1 - chain.rate)), 0)
    if chain.silu:
        z = w * gain[...] + bias[...]
        sigmoid = jax.nn.sigmoid(z)
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    return w, dz


def _backward_sums(chain: Chain, shape: tuple[int, ...], x, shift, gain, bias, seed, g, total, moment) -> None:
    w, dz = _backward(chain, shape, x, shift, gain, bias, seed, g)
    total[...] = dz.sum(0, keepdims=True)
    moment[...] = (dz * w).sum(0, keepdims=True)


def _backward_input(chain: Chain, shape: tuple[int, ...], x, shift, gain, bias, seed, g, slope, offset, *rest) -> None:
    w, dz = _backward(chain, shape, x, shift, gain, bias, seed, g)
    dx = dz * gain[...] + w * slope[...] + offset[...]
    *others, out = rest
    out[...] = (dx + others[0][...] if others else dx).astype(out.dtype)


def _group_sum(chain: Chain, m_NC: Array) -> Array:
    """The sum over each channel's group."""
    grouped = m_NC.reshape(len(m_NC), chain.groups, -1)
    return jnp.broadcast_to(grouped.sum(-1, keepdims=True), grouped.shape).reshape(m_NC.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise(chain: Chain, x_NSC: Array, shift_NC: Array, scale_C: Array, bias_C: Array, seed_4: UInt[Array, "4"]) -> Array:
    """The chain on one device; seed_4: dropout's two words, the number of the first element, nothing."""
    return _normalise_and_save(chain, x_NSC, shift_NC, scale_C, bias_C, seed_4)[0]


def _normalise_and_save(chain: Chain, x_NSC: Array, shift_NC: Array, scale_C: Array, bias_C: Array, seed_4: Array):
    S, m = x_NSC.shape[1], math.prod(x_NSC.shape[1:]) // chain.groups
    total_NC, squares_NC = _run(chain, _sums, x_NSC, [x_NSC, shift_NC], [None, None])
    mean_NC = _group_sum(chain, total_NC) / m
    variance_NC = jnp.maximum(_group_sum(chain, squares_NC) / m - jnp.square(mean_NC), 0)  # as in `layers._moments`
    small = shift_NC - mean_NC, jax.lax.rsqrt(variance_NC + chain.epsilon), total_NC - S * mean_NC
    centre_NC, rate_NC, sum_NC = (checkpoint_name(a, "moments") for a in small)
    kernel = functools.partial(_forward, chain, x_NSC.shape)
    N, _, C = x_NSC.shape
    shape = (N, S // chain.frames, chain.frames, C) if chain.frames else x_NSC.shape
    out = jax.ShapeDtypeStruct(shape, chain.dtype)
    (y,) = _run(chain, kernel, x_NSC, [x_NSC, centre_NC, rate_NC * scale_C, bias_C, seed_4], [out])
    return y, (x_NSC, centre_NC, rate_NC, sum_NC, scale_C, bias_C, seed_4)


def _gradients(chain: Chain, saved: tuple[Array, ...], *g: Array) -> tuple[Array | None, ...]:
    x_NSC, centre_NC, rate_NC, sum_NC, scale_C, bias_C, seed_4 = saved
    S, m = x_NSC.shape[1], math.prod(x_NSC.shape[1:]) // chain.groups
    gain_NC = rate_NC * scale_C
    operands = [x_NSC, centre_NC, gain_NC, bias_C, seed_4, g[0]]
    dz_NC, dzw_NC = _run(chain, functools.partial(_backward_sums, chain, x_NSC.shape), x_NSC, operands, [None, None])
    slope_NC = -rate_NC * rate_NC * _group_sum(chain, gain_NC * dzw_NC) / m
    offset_NC = -rate_NC * _group_sum(chain, scale_C * dz_NC) / m
    kernel = functools.partial(_backward_input, chain, x_NSC.shape)
    out = jax.ShapeDtypeStruct(x_NSC.shape, x_NSC.dtype)
    (dx_NSC,) = _run(chain, kernel, x_NSC, [*operands, slope_NC, offset_NC, *g[1:]], [out])
    dshift_NC = gain_NC * dz_NC + slope_NC * sum_NC + S * offset_NC
    return dx_NSC, dshift_NC, (rate_NC * dzw_NC).sum(0), dz_NC.sum(0), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise_and_return(chain: Chain, x_NSC: Array, *rest: Array) -> tuple[Array, Array]:
    """(`_normalise` of x, x): the second one's gradient is added to x's in the same kernel."""
    return _normalise_and_save(chain, x_NSC, *rest)[0], x_NSC


def _normalise_return_and_save(chain: Chain, x_NSC: Array, *rest: Array):
    y_NSC, saved = _normalise_and_save(chain, x_NSC, *rest)
    return (y_NSC, x_NSC), saved


_normalise.defvjp(_normalise_and_save, _gradients)
_normalise_and_return.defvjp(_normalise_return_and_save, lambda chain, saved, g: _gradients(chain, saved, *g))
