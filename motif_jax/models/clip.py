"""The transformer that OpenCLIP's text and image towers share; attribute names are those of its checkpoints."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from motif_jax.models.attention import attention
from motif_jax.models.layers import Dense, Initializer, LayerNorm, gathered, gelu
from motif_jax.models.placement import platform


class SelfAttention(nnx.Module):
    """Multi-head self-attention with one projection for queries, keys and values (in this order)."""

    def __init__(self, width: int, heads: int, *, causal: bool, init: Initializer, dtype):
        inner = Dense(width, 3 * width, init=init)
        self.in_proj_kernel, self.in_proj_bias = inner.kernel, inner.bias
        self.out_proj = Dense(width, width, init=init, dtype=dtype)
        self.heads, self.causal, self.dtype = heads, causal, dtype

    def __call__(self, x_BLC: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        qkv = x_BLC @ gathered(self.in_proj_kernel, self.dtype) + self.in_proj_bias[...].astype(self.dtype)
        q, k, v = (a.reshape(*a.shape[:-1], self.heads, -1) for a in jnp.split(qkv, 3, axis=-1))
        implementation = "reference" if platform() == "cpu" else "xla"
        return self.out_proj(attention(q, k, v, implementation, self.causal).reshape(x_BLC.shape))


class Mlp(nnx.Module):
    def __init__(self, width: int, *, init: Initializer, dtype):
        self.c_fc = Dense(width, 4 * width, init=init, dtype=dtype)
        self.c_proj = Dense(4 * width, width, init=init, dtype=dtype)

    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        return self.c_proj(gelu(self.c_fc(x)))


class ResidualBlock(nnx.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, width: int, heads: int, *, causal: bool, init: Initializer, dtype):
        self.ln_1 = LayerNorm(width, dtype=dtype)
        self.attn = SelfAttention(width, heads, causal=causal, init=init, dtype=dtype)
        self.ln_2 = LayerNorm(width, dtype=dtype)
        self.mlp = Mlp(width, init=init, dtype=dtype)

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nnx.Module):
    """The blocks; each tower runs those that it needs."""

    def __init__(self, width: int, layers: int, heads: int, *, causal: bool, init: Initializer, dtype):
        self.resblocks = nnx.List([ResidualBlock(width, heads, causal=causal, init=init, dtype=dtype) for _ in range(layers)])
