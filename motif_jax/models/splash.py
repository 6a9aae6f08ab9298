"""TPU's splash attention (blockwise softmax in on-chip memory) with the interface of `models.attention`: no weights are stored."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LANES = 128  # sequences are padded to multiples of this
QUERIES, KEYS, AT_ONCE = 640, 2560, 640  # of one program, and keys in one product, at most: what fits into a v5e's on-chip memory


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
    block_q, block_kv = _block(long, QUERIES), _block(short, KEYS)
    sizes = kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=_block(block_kv, AT_ONCE),
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=_block(block_kv, AT_ONCE),
        use_fused_bwd_kernel=True,
        # XLA has products' results with the tokens last, and splash takes them so: no copies between the two.
        **{f"{name}_layout": kernel.QKVLayout.SEQ_MINOR for name in "qkv"},
    )
    mask = masks.MultiHeadMask([masks.FullMask((long, short))] * heads)
    run = kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name="attention", interpret=interpret
    )
    # Padded keys are another segment than every query.
    padding = jnp.arange(short) >= keys
    segments = kernel.SegmentIds(q=jnp.zeros(long, jnp.int32), kv=padding.astype(jnp.int32)) if short > keys else None
    out_NHLK = jax.vmap(run, in_axes=(0, 0, 0, None))(q_NHLK, k_NHSK, v_NHSK, segments)
    return out_NHLK.swapaxes(1, 2)[:, :queries]


def _block(length: int, most: int) -> int:
    """The largest multiple of LANES that divides `length`, which is one, up to `most`."""
    return max(size for size in range(LANES, most + 1, LANES) if length % size == 0)
