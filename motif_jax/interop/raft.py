"""RAFT weights in and out: the authors' key layout (with or without `module.`) and torchvision's, both ways, strictly.

In: a .safetensors, .pth or .pt file, or a dict of numpy tensors under the reference's names. Out: a `RAFT`, and back.
"""

import functools
import pathlib
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from motif_jax.interop import files
from motif_jax.motion.raft import RAFT

LAYOUTS = ("original", "torchvision")

# Flax leaf -> PyTorch leaf.
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

# The authors' names -> torchvision's; every name matches exactly one row.
_TORCHVISION = (
    (r"(.net)\.conv1\.(.*)", r"\1.convnormrelu.0.\2"),
    (r"(.net)\.norm1\.(.*)", r"\1.convnormrelu.1.\2"),
    (r"(.net)\.conv2\.(.*)", r"\1.conv.\2"),
    (r"(.net\.layer\d\.\d)\.conv(\d)\.(.*)", r"\1.convnormrelu\2.0.\3"),
    (r"(.net\.layer\d\.\d)\.norm(\d)\.(.*)", r"\1.convnormrelu\2.1.\3"),
    (r"(.net\.layer\d\.\d\.downsample\.\d\..*)", r"\1"),
    (r"update_block\.encoder\.convc(\d)\.(.*)", r"update_block.motion_encoder.convcorr\1.0.\2"),
    (r"update_block\.encoder\.convf(\d)\.(.*)", r"update_block.motion_encoder.convflow\1.0.\2"),
    (r"update_block\.encoder\.conv\.(.*)", r"update_block.motion_encoder.conv.0.\1"),
    (r"update_block\.gru\.conv([zrq])\.(.*)", r"update_block.recurrent_block.convgru1.conv\1.\2"),
    (r"update_block\.gru\.conv([zrq])(\d)\.(.*)", r"update_block.recurrent_block.convgru\2.conv\1.\3"),
    (r"(update_block\.flow_head\..*)", r"\1"),
    (r"update_block\.mask\.0\.(.*)", r"mask_predictor.convrelu.0.\1"),
    (r"update_block\.mask\.2\.(.*)", r"mask_predictor.conv.\1"),
)
_ENCODERS = (("fnet.", "feature_encoder."), ("cnet.", "context_encoder."))


def _torchvision(name: str) -> str:
    matches = [re.fullmatch(pattern, name).expand(to) for pattern, to in _TORCHVISION if re.fullmatch(pattern, name)]
    if len(matches) != 1:
        raise ValueError(f"{name}: {len(matches)} rows of the torchvision table match, must be 1")
    for ours, theirs in _ENCODERS:
        matches[0] = re.sub("^" + re.escape(ours), theirs, matches[0])
    return matches[0]


@functools.cache
def _abstract(variant: str, precision: str = "highest", dtype: str = "float32") -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and shapes of a RAFT."""
    return nnx.split(nnx.eval_shape(lambda: RAFT(variant, rngs=nnx.Rngs(0), precision=precision, dtype=dtype)))


def names(variant: str, layout: str = "original") -> dict[str, tuple]:
    """Reference name -> path of the parameter in `nnx.state(RAFT(variant))`, one row per parameter.

    Raises ValueError for an unknown variant or layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"RAFT layout {layout!r}: must be one of {', '.join(LAYOUTS)}")
    table = {}
    for path, _ in nnx.to_flat_state(_abstract(variant)[1]):
        name = ".".join(map(str, (*path[:-1], _LEAVES.get(path[-1], path[-1]))))
        table[_torchvision(name) if layout == "torchvision" else name] = path
    return table


def _duplicate(name: str) -> str | None:
    """The authors' second name of a shortcut's norm: `layer2.0.norm3` (batch-norm encoder) is `layer2.0.downsample.1`."""
    return name.replace(".downsample.1.", ".norm3.") if ".downsample.1." in name else None


