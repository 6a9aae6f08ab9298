"""RAFT: each piece against a numpy or scipy transcription, the whole against torchvision and the authors' code."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image
from scipy import ndimage

from motif_jax.interop.raft import from_reference, load_raft, to_reference
from motif_jax.models.placement import target_platform
from motif_jax.motion import raft

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata"
SPEC = importlib.util.spec_from_file_location("make_raft", TESTDATA / "make_raft.py")
SPEC.loader.exec_module(make_raft := importlib.util.module_from_spec(SPEC))

SHARED_WEIGHTS = {"small": "raft_small_things", "large": "raft_large_RANDOM_fp16"}
SHARED_FLOWS = {"small": "small", "large": "largeRANDOM"}


@functools.cache
def compiled(variant):
    """A network of the variant as a function of its weights; compiled once per size of the frames."""
    graph = nnx.split(nnx.eval_shape(lambda: raft.RAFT(variant, rngs=nnx.Rngs(0))))[0]
    return jax.jit(lambda state, *arguments: nnx.merge(graph, state)(*arguments))


def run(model, first, second, iterations):
    """The flow of one pair of frames as numpy [H, W, 2]."""
    return np.asarray(compiled(model.variant)(nnx.split(model)[1], first[None], second[None], iterations)[0])


# The authors' code (torch, CPU, float32) against our port. 1e-4 mean and 1e-3 max are about ten times the error of that code against
# itself in float64; `car` shows textureless asphalt, where that error is a hundred times larger. It grows with the iterations.
GATES = {12: (1e-4, 1e-3), 32: (1e-3, 1e-2)}
CAR = {12: (2e-3, 0.1), 32: (2e-2, 1.0)}
PAIRS = ("sintel_0016", "dog", "juggle_s4", "car")
FAST = {*(("small", pair, 12) for pair in PAIRS), ("small", "sintel_0016", 32), ("small", "car", 32), ("large", "juggle_s4", 12)}
CASES = [(variant, pair, n) for variant in SHARED_WEIGHTS for pair in PAIRS for n in GATES]


@pytest.mark.parametrize(
    ("variant", "pair", "iterations"), [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES]
)
def test_equals_the_authors_code_on_real_frames(shared, variant, pair, iterations):
    model = load_raft(shared / "raft" / f"{SHARED_WEIGHTS[variant]}.safetensors", variant)
    frames = [np.asarray(Image.open(shared / "raft/pairs" / f"{pair}_{i}.png")) for i in (1, 2)]
    expected = np.load(shared / "raft" / f"flow_{SHARED_FLOWS[variant]}_{pair}.npz")[f"flow_{iterations}"]
    error = np.abs(run(model, *frames, iterations) - expected)
    mean, largest = (CAR if pair == "car" else GATES)[iterations]
    assert error.mean() <= mean and error.max() <= largest, f"mean {error.mean():.2e}, max {error.max():.2e} px"


@pytest.mark.parametrize("variant", ["small", pytest.param("large", marks=pytest.mark.slow)])
def test_equals_the_authors_code_in_torchvisions_layout(shared, tmp_path, variant):
    """The same weights, written under torchvision's names and read again."""
    tensors = to_reference(load_raft(shared / "raft" / f"{SHARED_WEIGHTS[variant]}.safetensors"), "torchvision")
    assert not any(name.startswith(("fnet", "module", "cnet")) for name in tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "torchvision.safetensors")
    frames = [np.asarray(Image.open(shared / "raft/pairs" / f"dog_{i}.png")) for i in (1, 2)]
    expected = np.load(shared / "raft" / f"flow_{SHARED_FLOWS[variant]}_dog.npz")["flow_12"]
    error = np.abs(run(load_raft(tmp_path / "torchvision.safetensors", variant), *frames, 12) - expected)
    mean, largest = GATES[12]
    assert error.mean() <= mean and error.max() <= largest, f"mean {error.mean():.2e}, max {error.max():.2e} px"


