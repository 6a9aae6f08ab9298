"""Where a video cuts from one scene to another: thumbnails of successive frames in, the places of the cuts out.

As PySceneDetect's detectors do it: a cut is a change of content that is large, and large beside the changes around it, which
those of a moving camera are not. Cross-fades are changes of many frames, and are not found.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8

CONTRAST = 3.0  # times the median of its neighbours that a cut's change exceeds
_NEIGHBOURS = 2  # on each side
# A smaller change, in levels, is of a picture that is shown again (a cartoon of 8 pictures a second in a file of 24 frames a second). Fewer
# than six of them in a row do not count: between them every move would stand out like a cut.
_REPEAT, _STILL = 1.0, 6


def changes(thumbnails_NHW3: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, " N-1"]:
    """Mean absolute difference from each frame to the next, luma and both chroma channels added up, in levels of 0..255."""
    import cv2

    pictures = np.stack([cv2.cvtColor(picture, cv2.COLOR_RGB2YCrCb) for picture in thumbnails_NHW3]).astype(np.float32)
    return np.abs(np.diff(pictures, axis=0)).sum(-1).mean((1, 2))


def cuts(thumbnails_NHW3: UInt8[np.ndarray, "N H W 3"], threshold: float) -> Int[np.ndarray, " K"]:
    """Numbers of the frames that begin a new scene.

    Measured on nine real clips (tests/data/test_scenes.py): a change within a scene reaches 31 levels and 4 times its neighbours,
    in a jump of a hand-held camera; 47 levels without that contrast; hard cuts have at least 49 levels and 6 times.
    """
    change = changes(thumbnails_NHW3)
    still = change < _REPEAT
    runs = np.split(np.arange(len(change)), np.flatnonzero(np.diff(still)) + 1)
    places = np.concatenate([run for run in runs if not still[run].any() or len(run) >= _STILL] or [[]]).astype(np.int64)
    change = change[places]
    found = []
    for i in np.flatnonzero(change >= threshold):
        around = np.concatenate([change[max(0, i - _NEIGHBOURS) : i], change[i + 1 : i + 1 + _NEIGHBOURS]])
        if not len(around) or change[i] > CONTRAST * np.median(around):
            found.append(places[i] + 1)
    return np.array(found, np.int64)
