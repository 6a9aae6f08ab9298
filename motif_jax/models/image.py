"""The frozen image tower of DynamiCrafter's cross attention: an image in, OpenCLIP's tokens of its patches out, before pooling.

Attribute names are those of the reference checkpoint (`embedder.model.visual`). `random` has the same layers with weights from a
fixed seed, so that small runs need no file.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from motif_jax.config import ImageConfig
from motif_jax.models.clip import Transformer
from motif_jax.models.layers import Initializer, LayerNorm, convolve, gathered

# Of the pixels in [0, 1] of CLIP's training images, RGB.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
RANDOM_SEED = 20250


class PatchEmbedding(nnx.Module):
    """A convolution without bias whose stride is its window."""

    def __init__(self, width: int, patch: int, *, init: Initializer, dtype):
        self.kernel = init.uniform((patch, patch, 3, width), 3 * patch**2)
        self.patch, self.dtype = patch, dtype

    def __call__(self, x_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        return convolve(x_BHW3.astype(self.dtype), gathered(self.kernel, self.dtype), self.patch, ((0, 0), (0, 0)))


class ImageTower(nnx.Module):
    """OpenCLIP's vision transformer up to its last block: the class token and one token for each patch, all of them returned.

    `ln_post` and `proj`, which pool these tokens, are in the published file and are kept for export; they are not used.
    """

    def __init__(self, config: ImageConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        width, init = config.width, Initializer(rngs)
        tokens = 1 + (config.size // config.patch) ** 2
        self.conv1 = PatchEmbedding(width, config.patch, init=init, dtype=dtype)
        self.class_embedding = init.normal((width,), width**-0.5)
        self.positional_embedding = init.normal((tokens, width), width**-0.5)
        self.ln_pre = LayerNorm(width, dtype=dtype)
        self.transformer = Transformer(width, config.layers, config.heads, causal=False, init=init, dtype=dtype)
        self.ln_post = LayerNorm(width, dtype=dtype)
        self.proj = init.normal((width, config.projection), width**-0.5)
        self.size, self.dtype = config.size, dtype

    def __call__(self, x_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B S E"]:
        """Images in [-1, 1] of any size; the first of the S tokens is the class token. Float32."""
        x_BhwC = self.conv1(preprocess(x_BHW3, self.size))
        first = jnp.broadcast_to(self.class_embedding[...], (len(x_BhwC), 1, x_BhwC.shape[-1])).astype(self.dtype)
        x_BSC = jnp.concatenate([first, x_BhwC.reshape(len(x_BhwC), -1, x_BhwC.shape[-1])], axis=1)
        x_BSC = self.ln_pre(x_BSC + self.positional_embedding[...].astype(self.dtype))
        for block in self.transformer.resblocks:
            x_BSC = block(x_BSC)
        return x_BSC.astype(jnp.float32)


def preprocess(x_BHW3: Float[Array, "B H W 3"], size: int) -> Float[Array, "B n n 3"]:
    """[-1, 1] -> the square, normalised image that CLIP reads; its aspect is not kept (the reference's `preprocess`)."""
    rows, columns = (jnp.asarray(_resize_matrix(n, size), jnp.float32) for n in x_BHW3.shape[1:3])
    x = jnp.einsum("yH,BHWc,xW->Byxc", rows, x_BHW3.astype(jnp.float32), columns, precision="highest")
    return ((x + 1) / 2 - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)


@functools.lru_cache(maxsize=16)
def _resize_matrix(old: int, new: int) -> np.ndarray:
    """[new, old]: an axis blurred and resampled as kornia's bicubic `resize` with aligned corners and antialias does it.

    The blur is a Gaussian of deviation (old / new - 1) / 2, mirrored at the border without repeating it; the cubic is PyTorch's, a = -0.75.
    """
    if old == new:
        return np.eye(old)
    resample = np.zeros((new, old))
    for i, place in enumerate(np.linspace(0, old - 1, new)):
        for j in range(int(place) - 1, int(place) + 3):
            resample[i, min(max(j, 0), old - 1)] += _cubic(abs(place - j))
    if old < new:
        return resample
    deviation = (old / new - 1) / 2
    reach = int(max(4 * deviation, 3)) // 2
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * deviation**2))
    blur = np.zeros((old, old))
    for j, weight in zip(range(-reach, reach + 1), weights / weights.sum(), strict=True):
        mirrored = np.abs(np.arange(old) + j)
        mirrored = np.where(mirrored > old - 1, 2 * (old - 1) - mirrored, mirrored)
        np.add.at(blur, (np.arange(old), mirrored), weight)
    return resample @ blur


def _cubic(x: float) -> float:
    a = -0.75  # PyTorch's
    if x >= 2:
        return 0.0
    return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)
