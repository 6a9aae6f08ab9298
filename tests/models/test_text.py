"""The text towers: OpenCLIP against the reference's outputs, `words` against what it promises."""

import jax
import numpy as np
import pytest
from flax import nnx

from motif_jax.config import TextConfig
from motif_jax.interop.tables import openclip as interop
from motif_jax.models.text import make_text_tower

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reference(tiny_text, with_reference_weights):
    # The reference's names carry the prefix of FrozenOpenCLIPEmbedder.
    return with_reference_weights(lambda: make_text_tower(tiny_text, nnx.Rngs(0)), "text.model", interop)


def test_penultimate_output_is_the_reference_s(reference, golden, difference):
    graph, params = reference
    out = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, golden["text/tokens"])
    assert difference(out, golden["text/penultimate_ln"]) < TOLERANCE
    block = nnx.merge(graph, params).transformer.resblocks[0]
    assert difference(block(golden["text/small_in"]), golden["text/small_out"]) < TOLERANCE  # causal: a prefix is enough


@pytest.mark.slow
def test_every_stored_output(reference, shared, difference):
    graph, params = reference
    published = np.load(shared / "golden/videocrafter2/text_tiny_io.npz")
    units = np.load(shared / "golden/videocrafter2/units_tiny_io.npz")
    model = nnx.merge(graph, params)
    assert difference(model(published["tokens"]), published["penultimate_ln"]) < TOLERANCE
    x = published["embed_plus_pos"]
    for i in range(2):
        x = np.asarray(model.transformer.resblocks[i](x))
        assert difference(x, published[f"pen_resblock_{i}"]) < TOLERANCE
    for size in ("", "_small"):
        out = model.transformer.resblocks[0](units[f"clip_resblock{size}/in"])
        assert difference(out, units[f"clip_resblock{size}/out"]) < TOLERANCE


def test_last_block_is_not_run(reference, golden):
    graph, params = reference
    blocks = params["transformer"]["resblocks"]
    broken = {**params, "transformer": {"resblocks": {**blocks, 2: jax.tree.map(lambda leaf: leaf * np.nan, blocks[2])}}}
    assert np.isfinite(nnx.merge(graph, broken)(golden["text/tokens"])).all()


def test_words():
    """No parameters; a token has one vector wherever it stands, up to the position code; vectors are nearly orthogonal."""
    config = TextConfig(kind="words", vocab_size=300, context_length=6, width=256)
    tower = make_text_tower(config, nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.split(tower, nnx.Param)[1])
    tokens = np.asarray([[7, 7, 0, 0, 9, 299], [9, 0, 7, 0, 7, 0]], np.int32)
    out = np.asarray(jax.jit(tower)(tokens))
    assert out.shape == (2, 6, 256) and out.dtype == np.float32
    np.testing.assert_array_equal(out[0, 3], out[1, 3])  # padding is a token like others
    np.testing.assert_allclose(out[0, 4] - out[1, 4], out[1, 0] - out[0, 0], atol=1e-5)  # 9 minus 7, at two positions
    assert np.abs(out[0, 2] - out[0, 3]).max() > 0.1
    table = np.asarray(tower(np.arange(300, dtype=np.int32)[:, None]))[:, 0]
    table = table - table.mean(0)
    cosines = np.corrcoef(table) - np.eye(300)
    assert np.abs(cosines).max() < 6 / 256**0.5  # independent vectors: a deviation of 1/sqrt(width)
    # The same vectors in every process and release: stored embeddings stay valid.
    fresh = np.random.RandomState(20250).standard_normal((300, 256))[9] - np.random.RandomState(20250).standard_normal((300, 256))[7]
    np.testing.assert_allclose(out[1, 0] - out[0, 0], fresh, atol=1e-5)
