"""The diffusion transformer against a float64 NumPy transcription of its papers' equations, token by token."""

import itertools
import math

import jax
import numpy as np
from flax import nnx

from motif_jax.config import DiTConfig
from motif_jax.models.dit import VideoDiT
from motif_jax.models.networks import Network

CONFIG = DiTConfig(width=16, depth=2, num_head_channels=8, patch=(2, 3, 1))
GRID, IN, OUT, TEXT = (2, 2, 4), 5, 3, 7


def sinusoids(position, width):
    angle = position * 10_000.0 ** (-np.arange(width // 2) / (width // 2))
    return np.concatenate([np.cos(angle), np.sin(angle), np.zeros(width % 2)])


def silu(x):
    return x / (1 + np.exp(-x))


class Transcription:
    """One clip, as rows of tokens; every network of the papers by the names of its weights."""

    def __init__(self, params):
        self.w = {name: np.asarray(value, np.float64) for name, value in params.items()}

    def dense(self, x, name):
        return x @ self.w[f"{name}.kernel"] + self.w.get(f"{name}.bias", 0.0)

    def norm(self, x, name):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * self.w[f"{name}.scale"] + self.w[f"{name}.bias"]

    def attention(self, x, context, name):
        q, k, v = self.dense(x, f"{name}.to_q"), self.dense(context, f"{name}.to_k"), self.dense(context, f"{name}.to_v")
        heads = []
        for part in (slice(0, 8), slice(8, 16)):
            weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(8))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        return self.dense(np.concatenate(heads, -1), f"{name}.to_out.0")

    def embedding(self, number, name):
        return self.dense(silu(self.dense(sinusoids(number, 256), f"{name}.fc1")), f"{name}.fc2")

    def __call__(self, x, t, context, fps):
        places = list(itertools.product(*map(range, GRID)))
        cells = [(slice(2 * i, 2 * i + 2), slice(3 * j, 3 * j + 3), slice(k, k + 1)) for i, j, k in places]
        patches = np.stack([x[cell].ravel() for cell in cells])
        code = np.stack([np.concatenate([sinusoids(i, 6), sinusoids(j, 5), sinusoids(k, 5)]) for i, j, k in places])
        y = self.dense(patches, "patch_embed") + code
        emb = silu(self.embedding(t, "time_embed") + self.embedding(fps, "fps_embedding"))
        for n in range(2):
            b = f"blocks.{n}."
            shift1, scale1, gate1, shift2, scale2, gate2 = self.dense(emb, f"{b}modulation").reshape(6, 16)
            h = self.norm(y, f"{b}norm1") * (1 + scale1) + shift1
            y = y + gate1 * self.attention(h, h, f"{b}attn1")
            y = y + self.attention(self.norm(y, f"{b}norm2"), context, f"{b}attn2")
            h = self.dense(self.norm(y, f"{b}norm3") * (1 + scale2) + shift2, f"{b}mlp.fc1")
            h = h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))  # GELU, as DiT approximates it
            y = y + gate2 * self.dense(h, f"{b}mlp.fc2")
        shift, scale = self.dense(emb, "modulation").reshape(2, 16)
        tokens = self.dense(np.concatenate([self.norm(y, "norm") * (1 + scale) + shift, patches], -1), "out")
        out = np.zeros((*x.shape[:-1], OUT))
        for cell, token in zip(cells, tokens, strict=True):
            out[cell] = token.reshape(2, 3, 1, OUT)
        return out


def test_transcription():
    network = Network.of(lambda rngs: VideoDiT(CONFIG, IN, OUT, TEXT, rngs=rngs))
    rng = np.random.default_rng(0)
    params = {
        name: rng.normal(0, s.shape[0] ** -0.5, s.shape).astype(np.float32) + np.float32(name.endswith("scale"))
        for name, s in sorted(network.shapes.items())
    }
    x, context = rng.normal(size=(2, 4, 6, 4, IN)), rng.normal(size=(2, 6, TEXT))
    t, fps = np.array([3, 700]), np.array([24.0, 6.0])
    with jax.default_matmul_precision("highest"):
        found = nnx.jit(lambda model, *inputs: model(*inputs))(network.bind(params), *map(np.float32, (x, t, context, fps)))
    expected = np.stack([Transcription(params)(*inputs) for inputs in zip(x, t, context, fps, strict=True)])
    # Some hundred float32 roundings of 6e-8 in sums of at most 256 terms.
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.std())


def test_a_new_network_puts_out_zeros():
    """adaLN-zero: the last projection starts at zero, and so does every gate."""
    network = Network.of(lambda rngs: VideoDiT(CONFIG, IN, OUT, TEXT, rngs=rngs))
    zero = {name for name, value in network.init(jax.random.key(0)).items() if not np.any(value) and "norm" not in name}
    layers = ("blocks.0.modulation", "blocks.1.modulation", "modulation", "out")
    assert zero == {f"{layer}.{part}" for layer in layers for part in ("kernel", "bias")}
