"""Classifier-free guidance against a float64 transcription."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.diffusion.guidance import classifier_free


def outputs():
    rng = np.random.default_rng(0)
    spread = np.array([1.0, 4.0, 0.2])[:, None, None, None, None]  # samples that a batch-wide deviation would mix up
    return (spread * rng.normal(size=(3, 4, 5, 6, 2)) + 1).astype(np.float32), rng.normal(size=(3, 4, 5, 6, 2)).astype(np.float32)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_transcription(scale, phi):
    cond, uncond = outputs()
    got = jax.jit(classifier_free)(cond, uncond, scale, phi)
    for b in range(3):
        c, u = cond[b].astype(np.float64), uncond[b].astype(np.float64)
        g = u + scale * (c - u)
        wanted = phi * g * (c.std() / g.std()) + (1 - phi) * g
        np.testing.assert_allclose(got[b], wanted, atol=1e-5 * np.abs(g).max())  # float32 sums


def test_full_rescale_restores_the_deviation_of_the_conditional_output():
    cond, uncond = outputs()
    got = np.asarray(classifier_free(cond, uncond, 7.5, 1.0), np.float64)
    np.testing.assert_allclose(got.std((1, 2, 3, 4)), cond.astype(np.float64).std((1, 2, 3, 4)), rtol=1e-5)


def test_zero_outputs_stay_finite():
    """A U-Net at initialisation puts out exact zeros."""
    zeros = jnp.zeros((2, 3, 4, 4, 2))
    np.testing.assert_array_equal(classifier_free(zeros, zeros, 7.5, 0.7), 0.0)


def test_a_constant_guided_output_stays_finite():
    cond = jnp.asarray(np.random.default_rng(0).normal(scale=10, size=(1, 64)), jnp.float32)
    np.testing.assert_array_equal(classifier_free(cond, 2 * cond, 2.0), 0 * cond)


def test_float32_out_of_bfloat16():
    cond, uncond = (jnp.asarray(x, jnp.bfloat16) for x in outputs())
    assert classifier_free(cond, uncond, 7.5, 0.7).dtype == jnp.float32
