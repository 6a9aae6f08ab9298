"""JAX's splash attention for TPUs with the interface of `models.attention`: no weights are stored.

It computes the softmax by blocks of keys in on-chip memory (FlashAttention, Dao et al. 2022). Its time goes with its tiles, which are as
long as fit: `benchmarks/blocks.py --effort=0` has the lengths of its schedules.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from motif_jax.models.placement import interpreted

LANES = 128
SHORTEST, WIDEST = 512, 256  # queries and keys; bytes of a head
QUERIES, KEYS, AT_ONCE = 640, 2560, 640  # of one program, and keys in one product, at most: what fits into a v5e's on-chip memory


def fits(q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether `attend` takes such queries and keys: long sequences, which fill its tiles, and narrow heads, which leave room for them."""
    return min(q_shape[1], k_shape[1]) >= SHORTEST and q_shape[3] * jnp.dtype(dtype).itemsize <= WIDEST


def attend(q_NLHK: Float[Array, "N L H K"], k_NSHK: Float[Array, "N S H K"], v_NSHK: Float[Array, "N S H K"]) -> Float[Array, "N L H K"]:
    """softmax(q k^T / sqrt(K)) v per head, on one device. Without a TPU it runs in Pallas' interpreter, very slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, queries, heads, width = q_NLHK.shape
    keys = k_NSHK.shape[1]

    block_q, blocks_q = tiles(queries, QUERIES)
    blocks_kv = -(-keys // KEYS)
    at_once, times = tiles(-(-keys // blocks_kv), AT_ONCE)
    block_kv = at_once * times
    long, short = block_q * blocks_q, block_kv * blocks_kv

    def padded(x: Array, length: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)

    q_NHLK, k_NHSK, v_NHSK = padded(q_NLHK * width**-0.5, long), padded(k_NSHK, short), padded(v_NSHK, short)
    sizes = kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=at_once,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=at_once,
        use_fused_bwd_kernel=True,
        # XLA has products' results with the tokens last, and splash takes them so: no copies between the two.
        **{f"{name}_layout": kernel.QKVLayout.SEQ_MINOR for name in "qkv"},
    )
    mask = masks.MultiHeadMask([masks.FullMask((long, short))] * heads)
    run = kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name="attention", interpret=interpreted()
    )
    # Padded keys are another segment than every query.
    padding = jnp.arange(short) >= keys
    segments = kernel.SegmentIds(q=jnp.zeros(long, jnp.int32), kv=padding.astype(jnp.int32)) if short > keys else None
    out_NHLK = jax.vmap(run, in_axes=(0, 0, 0, None))(q_NHLK, k_NHSK, v_NHSK, segments)
    return out_NHLK.swapaxes(1, 2)[:, :queries]


def tiles(length: int, most: int) -> tuple[int, int]:
    """(size, number) of equal tiles that hold `length`: the fewest of at most `most`, in LANES."""
    number = -(-length // most)
    return -(-length // (number * LANES)) * LANES, number
