"""The judge against clips whose failure is known: each is caught, and by its own measure."""

import math

import numpy as np
import pytest
from scipy import ndimage

from motif_jax.bench.judge import background_shift, judge
from motif_jax.data import sprites
from motif_jax.data.sprites import COLOURS, STILL, UNIT, WORLDS, coverage, make_clips

COUNT = 24
WORLD = "shapes"


@pytest.fixture(scope="module", params=[32, 64])
def clips(request):
    """Moving clips with at least one bystander."""
    size = request.param
    everything = make_clips(WORLD, 3, range(80), 8, size, size, "validation")
    keep = np.flatnonzero((everything["direction"] != STILL) & (everything["present"].sum(1) > 1))[:COUNT]
    return make_clips(WORLD, 3, keep, 8, size, size, "validation")


def redraw(clips, positions):
    """The clips with objects at other places, on their own background (grey where the truth hides it)."""
    n, most, frames, _ = positions.shape
    height, width = clips["height"], clips["width"]
    background = clips["frames"].astype(np.float32)
    seen = ~ndimage.binary_dilation(sprites.masks(clips).any(1), np.ones((1, 1, 3, 3)))
    weight = seen[..., None].sum(1, keepdims=True)
    scene = np.where(weight > 0, (background * seen[..., None]).sum(1, keepdims=True) / np.maximum(weight, 1), 128.0)
    scene = np.repeat(scene, frames, axis=1)
    palette = np.array([COLOURS[c] for c in WORLDS[WORLD].colours], np.float32)[clips["colour"]]
    for k in range(most):
        shape = np.repeat(clips["shape"][:, k], frames)
        alpha = coverage(shape, positions[:, k].reshape(-1, 2), height, width).reshape(n, frames, height, width, 1)
        alpha = alpha * clips["present"][:, k, None, None, None, None]
        scene = scene + alpha * (palette[:, k, None, None, None] - scene)
    return np.clip(np.rint(scene), 0, 255).astype(np.uint8)


def travelled(clips, factor=1.0, turn=0, who=0):
    """Positions with object `who` on the named way, scaled and turned by quarter turns; the others where they start."""
    positions = clips["positions"].copy()
    positions[:] = positions[:, :, :1]
    way = UNIT[clips["direction"]] * WORLDS[WORLD].travel * clips["width"] * factor
    for _ in range(turn):
        way = np.stack([-way[:, 1], way[:, 0]], -1)
    positions[:, who] += way[:, None] * np.linspace(0, 1, positions.shape[2])[:, None]
    return positions


def mean(measures, name):
    values = measures[name]
    return float(values[np.isfinite(values)].mean())


def test_the_truth_succeeds(clips):
    got = judge(clips["frames"], clips)
    assert got["success"].all() and got["direction_ok"].all()
    np.testing.assert_allclose(got["speed_ratio"], 1.0, atol=1e-9)
    np.testing.assert_allclose(got["path_error"], 0.0, atol=1e-9)
    assert (got["background_mae"] == 0).all() and (got["psnr"] == 60).all()
    assert mean(got, "shape_iou") > 0.95


def test_redrawn_truth_succeeds(clips):
    """The helper of the tests below is itself sound: what fails later fails for its motion."""
    got = judge(redraw(clips, travelled(clips)), clips)
    assert got["direction_ok"].all()
    assert mean(got, "success") > 0.9


def test_a_small_decoders_blur_and_noise_do_not_matter(clips):
    rng = np.random.default_rng(0)
    frames = ndimage.gaussian_filter(clips["frames"].astype(float), (0, 0, 0.5, 0.5, 0)) + rng.normal(0, 3, clips["frames"].shape)
    frames = np.clip(np.rint(frames), 0, 255).astype(np.uint8)
    got = judge(frames, clips, judge(frames, clips))
    assert mean(got, "direction_ok") == 1.0
    assert mean(got, "success") > 0.9
    assert mean(got, "background_shift") == 0.0
    assert mean(got, "path_error") < 0.02


def test_a_static_clip_fails_although_its_pixels_are_good(clips):
    frames = np.repeat(clips["frames"][:, :1], 8, axis=1)
    got = judge(frames, clips)
    assert not got["direction_ok"].any() and not got["success"].any()
    np.testing.assert_allclose(got["speed_ratio"], 0, atol=1e-9)
    assert (got["psnr_to_first"] == 60).all() and got["presence"].all()


def test_opposite_and_perpendicular_ways_fail(clips):
    for factor, turn, ratio in ((-0.5, 0, -0.5), (0.5, 1, 0.0)):
        got = judge(redraw(clips, travelled(clips, factor, turn)), clips)
        assert mean(got, "direction_ok") == 0 and mean(got, "success") == 0
        assert np.nanmedian(got["speed_ratio"]) == pytest.approx(ratio, abs=0.1)


