"""Convolutions for inference on a GPU: its layout made once for many calls, and float32 on tensor cores without loss of digits.

A GPU's float32 convolutions leave the tensor cores idle. With x = X + x' and k = K + k', where X and K have the 11 significant bits of
TF32, x * k = X * K + X * k' + x' * K + x' * k', whose last term is 2^-22 of it and left out (Ootomo and Yokota 2022, "Recovering single
precision accuracy from Tensor Cores"; CUTLASS calls it 3xTF32). That is one TF32 convolution over three times the channels, which sums
in float32. Elsewhere these functions are `jax.lax.conv_general_dilated`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from motif_jax.models.placement import ampere, platform

FEW = 192  # outputs


def convolve(
    x_BHWC: Float[Array, "B H W I"], kernel: Array, strides: tuple[int, int], padding: list[tuple[int, int]], **options: Any
) -> Float[Array, "B H2 W2 O"]:
    """`jax.lax.conv_general_dilated`, whose options it takes, with a kernel [h, w, I, O] or what `prepare` made of one."""
    if platform() == "gpu" and kernel.ndim == 4:
        kernel = prepare(kernel, options["precision"])
    if kernel.ndim == 5:
        if kernel.shape[3] == 3:
            x, rest = _split(x_BHWC)
            x_BHWC = jnp.concatenate([x, x, rest], -1)
        elif kernel.shape[1:3] == (1, 1) and options["precision"] == "highest" and kernel.dtype == jnp.float32:
            x_BHWC = x_BHWC[:, :: strides[0], :: strides[1]]
            return jax.lax.dot_general(x_BHWC, kernel[:, 0, 0, 0], (((3,), (1,)), ((), ())), precision=options["precision"])
        options |= {"dimension_numbers": ("NHWC", "OHWI", "NHWC"), "precision": "default"}
        kernel = kernel.reshape(*kernel.shape[:3], -1)
    return jax.lax.conv_general_dilated(x_BHWC, kernel, strides, padding, **options)


def prepare(kernel: Float[Array, "h w I O"], precision: str) -> Array:
    """A kernel as GPUs take it, [O, h, w, parts, I], to be made outside of a loop; where no GPU is, `kernel` itself.

    Float32 at precision "highest" has three parts (K, k', K), anything else one; so has a 1x1 window with `FEW` outputs or less, which is
    bound by memory, and would move three times as much.
    """
    if platform() != "gpu":
        return kernel
    parts = [kernel]
    if precision == "highest" and kernel.dtype == jnp.float32 and ampere() and (kernel.shape[:2] != (1, 1) or kernel.shape[3] > FEW):
        rounded, rest = _split(kernel)
        parts = [rounded, rest, rounded]
    return jnp.stack([jnp.moveaxis(part, -1, 0) for part in parts], 3)


def prepared(module: nnx.Module) -> nnx.Module:
    """`module` with the kernels of its `nnx.Conv` prepared, in the type in which they compute."""
    module = nnx.merge(*nnx.split(module))
    for _, layer in module.iter_modules():
        if isinstance(layer, nnx.Conv):
            layer.kernel = nnx.Param(prepare(layer.kernel[...].astype(layer.dtype), layer.precision))
    return module


def _split(x: Array) -> tuple[Array, Array]:
    """The float32 `x` rounded to TF32, and what is left of it."""
    rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)
    return rounded, x - rounded