@pytest.mark.parametrize("variant", ["small", "large"])
def test_equals_torchvision_on_formula_weights(variant):
    """Odd frame sizes, odd pyramid levels, non-trivial batch statistics; see testdata/make_raft.py."""
    shapes = json.loads((TESTDATA / "raft_names.json").read_text())[variant]["torchvision"]
    model = from_reference(make_raft.weights(shapes), variant)
    flow = run(model, *make_raft.frames(), make_raft.ITERATIONS)
    assert flow.shape == (make_raft.HEIGHT, make_raft.WIDTH, 2)
    expected = np.load(TESTDATA / "raft_flow.npz")[variant]
    assert expected.std() > 1  # pixels: the golden is not a constant
    # Flow up to 40 px in float32 through 4 iterations of untrained, badly conditioned weights.
    np.testing.assert_allclose(flow[:: make_raft.STRIDE, :: make_raft.STRIDE], expected, atol=1e-3)


def test_float32_on_tensor_cores_equals_the_authors_code(shared, tensor_cores):
    model = load_raft(shared / "raft" / f"{SHARED_WEIGHTS['small']}.safetensors", "small")
    frames = [np.asarray(Image.open(shared / "raft/pairs" / f"dog_{i}.png"))[None] for i in (1, 2)]
    expected = np.load(shared / "raft" / f"flow_{SHARED_FLOWS['small']}_dog.npz")["flow_12"]
    error = np.abs(jax.jit(lambda *frames: model(*frames, 12))(*frames)[0] - expected)
    mean, largest = GATES[12]
    assert error.mean() <= mean and error.max() <= largest, f"mean {error.mean():.2e}, max {error.max():.2e} px"
    assert len(tensor_cores) > 20  # every convolution of both encoders and of an iteration


