"""The motion focal loss against a float64 transcription, by hand, and by its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.losses import motif_loss, region_losses

SHAPE = (3, 4, 5, 6, 2)


def example():
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    return prediction, target, rng.uniform(size=SHAPE[:-1]).astype(np.float32)


@pytest.mark.parametrize("motion_weight", [0.0, 0.5, 1.0, 5.0])
def test_transcription(motion_weight):
    prediction, target, m = example()
    residual = target.astype(np.float64) - prediction
    diffusion = (residual**2).mean()
    motif = ((m.astype(np.float64)[..., None] * residual) ** 2).mean()
    loss, metrics = jax.jit(motif_loss)(prediction, target, m, motion_weight)
    np.testing.assert_allclose(loss, diffusion + motion_weight * motif, rtol=1e-6)
    assert set(metrics) == {"loss", "loss_diffusion", "loss_motif"}
    np.testing.assert_allclose([metrics["loss_diffusion"], metrics["loss_motif"]], [diffusion, motif], rtol=1e-6)
    assert metrics["loss"] == loss


def test_by_hand():
    """Residual 2 everywhere, m' = 1/2 on a quarter of the cells: L_diff = 4, L_motif = 4 * 1/4 * 1/4."""
    m = np.zeros((1, 1, 2, 2))
    m[0, 0, 0, 0] = 0.5
    loss, metrics = motif_loss(np.ones((1, 1, 2, 2, 3)), np.full((1, 1, 2, 2, 3), 3.0), m, 2.0)
    assert (float(metrics["loss_diffusion"]), float(metrics["loss_motif"]), float(loss)) == (4.0, 0.25, 4.5)


def test_gradient_is_weighted_by_one_plus_lambda_m_squared():
    prediction, target, m = example()
    gradient = jax.grad(lambda p: motif_loss(p, target, m, 3.0)[0])(prediction)
    wanted = 2 * (prediction.astype(np.float64) - target) * (1 + 3.0 * m.astype(np.float64)[..., None] ** 2) / prediction.size
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-9)


def test_no_heatmap_leaves_the_diffusion_loss():
    prediction, target, _ = example()
    loss, metrics = motif_loss(prediction, target, np.zeros(SHAPE[:-1]), 1.0)
    assert metrics["loss_motif"] == 0.0 and loss == metrics["loss_diffusion"]


def test_float32_from_bfloat16():
    """One residual of 1 among 2^16 of 1/16: a bfloat16 mean would lose it, and a bfloat16 difference 1 - 1/512."""
    prediction = jnp.zeros((1, 1, 256, 256, 1), jnp.bfloat16)
    target = jnp.full(prediction.shape, 1 / 16, jnp.bfloat16).at[0, 0, 0, 0, 0].set(1.0)
    loss, metrics = motif_loss(prediction, target, jnp.ones((1, 1, 256, 256), jnp.bfloat16), 1.0)
    assert {x.dtype for x in (loss, *metrics.values())} == {jnp.dtype("float32")}
    wanted = (65535 / 256 + 1) / 65536
    np.testing.assert_allclose(metrics["loss_diffusion"], wanted, rtol=1e-6)
    np.testing.assert_allclose(loss, 2 * wanted, rtol=1e-6)
    np.testing.assert_allclose(region_losses(prediction, target, jnp.ones((1, 1, 256, 256)))[:2], [[wanted]] * 2, rtol=1e-6)
    one, less = jnp.ones((1, 1, 1, 1, 1), jnp.bfloat16), jnp.full((1, 1, 1, 1, 1), 2.0**-9, jnp.bfloat16)
    np.testing.assert_allclose(motif_loss(less, one, jnp.zeros((1, 1, 1, 1)))[0], (1 - 2.0**-9) ** 2, rtol=1e-6)


def test_region_losses():
    """Figure 6's pieces per clip, with a clip that does not move and one that moves all over."""
    prediction, target, m = example()
    m[1], m[2] = 0.5, 0.51  # 0.5 itself is not above the threshold
    got = jax.jit(region_losses)(prediction, target, m)
    error = ((target.astype(np.float64) - prediction) ** 2).mean(-1)
    np.testing.assert_allclose(got.overall, error.mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(got.moving, [error[0][m[0] > 0.5].mean(), 0.0, error[2].mean()], rtol=1e-6)
    np.testing.assert_array_equal(got.moving_cells, [(m[0] > 0.5).sum(), 0, 4 * 5 * 6])
    assert 0 < got.moving_cells[0] < 120
    other = region_losses(prediction, target, m, 0.505)
    assert other.moving_cells[1] == 0 and other.moving_cells[2] == 120


def test_region_losses_single_out_a_fault_in_the_moving_region():
    m = np.zeros((1, 2, 4, 4))
    m[:, :, 0] = 1.0
    prediction = np.zeros((1, 2, 4, 4, 3))
    prediction[:, :, 0] = 2.0
    got = region_losses(prediction, np.zeros_like(prediction), m)
    assert (float(got.overall[0]), float(got.moving[0]), float(got.moving_cells[0])) == (1.0, 4.0, 8.0)