def detect(tensors: Mapping[str, np.ndarray]) -> tuple[str, str, str]:
    """(variant, layout, prefix) of a state dict by its names; ValueError when they are not RAFT's."""
    prefix = "module." if tensors and all(name.startswith("module.") for name in tensors) else ""
    bare = [name.removeprefix(prefix) for name in tensors]
    if any(name.startswith(("fnet.", "cnet.")) for name in bare):
        layout, mask = "original", "update_block.mask."
    elif any(name.startswith(("feature_encoder.", "context_encoder.")) for name in bare):
        layout, mask = "torchvision", "mask_predictor."
    else:
        first = ", ".join(sorted(bare)[:3]) or "nothing"
        raise ValueError(
            f"these are not RAFT weights: no name starts with fnet., cnet. or feature_encoder., context_encoder. (found {first}, ...)"
        )
    return ("large" if any(name.startswith(mask) for name in bare) else "small"), layout, prefix


def from_reference(
    tensors: Mapping[str, np.ndarray], variant: str | None = None, precision: str = "highest", dtype: str = "float32"
) -> RAFT:
    """A RAFT holding `tensors` (either layout, any float type; cast to float32) that computes in `dtype`.

    `variant` ("small", "large") is checked against the file when given. PyTorch's counters of batches, which old files do not have, are
    zero then. Raises one ValueError listing every tensor that is missing, left over, misshapen, or a duplicate that differs from its twin.
    """
    found, layout, prefix = detect(tensors)
    if variant is not None and found != variant:
        raise ValueError(f"these are weights of RAFT {found}, but RAFT {variant} was asked for; choose raft_{found} or another file")
    left = {name.removeprefix(prefix): np.asarray(tensor) for name, tensor in tensors.items()}
    graph, state = _abstract(found, precision, dtype)
    flat = dict(nnx.to_flat_state(state))
    bad, filled = [], {}
    for name, path in names(found, layout).items():
        if name.endswith("num_batches_tracked"):
            left.setdefault(name, np.zeros((), np.int64))
        if name not in left:
            bad.append(f"missing: {name}")
            continue
        tensor, wanted = left.pop(name), flat[path]
        twin = left.pop(_duplicate(name), None) if layout == "original" and _duplicate(name) else None
        if twin is not None and not np.array_equal(twin, tensor):
            bad.append(f"contradicting: {name} differs from its duplicate {_duplicate(name)}")
        # PyTorch stores convolutions as (out, in, height, width).
        if tensor.ndim == 4:
            tensor = tensor.transpose(2, 3, 1, 0)
        if tensor.shape != wanted.shape:
            bad.append(f"misshapen: {name} has {_torch_shape(tensor.shape)}, must be {_torch_shape(wanted.shape)}")
            continue
        filled[path] = wanted.replace(jnp.asarray(tensor, wanted.dtype))
    bad += [f"left over: {name}" for name in left]
    if bad:
        raise ValueError("RAFT {} weights ({} layout) do not fit, {} mistakes:\n  {}".format(found, layout, len(bad), "\n  ".join(bad)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def to_reference(model: RAFT, layout: str = "original", prefix: str = "") -> dict[str, np.ndarray]:
    """The state dict of `model` under the reference's names, each preceded by `prefix` ("module." as in the authors' files).

    The original layout repeats the norm of a shortcut under both of its names; loads with strict=True in the reference code.
    """
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    tensors = {}
    for name, path in names(model.variant, layout).items():
        tensor = np.asarray(flat[path][...])
        if tensor.ndim == 4:
            tensor = np.ascontiguousarray(tensor.transpose(3, 2, 0, 1))
        elif name.endswith("num_batches_tracked"):
            tensor = tensor.astype(np.int64)
        tensors[prefix + name] = tensor
        if layout == "original" and _duplicate(name):
            tensors[prefix + _duplicate(name)] = tensor.copy()
    return tensors


def load_raft(path: str | pathlib.Path, variant: str | None = None, precision: str = "highest", dtype: str = "float32") -> RAFT:
    """The RAFT of a weight file, see `files.read_tensors` and `from_reference`; errors name the file.

    Raises FileNotFoundError, or ValueError for a file that is damaged, of another kind or not RAFT's.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no RAFT weights at {path}")
    tensors = {name: np.array(tensor) for name, tensor in files.read_tensors(path).items()}
    try:
        return from_reference(tensors, variant, precision, dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape
