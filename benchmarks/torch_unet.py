"""VideoCrafter2's U-Net in PyTorch, written from its description: the other side of checks and benchmarks.

    UNet(in_channels=8)(x_BCTHW, t_B, context_BLD, fps_B) -> [B, C, T, H, W]

Keyword arguments are named as in the reference's YAML and default to the published model; names and shapes of the state_dict
are the reference's. Nothing here knows of JAX.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def sinusoids(position: torch.Tensor, width: int) -> torch.Tensor:
    """[B] -> [B, width], cosines first."""
    half = width // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=position.device) / half)
    angle = position.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Norm32(nn.GroupNorm):
    """A group norm in float32 whatever the activations are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int, head_width: int):
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(context_width, inner, bias=False)
        self.to_v = nn.Linear(context_width, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(0.0))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Geglu(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(Geglu(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Block(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int, head_width: int):
        super().__init__()
        self.attn1 = Attention(width, width, heads, head_width)
        self.ff = FeedForward(width)
        self.attn2 = Attention(width, context_width, heads, head_width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """[N, C, H, W] with context [N, L, D]; N is (clip, frame)."""

    def __init__(self, channels: int, head_width: int, depth: int, context_width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        heads = channels // head_width
        self.transformer_blocks = nn.ModuleList([Block(channels, context_width, heads, head_width) for _ in range(depth)])
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        y = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            y = block(y, context)
        return x + self.proj_out(y).transpose(1, 2).unflatten(2, x.shape[2:])


class TemporalTransformer(nn.Module):
    """[B, C, T, H, W]; both attentions of a block are among the frames of a pixel. `conv`: projections as width-1 convolutions."""

    def __init__(self, channels: int, heads: int, head_width: int, depth: int, conv: bool = False):
        super().__init__()
        inner = heads * head_width
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv1d(channels, inner, 1) if conv else nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList([Block(inner, inner, heads, head_width) for _ in range(depth)])
        self.proj_out = zeroed(nn.Conv1d(inner, channels, 1) if conv else nn.Linear(inner, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def project(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
            return F.linear(y, layer.weight.flatten(1), layer.bias)

        b, _, t, h, w = x.shape
        y = project(self.proj_in, self.norm(x).permute(0, 3, 4, 2, 1).reshape(b * h * w, t, -1))
        for block in self.transformer_blocks:
            y = block(y)
        return x + project(self.proj_out, y).reshape(b, h, w, t, -1).permute(0, 4, 3, 1, 2)


class TemporalConv(nn.Module):
    def __init__(self, channels: int, dropout: float):
        super().__init__()

        def stage(*between: nn.Module) -> nn.Sequential:
            return nn.Sequential(
                nn.GroupNorm(32, channels), nn.SiLU(), *between, nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
            )

        self.conv1 = stage()
        self.conv2, self.conv3, self.conv4 = (stage(nn.Dropout(dropout)) for _ in range(3))
        zeroed(self.conv4[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv4(self.conv3(self.conv2(self.conv1(x))))


class ResBlock(nn.Module):
    """[(B T), C, H, W] with emb [B, E]."""

    def __init__(self, channels_in: int, channels: int, emb_width: int, dropout: float, temporal_conv: bool, temporal_dropout: float):
        super().__init__()
        self.in_layers = nn.Sequential(Norm32(32, channels_in), nn.SiLU(), nn.Conv2d(channels_in, channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_width, channels))
        last = zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.out_layers = nn.Sequential(Norm32(32, channels), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if channels == channels_in else nn.Conv2d(channels_in, channels, 1)
        if temporal_conv:
            self.temopral_conv = TemporalConv(channels, temporal_dropout)  # as the checkpoints spell it

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        frames = x.shape[0] // emb.shape[0]
        y = self.in_layers(x) + self.emb_layers(emb).repeat_interleave(frames, 0)[:, :, None, None]
        y = self.skip_connection(x) + self.out_layers(y)
        if not hasattr(self, "temopral_conv"):
            return y
        return from_clips(self.temopral_conv(to_clips(y, emb.shape[0])))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def to_clips(x: torch.Tensor, clips: int) -> torch.Tensor:
    """[(B T), C, H, W] -> [B, C, T, H, W]."""
    return x.unflatten(0, (clips, -1)).transpose(1, 2)


def from_clips(x: torch.Tensor) -> torch.Tensor:
    """[B, C, T, H, W] -> [(B T), C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


class UNet(nn.Module):
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        model_channels: int = 320,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (4, 2, 1),
        num_head_channels: int = 64,
        transformer_depth: int = 1,
        context_dim: int = 1024,
        temporal_conv: bool = True,
        temporal_attention: bool = True,
        addition_attention: bool = True,
        fps_cond: bool = True,
        dropout: float = 0.0,
        temporal_dropout: float = 0.1,
    ):
        super().__init__()
        base, emb_width, head = model_channels, 4 * model_channels, num_head_channels
        self.model_channels = base

        def embedding() -> nn.Sequential:
            return nn.Sequential(nn.Linear(base, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width))

        def res_block(channels_in: int, channels: int) -> ResBlock:
            return ResBlock(channels_in, channels, emb_width, dropout, temporal_conv, temporal_dropout)

        def transformers(channels: int) -> list[nn.Module]:
            spatial = SpatialTransformer(channels, head, transformer_depth, context_dim)
            if not temporal_attention:
                return [spatial]
            return [spatial, TemporalTransformer(channels, channels // head, head, transformer_depth)]

        self.time_embed = embedding()
        if fps_cond:
            self.fps_embedding = embedding()
        if addition_attention:
            self.init_attn = nn.Sequential(TemporalTransformer(base, 8, head, transformer_depth, conv=True))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, base, 3, padding=1)])])
        skips, channels, rate = [base], base, 1
        for level, mult in enumerate(channel_mult):
            if level:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
                rate *= 2
            for _ in range(num_res_blocks):
                layers = [res_block(channels, mult * base)]
                channels = mult * base
                self.input_blocks.append(nn.ModuleList(layers + (transformers(channels) if rate in attention_resolutions else [])))
                skips.append(channels)
        self.middle_block = nn.ModuleList([res_block(channels, channels), *transformers(channels), res_block(channels, channels)])
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [res_block(channels + skips.pop(), mult * base)]
                channels = mult * base
                layers += transformers(channels) if rate in attention_resolutions else []
                if level and i == num_res_blocks:
                    layers.append(Upsample(channels))
                    rate //= 2
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(Norm32(32, channels), nn.SiLU(), zeroed(nn.Conv2d(channels, out_channels, 3, padding=1)))

    def forward(
        self, x_BCTHW: torch.Tensor, t_B: torch.Tensor, context_BLD: torch.Tensor, fps_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        clips, frames = x_BCTHW.shape[0], x_BCTHW.shape[2]
        emb = self.time_embed(sinusoids(t_B, self.model_channels))
        if hasattr(self, "fps_embedding"):
            fps_B = torch.full_like(t_B, 16) if fps_B is None else fps_B
            emb = emb + self.fps_embedding(sinusoids(fps_B, self.model_channels))
        context = context_BLD.repeat_interleave(frames, 0)

        def run(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
            for layer in layers:
                if isinstance(layer, ResBlock):
                    x = layer(x, emb)
                elif isinstance(layer, SpatialTransformer):
                    x = layer(x, context)
                elif isinstance(layer, TemporalTransformer):
                    x = from_clips(layer(to_clips(x, clips)))
                else:
                    x = layer(x)
            return x

        x, skips = from_clips(x_BCTHW), []
        for i, layers in enumerate(self.input_blocks):
            x = run(layers, x)
            if i == 0 and hasattr(self, "init_attn"):
                x = run(self.init_attn, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for layers in self.output_blocks:
            x = run(layers, torch.cat([x, skips.pop()], 1))
        return to_clips(self.out(x), clips)
