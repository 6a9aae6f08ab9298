"""Attention against loops over heads and queries in NumPy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from motif_jax.models import attention as module
from motif_jax.models import placement
from motif_jax.models.attention import Attention, attention
from motif_jax.models.layers import Initializer

pytestmark = pytest.mark.usefixtures("quick_compile")


def inputs(N=2, L=6, S=5, H=3, K=4, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(N, length, H, K)).astype(np.float32) for length in (L, S, S)]


def by_hand(q, k, v, causal=False):
    out = np.zeros(q.shape)
    for n, i, h in np.ndindex(*q.shape[:3]):
        keys = slice(0, i + 1) if causal else slice(None)
        weights = np.exp(k[n, keys, h].astype(np.float64) @ q[n, i, h] / q.shape[-1] ** 0.5)
        out[n, i, h] = weights / weights.sum() @ v[n, keys, h]
    return out


def gradients(loss, *x):
    """(gradients of q, k and v, what the loss returns beside its value), traced anew."""
    return jax.jit(jax.grad(lambda *x: loss(*x), (0, 1, 2), has_aux=True))(*x)


@pytest.mark.parametrize("implementation", ["auto", "reference", "xla"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_its_definition(implementation, causal):
    q, k, v = inputs(S=6)
    np.testing.assert_allclose(attention(q, k, v, implementation, causal), by_hand(q, k, v, causal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_blocks_of_queries_change_nothing(implementation, monkeypatch):
    """In the backward pass each block's weights are computed again. What hides keys is not cut into blocks."""
    q, k, v = inputs(L=24)

    def loss(q, k, v):
        out = attention(q, k, v, implementation)
        return jnp.sum(out**3), out

    whole = gradients(loss, q, k, v)
    monkeypatch.setattr(module, "BLOCKWISE_FROM", 8)
    monkeypatch.setattr(module, "QUERY_BLOCK", 8)
    program = str(jax.make_jaxpr(loss)(q, k, v))
    assert "scan" in program and "remat" in program
    blocks = gradients(loss, q, k, v)
    np.testing.assert_allclose(blocks[1], by_hand(q, k, v), rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(blocks), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(attention(q, q, q, implementation, True), by_hand(q, q, q, True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("L, S", [(6, 5), (5, 6), (5, 5), (6, 6)])
@pytest.mark.parametrize("causal", [False, True])
def test_odd_lengths_are_padded_and_hidden(L, S, causal):
    """As it is done for cuDNN, here around XLA's attention, which also takes lengths."""
    if causal and L != S:
        pytest.skip("causal is for self-attention")
    q, k, v = inputs(L=L, S=S)
    seen = []

    def attend(q, k, v, **kwargs):
        seen.append((q.shape[1], k.shape[1]))
        return jax.nn.dot_product_attention(q, k, v, implementation="xla", **kwargs)

    def loss(q, k, v):
        out = module._even_lengths(attend, q, k, v, causal)
        return jnp.sum(out**3), out

    grads, out = gradients(loss, q, k, v)
    np.testing.assert_allclose(out, by_hand(q, k, v, causal), rtol=1e-4, atol=1e-5)
    expected, _ = gradients(lambda *x: (jnp.sum(attention(*x, "reference", causal) ** 3), None), q, k, v)
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert seen == [(L + L % 2, S + S % 2)]


def test_queries_apart_are_the_same_attention():
    """As it is done for cuDNN on a mesh that splits the queries of a clip, here around XLA's attention."""
    q, k, v = inputs(N=2, L=6, S=5)
    apart = module._queries_apart(3, q, k, v)
    assert [x.shape[:2] for x in apart] == [(6, 2), (6, 5), (6, 5)]
    np.testing.assert_allclose(attention(*apart, "xla").reshape(q.shape), by_hand(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("N, L, S", [(2, 512, 77), (64, 16, 16), (2, 15, 77), (2, 640, 640)])
def test_cudnn_equals_the_reference(N, L, S):
    q, k, v = inputs(N, L, S, H=4, K=64)

    def loss(implementation, *x):
        out = attention(*x, implementation).astype(jnp.float32)
        return jnp.sum(out**2), out

    expected = jax.grad(loss, (1, 2, 3), has_aux=True)("reference", q, k, v)
    found = jax.grad(loss, (1, 2, 3), has_aux=True)("cudnn", *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) < 2e-2 * np.linalg.norm(b)  # bfloat16 in, out and between


def test_softmax_is_float32_in_half_precision():
    """Logits around 200 apart by less than bfloat16's step there still weigh differently."""
    q = jnp.full((1, 1, 1, 64), 5.0, jnp.bfloat16)
    k = jnp.stack([jnp.full((1, 1, 64), 5.0), jnp.full((1, 1, 64), 5.0).at[0, 0, 0].set(5.5)], 1).astype(jnp.bfloat16)
    v = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    weight = 1 / (1 + np.exp(-0.5 * 5 / 8))
    for implementation in ("reference", "xla"):
        out = attention(q, k, jnp.broadcast_to(v, k.shape), implementation)
        np.testing.assert_allclose(np.asarray(out, np.float32), weight, rtol=1e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_in_half_precision(causal):
    q, k, v = inputs(N=2, L=24, S=24, H=2, K=16)

    def loss(*x):
        return jnp.sum(attention(*x, "reference", causal).astype(jnp.float32) ** 2), None

    expected, _ = gradients(loss, q, k, v)
    found, _ = gradients(loss, *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(a, np.float32) - b) < 2e-2 * np.linalg.norm(b)  # bfloat16 in, out and between


def test_the_choice_of_kernel():
    heads = [(64, jnp.bfloat16), (64, jnp.float32), (512, jnp.bfloat16)]
    choices = {}
    for where in ("cpu", "tpu", "gpu"):
        with placement.target_platform(where):
            choices[where] = [module._choose(width, dtype) for width, dtype in heads]
        with placement.target_platform(where), placement.use_kernels(False):  # --config.kernels=xla
            assert (module._choose(64, jnp.bfloat16) == "cudnn") == (where == "gpu") and module._choose(64, jnp.bfloat16) != "splash"
    assert choices == {"cpu": ["reference"] * 3, "tpu": ["splash", "xla", "splash"], "gpu": ["cudnn", "xla", "xla"]}


@pytest.mark.parametrize(
    ("length", "width", "dtype", "causal", "taken"),
    [
        (512, 64, jnp.bfloat16, False, True),
        (511, 64, jnp.bfloat16, False, False),
        (512, 64, jnp.bfloat16, True, False),
        (512, 64, jnp.float32, False, True),
        (512, 128, jnp.float32, False, False),  # does not leave room
        (512, 512, jnp.bfloat16, False, False),
    ],
)
def test_splash_is_for_long_sequences_of_which_nothing_is_hidden(length, width, dtype, causal, taken):
    x = jax.ShapeDtypeStruct((1, length, 1, width), dtype)
    with placement.target_platform("tpu"):
        assert ("pallas_call" in str(jax.make_jaxpr(lambda x: attention(x, x, x, "splash", causal))(x))) == taken


@pytest.mark.parametrize(
    ("sequences", "length", "rows", "queries"),
    [(8, 512, ("data", "fsdp", "context"), None), (4, 512, ("data", "fsdp"), "context"), (4, 513, None, None), (3, 512, None, None)],
)
def test_splash_on_a_mesh(sequences, length, rows, queries):
    """By sequences; a clip's only one by queries; else XLA finds its way."""
    x = jax.ShapeDtypeStruct((sequences, length, 2, 64), jnp.bfloat16)
    mesh = AbstractMesh((2, 2, 2, 1), ("data", "fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 4)
    with placement.target_platform("tpu"), jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(lambda x: attention(x, x, x, "splash"))(x)
    mapped = [equation.params["in_specs"][-3:] for equation in jaxpr.eqns if equation.primitive.name == "shard_map"]
    assert mapped == ([(PartitionSpec(rows, queries, "tensor"), *[PartitionSpec(rows, None, "tensor")] * 2)] if rows else [])


@pytest.mark.parametrize(("capability", "new"), [("7.5", False), ("gfx942", False), ("8.0", True), ("12.0", True)])
def test_the_choice_of_kernel_on_other_gpus(capability, new, monkeypatch):
    """Neither cuDNN's attention nor XLA's Triton is there before compute capability 8.0, nor on AMD's."""
    monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(compute_capability=capability)])
    with placement.target_platform("gpu"):
        assert module._choose(64, jnp.bfloat16) == ("cudnn" if new else "xla")
        assert placement.kernel_rows(8, jnp.bfloat16) == (() if new else None)
        assert module.missing_for("cudnn", "gpu") == (None if new else "runs on NVIDIA GPUs of compute capability 8.0 and up")
        program = str(jax.make_jaxpr(lambda x: attention(x, x, x, "xla"))(jnp.ones((1, 2, 1, 8), jnp.bfloat16)))
        assert ("BF16_BF16_F32" in program) == new  # XLA has no such product for the older
        assert module.missing_for("auto", "gpu") is None and module.missing_for("xla", "gpu") is None


def test_an_unknown_kernel_is_named():
    with pytest.raises(ValueError, match="attention='flash'"):
        attention(*inputs(), "flash")


def test_heads_are_the_major_part_of_the_inner_axis():
    """One head's part of the values is the contiguous slice of to_v; other heads do not see it."""
    layer = Attention(8, 6, heads=2, head_width=4, init=Initializer(nnx.Rngs(0)), dtype=jnp.float32, implementation="reference")
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(2, 3, 8)).astype(np.float32), rng.normal(size=(2, 5, 6)).astype(np.float32)
    q, k, v = (a @ np.asarray(w.kernel[...]) for a, w in ((x, layer.to_q), (context, layer.to_k), (context, layer.to_v)))
    split = [a.reshape(2, -1, 2, 4) for a in (q, k, v)]
    out = by_hand(*split).reshape(2, 3, 8) @ np.asarray(layer.to_out[0].kernel[...]) + layer.to_out[0].bias[...]
    np.testing.assert_allclose(layer(x, context), out, rtol=1e-4, atol=1e-5)
