"""From noise to latents: a denoising function, a schedule and timesteps in, the sampled latents out.

DDIM as VideoCrafter and DynamiCrafter run it, and Euler steps for flow matching. Both are one lax.scan over the steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from motif_jax.diffusion.objective import to_eps, to_x0
from motif_jax.diffusion.schedule import Schedule

Denoise = Callable[[Float[Array, "B *rest"], Int[Array, " B"]], Float[Array, "B *rest"]]


class Steps(NamedTuple):
    """One entry per DDIM step, in the order in which they run (t falls)."""

    t: Int[np.ndarray, " S"]
    alpha_prev: Float[np.ndarray, " S"]  # sqrt(alpha_bar) of the latent that the step ends at
    direction: Float[np.ndarray, " S"]  # factor on eps: sqrt(1 - alpha_bar_prev - sigma^2)
    sigma: Float[np.ndarray, " S"]  # factor on fresh noise
    scale: Float[np.ndarray, " S"]  # dynamic rescale of x_0 at t ...
    scale_prev: Float[np.ndarray, " S"]  # ... and where the step ends


def ddim_timesteps(num_timesteps: int, steps: int, spacing: str) -> Int[np.ndarray, " S"]:
    """The timesteps of a run, ascending, as the reference chooses them (its loop walks them backwards).

    "uniform": 0, k, 2k, ... below N with k = N // steps, plus 1; when k * steps < N it yields more than `steps` of them.
    "trailing": N, N - N/steps, ... rounded, minus 1; always includes N - 1, which zero terminal SNR needs.
    Raises ValueError where "uniform" would reach timestep N and the reference reads past its tables (at N = 1000 for 3, 9, 27,
    36, 37, 101..111, 251..333 and more than 500 steps).
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps={steps}: must lie in 1..{num_timesteps}, the number of training timesteps")
    if spacing == "uniform":
        t = np.arange(0, num_timesteps, num_timesteps // steps) + 1
    elif spacing == "trailing":
        # For some counts (61, 103, ...) rounding makes arange yield one value too many, which the reference turns into timestep -1.
        t = np.round(np.arange(num_timesteps, 0, -num_timesteps / steps)[:steps])[::-1].astype(np.int64) - 1
    else:
        raise ValueError(f"spacing={spacing!r}: must be 'uniform' or 'trailing'")
    if t[-1] >= num_timesteps:
        raise ValueError(
            f"steps={steps} with 'uniform' spacing gives timesteps {t[0]}..{t[-1]}, outside 0..{num_timesteps - 1}; "
            f"choose a smaller divisor of {num_timesteps} for steps, or 'trailing' spacing"
        )
    return t.astype(np.int32)


def ddim_steps(
    schedule: Schedule, timesteps: Int[np.ndarray, " S"], eta: float = 0.0, final: str = "reference", unscale: bool = True
) -> Steps:
    """The tables of a run (float64 arithmetic on the float32 schedule, cast to float32, as the reference's).

    final: where the last step ends. "reference": at alpha_bar[0] = 0.99915, so that a trace of the predicted noise stays in
    the result, as in both references; "exact": at alpha_bar = 1, the textbook's clean estimate.
    unscale: divide the dynamic rescale out of the result (VideoCrafter); False leaves scale[t_last] in (DynamiCrafter).
    Raises ValueError for timesteps that do not ascend within the schedule.
    """
    t = np.asarray(timesteps)
    if t.ndim != 1 or len(t) == 0 or t[0] < 0 or t[-1] >= schedule.num_timesteps or np.any(np.diff(t) <= 0):
        raise ValueError(f"timesteps={t}: must ascend within 0..{schedule.num_timesteps - 1}; use ddim_timesteps")
    if final not in ("reference", "exact"):
        raise ValueError(f"final={final!r}: must be 'reference' or 'exact'")
    alphas_cumprod = np.asarray(schedule.alphas_cumprod, np.float64)
    table = np.asarray(schedule.scale, np.float64)
    a, scale = alphas_cumprod[t], table[t]
    a_prev = np.concatenate([alphas_cumprod[:1] if final == "reference" else np.ones(1), a[:-1]])
    scale_prev = np.concatenate([np.ones(1) if unscale else scale[:1], scale[:-1]])
    sigma = eta * np.sqrt(np.maximum((1.0 - a_prev) / (1.0 - a) * (1.0 - a / a_prev), 0.0))
    # At alpha_bar = 0 and eta = 1 the difference is 0 up to rounding, and the reference's root is NaN for some step counts.
    direction = np.sqrt(np.maximum(1.0 - a_prev - sigma**2, 0.0))
    columns = np.sqrt(a_prev), direction, sigma, scale, scale_prev
    return Steps(t[::-1].astype(np.int32), *(column[::-1].astype(np.float32) for column in columns))


def ddim(
    denoise: Denoise,
    schedule: Schedule,
    x_T: Float[Array, "B *rest"],
    timesteps: Int[np.ndarray, " S"],
    prediction: str,
    eta: float = 0.0,
    *,
    final: str = "reference",
    unscale: bool = True,
    noise: Float[Array, "S B *rest"] | None = None,
    trajectory: bool = False,
) -> Float[Array, "B *rest"] | tuple[Float[Array, "B *rest"], Float[Array, "S B *rest"], Float[Array, "S B *rest"]]:
    """DDIM (Song et al., arXiv 2010.02502) from noise x_T to latents.

    x_prev = sqrt(ab_prev) x_0 scale_prev / scale_t + sqrt(1 - ab_prev - sigma^2) eps + sigma z. x_0 is never clipped.
    denoise: (x_t [B, ...], t [B] int32) -> the network's output, guidance applied.
    timesteps: ascending, concrete; see `ddim_timesteps`. prediction: "v", "eps" or "x0".
    eta, noise: with eta > 0 fresh `noise` enters every step, the last included: one array per step, in running order.
    final, unscale: see `ddim_steps`.
    trajectory: also return x after each step and each step's estimate of x_0, the dynamic rescale divided out.
    Raises ValueError where the run is undefined: eta without noise, or "eps" at a timestep of pure noise.
    """
    steps = ddim_steps(schedule, timesteps, eta, final, unscale)
    if prediction not in ("v", "eps", "x0"):
        raise ValueError(f"prediction={prediction!r}: DDIM needs 'v', 'eps' or 'x0'; flow matching has flow_euler")
    if prediction == "eps" and np.any(np.asarray(schedule.alphas_cumprod)[steps.t] == 0.0):
        raise ValueError(
            f"prediction='eps' at timestep {steps.t[0]}, where alpha_bar is 0: x_0 is undefined; "
            "predict 'v', turn zero terminal SNR off, or use 'uniform' spacing"
        )
    if eta > 0.0 and noise is None:
        raise ValueError(f"eta={eta} adds noise at every step: pass noise")
    if noise is not None and len(noise) != len(steps.t):
        raise ValueError(f"noise holds {len(noise)} arrays for {len(steps.t)} steps: one per step is needed")

    def body(x: Float[Array, "B *rest"], inputs: tuple[Steps, Float[Array, "B *rest"] | None]):
        step, z = inputs
        t_B = jnp.full(x.shape[0], step.t)
        output = denoise(x, t_B)
        x0 = to_x0(schedule, x, output, t_B, prediction) / step.scale
        x = step.alpha_prev * step.scale_prev * x0 + step.direction * to_eps(schedule, x, output, t_B, prediction)
        if eta > 0.0:
            x = x + step.sigma * z
        return x, (x, x0) if trajectory else None

    x, path = jax.lax.scan(body, x_T.astype(jnp.float32), jax.tree.map(jnp.asarray, (steps, noise)))
    return (x, *path) if trajectory else x


def flow_euler(
    denoise: Denoise,
    schedule: Schedule,
    x_T: Float[Array, "B *rest"],
    timesteps: Int[np.ndarray, " S"],
    prediction: str = "flow",
) -> Float[Array, "B *rest"]:
    """Euler steps of dx/ds = velocity, s = (t + 1) / N, from noise at s = 1 to latents at s = 0.

    Arguments and result as in `ddim`; prediction: "flow", the velocity itself, or "flow_x0", (x - x_0) / s.
    Raises ValueError unless the timesteps ascend to N - 1, i.e. s = 1 ("trailing" spacing), where x_T is pure noise.
    """
    t, last = np.asarray(timesteps), schedule.num_timesteps - 1
    if t.ndim != 1 or len(t) == 0 or t[0] < 0 or t[-1] != last or np.any(np.diff(t) <= 0):
        raise ValueError(f"timesteps={t}: must ascend to {last}, pure noise; use ddim_timesteps(..., spacing='trailing')")
    s = (t + 1) / schedule.num_timesteps
    length = s - np.concatenate([np.zeros(1), s[:-1]])

    def body(x: Float[Array, "B *rest"], inputs: tuple[Int[Array, ""], Float[Array, ""]]):
        t, ds = inputs
        t_B = jnp.full(x.shape[0], t)
        output = denoise(x, t_B).astype(jnp.float32)
        velocity = output if prediction == "flow" else to_eps(schedule, x, output, t_B, prediction) - output
        return x - ds * velocity, None

    inputs = jnp.asarray(t[::-1], jnp.int32), jnp.asarray(length[::-1], jnp.float32)
    return jax.lax.scan(body, x_T.astype(jnp.float32), inputs)[0]
