"""PyTorch checkpoints in and out; `load_reference` is the way in for Python users (docs/weights.md)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from motif_jax.interop.reference import Reference as Reference
    from motif_jax.interop.reference import load_reference as load_reference

__all__ = ["Reference", "load_reference"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from motif_jax.interop import reference  # loads the networks, which the name tables do not need

    return getattr(reference, name)
