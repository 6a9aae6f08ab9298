"""TPU's splash attention (blockwise softmax in on-chip memory) with the interface of `models.attention`: no weights are stored."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LANES = 128  # sequences are padded to multiples of this
BLOCK = 512


def attend(
    q_NLHK: Float[Array, "N L H K"], k_NSHK: Float[Array, "N S H K"], v_NSHK: Float[Array, "N S H K"], interpret: bool = False
) -> Float[Array, "N L H K"]:
    """softmax(q k^T / sqrt(K)) v per head, on one device; interpret: without a TPU, very slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, queries, heads, width = q_NLHK.shape
    keys = k_NSHK.shape[1]

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, 0))).swapaxes(1, 2)

    q_NHLK, k_NHSK, v_NHSK = padded(q_NLHK * width**-0.5), padded(k_NSHK), padded(v_NSHK)
    long, short = q_NHLK.shape[2], k_NHSK.shape[2]
    block_q, block_kv = (max(b for b in range(LANES, BLOCK + 1, LANES) if n % b == 0) for n in (long, short))
    sizes = kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    mask = masks.MultiHeadMask([masks.FullMask((long, short))] * heads)
    run = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    # Padded keys are another segment than every query.
    segments = kernel.SegmentIds(q=jnp.zeros(long, jnp.int32), kv=(jnp.arange(short) >= keys).astype(jnp.int32))
    out_NHLK = jax.vmap(run, in_axes=(0, 0, 0, None))(q_NHLK, k_NHSK, v_NHSK, segments)
    return out_NHLK.swapaxes(1, 2)[:, :queries]
