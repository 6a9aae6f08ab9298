"""The synthetic world against what its docstrings promise."""

import numpy as np
import pytest
from scipy import ndimage

from motif_jax.data import sprites
from motif_jax.data.sprites import DIRECTIONS, SHAPES, STILL, WORLDS, make_clips

TRUTH = ("positions", "present", "shape", "colour", "direction")


def clips(world="shapes", count=200, size=32, frames=8, split="train", seed=0):
    return make_clips(world, seed, range(count), frames, size, size, split)


@pytest.mark.parametrize("world", WORLDS)
def test_flow_carries_frame_l_to_l_plus_1(world):
    """Frame l+1 sampled where the flow leads equals frame l inside the moving shape, and everywhere off both places."""
    c = clips(world, 40, size=48)
    rows, columns = np.mgrid[:48, :48].astype(float)
    interiors = 0
    for i in range(40):
        for t in range(7):
            u, v = c["flow"][i, t, ..., 0], c["flow"][i, t, ..., 1]
            now, later = c["frames"][i, t].astype(float), c["frames"][i, t + 1].astype(float)
            led = np.stack([ndimage.map_coordinates(later[..., k], [rows + v, columns + u], order=1) for k in range(3)], -1)
            moving = (u != 0) | (v != 0)
            interior = ndimage.binary_erosion(moving, iterations=3)
            interiors += interior.sum()
            # 1 grey level: rounding of both frames.
            assert np.abs(led - now)[interior].max(initial=0) <= 1
            untouched = ~ndimage.binary_dilation(moving, iterations=6)
            assert (now == later)[untouched].all()
        np.testing.assert_array_equal(c["flow"][i, -1], c["flow"][i, -2])
    assert interiors > 1000


@pytest.mark.parametrize("size", [16, 32, 64])
def test_flow_is_the_displacement_of_the_named_object(size):
    c = clips(size=size)
    mask = sprites.masks(c)[:, 0]
    step = np.diff(c["positions"][:, 0], axis=1)
    for t in range(7):
        want = mask[:, t, ..., None] * step[:, t, None, None]
        np.testing.assert_allclose(c["flow"][:, t], want, atol=1e-6)
    total = c["positions"][:, 0, -1] - c["positions"][:, 0, 0]
    # 1e-4: the float32 positions are up to 64.
    np.testing.assert_allclose(total, sprites.UNIT[c["direction"]] * 0.35 * size, atol=1e-4)


def test_about_three_percent_of_the_pixels_move():
    for size in (16, 32, 64):
        c = clips(size=size, count=400)
        moving = (c["flow"] != 0).any(-1)[c["direction"] != STILL]
        # One shape covers 3 % of the frame; whole pixels round this by under a tenth on average.
        assert moving.mean() == pytest.approx(0.03, rel=0.1)
        assert not c["flow"][c["direction"] == STILL].any()


@pytest.mark.parametrize("world", WORLDS)
def test_background_is_static_and_grey_and_new_in_every_clip(world):
    c = clips(world, 20)
    anywhere = ndimage.binary_dilation(sprites.masks(c).any(axis=(1, 2)), np.ones((1, 3, 3)), iterations=2)
    for i in range(20):
        outside = c["frames"][i][:, ~anywhere[i]].astype(int)
        assert (outside == outside[:1]).all()
        assert (np.ptp(outside, axis=-1) == 0).all()
        assert outside.std() > 10
    assert len({f.tobytes() for f in c["frames"][:, 0]}) == 20


def test_bystanders_do_not_move_and_nothing_touches_the_named_path():
    for world in WORLDS:
        for size in (16, 32):
            c = clips(world, 2000, size=size)
            assert (np.diff(c["positions"][:, 1:], axis=2) == 0).all()
            mask = sprites.masks(c).any(axis=2)
            if size == 32:  # at 16 the gap is half a pixel
                near = ndimage.binary_dilation(mask[:, 0], np.ones((1, 3, 3)))
                assert not (near & mask[:, 1:].any(axis=1)).any()
            assert not mask.sum(axis=1).max() > 1
            # Inside the frame, whose pixel centres run from 0 to size - 1: the smallest half extent is that of the square.
            half = 0.886 * sprites.radius(size, size)
            assert c["positions"].min() >= half and c["positions"].max() <= size - 1 - half


def test_shares_of_directions_are_those_specified():
    c = clips("shapes", 20_000, size=16, frames=2)
    share = np.bincount(c["direction"], minlength=5) / 20_000
    # Four standard errors of a share at n = 20000.
    np.testing.assert_allclose(share, [0.225] * 4 + [0.1], atol=4 * np.sqrt(0.225 * 0.775 / 20_000))
    assert set(c["present"].sum(1)) == {1, 2, 3}


