"""The noise schedule against the reference's buffers and against facts that can be checked by hand."""

import jax
import numpy as np
import pytest

from motif_jax.diffusion.schedule import at, make_schedule, zero_terminal_snr_betas

PLAIN = {"num_timesteps": 1000, "beta_start": 8.5e-4, "beta_end": 1.2e-2, "zero_terminal_snr": False}
BUFFERS = ("betas", "alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")


@pytest.mark.parametrize(
    ("file", "prefix", "zero_terminal_snr"),
    [("ddim_tiny.npz", "vc_buffer/", False), ("ddim_v_tiny.npz", "dc_buffer/", True)],
    ids=["videocrafter", "dynamicrafter"],
)
def test_equals_reference_buffers(shared, file, prefix, zero_terminal_snr):
    """Bit for bit: the same float64 arithmetic, cast once."""
    golden = np.load(shared / "golden/videocrafter2" / file)
    schedule = make_schedule(**{**PLAIN, "zero_terminal_snr": zero_terminal_snr}, base_scale=0.7)
    for name in BUFFERS:
        np.testing.assert_array_equal(getattr(schedule, name), golden[prefix + name], err_msg=name)
    np.testing.assert_array_equal(schedule.scale, golden[prefix + "scale_arr"][:1000])


def test_zero_terminal_snr_in_float64(shared):
    golden = np.load(shared / "golden/videocrafter2/ddim_v_tiny.npz")
    betas = zero_terminal_snr_betas(np.linspace(8.5e-4**0.5, 1.2e-2**0.5, 1000) ** 2)
    np.testing.assert_allclose(betas, golden["ztsnr_betas_f64"], rtol=1e-12)


def test_known_values():
    schedule = make_schedule(**PLAIN, base_scale=0.7)
    np.testing.assert_allclose(schedule.alphas_cumprod[[0, 499, 999]], [0.99915, 0.27767, 0.0046601], rtol=2e-5)
    np.testing.assert_allclose(schedule.sqrt_alphas_cumprod[999], 0.068265, rtol=1e-5)
    np.testing.assert_allclose(schedule.scale[[0, 1, 398, 399, 400, 999]], [1, 1 - 0.3 / 399, 0.7 + 0.3 / 399, 0.7, 0.7, 0.7], rtol=1e-6)
    assert all(table.dtype == np.float32 and table.shape == (1000,) for table in schedule)


def test_zero_terminal_snr_ends_in_pure_noise():
    plain, zero = make_schedule(**PLAIN), make_schedule(**{**PLAIN, "zero_terminal_snr": True})
    assert zero.alphas_cumprod[999] == 0.0 and zero.sqrt_one_minus_alphas_cumprod[999] == 1.0 and zero.betas[999] == 1.0
    np.testing.assert_allclose(zero.alphas_cumprod[0], plain.alphas_cumprod[0], rtol=1e-7)
    np.testing.assert_allclose([zero.alphas_cumprod[998], zero.betas[998]], [1.97e-7, 0.751], rtol=3e-3)
    assert np.all(np.diff(zero.alphas_cumprod) < 0)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_variance_preserving(zero_terminal_snr):
    schedule = make_schedule(**{**PLAIN, "zero_terminal_snr": zero_terminal_snr})
    total = schedule.sqrt_alphas_cumprod.astype(np.float64) ** 2 + schedule.sqrt_one_minus_alphas_cumprod.astype(np.float64) ** 2
    np.testing.assert_allclose(total, 1.0, atol=2e-7)  # two float32 roundings
    np.testing.assert_array_equal(schedule.scale, 1.0)  # the dynamic rescale is off unless asked for


def test_few_timesteps():
    schedule = make_schedule(10, 1e-3, 0.2, zero_terminal_snr=True, base_scale=0.5)
    assert schedule.num_timesteps == 10 and all(len(table) == 10 for table in schedule)
    np.testing.assert_allclose(schedule.scale, 1 - 0.5 * np.arange(10) / 399, rtol=1e-6)


def test_at_broadcasts_over_the_batch_and_jits():
    schedule = make_schedule(**PLAIN)
    t = np.array([999, 0, 499])
    got = jax.jit(lambda schedule, t: at(schedule.alphas_cumprod, t, 4))(schedule, t)
    assert got.shape == (3, 1, 1, 1)
    np.testing.assert_array_equal(got[:, 0, 0, 0], schedule.alphas_cumprod[t])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_timesteps": 1}, "num_timesteps=1"),
        ({"beta_start": 0.0}, "beta_start=0.0"),
        ({"beta_start": 0.1}, "beta_end=0.012"),
        ({"beta_end": 1.0}, "beta_end=1.0"),
        ({"base_scale": 0.0}, "base_scale=0.0"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(**{**PLAIN, **change})
