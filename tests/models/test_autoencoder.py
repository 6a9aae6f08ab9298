"""The autoencoders: the KL one against the reference's outputs, the pixel one against its own definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from motif_jax.config import AutoencoderConfig
from motif_jax.interop.tables import autoencoder as interop
from motif_jax.models.autoencoder import AttentionBlock, ResBlock, make_autoencoder, posterior_latents
from motif_jax.models.layers import Initializer

pytestmark = pytest.mark.usefixtures("quick_compile")

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reference(tiny_autoencoder, with_reference_weights):
    return with_reference_weights(lambda: make_autoencoder(tiny_autoencoder, nnx.Rngs(0)), "ae", interop)


def last(x):
    return np.moveaxis(x, 1, -1)


def first(x):
    return np.moveaxis(np.asarray(x), -1, 1)


def test_encoder_and_decoder_are_the_reference_s(reference, golden, difference):
    graph, params = reference
    moments = jax.jit(lambda params, x: nnx.merge(graph, params).encode(x))(params, last(golden["autoencoder/x"]))
    assert difference(first(moments), golden["autoencoder/moments"]) < TOLERANCE
    decoded = jax.jit(lambda params, z: nnx.merge(graph, params).decode(z))(params, last(golden["autoencoder/z"]))
    assert difference(first(decoded)[:, :, ::3, 1::3], golden["autoencoder/decoded"]) < TOLERANCE


def test_attention_of_small_inputs(reference, golden, difference):
    """Inputs of 3e-3 show the norm's epsilon of 1e-6."""
    graph, params = reference
    out = nnx.merge(graph, params).encoder.mid.attn_1(last(golden["autoencoder/attn_small_in"]))
    assert difference(first(out), golden["autoencoder/attn_small_out"]) < TOLERANCE


@pytest.mark.slow
def test_every_stored_output(reference, shared, difference):
    graph, params = reference
    published = np.load(shared / "golden/videocrafter2/autoencoder_tiny_io.npz")
    units = np.load(shared / "golden/videocrafter2/units_tiny_io.npz")
    model = nnx.merge(graph, params)
    moments = jax.jit(lambda params, x: nnx.merge(graph, params).encode(x))(params, last(published["x"]))
    assert difference(first(moments)[:, :4], published["mean"]) < TOLERANCE
    assert difference(first(moments)[:, 4:], published["logvar"]) < TOLERANCE
    decoded = jax.jit(lambda params, z: nnx.merge(graph, params).decode(z))(params, last(published["z"]))
    assert difference(first(decoded), published["decoded"]) < TOLERANCE
    layers = {
        "ae_resnet": model.encoder.down[0].block[0],
        "ae_attn": model.encoder.mid.attn_1,
        "ae_downsample": model.encoder.down[0].downsample,
        "ae_upsample": model.decoder.up[3].upsample,
    }
    for case, layer in layers.items():
        for size in ("", "_small"):
            out = first(layer(last(units[f"{case}{size}/in"])))
            assert difference(out, units[f"{case}{size}/out"]) < TOLERANCE, case + size


def test_bfloat16_stays_close(tiny_autoencoder, reference, golden, difference):
    """Some 60 roundings to 8 bits lie in a row, of weights and of the convolutions' inputs: 1.2e-2 for moments and 2.0e-2 for pixels,
    which are 2.2e-2 off where what the blocks add up is rounded too."""
    graph = nnx.split(nnx.eval_shape(lambda: make_autoencoder(tiny_autoencoder, nnx.Rngs(0), jnp.bfloat16)), nnx.Param)[0]
    moments = jax.jit(lambda params, x: nnx.merge(graph, params).encode(x))(reference[1], last(golden["autoencoder/x"]))
    decoded = jax.jit(lambda params, z: nnx.merge(graph, params).decode(z))(reference[1], last(golden["autoencoder/z"]))
    assert difference(first(moments), golden["autoencoder/moments"]) < 2.1e-2
    assert difference(first(decoded)[:, :, ::3, 1::3], golden["autoencoder/decoded"]) < 2.1e-2


def test_bfloat16_blocks_add_in_float32():
    """A thousandth added to 1 would be lost in bfloat16, whose next number is 1.0078."""
    options = {"init": Initializer(nnx.Rngs(0)), "dtype": jnp.bfloat16}
    block, attention = ResBlock(32, 32, **options), AttentionBlock(32, **options)
    for module, layer in ((block, block.conv2), (attention, attention.proj_out)):
        layer.kernel[...], layer.bias[...] = jnp.zeros_like(layer.kernel[...]), jnp.full(32, 1e-3)
        added = module(jnp.ones((1, 4, 4, 32), jnp.bfloat16)) - 1
        np.testing.assert_allclose(added, 1e-3, rtol=2**-8)  # of the layer's own result in bfloat16


def test_log_variance_is_clamped(tiny_autoencoder):
    graph, params = nnx.split(make_autoencoder(AutoencoderConfig(ch=32, ch_mult=(1,), factor=1, num_res_blocks=1), nnx.Rngs(0)), nnx.Param)
    params = nnx.to_pure_dict(params)
    params["quant_conv"]["bias"] = jnp.asarray([0.0] * 4 + [1e3, -1e3, 0.0, 0.0])
    moments = nnx.merge(graph, params).encode(jnp.zeros((1, 4, 4, 3)))
    assert set(np.unique(moments[..., 4])) == {20.0} and set(np.unique(moments[..., 5])) == {-30.0}


def test_posterior_latents():
    """The mean without noise; with it, a Gaussian of the given mean and deviation, times the scale factor."""
    mean, deviation = np.float32([1.0, -2.0]), np.float32([0.5, 3.0])
    moments = np.broadcast_to(np.concatenate([mean, 2 * np.log(deviation)]), (1, 100, 100, 4))
    np.testing.assert_allclose(posterior_latents(moments, 0.5)[0, 0, 0], 0.5 * mean)
    noise = jax.random.normal(jax.random.key(0), (1, 100, 100, 2))
    sample = np.asarray(posterior_latents(moments.astype(np.float16), 0.5, noise))
    assert sample.dtype == np.float32
    np.testing.assert_allclose(sample.mean((0, 1, 2)), 0.5 * mean, atol=5 * 1.5 / 100)  # five standard errors
    np.testing.assert_allclose(sample.std((0, 1, 2)), 0.5 * deviation, rtol=0.05)


def test_pixel_autoencoder_loses_nothing():
    config = AutoencoderConfig(kind="pixel", factor=4, z_channels=48, scale_factor=1.0)
    model = make_autoencoder(config, nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.split(model, nnx.Param)[1])
    x = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    moments = model.encode(x)
    assert moments.shape == (2, 2, 3, 96)
    np.testing.assert_array_equal(moments[..., 48:], -30)
    # One cell holds the pixels of its own block.
    np.testing.assert_array_equal(np.sort(moments[1, 0, 2, :48]), np.sort(x[1, :4, 8:].ravel()))
    np.testing.assert_array_equal(model.decode(posterior_latents(moments, 1.0)), x)


def test_wrong_sizes_are_named():
    model = make_autoencoder(AutoencoderConfig(kind="pixel", factor=4, z_channels=48), nnx.Rngs(0))
    with pytest.raises(ValueError, match="10x8 does not divide into latent cells of 4"):
        model.encode(np.zeros((1, 10, 8, 3), np.float32))
    with pytest.raises(ValueError, match="has 48 channels, not 4"):
        make_autoencoder(AutoencoderConfig(kind="pixel", factor=4), nnx.Rngs(0))
