"""DDIM against trajectories of both references, and both samplers against a case whose answer is known in closed form.

The stored trajectories hold x and the estimate of x_0 after every step. From the two, the network's output at that step follows
by the definition of the prediction; a function that replays these outputs stands in for the network, and every next x is
then a test of the update rule alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.diffusion.samplers import ddim, ddim_steps, ddim_timesteps, flow_euler
from motif_jax.diffusion.schedule import make_schedule

VC, DC = "ddim_tiny.npz", "ddim_v_tiny.npz"
# run: file, prediction, spacing, zero terminal SNR, base_scale, eta, dynamic rescale divided out of the result
RUNS = {
    "eps_vc_scale": (VC, "eps", "uniform", False, 0.7, 0.0, True),
    "eps_vc_scale_eta1": (VC, "eps", "uniform", False, 0.7, 1.0, True),
    "eps_vc_noscale": (VC, "eps", "uniform", False, 1.0, 0.0, True),
    "v_dc": (DC, "v", "trailing", True, 0.7, 0.0, False),
    "v_dc_rescale0.7": (DC, "v", "trailing", True, 0.7, 0.0, False),
    "v_dc_rescale0.7_eta1": (DC, "v", "trailing", True, 0.7, 1.0, False),
    "v_dc_uniform": (DC, "v", "uniform", True, 0.7, 0.0, False),
    "eps_x8": (DC, "eps", "uniform", False, 1.0, 0.0, True),
}


def load(shared, file):
    return np.load(shared / "golden/videocrafter2" / file)


@pytest.mark.parametrize("steps", [10, 25, 30, 50])
def test_timesteps_equal_reference(shared, steps):
    vc, dc = load(shared, VC), load(shared, DC)
    np.testing.assert_array_equal(ddim_timesteps(1000, steps, "uniform"), vc[f"vc_timesteps_uniform_{steps}"])
    np.testing.assert_array_equal(ddim_timesteps(1000, steps, "uniform"), dc[f"dc_timesteps_uniform_{steps}"])
    np.testing.assert_array_equal(ddim_timesteps(1000, steps, "trailing"), dc[f"dc_timesteps_uniform_trailing_{steps}"])


def test_timesteps_by_hand():
    assert ddim_timesteps(1000, 50, "uniform")[[0, 1, -1]].tolist() == [1, 21, 981]
    assert ddim_timesteps(1000, 50, "trailing")[[0, 1, -1]].tolist() == [19, 39, 999]
    assert ddim_timesteps(10, 5, "trailing").tolist() == [1, 3, 5, 7, 9]
    assert len(ddim_timesteps(1000, 30, "uniform")) == 31  # the reference's surplus step
    assert ddim_timesteps(1000, 61, "trailing")[[0, 1, -1]].tolist() == [15, 32, 999]  # where the reference adds a timestep -1


@pytest.mark.parametrize(("spacing", "refused"), [("uniform", 599), ("trailing", 0)])
def test_timesteps_lie_inside_or_are_refused(spacing, refused):
    count = 0
    for steps in range(1, 1001):
        try:
            t = ddim_timesteps(1000, steps, spacing)
        except ValueError:
            count += 1
            continue
        assert t[0] >= 0 and t[-1] <= 999 and np.all(np.diff(t) > 0), steps
        assert spacing == "uniform" or (len(t) == steps and t[-1] == 999), steps
    assert count == refused


@pytest.mark.parametrize(
    ("steps", "spacing", "message"),
    [
        (1000, "uniform", r"1\.\.1000, outside 0\.\.999"),
        (999, "uniform", r"outside 0\.\.999"),
        (3, "uniform", r"1\.\.1000, outside 0\.\.999"),
        (0, "uniform", "steps=0"),
        (1001, "trailing", r"1\.\.1000"),
        (50, "linear", "'uniform' or 'trailing'"),
    ],
)
def test_timesteps_refused_with_the_numbers(steps, spacing, message):
    with pytest.raises(ValueError, match=message):
        ddim_timesteps(1000, steps, spacing)


@pytest.mark.parametrize("run", RUNS)
def test_tables_equal_reference(shared, run):
    file, _, spacing, zero, base_scale, eta, unscale = RUNS[run]
    golden = load(shared, file)
    steps = ddim_steps(
        make_schedule(zero_terminal_snr=zero, base_scale=base_scale), ddim_timesteps(1000, 10, spacing), eta, unscale=unscale
    )
    np.testing.assert_array_equal(steps.t[::-1], golden[f"{run}/ddim_timesteps"])
    np.testing.assert_allclose(steps.alpha_prev[::-1] ** 2, golden[f"{run}/ddim_alphas_prev"], rtol=3e-7)
    np.testing.assert_allclose(steps.sigma[::-1], golden[f"{run}/ddim_sigmas"], rtol=1e-6)
    if base_scale < 1.0:
        np.testing.assert_allclose(steps.scale[::-1], golden[f"{run}/ddim_scale_arr"], rtol=1e-7)
        np.testing.assert_allclose(steps.scale_prev[::-1], golden[f"{run}/ddim_scale_arr_prev"], rtol=1e-7)


def implied_outputs(golden, run, prediction, unscale):
    """The network's output at each step, float64, solved from x before it and the reported x_0; and x_0 without rescale."""
    t = golden[f"{run}/ddim_timesteps"].astype(int)[::-1]
    table = golden["vc_buffer/alphas_cumprod" if prediction == "eps" and "vc_buffer/betas" in golden else "dc_buffer/alphas_cumprod"]
    if run == "eps_x8":  # the plain schedule, whose buffers only VideoCrafter's file holds
        table = np.cumprod(1 - np.linspace(8.5e-4**0.5, 1.2e-2**0.5, 1000) ** 2).astype(np.float32)
    ab = table.astype(np.float64)[t].reshape(-1, 1, 1, 1, 1, 1)
    ones = np.ones(len(t))
    scale = golden.get(f"{run}/ddim_scale_arr", ones).astype(np.float64)[::-1].reshape(ab.shape)
    scale_prev = golden.get(f"{run}/ddim_scale_arr_prev", ones).astype(np.float64)[::-1].reshape(ab.shape)
    x = golden[f"{run}/x_inter"][:-1].astype(np.float64)
    # VideoCrafter reports x_0 with the rescale divided out, DynamiCrafter x_0 with that of the previous step.
    clean = golden[f"{run}/pred_x0"][1:] / (1.0 if unscale else scale_prev)
    if prediction == "eps":
        return (x - np.sqrt(ab) * scale * clean) / np.sqrt(1 - ab), clean
    return (np.sqrt(ab) * x - scale * clean) / np.sqrt(1 - ab), clean


