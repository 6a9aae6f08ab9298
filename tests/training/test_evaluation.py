"""Validation's numbers against sums by hand: by timestep bucket, in the moving region, and by how much the clips move."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.config import MeshConfig
from motif_jax.dist.mesh import make_mesh
from motif_jax.losses import RegionLosses
from motif_jax.training.evaluation import timesteps, validate

CLIPS, BUCKETS = 4, 2


@pytest.fixture(scope="module")
def run(tiny):
    """Twelve shuffled clips that move 0 to 11 times 250 pixels. The loss is that number, 100 more in the second bucket, three times where
    they move."""
    config = tiny(batch_size=CLIPS, eval={"buckets": BUCKETS})
    motion = np.random.default_rng(0).permutation(12)
    seen = []

    def eval_step(params, frozen, batch, t_B, key):
        seen.append((np.asarray(t_B), tuple(np.asarray(jax.random.key_data(key)).tolist())))
        speed = batch["flow"].astype(jnp.float32)[:, 0, 0, 0].sum(-1) / 250
        loss = speed + (100 if t_B[0] >= 500 else 0)
        return RegionLosses(loss, 3 * loss, speed)

    def flow(n):
        """Even numbers to the right, odd ones down; squares of these pixels are beyond float16, in which flow is stored."""
        return np.full((4, 2, 2, 2), [250 * n, 0] if n % 2 == 0 else [0, 250 * n], np.float16)

    batches = [{"flow": np.stack([flow(n) for n in part])} for part in motion.reshape(3, CLIPS)]

    def run(seed, batches=batches, distinct=None):
        seen.clear()
        return validate(eval_step, {}, {}, batches, dataclasses.replace(config, seed=seed), make_mesh(MeshConfig()), distinct), list(seen)

    return run


@pytest.fixture(scope="module")
def found(run):
    return run(0)


def test_overall_and_by_timestep(found):
    result, _ = found
    assert result["eval/loss"] == pytest.approx(5.5 + 50)
    assert result["eval/loss_t0"] == pytest.approx(5.5) and result["eval/loss_t1"] == pytest.approx(105.5)


def test_the_moving_region_weighs_by_its_size(found):
    result, _ = found
    speeds = np.arange(12.0)
    moving = [(3 * (speeds + more) * speeds).sum() / speeds.sum() for more in (0, 100)]
    assert [result["eval/loss_moving_t0"], result["eval/loss_moving_t1"]] == pytest.approx(moving)
    assert result["eval/ratio_t1"] == pytest.approx(moving[1] / 105.5)


def test_deciles_go_from_still_to_fast(found):
    result, _ = found
    expected = [part.mean() + 50 for part in np.array_split(np.arange(12.0), 10)]
    assert [result[f"eval/loss_motion_d{i}"] for i in range(10)] == pytest.approx(expected)


def test_repeated_clips_make_no_deciles(run):
    """Of nine clips in three batches of four; ten are enough."""
    for distinct, count in ((9, 0), (10, 10)):
        result, _ = run(0, distinct=distinct)
        assert sum("motion_d" in name for name in result) == count


def test_timesteps_cover_their_bucket(found, tiny):
    _, seen = found
    assert len(seen) == 3 * BUCKETS
    np.testing.assert_array_equal(seen[0][0], [62, 187, 312, 437])
    np.testing.assert_array_equal(seen[1][0], [812, 937, 562, 687])  # who had little noise has much
    everything = np.concatenate([timesteps(tiny(eval={"buckets": 4}), bucket, 250) for bucket in range(4)])
    np.testing.assert_array_equal(np.sort(everything), np.arange(1000))


def test_noise_is_the_same_at_every_validation_and_differs_elsewhere(found, run):
    """Between batches, buckets and seeds no key serves twice."""
    (_, first), (_, again), (_, other) = found, run(0), run(1)
    keys = [key for _, key in first]
    assert keys == [key for _, key in again]
    assert len({*keys, *(key for _, key in other)}) == 2 * 3 * BUCKETS


def test_what_few_still_clips_do_not_say_is_missing(run):
    result, _ = run(0, [{"flow": np.zeros((CLIPS, 4, 2, 2, 2), np.float16)}])
    assert result == {"eval/loss": 50.0, "eval/loss_t0": 0.0, "eval/loss_t1": 100.0}
