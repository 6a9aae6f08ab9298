"""A network made ready for many calls computes what it did, and its loop casts nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core

from motif_jax.data.tokens import make_tokenizer
from motif_jax.generation import make_generator
from motif_jax.models import lora
from motif_jax.models.networks import Network, Networks
from motif_jax.models.placement import target_platform

pytestmark = pytest.mark.usefixtures("quick_compile")


def half(tiny):
    return dataclasses.replace(tiny(dtype="bfloat16"), finetune="lora", lora_rank=2)


def weights(networks):
    rng = np.random.default_rng(0)
    shapes = networks.denoiser.shapes | lora.shapes(networks.denoiser.shapes, 2)
    return {k: jnp.asarray(rng.normal(0, 0.05, s.shape) + k.endswith("scale"), jnp.float32) for k, s in sorted(shapes.items())}


def test_cast_parameters_are_the_same_network(tiny):
    config = half(tiny)
    networks = Networks.of(config)
    params = weights(networks)
    cast = networks.denoiser.cast(params)
    assert cast.keys() == networks.denoiser.shapes.keys()
    kept = {k for k, v in cast.items() if k.endswith("kernel") and v.dtype == jnp.float32}
    assert {k.split(".")[0] for k in kept} == {"time_embed", "fps_embedding", "input_blocks", "out"}  # the layers that stay float32
    assert {k for k in kept if k.startswith("input_blocks")} == {"input_blocks.0.0.kernel"}
    assert all(v.dtype == jnp.float32 for k, v in cast.items() if not k.endswith("kernel"))
    rng = np.random.default_rng(1)
    z = jnp.asarray(rng.normal(size=(2, 4, 4, 4, 48)), jnp.float32)
    inputs = z, jnp.array([3, 700]), jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32), jnp.full(2, 8.0), z
    denoise = jax.jit(networks.denoise)
    expected = denoise(params, *inputs)
    np.testing.assert_array_equal(denoise(cast, *inputs), expected)
    assert np.abs(expected).max() > 0.1


def test_state_that_a_step_would_lose_is_refused():
    with pytest.raises(ValueError, match=r"nothing but nnx\.Param; this one also keeps mean, var"):
        Network.of(lambda rngs: nnx.BatchNorm(4, rngs=rngs))


def frozen_of(networks):
    return networks.with_unconditional(networks.init_frozen(), make_tokenizer(networks.config.text))


def test_pixels_come_back(tiny):
    """All 256 levels, through the latents of a pixel autoencoder; black is -1 and white 1."""
    networks = Networks.of(tiny(autoencoder={"scale_factor": 3.0}))
    frames = np.random.default_rng(0).permutation(2 * 4 * 16 * 16 * 3).astype(np.uint8).reshape(2, 4, 16, 16, 3)
    z = networks.encode({}, frames)
    assert (float(z.min()), float(z.max())) == (-3.0, 3.0)
    np.testing.assert_array_equal(networks.decode({}, z), frames)


def test_samples_of_pixels_end_without_noise(tiny):
    """A new network, whose last layer is zero, estimates grey clips; DDIM as VideoCrafter ends it would leave 3.7 grey levels of noise."""
    config = tiny(diffusion={"prediction": "x0"})
    networks = Networks.of(config)
    generate = make_generator(networks)
    inputs = np.zeros((2, 16, 16, 3), np.uint8), np.zeros((2, 8), np.int32), np.full(2, 8, np.float32), np.arange(2)
    clips, _ = generate(networks.denoiser.init(jax.random.key(0)), frozen_of(networks), *inputs)
    assert set(np.unique(clips)) <= {127, 128}


def casts(jaxpr, inside=False):
    """Shapes of what is cast from float32 to bfloat16 in the loops of a trace."""
    for equation in jaxpr.eqns:
        loop = inside or equation.primitive.name == "scan"
        if loop and equation.primitive.name == "convert_element_type":
            (x,), (y,) = equation.invars, equation.outvars
            if (x.aval.dtype, y.aval.dtype) == (jnp.float32, jnp.bfloat16):
                yield x.aval.shape
        for sub in core.jaxprs_in_params(equation.params):
            yield from casts(sub, loop)


def test_the_sampling_loop_casts_no_kernel(tiny):
    config = half(tiny)
    networks = Networks.of(config)
    params = jax.eval_shape(lambda: weights(networks))
    inputs = (
        jax.ShapeDtypeStruct((3, 16, 16, 3), jnp.uint8),
        jax.ShapeDtypeStruct((3, 8), jnp.int32),
        jax.ShapeDtypeStruct((3,), jnp.float32),
        jax.ShapeDtypeStruct((3,), jnp.int32),
    )
    trace = jax.make_jaxpr(make_generator(networks))(params, frozen_of(networks), *inputs)
    found = set(casts(trace.jaxpr))
    assert found  # activations
    assert not found & {s.shape for k, s in networks.denoiser.shapes.items() if k.endswith("kernel")}


@pytest.mark.parametrize("kernels", ["auto", "xla"])
def test_kernels_can_be_left_to_xla(tiny, kernels):
    networks = Networks.of(tiny(kernels=kernels, attention="xla", dtype="bfloat16", data={"height": 64, "width": 64}))
    d = networks.config.data
    latent = jax.ShapeDtypeStruct((1, d.frames, networks.config.latent_height, networks.config.latent_width, 48), jnp.float32)
    one, text = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1, 8, networks.config.text.width), jnp.float32)
    with target_platform("gpu"):
        program = str(jax.make_jaxpr(networks.denoise)(networks.denoiser.shapes, latent, one, text, one, latent))
    assert [name in program for name in ("group_norm_forward", "layer_norm_forward", "geglu_forward")] == [kernels == "auto"] * 3