@pytest.mark.parametrize("run", RUNS)
def test_every_step_equals_reference(shared, run):
    file, prediction, spacing, zero, base_scale, eta, unscale = RUNS[run]
    golden = load(shared, file)
    outputs, clean = implied_outputs(golden, run, prediction, unscale)
    t = ddim_timesteps(1000, 10, spacing)
    table = np.zeros((1000, *outputs.shape[1:]), np.float32)
    table[t[::-1]] = outputs
    table = jnp.asarray(table)
    noise = load(shared, VC)["eps_vc_scale_eta1/noise"] if eta else None
    schedule = make_schedule(zero_terminal_snr=zero, base_scale=base_scale)

    @jax.jit
    def sample(x):
        return ddim(lambda x, t: table[t[0]], schedule, x, t, prediction, eta, unscale=unscale, noise=noise, trajectory=True)

    final, x, x0 = sample(golden[f"{run}/x_inter"][0])
    np.testing.assert_array_equal(final, x[-1])
    # The rounding of the stored estimate is divided by sqrt(1 - alpha_bar), 0.04 at the last step of a uniform run.
    for i in range(10):
        wanted = golden[f"{run}/x_inter"][i + 1]
        assert np.abs(x[i] - wanted).max() <= 1e-5 * wanted.std(), f"x after step {i}"
        assert np.abs(x0[i] - clean[i]).max() <= 1e-5 * clean[i].std(), f"x_0 of step {i}"
    assert np.abs(final - golden[f"{run}/final"]).max() <= 1e-5 * golden[f"{run}/final"].std()


MEAN, DEVIATION = 0.8, 0.3  # of the "data" below


def gaussian_output(schedule, prediction):
    """The best possible prediction for data from N(MEAN, DEVIATION^2): Bayes' rule for Gaussians."""

    def denoise(x, t_B):
        if prediction.startswith("flow"):
            sigma = (t_B[0] + 1) / schedule.num_timesteps
            alpha = 1 - sigma
        else:
            alpha, sigma = jnp.asarray(schedule.sqrt_alphas_cumprod)[t_B[0]], jnp.asarray(schedule.sqrt_one_minus_alphas_cumprod)[t_B[0]]
        variance = alpha**2 * DEVIATION**2 + sigma**2
        x0 = MEAN + alpha * DEVIATION**2 / variance * (x - alpha * MEAN)
        eps = sigma / variance * (x - alpha * MEAN)
        return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0, "flow_x0": x0}[prediction]

    return denoise


