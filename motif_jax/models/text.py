"""Frozen text towers: token ids [B, L] in, tokens for the U-Net's cross attention [B, L, D] out, float32.

`words` needs no weights: a fixed random vector per token id plus a position code. `openclip` is the text half of OpenCLIP
ViT-H/14 as VideoCrafter2 uses it; attribute names are those of the reference checkpoint (`cond_stage_model.model`).
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from motif_jax.config import TextConfig
from motif_jax.models.clip import Transformer
from motif_jax.models.layers import Initializer, LayerNorm, sinusoids
from motif_jax.models.placement import CLIPS, constrain

WORDS_SEED = 20250


def make_text_tower(config: TextConfig, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> "WordsTower | OpenClipTower":
    """The tower `config.kind` names; `words` has no parameters."""
    return WordsTower(config) if config.kind == "words" else OpenClipTower(config, rngs=rngs, dtype=dtype)


class WordsTower(nnx.Module):
    """A standard normal vector per token id, the same in every process, plus sinusoids of the position."""

    def __init__(self, config: TextConfig):
        self.vocab_size, self.width = config.vocab_size, config.width

    def __call__(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        table = jnp.asarray(_word_vectors(self.vocab_size, self.width))
        return table[tokens_BL] + sinusoids(jnp.arange(tokens_BL.shape[-1], dtype=jnp.float32), self.width)


@functools.lru_cache(maxsize=4)
def _word_vectors(vocab_size: int, width: int) -> np.ndarray:
    # RandomState's streams are frozen across NumPy versions, and stored embeddings must stay those of a later run.
    return np.random.RandomState(WORDS_SEED).standard_normal((vocab_size, width)).astype(np.float32)


class OpenClipTower(nnx.Module):
    """OpenCLIP's text transformer up to the penultimate block, then the final norm; every position is returned.

    The last block, `text_projection` and `logit_scale` are in the published file and are kept for export; they are not used.
    """

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        width, init = config.width, Initializer(rngs)
        self.token_embedding = Embedding(config.vocab_size, width, init=init)
        self.positional_embedding = init.normal((config.context_length, width), 0.01)
        self.transformer = Transformer(width, config.layers, config.heads, causal=True, init=init, dtype=dtype)
        self.ln_final = LayerNorm(width, dtype=dtype)
        self.text_projection = init.normal((width, width), width**-0.5)
        self.logit_scale = nnx.Param(jnp.asarray(np.log(1 / 0.07), jnp.float32))
        self.dtype = dtype

    def __call__(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        x_BLC = (self.token_embedding(tokens_BL) + self.positional_embedding[: tokens_BL.shape[-1]]).astype(self.dtype)
        for block in list(self.transformer.resblocks)[:-1]:
            x_BLC = block(x_BLC)
        return self.ln_final(x_BLC).astype(jnp.float32)


class Embedding(nnx.Module):
    """One row of `embedding` [vocabulary, width] per token id."""

    def __init__(self, vocab_size: int, width: int, *, init: Initializer):
        self.embedding = init.normal((vocab_size, width), 0.02)

    def __call__(self, tokens: Int[Array, "*n"]) -> Float[Array, "*n D"]:
        return constrain(self.embedding[...][tokens], CLIPS)  # not the table is moved between devices, but the rows found in it