@pytest.mark.parametrize("variant", ["small", "large"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prepared_kernels_are_the_same_network(variant, dtype):
    """Kernels made before the loop, in a GPU's layout; without its rounding only the order of sums differs, in bfloat16 by its steps."""
    shapes = json.loads((TESTDATA / "raft_names.json").read_text())[variant]["torchvision"]
    model = from_reference(make_raft.weights(shapes), variant, dtype=dtype)
    frames = np.random.default_rng(4).integers(0, 256, (2, 1, 64, 72, 3), np.uint8)
    expected = jax.jit(lambda *frames: model(*frames, 3))(*frames)
    with target_platform("gpu"):
        found = jax.jit(lambda *frames: model(*frames, 3))(*frames)
    np.testing.assert_allclose(found, expected, atol=5e-4 if dtype == "float32" else 0.2)  # flow of up to 12 and 25 px


def test_lookup_is_bilinear_with_zeros_outside():
    random = np.random.default_rng(0)
    h, w, radius = 9, 11, 3
    pyramid = [random.normal(size=(2, h * w, *size)).astype(np.float32) for size in ((9, 11), (4, 5), (2, 2), (1, 1))]
    position = random.uniform(-8, 19, (2, h, w, 2)).astype(np.float32)  # inside, across the rim, and outside of every level
    position[0, 0, 0] = 4, 3  # whole cells too
    found = np.asarray(raft.lookup([jnp.asarray(level) for level in pyramid], jnp.asarray(position), radius))
    taps = np.arange(-radius, radius + 1)
    for b, y, x in [(0, 0, 0), *np.argwhere(random.uniform(size=(2, h, w)) < 0.3)]:
        expected = []
        for level, correlation in enumerate(pyramid):
            px, py = position[b, y, x].astype(np.float64) / 2**level
            # The slow index of the window moves x.
            points = [[py + dy for dx in taps for dy in taps], [px + dx for dx in taps for dy in taps]]
            expected.append(ndimage.map_coordinates(correlation[b, y * w + x], points, order=1, mode="grid-constant", output=np.float64))
        # float32 coordinates of some ten cells: 1e-6 of a cell, times differences between neighbours of up to 6.
        np.testing.assert_allclose(found[b, y, x], np.concatenate(expected), atol=2e-5)


def test_lookup_far_outside_is_zero():
    pyramid = [jnp.ones((1, 64, 8 >> level, 8 >> level)) for level in range(4)]
    position = jnp.full((1, 8, 8, 2), 3e9).at[:, :4].set(-3e9)
    assert not np.asarray(raft.lookup(pyramid, position, 4)).any()


def test_correlation_pyramid_pools_products_and_drops_odd_edges():
    random = np.random.default_rng(1)
    first, second = random.normal(size=(2, 2, 9, 11, 16)).astype(np.float32)
    found = raft.correlation_pyramid(jnp.asarray(first), jnp.asarray(second))
    expected = np.einsum("bijc,byxc->bijyx", first, second, dtype=np.float64).reshape(2, 99, 9, 11) / 4
    for level, shape in zip(found, [(9, 11), (4, 5), (2, 2), (1, 1)], strict=True):
        assert level.shape == (2, 99, *shape)
        np.testing.assert_allclose(level, expected, atol=1e-5)
        even = expected[..., : 2 * (shape[0] // 2), : 2 * (shape[1] // 2)]
        expected = sum(even[..., y::2, x::2] for y in (0, 1) for x in (0, 1)) / 4


def test_bilinear_upsampling_keeps_the_corners():
    flow = np.random.default_rng(2).normal(size=(1, 5, 7, 2)).astype(np.float32)
    found = np.asarray(raft.upsample_bilinear(jnp.asarray(flow)))
    assert found.shape == (1, 40, 56, 2)
    rows, columns = np.linspace(0, 4, 40), np.linspace(0, 6, 56)
    for c in range(2):
        wide = np.stack([np.interp(columns, np.arange(7), line) for line in flow[0, ..., c].astype(np.float64)])
        tall = np.stack([np.interp(rows, np.arange(5), line) for line in wide.T]).T
        np.testing.assert_allclose(found[0, ..., c], tall, atol=5e-6)  # weights from float32 positions of up to 6 cells


def test_convex_upsampling_pixel_by_pixel():
    random = np.random.default_rng(3)
    flow, logits = random.normal(size=(1, 3, 4, 2)), 3 * random.normal(size=(1, 3, 4, 576))
    found = np.asarray(raft.upsample_convex(jnp.asarray(flow, jnp.float32), jnp.asarray(logits, jnp.float32)))
    padded = np.pad(flow[0], ((1, 1), (1, 1), (0, 0)))
    expected = np.zeros((24, 32, 2))
    for y, x in np.ndindex(24, 32):
        cell = logits[0, y // 8, x // 8].reshape(9, 64)[:, (y % 8) * 8 + x % 8]
        weight = np.exp(cell) / np.exp(cell).sum()
        expected[y, x] = weight @ padded[y // 8 : y // 8 + 3, x // 8 : x // 8 + 3].reshape(9, 2)
    np.testing.assert_allclose(found[0], expected, atol=2e-6)


@pytest.mark.parametrize(
    ("size", "expected"), [((218, 512), (3, 0, 3, 0)), ((317, 509), (1, 1, 2, 2)), ((64, 72), (0, 0, 0, 0)), ((65, 71), (3, 0, 4, 1))]
)
def test_padding_puts_the_odd_pixel_right_and_below(size, expected):
    assert raft.padding(*size) == expected
    frame = np.random.default_rng(4).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    top, left, bottom, right = expected
    rows = np.clip(np.arange(-top, size[0] + bottom), 0, size[0] - 1)
    columns = np.clip(np.arange(-left, size[1] + right), 0, size[1] - 1)
    np.testing.assert_array_equal(raft.pad(frame), frame[:, rows][:, :, columns])


def test_small_frames_and_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="at least 64 x 64 pixels, got 63 x 80"):
        raft.padding(63, 80)
    with pytest.raises(ValueError, match="'huge': must be one of small, large"):
        raft.RAFT("huge", rngs=nnx.Rngs(0))


def test_the_smallest_frames_give_finite_flow():
    """At 64 pixels the coarsest level is a single cell, by which the authors' code would divide by zero."""
    shapes = json.loads((TESTDATA / "raft_names.json").read_text())["small"]["torchvision"]
    first, second = make_raft.frames()[:, :64, :64]
    flow = run(from_reference(make_raft.weights(shapes)), first, second, 2)
    assert flow.shape == (64, 64, 2) and np.isfinite(flow).all() and flow.std() > 0.01
