"""What the network sees and predicts: clean latents, noise and timesteps in; noisy latents, targets and estimates out.

Spaces: "eps" (the noise), "x0" (the clean latent), "v" = sqrt(ab) eps - sqrt(1 - ab) x0, and "flow" = eps - x0, the
velocity of x_s = (1 - s) x0 + s eps at s = (t + 1) / N (it reads only N from the schedule). "flow_x0" is the clean latent on
that same straight path: flow matching for a network too narrow to put out the noise (Li and He, arXiv 2511.13720).
With a dynamic rescale, x0 stands for scale[t] * x0 in the first three, targets included (DynamiCrafter's convention).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from motif_jax.diffusion.schedule import Schedule, at

STRAIGHT = ("flow", "flow_x0")  # on flow matching's path
SPACES = ("v", "eps", "x0", *STRAIGHT)
DIVISOR_FLOOR = 0.1  # smallest divisor of `convert`: a residual grows at most tenfold


def add_noise(
    schedule: Schedule, x0: Float[Array, "B *rest"], noise: Float[Array, "B *rest"], t_B: Int[Array, " B"], prediction: str
) -> Float[Array, "B *rest"]:
    """x_t, the network's noisy input. `prediction` selects the path: that of STRAIGHT, or variance preserving."""
    _check(prediction)
    alpha, sigma = _path(schedule, t_B, x0.ndim, prediction)
    return alpha * _clean(schedule, x0, t_B, prediction) + sigma * noise


def target(
    schedule: Schedule,
    x0: Float[Array, "B *rest"],
    noise: Float[Array, "B *rest"],
    t_B: Int[Array, " B"],
    prediction: str,
    space: str = "",
) -> Float[Array, "B *rest"]:
    """What a network that predicts `prediction` should put out, expressed in `space` ('' is that of the prediction).

    Where `space` differs, the target goes through the same `convert` as the network's output must, so that the clamped
    divisions cancel and the perfect output has no loss.
    """
    _check(prediction)
    if prediction == "flow":
        wanted = noise.astype(jnp.float32) - x0
    elif prediction == "eps":
        wanted = noise.astype(jnp.float32)
    elif prediction in ("x0", "flow_x0"):
        wanted = _clean(schedule, x0, t_B, prediction).astype(jnp.float32)
    else:
        alpha, sigma = _path(schedule, t_B, x0.ndim, prediction)
        wanted = alpha * noise - sigma * _clean(schedule, x0, t_B, prediction)
    if space in ("", prediction):
        return wanted
    return convert(schedule, add_noise(schedule, x0, noise, t_B, prediction), wanted, t_B, prediction, space)


def to_x0(
    schedule: Schedule, x_t: Float[Array, "B *rest"], output: Float[Array, "B *rest"], t_B: Int[Array, " B"], prediction: str
) -> Float[Array, "B *rest"]:
    """The (rescaled) clean latent that a network output implies; exact, so "eps" is not finite where alpha_bar is 0."""
    _check(prediction)
    if prediction in ("x0", "flow_x0"):
        return output.astype(jnp.float32)
    alpha, sigma = _path(schedule, t_B, x_t.ndim, prediction)
    if prediction == "flow":
        return x_t - sigma * output
    if prediction == "eps":
        return (x_t - sigma * output) / alpha
    return alpha * x_t - sigma * output


def to_eps(
    schedule: Schedule, x_t: Float[Array, "B *rest"], output: Float[Array, "B *rest"], t_B: Int[Array, " B"], prediction: str
) -> Float[Array, "B *rest"]:
    """The noise that a network output implies; exact (sqrt(1 - alpha_bar) is at least sqrt(beta_start))."""
    _check(prediction)
    if prediction == "eps":
        return output.astype(jnp.float32)
    alpha, sigma = _path(schedule, t_B, x_t.ndim, prediction)
    if prediction == "flow":
        return x_t + alpha * output
    if prediction in ("x0", "flow_x0"):
        return (x_t - alpha * output) / sigma
    return alpha * output + sigma * x_t


def convert(
    schedule: Schedule,
    x_t: Float[Array, "B *rest"],
    output: Float[Array, "B *rest"],
    t_B: Int[Array, " B"],
    source: str,
    space: str,
) -> Float[Array, "B *rest"]:
    """A network output (or target) of kind `source`, expressed in `space`, the space of the loss.

    From "eps" the divisor is max(sqrt(ab), 0.1), from "x0" max(sqrt(1 - ab), 0.1), from "flow_x0" max(s, 0.1). Convert
    output and target alike (`target(..., prediction, space)` does): only then is the clamp a mere bound on the weight.
    Raises ValueError between STRAIGHT and the others, whose noisy latents lie on different paths.
    """
    _check(source)
    _check(space)
    if source == space:
        return output.astype(jnp.float32)
    if (source in STRAIGHT) != (space in STRAIGHT):
        raise ValueError(f"no conversion from {source!r} to {space!r}: flow matching noises along another path; use one of {STRAIGHT}")
    if source == "flow":
        return to_x0(schedule, x_t, output, t_B, source)
    if source == "v":
        return (to_eps if space == "eps" else to_x0)(schedule, x_t, output, t_B, source)
    alpha, sigma = _path(schedule, t_B, x_t.ndim, source)
    if source == "eps":
        offset = x_t - sigma * output if space == "x0" else output - sigma * x_t
        return offset / jnp.maximum(alpha, DIVISOR_FLOOR)
    offset = {"eps": x_t - alpha * output, "v": alpha * x_t - output, "flow": x_t - output}[space]
    return offset / jnp.maximum(sigma, DIVISOR_FLOOR)


def _path(schedule: Schedule, t_B: Int[Array, " B"], ndim: int, prediction: str) -> tuple[Float[Array, "B *ones"], Float[Array, "B *ones"]]:
    """The factors of the clean latent and of the noise in x_t: sqrt(abar), sqrt(1 - abar) of DDPM, or 1 - s, s of the straight path."""
    if prediction in STRAIGHT:
        s = ((t_B + 1).astype(jnp.float32) / schedule.num_timesteps).reshape(t_B.shape + (1,) * (ndim - 1))
        return 1.0 - s, s
    return at(schedule.sqrt_alphas_cumprod, t_B, ndim), at(schedule.sqrt_one_minus_alphas_cumprod, t_B, ndim)


def _clean(schedule: Schedule, x0: Float[Array, "B *rest"], t_B: Int[Array, " B"], prediction: str) -> Float[Array, "B *rest"]:
    return x0 if prediction in STRAIGHT else at(schedule.scale, t_B, x0.ndim) * x0


def _check(space: str) -> None:
    if space not in SPACES:
        raise ValueError(f"{space!r} is no prediction or loss space; use one of {SPACES}")
