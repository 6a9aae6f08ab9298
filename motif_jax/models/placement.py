"""Where traced code will run: the platform, the mesh of the activations, and the share of them that a kernel on each device takes."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

Axis = str | tuple[str, ...] | None  # of a mesh: one array axis lies over these
CLIPS: Axis = ("data", "fsdp")

_target: contextvars.ContextVar[tuple[str, bool] | None] = contextvars.ContextVar("target_platform", default=None)
_kernels: contextvars.ContextVar[bool] = contextvars.ContextVar("kernels", default=True)


def platform() -> str:
    """The platform that traced code will run on: "cpu", "gpu" or "tpu". Only speed depends on it, never a value's meaning."""
    return (_target.get() or (jax.default_backend(), False))[0]


def ampere() -> bool:
    """Whether traced code will run on an NVIDIA GPU of compute capability 8.0 or more, as Triton, cuDNN's attention and TF32 need it.

    A GPU that is not here, and compiled for, is taken for one.
    """
    if platform() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "8.0")  # "gfx942" on AMD's
    return capability[0].isdigit() and float(capability) >= 8.0


def interpreted() -> bool:
    """Whether Triton kernels are carried out operation by operation, slowly, as they can be anywhere."""
    return platform() == "cpu" or (_target.get() or ("", False))[1]


@contextlib.contextmanager
def target_platform(name: str, interpret: bool = False) -> Iterator[None]:
    """Trace for platform `name` inside the block; for ahead-of-time compilation on a machine without the accelerator.

    With `interpret` a GPU's program runs on a CPU, for tests.
    """
    token = _target.set((name, interpret))
    try:
        yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def use_kernels(on: bool) -> Iterator[None]:
    """Trace with our own kernels inside the block, where `kernels_on` and what they take allow it, or without them."""
    token = _kernels.set(on)
    try:
        yield
    finally:
        _kernels.reset(token)


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Trace for `mesh` inside the block: `constrain` then has an effect."""
    with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def constrain(x: Array, *axes: Axis) -> Array:
    """Splits each axis of `x` over these mesh axes (None: not at all); a no-op without a mesh, and where an axis does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x

    def devices(axis: Axis) -> int:
        return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))

    spec = (axis if n % devices(axis) == 0 else None for n, axis in zip(x.shape, axes, strict=False))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def kernels_on(dtype: Any, where: str = "gpu") -> bool:
    """Whether the kernels for `where` are to be run: on a GPU that they run on (`ampere`) or a "tpu", in half precision.

    Not with `use_kernels(False)`.
    """
    return (ampere() if where == "gpu" else platform() == where) and jnp.dtype(dtype).itemsize == 2 and _kernels.get()


def kernel_rows(rows: int, dtype: Any, frames_apart: bool = True) -> tuple[str, ...] | None:
    """The axes of the mesh that `rows` leading entries of activations lie over, for a Triton kernel, which XLA cannot partition.

    None where it is not to be run: not `kernels_on`, entries that do not divide, channels split over `tensor`, or (not `frames_apart`) an
    entry is a clip and its frames are split over `context`.
    """
    if not kernels_on(dtype):
        return None
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    axes = tuple(name for name in ("data", "fsdp", "context") if mesh.shape[name] > 1)
    whole = mesh.shape["tensor"] == 1 and (frames_apart or mesh.shape["context"] == 1)
    return axes if whole and rows % math.prod(mesh.shape[name] for name in axes) == 0 else None


def on_each_device(call: Callable, rows: tuple[str, ...], inputs: Any, outputs: Any) -> Callable:
    """`call` on what each device has of arrays that lie over the mesh axes `rows`: trees of booleans say which do, by their first axis."""

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda split: PartitionSpec(rows) if split else PartitionSpec(), tree)

    if not rows:
        return call
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(call, mesh=mesh, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False)
