"""The U-Net against a float64 NumPy transcription of the reference, which itself must reproduce the reference's stored outputs.

The stored networks are 32 channels wide, where 32 norm groups are one channel each and hide everything that is constant per
channel at the outermost level. The transcription carries the comparison to 64 channels.
"""

import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from motif_jax.config import UNetConfig
from motif_jax.interop.tables import unet as interop
from motif_jax.models.unet3d import UNet3D

WIDE = UNetConfig(in_channels=8, model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1,), num_head_channels=16,
                  context_dim=24)  # fmt: skip


class Transcription:
    """The network of the reference, from its tensors by name; arrays are [(B T), C, H, W], float64."""

    def __init__(self, config, tensors):
        self.config, self.w = config, {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def conv(self, x, name, stride=1):
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        k = weight.shape[-1]
        p = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
        windows = np.lib.stride_tricks.sliding_window_view(p, (k, k), (2, 3))[:, :, ::stride, ::stride]
        return np.einsum("nchwij,ocij->nohw", windows, weight, optimize=True) + bias[:, None, None]

    def group_norm(self, x, name, eps, groups):
        y = x.reshape(x.shape[0], groups, -1)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + eps)
        shape = (-1,) + (1,) * (x.ndim - 2)
        return y.reshape(x.shape) * self.w[f"{name}.weight"].reshape(shape) + self.w[f"{name}.bias"].reshape(shape)

    def layer_norm(self, x, name):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attention(self, x, context, name, heads):
        q, k, v = (self.linear(a, f"{name}.to_{b}") for a, b in ((x, "q"), (context, "k"), (context, "v")))
        width, out = q.shape[-1] // heads, []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            logits = q[..., part] @ k[..., part].swapaxes(-1, -2) / math.sqrt(width)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out.append(weights / weights.sum(-1, keepdims=True) @ v[..., part])
        return self.linear(np.concatenate(out, -1), f"{name}.to_out.0")

    def block(self, x, context, name, heads):
        y = self.layer_norm(x, f"{name}.norm1")
        x = x + self.attention(y, y, f"{name}.attn1", heads)
        y = self.layer_norm(x, f"{name}.norm2")
        x = x + self.attention(y, y if context is None else context, f"{name}.attn2", heads)
        value, gate = np.split(self.linear(self.layer_norm(x, f"{name}.norm3"), f"{name}.ff.net.0.proj"), 2, -1)
        return x + self.linear(value * 0.5 * gate * (1 + erf(gate / math.sqrt(2))), f"{name}.ff.net.2")

    def spatial(self, x, name):
        N, C, H, W = x.shape
        y = self.group_norm(x, f"{name}.norm", 1e-6, self.config.norm_groups).reshape(N, C, H * W).swapaxes(1, 2)
        y = self.linear(y, f"{name}.proj_in")
        context = np.repeat(self.context, N // len(self.context), 0)
        y = self.block(y, context, f"{name}.transformer_blocks.0", C // self.config.num_head_channels)
        return x + self.linear(y, f"{name}.proj_out").swapaxes(1, 2).reshape(x.shape)

    def clips(self, x):
        """[(B T), C, H, W] -> [B, C, T, H, W]."""
        return x.reshape(self.B, -1, *x.shape[1:]).swapaxes(1, 2)

    def frames(self, x):
        return x.swapaxes(1, 2).reshape(-1, x.shape[1], *x.shape[3:])

    def temporal(self, x, name, heads=None):
        v = self.clips(x)
        B, C, T, H, W = v.shape
        y = self.group_norm(v, f"{name}.norm", 1e-6, self.config.norm_groups).transpose(0, 3, 4, 2, 1).reshape(B * H * W, T, C)
        project = self.linear if heads is None else self.linear_from_conv
        y = project(y, f"{name}.proj_in")
        y = self.block(y, None, f"{name}.transformer_blocks.0", heads or C // self.config.num_head_channels)
        y = project(y, f"{name}.proj_out").reshape(B, H, W, T, C).transpose(0, 4, 3, 1, 2)
        return self.frames(v + y)

    def linear_from_conv(self, x, name):
        return x @ self.w[f"{name}.weight"][..., 0].T + self.w[f"{name}.bias"]

    def res_block(self, x, name):
        norm = functools.partial(self.group_norm, eps=1e-5, groups=self.config.norm_groups)
        y = self.conv(silu(norm(x, f"{name}.in_layers.0")), f"{name}.in_layers.2")
        emb = self.linear(silu(self.emb), f"{name}.emb_layers.1")
        y = y + np.repeat(emb, len(y) // len(emb), 0)[:, :, None, None]
        y = self.conv(silu(norm(y, f"{name}.out_layers.0")), f"{name}.out_layers.3")
        y = y + (self.conv(x, f"{name}.skip_connection") if f"{name}.skip_connection.weight" in self.w else x)
        video = self.clips(y)
        z = video
        for stage, conv in (("conv1", 2), ("conv2", 3), ("conv3", 3), ("conv4", 3)):
            z = silu(norm(z, f"{name}.temopral_conv.{stage}.0"))
            weight, p = self.w[f"{name}.temopral_conv.{stage}.{conv}.weight"], np.pad(z, ((0, 0), (0, 0), (1, 1), (0, 0), (0, 0)))
            z = sum(np.einsum("bcthw,oc->bothw", p[:, :, i : i + z.shape[2]], weight[:, :, i, 0, 0], optimize=True) for i in range(3))
            z = z + self.w[f"{name}.temopral_conv.{stage}.{conv}.bias"][:, None, None, None]
        return self.frames(video + z)

    def layers(self, x, name):
        """Runs what the checkpoint holds under `name`: the kind of a layer shows in its tensors."""
        j = 0
        while any(key.startswith(f"{name}.{j}.") for key in self.w):
            here = f"{name}.{j}"
            if f"{here}.in_layers.0.weight" in self.w:
                x = self.res_block(x, here)
            elif f"{here}.op.weight" in self.w:
                x = self.conv(x, f"{here}.op", stride=2)
            elif f"{here}.conv.weight" in self.w:
                x = self.conv(x.repeat(2, 2).repeat(2, 3), f"{here}.conv")
            elif f"{here}.proj_in.weight" in self.w:
                x = self.spatial(x, here) if j % 3 == 1 else self.temporal(x, here)
            else:
                x = self.conv(x, here)
            j += 1
        return x

    def __call__(self, x_BCTHW, t, context, fps):
        self.B, self.context = len(x_BCTHW), context.astype(np.float64)
        self.emb = 0
        for name, value in (("time_embed", t), ("fps_embedding", fps)):
            half = self.config.model_channels // 2
            angle = np.asarray(value, np.float64)[:, None] * np.exp(-math.log(10000) * np.arange(half) / half)
            y = np.concatenate([np.cos(angle), np.sin(angle)], -1)
            self.emb = self.emb + self.linear(silu(self.linear(y, f"{name}.0")), f"{name}.2")
        x, skips, i = self.frames(x_BCTHW.astype(np.float64)), [], 0
        while any(key.startswith(f"input_blocks.{i}.") for key in self.w):
            x = self.layers(x, f"input_blocks.{i}")
            if i == 0:
                x = self.temporal(x, "init_attn.0", heads=8)
            skips.append(x)
            i += 1
        x = self.layers(x, "middle_block")
        for i in range(len(skips)):
            x = self.layers(np.concatenate([x, skips.pop()], 1), f"output_blocks.{i}")
        x = self.conv(silu(self.group_norm(x, "out.0", 1e-5, self.config.norm_groups)), "out.2")
        return self.clips(x)


def silu(x):
    return x / (1 + np.exp(-x))


def template(config):
    graph, params = nnx.split(nnx.eval_shape(lambda: UNet3D(config, rngs=nnx.Rngs(0))), nnx.Param)
    return graph, nnx.to_pure_dict(params)


def test_transcription_reproduces_the_reference(tiny_unet, reference_tensors, golden, difference):
    tensors = reference_tensors("unet", template(tiny_unet)[1])
    out = Transcription(tiny_unet, tensors)(golden["unet/x8"], golden["unet/t"], golden["unet/context"], golden["unet/fps"])
    assert difference(out, golden["unet/out8"]) < 3e-6  # the float32 noise of the stored output


@pytest.fixture(scope="module")
def wide(reference_tensors):
    rng = np.random.default_rng(0)
    graph, shapes = template(WIDE)
    x, context = rng.normal(size=(2, 8, 3, 8, 6)), rng.normal(size=(2, 5, 24))
    return graph, shapes, reference_tensors("unet", shapes), (x, np.asarray([17, 981]), context, np.asarray([8, 24]))


def test_64_channels(wide, difference):
    graph, shapes, tensors, (x, t, context, fps) = wide
    theirs = Transcription(WIDE, tensors)(x, t, context, fps)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda params: nnx.merge(graph, params)(np.moveaxis(x, 1, -1).astype(np.float32), t, context.astype(np.float32), fps))
        ours = run(jax.tree.map(np.asarray, interop.to_jax(tensors, shapes)))
    assert difference(np.moveaxis(np.asarray(ours), -1, 1), theirs) < 1e-5


def test_64_channels_see_the_outermost_embedding(wide, difference):
    """What 32 channels cannot show: the embedding of an outermost residual block changes the output."""
    _, _, tensors, arguments = wide
    name = "input_blocks.1.0.emb_layers.1.weight"
    changed = Transcription(WIDE, {**tensors, name: tensors[name][::-1]})(*arguments)
    assert difference(changed, Transcription(WIDE, tensors)(*arguments)) > 1e-3