def path(schedule, t, prediction):
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) (or 1 - s and s) from the first step's start to the last step's end, float64."""
    if prediction.startswith("flow"):
        noise = np.append((t[::-1] + 1) / schedule.num_timesteps, 0.0)
        return 1 - noise, noise
    ab = np.append(schedule.alphas_cumprod.astype(np.float64)[t[::-1]], 1.0)
    return np.sqrt(ab), np.sqrt(1 - ab)


@pytest.mark.parametrize("prediction", ["v", "x0", "eps", "flow", "flow_x0"])
def test_gaussian_data_in_closed_form(prediction):
    """For Gaussian data every step is affine: y = x - alpha MEAN is multiplied by (alpha alpha' D^2 + sigma sigma') / variance."""
    schedule = make_schedule(zero_terminal_snr=prediction != "eps")
    z = jnp.linspace(-2.0, 2.0, 24).reshape(2, 12)
    t = ddim_timesteps(1000, 20, "trailing")
    denoise = gaussian_output(schedule, prediction)
    if prediction.startswith("flow"):
        got = flow_euler(denoise, schedule, z, t, prediction)
    else:
        got = ddim(denoise, schedule, z, t, prediction, final="exact")
    alpha, sigma = path(schedule, t, prediction)
    factors = (alpha[:-1] * alpha[1:] * DEVIATION**2 + sigma[:-1] * sigma[1:]) / (alpha[:-1] ** 2 * DEVIATION**2 + sigma[:-1] ** 2)
    wanted = MEAN + np.prod(factors) * (np.asarray(z, np.float64) - alpha[0] * MEAN)
    np.testing.assert_allclose(got, wanted, atol=2e-5)  # float32 over 20 steps


def test_more_steps_come_closer():
    """The probability flow of Gaussian data keeps the standardised value: noise z ends at MEAN + DEVIATION z."""
    schedule = make_schedule()
    z = jnp.linspace(-2.0, 2.0, 8).reshape(1, 8)
    errors = {}
    for name in ("v", "flow"):
        denoise = gaussian_output(schedule, name)
        for steps in (10, 100):
            t = ddim_timesteps(1000, steps, "trailing")
            got = flow_euler(denoise, schedule, z, t) if name == "flow" else ddim(denoise, schedule, z, t, name, final="exact")
            errors[name, steps] = np.abs(got - (MEAN + DEVIATION * z)).max()
    assert errors["v", 100] < errors["v", 10] / 5 and errors["flow", 100] < errors["flow", 10] / 5  # first order: a tenth


def test_stochastic_sampling_keeps_the_distribution():
    """Mean and variance after each affine step plus its noise, in closed form as above."""
    schedule, t = make_schedule(), ddim_timesteps(1000, 20, "trailing")
    x = jax.random.normal(jax.random.key(0), (4, 5000))
    noise = jax.random.normal(jax.random.key(1), (len(t), *x.shape))
    got = ddim(gaussian_output(schedule, "v"), schedule, x, t, "v", 1.0, noise=noise, final="exact")
    alpha, sigma = path(schedule, t, "v")
    variance = 1.0
    for a, s, a_next, s_next in zip(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], strict=True):
        fresh = (s_next / s) ** 2 * (1 - (a / a_next) ** 2)
        factor = (a * a_next * DEVIATION**2 + np.sqrt(max(s_next**2 - fresh, 0.0)) * s) / (a**2 * DEVIATION**2 + s**2)
        variance = factor**2 * variance + fresh
    assert abs(float(got.mean()) - MEAN) < 0.007  # 20000 values: standard error 0.002
    assert abs(float(got.std()) / variance**0.5 - 1) < 0.02  # standard error 0.005


def test_fresh_noise_at_every_step():
    """With x_0 predicted as 0, x' = direction x / sqrt(1 - ab) + sigma z: z can be solved for."""
    schedule, t = make_schedule(), ddim_timesteps(1000, 10, "uniform")
    x_T = jax.random.normal(jax.random.key(0), (2, 5000))

    def run(seed):
        noise = jax.random.normal(jax.random.key(seed), (len(t), *x_T.shape))
        _, x, _ = ddim(lambda x, t: 0 * x, schedule, x_T, t, "x0", 1.0, noise=noise, trajectory=True)
        return np.asarray(x)

    x, steps = run(3), ddim_steps(schedule, t, 1.0)
    before = np.concatenate([np.asarray(x_T)[None], x[:-1]])
    root = schedule.sqrt_one_minus_alphas_cumprod[steps.t]
    z = (x - (steps.direction / root)[:, None, None] * before) / steps.sigma[:, None, None]
    correlation = np.corrcoef(np.concatenate([np.asarray(x_T)[None], z]).reshape(11, -1))
    np.testing.assert_allclose(z.std((1, 2)), 1.0, atol=0.03)  # 10000 values: standard error 0.007
    assert np.abs(correlation - np.eye(11)).max() < 0.05
    np.testing.assert_array_equal(run(3), x)
    assert np.abs(run(4)[0] - x[0]).max() > 0.1


