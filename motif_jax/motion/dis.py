"""OpenCV's DIS optical flow (Kroeger et al., arXiv 1603.03590): needs neither weights nor an accelerator."""

import itertools

import numpy as np
from jaxtyping import Float, UInt8


def flow(frames_THW3: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "T-1 H W 2"]:
    """(u, v) in pixels from each frame to the next, float32, by the preset MEDIUM on grey values."""
    import cv2

    # Its pyramid needs a few patches of 8 pixels per side: small clips are enlarged, and the flow scaled back.
    enlarge = max(1, -(-64 // min(frames_THW3.shape[1:3])))
    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    height, width = frames_THW3.shape[1:3]
    grey = [cv2.cvtColor(np.ascontiguousarray(f), cv2.COLOR_RGB2GRAY) for f in frames_THW3]
    if enlarge > 1:
        grey = [cv2.resize(g, (width * enlarge, height * enlarge), interpolation=cv2.INTER_LINEAR) for g in grey]
    flows = [estimator.calc(a, b, None) for a, b in itertools.pairwise(grey)]
    if enlarge > 1:
        flows = [cv2.resize(f, (width, height), interpolation=cv2.INTER_AREA) / enlarge for f in flows]
    return np.stack(flows).astype(np.float32)


def mean_flow(frames_THW3: UInt8[np.ndarray, "T H W 3"]) -> float:
    """Mean flow magnitude of a clip, in pixels per frame."""
    return float(np.linalg.norm(flow(frames_THW3), axis=-1).mean())