def test_half_the_speed_is_a_direction_but_no_success(clips):
    got = judge(redraw(clips, travelled(clips, 0.5)), clips)
    assert mean(got, "direction_ok") == 1 and mean(got, "success") == 0
    assert mean(got, "speed_ratio") == pytest.approx(0.5, abs=0.05)


def test_the_wrong_object_moves(clips):
    got = judge(redraw(clips, travelled(clips, 0.6, who=1)), clips)
    assert mean(got, "direction_ok") == 0 and mean(got, "success") == 0
    # A bystander pushed against the frame or over another object may be lost instead.
    assert mean(got, "wrong_object") > 0.6
    assert np.nanmedian(got["selectivity"]) < 0.2
    assert np.nanmedian(got["others_drift"]) > clips["width"] / 16


def test_a_pan_moves_everything_and_is_no_motion_of_the_object(clips):
    step = UNIT[clips["direction"]] * WORLDS[WORLD].travel * clips["width"] / 7
    frames = clips["frames"].copy()
    for i in range(len(frames)):
        for t in range(8):
            x, y = np.rint(step[i] * t).astype(int)
            frames[i, t] = ndimage.shift(clips["frames"][i, 0], (y, x, 0), order=0, mode="nearest")
    got = judge(frames, clips)
    assert mean(got, "success") == 0
    assert mean(got, "direction_ok") < 0.1
    assert np.median(got["background_shift"]) == pytest.approx(WORLDS[WORLD].travel * clips["width"], abs=1)


def test_a_vanished_or_recoloured_object_does_not_score(clips):
    gone = clips["positions"].copy()
    gone[:, 0, 4:] = -1000
    got = judge(redraw(clips, gone), clips)
    assert mean(got, "presence") == 0.5 and mean(got, "direction_ok") == 0 and mean(got, "success") == 0
    grey = clips["frames"].copy()
    grey[:] = grey.mean(-1, keepdims=True)
    got = judge(grey, clips)
    assert mean(got, "presence") == 0 and mean(got, "direction_ok") == 0 and mean(got, "colour_error") > 75


def test_a_bad_background_is_no_success(clips):
    rng = np.random.default_rng(1)
    frames = np.clip(clips["frames"] + rng.normal(0, 12, clips["frames"].shape), 0, 255).astype(np.uint8)
    got = judge(frames, clips)
    assert mean(got, "direction_ok") > 0.9 and mean(got, "success") == 0
    # Mean of |N(0, 12)|, cut off at no end worth mentioning.
    assert mean(got, "background_mae") == pytest.approx(12 * math.sqrt(2 / math.pi), rel=0.1)


def test_a_still_sentence_wants_stillness():
    many = make_clips(WORLD, 0, range(120), 8, 32, 32)
    still = make_clips(WORLD, 0, np.flatnonzero(many["direction"] == STILL), 8, 32, 32)
    assert judge(still["frames"], still)["success"].all()
    moved = still["positions"].copy()
    moved[:, 0] += np.array([6.0, 0.0]) * np.linspace(0, 1, 8)[:, None]
    inside = moved[:, 0, -1, 0] < 27
    got = judge(redraw(still, moved), still)
    assert inside.any() and not got["direction_ok"][inside].any() and np.isnan(got["speed_ratio"]).all()


@pytest.fixture(scope="module")
def scenes():
    """Three shapes in 16 frames of 64x64, one of them moving."""
    everything = make_clips(WORLD, 7, range(30), 16, 64, 64, "several")
    return make_clips(WORLD, 7, np.flatnonzero(everything["direction"] != STILL)[:16], 16, 64, 64, "several")


