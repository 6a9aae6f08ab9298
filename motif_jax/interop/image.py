"""The image tower's weights <-> OpenCLIP files (`visual.*`) and DynamiCrafter checkpoints (`embedder.model.visual.*`)."""

from collections.abc import Mapping
from typing import Any

from motif_jax.interop import names

PREFIX = "embedder.model.visual."


def to_jax(tensors: Mapping[str, Any], template: Any, *, lazy: bool = False) -> Any:
    """`template` filled from tensors named as in the checkpoint without `PREFIX`; see `names.to_jax`."""
    return names.to_jax(tensors, template, what="image tower", lazy=lazy)


def to_torch(params: Any, *, lazy: bool = False) -> dict[str, Any]:
    """Checkpoint names without `PREFIX` -> arrays."""
    return names.to_torch(params, lazy=lazy)
