"""What the shapes of a checkpoint's tensors say about its networks, so that a file without its YAML can be read.

Each function takes {PyTorch name: anything with a shape}, names without the network's prefix, and raises UserError where a
tensor that every such network has is not there.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from motif_jax.config import AutoencoderConfig, ImageConfig, ResamplerConfig, TextConfig, UNetConfig
from motif_jax.errors import UserError
from motif_jax.models.attention import IMAGE_TOKENS

HEAD = 64  # width of an attention head where shapes do not tell


def _shape(tensors: Mapping[str, Any], name: str, what: str, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise UserError(f"holds no {what} in the reference's names: there is no {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or 0 in shape:
        raise UserError(f"holds no {what} as the reference has it: {name} is {list(shape)}, which should have {axes} axes and be filled")
    return shape


def _count(tensors: Mapping[str, Any], pattern: str) -> int:
    """One more than the largest number that the group of `pattern` matches at the start of a name, 0 if there is none."""
    return max((int(m[1]) + 1 for name in tensors if (m := re.match(pattern, name))), default=0)


def unet_config(tensors: Mapping[str, Any]) -> UNetConfig:
    """The U-Net that these tensors belong to.

    The head width is read off `init_attn`, whose inner width is eight heads; without it, it is taken as 64.
    """
    width, channels, *_ = _shape(tensors, "input_blocks.0.0.weight", "U-Net", 4)
    mults, rates, rate = [[]], set(), 1
    for i in range(1, _count(tensors, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in tensors:
            mults.append([])
            rate *= 2
            continue
        mults[-1].append(_shape(tensors, f"input_blocks.{i}.0.in_layers.2.weight", "U-Net", 4)[0] // width)
        if f"input_blocks.{i}.1.norm.weight" in tensors:
            rates.add(rate)
    if any(len(set(level)) != 1 or len(level) != len(mults[0]) for level in mults):
        raise UserError(f"its U-Net has levels of unequal blocks (widths over {width}: {mults}), which no configuration describes")
    spatial = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"  # attention that every U-Net here has
    first = "init_attn.0.proj_in.weight"
    head = _shape(tensors, first, "U-Net", 3)[0] // 8 if first in tensors else HEAD
    if wrong := [width * level[0] for level in mults if width * level[0] % head]:
        raise UserError(f"its U-Net has a level of width {wrong[0]}, no multiple of a head's {head}; name num_head_channels in a --yaml")
    return UNetConfig(
        in_channels=channels,
        out_channels=_shape(tensors, "out.2.weight", "U-Net", 4)[0],
        model_channels=width,
        channel_mult=tuple(level[0] for level in mults),
        num_res_blocks=len(mults[0]),
        attention_resolutions=tuple(sorted(rates, reverse=True)),
        num_head_channels=head,
        transformer_depth=max(1, _count(tensors, r"middle_block\.1\.transformer_blocks\.(\d+)\.")),
        context_dim=_shape(tensors, spatial, "U-Net", 2)[1],
        temporal_conv="middle_block.0.temopral_conv.conv1.0.weight" in tensors,
        temporal_attention="middle_block.2.norm.weight" in tensors,
        addition_attention="init_attn.0.norm.weight" in tensors,
        fps_cond=any(name.startswith(("fps_embedding.", "framestride_embed.")) for name in tensors),
        image_cross_attention=any(name.endswith(".attn2.to_k_ip.weight") for name in tensors),
        image_cross_attention_scale_learnable=any(name.endswith(".attn2.alpha") for name in tensors),
    )


def autoencoder_config(tensors: Mapping[str, Any]) -> AutoencoderConfig:
    """The KL autoencoder that these tensors belong to; its scale factor is not among them."""
    ch = _shape(tensors, "encoder.conv_in.weight", "autoencoder", 4)[0]
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    widths = [_shape(tensors, f"encoder.down.{i}.block.0.conv1.weight", "autoencoder", 4)[0] for i in range(levels)]
    return AutoencoderConfig(
        factor=2 ** (levels - 1),
        z_channels=_shape(tensors, "quant_conv.weight", "autoencoder", 4)[0] // 2,
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=_count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
    )


def text_config(tensors: Mapping[str, Any]) -> TextConfig:
    """The text tower that these tensors belong to.

    OpenCLIP's published towers have heads of 64; `heads` is 0, unknown, for widths that none of them has.
    """
    vocabulary, width = _shape(tensors, "token_embedding.weight", "text tower", 2)
    return TextConfig(
        vocab_size=vocabulary,
        context_length=_shape(tensors, "positional_embedding", "text tower", 2)[0],
        width=width,
        layers=_count(tensors, r"transformer\.resblocks\.(\d+)\."),
        heads=width // HEAD if width in (512, 640, 768, 1024, 1280) else 0,
    )


def image_config(tensors: Mapping[str, Any]) -> ImageConfig:
    """The image tower that these tensors belong to; `heads` is 0, unknown, for widths that none of OpenCLIP's towers here has."""
    width, _, patch, _ = _shape(tensors, "conv1.weight", "image tower", 4)
    patches = _shape(tensors, "positional_embedding", "image tower", 2)[0] - 1
    return ImageConfig(
        size=math.isqrt(patches) * patch,
        patch=patch,
        width=width,
        layers=_count(tensors, r"transformer\.resblocks\.(\d+)\."),
        heads={768: 12, 1024: 16, 1280: 16}.get(width, 0),
        projection=_shape(tensors, "proj", "image tower", 2)[1],
    )


def resampler_config(tensors: Mapping[str, Any]) -> ResamplerConfig:
    """The resampler that these tensors belong to, its heads taken as 64 wide. Its input is as wide as the image tower."""
    queries, width = _shape(tensors, "latents", "resampler", 3)[1:]
    inner = _shape(tensors, "layers.0.0.to_q.weight", "resampler", 2)[0]
    return ResamplerConfig(
        width=width,
        depth=_count(tensors, r"layers\.(\d+)\."),
        heads=max(1, inner // HEAD),
        head_width=min(HEAD, inner),
        frames=queries // IMAGE_TOKENS,
    )
