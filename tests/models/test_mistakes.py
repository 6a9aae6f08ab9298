"""Every mistake that a port of the networks is known to make, made on purpose: the tolerance of 1e-5 catches each.

A mistake is a function that spoils a fresh network;
what it computes then is compared with the stored outputs of the reference, as the right network is in the other tests.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from motif_jax.interop.tables import autoencoder, openclip, unet
from motif_jax.models import attention as attention_module
from motif_jax.models import clip, unet3d
from motif_jax.models import transformer as transformer_module
from motif_jax.models.attention import Attention
from motif_jax.models.autoencoder import make_autoencoder
from motif_jax.models.layers import GroupNorm, LayerNorm, apply, sinusoids
from motif_jax.models.text import make_text_tower
from motif_jax.models.transformer import Geglu, SpatialTransformer, TemporalTransformer
from motif_jax.models.unet3d import Downsample, ResBlock, TemporalConv, UNet3D

pytestmark = pytest.mark.usefixtures("quick_compile")

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def parts(tiny_unet, tiny_autoencoder, tiny_text, with_reference_weights):
    """Graph and weights of the three networks of the reference runs."""

    load = with_reference_weights
    return {
        "unet": load(lambda: UNet3D(tiny_unet, rngs=nnx.Rngs(0)), "unet", unet),
        "autoencoder": load(lambda: make_autoencoder(tiny_autoencoder, nnx.Rngs(0)), "ae", autoencoder),
        "text": load(lambda: make_text_tower(tiny_text, nnx.Rngs(0)), "text.model", openclip),
    }


@pytest.fixture
def fresh(parts):
    """A function that makes one of the networks anew, so that it can be spoiled."""

    def make(name):
        graph, params = parts[name]
        return nnx.merge(graph, jax.tree.map(jnp.asarray, params))

    return make


def modules(model, kind):
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, kind)]


def last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


# Whole-network mistakes: (model, monkeypatch) -> None. Layers are not compiled together, so that no mistake costs a compilation.


def spoil(kind, call):
    """The mistake of calling layers of `kind` as `call(layer, right call, *args)`."""

    def mistake(model, monkeypatch):
        monkeypatch.setattr(kind, "__call__", lambda self, *args, right=kind.__call__: call(self, functools.partial(right, self), *args))

    return mistake


def constant(module, name, value):
    return lambda model, monkeypatch: monkeypatch.setattr(module, name, value)


def norms_over_time(model, monkeypatch):
    for block in modules(model, ResBlock):
        for layers in (block.in_layers, block.out_layers):
            layers[0] = Wrapped(layers[0], lambda norm, x: norm(x.reshape(2, -1, *x.shape[1:])).reshape(x.shape))


def per_frame(norm, x):
    return norm(x.reshape(-1, *x.shape[2:])).reshape(x.shape)


def transformer_norms_per_frame(model, monkeypatch):
    for block in modules(model, TemporalTransformer):
        block.norm = Wrapped(block.norm, per_frame)


def conv_norms_per_frame(model, monkeypatch):
    for block in modules(model, TemporalConv):
        for stage in (block.conv1, block.conv2, block.conv3, block.conv4):
            stage[0] = Wrapped(stage[0], per_frame)


class Wrapped(nnx.Module):
    def __init__(self, layer, call):
        self.layer, self.call, self.dtype = layer, call, getattr(layer, "dtype", None)

    def __call__(self, *args):
        return self.call(self.layer, *args)


class WrappedResBlock(ResBlock):
    """A residual block whose input is changed on the way in."""

    def __init__(self, block, change):
        self.block, self.change = block, change

    def __call__(self, x, emb, rng=None):
        return self.block(self.change(x), emb, rng)


def tiled_context(transformer, right, x, context):
    """Frame n of all clips gets the text n modulo the number of clips."""
    (clips, frames), shape = x.shape[:2], x.shape
    tiled = jnp.tile(context, (frames, 1, 1))
    return right(x.reshape(clips * frames, 1, *shape[2:]), tiled).reshape(shape)


def skip_before_attention(model, monkeypatch):
    attend, model.init_attn = model.init_attn[0], nnx.List([])
    model.input_blocks[1][0] = WrappedResBlock(model.input_blocks[1][0], attend)


def skip_first(model, monkeypatch):
    width = model.middle_block[-1].out_layers[-1].bias.shape[0]
    for layers in model.output_blocks:
        block = layers[0]
        layers[0] = WrappedResBlock(block, lambda x, width=width: jnp.concatenate([x[..., width:], x[..., :width]], -1))
        width = block.out_layers[-1].bias.shape[0]


def convolve_then_skip(block, right, x, emb, rng=None):
    skip = x if block.skip_connection is None else block.skip_connection(x.reshape(-1, *x.shape[2:])).reshape(*x.shape[:-1], -1)
    conv, block.temopral_conv = block.temopral_conv, None
    inner = right(x, emb, rng) - skip
    block.temopral_conv = conv
    return skip + conv(inner, rng)


def halves_swapped(geglu, right, x):
    kernel, bias = geglu.proj.kernel[...], geglu.proj.bias[...]
    inner = bias.shape[0] // 2
    value, gate = jnp.split(x @ kernel + bias, [inner], -1)
    return gate * transformer_module.gelu(value)


def second_attention_left_out(model, monkeypatch):
    for transformer in modules(model, TemporalTransformer):
        for block in transformer.transformer_blocks:
            block.attn2 = Wrapped(block.attn2, lambda attn, x: jnp.zeros_like(x))


def heads_interleaved(model, monkeypatch):
    for attn in modules(model, Attention):
        order = np.arange(attn.to_q.kernel.shape[1]).reshape(-1, attn.heads).T.ravel()
        for layer in (attn.to_q, attn.to_k, attn.to_v):
            layer.kernel = nnx.Param(layer.kernel[...][:, order])
        attn.to_out[0].kernel = nnx.Param(attn.to_out[0].kernel[...][order])


def same_padding(model, monkeypatch):
    """Of an even length and stride 2, "SAME" pads at the end only."""
    for layer in modules(model, Downsample):
        layer.op.padding = ((0, 1), (0, 1))


def half_minus_one(position, width):
    half = width // 2
    angle = position.astype(jnp.float32)[..., None] * jnp.exp(-np.log(1e4) * jnp.arange(half) / (half - 1))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def scaled(q, k, v, implementation="auto", causal=False, right=attention_module.attention):
    return right(q * 2**0.5, k, v, implementation, causal)


def no_frame_rate(model, monkeypatch):
    """The reference's default of 16 in place of the clip's own."""
    monkeypatch.setattr(UNet3D, "__call__", lambda self, x, t, context, fps, right=UNet3D.__call__: right(self, x, t, context))


MISTAKES = {
    "tanh GELU": constant(transformer_module, "gelu", functools.partial(jax.nn.gelu, approximate=True)),
    "frame rate ignored": no_frame_rate,
    "sines first": constant(unet3d, "sinusoids", lambda p, width: jnp.roll(sinusoids(p, width), width // 2, -1)),
    "frequencies over half - 1": constant(unet3d, "sinusoids", half_minus_one),
    "residual norms also over time": norms_over_time,
    "temporal transformer's norm per frame": transformer_norms_per_frame,
    "temporal convolution's norms per frame": conv_norms_per_frame,
    "text tiled over (clip, frame)": spoil(SpatialTransformer, tiled_context),
    "skip pushed before init_attn": skip_before_attention,
    "attention scale off by sqrt 2": constant(attention_module, "attention", scaled),
    "temporal convolution before the skip is added": spoil(ResBlock, convolve_then_skip),
    "GEGLU halves swapped": spoil(Geglu, halves_swapped),
    "second temporal attention left out": second_attention_left_out,
    "heads interleaved": heads_interleaved,
    "SAME padding where the map is halved": same_padding,
    "skip before the current channels": skip_first,
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_of_the_whole_unet(mistake, fresh, golden, difference, monkeypatch):
    model = fresh("unet")
    if mistake:
        MISTAKES[mistake](model, monkeypatch)
    out = model(last(golden["unet/x8"]), golden["unet/t"], golden["unet/context"], golden["unet/fps"])
    found = difference(np.moveaxis(np.asarray(out), -1, 1), golden["unet/out8"])
    assert (found > 10 * TOLERANCE) if mistake else (found < TOLERANCE), found


@pytest.fixture(scope="module")
def published(shared):
    return np.load(shared / "golden/videocrafter2/unet_tiny_io.npz")


# The right network, layer by layer too: what it needs is compiled for the mistakes.


def test_activations(fresh, published, difference, monkeypatch):
    model, seen, names = fresh("unet"), {}, {}
    for name in ("input_blocks", "middle_block", "output_blocks", "init_attn"):
        for i, block in enumerate(getattr(model, name)):
            for j, layer in enumerate(block if name.endswith("blocks") else [block]):
                names[id(layer)] = (f"{name}.{i}" if name.endswith("blocks") else name, j)

    def run(self, layer, *args, right=UNet3D._run):
        out = right(self, layer, *args)
        name, j = names[id(layer)]
        seen[name] = seen[f"{name}.{j}"] = out  # the last layer of a block leaves its output under the block's name
        return out

    monkeypatch.setattr(UNet3D, "_run", run)
    model(last(published["x8"]), published["t"], published["context"], published["fps"])
    seen["time_embed"] = apply(model.time_embed, sinusoids(published["t"], 32))
    seen["fps_embedding"] = apply(model.fps_embedding, sinusoids(published["fps"], 32))
    compared = 0
    for key in (k for k in published.files if k.startswith("act/")):
        name = key.removeprefix("act/")
        if name not in seen:
            continue  # inside a block: the unit cases of test_unet3d_golden.py cover these
        theirs, ours = published[key], np.asarray(seen[name])
        if ours.ndim == 5:
            ours = ours.reshape(-1, *ours.shape[2:]) if theirs.ndim == 4 else ours
            ours = np.moveaxis(ours, -1, 1)
        assert difference(ours, theirs) < TOLERANCE, name
        compared += 1
    assert compared == 22


@pytest.mark.parametrize("channels", [4, 9])
def test_other_channels(channels, tiny_unet, with_reference_weights, published, difference):
    """Models of their own."""
    x = np.concatenate([published["x8"], published["mask"]], 1)[:, :channels]
    config = dataclasses.replace(tiny_unet, in_channels=channels)
    graph, params = with_reference_weights(lambda: UNet3D(config, rngs=nnx.Rngs(0)), "unet", unet)
    model = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
    out = model(last(x), published["t"], published["context"], published["fps"])
    assert difference(np.moveaxis(np.asarray(out), -1, 1), published[f"out{channels}"]) < TOLERANCE


def residual(model):
    return model.input_blocks[3][0]


def other_epsilon(norms):
    for norm in norms:
        norm.epsilon = {1e-5: 1e-6, 1e-6: 1e-5}[norm.epsilon]


# A wrong epsilon hardly changes the whole network (9e-6 at least); inputs of 3e-3 show it.
EPSILONS = {
    "ResBlock": ("resblock_skip", lambda model: [residual(model).in_layers[0], residual(model).out_layers[0]]),
    "temporal convolution": ("resblock_skip", lambda model: modules(residual(model).temopral_conv, GroupNorm)),
    "SpatialTransformer": ("spatial_transformer", lambda model: [model.input_blocks[1][1].norm]),
    "LayerNorm": ("basic_block_self", lambda model: modules(model.input_blocks[1][2].transformer_blocks[0], LayerNorm)),
    "TemporalTransformer": ("temporal_transformer", lambda model: [model.input_blocks[1][2].norm]),
}


@pytest.mark.parametrize("norm", EPSILONS)
def test_epsilons(norm, fresh, golden, difference):
    case, choose = EPSILONS[norm]
    x, expected = golden[f"units/{case}_small/in"], golden[f"units/{case}_small/out"]

    def run(model):
        match case:
            case "resblock_skip":
                return np.moveaxis(np.asarray(residual(model)(last(x)[None], golden["units/emb"])[0]), -1, 1)
            case "spatial_transformer":
                return np.moveaxis(np.asarray(model.input_blocks[1][1](last(x)[None], golden["units/context"])[0]), -1, 1)
            case "basic_block_self":
                block, y = model.input_blocks[1][2].transformer_blocks[0], jnp.asarray(x)
                for norm, layer in ((block.norm1, block.attn1), (block.norm2, block.attn2), (block.norm3, block.ff)):
                    y = y + layer(norm(y))
                return np.asarray(y)
        return np.moveaxis(np.asarray(model.input_blocks[1][2](last(x))), -1, 1)

    model = fresh("unet")
    assert difference(run(model), expected) < TOLERANCE
    other_epsilon(choose(model))
    assert difference(run(model), expected) > 2 * TOLERANCE  # 2.5e-5 for the temporal convolution, the others 1e-2 and more


def test_of_the_autoencoder(fresh, golden, difference):
    """Symmetric padding where the map is halved, and the epsilon of its norms."""

    def run(model):
        return np.moveaxis(np.asarray(model.encode(last(golden["autoencoder/x"]))), -1, 1)

    model = fresh("autoencoder")
    assert difference(run(model), golden["autoencoder/moments"]) < TOLERANCE
    convs = [level.downsample.conv for level in model.encoder.down if getattr(level, "downsample", None) is not None]
    assert len(convs) == 3
    for conv in convs:
        conv.padding = ((1, 1), (1, 1))
    assert difference(run(model), golden["autoencoder/moments"]) > 10 * TOLERANCE
    attn = fresh("autoencoder").encoder.mid.attn_1
    other_epsilon([attn.norm])
    out = np.moveaxis(np.asarray(attn(last(golden["autoencoder/attn_small_in"]))), -1, 1)
    assert difference(out, golden["autoencoder/attn_small_out"]) > 10 * TOLERANCE


@pytest.mark.parametrize("mistake", ["tanh GELU", "no causal mask", "last block run", "epsilon"])
def test_of_the_text_tower(mistake, fresh, golden, difference, monkeypatch):
    model, tokens = fresh("text"), golden["text/tokens"]
    if mistake == "epsilon":  # of a prefix of one block, on small inputs
        block = model.transformer.resblocks[0]
        assert difference(block(golden["text/small_in"]), golden["text/small_out"]) < TOLERANCE
        other_epsilon(modules(block, LayerNorm))
        assert difference(block(golden["text/small_in"]), golden["text/small_out"]) > 10 * TOLERANCE
        return
    assert difference(model(tokens), golden["text/penultimate_ln"]) < TOLERANCE
    if mistake == "tanh GELU":
        monkeypatch.setattr(clip, "gelu", functools.partial(jax.nn.gelu, approximate=True))
    elif mistake == "no causal mask":
        for block in model.transformer.resblocks:
            block.attn.causal = False
    else:
        model.transformer.resblocks.append(nnx.List([]))
    assert difference(model(tokens), golden["text/penultimate_ln"]) > 10 * TOLERANCE
