"""The motion focal loss: prediction, target and motion heatmap in, the loss and its parts out, all in float32.

    L_diffusion = E || target - prediction ||^2
    L_motif     = E || m' (target - prediction) ||^2      m' inside the norm: an element weighs 1 + lambda m'^2 in all
    L           = L_diffusion + lambda L_motif            lambda = 1 in the paper

E || . ||^2 is the mean over all elements, as in the reference's diffusion loss.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


def motif_loss(
    prediction_BThwC: Float[Array, "B T h w C"],
    target_BThwC: Float[Array, "B T h w C"],
    heatmap_BThw: Float[Array, "B T h w"],
    motion_weight: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """L and its parts {"loss", "loss_diffusion", "loss_motif"} (paper, equations of the motion focal loss).

    prediction, target: in the space of the loss; heatmap: m' in [0, 1] on the latent grid; motion_weight: lambda.
    """
    residual = target_BThwC.astype(jnp.float32) - prediction_BThwC.astype(jnp.float32)
    m = heatmap_BThw.astype(jnp.float32)[..., None]
    loss_diffusion = jnp.mean(residual**2)
    loss_motif = jnp.mean((m * residual) ** 2)
    loss = loss_diffusion + motion_weight * loss_motif
    return loss, {"loss": loss, "loss_diffusion": loss_diffusion, "loss_motif": loss_motif}


class RegionLosses(NamedTuple):
    """Per clip: mean squared error over all cells, over the moving cells (0 where none moves), and how many those are."""

    overall: Float[Array, " B"]
    moving: Float[Array, " B"]
    moving_cells: Float[Array, " B"]


def region_losses(
    prediction_BThwC: Float[Array, "B T h w C"],
    target_BThwC: Float[Array, "B T h w C"],
    heatmap_BThw: Float[Array, "B T h w"],
    moving_threshold: float = 0.5,
) -> RegionLosses:
    """The pieces of the paper's figure 6, (mean loss in the high-motion region) / (mean loss overall), without lambda.

    A cell is moving where m' > moving_threshold. Over many clips, weigh `moving` by `moving_cells`: clips without motion then
    drop out by themselves.
    """
    residual = target_BThwC.astype(jnp.float32) - prediction_BThwC.astype(jnp.float32)
    error_BThw = jnp.mean(residual**2, axis=-1)
    moving_BThw = heatmap_BThw > moving_threshold
    axes = (1, 2, 3)
    cells = jnp.sum(moving_BThw, axis=axes, dtype=jnp.float32)
    moving = jnp.sum(jnp.where(moving_BThw, error_BThw, 0.0), axis=axes) / jnp.maximum(cells, 1.0)
    return RegionLosses(jnp.mean(error_BThw, axis=axes), moving, cells)
