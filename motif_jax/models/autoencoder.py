"""Pixels <-> latents: the KL autoencoder of Stable Diffusion, and an exact one that moves pixel blocks to channels.

Both take images in [-1, 1] and give the moments of a Gaussian; both decode unscaled latents. Attribute names of the KL
autoencoder are those of the reference checkpoint (`first_stage_model`). What its blocks add up is float32 in any `dtype`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from motif_jax.config import AutoencoderConfig
from motif_jax.models.attention import attention
from motif_jax.models.layers import Conv, GroupNorm, Initializer

NORM_GROUPS, NORM_EPSILON = 32, 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


def make_autoencoder(config: AutoencoderConfig, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> "KlAutoencoder | PixelAutoencoder":
    """The autoencoder `config.kind` names; the pixel one has no parameters."""
    return PixelAutoencoder(config) if config.kind == "pixel" else KlAutoencoder(config, rngs=rngs, dtype=dtype)


def posterior_latents(
    moments_NhwC: Float[Array, "*n h w C2"], scale_factor: float, noise_NhwC: Float[Array, "*n h w C"] | None = None
) -> Float[Array, "*n h w C"]:
    """Latents for the U-Net: (mean + std * noise) * scale_factor, or without noise the scaled mean; float32."""
    mean, log_variance = jnp.split(moments_NhwC.astype(jnp.float32), 2, axis=-1)
    if noise_NhwC is not None:
        mean = mean + jnp.exp(0.5 * log_variance) * noise_NhwC
    return mean * scale_factor


class PixelAutoencoder(nnx.Module):
    """Space to depth: a block of factor x factor pixels becomes 3 * factor**2 channels; decoding gives back the pixels exactly."""

    def __init__(self, config: AutoencoderConfig):
        if config.z_channels != 3 * config.factor**2:
            raise ValueError(f"a pixel autoencoder of factor {config.factor} has {3 * config.factor**2} channels, not {config.z_channels}")
        self.factor = config.factor

    def encode(self, x_NHWC: Float[Array, "N H W 3"]) -> Float[Array, "N h w C2"]:
        """Moments of x: the pixels as the mean, log-variance -30 (no noise)."""
        f, (N, H, W, C) = self.factor, x_NHWC.shape
        _check_size(H, W, f)
        blocks = x_NHWC.astype(jnp.float32).reshape(N, H // f, f, W // f, f, C)
        mean = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(N, H // f, W // f, f * f * C)
        return jnp.concatenate([mean, jnp.full_like(mean, LOG_VARIANCE_RANGE[0])], axis=-1)

    def decode(self, z_NhwC: Float[Array, "N h w C"]) -> Float[Array, "N H W 3"]:
        """Pixels of the latents; nothing is clamped."""
        f, (N, h, w, C) = self.factor, z_NhwC.shape
        blocks = z_NhwC.astype(jnp.float32).reshape(N, h, w, f, f, C // (f * f))
        return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(N, h * f, w * f, -1)


class ResBlock(nnx.Module):
    """Norm, swish, 3x3 convolution, twice, added to the input (through a 1x1 convolution where channels change)."""

    def __init__(self, channels_in: int, channels: int, *, init: Initializer, dtype):
        kwargs = {"init": init, "dtype": dtype}
        self.norm1 = GroupNorm(channels_in, NORM_GROUPS, NORM_EPSILON, dtype=dtype)
        self.conv1 = Conv(channels_in, channels, (3, 3), **kwargs)
        self.norm2 = GroupNorm(channels, NORM_GROUPS, NORM_EPSILON, dtype=dtype)
        self.conv2 = Conv(channels, channels, (3, 3), **kwargs)
        self.nin_shortcut = Conv(channels_in, channels, (1, 1), **kwargs) if channels != channels_in else None

    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N h w C2"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + y.astype(jnp.float32)


class AttentionBlock(nnx.Module):
    """Self-attention of one head over all pixels, added to the input."""

    def __init__(self, channels: int, *, init: Initializer, dtype):
        self.norm = GroupNorm(channels, NORM_GROUPS, NORM_EPSILON, dtype=dtype)
        self.q, self.k, self.v, self.proj_out = (Conv(channels, channels, (1, 1), init=init, dtype=dtype) for _ in range(4))

    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N h w C"]:
        N, h, w, C = x.shape
        y = self.norm(x)
        q, k, v = (layer(y).reshape(N, h * w, 1, C) for layer in (self.q, self.k, self.v))
        return x + self.proj_out(attention(q, k, v, "xla").reshape(x.shape)).astype(jnp.float32)


class Middle(nnx.Module):
    def __init__(self, channels: int, *, init: Initializer, dtype):
        self.block_1 = ResBlock(channels, channels, init=init, dtype=dtype)
        self.attn_1 = AttentionBlock(channels, init=init, dtype=dtype)
        self.block_2 = ResBlock(channels, channels, init=init, dtype=dtype)

    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N h w C"]:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nnx.Module):
    """3x3 convolution of stride 2 whose input is padded by one pixel at the right and the bottom only."""

    def __init__(self, channels: int, *, init: Initializer, dtype):
        self.conv = Conv(channels, channels, (3, 3), stride=2, padding=((0, 1), (0, 1)), init=init, dtype=dtype)

    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N h2 w2 C"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int, *, init: Initializer, dtype):
        self.conv = Conv(channels, channels, (3, 3), init=init, dtype=dtype)

    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N h2 w2 C"]:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


class Level(nnx.Module):
    """The residual blocks of one resolution and, unless it is the last, the change to the next one."""

    def __init__(self, channels_in: int, channels: int, blocks: int, resample: str, *, init: Initializer, dtype):
        kwargs = {"init": init, "dtype": dtype}
        self.block = nnx.List([ResBlock(channels_in if i == 0 else channels, channels, **kwargs) for i in range(blocks)])
        self.downsample = Downsample(channels, **kwargs) if resample == "down" else None
        self.upsample = Upsample(channels, **kwargs) if resample == "up" else None

    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N h2 w2 C2"]:
        for layer in (*self.block, self.downsample, self.upsample):
            x = x if layer is None else layer(x)
        return x


class Encoder(nnx.Module):
    def __init__(self, config: AutoencoderConfig, *, init: Initializer, dtype):
        kwargs = {"init": init, "dtype": dtype}
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = Conv(3, config.ch, (3, 3), **kwargs)
        last = len(widths) - 1
        pairs = zip([config.ch, *widths], widths, strict=False)
        self.down = nnx.List([Level(a, b, config.num_res_blocks, "down" if i < last else "", **kwargs) for i, (a, b) in enumerate(pairs)])
        self.mid = Middle(widths[-1], **kwargs)
        self.norm_out = GroupNorm(widths[-1], NORM_GROUPS, NORM_EPSILON, dtype=dtype)
        self.conv_out = Conv(widths[-1], 2 * config.z_channels, (3, 3), **kwargs)

    def __call__(self, x: Float[Array, "N H W 3"]) -> Float[Array, "N h w C2"]:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    def __init__(self, config: AutoencoderConfig, *, init: Initializer, dtype):
        kwargs = {"init": init, "dtype": dtype}
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = Conv(config.z_channels, widths[-1], (3, 3), **kwargs)
        self.mid = Middle(widths[-1], **kwargs)
        # `up` is numbered by resolution, finest first, and runs from its end.
        pairs = zip([*widths[1:], widths[-1]], widths, strict=True)
        self.up = nnx.List([Level(a, b, config.num_res_blocks + 1, "up" if i else "", **kwargs) for i, (a, b) in enumerate(pairs)])
        self.norm_out = GroupNorm(widths[0], NORM_GROUPS, NORM_EPSILON, dtype=dtype)
        self.conv_out = Conv(widths[0], 3, (3, 3), **kwargs)

    def __call__(self, z: Float[Array, "N h w C"]) -> Float[Array, "N H W 3"]:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class KlAutoencoder(nnx.Module):
    """AutoencoderKL of Stable Diffusion 1.x / 2.x (`ddconfig`): every image by itself."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        z, init = config.z_channels, Initializer(rngs)
        self.encoder = Encoder(config, init=init, dtype=dtype)
        self.decoder = Decoder(config, init=init, dtype=dtype)
        self.quant_conv = Conv(2 * z, 2 * z, (1, 1), init=init, dtype=dtype)
        self.post_quant_conv = Conv(z, z, (1, 1), init=init, dtype=dtype)
        self.factor = config.factor

    def encode(self, x_NHWC: Float[Array, "N H W 3"]) -> Float[Array, "N h w C2"]:
        """Mean and log-variance (clamped to [-30, 20]) of the posterior, float32, before any scale factor."""
        _check_size(*x_NHWC.shape[1:3], self.factor)
        moments = self.quant_conv(self.encoder(x_NHWC)).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)], axis=-1)

    def decode(self, z_NhwC: Float[Array, "N h w C"]) -> Float[Array, "N H W 3"]:
        """The image of unscaled latents (those of the U-Net divided by scale_factor), float32, not clamped."""
        return self.decoder(self.post_quant_conv(z_NhwC)).astype(jnp.float32)


def _check_size(height: int, width: int, factor: int) -> None:
    if height % factor or width % factor:
        raise ValueError(f"an image of {height}x{width} does not divide into latent cells of {factor} pixels; resize or crop it")
