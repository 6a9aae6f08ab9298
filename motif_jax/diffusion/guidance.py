"""Classifier-free guidance: the network's outputs with and without the text in, the guided output out."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def classifier_free(
    cond: Float[Array, "B *rest"], uncond: Float[Array, "B *rest"], scale: float, rescale_phi: float = 0.0
) -> Float[Array, "B *rest"]:
    """g = uncond + scale (cond - uncond), then phi g std(cond) / std(g) + (1 - phi) g, float32.

    The standard deviations run over all axes but the batch (DynamiCrafter; Lin et al., arXiv 2305.08891, section 3.4).
    """
    cond, uncond = cond.astype(jnp.float32), uncond.astype(jnp.float32)
    guided = uncond + scale * (cond - uncond)
    axes = tuple(range(1, cond.ndim))
    spread = jnp.std(guided, axis=axes, keepdims=True)
    # An untrained U-Net puts out exact zeros: 0/0 would turn the whole sample into NaN.
    matched = guided * jnp.where(spread > 0, jnp.std(cond, axis=axes, keepdims=True) / spread, 1.0)
    return rescale_phi * matched + (1.0 - rescale_phi) * guided
