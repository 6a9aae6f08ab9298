"""The resampler against a NumPy transcription of its published structure, and its published size."""

import math

import jax
import numpy as np
from scipy.special import erf

from motif_jax.config import ResamplerConfig
from motif_jax.interop.names import to_torch
from motif_jax.models.networks import Network
from motif_jax.models.resampler import Resampler

SMALL = ResamplerConfig(width=24, depth=2, heads=3, head_width=4, frames=3)


def norm(x, w, name):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * w[f"{name}.weight"] + w[f"{name}.bias"]


def transcription(w, x, heads):
    """Float64, from tensors by their names in the checkpoint: queries attend to [image, queries], then a feed-forward."""
    w = {name: tensor.astype(np.float64) for name, tensor in w.items()}
    x = x @ w["proj_in.weight"].T + w["proj_in.bias"]
    queries = np.repeat(w["latents"], len(x), 0)
    for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))):
        layer = f"layers.{i}"
        image, own = norm(x, w, f"{layer}.0.norm1"), norm(queries, w, f"{layer}.0.norm2")
        q = own @ w[f"{layer}.0.to_q.weight"].T
        k, v = np.split(np.concatenate([image, own], 1) @ w[f"{layer}.0.to_kv.weight"].T, 2, -1)
        width, found = q.shape[-1] // heads, []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            weights = np.exp(q[..., part] @ k[..., part].swapaxes(1, 2) / math.sqrt(width))
            found.append(weights / weights.sum(-1, keepdims=True) @ v[..., part])
        queries = queries + np.concatenate(found, -1) @ w[f"{layer}.0.to_out.weight"].T
        hidden = norm(queries, w, f"{layer}.1.0") @ w[f"{layer}.1.1.weight"].T
        queries = queries + 0.5 * hidden * (1 + erf(hidden / math.sqrt(2))) @ w[f"{layer}.1.3.weight"].T
    return norm(queries @ w["proj_out.weight"].T + w["proj_out.bias"], w, "norm_out")


def test_transcription(difference):
    rng = np.random.default_rng(0)
    network = Network.of(lambda rngs: Resampler(SMALL, 20, 12, rngs=rngs))
    params = {name: rng.normal(size=leaf.shape).astype(np.float32) * 0.5 for name, leaf in network.shapes.items()}
    for scale in (1.0, 1e-3):  # small inputs show a norm's epsilon
        x = scale * rng.normal(size=(2, 5, 20)).astype(np.float32)
        with jax.default_matmul_precision("highest"):
            found = jax.jit(lambda params, x: network.bind(params)(x))(params, x)
        assert found.shape == (2, 3 * 16, 12)
        assert difference(found, transcription(jax.tree.map(np.asarray, to_torch(params)), x, SMALL.heads)) < 1e-5


def test_published_size():
    """DynamiCrafter-512: 48,787,456 parameters; one set of 16 tokens for each of 16 frames."""
    network = Network.of(lambda rngs: Resampler(ResamplerConfig(), 1280, 1024, rngs=rngs))
    assert sum(int(np.prod(leaf.shape)) for leaf in network.shapes.values()) == 48_787_456
    out = jax.eval_shape(lambda params, x: network.bind(params)(x), network.shapes, jax.ShapeDtypeStruct((2, 257, 1280), np.float32))
    assert out.shape == (2, 256, 1024)
    names = to_torch(network.shapes)
    layer = ["0.norm1", "0.norm2", "1.0"]
    expected = {f"{n}.{leaf}" for n in ("proj_in", "proj_out", "norm_out") for leaf in ("weight", "bias")} | {"latents"}
    expected |= {f"layers.{i}.{n}.{leaf}" for i in range(4) for n in layer for leaf in ("weight", "bias")}
    expected |= {f"layers.{i}.{n}.weight" for i in range(4) for n in ("0.to_q", "0.to_kv", "0.to_out", "1.1", "1.3")}
    assert names.keys() == expected
