"""The schedule tables that the reference stores in its checkpoints beside the networks, so that a whole one loads strictly there."""

import numpy as np

from motif_jax.config import DiffusionConfig
from motif_jax.diffusion.schedule import SCALE_STEPS, zero_terminal_snr_betas


def schedule_buffers(diffusion: DiffusionConfig) -> dict[str, np.ndarray]:
    """{name: float32 table}, computed in float64 as the reference does (Ho et al., arXiv 2006.11239); none for flow matching.

    Models that predict v have zeros for the reciprocals, as in DynamiCrafter; of x0 with a zero terminal SNR the last is infinite.
    """
    if diffusion.prediction not in ("eps", "v", "x0"):
        return {}
    betas = np.linspace(diffusion.beta_start**0.5, diffusion.beta_end**0.5, diffusion.num_timesteps) ** 2
    if diffusion.zero_terminal_snr:
        betas = zero_terminal_snr_betas(betas)
    alphas = 1.0 - betas
    total = np.cumprod(alphas)
    before = np.append(1.0, total[:-1])
    variance = betas * (1.0 - before) / (1.0 - total)
    with np.errstate(divide="ignore"):
        reciprocal = np.zeros_like(total) if diffusion.prediction == "v" else 1.0 / total
    tables = {
        "betas": betas,
        "alphas_cumprod": total,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(total),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - total),
        "log_one_minus_alphas_cumprod": np.log(1.0 - total),
        "sqrt_recip_alphas_cumprod": np.sqrt(reciprocal),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(np.maximum(reciprocal - 1.0, 0.0)),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),  # the first variance is 0
        "posterior_mean_coef1": betas * np.sqrt(before) / (1.0 - total),
        "posterior_mean_coef2": (1.0 - before) * np.sqrt(alphas) / (1.0 - total),
    }
    if diffusion.base_scale != 1.0:
        flat = np.full(diffusion.num_timesteps, diffusion.base_scale)  # after the ramp as many again as the schedule has
        tables["scale_arr"] = np.concatenate([np.linspace(1.0, diffusion.base_scale, SCALE_STEPS), flat])
    return {name: table.astype(np.float32) for name, table in tables.items()}