@pytest.mark.parametrize("world", WORLDS)
def test_held_out_pairs_are_unseen_in_training_and_every_word_is_seen(world):
    for split in sprites.SPLITS:
        c = clips(world, 4000, size=16, frames=2, split=split)
        shape, colour, direction = c["shape"][:, 0], c["colour"][:, 0], c["direction"]
        never = [("left", "circle"), ("right", "red"), ("up", "square"), ("down", "blue"), ("still", "triangle")]
        unseen = np.array([any(d in s and w in s for d, w in never) for s in c["captions"]])
        np.testing.assert_array_equal(unseen, sprites.held_out(WORLDS[world])[direction, shape, colour])
        assert unseen.all() if split == "heldout" else not unseen.any()
        # Bystanders with the held-out word would teach that it never goes with the direction.
        assert not sprites.held_out(WORLDS[world])[direction[:, None], c["shape"][:, 1:], c["colour"][:, 1:]].any()
        words = {w for s in c["captions"] for w in s.split()}
        assert words == {"the", "moves", "stays", *DIRECTIONS, *SHAPES, *WORLDS[world].colours}
        assert share_of_still(direction) == pytest.approx(0.1, abs=0.02)


def share_of_still(direction):
    return (direction == STILL).mean()


def test_the_sentence_names_one_object():
    c = clips("shapes", 500, size=16, frames=2)
    for i, text in enumerate(c["captions"]):
        here = c["present"][i]
        assert len(set(c["colour"][i][here])) == here.sum()
        words = text.split()
        assert words[1] == WORLDS["shapes"].colours[c["colour"][i, 0]]
        assert words[2] == SHAPES[c["shape"][i, 0]]
        assert words[4] == DIRECTIONS[c["direction"][i]]


def test_colour_of_the_named_object_at_its_place():
    c = clips("shapes", 100)
    for i in range(100):
        for t in range(8):
            x, y = np.rint(c["positions"][i, 0, t]).astype(int)
            assert tuple(c["frames"][i, t, y, x]) == sprites.COLOURS[WORLDS["shapes"].colours[c["colour"][i, 0]]]


def test_a_clip_depends_on_its_index_alone():
    whole = clips(count=32)
    for part in ([5], [31, 5, 0], range(16, 32)):
        some = make_clips("shapes", 0, part, 8, 32, 32, "train")
        for key in ("frames", "flow", *TRUTH):
            np.testing.assert_array_equal(some[key], whole[key][list(part)], err_msg=key)
        assert some["captions"] == [whole["captions"][i] for i in part]


def test_seed_split_and_world_change_the_clips():
    base = clips("shapes", 8)["frames"]
    for other in (clips("shapes", 8, seed=1), clips("shapes", 8, split="validation"), clips("quickstart", 8)):
        assert (other["frames"] != base).any(axis=(1, 2, 3, 4)).all()


def test_a_pinned_clip():
    """The world must not drift between releases: runs and published numbers refer to it.

    A failure here means that clips changed. If that was meant, write the new values down and say so in the change log.
    """
    c = make_clips("shapes", 7, [123_456], 8, 32, 32, "validation")
    assert c["captions"] == ["the cyan triangle moves up"]
    np.testing.assert_allclose(c["positions"][0, 0, [0, -1]], [[8.9653, 17.6890], [8.9653, 6.4890]], atol=1e-4)


def test_other_sizes():
    c = make_clips("shapes", 0, range(6), 16, 80, 128)
    assert c["frames"].shape == (6, 16, 80, 128, 3) and c["frames"].dtype == np.uint8
    assert c["flow"].shape == (6, 16, 80, 128, 2) and c["flow"].dtype == np.float32
    assert sprites.masks(c).shape == (6, 3, 16, 80, 128)
    assert c["fps"] == 8.0


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match=r"unknown world 'moon'; known: shapes, quickstart"):
        make_clips("moon", 0, [0], 8, 32, 32)
    with pytest.raises(ValueError, match="unknown split 'test'; known: train"):
        make_clips("shapes", 0, [0], 8, 32, 32, "test")
    with pytest.raises(ValueError, match="must not be negative"):
        make_clips("shapes", 0, [-1], 8, 32, 32)
    with pytest.raises(ValueError, match="at least 2 frames of 16x16"):
        make_clips("shapes", 0, [0], 8, 8, 32)
    with pytest.raises(ValueError, match="less elongated"):
        make_clips("shapes", 0, range(64), 8, 16, 256)
