"""Self-attention among few tokens (the frames at one pixel) on a GPU: a Triton kernel that takes several sequences at once.

cuDNN's kernels compute tiles of 64 and more queries and keys however short the sequences are, and keep sums for longer ones in float32.
Here a program holds all keys of its queries, so that the softmax needs no second pass (Vaswani et al. 2017, equation 1); the backward pass
computes the weights again instead of keeping them, as FlashAttention's does (Dao et al. 2022, appendix B).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from motif_jax.models.placement import interpreted

ROWS = 64  # tokens of one program


def fits(N: int, L: int, K: int) -> bool:
    """Whether `attend` takes N sequences of 2, 4, ... or ROWS / 2 tokens that fill whole programs, with heads K wide."""
    return 2 <= L <= ROWS // 2 and ROWS % L == 0 and N * L % ROWS == 0 and K in (16, 32, 64, 128)


@jax.custom_vjp
def attend(qkv_NLjHK: Float[Array, "N L 3 H K"]) -> Float[Array, "N L H K"]:
    """softmax(q k^T / sqrt(K)) v per sequence and head; logits and softmax in float32. On one device.

    Queries, keys and values side by side are the result of one product, and so is their gradient's part in it.
    Without a GPU it runs in Pallas' interpreter, very slowly.
    """
    return _attend_and_save(qkv_NLjHK)[0]


def _run(kernel, qkv_NLjHK: Array, *arrays: Array, out_shape: tuple[int, ...]) -> Array:
    """`kernel` on arrays [N, L, H, K] and [N, L, 3, H, K], by ROWS tokens and heads."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    N, L, _, H, K = qkv_NLjHK.shape
    specs = {
        4: ((N * L, H * K), pallas.BlockSpec((ROWS, K), lambda head, i: (i, head))),
        5: ((N * L, 3, H * K), pallas.BlockSpec((ROWS, 3, K), lambda head, i: (i, 0, head))),
    }
    operands = (qkv_NLjHK, *arrays)
    shape, spec = specs[len(out_shape)]
    return pallas.pallas_call(
        functools.partial(kernel, L),
        grid=(H, N * L // ROWS),  # as in group_norm.py
        in_specs=[specs[x.ndim][1] for x in operands],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(shape, qkv_NLjHK.dtype),
        name=f"attention{kernel.__name__}",  # as traces show it
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpreted(),
    )(*(x.reshape(specs[x.ndim][0]) for x in operands)).reshape(out_shape)


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Of two matrices over one axis of each, in float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _weights(hidden_RR: Array, q_RK: Array, k_RK: Array) -> Float[Array, "R R"]:
    logits_RR = jnp.where(hidden_RR, -jnp.inf, _product(q_RK, k_RK, 1, 1) * q_RK.shape[-1] ** -0.5)
    weights_RR = jnp.exp(logits_RR - logits_RR.max(-1, keepdims=True))
    return weights_RR / weights_RR.sum(-1, keepdims=True)


def result(hidden_RR: Array, q_RK: Array, k_RK: Array, v_RK: Array) -> tuple[Float[Array, "R K"]]:
    """Attention of one head: queries (rows of `hidden`) do not see keys (columns) where that is true."""
    return (_product(_weights(hidden_RR, q_RK, k_RK).astype(v_RK.dtype), v_RK, 1, 0).astype(v_RK.dtype),)


def gradients(hidden_RR: Array, q_RK: Array, k_RK: Array, v_RK: Array, g_RK: Array) -> tuple[Array, Array, Array]:
    """Those of q, k and v, [R, K], from that of `result`."""
    weights_RR = _weights(hidden_RR, q_RK, k_RK)
    dweights_RR = _product(g_RK, v_RK, 1, 1)
    dlogits_RR = weights_RR * (dweights_RR - (weights_RR * dweights_RR).sum(-1, keepdims=True)) * q_RK.shape[-1] ** -0.5
    dlogits_RR = dlogits_RR.astype(q_RK.dtype)
    dq, dk = _product(dlogits_RR, k_RK, 1, 0), _product(dlogits_RR, q_RK, 0, 0)
    dv = _product(weights_RR.astype(g_RK.dtype), g_RK, 0, 0)
    return dq.astype(q_RK.dtype), dk.astype(k_RK.dtype), dv.astype(v_RK.dtype)


def _hidden(length: int) -> Array:
    """[ROWS, ROWS]: whether a key is in another sequence than the query; a sequence is `length` consecutive rows."""
    sequence_R = jax.lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0) // length
    return sequence_R != sequence_R.reshape(1, ROWS)


def _forward(length: int, qkv, out) -> None:
    (out[...],) = result(_hidden(length), *(qkv[:, j] for j in range(3)))


def _backward(length: int, qkv, g, dqkv) -> None:
    for j, x in enumerate(gradients(_hidden(length), *(qkv[:, j] for j in range(3)), g[...])):
        dqkv[:, j] = x


def _attend_and_save(qkv_NLjHK: Array) -> tuple[Array, Array]:
    N, L, _, H, K = qkv_NLjHK.shape
    return checkpoint_name(_run(_forward, qkv_NLjHK, out_shape=(N, L, H, K)), "attention"), qkv_NLjHK


def _backward_pass(qkv_NLjHK: Array, g_NLHK: Array) -> tuple[Array]:
    return (_run(_backward, qkv_NLjHK, g_NLHK.astype(qkv_NLjHK.dtype), out_shape=qkv_NLjHK.shape),)


attend.defvjp(_attend_and_save, _backward_pass)
