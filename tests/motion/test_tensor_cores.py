"""Float32 convolutions on emulated tensor cores against NumPy in float64."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.models.placement import target_platform
from motif_jax.motion import tensor_cores as module


@pytest.mark.parametrize("precision, error", [("highest", 2e-6), ("default", 1e-3)])
def test_convolutions_on_tensor_cores(tensor_cores, precision, error):
    """In three parts float32 keeps its digits (2^-22 is lost, and sums have a thousand terms); in one TF32's 11 bits are left."""
    random = np.random.default_rng(3)
    x, kernel = random.normal(size=(1, 12, 14, 32)), random.normal(size=(3, 3, 32, 16))
    dimensions = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    found = module.convolve(jnp.float32(x), jnp.float32(kernel), (1, 1), [(1, 1), (1, 1)], precision=precision, **dimensions)
    patches = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2))
    expected = np.einsum("bhwcyx,yxco->bhwo", patches, kernel)
    difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error / 100 < difference < error and len(tensor_cores) == 1


@pytest.mark.parametrize("stride", [1, 2])
def test_few_outputs_of_one_position_are_a_float32_product(tensor_cores, stride):
    random = np.random.default_rng(5)
    x, kernel = random.normal(size=(2, 6, 8, 32)), random.normal(size=(1, 1, 32, 16))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": "highest"}
    found = module.convolve(jnp.float32(x), jnp.float32(kernel), (stride, stride), [(0, 0), (0, 0)], **options)
    assert not tensor_cores  # no convolution in TF32
    np.testing.assert_allclose(found, x[:, ::stride, ::stride] @ kernel[0, 0], atol=2e-5)  # sums of 32 terms of size 1


@pytest.mark.parametrize("capability, parts", [("7.5", 1), ("8.0", 3), ("12.0", 3), ("gfx942", 1)])
def test_three_parts_are_for_gpus_that_have_tf32(monkeypatch, capability, parts):
    """Elsewhere they would be three convolutions in float32."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    with target_platform("gpu"):
        assert module.prepare(jnp.zeros((3, 3, 8, 4)), "highest").shape == (4, 3, 3, parts, 8)
