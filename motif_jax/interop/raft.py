"""RAFT weights in and out: the authors' key layout and torchvision's, both ways, strictly.

In: a .safetensors, .pth or .pt file, or a dict of numpy tensors under the reference's names. Out: a `RAFT`, and back.
"""

import functools
import pathlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from motif_jax.interop import files
from motif_jax.interop.names import dotted, to_jax, to_torch, torch_name
from motif_jax.motion.raft import RAFT

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


def _torchvision(name: str) -> str:
    matches = [re.fullmatch(pattern, name).expand(to) for pattern, to in _TORCHVISION if re.fullmatch(pattern, name)]
    if len(matches) != 1:
        raise ValueError(f"{name}: {len(matches)} rows of the torchvision table match, must be 1")
    return matches[0].replace("fnet.", "feature_encoder.").replace("cnet.", "context_encoder.")


# Layout -> function from the authors' name of a tensor to its name there.
LAYOUTS = {"original": str, "torchvision": _torchvision}


@functools.cache
def _abstract(variant: str, precision: str = "highest", dtype: str = "float32") -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and shapes of a RAFT."""
    return nnx.split(nnx.eval_shape(lambda: RAFT(variant, rngs=nnx.Rngs(0), precision=precision, dtype=dtype)))


def names(variant: str, layout: str = "original") -> dict[str, str]:
    """Reference name -> dotted path of the parameter in `nnx.state(RAFT(variant))`, one row per parameter.

    Raises ValueError for an unknown variant or layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"RAFT layout {layout!r}: must be one of {', '.join(LAYOUTS)}")
    paths = [dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(_abstract(variant)[1])]
    return {LAYOUTS[layout](torch_name(path)): path for path in paths}


def _duplicate(name: str, layout: str) -> str | None:
    """The authors' second name of a shortcut's norm: `layer2.0.norm3` (batch-norm encoder) is `layer2.0.downsample.1`."""
    return name.replace(".downsample.1.", ".norm3.") if layout == "original" and ".downsample.1." in name else None


def detect(tensors: Mapping[str, np.ndarray]) -> tuple[str, str]:
    """(variant, layout) of a state dict by its names; ValueError when they are not RAFT's."""
    if any(name.startswith(("fnet.", "cnet.")) for name in tensors):
        layout, mask = "original", "update_block.mask."
    elif any(name.startswith(("feature_encoder.", "context_encoder.")) for name in tensors):
        layout, mask = "torchvision", "mask_predictor."
    else:
        first = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise ValueError(
            f"these are not RAFT weights: no name starts with fnet., cnet. or feature_encoder., context_encoder. (found {first}, ...)"
        )
    return ("large" if any(name.startswith(mask) for name in tensors) else "small"), layout


def from_reference(
    tensors: Mapping[str, np.ndarray], variant: str | None = None, precision: str = "highest", dtype: str = "float32"
) -> RAFT:
    """A RAFT holding `tensors` (arrays or `files.Lazy`; either layout, any float type; cast to float32) that computes in `dtype`.

    `variant` ("small", "large") is checked against the file when given. PyTorch's counters of batches, which old files do not have, are
    zero then. Raises one ValueError listing every tensor that is missing, left over, misshapen, or a duplicate that differs from its twin.
    """
    found, layout = detect(tensors)
    if variant is not None and found != variant:
        raise ValueError(f"these are weights of RAFT {found}, but RAFT {variant} was asked for; choose raft_{found} or another file")
    left = dict(tensors)
    for name in names(found, layout):
        if name.endswith("num_batches_tracked"):
            left.setdefault(name, np.zeros((), np.int64))
        twin = _duplicate(name, layout)
        if twin in left and name in left:
            tensor = left.pop(twin)
            if not np.array_equal(np.asarray(tensor), np.asarray(left[name])):
                left[f"{twin} (differs from its duplicate {name})"] = tensor
    graph, state = _abstract(found, precision, dtype)
    what = f"RAFT {found} ({layout} layout); take the authors' file of it, or torchvision's"
    return nnx.merge(graph, jax.tree.map(jnp.array, to_jax(left, state, what, rename=LAYOUTS[layout])))


def to_reference(model: RAFT, layout: str = "original") -> dict[str, np.ndarray]:
    """The state dict of `model` under the reference's names, which loads with strict=True in the reference code.

    The original layout repeats the norm of a shortcut under both of its names.
    """
    found, tensors = to_torch(nnx.state(model)), {}
    for name, path in names(model.variant, layout).items():
        tensor = np.array(found[torch_name(path)])
        if name.endswith("num_batches_tracked"):
            tensor = tensor.astype(np.int64)
        tensors[name] = tensor
        if twin := _duplicate(name, layout):
            tensors[twin] = tensor.copy()
    return tensors


def load_raft(path: str | pathlib.Path, variant: str | None = None, precision: str = "highest", dtype: str = "float32") -> RAFT:
    """The RAFT of a weight file, see `files.read_tensors` and `from_reference`; errors name the file.

    Raises FileNotFoundError, or ValueError for a file that is damaged, of another kind or not RAFT's.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no RAFT weights at {path}")
    tensors = files.read_tensors(path)
    try:
        return from_reference(tensors, variant, precision, dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
