"""Recomputation: the same gradient from fewer kept activations, on the transformer, whose blocks are all there is to save.

What the compiled program needs is not compared: XLA's CPU backend merges the recomputation with the first computation.
"""

import contextlib
import io
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

from motif_jax.models.layers import Initializer, recompute
from motif_jax.models.networks import Networks
from motif_jax.models.placement import target_platform
from motif_jax.models.transformer import SpatialTransformer, TemporalTransformer
from motif_jax.models.unet3d import ResBlock

pytestmark = pytest.mark.usefixtures("quick_compile")

BATCH = 4


@pytest.fixture(scope="module")
def found(tiny, quick_compile):
    """{remat: (gradient, elements kept for the backward pass, moments of norms among them)}."""
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(BATCH, 4, 8, 8, 48)), jnp.float32)
    results = {}
    for remat in ("none", "block", "convs", "dots"):
        dit = {"width": 32, "depth": 2, "num_head_channels": 16, "patch": [4, 1, 1]}
        networks = Networks.of(tiny(remat=remat, backbone="dit", dit=dit, data={"height": 32, "width": 32}))
        shapes = sorted(networks.denoiser.shapes.items())
        weights = np.random.default_rng(1)
        params = {k: jnp.asarray(weights.normal(0, 0.1, s.shape) + k.endswith("scale"), jnp.float32) for k, s in shapes}

        def loss(params, networks=networks):
            text = jnp.ones((BATCH, 8, 16))
            return jnp.mean(networks.denoise(params, z, jnp.full(BATCH, 5), text, jnp.full(BATCH, 8.0), z) ** 2)

        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            print_saved_residuals(loss, params)
        kept = [line for line in text.getvalue().splitlines() if "from the argument" not in line]
        sizes = [math.prod(map(int, found.group(1).split(","))) for line in kept if (found := re.match(r"\w+\[([\d,]+)\]", line))]
        moments = [line for line in kept if "named 'moments'" in line]
        # Gradients that are zero but for roundings are compared too: as XLA rounds by default.
        gradient = jax.jit(jax.grad(loss), compiler_options=dict.fromkeys(quick_compile, True))(params)
        results[remat] = gradient, sum(sizes), len(moments)
    return results


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_equal_gradients(found, remat):
    for name, expected in found["none"][0].items():
        # The same sums in other fusions, relative to the largest entry.
        np.testing.assert_allclose(found[remat][0][name], expected, atol=1e-5 * float(jnp.abs(expected).max()) + 1e-12, err_msg=name)


def test_less_is_kept(found):
    kept = {remat: size for remat, (_, size, _) in found.items()}
    assert kept["block"] < 0.4 * kept["none"]
    assert kept["block"] < kept["dots"] < 0.6 * kept["none"]


@pytest.mark.parametrize("remat", ["block", "convs", "dots"])
def test_moments_are_kept(found, remat):
    """The mean and the variance of the three norms of each of the two blocks; outside of the blocks nothing is recomputed."""
    assert found[remat][2] >= 2 * 3 * 2


@pytest.mark.parametrize("platform, remat, count", [("gpu", "dots", 6), ("gpu", "convs", 0), ("cpu", "dots", 0)])
def test_what_goes_into_convolutions_is_kept_on_a_gpu(tiny, platform, remat, count):
    """Of a residual block its two convolutions' and the four over frames'; the 1x1 skip's, a cast of the input, is not."""
    width = 32
    block = ResBlock(16, width, 8, tiny().unet, itertools.count(), init=Initializer(nnx.Rngs(0)), dtype=jnp.bfloat16)
    graph, state = nnx.split(block)
    x, embedding = jnp.ones((1, 4, 8, 8, 16)), jnp.ones((1, 8))
    text = io.StringIO()
    with target_platform(platform), contextlib.redirect_stdout(text):
        print_saved_residuals(recompute(lambda state: nnx.merge(graph, state)(x, embedding, jax.random.key(0)).sum(), remat), state)
    assert text.getvalue().count("named 'conv_input'") == count


def saved(platform: str, remat: str, block: nnx.Module, *args: jax.Array) -> str:
    """What `block` keeps for its backward pass."""
    graph, state = nnx.split(block)
    text = io.StringIO()
    with target_platform(platform), contextlib.redirect_stdout(text):
        print_saved_residuals(recompute(lambda state: nnx.merge(graph, state)(*args).sum(), remat), state)
    return text.getvalue()


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("remat, count", [("dots", 2), ("convs", 0)])
def test_the_kernel_of_attention_over_frames_runs_once(platform, remat, count):
    """Of a temporal transformer's kernels the results of its two attentions are kept; those of its norms would be as many again."""
    options = {"conv_projections": False, "init": Initializer(nnx.Rngs(0)), "dtype": jnp.bfloat16, "implementation": "auto"}
    text = saved(platform, remat, TemporalTransformer(32, 2, 16, 1, 8, **options), jnp.ones((1, 16, 2, 4, 32)))
    assert text.count("named 'attention'") == count and "output of pallas_call" not in text, text


@pytest.mark.parametrize("remat, count", [("dots", 2), ("convs", 0)])
def test_splash_attention_runs_once(remat, count):
    """Kept are its result and the logarithms of the weights' sums."""
    options = {"image": False, "image_scale": False, "init": Initializer(nnx.Rngs(0)), "dtype": jnp.bfloat16, "implementation": "auto"}
    text = saved("tpu", remat, SpatialTransformer(32, 16, 1, 8, 8, **options), jnp.ones((1, 2, 16, 32, 32)), jnp.ones((1, 7, 8)))
    assert text.count("output of jitted function '_splash_attention'") == count and "output of pallas_call" not in text, text
