"""Self-attention along the frames at each pixel on a TPU: a Pallas kernel that reads clips as they lie, [B, T, P, C].

XLA would bring the frames of a pixel together first, pad 16 of them to 128, and write all weights to memory in layouts that it copies to
and from. Here the frames of a few pixels are one product, in which pixels do not see each other, and nothing but the result is written.
As in `models.packed`, a program holds all keys of its queries (Vaswani et al. 2017, equation 1), and the backward pass computes the weights
again (Dao et al. 2022, appendix B).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from motif_jax.models.packed import gradients, result
from motif_jax.models.placement import interpreted

PIXELS = 8  # of one product: a tile's rows
FRAMES = 32  # at most: PIXELS * FRAMES is the size of a v6e's matrix unit
ELEMENTS = 2**18  # of one array in a program, unless PIXELS are more: seven of them, twice, fit into a v5e's on-chip memory


def fits(T: int, P: int) -> bool:
    """Whether `attend` takes T frames of P pixels."""
    return 2 <= T <= FRAMES and P % PIXELS == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    width: int, q_BTPC: Float[Array, "B T P C"], k_BTPC: Float[Array, "B T P C"], v_BTPC: Float[Array, "B T P C"]
) -> Float[Array, "B T P C"]:
    """softmax(q k^T / sqrt(K)) v over T, per pixel and head of `width` channels; logits and softmax in float32. On one device.

    Without a TPU it runs in Pallas' interpreter, very slowly.
    """
    return _attend_and_save(width, q_BTPC, k_BTPC, v_BTPC)[0]


def _run(function: Callable, width: int, arrays: tuple[Array, ...], outputs: int) -> list[Array]:
    """`function` of what is hidden and the arrays, [T * PIXELS, width] at a time."""
    from jax.experimental import pallas

    B, T, P, C = arrays[0].shape
    rows = T * PIXELS
    pixels = max(n for n in range(PIXELS, max(PIXELS, ELEMENTS // (T * C)) + 1, PIXELS) if P % n == 0)
    pixel = jnp.arange(rows) % PIXELS
    apart = (pixel[:, None] != pixel).astype(jnp.int32)

    def kernel(apart, *refs) -> None:
        hidden = apart[...] != 0
        for i in range(0, pixels, PIXELS):
            given = [ref[:, i : i + PIXELS].reshape(rows, C) for ref in refs[: len(arrays)]]
            for j in range(0, C, width):
                found = function(hidden, *(x[:, j : j + width] for x in given))
                for ref, x in zip(refs[len(arrays) :], found, strict=True):
                    ref[:, i : i + PIXELS, j : j + width] = x.reshape(T, PIXELS, width)

    clip = pallas.BlockSpec((None, T, pixels, C), lambda b, i: (b, 0, i, 0))
    return pallas.pallas_call(
        kernel,
        grid=(B, P // pixels),
        in_specs=[pallas.BlockSpec((rows, rows), lambda b, i: (0, 0)), *[clip] * len(arrays)],
        out_specs=[clip] * outputs,
        out_shape=[jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)] * outputs,
        name=f"along_frames_{function.__name__}",  # as traces show it
        interpret=interpreted(),
    )(apart, *arrays)


def _attend_and_save(width: int, *qkv_BTPC: Array) -> tuple[Array, tuple[Array, ...]]:
    (out,) = _run(result, width, qkv_BTPC, 1)
    return checkpoint_name(out, "attention"), qkv_BTPC


def _backward(width: int, qkv_BTPC: tuple[Array, ...], g_BTPC: Array) -> tuple[Array, ...]:
    return tuple(_run(gradients, width, (*qkv_BTPC, g_BTPC.astype(qkv_BTPC[0].dtype)), 3))


attend.defvjp(_attend_and_save, _backward)
