"""The U-Net's weights <-> VideoCrafter2 and DynamiCrafter checkpoints (`model.diffusion_model.*`)."""

from collections.abc import Mapping
from typing import Any

from motif_jax.interop import names

PREFIX = "model.diffusion_model."


def to_jax(tensors: Mapping[str, Any], template: Any, *, lazy: bool = False) -> Any:
    """`template` filled from tensors named as in the checkpoint without `PREFIX`; see `names.to_jax`.

    DynamiCrafter-256 calls the frame-rate MLP `framestride_embed`; both names are read, the common one is written.
    """
    renamed = {name.replace("framestride_embed.", "fps_embedding.", 1): tensor for name, tensor in tensors.items()}
    return names.to_jax(renamed, template, what="U-Net", lazy=lazy)


def to_torch(params: Any, *, lazy: bool = False) -> dict[str, Any]:
    """Checkpoint names without `PREFIX` -> arrays."""
    return names.to_torch(params, lazy=lazy)
