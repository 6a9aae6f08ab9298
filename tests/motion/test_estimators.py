"""Flow of clips: every frame meets the right partner, the stored grid is the network's, and bytes depend on the clip alone."""

import hashlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image

from motif_jax.interop import raft as interop
from motif_jax.motion import estimators
from motif_jax.motion.estimators import make_flow_estimator

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata"
SPEC = importlib.util.spec_from_file_location("make_raft", TESTDATA / "make_raft.py")
SPEC.loader.exec_module(make_raft := importlib.util.module_from_spec(SPEC))

# Iterations of untrained weights amplify rounding, which differs between one pair at a time and several.
ROUNDING = 2e-3


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of formula weights, by variant."""
    folder = tmp_path_factory.mktemp("raft")
    names = json.loads((TESTDATA / "raft_names.json").read_text())
    for variant in names:
        safetensors.numpy.save_file(make_raft.weights(names[variant]["torchvision"]), folder / f"{variant}.safetensors")
    return {variant: folder / f"{variant}.safetensors" for variant in names}


def clip(frames, height, width, seed=0):
    """A textured picture under a window that moves a little further in every frame."""
    texture = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8).repeat(6, 0).repeat(6, 1)
    return np.stack([texture[t * t : t * t + height, 3 * t : 3 * t + width] for t in range(frames)])


def network(file, frames, iterations):
    """Full-resolution flow of every pair of neighbours, from the network itself."""
    graph, state = nnx.split(interop.load_raft(file))
    return np.asarray(jax.jit(lambda state, a, b: nnx.merge(graph, state)(a, b, iterations))(state, frames[:-1], frames[1:]))


def upsampled(flow_hw2, height, width):
    """Bilinear with aligned corners, one axis after the other."""
    h, w, _ = flow_hw2.shape
    wide = np.stack([[np.interp(np.linspace(0, w - 1, width), np.arange(w), line) for line in flow_hw2[..., c]] for c in range(2)])
    tall = [[np.interp(np.linspace(0, h - 1, height), np.arange(h), line) for line in plane.T] for plane in wide]
    return np.stack(tall, -1).transpose(1, 0, 2)


@pytest.mark.parametrize(("most", "count", "size"), [(8, 15, 8), (8, 16, 8), (8, 17, 6), (1, 3, 1), (8, 5, 5)])
def test_blocks_are_no_larger_than_memory_allows(most, count, size):
    sizes = []
    found = estimators._in_blocks(most, count, lambda index: sizes.append(len(index)) or index)
    assert found.tolist() == list(range(count)) and set(sizes) == {size}


def test_small_cells_upsample_to_the_networks_flow(weights):
    """Odd sizes; five frames in blocks of three pairs, the last block filled up."""
    frames = clip(5, 66, 71)
    flow = make_flow_estimator("raft_small", weights["small"], iterations=3, pairs=3, enlarge_below=0).flow(frames)
    assert flow.shape == (5, 9, 9, 2) and flow.dtype == np.float32
    np.testing.assert_array_equal(flow[4], flow[3])
    for t, full in enumerate(network(weights["small"], frames, 3)):
        np.testing.assert_allclose(upsampled(flow[t], 72, 72)[3:69, :71], full, atol=ROUNDING)
    assert np.abs(np.diff(flow[:4], axis=0)).max() > 100 * ROUNDING  # pairs are told apart


def test_large_cells_are_means_of_the_networks_flow(weights):
    frames = clip(3, 64, 72)
    flow = make_flow_estimator("raft_large", weights["large"], iterations=2, enlarge_below=0).flow(frames)
    for t, full in enumerate(network(weights["large"], frames, 2)):
        np.testing.assert_allclose(flow[t], full.reshape(8, 8, 9, 8, 2).mean((1, 3)), atol=ROUNDING)


def test_small_clips_of_any_size_are_filled_up_to_whole_cells(weights):
    estimator, frames = make_flow_estimator("raft_small", weights["small"], 1), clip(2, 65, 78)
    filled = np.pad(frames, ((0, 0), (3, 4), (1, 1), (0, 0)), mode="edge")
    np.testing.assert_allclose(estimator.flow(frames), estimator.flow(filled), atol=ROUNDING)


def test_coarser_cells(weights):
    frames = clip(3, 64, 96)
    fine = make_flow_estimator("raft_small", weights["small"], 2, enlarge_below=0).flow(frames)
    coarse = make_flow_estimator("raft_small", weights["small"], 2, stride=16, enlarge_below=0).flow(frames)
    assert coarse.shape == (3, 4, 6, 2)
    np.testing.assert_allclose(coarse, fine.reshape(3, 4, 2, 6, 2, 2).mean((2, 4)), atol=ROUNDING)


@pytest.mark.slow
def test_bytes_depend_on_the_clip_alone(weights, tmp_path):
    """Not on the clips before it, nor on the process, which compiles for itself."""
    first, second = clip(4, 64, 64), clip(4, 64, 64, seed=1)
    estimator = make_flow_estimator("raft_small", weights["small"], 3, enlarge_below=0)
    flow = estimator.flow(first)
    assert not np.array_equal(estimator.flow(second), flow)
    estimator.flow(clip(3, 72, 64))
    assert estimator.flow(first).tobytes() == flow.tobytes()
    np.save(tmp_path / "clip.npy", first)
    code = (
        "import sys, numpy as np\n"
        "from motif_jax.motion.estimators import make_flow_estimator\n"
        "flow = make_flow_estimator('raft_small', sys.argv[1], 3, enlarge_below=0).flow(np.load(sys.argv[2]))\n"
        "open(sys.argv[3], 'wb').write(flow.tobytes())\n"
    )
    root = pathlib.Path(__file__).parents[2]
    arguments = [str(weights["small"]), str(tmp_path / "clip.npy"), str(tmp_path / "flow")]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=root, check=True, env=environment)
    assert (tmp_path / "flow").read_bytes() == flow.tobytes()


def test_description_names_the_weights(weights):
    described = make_flow_estimator("raft_small", weights["small"], 5).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["flow"] == "raft_small" and described["flow_iterations"] == 5 and described["flow_weights"] == "small.safetensors"
    assert described["flow_weights_sha256"] == hashlib.sha256(pathlib.Path(weights["small"]).read_bytes()).hexdigest()


def test_bad_arguments_say_what_to_do(weights, tmp_path):
    for call, error, message in [
        (("raft_medium", "x.pth"), ValueError, "must be one of raft_small, raft_large"),
        (("raft_small", ""), ValueError, "set prepare.flow_weights"),
        (("raft_small", tmp_path / "none.pth"), FileNotFoundError, "no RAFT weights at"),
        (("raft_large", weights["small"]), ValueError, "choose raft_small or another file"),
        (("raft_small", weights["small"], 0), ValueError, "iterations=0 must be at least 1"),
        (("raft_small", weights["small"], 12, 12), ValueError, "must be a multiple"),
    ]:
        with pytest.raises(error, match=message):
            make_flow_estimator(*call)
    estimator = make_flow_estimator("raft_small", weights["small"], 1, stride=16, enlarge_below=0)
    for frames, message in [
        (np.zeros((1, 64, 64, 3), np.uint8), r"at least two frames as uint8 \[T, H, W, 3\], got uint8 \[1, 64, 64, 3\]"),
        (np.zeros((2, 64, 64, 3), np.float32), "got float32"),
        (np.zeros((2, 64, 72, 3), np.uint8), "64 x 72 pixels do not divide into cells of 16 pixels"),
        (np.zeros((2, 48, 64, 3), np.uint8), "at least 64 x 64 pixels, got 48 x 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            estimator.flow(frames)


def test_bfloat16_is_near_float32(weights):
    """After one iteration; formula weights amplify rounding from one to the next."""
    frames = clip(3, 64, 72)
    exact, rough = (make_flow_estimator("raft_small", weights["small"], 1, enlarge_below=0, dtype=d) for d in ("float32", "bfloat16"))
    assert rough.describe()["flow_dtype"] == "bfloat16" and rough.flow(frames).dtype == np.float32
    error = np.abs(rough.flow(frames) - exact.flow(frames))
    # bfloat16 has 8 bits: some percent of a flow that passes through twenty convolutions.
    assert 0 < error.mean() < 0.05 * np.abs(exact.flow(frames)).mean(), error.mean()


def test_dis_cells_are_means_of_opencvs_flow():
    frames = clip(4, 64, 72)
    estimator = make_flow_estimator("dis", stride=16)
    flow = estimator.flow(frames)
    assert flow.shape == (4, 4, 5, 2) and flow.dtype == np.float32  # 72 is padded to 80
    np.testing.assert_array_equal(flow[3], flow[2])
    opencv = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    for t in range(3):
        full = opencv.calc(*(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames[t : t + 2]), None)
        np.testing.assert_allclose(flow[t, 1, 2], full[16:32, 32:48].mean((0, 1)), rtol=1e-5)
        # The window moves by 3 to the right and 2t + 1 down: the texture goes the other way.
        np.testing.assert_allclose(np.median(flow[t], (0, 1)), (-3, -2 * t - 1), atol=0.3)
    assert estimator.describe()["flow"] == "dis" and json.loads(json.dumps(estimator.describe())) == estimator.describe()


def test_any_number_of_devices_gives_the_same_bytes(weights, tmp_path):
    """Six clips from four threads on two devices, against one device and one thread."""
    clips = np.stack([clip(3, 64, 64, seed) for seed in range(6)])
    np.save(tmp_path / "clips.npy", clips)
    code = (
        "import sys, numpy as np, jax\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from motif_jax.motion.estimators import make_flow_estimator\n"
        "estimator, seen = make_flow_estimator('raft_small', sys.argv[1], 2, enlarge_below=0), set()\n"
        "call = estimator._flow._function\n"
        "def watched(params, *arrays):\n"
        "    out = call(params, *arrays)\n"
        "    seen.update(out.devices())\n"
        "    return out\n"
        "estimator._flow._function = watched\n"
        "with ThreadPoolExecutor(4) as threads:\n"
        "    np.save(sys.argv[3], list(threads.map(estimator.flow, np.load(sys.argv[2]))))\n"
        "assert len(seen) == len(jax.local_devices()) == 2, seen\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    arguments = [str(weights["small"]), str(tmp_path / "clips.npy"), str(tmp_path / "flow.npy")]
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=root, check=True, env=environment)
    estimator = make_flow_estimator("raft_small", weights["small"], 2, enlarge_below=0)
    np.testing.assert_array_equal(np.load(tmp_path / "flow.npy"), [estimator.flow(c) for c in clips])


def test_real_weights_on_real_frames(shared):
    """The stored cells, upsampled by numpy, are the flow of the authors' code."""
    estimator = make_flow_estimator("raft_small", shared / "raft/raft_small_things.safetensors")
    frames = np.stack([np.asarray(Image.open(shared / "raft/pairs" / f"dog_{i}.png")) for i in (1, 2)])
    expected = np.load(shared / "raft/flow_small_dog.npz")["flow_12"]
    error = np.abs(upsampled(estimator.flow(frames)[0], *expected.shape[:2]) - expected)
    assert error.mean() <= 1e-4 and error.max() <= 1e-3, f"mean {error.mean():.2e}, max {error.max():.2e} px"


