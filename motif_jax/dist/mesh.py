"""The device mesh (data, fsdp, context, tensor) and where each array lives on it."""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from motif_jax.config import MeshConfig, UserError

AXES = ("data", "fsdp", "context", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# First match wins. Kernels are sharded over their input (fsdp) and output (tensor) channels, the last two axes; vectors are small.
PARTITION_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(^|\.)kernel$", ("fsdp", "tensor")),
    (r"(^|\.)embedding$", ("tensor", "fsdp")),
    (r"(^|\.)(bias|scale|alpha|latents)$", (None,)),
)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh over `devices` (default: all); an axis of -1 takes what the others leave. One device is a mesh of one.

    Raises UserError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(s for s in sizes if s > 0)
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        shape = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
        raise UserError(f"mesh ({shape}) needs {math.prod(sizes)} devices, but there are {len(devices)}; set one axis to -1")
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


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


def shard_like_params(tree, params_names: set[str], mesh: Mesh):
    """Shardings for a pytree of shapes: leaves below a key that is a parameter name follow that parameter, the rest is replicated."""

    def one(path, leaf):
        name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey) and k.key in params_names), None)
        return NamedSharding(mesh, partition(name, leaf.shape, mesh) if name else PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, tree)


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process' share of a batch (numpy) -> one global array per field, split over (data, fsdp)."""
    sharding = NamedSharding(mesh, BATCH)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
