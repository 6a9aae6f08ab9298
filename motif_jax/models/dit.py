"""A video diffusion transformer with the U-Net's interface: clip with condition channels, timestep, text and frame rate in.

DiT blocks with adaLN-zero (Peebles and Xie, arXiv 2212.09748), cross-attention to the text in each block (PixArt, arXiv
2310.00426), and a long skip from the input patches to the last projection (U-ViT, arXiv 2209.12152): noise and image
reach the output without passing through the width of a token.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from motif_jax.config import DiTConfig
from motif_jax.models.attention import Attention
from motif_jax.models.layers import Dense, Initializer, LayerNorm, recompute, sinusoids

TIMESTEP_WIDTH = 256


class Mlp(nnx.Module):
    """Dense, SiLU or GELU, Dense."""

    def __init__(self, width_in: int, inner: int, width_out: int, activation, *, init: Initializer, dtype):
        self.fc1 = Dense(width_in, inner, init=init, dtype=dtype)
        self.fc2 = Dense(inner, width_out, init=init, dtype=dtype)
        self.activation = activation

    def __call__(self, x: Float[Array, "*n I"]) -> Float[Array, "*n O"]:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nnx.Module):
    """Self-attention over all tokens of the clip, attention to the text, MLP; shift, scale and gate come from the embedding."""

    def __init__(self, config: DiTConfig, context_width: int, *, init: Initializer, dtype, implementation: str):
        width, heads = config.width, config.width // config.num_head_channels
        kwargs = {"init": init, "dtype": dtype}
        self.modulation = Dense(width, 6 * width, zero=True, **kwargs)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(width, dtype=dtype) for _ in range(3))
        self.attn1 = Attention(width, width, heads, config.num_head_channels, implementation=implementation, **kwargs)
        self.attn2 = Attention(width, context_width, heads, config.num_head_channels, implementation=implementation, **kwargs)
        self.mlp = Mlp(width, 4 * width, width, jax.nn.gelu, **kwargs)

    def __call__(
        self, x_BNC: Float[Array, "B N C"], emb_BC: Float[Array, "B C"], context_BLD: Float[Array, "B L D"]
    ) -> Float[Array, "B N C"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(jax.nn.silu(emb_BC))[:, None], 6, axis=-1)
        x_BNC = x_BNC + gate1 * self.attn1(self.norm1(x_BNC) * (1 + scale1) + shift1)
        x_BNC = x_BNC + self.attn2(self.norm2(x_BNC), context_BLD)
        return x_BNC + gate2 * self.mlp(self.norm3(x_BNC) * (1 + scale2) + shift2)


class VideoDiT(nnx.Module):
    """Tokens are patches of frames x rows x columns; every weight keeps float32, activations are `dtype`."""

    def __init__(
        self,
        config: DiTConfig,
        in_channels: int,
        out_channels: int,
        context_width: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        remat: str = "none",
        attention: str = "auto",
    ):
        init, width = Initializer(rngs), config.width
        kwargs = {"init": init, "dtype": dtype}
        cells = math.prod(config.patch)
        self.patch_embed = Dense(cells * in_channels, width, **kwargs)
        self.time_embed = Mlp(TIMESTEP_WIDTH, width, width, jax.nn.silu, **kwargs)
        self.fps_embedding = Mlp(TIMESTEP_WIDTH, width, width, jax.nn.silu, **kwargs)
        self.blocks = nnx.List([Block(config, context_width, implementation=attention, **kwargs) for _ in range(config.depth)])
        self.norm = LayerNorm(width, dtype=dtype)
        self.modulation = Dense(width, 2 * width, zero=True, **kwargs)
        self.out = Dense(width + cells * in_channels, cells * out_channels, zero=True, **kwargs)
        self.patch, self.remat, self.dtype = config.patch, remat, dtype

    def __call__(
        self,
        x_BThwC: Float[Array, "B T h w C"],
        t_B: Num[Array, " B"],
        context_BLD: Float[Array, "B L D"],
        fps_B: Num[Array, " B"],
        *,
        dropout_rng: Array | None = None,
    ) -> Float[Array, "B T h w O"]:
        """The prediction, float32. T, h and w must be multiples of the patch; there is no dropout."""
        B, T, h, w, _ = x_BThwC.shape
        pt, ph, pw = self.patch
        grid = (T // pt, h // ph, w // pw)
        patches = x_BThwC.reshape(B, grid[0], pt, grid[1], ph, grid[2], pw, -1).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        patches_BNP = patches.reshape(B, math.prod(grid), -1).astype(self.dtype)
        emb_BC = self.time_embed(sinusoids(t_B, TIMESTEP_WIDTH)) + self.fps_embedding(sinusoids(fps_B, TIMESTEP_WIDTH))
        x_BNC = self.patch_embed(patches_BNP) + _positions(grid, self.patch_embed.bias.shape[0]).astype(self.dtype)
        context_BLD = context_BLD.astype(self.dtype)
        for block in self.blocks:
            x_BNC = recompute(lambda *args, block=block: block(*args), self.remat)(x_BNC, emb_BC, context_BLD)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(emb_BC))[:, None], 2, axis=-1)
        x_BNC = self.norm(x_BNC) * (1 + scale) + shift
        y = self.out(jnp.concatenate([x_BNC, patches_BNP], axis=-1)).astype(jnp.float32)
        return y.reshape(B, *grid, pt, ph, pw, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(B, T, h, w, -1)


def _positions(grid: tuple[int, int, int], width: int) -> Float[Array, "N C"]:
    """Fixed code of (time, row, column): sinusoids of each, side by side."""
    side = width // 3
    codes = [sinusoids(jnp.arange(n, dtype=jnp.float32), k) for n, k in zip(grid, (width - 2 * side, side, side), strict=True)]
    t, y, x = (jnp.expand_dims(code, [j for j in range(3) if j != i]) for i, code in enumerate(codes))
    parts = [jnp.broadcast_to(code, (*grid, code.shape[-1])) for code in (t, y, x)]
    return jnp.concatenate(parts, axis=-1).reshape(math.prod(grid), width)
