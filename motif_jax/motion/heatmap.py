"""The motion heatmap m': optical flow (or a mask, or latents) in, a weight in [0, 1] per latent cell out.

Paper, section on the motion focal loss: flow intensity x -> m = sigma(x) = 1 / (1 + exp(100 (0.05 - x))) -> m resized to
the latent grid. The paper leaves the unit of x open; every reading that has been considered can be chosen.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt8

KINDS = ("flow", "inverse", "latent_difference", "mask", "none")
READINGS = ("diagonal", "size", "clip_max", "frame_max")


def intensity(flow_BThw2: Num[Array, "B T h w 2"], height: int, width: int, reading: str = "diagonal") -> Float[Array, "B T h w"]:
    """Flow (u, v) in pixels at the clip's size height x width -> intensity x, without unit.

    "diagonal": |f| / image diagonal; "size": |(u / width, v / height)|; "clip_max", "frame_max": |f| over its largest value in
    the clip or frame (0 where nothing moves). The flow's own grid may be coarser than the clip.
    """
    flow = flow_BThw2.astype(jnp.float32)
    if reading == "size":
        return _norm(flow / jnp.asarray([width, height], jnp.float32))
    if reading == "diagonal":
        return _norm(flow) / math.hypot(height, width)
    if reading in ("clip_max", "frame_max"):
        return _over_max(_norm(flow), axes=(1, 2, 3) if reading == "clip_max" else (2, 3))
    raise ValueError(f"reading={reading!r}: must be one of {READINGS}")


def sigma(x: Float[Array, "*shape"], sharpness: float = 100.0, threshold: float = 0.05) -> Float[Array, "*shape"]:
    """The paper's sigma(x) = 1 / (1 + exp(sharpness (threshold - x)))."""
    return jax.nn.sigmoid(sharpness * (x - threshold))


def resize(m_BThw: Float[Array, "B T h w"], size: tuple[int, int]) -> Float[Array, "B T h2 w2"]:
    """m on the grid `size` = (rows, columns): the mean of each cell where both sides shrink by whole factors, else linear
    interpolation (antialiased). Both average with weights that sum to 1, so values stay in their range."""
    B, T, h, w = m_BThw.shape
    rows, columns = size
    if h % rows == 0 and w % columns == 0:
        return m_BThw.reshape(B, T, rows, h // rows, columns, w // columns).mean((3, 5))
    return jax.image.resize(m_BThw, (B, T, rows, columns), "linear", antialias=True)


def heatmap(
    kind: str,
    flow: Num[Array, "B T h w 2"] | None,
    mask: UInt8[Array, "B T h w"] | None,
    latents: Float[Array, "B T h2 w2 C"] | None,
    height: int,
    width: int,
    latent_hw: tuple[int, int],
    reading: str = "diagonal",
    sharpness: float = 100.0,
    threshold: float = 0.05,
) -> Float[Array, "B T h2 w2"]:
    """m' in [0, 1], float32, on the latent grid.

    "flow": the paper's sigma of the flow intensity. "inverse": 1 - m (its ablation). "mask": a given mask / 255 (its SAM
    ablation). "none": zeros, so that L_motif vanishes. "latent_difference": the root mean square over channels of
    z_{l+1} - z_l, over its largest value in the clip; no flow network is needed (after Latent Temporal Discrepancy, arXiv
    2601.20504; linear instead of sigma, whose threshold of 5 % of the largest value would mark most cells).
    Flow and latent difference describe the way to the next frame: the last frame repeats the map before it.
    Raises ValueError for an unknown kind, a missing input or a single frame.
    """
    if kind not in KINDS:
        raise ValueError(f"heatmap={kind!r}: must be one of {KINDS}")
    if kind == "none":
        given = next((x for x in (flow, mask, latents) if x is not None), None)
        if given is None:
            raise ValueError("heatmap='none' reads the number of clips and frames from flow, mask or latents: pass one of them")
        return jnp.zeros((*given.shape[:2], *latent_hw), jnp.float32)
    source = {"mask": mask, "latent_difference": latents}.get(kind, flow)
    if source is None:
        name = {"mask": "motion_mask", "latent_difference": "latents"}.get(kind, "flow")
        raise ValueError(f"heatmap={kind!r} needs {name}, which these records do not hold; prepare them with it or choose another heatmap")
    if kind == "mask":
        return resize(source.astype(jnp.float32) / 255.0, latent_hw)
    if source.shape[1] < 2:
        raise ValueError(f"heatmap={kind!r} needs at least 2 frames per clip, not {source.shape[1]}")
    if kind == "latent_difference":
        z = source.astype(jnp.float32)
        m = _over_max(_norm(z[:, 1:] - z[:, :-1]), axes=(1, 2, 3))
    else:
        m = sigma(intensity(source[:, :-1], height, width, reading), sharpness, threshold)
    if kind == "inverse":
        m = 1.0 - m
    return resize(jnp.concatenate([m, m[:, -1:]], axis=1), latent_hw)


def _norm(x: Float[Array, "*shape C"]) -> Float[Array, "*shape"]:
    return jnp.sqrt(jnp.sum(x**2, axis=-1))


def _over_max(x: Float[Array, "B T h w"], axes: tuple[int, ...]) -> Float[Array, "B T h w"]:
    largest = jnp.max(x, axis=axes, keepdims=True)
    return x / jnp.where(largest == 0.0, 1.0, largest)
