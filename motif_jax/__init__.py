"""MotiF in JAX: text-image-to-video training with the motion focal loss."""

__version__ = "0.1.0"
