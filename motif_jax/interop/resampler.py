"""The resampler's weights <-> DynamiCrafter checkpoints (`image_proj_model.*`)."""

from collections.abc import Mapping
from typing import Any

from motif_jax.interop import names

PREFIX = "image_proj_model."


def to_jax(tensors: Mapping[str, Any], template: Any, *, lazy: bool = False) -> Any:
    """`template` filled from tensors named as in the checkpoint without `PREFIX`; see `names.to_jax`."""
    return names.to_jax(tensors, template, what="resampler", lazy=lazy)


def to_torch(params: Any, *, lazy: bool = False) -> dict[str, Any]:
    """Checkpoint names without `PREFIX` -> arrays."""
    return names.to_torch(params, lazy=lazy)
