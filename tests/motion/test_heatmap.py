"""The motion heatmap against hand-made flows and a float64 transcription of the paper's equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.motion.heatmap import KINDS, READINGS, heatmap, intensity, resize, sigma

H, W = 320, 512  # the paper's clip size; the diagonal is 603.77 pixels
LATENT = (H // 8, W // 8)
FLOOR = 1 / (1 + np.exp(5.0))  # sigma(0) = 0.0067


def moving_square(speed_px, frames=4):
    """A square of 10 x 10 latent cells that moves by (u, v) = speed_px; all else stands still."""
    flow = np.zeros((1, frames, *LATENT, 2), np.float32)
    flow[:, :, 5:15, 20:30] = speed_px
    return flow


def transcription(flow, reading):
    """x for every pixel in plain float64 loops over clips and frames."""
    u, v = flow[..., 0].astype(np.float64), flow[..., 1].astype(np.float64)
    x = np.zeros(u.shape)
    for b in range(u.shape[0]):
        length = np.sqrt(u[b] ** 2 + v[b] ** 2)
        for t in range(u.shape[1]):
            x[b, t] = {
                "diagonal": length[t] / np.sqrt(H**2 + W**2),
                "size": np.sqrt((u[b, t] / W) ** 2 + (v[b, t] / H) ** 2),
                "clip_max": length[t] / length.max(),
                "frame_max": length[t] / length[t].max(),
            }[reading]
    return x


def default(kind="flow", flow=None, mask=None, latents=None, latent_hw=LATENT, reading="diagonal"):
    return np.asarray(heatmap(kind, flow, mask, latents, H, W, latent_hw, reading, 100.0, 0.05))


@pytest.mark.parametrize(
    ("reading", "speed"),
    [
        ("diagonal", (30.188739, 0.0)),  # 5 % of the diagonal, in any direction
        ("diagonal", (18.113243, 24.150991)),
        ("size", (25.6, 0.0)),  # 5 % of the width
        ("size", (0.0, 16.0)),  # 5 % of the height
    ],
)
def test_half_weight_at_five_per_cent(reading, speed):
    m = default(flow=moving_square(speed), reading=reading)
    square = m[0, :, 5:15, 20:30]
    np.testing.assert_allclose(square, 0.5, atol=1e-5)  # slope 25 per unit of x
    rest = np.delete(m[0].reshape(4, -1), np.flatnonzero(moving_square(1.0)[0, 0, ..., 0]), axis=1)
    np.testing.assert_allclose(rest, FLOOR, rtol=1e-5)
    assert rest.shape == (4, 40 * 64 - 100)


def test_max_readings_do_not_depend_on_the_clip_size():
    flow = moving_square((3.0, 4.0))
    flow[0, 1] *= 2.0
    for reading, wanted in (("clip_max", [0.5, 1.0, 0.5, 0.5]), ("frame_max", [1.0, 1.0, 1.0, 1.0])):
        x = intensity(jnp.asarray(flow), H, W, reading)
        np.testing.assert_allclose(x, intensity(jnp.asarray(flow), 7, 9, reading))
        np.testing.assert_allclose(x[0, :, 10, 25], wanted, rtol=1e-6)
        np.testing.assert_allclose(intensity(jnp.asarray(flow / 64), H, W, reading), x, rtol=1e-6)  # nor on the speed, below a pixel too
        np.testing.assert_array_equal(intensity(jnp.zeros((2, 3, 4, 4, 2)), H, W, reading), 0.0)  # no motion, no 0/0


@pytest.mark.parametrize("reading", ["diagonal", "size", "clip_max", "frame_max"])
def test_transcription(reading):
    rng = np.random.default_rng(0)
    flow = (rng.normal(size=(2, 5, 16, 24, 2)) * 20 * rng.uniform(0.1, 2, size=(2, 5, 1, 1, 1))).astype(np.float16)
    flow[:, -1] = flow[:, -2]
    x = transcription(flow, reading)
    np.testing.assert_allclose(intensity(jnp.asarray(flow), H, W, reading), x, rtol=1e-5)
    m = 1 / (1 + np.exp(100 * (0.05 - x)))
    np.testing.assert_allclose(sigma(x.astype(np.float32)), m, atol=3e-5)  # slope 25 on float32 x up to 1
    m_small = m.reshape(2, 5, 8, 2, 8, 3).mean((3, 5))
    got = jax.jit(heatmap, static_argnums=(0, 2, 3, 4, 5, 6, 7))("flow", flow, None, None, H, W, (8, 8), reading)
    np.testing.assert_allclose(got, m_small, atol=3e-5)
    assert got.dtype == jnp.float32


def test_sigma():
    x = np.array([0.0, 0.025, 0.05, 0.1, 1.0, 1e4])
    np.testing.assert_allclose(sigma(jnp.asarray(x, jnp.float32)), [FLOOR, 0.0758582, 0.5, 0.9933071, 1.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(sigma(jnp.float32(0.3), 10.0, 0.2), 1 / (1 + np.exp(-1.0)), rtol=1e-5)


def test_inverse_is_one_minus_the_heatmap():
    flow = moving_square((40.0, 10.0))
    np.testing.assert_allclose(default("inverse", flow) + default("flow", flow), 1.0, atol=1e-6)
    assert default("inverse", flow)[0, 0, 0, 0] > 0.99


def test_mask_is_scaled_and_resized():
    mask = np.zeros((1, 3, 8, 8), np.uint8)
    mask[0, 1, 2:6, 2:4] = 255
    mask[0, 2, 0, 0] = 51
    m = default("mask", mask=mask, latent_hw=(4, 4))
    wanted = np.zeros((3, 4, 4))
    wanted[1, 1:3, 1] = 1.0
    wanted[2, 0, 0] = 0.2 / 4
    np.testing.assert_allclose(m[0], wanted, atol=1e-7)  # each frame keeps its own mask, the last one too


def test_latent_difference():
    latents = np.random.default_rng(0).normal(size=(2, 4, 6, 8, 4)).astype(np.float32)
    latents[1] *= 10.0
    m = default("latent_difference", latents=latents, latent_hw=(6, 8))
    for b in range(2):
        step = np.sqrt((np.diff(latents[b].astype(np.float64), axis=0) ** 2).mean(-1))
        np.testing.assert_allclose(m[b, :3], step / step.max(), rtol=1e-5)
    np.testing.assert_array_equal(m[:, 3], m[:, 2])
    np.testing.assert_array_equal(default("latent_difference", latents=np.ones((1, 3, 6, 8, 4)), latent_hw=(6, 8)), 0.0)


def test_none_gives_no_weight():
    for source in ({"flow": moving_square(9.0)}, {"mask": np.ones((1, 4, 8, 8), np.uint8)}, {"latents": np.ones((1, 4, 8, 8, 4))}):
        m = default("none", **source)
        assert m.shape == (1, 4, *LATENT)
        np.testing.assert_array_equal(m, 0.0)


@pytest.mark.parametrize("kind", ["flow", "inverse"])
def test_last_frame_repeats_the_map_before(kind):
    """There is no flow out of the last frame: whatever stands there has no influence, under no reading."""
    flow = moving_square((35.0, 0.0))
    flow[:, 2] *= 0.9
    wild = flow.copy()
    wild[:, 3] = 1000.0
    for reading in ("diagonal", "clip_max", "frame_max"):
        m = default(kind, wild, reading=reading)
        np.testing.assert_array_equal(m[:, 3], m[:, 2])
        np.testing.assert_array_equal(m, default(kind, flow, reading=reading))
    assert np.any(default(kind, flow)[:, 2] != default(kind, flow)[:, 1])


def test_resize_averages_areas():
    m = np.random.default_rng(0).uniform(size=(2, 3, 8, 12)).astype(np.float32)
    wanted = [[m[:, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((2, 3)) for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(resize(m, (4, 4)), np.moveaxis(np.array(wanted), (0, 1), (2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(resize(m, (8, 12)), m)


@pytest.mark.parametrize("size", [(5, 7), (16, 24), (4, 24), (3, 12)])
def test_resize_to_other_grids(size):
    """Constants stay, the range is kept, and a ramp stays a ramp at the new cells' centres (away from the border)."""
    assert resize(jnp.full((1, 2, 8, 12), 0.3), size).shape == (1, 2, *size)
    np.testing.assert_allclose(resize(jnp.full((1, 2, 8, 12), 0.3), size), 0.3, rtol=1e-5)
    noise = np.random.default_rng(0).integers(0, 2, size=(1, 1, 8, 12)).astype(np.float32)
    got = resize(noise, size)
    assert got.min() >= 0.0 and got.max() <= 1.0 + 1e-6
    stripes = np.broadcast_to((np.arange(8)[:, None] + np.arange(12)) % 2, (1, 1, 8, 12)).astype(np.float32)
    smaller = size[0] < 8 or size[1] < 12  # without antialiasing some cells would be 0 or 1 still
    assert not smaller or np.abs(resize(stripes, size) - 0.5).max() < 0.3
    ramp = np.broadcast_to(((np.arange(12) + 0.5) / 12).astype(np.float32), (1, 1, 8, 12))
    inner = slice(2, -2)
    centres = (np.arange(size[1]) + 0.5) / size[1]
    # The antialiasing kernel, sampled at uneven offsets, bends a ramp a little; a grid shifted by half a cell would be off by 0.04.
    np.testing.assert_allclose(resize(ramp, size)[0, 0, 0, inner], centres[inner], atol=0.007)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("flow", "needs flow"),
        ("inverse", "needs flow"),
        ("mask", "needs motion_mask"),
        ("latent_difference", "needs latents"),
        ("none", "pass one of them"),
        ("depth", "must be one of"),
    ],
)
def test_refuses_a_missing_input(kind, message):
    assert kind in KINDS or kind == "depth"
    with pytest.raises(ValueError, match=message):
        default(kind)


@pytest.mark.parametrize("reading", READINGS)
def test_flow_that_is_no_number_shows(reading):
    """It must not turn its clip into one without motion."""
    flow = np.ones((1, 3, 4, 4, 2), np.float32)
    flow[0, 0, 1, 2, 0] = np.nan
    assert np.isnan(heatmap("flow", flow, None, None, 32, 32, (4, 4), reading)[0, 0, 1, 2])


def test_refuses_a_single_frame_and_unknown_readings():
    with pytest.raises(ValueError, match="at least 2 frames"):
        default(flow=moving_square(3.0, frames=1))
    with pytest.raises(ValueError, match="'pixels'"):
        default(flow=moving_square(3.0), reading="pixels")
