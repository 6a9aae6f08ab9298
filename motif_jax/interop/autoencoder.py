"""The KL autoencoder's weights <-> checkpoints in the original latent-diffusion layout (`first_stage_model.*`)."""

from collections.abc import Mapping
from typing import Any

from motif_jax.interop import names

PREFIX = "first_stage_model."
# In some files: the training loss's own networks, and an average, or the two counters that pruning leaves of it.
IGNORED = (r"loss\..*", r"model_ema\..*")


def to_jax(tensors: Mapping[str, Any], template: Any, *, lazy: bool = False) -> Any:
    """`template` filled from tensors named as in the checkpoint without `PREFIX`; see `names.to_jax`."""
    return names.to_jax(tensors, template, what="autoencoder", ignored=IGNORED, lazy=lazy)


def to_torch(params: Any, *, lazy: bool = False) -> dict[str, Any]:
    """Checkpoint names without `PREFIX` -> arrays."""
    return names.to_torch(params, lazy=lazy)
