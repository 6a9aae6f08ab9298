"""One rule between our parameter paths and PyTorch names, both ways, for every network here.

Modules carry the names of the reference's modules, so only the last part of a path and the axis order differ. Parameters
may be any pytree whose key path spells the dotted name: a flat dict, a nested dict or an `nnx.State`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from motif_jax.errors import UserError
from motif_jax.interop.files import Lazy

# Last part of our path -> last part of the PyTorch name; everything else keeps its name.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "in_proj_kernel": "in_proj_weight",
    "mean": "running_mean",
    "var": "running_var",
}


def torch_name(path: str) -> str:
    """The PyTorch name of our dotted path: "out.0.scale" -> "out.0.weight"."""
    head, _, leaf = path.rpartition(".")
    return f"{head}.{LEAVES.get(leaf, leaf)}".removeprefix(".")


def _is_kernel(path: str) -> bool:
    return path.rpartition(".")[2] in ("kernel", "in_proj_kernel")


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The PyTorch shape of a parameter: kernels are [*window, in, out] here and [out, in, *window] there."""
    return (shape[-1], shape[-2], *shape[:-2]) if _is_kernel(path) else tuple(shape)


def dotted(key_path: tuple) -> str:
    """ "a.0.kernel" for the key path of a leaf; the trailing attribute of an `nnx.Param` is not part of the name."""
    parts = [str(getattr(k, "key", getattr(k, "idx", ""))) for k in key_path if not isinstance(k, jax.tree_util.GetAttrKey)]
    return ".".join(parts)


def to_jax(tensors: Mapping[str, Any], template: Any, what: str, ignored: Iterable[str] = (), rename: Callable[[str], str] = str) -> Any:
    """The tree `template` filled from `tensors` (PyTorch names, no prefix): `files.Lazy` of its types in our layout.

    tensors: arrays, or `files.Lazy`. template: a pytree whose leaves have a shape and a type. what: the network and a
    remedy, for the message. ignored: regular expressions of tensor names that may be left over. rename: from the PyTorch name
    by the rule to that in `tensors`.
    Raises UserError listing every tensor that is missing, left over or of another shape.
    """
    missing, misshapen, used = [], [], set()

    def fill(key_path, leaf) -> Lazy | None:
        path = dotted(key_path)
        name, shape = rename(torch_name(path)), torch_shape(path, leaf.shape)
        used.add(name)
        if name not in tensors:
            missing.append(f"{name} {list(shape)}")
            return None
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            misshapen.append(f"{name}: {list(tensor.shape)} in the file, {list(shape)} in the model")
            return None
        return Lazy(tuple(leaf.shape), np.dtype(leaf.dtype), partial(_our_layout, path, tensor, leaf.dtype))

    filled = jax.tree_util.tree_map_with_path(fill, template)
    extra = [name for name in tensors if name not in used and not any(re.fullmatch(pattern, name) for pattern in ignored)]
    problems = [("missing", missing), ("left over", sorted(extra)), ("of another shape", misshapen)]
    if any(names for _, names in problems):
        lines = [f"  {len(names)} {kind}: " + "; ".join(names) for kind, names in problems if names]
        raise UserError(f"these weights are not those of {what}\n" + "\n".join(lines))
    return filled


def _our_layout(path: str, tensor: Any, dtype: Any) -> np.ndarray:
    array = np.asarray(tensor)
    if _is_kernel(path):
        array = array.transpose(*range(2, array.ndim), 1, 0)
    return np.asarray(array, dtype, order="C")


def to_torch(params: Any) -> dict[str, Lazy]:
    """The inverse of `to_jax`: {PyTorch name: contiguous array in PyTorch's layout, not yet read}."""
    tensors = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = dotted(key_path)
        shape = torch_shape(path, tuple(leaf.shape))
        tensors[torch_name(path)] = Lazy(shape, np.dtype(leaf.dtype), partial(_torch_layout, path, leaf))
    return tensors


def _torch_layout(path: str, leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    if _is_kernel(path):
        array = array.transpose(-1, -2, *range(array.ndim - 2))
    return np.asarray(array, order="C")


def select(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
