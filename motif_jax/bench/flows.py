"""Optical flow at full resolution for the scores: a name and perhaps weights in, a function from frames to flow out."""

import itertools

import cv2
import numpy as np

from motif_jax.bench.video_metrics import FlowFn
from motif_jax.data.storage import on_disk, sha256
from motif_jax.errors import UserError
from motif_jax.motion import dis

ITERATIONS = 20  # as VBench


def make_flow(name: str, weights: str = "") -> tuple[FlowFn, dict[str, str]]:
    """(flow function, what its numbers depend on) of "dis", "raft_small" or "raft_large".

    DIS is OpenCV's and needs nothing. RAFT needs weights (docs/data.md). Raises UserError.
    """
    if name == "dis":
        if weights:
            raise UserError("--flow_weights: DIS has none; choose --flow=raft_small or raft_large")
        # DIS cuts the picture into one band per thread, and its flow depends on the bands: one, on every machine.
        cv2.setNumThreads(1)
        return dis.flow, {"flow": name, "opencv": cv2.__version__}
    import jax
    from flax import nnx

    from motif_jax.interop.raft import load_raft
    from motif_jax.motion.estimators import ENLARGE_BELOW, ENLARGED

    if not weights:
        raise UserError(f"--flow={name} needs --flow_weights (docs/data.md); --flow=dis needs none")
    try:
        file = on_disk(weights)
        graph, state = nnx.split(load_raft(file, name.removeprefix("raft_")))
    except (OSError, ValueError) as error:
        raise UserError(f"--flow_weights={weights}: {error}") from error
    one_pair = jax.jit(lambda state, first, second: nnx.merge(graph, state)(first, second, ITERATIONS))

    def flow(frames_THW3: np.ndarray) -> np.ndarray:
        height, width = frames_THW3.shape[1:3]
        enlarge = 1 if min(height, width) >= ENLARGE_BELOW else -(-ENLARGED // min(height, width))
        if enlarge > 1:
            size = (enlarge * width, enlarge * height)
            frames_THW3 = np.stack([cv2.resize(f, size, interpolation=cv2.INTER_LINEAR) for f in frames_THW3])
        fields = [np.asarray(one_pair(state, a[None], b[None]))[0] for a, b in itertools.pairwise(frames_THW3)]
        if enlarge > 1:
            fields = [cv2.resize(f, (width, height), interpolation=cv2.INTER_AREA) / enlarge for f in fields]
        return np.stack(fields)

    return flow, {"flow": name, "flow_weights_sha256": sha256(file)}
