"""The two transformers of the video U-Net: over the pixels of a frame and over time.

Module and attribute names are those of the reference checkpoint (VideoCrafter2), so that a weight has one path everywhere.
"""

from flax import nnx
from jaxtyping import Array, Float

from motif_jax.models import gated
from motif_jax.models.attention import IMAGE_TOKENS, Attention
from motif_jax.models.group_norm import normalised
from motif_jax.models.layers import Conv, Dense, Dropout, GroupNorm, Initializer, LayerNorm, apply, gathered, gelu, product
from motif_jax.models.placement import CLIPS, constrain, kernel_rows
from motif_jax.models.residual import Residual


class Geglu(nnx.Module):
    """value * gelu(gate) with the exact (erf) GELU; `proj` makes [value, gate]."""

    def __init__(self, width: int, inner: int, *, init: Initializer, dtype):
        self.proj = Dense(width, 2 * inner, init=init, dtype=dtype)

    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n I"]:
        # Two products, not one that is split: the backward pass need not join the halves of a very wide activation.
        kernel, bias = gathered(self.proj.kernel, self.proj.dtype), self.proj.bias[...].astype(self.proj.dtype)
        inner = kernel.shape[-1] // 2
        value = product(x, kernel[:, :inner]) + bias[:inner]
        gate = product(x, kernel[:, inner:]) + bias[inner:]
        return value * gelu(gate)


class FeedForward(nnx.Module):
    """Geglu to four times the width and back; entry 1 of `net` is the reference's dropout of rate 0."""

    def __init__(self, width: int, *, init: Initializer, dtype):
        geglu = Geglu(width, 4 * width, init=init, dtype=dtype)
        self.net = nnx.List([geglu, Dropout(0.0, 0), Dense(4 * width, width, init=init, dtype=dtype)])

    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        return apply(self.net, x)

    @property
    def bias(self) -> nnx.Param:
        """[C], of the last layer."""
        return self.net[2].bias

    def kernels(self, shape: tuple[int, ...]) -> list[Array]:
        """What x [..., C] of this shape is multiplied by, for `from_products`: values and gates are one product."""
        proj = self.net[0].proj
        return [gathered(proj.kernel, proj.dtype).reshape(shape[-1], 2, -1)]

    def from_products(self, products: list[Array], rows: tuple[str, ...] | str | None = "auto") -> Float[Array, "*n C"]:
        """As `__call__`, from the product [..., 2, I] of x, for what adds `bias` itself. rows: as in `Residual`."""
        (h,), (first, _, last) = products, self.net
        bias_jI = first.proj.bias[...].reshape(2, -1)
        if rows == "auto":
            rows = kernel_rows(len(h), last.dtype) if gated.fits((*h.shape[:-2], h.shape[-1])) else None
        if rows is not None:
            return gated.geglu_product(rows, h, bias_jI, gathered(last.kernel, last.dtype))
        h = h + bias_jI.astype(h.dtype)
        return last.without_bias(h[..., 0, :] * gelu(h[..., 1, :]))


class TransformerBlock(nnx.Module):
    """The layers of one block; the transformers below call them pre-norm and add each to their input. `image`: see `Attention`."""

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        head_width: int,
        *,
        init: Initializer,
        dtype,
        implementation: str,
        **image: bool,
    ):
        kwargs = {"init": init, "dtype": dtype}
        self.attn1 = Attention(width, width, heads, head_width, implementation=implementation, **kwargs)
        self.ff = FeedForward(width, **kwargs)
        self.attn2 = Attention(width, context_width, heads, head_width, implementation=implementation, **image, **kwargs)
        self.norm1 = LayerNorm(width, dtype=dtype)
        self.norm2 = LayerNorm(width, dtype=dtype)
        self.norm3 = LayerNorm(width, dtype=dtype)


