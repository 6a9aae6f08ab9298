"""DynamiCrafter's resampler: tokens of the image tower in, 16 tokens per frame for the U-Net's image cross attention out.

Learned queries attend to the image and to themselves (Flamingo's Perceiver resampler, arXiv 2204.14198). Attribute names are
those of the reference checkpoint (`image_proj_model`).
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from motif_jax.config import ResamplerConfig
from motif_jax.models.attention import IMAGE_TOKENS, attention
from motif_jax.models.layers import Dense, Initializer, LayerNorm, apply, gelu


class PerceiverAttention(nnx.Module):
    """Attention from the queries to the image's tokens and the queries together."""

    def __init__(self, width: int, heads: int, head_width: int, *, init: Initializer, dtype, implementation: str):
        kwargs = {"bias": False, "init": init, "dtype": dtype}
        self.norm1 = LayerNorm(width, dtype=dtype)
        self.norm2 = LayerNorm(width, dtype=dtype)
        self.to_q = Dense(width, heads * head_width, **kwargs)
        self.to_kv = Dense(width, 2 * heads * head_width, **kwargs)
        self.to_out = Dense(heads * head_width, width, **kwargs)
        self.heads, self.implementation = heads, implementation

    def __call__(self, x_BSC: Float[Array, "B S C"], queries_BQC: Float[Array, "B Q C"]) -> Float[Array, "B Q C"]:
        queries_BQC = self.norm2(queries_BQC)
        kv = self.to_kv(jnp.concatenate([self.norm1(x_BSC), queries_BQC], axis=1))
        q, k, v = (a.reshape(*a.shape[:-1], self.heads, -1) for a in (self.to_q(queries_BQC), *jnp.split(kv, 2, axis=-1)))
        return self.to_out(attention(q, k, v, self.implementation).reshape(*queries_BQC.shape[:-1], -1))


class Resampler(nnx.Module):
    """`config.frames` sets of 16 tokens, frame by frame; 1 set is for all frames."""

    def __init__(
        self,
        config: ResamplerConfig,
        image_width: int,
        width_out: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        attention: str = "auto",
    ):
        width, init = config.width, Initializer(rngs)
        kwargs = {"init": init, "dtype": dtype}

        def feed_forward() -> nnx.List:
            inner = Dense(width, 4 * width, bias=False, **kwargs)
            return nnx.List([LayerNorm(width, dtype=dtype), inner, gelu, Dense(4 * width, width, bias=False, **kwargs)])

        def perceive() -> PerceiverAttention:
            return PerceiverAttention(width, config.heads, config.head_width, implementation=attention, **kwargs)

        self.latents = init.normal((1, config.frames * IMAGE_TOKENS, width), width**-0.5)
        self.proj_in = Dense(image_width, width, **kwargs)
        self.layers = nnx.List([nnx.List([perceive(), feed_forward()]) for _ in range(config.depth)])
        self.proj_out = Dense(width, width_out, **kwargs)
        self.norm_out = LayerNorm(width_out, dtype=dtype)
        self.dtype = dtype

    def __call__(self, x_BSE: Float[Array, "B S E"]) -> Float[Array, "B J D"]:
        x_BSC = self.proj_in(x_BSE)
        queries_BJC = jnp.repeat(self.latents[...].astype(self.dtype), len(x_BSE), axis=0)
        for attend, feed_forward in self.layers:
            queries_BJC = queries_BJC + attend(x_BSC, queries_BJC)
            queries_BJC = queries_BJC + apply(feed_forward, queries_BJC)
        return self.norm_out(self.proj_out(queries_BJC)).astype(jnp.float32)
