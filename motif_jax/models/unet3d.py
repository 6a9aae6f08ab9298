"""The VideoCrafter2 U-Net: noisy latent clip with condition channels, timestep, text and frame rate in; prediction out.

Module and attribute names are those of the reference checkpoint, including its spelling `temopral_conv`.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from motif_jax.config import UNetConfig
from motif_jax.models.group_norm import normalised
from motif_jax.models.layers import REMAT, Conv, Dense, Dropout, GroupNorm, Initializer, apply, recompute, silu, sinusoids
from motif_jax.models.placement import CLIPS, constrain
from motif_jax.models.transformer import SpatialTransformer, TemporalTransformer

NORM_EPSILON = 1e-5  # of every norm here; the transformers' group norms have 1e-6
INIT_ATTENTION_HEADS = 8  # fixed in the reference, whatever the width


class TemporalConv(nnx.Module):
    """Four stages of norm, SiLU, dropout and a convolution over three frames, added to the input (C -> C)."""

    def __init__(self, channels: int, groups: int, dropout: float, streams: Iterator[int], *, init: Initializer, dtype):
        def stage(dropouts: list[Dropout], zero: bool = False) -> nnx.List:
            norm = GroupNorm(channels, groups, NORM_EPSILON, dtype=dtype)
            conv = Conv(channels, channels, (3, 1, 1), zero=zero, init=init, dtype=dtype)
            return nnx.List([norm, silu, *dropouts, conv])

        self.conv1 = stage([])
        self.conv2 = stage([Dropout(dropout, next(streams))])
        self.conv3 = stage([Dropout(dropout, next(streams))])
        self.conv4 = stage([Dropout(dropout, next(streams))], zero=True)

    def __call__(self, x_BThwC: Float[Array, "B T h w C"], rng: Array | None) -> Float[Array, "B T h w C"]:
        y, bias = x_BThwC, None
        for i, (*before, conv) in enumerate((self.conv1, self.conv2, self.conv3, self.conv4)):
            y, given = normalised(before, y, rng, bias)
            y, bias = conv.without_bias(y), conv.bias[...]
            if i == 0:
                x_BThwC = given
        return x_BThwC + (y + bias)


class ResBlock(nnx.Module):
    """Two convolutions per frame around the added embedding, the skip, then the temporal convolution."""

    def __init__(
        self, channels_in: int, channels: int, emb_width: int, config: UNetConfig, streams: Iterator[int], *, init: Initializer, dtype
    ):
        kwargs = {"init": init, "dtype": dtype}
        groups = config.norm_groups
        self.in_layers = nnx.List(
            [GroupNorm(channels_in, groups, NORM_EPSILON, dtype=dtype), silu, Conv(channels_in, channels, (3, 3), **kwargs)]
        )
        self.emb_layers = nnx.List([silu, Dense(emb_width, channels, **kwargs)])
        self.out_layers = nnx.List(
            [
                GroupNorm(channels, groups, NORM_EPSILON, dtype=dtype),
                silu,
                Dropout(config.dropout, next(streams)),
                Conv(channels, channels, (3, 3), zero=True, **kwargs),
            ]
        )
        self.skip_connection = Conv(channels_in, channels, (1, 1), float32_out=True, **kwargs) if channels != channels_in else None
        self.temopral_conv = TemporalConv(channels, groups, config.temporal_dropout, streams, **kwargs) if config.temporal_conv else None

    def __call__(
        self, x_BThwC: Float[Array, "B T h w C"], emb_BE: Float[Array, "B E"], rng: Array | None = None
    ) -> Float[Array, "B T h w C2"]:
        B, T, h, w, C = x_BThwC.shape
        *before, conv = self.in_layers
        y, x = normalised(before, x_BThwC.reshape(B * T, h, w, C))
        emb_BC = apply(self.emb_layers, emb_BE) + conv.bias[...]
        y = conv.without_bias(y)
        *before, conv = self.out_layers
        y, _ = normalised(before, y, rng, emb_BC.repeat(T, 0))
        y = conv(y).astype(jnp.float32) + (x if self.skip_connection is None else self.skip_connection(x))
        y = y.reshape(B, T, *y.shape[1:])
        return y if self.temopral_conv is None else self.temopral_conv(y, rng)


class Downsample(nnx.Module):
    """Halves height and width: 3x3 convolution, stride 2, one pixel of padding on every side."""

    def __init__(self, channels: int, *, init: Initializer, dtype):
        self.op = Conv(channels, channels, (3, 3), stride=2, init=init, dtype=dtype)

    def __call__(self, x_BThwC: Float[Array, "B T h w C"]) -> Float[Array, "B T h2 w2 C"]:
        return _per_frame(self.op, x_BThwC)


class Upsample(nnx.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int, *, init: Initializer, dtype):
        self.conv = Conv(channels, channels, (3, 3), init=init, dtype=dtype)

    def __call__(self, x_BThwC: Float[Array, "B T h w C"]) -> Float[Array, "B T h2 w2 C"]:
        return _per_frame(self.conv, x_BThwC.repeat(2, axis=2).repeat(2, axis=3))


def _per_frame(layer: Callable, x_BThwC: Array) -> Array:
    B, T = x_BThwC.shape[:2]
    y = layer(x_BThwC.reshape(B * T, *x_BThwC.shape[2:]))
    return y.reshape(B, T, *y.shape[1:])


class UNet3D(nnx.Module):
    """The denoising network of VideoCrafter2 (`unet_config`); see `__call__` for its arrays.

    remat: what the backward pass recomputes of every residual block and transformer, "none" or a key of `layers.REMAT`.
    Raises ValueError for a `remat` it does not know.
    """

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, remat: str = "none", attention: str = "auto"):
        if remat not in ("none", *REMAT):
            raise ValueError(f"remat={remat!r}: must be 'none' or one of {', '.join(map(repr, REMAT))}")
        self.config, self.dtype, self.remat = config, dtype, remat
        kwargs = {"init": Initializer(rngs), "dtype": dtype}
        streams = itertools.count()  # one dropout stream per dropout layer
        base, emb_width = config.model_channels, 4 * config.model_channels

        def embedding() -> nnx.List:
            # A few numbers per clip: float32 costs nothing here.
            options = {**kwargs, "dtype": jnp.float32}
            return nnx.List([Dense(base, emb_width, **options), silu, Dense(emb_width, emb_width, **options)])

        self.time_embed = embedding()
        if config.fps_cond:
            self.fps_embedding = embedding()

        def res_block(channels_in: int, channels: int) -> ResBlock:
            return ResBlock(channels_in, channels, emb_width, config, streams, **kwargs)

        def transformers(channels: int) -> list[nnx.Module]:
            head, depth, groups = config.num_head_channels, config.transformer_depth, config.norm_groups
            options = {**kwargs, "implementation": attention}
            image = {"image": config.image_cross_attention, "image_scale": config.image_cross_attention_scale_learnable}
            found: list[nnx.Module] = [SpatialTransformer(channels, head, depth, config.context_dim, groups, **image, **options)]
            if config.temporal_attention:
                found.append(TemporalTransformer(channels, channels // head, head, depth, groups, conv_projections=False, **options))
            return found

        if config.addition_attention:
            self.init_attn = nnx.List(
                [
                    TemporalTransformer(
                        base,
                        INIT_ATTENTION_HEADS,
                        config.num_head_channels,
                        config.transformer_depth,
                        config.norm_groups,
                        conv_projections=True,
                        implementation=attention,
                        **kwargs,
                    )
                ]
            )

        blocks = [nnx.List([Conv(config.in_channels, base, (3, 3), init=kwargs["init"])])]
        skips, channels, rate, last = [base], base, 1, len(config.channel_mult) - 1
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                layers = [res_block(channels, mult * base)]
                channels = mult * base
                if rate in config.attention_resolutions:
                    layers += transformers(channels)
                blocks.append(nnx.List(layers))
                skips.append(channels)
            if level < last:
                blocks.append(nnx.List([Downsample(channels, **kwargs)]))
                skips.append(channels)
                rate *= 2
        self.input_blocks = nnx.List(blocks)
        self.middle_block = nnx.List([res_block(channels, channels), *transformers(channels), res_block(channels, channels)])

        blocks = []
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = [res_block(channels + skips.pop(), mult * base)]
                channels = mult * base
                if rate in config.attention_resolutions:
                    layers += transformers(channels)
                if level and i == config.num_res_blocks:
                    layers.append(Upsample(channels, **kwargs))
                    rate //= 2
                blocks.append(nnx.List(layers))
        self.output_blocks = nnx.List(blocks)
        # Both ends are float32: few channels, so it costs little.
        norm = GroupNorm(channels, config.norm_groups, NORM_EPSILON)
        self.out = nnx.List([norm, silu, Conv(channels, config.out_channels, (3, 3), zero=True, init=kwargs["init"])])

    def __call__(
        self,
        x_BThwC: Float[Array, "B T h w C"],
        t_B: Num[Array, " B"],
        context_BLD: Float[Array, "B L D"],
        fps_B: Num[Array, " B"] | None = None,
        *,
        dropout_rng: Array | None = None,
    ) -> Float[Array, "B T h w C2"]:
        """The network's prediction in float32.

        x_BThwC: noisy latent, then condition channels. t_B: timestep in [0, N). context_BLD: text tokens,
        followed by 16 image tokens per frame with image_cross_attention.
        fps_B: frames per second of the clip, 16 when None (the reference's default). dropout_rng: None turns dropout off.
        Raises ValueError when channels or grid do not fit the configuration.
        """
        self._check(x_BThwC, context_BLD)
        emb_BE = apply(self.time_embed, sinusoids(t_B, self.config.model_channels))
        if self.config.fps_cond:
            fps_B = jnp.full(t_B.shape, 16.0) if fps_B is None else fps_B
            emb_BE = emb_BE + apply(self.fps_embedding, sinusoids(fps_B, self.config.model_channels))
        context_BLD = context_BLD.astype(self.dtype)

        def run(layers: nnx.List, x: Array) -> Array:
            for layer in layers:  # what they add up in x is float32, whatever they compute in
                x = constrain(self._run(layer, x, emb_BE, context_BLD, dropout_rng).astype(jnp.float32), CLIPS, "context")
            return x

        x, skips = x_BThwC.astype(jnp.float32), []
        for i, layers in enumerate(self.input_blocks):
            x = run(layers, x)
            if i == 0 and self.config.addition_attention:
                x = run(self.init_attn, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for layers in self.output_blocks:
            x = run(layers, jnp.concatenate([x, skips.pop()], axis=-1))
        return _per_frame(lambda y: apply(self.out, y), x).astype(jnp.float32)

    def _run(self, layer: nnx.Module, x: Array, emb_BE: Array, context_BLD: Array, rng: Array | None) -> Array:
        match layer:
            case ResBlock():
                call, args = layer, (emb_BE, rng)
            case SpatialTransformer():
                call, args = layer, (context_BLD,)
            case TemporalTransformer():
                call, args = layer, ()
            case Conv():
                return _per_frame(layer, x)
            case _:
                return layer(x)
        return recompute(lambda x, *args: call(x, *args), self.remat)(x, *args)

    def _check(self, x_BThwC: Array, context_BLD: Array) -> None:
        config, (_, _, h, w, channels) = self.config, x_BThwC.shape
        unit = 2 ** (len(config.channel_mult) - 1)
        if channels != config.in_channels:
            raise ValueError(
                f"the U-Net takes {config.in_channels} channels, not {channels}; set unet.in_channels or the condition to match"
            )
        if h % unit or w % unit:
            raise ValueError(f"a latent of {h}x{w} cannot be halved {len(config.channel_mult) - 1} times; use multiples of {unit}")
        if context_BLD.shape[-1] != config.context_dim:
            raise ValueError(f"text tokens are {context_BLD.shape[-1]} wide, not unet.context_dim={config.context_dim}")
