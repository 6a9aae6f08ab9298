"""Optical flow of whole clips for the offline job.

In: the uint8 frames of one clip. Out: flow in pixels on the stored grid, frame l -> l+1, as float32 numpy.
Several threads may ask at once: RAFT works on as many clips side by side as the process has devices.
"""

import math
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from motif_jax.data.storage import on_disk, sha256
from motif_jax.dist.replicas import Replicas
from motif_jax.interop.raft import load_raft
from motif_jax.motion import dis
from motif_jax.motion.raft import CELL, pad

VARIANTS = {"raft_small": "small", "raft_large": "large"}
# RAFT learned on frames of some 400 pixels and sees little below 128: at 64 x 64 its flow is unrelated to that of the same
# clip at 512 x 512 (correlation of magnitudes -0.1 to 0.9 on three clips), enlarged eight times it nearly equals it (0.9 to 1.0).
ENLARGE_BELOW, ENLARGED = 256, 320


class RaftEstimator:
    """Flow between consecutive frames of a clip; every frame is encoded once.

    The compiled program depends on the clip's shape alone and sees one clip at a time: the same clip gives the same bytes whatever
    else is in the run. Between kinds of machine (accelerator, number of visible CPUs) sums are ordered differently: some 1e-4 px.
    """

    def __init__(
        self,
        name: str,
        weights: str | pathlib.Path,
        iterations: int = 12,
        stride: int = CELL,
        pairs: int = 0,
        enlarge_below: int = ENLARGE_BELOW,
        dtype: str = "float32",
    ):
        """`stride` is the side of a stored cell in pixels (a multiple of 8).

        `pairs` frames are encoded together at most, and as many pairs refined; 0 takes 1 on CPU, where larger blocks fall out of the
        cache, else 8.
        Clips with a side under `enlarge_below` pixels are enlarged for the network. `dtype` is that of its convolutions:
        float32, bfloat16, or tensorfloat32, which is what a GPU makes of float32 where it may round to 10 bits (PyTorch's default).
        """
        if name not in VARIANTS:
            raise ValueError(f"flow estimator {name!r}: must be one of {', '.join([*VARIANTS, 'dis'])}")
        if not str(weights):
            raise ValueError(
                f"{name} needs weights: set prepare.flow_weights to a .safetensors or .pth file of RAFT {VARIANTS[name]} "
                "(docs/data.md says where they are), or prepare.flow=dis, which needs none"
            )
        if iterations < 1 or pairs < 0:
            raise ValueError(f"iterations={iterations} must be at least 1 and pairs={pairs} at least 0")
        if stride < CELL or stride % CELL:
            raise ValueError(f"stride={stride}: RAFT's grid is {CELL} pixels, the stored cell must be a multiple of it")
        pairs = pairs or (1 if jax.default_backend() == "cpu" else 8)
        self.name, self.iterations, self.stride, self.dtype = name, iterations, stride, dtype
        exact = {"precision": "default", "dtype": "float32"} if dtype == "tensorfloat32" else {"precision": "highest", "dtype": dtype}
        file = on_disk(weights)
        graph, state = nnx.split(load_raft(file, VARIANTS[name], **exact))
        self._flow = Replicas(
            partial(_clip_flow, graph, iterations=iterations, stride=stride, pairs=pairs, enlarge_below=enlarge_below), state
        )
        self._file, self._sha256 = file.name, sha256(file)

    def flow(self, frames_THW3: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "T h w 2"]:
        """(u, v) in clip pixels from each frame to the next; the last frame repeats the one before.

        The grid covers the frames padded up to multiples of 8 (see `raft.padding`): h = ceil(H / 8) at stride 8. A cell of
        raft_small is the network's own value, of which the full-resolution flow is the bilinear interpolation; a cell of
        raft_large is the mean of its pixels. Clips with a side under `enlarge_below` are enlarged by a whole factor first, and the
        flow is averaged and scaled back. Raises ValueError for frames that are not uint8 [T >= 2, H, W, 3], or that a larger
        stride does not divide.
        """
        frames = np.asarray(frames_THW3)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) < 2:
            raise ValueError(f"flow needs at least two frames as uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
        cells = [math.ceil(side / CELL) * CELL for side in frames.shape[1:3]]
        if any(side % self.stride for side in cells):
            raise ValueError(f"frames of {frames.shape[1]} x {frames.shape[2]} pixels do not divide into cells of {self.stride} pixels")
        return self._flow(frames)

    def describe(self) -> dict[str, Any]:
        """What the flow depends on, for a dataset's metadata; the weights are named by file and SHA-256."""
        return {
            "flow": self.name,
            "flow_iterations": self.iterations,
            "flow_stride": self.stride,
            "flow_dtype": self.dtype,
            "flow_weights": self._file,
            "flow_weights_sha256": self._sha256,
        }


class DisEstimator:
    """OpenCV's DIS flow between consecutive frames, averaged over cells: for machines without accelerator or weights."""

    def __init__(self, stride: int = CELL):
        self.stride = stride

    def flow(self, frames_THW3: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "T h w 2"]:
        """As `RaftEstimator.flow`; the border is replicated up to whole cells."""
        count, height, width, _ = frames_THW3.shape
        fields = dis.flow(frames_THW3)
        fields = np.pad(fields, [(0, 0), (0, -height % self.stride), (0, -width % self.stride), (0, 0)], mode="edge")
        rows, columns = fields.shape[1] // self.stride, fields.shape[2] // self.stride
        cells = fields.reshape(count - 1, rows, self.stride, columns, self.stride, 2).mean((2, 4), dtype=np.float32)
        return np.concatenate([cells, cells[-1:]])

    def describe(self) -> dict[str, Any]:
        """What the flow depends on, for a dataset's metadata."""
        import cv2

        return {"flow": "dis", "flow_stride": self.stride, "flow_preset": "medium", "opencv": cv2.__version__}


def make_flow_estimator(
    name: str, weights: str | pathlib.Path = "", iterations: int = 12, stride: int = CELL, **options: Any
) -> RaftEstimator | DisEstimator:
    """The estimator `name`: "raft_small" or "raft_large" with weights from a file (see `RaftEstimator`, also for `options`), or "dis".

    Raises ValueError for an unknown name, weights that do not fit it or settings out of range, FileNotFoundError for a missing file.
    """
    return DisEstimator(stride) if name == "dis" else RaftEstimator(name, weights, iterations, stride, **options)


def _clip_flow(graph: Any, state: Any, frames_THW3: Array, *, iterations: int, stride: int, pairs: int, enlarge_below: int) -> Array:
    model = nnx.merge(graph, state)
    shorter = min(frames_THW3.shape[1:3])
    enlarge = 1 if shorter >= enlarge_below else math.ceil(ENLARGED / shorter)
    if enlarge > 1:  # whole cells first, as `pad` fills them up
        margins = ((side // 2, side - side // 2) for side in (-side % CELL for side in frames_THW3.shape[1:3]))
        frames_THW3 = jnp.pad(frames_THW3.astype(jnp.float32), ((0, 0), *margins, (0, 0)), mode="edge")
        count, height, width, _ = frames_THW3.shape
        frames_THW3 = jax.image.resize(frames_THW3, (count, enlarge * height, enlarge * width, 3), "linear")
    frames = pad(frames_THW3)
    features = _in_blocks(pairs, len(frames), lambda index: model.features(frames[index]))
    context = _in_blocks(pairs, len(frames) - 1, lambda index: model.context(frames[index]))

    def refine(index):  # a pair holds 35 MB of correlations at 320 x 512
        flow, hidden = model.refine(features[index], features[index + 1], context[index], iterations)
        return CELL * flow if model.variant == "small" else _pool(model.upsample(flow, hidden), CELL)

    flow = _in_blocks(pairs, len(frames) - 1, refine)
    flow = _pool(flow, enlarge * stride // CELL) / enlarge
    return jnp.concatenate([flow, flow[-1:]])


def _in_blocks(most: int, count: int, call: Callable[[Array], Array]) -> Array:
    """`call` of the indices 0 to `count` - 1, in blocks of equal size, `most` at most, the last one filled up with repeats."""
    blocks = math.ceil(count / most)
    size = math.ceil(count / blocks)
    found = jax.lax.map(call, jnp.minimum(jnp.arange(blocks * size), count - 1).reshape(blocks, size))
    return found.reshape(blocks * size, *found.shape[2:])[:count]


def _pool(flow_BHW2: Array, side: int) -> Array:
    b, h, w, c = flow_BHW2.shape
    return flow_BHW2.reshape(b, h // side, side, w // side, side, c).mean((2, 4))
