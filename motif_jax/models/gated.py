"""The gated feed-forward layer of a transformer on a GPU: GEGLU and the product after it, with Triton kernels around that product.

GEGLU (Shazeer 2020) is value * gelu(gate) of the two halves of one product. The backward pass needs it again for the second product's
kernel: here the kernel that computes the halves' gradient returns it, and their sums over tokens, reading everything once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from motif_jax.models.placement import interpreted, on_each_device

COLUMNS, ELEMENTS = 256, 2048  # channels, and tokens times channels at a time, of one program at most
TURNS = 16  # at most; a program of the backward pass takes them to add up over tokens in registers


def fits(shape: tuple[int, ...]) -> bool:
    """Whether the kernels take halves [..., I] of this shape."""
    rows, turns, columns = _tile(math.prod(shape[:-1]), shape[-1])
    return columns >= 16 and rows * turns >= TURNS


def _tile(tokens: int, channels: int) -> tuple[int, int, int]:
    """(tokens at a time, times, channels) of a program: powers of two that divide the array."""
    columns, power = min(channels & -channels, COLUMNS), tokens & -tokens
    rows = min(power, ELEMENTS // columns)
    return rows, min(power // rows, TURNS), columns


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def geglu_product(rows: tuple[str, ...], h: Float[Array, "*n 2 I"], bias_jI: Float[Array, "2 I"], kernel_IO: Float[Array, "I O"]) -> Array:
    """(value * gelu(gate)) @ kernel, [*n, O], with value, gate = h + bias; on a mesh tokens lie over its axes `rows`.

    Without a GPU it runs in Pallas' interpreter, very slowly.
    """
    return _product_and_save(rows, h, bias_jI, kernel_IO)[0]


def _product_and_save(rows: tuple[str, ...], h: Array, bias_jI: Array, kernel_IO: Array) -> tuple[Array, tuple[Array, ...]]:
    (y,) = _on_each_device(rows, _forward, [None], h, bias_jI)
    return y @ kernel_IO, (h, bias_jI, kernel_IO)


def _gradients(rows: tuple[str, ...], saved: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    h, bias_jI, kernel_IO = saved
    y, dh, dbias_jI = _on_each_device(rows, _backward, [None, 2, 0], h, bias_jI, g @ kernel_IO.T)
    lead = tuple(range(g.ndim - 1))
    return dh, dbias_jI, jax.lax.dot_general(y, g, ((lead, lead), ((), ())))


geglu_product.defvjp(_product_and_save, _gradients)


def _on_each_device(rows: tuple[str, ...], kernel: Callable, outputs: Sequence[Any], h: Array, bias_jI: Array, *g: Array) -> list[Array]:
    """`_run` on the tokens of each device."""

    def call(h: Array, bias_jI: Array, *g: Array) -> list[Array]:
        found = _run(kernel, outputs, h, bias_jI, *g)
        return [jax.lax.psum(x, rows) if kind == 0 and rows else x for x, kind in zip(found, outputs, strict=True)]

    return on_each_device(call, rows, (True, False, *[True] * len(g)), [kind != 0 for kind in outputs])(h, bias_jI, *g)


def _run(kernel: Callable, outputs: Sequence[Any], h: Array, bias_jI: Array, *g: Array) -> list[Array]:
    """`kernel` on tiles; outputs: None is [*n, I], 2 is [*n, 2, I], 0 a sum over tokens, [2, I]."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    *lead, _, C = h.shape
    N = math.prod(lead)
    at_once, turns, columns = _tile(N, C)
    rows = at_once * turns if 0 in outputs else at_once
    both, one = pallas.BlockSpec((rows, 2, columns), lambda j, i: (i, 0, j)), pallas.BlockSpec((rows, columns), lambda j, i: (i, j))
    forms = {
        None: ((N, C), h.dtype, one, (*lead, C)),
        2: ((N, 2, C), h.dtype, both, h.shape),
        0: ((N // rows, 2, C), jnp.float32, pallas.BlockSpec((None, 2, columns), lambda j, i: (i, 0, j)), None),
    }
    found = pallas.pallas_call(
        functools.partial(kernel, at_once),
        grid=(C // columns, N // rows),  # as in group_norm.py
        in_specs=[both, pallas.BlockSpec((2, columns), lambda j, i: (0, j)), *[one] * len(g)],
        out_specs=[forms[kind][2] for kind in outputs],
        out_shape=[jax.ShapeDtypeStruct(*forms[kind][:2]) for kind in outputs],
        name=f"geglu{kernel.__name__}",  # as traces show it
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpreted(),
    )(h.reshape(N, 2, C), bias_jI.astype(jnp.float32), *(x.astype(h.dtype).reshape(N, C) for x in g))
    return [x.sum(0) if kind == 0 else x.reshape(forms[kind][3]) for x, kind in zip(found, outputs, strict=True)]


def _normal(x: Array) -> tuple[Array, Array]:
    """(distribution function, density) of the standard normal: erf by Abramowitz and Stegun 7.1.26, at most 1.5e-7 off; Triton has none."""
    density = jnp.exp(-0.5 * x * x)
    t = 1 / (1 + (0.3275911 * 0.5**0.5) * jnp.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    upper = 0.5 * series * density  # 1 - the distribution function of |x|
    return jnp.where(x < 0, upper, 1 - upper), density * (2 * math.pi) ** -0.5


def _forward(at_once: int, h, bias, y) -> None:
    value, gate = (h[:, j].astype(jnp.float32) + bias[j][None] for j in range(2))
    y[...] = (value * gate * _normal(gate)[0]).astype(y.dtype)


def _backward(at_once: int, h, bias, g, y, dh, dbias) -> None:
    from jax.experimental import pallas

    def turn(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        rows = pallas.ds(i * at_once, at_once)
        value, gate = (h[rows, j].astype(jnp.float32) + bias[j][None] for j in range(2))
        dy = g[rows].astype(jnp.float32)
        share, density = _normal(gate)
        y[rows] = (value * gate * share).astype(y.dtype)
        found = dy * gate * share, dy * value * (share + gate * density)
        for j in range(2):
            dh[rows, j] = found[j].astype(dh.dtype)
        return sums[0] + found[0], sums[1] + found[1]

    zeros = jnp.zeros((at_once, y.shape[-1]), jnp.float32)
    for j, total in enumerate(jax.lax.fori_loop(0, y.shape[0] // at_once, turn, (zeros, zeros))):
        dbias[j] = total.sum(0)
