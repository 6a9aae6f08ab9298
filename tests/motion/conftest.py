import jax
import pytest

from motif_jax.models.placement import target_platform


@pytest.fixture
def tensor_cores(monkeypatch):
    """What a GPU runs, with the convolutions that it may carry out in TF32 doing so: their inputs have 11 significant bits."""
    convolve, rounded = jax.lax.conv_general_dilated, []

    def in_tf32(x, kernel, *arguments, precision=None, **options):
        if precision == "default":
            rounded.append(kernel.shape)
            x, kernel = (jax.lax.reduce_precision(a, 8, 10) for a in (x, kernel))
        return convolve(x, kernel, *arguments, precision=precision, **options)

    monkeypatch.setattr(jax.lax, "conv_general_dilated", in_tf32)
    with target_platform("gpu"):
        yield rounded