@pytest.mark.parametrize("steps", [5, 8, 10, 20, 25, 40, 50, 100, 200])
def test_no_nan_at_zero_terminal_snr_with_full_noise(steps):
    """1 - ab_prev - sigma^2 is 0 up to rounding in the first step; without a clamp its root is NaN for 20 and 25 steps in float32."""
    schedule, t = make_schedule(), ddim_timesteps(1000, steps, "trailing")
    tables = ddim_steps(schedule, t, eta=1.0)
    assert all(np.isfinite(table).all() for table in tables) and tables.direction[0] < 1e-3
    got = ddim(lambda x, t: 0.1 * x, schedule, jnp.ones((1, 4)), t, "v", 1.0, noise=jax.random.normal(jax.random.key(0), (len(t), 1, 4)))
    assert np.isfinite(got).all()


def test_where_the_last_step_ends():
    """A constant estimate of x_0 comes back times the known factor, plus the trace of noise that the reference leaves."""
    schedule = make_schedule(base_scale=0.7)
    t = ddim_timesteps(1000, 10, "trailing")
    x_T, c = jnp.full((1, 3), 2.0), 0.6

    def run(**options):
        # The network predicts the rescaled x_0, as it was trained to.
        _, x, x0 = ddim(
            lambda x, t: c * jnp.asarray(schedule.scale)[t][:, None] + 0 * x, schedule, x_T, t, "x0", trajectory=True, **options
        )
        np.testing.assert_allclose(x0, c, rtol=1e-6)
        return np.asarray(x)

    exact = run(final="exact")
    np.testing.assert_allclose(exact[-1], c, rtol=1e-6)
    ab = schedule.alphas_cumprod.astype(np.float64)
    eps = (exact[-2] - np.sqrt(ab[99]) * c * schedule.scale[99]) / np.sqrt(1 - ab[99])
    trace = np.sqrt(1 - ab[0]) * eps
    assert np.all(np.abs(trace) > 0.02)  # the residue is there to be seen
    np.testing.assert_allclose(run(final="reference")[-1], np.sqrt(ab[0]) * c + trace, rtol=1e-5)
    np.testing.assert_allclose(run(final="reference", unscale=False)[-1], np.sqrt(ab[0]) * c * 0.92556393 + trace, rtol=1e-5)
    np.testing.assert_allclose(run(final="exact", unscale=False)[-1], c * 0.92556393, rtol=1e-5)


def test_one_trace_for_all_steps_and_float32_throughout():
    schedule, t = make_schedule(), ddim_timesteps(1000, 50, "trailing")
    for sampler in (lambda f, x: ddim(f, schedule, x, t, "v"), lambda f, x: flow_euler(f, schedule, x, t)):
        calls = []

        def denoise(x, t_B, calls=calls):
            calls.append((x.dtype, t_B.shape, t_B.dtype))
            return (0.5 * x).astype(jnp.bfloat16)

        got = jax.jit(lambda x, sampler=sampler, denoise=denoise: sampler(denoise, x))(jnp.ones((3, 2), jnp.bfloat16))
        assert got.dtype == jnp.float32 and got.shape == (3, 2)
        assert calls == [(jnp.float32, (3,), jnp.int32)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": "eps"}, "alpha_bar is 0"),
        ({"prediction": "flow"}, "flow_euler"),
        ({"eta": 0.5}, "pass noise"),
        ({"eta": 0.5, "noise": np.zeros((3, 1, 4))}, "3 arrays for 10 steps"),
        ({"final": "textbook"}, "'reference' or 'exact'"),
        ({"timesteps": np.array([5, 1000])}, "must ascend within"),
        ({"timesteps": np.array([999, 5])}, "must ascend within"),
        ({"timesteps": np.array([], int)}, "must ascend within"),
    ],
)
def test_ddim_refuses(change, message):
    arguments = {"timesteps": ddim_timesteps(1000, 10, "trailing"), "prediction": "v", **change}
    with pytest.raises(ValueError, match=message):
        ddim(lambda x, t: x, make_schedule(), jnp.zeros((1, 4)), **arguments)


def test_flow_euler_refuses_a_start_that_is_no_pure_noise():
    with pytest.raises(ValueError, match="trailing"):
        flow_euler(lambda x, t: x, make_schedule(), jnp.zeros((1, 4)), ddim_timesteps(1000, 10, "uniform"))
