"""Noising, targets and conversions against the reference's arrays and a float64 transcription of the definitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.diffusion.objective import SPACES, add_noise, convert, target, to_eps, to_x0
from motif_jax.diffusion.schedule import make_schedule, zero_terminal_snr_betas
from motif_jax.losses import motif_loss

T_B = np.array([0, 3, 250, 998, 999])
SHAPE = (5, 2, 3, 4, 4)


def schedules():
    return {
        "plain": make_schedule(zero_terminal_snr=False),
        "zero_snr_rescaled": make_schedule(zero_terminal_snr=True, base_scale=0.7),
    }


def example(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=SHAPE).astype(np.float32), rng.normal(size=SHAPE).astype(np.float32)


def transcription(schedule, x0, noise, t, path):
    """x_t and the target in every space, float64, from the formulas alone; path is "flow" or "diffusion"."""
    x0, noise = x0.astype(np.float64), noise.astype(np.float64)
    column = (-1, *[1] * (x0.ndim - 1))
    if path == "flow":
        s = ((t + 1) / 1000).reshape(column)
        return (1 - s) * x0 + s * noise, {"flow": noise - x0, "flow_x0": x0, "x0": x0, "eps": noise}
    betas = np.linspace(8.5e-4**0.5, 1.2e-2**0.5, 1000) ** 2
    ab = np.cumprod(1 - (zero_terminal_snr_betas(betas) if schedule.alphas_cumprod[-1] == 0 else betas))[t].reshape(column)
    z = schedule.scale.astype(np.float64)[t].reshape(column) * x0
    return np.sqrt(ab) * z + np.sqrt(1 - ab) * noise, {"x0": z, "eps": noise, "v": np.sqrt(ab) * noise - np.sqrt(1 - ab) * z}


def test_noising_equals_reference(shared):
    golden = np.load(shared / "golden/videocrafter2/ddim_tiny.npz")
    z0, noise, t = golden["q/z0"], golden["q/noise"], golden["q/t"]
    for base_scale, name in ((0.7, "q/xt_scale"), (1.0, "q/xt_plain")):
        schedule = make_schedule(zero_terminal_snr=False, base_scale=base_scale)
        np.testing.assert_allclose(add_noise(schedule, z0, noise, t, "eps"), golden[name], atol=1e-6)


def test_v_training_equals_reference(shared):
    golden = np.load(shared / "golden/videocrafter2/ddim_v_tiny.npz")
    z0, noise, t, output = (golden[f"train_v/{name}"] for name in ("z0", "noise", "t", "model_out"))
    schedule = make_schedule(zero_terminal_snr=True, base_scale=0.7)
    np.testing.assert_allclose(add_noise(schedule, z0, noise, t, "v"), golden["train_v/xt"], atol=1e-6)
    v = target(schedule, z0, noise, t, "v")
    np.testing.assert_allclose(v, golden["train_v/v_target"], atol=1e-6)
    np.testing.assert_allclose(target(schedule, z0, noise, t, "x0"), golden["train_v/z0_rescaled"], atol=1e-6)
    loss, _ = motif_loss(*(np.moveaxis(np.asarray(x), 1, -1) for x in (output, v)), np.zeros((2, 4, 8, 16)))
    np.testing.assert_allclose(loss, golden["train_v/loss"], rtol=1e-6)


def test_eps_training_equals_reference(shared):
    golden = np.load(shared / "golden/videocrafter2/ddim_v_tiny.npz")
    z0, noise, t = (golden[f"train_v/{name}"] for name in ("z0", "noise", "t"))
    schedule = make_schedule(zero_terminal_snr=False)
    np.testing.assert_allclose(add_noise(schedule, z0, noise, t, "eps"), golden["train_eps/xt"], atol=1e-6)
    wanted = target(schedule, z0, noise, t, "eps")
    output = golden["train_eps/model_out"]
    loss, _ = motif_loss(*(np.moveaxis(np.asarray(x), 1, -1) for x in (output, wanted)), np.zeros((2, 4, 8, 16)))
    np.testing.assert_allclose(loss, golden["train_eps/loss"], rtol=1e-6)


@pytest.mark.parametrize("name", ["plain", "zero_snr_rescaled"])
@pytest.mark.parametrize("prediction", SPACES)
def test_transcription(name, prediction):
    """x_t, target, and that the perfect output leads back to the clean latent and the noise."""
    schedule, (x0, noise) = schedules()[name], example()
    x_t, wanted = transcription(schedule, x0, noise, T_B, "flow" if prediction.startswith("flow") else "diffusion")
    got = jax.jit(add_noise, static_argnums=4)(schedule, x0, noise, T_B, prediction)
    np.testing.assert_allclose(got, x_t, atol=1e-6)
    output = target(schedule, x0, noise, T_B, prediction)
    np.testing.assert_allclose(output, wanted[prediction], atol=1e-6)
    # "eps" divides by sqrt(alpha_bar) (0.068 at the plain end, 0 at zero terminal SNR), "x0" by sqrt(1 - alpha_bar) >= 0.029.
    defined = np.ones(5, bool) if prediction != "eps" else schedule.alphas_cumprod[T_B] > 1e-3
    x0_back, eps_back = (f(schedule, x_t.astype(np.float32), output, T_B, prediction) for f in (to_x0, to_eps))
    np.testing.assert_allclose(x0_back[defined], wanted["x0"][defined], atol=2e-5)
    # "flow_x0" divides by s, 0.001 at the first timestep, what float32 rounds by some 1e-7.
    np.testing.assert_allclose(eps_back, wanted["eps"], atol=4e-4 if prediction == "flow_x0" else 2e-5)


def test_flow_runs_from_data_to_noise():
    x0, noise = example()
    schedule = make_schedule(zero_terminal_snr=True, base_scale=0.7)  # neither concerns flow matching
    np.testing.assert_array_equal(add_noise(schedule, x0, noise, np.full(5, 999), "flow"), noise)
    np.testing.assert_allclose(add_noise(schedule, x0, noise, np.full(5, 499), "flow"), (x0 + noise) / 2, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "zero_snr_rescaled"])
@pytest.mark.parametrize(
    ("source", "space"), [*itertools.product(("v", "eps", "x0"), repeat=2), *itertools.product(("flow", "flow_x0"), repeat=2)]
)
def test_perfect_output_has_no_loss_in_any_space(name, source, space):
    """Also where the division is clamped: at t = 0 sqrt(1 - alpha_bar) is 0.029, at 998 and 999 sqrt(alpha_bar) may be 0."""
    schedule, (x0, noise) = schedules()[name], example()
    x_t = add_noise(schedule, x0, noise, T_B, source)
    got = convert(schedule, x_t, target(schedule, x0, noise, T_B, source), T_B, source, space)
    wanted = target(schedule, x0, noise, T_B, source, space)
    np.testing.assert_allclose(got, wanted, atol=1e-5)  # float32 rounding, times ten at most
    _, truth = transcription(schedule, x0, noise, T_B, "flow" if source.startswith("flow") else "diffusion")
    unclamped = 2  # t = 250: sqrt(alpha_bar) = 0.82, sqrt(1 - alpha_bar) = 0.57
    np.testing.assert_allclose(wanted[unclamped], truth[space][unclamped], atol=1e-5)


@pytest.mark.parametrize(
    ("source", "space", "factor"),
    [
        ("v", "eps", lambda alpha, sigma: alpha),
        ("v", "x0", lambda alpha, sigma: sigma),
        ("eps", "x0", lambda alpha, sigma: sigma / max(alpha, 0.1)),
        ("eps", "v", lambda alpha, sigma: 1 / max(alpha, 0.1)),
        ("x0", "eps", lambda alpha, sigma: alpha / max(sigma, 0.1)),
        ("x0", "v", lambda alpha, sigma: 1 / max(sigma, 0.1)),
        ("v", "v", lambda alpha, sigma: 1.0),
        ("flow", "flow_x0", lambda s: s),
        ("flow_x0", "flow", lambda s: 1 / max(s, 0.1)),
    ],
)
def test_loss_space_weighs_the_residual(source, space, factor):
    """A changed space multiplies the error of the network by one known number per timestep, bounded at both ends."""
    schedule, (x0, noise) = schedules()["zero_snr_rescaled"], example()
    error = np.random.default_rng(5).normal(size=SHAPE)
    x_t = add_noise(schedule, x0, noise, T_B, source)
    output = target(schedule, x0, noise, T_B, source) + error
    residual = convert(schedule, x_t, output, T_B, source, space) - target(schedule, x0, noise, T_B, source, space)
    alpha = schedule.sqrt_alphas_cumprod[T_B].astype(np.float64)
    sigma = schedule.sqrt_one_minus_alphas_cumprod[T_B].astype(np.float64)
    levels = zip((T_B + 1) / 1000) if source.startswith("flow") else zip(alpha, sigma, strict=True)
    weights = np.array([factor(*level) for level in levels])
    np.testing.assert_allclose(np.abs(residual), np.abs(error) * weights[:, None, None, None, None], atol=3e-5)


@pytest.mark.parametrize("prediction", SPACES)
def test_float32_whatever_comes_in(prediction):
    schedule = schedules()["plain"]
    x0, noise = (jnp.asarray(x, jnp.bfloat16) for x in example())
    x_t = add_noise(schedule, x0, noise, T_B, prediction)
    output = target(schedule, x0, noise, T_B, prediction).astype(jnp.bfloat16)
    results = [x_t, target(schedule, x0, noise, T_B, prediction)]
    results += [f(schedule, x_t.astype(jnp.bfloat16), output, T_B, prediction) for f in (to_x0, to_eps)]
    results += [convert(schedule, x_t, output, T_B, prediction, prediction)]
    assert {x.dtype for x in results} == {jnp.dtype("float32")}


def test_refuses_unknown_spaces_and_mixed_paths():
    schedule, (x0, noise) = schedules()["plain"], example()
    for f in (add_noise, target, to_x0, to_eps):
        with pytest.raises(ValueError, match="'velocity' is no prediction"):
            f(schedule, x0, noise, T_B, "velocity")
    for source, space in (("flow", "v"), ("x0", "flow"), ("x0", "flow_x0")):
        with pytest.raises(ValueError, match="another path"):
            convert(schedule, x0, noise, T_B, source, space)