def test_small_clips_are_enlarged_for_the_network(shared):
    """Two real frames at 64 x 64 give the flow of the same frames at 512 x 512, which the network sees without help."""
    weights = shared / "raft/raft_small_things.safetensors"
    pictures = [Image.open(shared / "raft/pairs" / f"juggle_s4_{i}.png") for i in (1, 2)]

    def at(side):
        return np.stack([np.asarray(p.crop((0, 0, 317, 317)).resize((side, side), Image.Resampling.BICUBIC)) for p in pictures])

    truth = make_flow_estimator("raft_small", weights, stride=64).flow(at(512))[0] / 8
    moving = np.linalg.norm(truth, axis=-1).mean()
    enlarged = make_flow_estimator("raft_small", weights).flow(at(64))[0]
    plain = make_flow_estimator("raft_small", weights, enlarge_below=0).flow(at(64))[0]

    def error(flow):
        return np.linalg.norm(flow - truth, axis=-1).mean() / moving

    # Half the motion is what is left of fine detail at 64 pixels; without enlargement the error exceeds the motion itself.
    assert error(enlarged) < 0.5 < 1 < error(plain), (error(enlarged), error(plain))


@pytest.mark.parametrize("network", ["small", "largeRANDOM"])
def test_the_mean_is_the_pooling_nearest_to_full_resolution(shared, network):
    """Of what could stand for a cell of 8 x 8 pixels: the heatmap of its flow against the mean of the heatmap of its pixels."""
    errors = {"mean": 0.0, "median": 0.0, "centre": 0.0, "longest": 0.0}
    for pair in ("sintel_0016", "dog", "juggle_s4", "car"):
        full = 4 * np.load(shared / f"raft/flow_{network}_{pair}.npz")["flow_12"]  # as at a stride of four frames
        rows, columns = full.shape[0] // 8, full.shape[1] // 8
        cells = full[: 8 * rows, : 8 * columns].reshape(rows, 8, columns, 8, 2).transpose(0, 2, 1, 3, 4).reshape(rows, columns, 64, 2)

        def heat(flow, rows=rows, columns=columns):
            return 1 / (1 + np.exp(100 * (0.05 - np.linalg.norm(flow, axis=-1) / np.hypot(8 * rows, 8 * columns))))

        truth, length = heat(cells).mean(-1), np.linalg.norm(cells, axis=-1)
        longest = np.take_along_axis(cells, length.argmax(-1)[..., None, None], 2)[..., 0, :]
        pooled = {"mean": cells.mean(2), "median": np.median(cells, 2), "centre": cells[:, :, [27, 28, 35, 36]].mean(2), "longest": longest}
        for name, flow in pooled.items():
            errors[name] += np.abs(heat(flow) - truth).mean() / 4
    assert min(errors, key=errors.get) == "mean" and errors["mean"] < 0.004, errors