class SpatialTransformer(nnx.Module):
    """Attention among the pixels of each frame, then from the pixels to the text.

    With `image`, the last IMAGE_TOKENS * T tokens of the context are image tokens, frame by frame; a frame sees its own.
    """

    def __init__(
        self,
        channels: int,
        head_width: int,
        depth: int,
        context_width: int,
        groups: int,
        *,
        image: bool,
        image_scale: bool,
        init: Initializer,
        dtype,
        implementation: str,
    ):
        kwargs = {"init": init, "dtype": dtype}
        block = {**kwargs, "implementation": implementation, "image": image, "image_scale": image_scale}
        heads = channels // head_width
        self.norm = GroupNorm(channels, groups, 1e-6, dtype=dtype)
        self.proj_in = Dense(channels, channels, **kwargs)
        self.transformer_blocks = nnx.List([TransformerBlock(channels, context_width, heads, head_width, **block) for _ in range(depth)])
        self.proj_out = Dense(channels, channels, zero=True, float32_out=True, **kwargs)
        self.image = image

    def __call__(self, x_BThwC: Float[Array, "B T h w C"], context_BLD: Float[Array, "B L D"]) -> Float[Array, "B T h w C"]:
        B, T, h, w, C = x_BThwC.shape
        image_NID = None
        if self.image:
            text = context_BLD.shape[1] - T * IMAGE_TOKENS
            if text < 1:
                raise ValueError(
                    f"{context_BLD.shape[1]} context tokens: image cross attention needs text and {IMAGE_TOKENS} for each of {T} frames"
                )
            context_BLD, image_BID = context_BLD[:, :text], context_BLD[:, text:]
            image_NID = image_BID.reshape(B * T, IMAGE_TOKENS, -1)
        y, x = normalised([self.norm], x_BThwC.reshape(B * T, h, w, C))
        total = Residual(self.proj_in, y.reshape(B * T, h * w, C))
        for block in self.transformer_blocks:
            total.add(block.attn1, block.norm1)
            # All frames of a clip share its text: one set of keys and values per clip, not per frame.
            total.add(block.attn2, block.norm2, context_BLD, image_NID, lead=(B, T * h * w))
            total.add(block.ff, block.norm3)
        return self.proj_out(total.sum).reshape(x_BThwC.shape) + x.reshape(x_BThwC.shape)


class TemporalTransformer(nnx.Module):
    """Attention along time at each pixel, twice; text never enters. Norm statistics cover the whole clip.

    `conv_projections` gives proj_in and proj_out the layout of a convolution of width 1, as the reference's `init_attn` has.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_width: int,
        depth: int,
        groups: int,
        *,
        conv_projections: bool,
        init: Initializer,
        dtype,
        implementation: str,
    ):
        kwargs = {"init": init, "dtype": dtype}
        inner = heads * head_width
        self.norm = GroupNorm(channels, groups, 1e-6, dtype=dtype)
        self.proj_in = Conv(channels, inner, (1,), **kwargs) if conv_projections else Dense(channels, inner, **kwargs)
        self.transformer_blocks = nnx.List(
            [TransformerBlock(inner, inner, heads, head_width, implementation=implementation, **kwargs) for _ in range(depth)]
        )
        kwargs = {**kwargs, "zero": True, "float32_out": True}
        self.proj_out = Conv(inner, channels, (1,), **kwargs) if conv_projections else Dense(inner, channels, **kwargs)

    def __call__(self, x_BThwC: Float[Array, "B T h w C"]) -> Float[Array, "B T h w C"]:
        B, T, h, w, C = x_BThwC.shape
        as_it_lies = self.transformer_blocks[0].attn1.takes_frames(T, h * w)
        y, x_BThwC = normalised([self.norm], x_BThwC, by_pixel=not as_it_lies)
        # Over `context` the pixels are split here, no longer the frames: every device sees whole trajectories.
        if as_it_lies:
            # The sum is told so, too: it is near to activations whose frames are split, and XLA would split it now this way, now that.
            axes = CLIPS, None, "context"
            y = constrain(y.reshape(B, T, h * w, C), CLIPS, "context")
            total = Residual(self.proj_in, constrain(y, *axes), axes=axes)
        else:
            total = Residual(self.proj_in, constrain(y, CLIPS, "context").reshape(B * h * w, T, C))
        for block in self.transformer_blocks:
            total.add(block.attn1, block.norm1)
            total.add(block.attn2, block.norm2)
            total.add(block.ff, block.norm3)
        y = self.proj_out(total.sum)
        y = constrain(constrain(y, *axes), CLIPS, "context") if as_it_lies else y.reshape(B, h * w, T, C).swapaxes(1, 2)
        return y.reshape(x_BThwC.shape) + x_BThwC
