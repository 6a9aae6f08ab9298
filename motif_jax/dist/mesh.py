"""The device mesh (data, fsdp, context, tensor) and where each array lives on it."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from motif_jax.config import MeshConfig
from motif_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
ROWS = ("data", "fsdp")  # the axes that split a batch into its clips
BATCH = PartitionSpec(ROWS)

# First match wins. Kernels are sharded over their input (fsdp) and output (tensor) channels, the last two axes; vectors are small.
PARTITION_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(^|\.)lora_a$", ("fsdp", None)),
    (r"(^|\.)lora_b$", (None, "tensor")),
    (r"(^|\.)(kernel|in_proj_kernel|proj|text_projection)$", ("fsdp", "tensor")),
    (r"(^|\.)embedding$", ("tensor", "fsdp")),
    (r"(^|\.)(bias|in_proj_bias|scale|logit_scale|alpha|latents|class_embedding|positional_embedding)$", (None,)),
)
# Fields of a batch whose second axis is time: their frames are split over `context`.
FRAMES = frozenset({"frames", "latent_moments", "flow", "motion_mask"})


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh over `devices` (default: all); an axis of -1 takes what the others leave. One device is a mesh of one.

    On TPU neighbours in the mesh are neighbours in the machine, and of several slices each has an equal part of `data`. Raises UserError
    when the axes do not multiply to the number of devices, or cannot be laid out on the machine.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(s for s in sizes if s > 0)
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        shape = ", ".join(f"{a}={getattr(config, a)}" for a in AXES)
        needs, remedy = (f"a multiple of {known}", "make an axis smaller") if "-1" in shape else (known, "set one axis to -1")
        raise UserError(f"mesh ({shape}) needs {needs} devices, but there are {len(devices)}; {remedy}")
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    try:
        if slices > 1:
            outer = [slices] + [1] * (len(AXES) - 1)
            if sizes[0] % slices:
                raise ValueError(f"data must be a multiple of the {slices} slices")
            inner = [sizes[0] // slices, *sizes[1:]]
            grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        shape = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(f"mesh ({shape}) cannot be laid out on {len(devices)} x {devices[0].device_kind}: {error}") from error
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of parameter `name` by the first matching rule; an axis that does not divide its dimension is dropped.

    Raises ValueError for a parameter that no rule names: a new kind of weight needs a decision.
    """
    for pattern, axes in PARTITION_RULES:
        if re.search(pattern, name):
            tail = axes[-len(shape) :] if shape else ()
            spec = [None] * (len(shape) - len(tail)) + list(tail)
            return PartitionSpec(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(spec, shape, strict=True)))
    raise ValueError(f"no partition rule matches parameter {name!r} of shape {shape}; add one to PARTITION_RULES")


def shard_like_params(tree: Any, params_names: set[str], mesh: Mesh) -> Any:
    """Shardings for a pytree of shapes: leaves below a key that is a parameter name follow that parameter, the rest is replicated."""

    def one(path, leaf):
        name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey) and k.key in params_names), None)
        return NamedSharding(mesh, partition(name, leaf.shape, mesh) if name else PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, tree)


def shard_networks(networks: Mapping[str, Mapping[str, Any]], mesh: Mesh) -> dict[str, dict[str, NamedSharding]]:
    """Shardings by the table for the parameters (arrays or shapes) of several networks."""
    return {
        network: {name: NamedSharding(mesh, partition(name, x.shape, mesh)) for name, x in params.items()}
        for network, params in networks.items()
    }


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole (weights read from a file) -> global arrays; each device receives its part only."""

    def one(x, sharding):
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def batch_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """The rows of a global batch that this process' devices work on, in order; what its input pipeline has to read."""
    sharding = NamedSharding(mesh, BATCH)
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    return tuple(sorted({row for (part,) in parts for row in range(batch_size)[part]}))


def batch_sharding(mesh: Mesh, name: str) -> NamedSharding:
    """Of a field of the batch: clips over (data, fsdp), frames over context."""
    return NamedSharding(mesh, PartitionSpec(ROWS, "context") if name in FRAMES else BATCH)


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """The rows `batch_rows` of a batch (numpy) -> one global array per field, placed by `batch_sharding`."""

    def one(name: str, x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(batch_sharding(mesh, name), x, (batch_size, *x.shape[1:]))

    return {name: one(name, x) for name, x in batch.items()}


def on_host(x: jax.Array) -> np.ndarray:
    """The whole of a global array on every process; all processes must call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def check_fits(mesh: Mesh, batch_size: int, grad_accumulation: int, frames: int) -> None:
    """Raises UserError when a batch cannot be split over the mesh."""
    unit = math.prod(mesh.shape[a] for a in ROWS) * grad_accumulation
    if batch_size % unit:
        raise UserError(f"batch_size={batch_size}: must be a multiple of {unit}, the devices of data and fsdp times grad_accumulation")
    if frames % mesh.shape["context"]:
        raise UserError(f"mesh.context={mesh.shape['context']}: must divide data.frames={frames}")


def repeated_work(mesh: Mesh, batch_size: int, grad_accumulation: int) -> list[str]:
    """A line when `context` splits several clips at a time: their frames become rows of one batch, which XLA does not split by frame."""
    clips = batch_size // (math.prod(mesh.shape[a] for a in ROWS) * grad_accumulation)
    context = mesh.shape["context"]
    if context == 1 or clips == 1:
        return []
    return [
        f"mesh.context={context} with {clips} clips at a time in each group of data x fsdp: its devices repeat most of each other's work "
        f"(docs/scaling.md); grad_accumulation={clips * grad_accumulation} takes one at a time"
    ]


def check_split(mesh: Mesh, params: Mapping[str, Any]) -> None:
    """Raises UserError when fsdp or tensor splits less than half of the parameters (arrays or shapes).

    What it does not divide is copied: over fsdp the state takes its whole memory, over tensor all devices do the same work.
    """
    total = sum(math.prod(x.shape) for x in params.values())
    for axis in ("fsdp", "tensor"):
        split = sum(math.prod(x.shape) for name, x in params.items() if axis in partition(name, x.shape, mesh))
        if mesh.shape[axis] > 1 and split < total / 2:
            raise UserError(
                f"mesh.{axis}={mesh.shape[axis]}: would split only {100 * split / total:.0f} % of the parameters and copy the others; use a "
                "size that divides the network's widths, and mesh.data for the devices that are left"
            )
