"""Full-resolution flow for the scores: the networks' own where there is one, and the same size in every case."""

import importlib.util
import json
import pathlib

import cv2
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from motif_jax.bench.flows import make_flow
from motif_jax.errors import UserError

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata"


def test_raft_is_the_networks_flow(shared):
    """Against the flow of the authors' code. That took 12 iterations, this takes 20: they agree where the motion is found."""
    flow, described = make_flow("raft_small", str(shared / "raft/raft_small_things.safetensors"))
    frames = np.stack([np.asarray(Image.open(shared / "raft/pairs" / f"dog_{i}.png")) for i in (1, 2)])
    theirs = np.load(shared / "raft/flow_small_dog.npz")["flow_12"]
    ours = flow(frames)
    assert ours.shape == (1, *frames.shape[1:3], 2) and ours.dtype == np.float32
    assert np.median(np.linalg.norm(ours[0] - theirs, axis=-1)) < 0.1 * np.linalg.norm(theirs, axis=-1).mean()
    assert described["flow"] == "raft_small" and len(described["flow_weights_sha256"]) == 64
    # Small frames are enlarged for it; what it says is in pixels of the small ones.
    small = np.stack([cv2.resize(f, (120, 88), interpolation=cv2.INTER_AREA) for f in frames])
    expected = cv2.resize(theirs, (120, 88), interpolation=cv2.INTER_AREA) * np.float32([120, 88]) / np.float32(theirs.shape[1::-1])
    ours = flow(small)
    assert ours.shape == (1, 88, 120, 2)
    assert np.median(np.linalg.norm(ours[0] - expected, axis=-1)) < 0.35 * np.linalg.norm(expected, axis=-1).mean()


def test_dis_does_not_depend_on_the_number_of_threads():
    texture = cv2.resize(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8), (240, 240))
    frames = np.stack([texture[:200, t : 200 + t] for t in (0, 3, 9)])
    cv2.setNumThreads(4)
    flow, _ = make_flow("dis")
    first = flow(frames)
    np.testing.assert_allclose(np.median(first, axis=(1, 2)), [[-3, 0], [-6, 0]], atol=0.1)
    assert cv2.getNumThreads() == 1


def test_mistakes(tmp_path):
    names = json.loads((TESTDATA / "raft_names.json").read_text())
    spec = importlib.util.spec_from_file_location("make_raft", TESTDATA / "make_raft.py")
    spec.loader.exec_module(make_raft := importlib.util.module_from_spec(spec))
    safetensors.numpy.save_file(make_raft.weights(names["small"]["torchvision"]), tmp_path / "small.safetensors")
    with pytest.raises(UserError, match=r"small\.safetensors: .*choose raft_small"):
        make_flow("raft_large", str(tmp_path / "small.safetensors"))