def small_autoencoder(frames):
    """Blur and noise like a small decoder's."""
    rng = np.random.default_rng(0)
    blurred = ndimage.gaussian_filter(frames.astype(float), (0, 0, 0.5, 0.5, 0)) + rng.normal(0, 4, frames.shape)
    return np.clip(np.rint(blurred), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def decoded(scenes):
    """(the scenes through that decoder, what the judge says of them)"""
    frames = small_autoencoder(scenes["frames"])
    return frames, judge(frames, scenes)


def ways(scenes, **kwargs):
    return redraw(scenes, travelled(scenes, **kwargs))


def everything_moves(scenes):
    positions = travelled(scenes, 0.5)
    positions[:, 1:] += positions[:, :1] - positions[:, :1, :1]
    return redraw(scenes, positions)


def camera_pans(scenes):
    step = np.rint(UNIT[scenes["direction"]] * WORLDS[WORLD].travel * 64 / 15 * np.arange(16)[:, None, None]).astype(int)
    first = scenes["frames"][:, 0]
    return np.stack(
        [[ndimage.shift(first[i], (step[t, i, 1], step[t, i, 0], 0), order=0, mode="nearest") for t in range(16)] for i in range(16)]
    )


def late_jump(scenes):
    positions = scenes["positions"].copy()
    positions[:, 0, :14] = positions[:, 0, :1]
    return redraw(scenes, positions)


def colour_drifts(scenes):
    """The object turns grey along its way."""
    inside = sprites.masks(scenes)[:, 0, ..., None] * np.linspace(0, 1, 16)[:, None, None, None]
    return np.rint(scenes["frames"] * (1 - inside) + 128 * inside).astype(np.uint8)


def shape_changes(scenes):
    return redraw(scenes | {"shape": (scenes["shape"] + 1) % 3}, travelled(scenes))


def vanishes(scenes):
    positions = scenes["positions"].copy()
    positions[:, 0, 8:] = -1000
    return redraw(scenes, positions)


def background_flickers(scenes):
    free = ~ndimage.binary_dilation(sprites.masks(scenes).any(1), np.ones((1, 1, 3, 3)))[..., None]
    noise = np.random.default_rng(1).normal(0, 18, (len(free), 16, 1, 1, 1))
    return np.clip(scenes["frames"] + free * noise, 0, 255).astype(np.uint8)


# Each failure, the measure that catches it, and the values of that measure that betray it.
FAILURES = {
    "static": (lambda s: np.repeat(s["frames"][:, :1], 16, 1), "leak", (0.9, 1.0)),
    "opposite direction": (lambda s: ways(s, factor=-0.5), "speed_ratio", (-0.6, -0.4)),
    "perpendicular": (lambda s: ways(s, factor=0.5, turn=1), "speed_ratio", (-0.1, 0.1)),
    "wrong object moves": (lambda s: ways(s, factor=0.6, who=1), "wrong_object", (0.6, 1.0)),
    "all objects move": (everything_moves, "selectivity", (0.2, 0.45)),
    "camera pans instead": (camera_pans, "background_shift", (20.0, 25.0)),
    "half speed": (lambda s: ways(s, factor=0.5), "speed_ratio", (0.45, 0.55)),
    "late jump": (late_jump, "path_error", (0.07, 0.2)),
    "colour drifts": (colour_drifts, "presence", (0.2, 0.8)),
    "shape changes": (shape_changes, "shape_iou", (0.6, 0.88)),
    "object vanishes": (vanishes, "presence", (0.5, 0.5)),
    "background flickers": (background_flickers, "background_mae", (11.0, 18.0)),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_is_caught_by_its_measure(scenes, decoded, name):
    (make, measure, (low, high)), (_, ceiling) = FAILURES[name], decoded
    got = judge(small_autoencoder(make(scenes)), scenes, ceiling)
    assert mean(got, "success") == 0
    assert low <= mean(got, measure) <= high and not low <= mean(ceiling, measure) <= high


def test_exact_and_decoded_scenes_succeed(scenes, decoded):
    assert mean(judge(scenes["frames"], scenes), "success") == 1.0
    frames, ceiling = decoded
    assert mean(judge(frames, scenes, ceiling), "success") == 1.0
    # Decoded once more with other noise: what blur and noise do to a measure is not taken for a failure.
    again = small_autoencoder(scenes["frames"][:, ::-1])[:, ::-1]
    assert mean(judge(again, scenes, ceiling), "success") >= 0.9


def test_background_shift_agrees_with_a_known_shift():
    rng = np.random.default_rng(0)
    field = ndimage.gaussian_filter(rng.normal(128, 60, (60, 60)), 1)
    reference = field[10:50, 10:50]
    mask = np.ones((40, 40), bool)
    mask[5:15, 20:30] = False
    shifts = [(0, 0), (3, 0), (0, -4), (-5, 2)]
    moved = np.stack([field[10 - y : 50 - y, 10 - x : 50 - x] for x, y in shifts])
    got = background_shift(reference, mask, moved, np.ones((4, 40, 40), bool))
    np.testing.assert_array_equal(got, shifts)
    noisy = reference + rng.normal(0, 20, (4, 40, 40))
    np.testing.assert_array_equal(background_shift(reference, mask, noisy, np.ones((4, 40, 40), bool)), 0)


def test_shapes_that_do_not_fit_are_named(clips):
    with pytest.raises(ValueError, match="clips to judge are"):
        judge(clips["frames"][:, :4], clips)
    with pytest.raises(ValueError, match="float"):
        judge(clips["frames"].astype(np.float32), clips)
