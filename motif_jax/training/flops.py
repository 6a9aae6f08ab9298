"""How much arithmetic a model needs and a chip can do; the two halves of model FLOPs utilisation (MFU)."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from motif_jax.config import Config
from motif_jax.models.attention import IMAGE_TOKENS
from motif_jax.models.networks import MakeDenoiser, Networks, image_condition, make_denoiser

# Dense bfloat16 TFLOP/s of one JAX device, by the first words of its `device_kind`; longest match wins. From the vendors' data
# sheets (cloud.google.com/tpu/docs, nvidia.com), without sparsity. A device that is not here has no MFU.
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA H200": 989.0,
    "NVIDIA L4": 121.0,
}


def peak_tflops(device_kind: str) -> float | None:
    """Peak bfloat16 TFLOP/s of a device, or None where it is not known."""
    known = [kind for kind in PEAK_TFLOPS if re.match(rf"{kind}\b", device_kind)]  # an L40S is no L4
    return PEAK_TFLOPS[max(known, key=len)] if known else None


def training_flops(config: Config, denoiser: MakeDenoiser = make_denoiser) -> int:
    """Model FLOPs of one step over the whole batch: three times the denoiser's forward pass, twice when most of it is frozen.

    Recomputation, optimizer and frozen networks are left out, so that the number depends on the model alone, which `denoiser` makes.
    """
    # Written-out attention, so that its products show in the trace.
    networks = Networks.of(dataclasses.replace(config, attention="reference"), denoiser)
    clips, d, z = config.batch_size, config.data, config.autoencoder.z_channels
    latent = jax.ShapeDtypeStruct((clips, d.frames, config.latent_height, config.latent_width, z), jnp.float32)
    image = jax.eval_shape(lambda z: image_condition(z[:, 0], d.frames, config.condition.image), latent)
    per_clip = jax.ShapeDtypeStruct((clips,), jnp.float32)
    image_tokens = IMAGE_TOKENS * d.frames if config.image_tokens else 0
    text = jax.ShapeDtypeStruct((clips, config.text.context_length + image_tokens, config.text.width), jnp.float32)
    forward = matmul_flops(networks.denoise, networks.denoiser.shapes, latent, per_clip, text, per_clip, image)
    return forward * (3 if config.finetune == "all" else 2)


def matmul_flops(function: Callable, *args: Any) -> int:
    """Floating point operations of the matrix products and convolutions in one call (2 per multiply and add), from its trace.

    args may be shapes. Elementwise work is left out, as usual for MFU; a while loop counts as one turn, of branches the largest
    counts.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def jaxpr_flops(jaxpr: core.Jaxpr, in_kernels: bool = False) -> int:
    """`matmul_flops` of a function that is traced already, on all devices together; with `in_kernels` those in Pallas kernels alone."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general" and not in_kernels:
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated" and not in_kernels:
            kernel = equation.invars[1].aval.shape
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(kernel) // features * math.prod(equation.outvars[0].aval.shape)
        elif inner := [jaxpr_flops(sub, in_kernels and name != "pallas_call") for sub in core.jaxprs_in_params(params)]:
            match name:
                case "cond":
                    total += max(inner)
                case "scan":
                    total += params["length"] * sum(inner)
                case "pallas_call":
                    total += math.prod(params["grid_mapping"].grid) * sum(inner)
                case "shard_map":
                    total += params["mesh"].size * sum(inner)
                case _:
                    total += sum(inner)
    return total
