"""Self-attention among few tokens (the frames at one pixel) on a GPU: a Triton kernel that takes several sequences at once.

cuDNN's kernels compute tiles of 64 and more queries and keys however short the sequences are, and keep sums for longer ones in float32.
Here a program holds all keys of its queries, so that the softmax needs no second pass (Vaswani et al. 2017, equation 1); the backward pass
computes the weights again instead of keeping them, as FlashAttention's does (Dao et al. 2022, appendix B).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from motif_jax.models.layers import platform

ROWS = 64  # tokens of one program


def fits(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> bool:
    """Whether `attend` takes these shapes, [N, L, H, K]: self-attention of 2, 4, ... or ROWS / 2 tokens that fill whole programs."""
    N, L, _, K = q_shape
    return q_shape == k_shape and 2 <= L <= ROWS // 2 and ROWS % L == 0 and N * L % ROWS == 0 and K in (16, 32, 64, 128)


@jax.custom_vjp
def attend(q_NLHK: Float[Array, "N L H K"], k_NLHK: Float[Array, "N L H K"], v_NLHK: Float[Array, "N L H K"]) -> Float[Array, "N L H K"]:
    """softmax(q k^T / sqrt(K)) v per sequence and head; logits and softmax in float32. On one device; where no GPU is, very slowly."""
    return _run(_forward, 1, q_NLHK, k_NLHK, v_NLHK)[0]


def _run(kernel, outputs: int, *arrays: Array) -> list[Array]:
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    N, L, H, K = arrays[0].shape
    block = pallas.BlockSpec((ROWS, K), lambda i, head: (i, head))
    flat = [x.reshape(N * L, H * K) for x in arrays]
    found = pallas.pallas_call(
        functools.partial(kernel, L),
        grid=(N * L // ROWS, H),
        in_specs=[block] * len(flat),
        out_specs=[block] * outputs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat[:outputs]],
        name=f"attention{kernel.__name__}",  # as traces show it
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=platform() == "cpu",
    )(*flat)
    return [x.reshape(N, L, H, K) for x in found]


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Of two matrices over one axis of each, in float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _weights(length: int, q_RK: Array, k_RK: Array) -> Float[Array, "R R"]:
    """Of the keys that are `length` consecutive rows with the query; zero elsewhere."""
    sequence_R = jax.lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0) // length
    logits_RR = _product(q_RK, k_RK, 1, 1) * q_RK.shape[-1] ** -0.5
    logits_RR = jnp.where(sequence_R == sequence_R.reshape(1, ROWS), logits_RR, -jnp.inf)
    weights_RR = jnp.exp(logits_RR - logits_RR.max(-1, keepdims=True))
    return weights_RR / weights_RR.sum(-1, keepdims=True)


def _forward(length: int, q, k, v, out) -> None:
    v_RK = v[...]
    out[...] = _product(_weights(length, q[...], k[...]).astype(v_RK.dtype), v_RK, 1, 0).astype(out.dtype)


def _backward(length: int, q, k, v, g, dq, dk, dv) -> None:
    q_RK, k_RK, v_RK, g_RK = q[...], k[...], v[...], g[...]
    weights_RR = _weights(length, q_RK, k_RK)
    dv[...] = _product(weights_RR.astype(g_RK.dtype), g_RK, 0, 0).astype(dv.dtype)
    dweights_RR = _product(g_RK, v_RK, 1, 1)
    dlogits_RR = weights_RR * (dweights_RR - (weights_RR * dweights_RR).sum(-1, keepdims=True)) * q_RK.shape[-1] ** -0.5
    dlogits_RR = dlogits_RR.astype(q_RK.dtype)
    dq[...] = _product(dlogits_RR, k_RK, 1, 0).astype(dq.dtype)
    dk[...] = _product(dlogits_RR, q_RK, 0, 0).astype(dk.dtype)


def _attend_and_save(*arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _run(_forward, 1, *arrays)[0], arrays  # not `attend`: `layers.REMAT` could not see what to keep


def _gradients(saved: tuple[Array, ...], g_NLHK: Array) -> tuple[Array, ...]:
    return tuple(_run(_backward, 3, *saved, g_NLHK.astype(saved[0].dtype)))


attend.defvjp(_attend_and_save, _gradients)
