"""Videos whose numbers are known beforehand, and every flow-free number against scikit-image, scipy or plain numpy."""

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from motif_jax.bench import flows
from motif_jax.bench.video_metrics import dynamic_degree, measure, psnr, smoothness, ssim, warp_error

DIS, _ = flows.make_flow("dis")
SIDE = 96


def texture(seed=0, side=2 * SIDE):
    """Smooth coloured noise: something that flow can hold on to everywhere."""
    noise = np.random.default_rng(seed).normal(size=(side, side, 3))
    smooth = ndimage.gaussian_filter(noise, (3, 3, 0))
    return np.clip(128 + 50 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def moving(steps, seed=0):
    """A window of SIDE pixels that goes `steps` [T, 2] (right, down) over a texture: the picture moves the other way."""
    picture = texture(seed)
    return np.stack([picture[y : y + SIDE, x : x + SIDE] for x, y in np.asarray(steps) + 20])


def constant(u, v):
    """A flow function that says the same everywhere."""
    return lambda frames: np.broadcast_to(np.float32([u, v]), (len(frames) - 1, *frames.shape[1:3], 2))


STILL = np.repeat(texture(1)[None, :SIDE, :SIDE], 16, 0)


def test_a_still_video_moves_nowhere_and_is_all_likeness():
    row = measure(STILL, STILL[0], 8, DIS)
    nothing = "dynamic_degree mean_flow top5_flow residual_flow moving_area camera_shift luma_flicker warp_error best_frame".split()
    assert {n: row[n] for n in nothing} == dict.fromkeys(nothing, 0.0)
    assert {row[n] for n in row if n.startswith(("ssim", "flicker", "smoothness", "best_ssim"))} == {1.0}
    assert row["psnr0_image"] == row["psnr_image"] == row["psnr_first"] == 100.0


def test_a_camera_that_pans():
    """3 px to the left and 4 down every frame: 5 px of flow, all of it the whole picture's."""
    frames = moving([(3 * t, -4 * t + 20) for t in range(6)])
    row = measure(frames, frames[0], 8, DIS)
    assert row["mean_flow"] == pytest.approx(5, abs=0.3) and row["camera_shift"] == pytest.approx(5, abs=0.1)
    assert row["residual_flow"] < 0.3 and row["moving_area"] > 0.99
    # 5 px are beyond 6 * 96 / 256 = 2.25 px.
    assert row["dynamic_degree"] == 1.0
    # With the motion taken out nothing is left to flicker, but frames as they stand differ.
    assert row["warp_error"] < 2 < 255 * (1 - row["flicker"])
    assert row["smoothness"] > row["flicker"] + 0.05


def test_an_object_that_moves_over_a_still_ground():
    ground, patch = texture(2)[:SIDE, :SIDE], texture(3)[:24, :24]
    frames = np.repeat(ground[None], 8, 0)
    for t, frame in enumerate(frames):
        frame[30:54, 10 + 4 * t : 34 + 4 * t] = patch
    row = measure(frames, ground, 8, DIS)
    assert row["camera_shift"] < 0.05 and row["residual_flow"] == pytest.approx(row["mean_flow"], rel=0.1)
    assert 0.04 < row["moving_area"] < 0.25  # the patch covers 1/16
    assert row["top5_flow"] == pytest.approx(4, abs=1) and row["mean_flow"] < 1


def test_brightness_flicker_is_luma_flicker_and_no_motion():
    """Grey 100 and 110 in turn: second differences of 20, neighbours that guess 10 too much or too little."""
    frames = np.repeat(np.where(np.arange(9) % 2, 110, 100).astype(np.uint8)[:, None, None, None], 3, -1)
    frames = np.broadcast_to(frames, (9, 32, 32, 3)).copy()
    row = measure(frames, frames[0], 8, constant(0, 0))
    assert row["luma_flicker"] == pytest.approx(20) and row["warp_error"] == pytest.approx(10)
    assert row["flicker"] == pytest.approx(1 - 10 / 255) and row["smoothness"] == pytest.approx(1 - 10 / 255)


def test_the_frame_that_is_the_image_need_not_be_the_first():
    frames = moving([(5 * t, 0) for t in range(5)])
    row = measure(frames, frames[3], 8, constant(0, 0))
    assert row["best_frame"] == 3 and row["best_ssim"] == 1.0 and row["ssim0_image"] < 0.6


def test_measures_that_a_short_video_cannot_have():
    row = measure(STILL[:2], STILL[0], 8, constant(0, 0))
    absent = {n for n, value in row.items() if math.isnan(value)}
    assert absent == {"luma_flicker", "smoothness", "ssim_first_5", "ssim_first_10", "ssim_first_15"}


def steps_of(lengths, side=SIDE):
    """A flow function that gives the steps of these lengths (to the right), by the values of the frames: frame t is grey t."""

    def flow_fn(frames):
        t = frames[:, 0, 0, 0].astype(int)
        along = np.array([sum(lengths[a:b]) for a, b in itertools.pairwise(t)], np.float32)
        return np.stack([np.broadcast_to(along[:, None, None], (len(along), side, side)), np.zeros((len(along), side, side))], -1)

    frames = np.broadcast_to(np.arange(len(lengths) + 1, dtype=np.uint8)[:, None, None, None], (len(lengths) + 1, side, side, 3))
    return frames, flow_fn


@pytest.mark.parametrize(
    ("lengths", "fps", "expected"),
    [
        ([3] * 4 + [0] * 11, 8, 1),  # 16 frames of 96 px: 4 steps above 2.25 px are enough
        ([3] * 3 + [0] * 12, 8, 0),
        ([2.2] * 15, 8, 0),
        ([2.3] * 15, 8, 1),
        ([1.2] * 31, 16, 1),  # every other frame: steps of 2.4 px
        ([1.1] * 31, 16, 0),
        ([4.6] * 15, 4, 1),  # twice the threshold at half the rate
        ([4.4] * 15, 4, 0),
        ([3] * 2, 8, 1),  # of three frames one step is enough
    ],
)
def test_dynamic_degree_by_vbenchs_rule(lengths, fps, expected):
    frames, flow_fn = steps_of(lengths)
    assert dynamic_degree(frames, fps, flow_fn) == expected


def test_top5_is_the_mean_of_the_fastest_twentieth():
    rng = np.random.default_rng(0)
    flow = rng.normal(size=(2, SIDE, SIDE, 2)).astype(np.float32)
    row = measure(STILL[:3], STILL[0], 8, lambda frames: flow[: len(frames) - 1])
    lengths = np.sort(np.hypot(flow[..., 0], flow[..., 1]).reshape(2, -1))
    assert row["top5_flow"] == pytest.approx(lengths[:, -int(0.05 * SIDE * SIDE) :].mean(), abs=1e-5)
    centred = flow - np.median(flow.reshape(2, -1, 2), axis=1)[:, None, None]
    assert row["residual_flow"] == pytest.approx(np.hypot(centred[..., 0], centred[..., 1]).mean(), abs=1e-5)


def test_warp_error_leaves_out_what_forward_and_backward_flow_disagree_on():
    """Left half: the way there and back agree and the pixels differ by 7; right half: they do not, and differ by 90."""
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    frames[1, :, :16], frames[1, :, 16:] = 7, 90
    forward, backward = np.zeros((2, 1, 32, 32, 2), np.float32)
    backward[:, :, 16:] = 2
    assert warp_error(frames, forward, backward) == pytest.approx(7)
    backward[:] = 2
    assert math.isnan(warp_error(frames, forward, backward))


def test_smoothness_takes_neighbours_half_way():
    """The window goes 4 px a frame; neighbours that are told the true flow guess every inner pixel of the middle frame."""
    frames = moving([(4 * t, 0) for t in range(3)])

    def flow_fn(two):  # from frame 0 to 2, then back
        return constant(-8 if np.array_equal(two[0], frames[0]) else 8, 0)(two)

    # Only the border columns, of which a neighbour does not know the outside, can be wrong.
    inner = np.abs(frames[0][:, 4:].astype(int) - frames[1][:, :-4]).mean()
    assert inner == 0
    assert smoothness(frames, flow_fn) > 0.995 > 0.98 > smoothness(frames, constant(0, 0))


def test_likeness_equals_scikit_image():
    rng = np.random.default_rng(5)
    a = texture(4)[:61, :83]
    b = np.clip(a + rng.normal(0, 12, a.shape), 0, 255).astype(np.uint8)
    for first, second in ((a[..., 0], b[..., 0]), (a[..., 0], texture(6)[:61, :83, 0])):
        theirs = structural_similarity(first, second, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
        assert ssim(first, second) == pytest.approx(theirs, abs=1e-7)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-4)


def test_bad_videos_are_refused():
    for frames, image, fps, message in [
        (STILL[:1], STILL[0], 8, "two or more frames"),
        (STILL, STILL[0, :50], 8, "image of their size"),
        (STILL.astype(np.float32), STILL[0], 8, "uint8"),
        (STILL[:, :10], STILL[0, :10], 8, "needs 11 pixels"),
        (STILL, STILL[0], 0, "fps > 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure(frames, image, fps, constant(0, 0))
