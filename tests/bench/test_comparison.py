"""Preferences and intervals of an ablation against clips and distributions whose answer is known."""

import numpy as np
import pytest
from scipy import stats

from motif_jax.bench import comparison

GOOD = {"path_error": 0.01, "presence": 1.0, "background_psnr": 30.0, "area_ratio": 1.0}


def clips(**changed):
    """Measures of one seed and one clip, good unless changed."""
    return {name: np.array([[value]]) for name, value in (GOOD | changed).items()}


@pytest.mark.parametrize(
    ("b", "motion", "strict"),
    [
        (GOOD, 0.5, 0.5),
        ({"path_error": 0.02}, 0.5, 0.5),  # within the margin of 1/64
        ({"path_error": 0.03}, 1.0, 1.0),
        ({"path_error": 0.0, "presence": 0.5}, 1.0, 1.0),  # lost half way
        ({"path_error": 0.03, "background_psnr": 33.5}, 1.0, 0.5),  # a's background is 3.5 dB worse
        ({"path_error": 0.03, "background_psnr": 32.5}, 1.0, 1.0),
        ({"path_error": 0.03, "area_ratio": 2.5}, 1.0, 1.0),  # the ghost is the loser's
    ],
)
def test_preference(b, motion, strict):
    a, b = clips(), clips(**b)
    assert comparison.prefer(a, b)[0, 0] == motion and comparison.prefer(b, a)[0, 0] == 1 - motion
    assert comparison.prefer(a, b, strict=True)[0, 0] == strict and comparison.prefer(b, a, strict=True)[0, 0] == 1 - strict


def test_a_ghost_voids_a_win_unless_both_have_one():
    ghost, other = clips(area_ratio=2.5), clips(path_error=0.1)
    assert comparison.prefer(ghost, other)[0, 0] == 1.0
    assert comparison.prefer(ghost, other, strict=True)[0, 0] == 0.5
    assert comparison.prefer(ghost, clips(path_error=0.1, area_ratio=0.2), strict=True)[0, 0] == 1.0


def test_interval_of_one_seed_is_the_bootstrap_of_scipy():
    x = np.random.default_rng(0).normal(3, 2, (1, 80))
    want = stats.bootstrap((x[0],), np.mean, n_resamples=8000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    got = comparison.estimate(x)
    assert got["mean"] == pytest.approx(x.mean()) and got["clips"] == 80
    # Two sets of draws: a quantile of some 4,000 means scatters by a few hundredths of their width, here 0.9.
    np.testing.assert_allclose((got["low"], got["high"]), (want.low, want.high), atol=0.06)


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (3, 200))
    alike, apart = comparison.estimate(noise), comparison.estimate(noise + np.array([[-1.0], [0.0], [1.0]]))
    assert apart["high"] - apart["low"] > 3 * (alike["high"] - alike["low"])
    assert apart["seeds"] == pytest.approx([noise[0].mean() - 1, noise[1].mean(), noise[2].mean() + 1])


@pytest.mark.parametrize(("seeds", "deviation", "coverage"), [(2, 0.1, 0.87), (2, 0.15, 0.79), (3, 0.1, 0.90), (3, 0.15, 0.86)])
def test_intervals_of_two_or_three_seeds_are_too_narrow(seeds, deviation, coverage):
    """Differences (-1, 0, 1) of 90 clips whose chances differ by clip, and by seed with this standard deviation: the interval holds
    the true mean in so many of 400 runs. Three standard errors of a share of 400: 0.06 at most."""
    held = 0
    for run in range(400):
        rng = np.random.default_rng(run)
        chance = np.clip(0.4 + rng.normal(0, deviation, (seeds, 1)) + rng.normal(0, 0.25, 90), -0.98, 0.98)
        x = (rng.random((seeds, 90)) < np.abs(chance)) * np.sign(chance)
        got = comparison.estimate(x, draws=500)
        held += got["low"] <= 0.4 <= got["high"]
    assert held / 400 == pytest.approx(coverage, abs=0.06)


def test_missing_values_and_chosen_clips():
    x = np.array([[1.0, np.nan, 3.0, 1.0, 3.0, 2.0, 100.0]])
    got = comparison.estimate(x, np.arange(7) < 6)
    assert got["mean"] == 2.0 and got["clips"] == 6 and 1.0 <= got["low"] < got["high"] <= 3.0
    got = comparison.estimate(x, np.arange(7) < 5)  # four known values
    assert got["mean"] == 2.0 and got["clips"] == 5 and got["low"] is got["high"] is None
    assert comparison.estimate(np.full((2, 3), np.nan))["mean"] is None


def test_none_of_many_clips_is_not_none_of_all():
    """Two seeds do not double the clips: Wilson's interval of 0 of 90, and of 90 of 90, from scipy."""
    for value in (0, 1):
        want = stats.binomtest(90 * value, 90).proportion_ci(0.95, method="wilson")
        got = comparison.estimate(np.full((2, 90), value), bounds=comparison.RATE)
        np.testing.assert_allclose((got["low"], got["high"]), (want.low, want.high), atol=1e-12)
