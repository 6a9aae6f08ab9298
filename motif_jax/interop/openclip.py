"""The text tower's weights <-> OpenCLIP files and VideoCrafter2 checkpoints (`cond_stage_model.model.*`)."""

from collections.abc import Mapping
from typing import Any

from motif_jax.interop import names

PREFIX = "cond_stage_model.model."
IGNORED = (r"attn_mask", r"visual\..*")  # a buffer, and the image tower of a whole OpenCLIP file


def to_jax(tensors: Mapping[str, Any], template: Any, *, lazy: bool = False) -> Any:
    """`template` filled from tensors named as in an OpenCLIP file (the checkpoint's names without `PREFIX`); see `names.to_jax`."""
    return names.to_jax(tensors, template, what="text tower", ignored=IGNORED, lazy=lazy)


def to_torch(params: Any, *, lazy: bool = False) -> dict[str, Any]:
    """OpenCLIP names -> arrays."""
    return names.to_torch(params, lazy=lazy)
