"""The noise schedule: betas in, the tables that noising, objective and samplers read out.

x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps. Everything is computed in numpy float64 and cast to float32,
as the reference's buffers are.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SCALE_STEPS = 400  # the reference lowers the scale of x_0 over this many steps, whatever the number of timesteps


class Schedule(NamedTuple):
    """Float32 tables over the timesteps 0..N-1 (numpy, so that building one needs no device); a pytree."""

    betas: Float[np.ndarray, " N"]
    alphas_cumprod: Float[np.ndarray, " N"]
    sqrt_alphas_cumprod: Float[np.ndarray, " N"]
    sqrt_one_minus_alphas_cumprod: Float[np.ndarray, " N"]
    scale: Float[np.ndarray, " N"]

    @property
    def num_timesteps(self) -> int:
        return self.betas.shape[0]


def make_schedule(
    num_timesteps: int = 1000,
    beta_start: float = 8.5e-4,
    beta_end: float = 1.2e-2,
    zero_terminal_snr: bool = True,
    base_scale: float = 1.0,
) -> Schedule:
    """VideoCrafter2's schedule ("linear": betas linear in the square root), optionally with a last step of pure noise.

    base_scale: the factor on x_0 falls linearly from 1 to this over the first 400 steps and stays there (the reference's
    dynamic rescale: 0.7 at 512 pixels; 1 is off).
    Raises ValueError for fewer than two steps or betas that are no variances.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps={num_timesteps}: a schedule needs at least 2 steps")
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(f"beta_start={beta_start}, beta_end={beta_end}: must satisfy 0 < beta_start <= beta_end < 1")
    if not 0.0 < base_scale <= 1.0:
        raise ValueError(f"base_scale={base_scale}: must lie in (0, 1]; 1 turns the dynamic rescale off")
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2
    if zero_terminal_snr:
        betas = zero_terminal_snr_betas(betas)
    alphas_cumprod = np.cumprod(1.0 - betas)
    scale = np.full(num_timesteps, base_scale)
    ramp = np.linspace(1.0, base_scale, SCALE_STEPS)[:num_timesteps]
    scale[: len(ramp)] = ramp
    tables = betas, alphas_cumprod, np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod), scale
    return Schedule(*(table.astype(np.float32) for table in tables))


def zero_terminal_snr_betas(betas: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Betas whose last alpha_bar is exactly 0 and whose first is unchanged (Lin et al., arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    return 1.0 - np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def at(table: Float[np.ndarray | Array, " N"], t_B: Int[Array, " B"], ndim: int) -> Float[Array, "B *ones"]:
    """table[t], with axes of length 1 appended up to `ndim` so that it multiplies a [B, ...] array."""
    return jnp.asarray(table)[t_B].reshape(t_B.shape + (1,) * (ndim - 1))
