"""Statistics of votes against other people's implementations, and the coverage of intervals by simulation."""

import numpy as np
import pytest
from scipy import stats

from motif_jax.bench import preference
from motif_jax.bench.preference import wilson


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_wilson_and_binomial_equal_statsmodels():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for k, n in ((0, 10), (3, 10), (10, 10), (193, 320), (1, 1), (700, 1600)):
        np.testing.assert_allclose(wilson(k, n), proportion.proportion_confint(k, n, method="wilson"), atol=1e-12)
        np.testing.assert_allclose(preference.binomial_p(k, n), proportion.binom_test(k, n), rtol=1e-9)
    assert preference.binomial_p(0, 0) == 1


def test_wilson_against_scipy():
    for k, n in ((0, 10), (3, 10), (10, 10), (193, 320), (1, 1)):
        want = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(wilson(k, n), (want.low, want.high), atol=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 successes in 4 trials"):
        wilson(5, 4)


def test_sign_flips_equal_scipy_and_the_binomial_test(rng):
    """scipy flips the signs of the images' sums, which it is given; clusters of one pair leave the binomial test of those not even."""
    for images, pairs in ((3, 9), (7, 12), (11, 40)):
        leads, clusters = rng.choice([-1, 0, 1], pairs, p=[0.2, 0.2, 0.6]), rng.integers(0, images, pairs)
        sums = np.array([leads[clusters == i].sum() for i in range(images)])
        want = stats.permutation_test((sums,), lambda x, axis: x.sum(axis), permutation_type="samples", n_resamples=np.inf).pvalue
        assert preference.sign_flip_p(leads, clusters) == pytest.approx(want, rel=1e-9)
    leads = rng.choice([-1, 0, 1], 320, p=[0.3, 0.1, 0.6])
    want = stats.binomtest(int((leads == 1).sum()), int((leads != 0).sum())).pvalue
    assert preference.sign_flip_p(leads, range(320)) == pytest.approx(want, rel=1e-9)
    assert preference.sign_flip_p([1] * 20, [f"image{n % 5}" for n in range(20)]) == 2 / 2**5
    assert preference.sign_flip_p([0, 0], ["a", "b"]) == 1


def test_holm_equals_statsmodels(rng):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    for size in (1, 2, 9):
        p = rng.random(size) ** 3
        np.testing.assert_allclose(preference.holm(p), multitest.multipletests(p, method="holm")[1], rtol=1e-12)


@pytest.mark.parametrize("categories", [2, 3])
def test_kappa_equals_statsmodels(rng, categories):
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater")
    for raters in (2, 3, 5):
        counts = rng.multinomial(raters, rng.dirichlet(np.ones(categories)), size=40)
        np.testing.assert_allclose(preference.fleiss_kappa(counts), inter_rater.fleiss_kappa(counts), rtol=1e-9)
    with pytest.raises(ValueError, match="same number"):
        preference.fleiss_kappa(np.array([[2, 1], [1, 1]]))


@pytest.mark.parametrize("categories", [2, 3])
def test_alpha_equals_krippendorff_with_missing_votes(rng, categories):
    krippendorff = pytest.importorskip("krippendorff")
    for _ in range(5):
        table = rng.integers(0, categories, size=(6, 40)).astype(float)
        table[rng.random(table.shape) < 0.4] = np.nan
        counts = np.stack([(table == c).sum(0) for c in range(categories)], 1)
        expected = krippendorff.alpha(reliability_data=table, level_of_measurement="nominal")
        np.testing.assert_allclose(preference.krippendorff_alpha(counts), expected, atol=1e-12)


def test_agreement_of_identical_and_of_single_votes():
    assert preference.krippendorff_alpha(np.array([[5, 0], [0, 5]])) == preference.fleiss_kappa(np.array([[5, 0], [0, 5]])) == 1
    assert np.isnan(preference.krippendorff_alpha(np.array([[1, 0], [0, 1]])))  # nobody to agree with
    assert np.isnan(preference.krippendorff_alpha(np.array([[5, 0], [5, 0]])))  # nothing to disagree on


@pytest.mark.parametrize(("pairs", "wins"), [(26, 19), (51, 33), (100, 61), (160, 93), (320, 179)])
def test_smallest_significant_count_and_the_rate_it_detects(pairs, wins):
    """Counts from scipy's test itself; the power at the returned rate from scipy's distribution."""
    assert preference.smallest_significant(pairs) == wins
    assert stats.binomtest(wins, pairs).pvalue <= 0.05 < stats.binomtest(wins - 1, pairs).pvalue
    rate = preference.minimum_detectable(pairs)
    assert stats.binom.sf(wins - 1, pairs, rate) == pytest.approx(0.8, abs=1e-6)
    assert preference.minimum_detectable(5) is None  # five of five: p = 0.0625


def test_bradley_terry_equals_a_logistic_regression(rng):
    api = pytest.importorskip("statsmodels.api")
    true = np.array([1.0, 0.3, 0.0, -1.3])
    wins = np.zeros((4, 4))
    for i in range(4):
        for j in range(i + 1, 4):
            wins[i, j] = rng.binomial(80, 1 / (1 + np.exp(true[j] - true[i])))
            wins[j, i] = 80 - wins[i, j]
    wins[0, 3], wins[3, 0] = 0, 0  # they never meet
    i, j = np.nonzero(np.triu(wins + wins.T))
    design = np.zeros((len(i), 4))
    design[np.arange(len(i)), i], design[np.arange(len(i)), j] = 1, -1
    outcome = np.stack([wins[i, j], wins[j, i]], 1) + 0.5
    fitted = np.append(api.GLM(outcome, design[:, :3], family=api.families.Binomial()).fit().params, 0.0)
    np.testing.assert_allclose(preference.bradley_terry(wins), fitted - fitted.mean(), atol=1e-6)
    # A batch gives what its parts give.
    np.testing.assert_allclose(preference.bradley_terry(np.stack([wins, wins.T]))[1], preference.bradley_terry(wins.T), atol=1e-8)


def test_bradley_terry_of_a_chain():
    """Of models that meet their neighbours alone, each rate is that of its pair: the difference is its logit, 7 of them end to end."""
    wins = np.diag(np.full(7, 20.0), 1)
    np.testing.assert_allclose(np.diff(preference.bradley_terry(wins)), -np.log(20.5 / 0.5), rtol=1e-9)


def test_a_system_that_never_loses_has_a_finite_strength():
    assert np.isfinite(preference.bradley_terry(np.array([[0.0, 9.0], [0.0, 0.0]]))).all()


def clustered_verdicts(rng, clusters, size, rate, correlation):
    """Verdicts of pairs whose images have win rates of their own: a beta-binomial with this correlation within an image."""
    concentration = 1 / correlation - 1
    rates = rng.beta(rate * concentration, (1 - rate) * concentration, clusters)
    return (rng.random((clusters, size)) < rates[:, None]).astype(float).reshape(-1), np.repeat(np.arange(clusters), size)


def test_intervals_cover_the_truth():
    """600 studies like the paper's: 80 images with 4 pairs each, alike within an image. The bootstrap over images covers the true rate in
    about 95 % of them, Wilson's interval, which takes pairs for independent, in fewer; without correlation Wilson's does too.
    Standard error of a coverage of 0.95 over 600 studies: 0.009; the percentile bootstrap with 80 clusters is known to be about 0.01
    too narrow. Tolerance: three standard errors, and that.
    """
    studies, rate = 600, 0.62
    hits = {"bootstrap": 0, "wilson": 0, "wilson_independent": 0}
    rng = np.random.default_rng(1)
    weights = preference.cluster_weights(np.repeat(np.arange(80), 4), 500, seed=3)
    for _ in range(studies):
        verdicts, _clusters = clustered_verdicts(rng, 80, 4, rate, 0.3)
        _, low, high = preference.share_interval(verdicts, np.ones(320), weights, 80)
        hits["bootstrap"] += low <= rate <= high
        low, high = wilson(verdicts.sum(), 320)
        hits["wilson"] += low <= rate <= high
        low, high = wilson(rng.binomial(320, rate), 320)
        hits["wilson_independent"] += low <= rate <= high
    coverage = {name: count / studies for name, count in hits.items()}
    assert 0.95 - 0.027 - 0.01 <= coverage["bootstrap"] <= 0.95 + 0.027
    assert abs(coverage["wilson_independent"] - 0.95) <= 0.027
    assert coverage["wilson"] < 0.90  # design effect 1 + 3 * 0.3: 1.96 / sqrt(1.9) standard errors, 84.5 %


@pytest.mark.parametrize(("value", "bounds"), [(0.0, (0, 1)), (1.0, (0, 1)), (0.5, (0, 1)), (0.0, (-1, 1))])
def test_values_that_are_all_alike_leave_room_for_what_was_not_seen(value, bounds):
    """90 of them: Wilson's interval for a rate; for others, as many at a bound as scipy's Wilson interval for 0 of 90 allows."""
    unseen = stats.binomtest(0, 90).proportion_ci(0.95, method="wilson").high
    weights = preference.cluster_weights(range(90), 100, seed=0)
    low, high = preference.share_interval(np.full(90, value), np.ones(90), weights, 90, bounds)[1:]
    np.testing.assert_allclose((low, high), (value - unseen * (value - bounds[0]), value + unseen * (bounds[1] - value)), atol=1e-12)
    if value in (0, 1) and bounds == (0, 1):
        np.testing.assert_allclose((low, high), wilson(90 * value, 90), atol=1e-12)
    assert preference.share_interval(np.full(90, value), np.ones(90), weights, 90, None)[1:] == (value, value)


def test_an_interval_over_images_and_people_speaks_of_other_people():
    """200 studies of 80 images with 4 pairs each, 5 votes a pair of ten people who lean to a system with a standard deviation of 0.6 logit,
    and no preference. The interval over images holds one half in every second study, the crossed one in nine of ten: ten people are
    few. Standard errors: 0.035 and 0.02; tolerances are three of them."""
    rng = np.random.default_rng(3)
    image, person = np.repeat(np.arange(80), 20), np.concatenate([rng.permutation(10)[:5] for _ in range(320)])
    weights = [w.astype(float) for w in (preference.cluster_weights(image, 400, 0), preference.crossed_weights(image, person, 400, 0))]
    hits = np.zeros(2)
    for _ in range(200):
        logit = np.repeat(rng.normal(0, 0.8, 320), 5) + rng.normal(0, 0.6, 10)[person]
        votes = (rng.random(1600) < 1 / (1 + np.exp(-logit))).astype(float)
        for n, (drawn, clusters) in enumerate(zip(weights, (80, 10), strict=True)):
            _, low, high = preference.share_interval(votes, np.ones(1600), drawn, clusters)
            hits[n] += low <= 0.5 <= high
    assert abs(hits[0] / 200 - 0.5) <= 0.105 and abs(hits[1] / 200 - 0.92) <= 0.06


def test_p_of_pairs_that_share_images():
    """600 studies of 80 images with 4 pairs each, alike within an image, and no preference: 5 % have p below 0.05, within three standard
    errors of 0.009 and not counting that exact tests stay below; the binomial test has more than twice as many."""
    rng, found = np.random.default_rng(2), {"flips": 0, "binomial": 0}
    for _ in range(600):
        verdicts, clusters = clustered_verdicts(rng, 80, 4, 0.5, 0.3)
        found["flips"] += preference.sign_flip_p(2 * verdicts - 1, clusters) <= 0.05
        found["binomial"] += preference.binomial_p(int(verdicts.sum()), 320) <= 0.05
    assert found["flips"] / 600 <= 0.05 + 0.027 and found["binomial"] / 600 > 0.1


def test_the_design_effect_is_that_of_the_clusters(rng):
    """1 + (size - 1) * correlation; mean over 40 studies, whose values scatter by some 0.2 each."""
    weights = preference.cluster_weights(np.repeat(np.arange(80), 4), 500, seed=3)
    found = [preference.design_effect(clustered_verdicts(rng, 80, 4, 0.5, 0.3)[0], weights) for _ in range(40)]
    assert np.mean(found) == pytest.approx(1.9, abs=0.15)


def test_the_bootstrap_draws_whole_clusters(rng):
    clusters = ["a", "b", "a", "c", "b", "a"]
    weights = preference.cluster_weights(clusters, 200, seed=0)
    for name in "abc":
        columns = weights[:, [c == name for c in clusters]]
        assert (columns == columns[:, :1]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()  # one column of each: as many clusters as there are
