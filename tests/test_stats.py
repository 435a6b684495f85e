"""Statistics against scipy, closed forms, and simulations with known truth."""

import time
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats as sps

from analysis import stats
from analysis.stats import (
    DIFFERENCE,
    Bootstrap,
    best_of_ranks,
    choose_rank,
    chosen_on_validation,
    mean_at,
    paired,
)

RANKS = [1, 2, 4, 8, 16, 32, 64]
QUICK = Bootstrap(resamples=1000)


def frame(values: np.ndarray) -> pd.DataFrame:
    """(items, ranks) -> a frame as `records.items` gives it."""
    return pd.DataFrame(values, columns=RANKS[: values.shape[1]], index=hashes(len(values)))


@cache
def hashes(n):
    return pd.Index([f"h{i}" for i in range(n)])


def outcomes(rng, truth, n, alike=0.5):
    """Right or wrong for n items at ranks of true accuracy `truth`; `alike` = latent correlation of ranks."""
    shared, own = rng.standard_normal((n, 1)), rng.standard_normal((n, len(truth)))
    return frame((np.sqrt(alike) * shared + np.sqrt(1 - alike) * own < sps.norm.ppf(truth)).astype(float))


def coverage(simulate, truth_and_estimate, times):
    hits = [e.low <= t <= e.high for t, e in (truth_and_estimate(simulate()) for _ in range(times))]
    return np.mean(hits)


# Against scipy


@pytest.mark.parametrize("name, method", [("percentile", "percentile"), ("bca", "BCa")])
def test_interval_is_scipys_on_the_same_resamples(name, method):
    skewed = np.random.default_rng(0).exponential(0.1, size=80).clip(0, 1)
    means = stats._resample(skewed[None, :, None], QUICK)[1][:, 0]
    ours = mean_at([frame(skewed[:, None])], 1, QUICK, method=name)
    scipys = sps.bootstrap(
        (skewed,), np.mean, method=method, n_resamples=0,
        bootstrap_result=SimpleNamespace(bootstrap_distribution=means),
    ).confidence_interval  # fmt: skip
    assert (ours.low, ours.high) == pytest.approx((scipys.low, scipys.high), rel=1e-9)


def test_interval_agrees_with_scipys_own_resamples():
    values = outcomes(np.random.default_rng(1), [0.3], 250)
    ours = mean_at([values], 1, Bootstrap(resamples=20_000))
    scipys = sps.bootstrap(
        (values[1].to_numpy(),), np.mean, method="percentile", n_resamples=20_000, batch=500, rng=2
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((scipys.low, scipys.high), abs=0.0041)  # one item of 250


def test_resampled_ranks_keep_their_covariance():
    values = outcomes(np.random.default_rng(2), [0.3, 0.5, 0.4], 200)
    means = stats._resample(values.to_numpy()[None], Bootstrap(resamples=50_000))[1]
    assert np.cov(means.T) == pytest.approx(np.cov(values.to_numpy().T, ddof=0) / 200, rel=0.05)


@pytest.mark.parametrize("outcome, right", [(0.0, 0), (1.0, 40)])
def test_items_that_all_agree_get_the_exact_interval(outcome, right):
    ours = mean_at([frame(np.full((40, 1), outcome))], 1)
    exact = sps.binomtest(right, 40).proportion_ci(method="exact")
    assert (ours.low, ours.high) == pytest.approx((exact.low, exact.high))


def test_no_difference_on_any_item_is_not_certainty():
    same = frame(np.ones((40, 1)))
    difference = mean_at([paired(same, same, 1)], 1, support=DIFFERENCE)
    assert difference.value == 0 and -0.09 < difference.low < -0.08 and 0.08 < difference.high < 0.09


def test_seeds_without_item_noise_give_the_t_interval():
    seeds = [0.30, 0.42, 0.36, 0.40]
    ours = mean_at([frame(np.full((50, 1), score)) for score in seeds], 1, Bootstrap(resamples=200_000))
    low, high = sps.t.interval(0.95, 3, loc=np.mean(seeds), scale=sps.sem(seeds))
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.001)


# Coverage: the share of intervals that hold the truth, nominally 95%


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_coverage_of_a_mean(method):
    rng = np.random.default_rng(3)
    share = coverage(lambda: outcomes(rng, [0.3], 200), lambda f: (0.3, mean_at([f], 1, QUICK, method=method)), 2000)
    assert share == pytest.approx(0.95, abs=0.02)


def test_coverage_of_a_paired_difference_and_what_pairing_gains():
    rng, widths = np.random.default_rng(4), []

    def estimate(both):
        left, right = both[[1]], both[[2]].rename(columns={2: 1})
        difference = mean_at([paired(left, right, 1)], 1, QUICK, support=DIFFERENCE)
        unpaired = 2 * 1.96 * np.sqrt(left[1].var() / 400 + right[1].var() / 400)
        widths.append((difference.high - difference.low) / unpaired)
        return -0.1, difference

    share = coverage(lambda: outcomes(rng, [0.4, 0.5], 400, alike=0.8), estimate, 2500)
    assert share == pytest.approx(0.95, abs=0.02)
    assert np.mean(widths) < 0.75


@pytest.mark.parametrize(
    "truth",
    [[0.4] * 7, [0.38, 0.39, 0.4, 0.4, 0.39, 0.39, 0.38], [0.2, 0.25, 0.3, 0.45, 0.35, 0.3, 0.2]],
    ids=["tied", "near", "clear"],
)
def test_coverage_of_the_best_rank(truth):
    """For the true score of the rank chosen. At most 2 points under nominal, and not far over."""
    rng, how = np.random.default_rng(5), Bootstrap(resamples=400)
    low, high, bias, flattery, plain_hits = [], [], [], [], []
    for _ in range(500):
        values = outcomes(rng, truth, 300, alike=0.2)
        best = best_of_ranks([values], how)
        plain = mean_at([values], best.rank, how)
        true = truth[RANKS.index(best.rank)]
        low.append(true < best.low)
        high.append(true > best.high)
        plain_hits.append(plain.low <= true <= plain.high)
        bias.append(best.bias)
        flattery.append(best.value - true)
    assert 0.93 <= 1 - np.mean(low) - np.mean(high) <= 0.98
    if truth[0] == 0.4:  # tied: the plain interval fails, and the bias seen is most of the real one
        assert np.mean(plain_hits) < 0.9
        assert 0.6 < np.mean(bias) / np.mean(flattery) < 1
    if truth[3] == 0.45:  # a clear winner is not flattered
        assert abs(np.mean(bias)) < 0.003


@pytest.mark.parametrize("spread, most", [(0.0, 0.995), (0.2, 0.98)])
def test_coverage_over_seeds_errs_to_the_wide_side(spread, most):
    """Three seeds and the items new in every repetition; `spread` of the seeds on the latent scale."""
    rng = np.random.default_rng(6)
    true = sps.norm.cdf(sps.norm.ppf(0.4) / np.sqrt(1 + spread**2))

    def simulate():
        item, frames = rng.standard_normal(300), []
        for _ in range(3):
            latent = np.sqrt(0.7) * item + np.sqrt(0.3) * rng.standard_normal(300) + spread * rng.standard_normal()
            frames.append(frame((latent < sps.norm.ppf(0.4)).astype(float)[:, None]))
        return frames

    share = coverage(simulate, lambda frames: (true, mean_at(frames, 1, QUICK)), 500)
    assert 0.94 <= share <= most


# Choosing a rank


def test_ties_go_to_the_smaller_rank():
    values = frame(np.array([[0, 1, 1], [0, 1, 1], [1, 0, 0]], float))
    assert choose_rank([values]) == 2 == best_of_ranks([values], QUICK).rank
    assert choose_rank([values[[4, 2, 1]]]) == 2  # whatever the order of the columns
    fifths = frame(np.array([[0.3, 0.1], [0.2, 0.2], [0.1, 0.3]]))
    assert fifths[2].to_numpy().mean() > fifths[1].to_numpy().mean()  # equal but for the last bit
    assert choose_rank([fifths]) == 1


def test_lower_is_better_mirrors_higher_is_better():
    values = outcomes(np.random.default_rng(7), [0.4, 0.5, 0.45], 200)
    up = best_of_ranks([values], QUICK)
    down = best_of_ranks([-values], QUICK, higher_is_better=False, support=(-1, 0))
    assert (down.rank, down.value) == (up.rank, pytest.approx(-up.value))
    assert (down.low, down.high, down.bias) == pytest.approx((-up.high, -up.low, -up.bias), abs=0.01)
    assert choose_rank([values], higher_is_better=False) == 1


def test_validation_choice_reports_the_test_score_of_that_rank():
    rng = np.random.default_rng(8)
    test, validation = outcomes(rng, [0.3, 0.4, 0.5], 100), outcomes(rng, [0.3, 0.5, 0.4], 100)
    chosen = chosen_on_validation([validation], [test], QUICK)
    best = best_of_ranks([test], QUICK)
    assert (chosen.rank, best.rank) == (2, 4)
    assert chosen.value == test[2].mean() and chosen.n == 100
    assert chosen.optimism == pytest.approx(test[4].mean() - test[2].mean()) and chosen.optimism > 0
    same = mean_at([test], 2, QUICK)
    assert (chosen.low, chosen.high) == (same.low, same.high)


def test_the_best_difference_allows_for_the_choice():
    """Seven equal ranks against an eighth as good: the best looks better, the interval still holds zero."""
    rng = np.random.default_rng(9)
    values = outcomes(rng, [0.4] * 7, 300, alike=0.2)
    other = frame((rng.uniform(size=(300, 1)) < 0.4).astype(float))
    best = best_of_ranks([paired(values, other, 1)], QUICK, support=DIFFERENCE)
    plain = mean_at([paired(values, other, 1)], best.rank, QUICK, support=DIFFERENCE)
    assert best.rank == choose_rank([values])
    assert best.value == pytest.approx(values[best.rank].mean() - other[1].mean())
    assert best.low < plain.low and best.high == plain.high


# Same seed, same interval


def test_the_same_seed_gives_the_same_interval_whatever_came_before():
    values = outcomes(np.random.default_rng(10), [0.4, 0.5, 0.45], 200)
    first = best_of_ranks([values], QUICK)
    mean_at([values], 2, QUICK)
    assert best_of_ranks([values], QUICK) == first
    assert best_of_ranks([values.sample(frac=1, random_state=0)], QUICK) == first  # nor the order of items
    assert best_of_ranks([values], Bootstrap(resamples=1000, seed=1)) != first


def test_chunks_do_not_change_the_interval(monkeypatch):
    values = outcomes(np.random.default_rng(11), [0.4] * 7, 100)
    whole = best_of_ranks([values], QUICK)
    monkeypatch.setattr(stats, "CHUNK", 1000)
    assert best_of_ranks([values], QUICK) == whole


# Refusals


def test_a_paired_difference_refuses_other_items():
    left = frame(np.ones((5, 1)))
    right = left.rename(index={"h4": "h5"})
    with pytest.raises(ValueError, match=r"not the same items: 1 only on the left, 1 only on the right"):
        paired(left, right, 1)
    with pytest.raises(ValueError, match=r"rank 2 was not scored; there are 1"):
        paired(left, left, 2)


def test_items_are_aligned_by_hash_not_by_place():
    left = frame(np.array([[0.0], [1.0], [1.0]]))
    right = left.iloc[::-1]
    assert (paired(left, right, 1) == 0).all(axis=None)
    assert mean_at([left, right], 1, QUICK) == mean_at([left, left], 1, QUICK)
    with pytest.raises(ValueError, match="different items"):
        mean_at([left, left.rename(index={"h0": "other"})], 1, QUICK)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f: mean_at([], 1), "no items"),
        (lambda f: mean_at([f * 100], 1), "percent taken for fractions"),
        (lambda f: mean_at([f], 3), "rank 3 was not scored; there are 1, 2"),
        (lambda f: mean_at([f, f], 1, method="bca"), "one seed"),
        (lambda f: best_of_ranks([f, f[[1]]]), "different ranks"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(frame(np.array([[0.0, 1.0], [1.0, 1.0]])))


@pytest.mark.parametrize("n, seconds", [(300, 1), (14_042, 5)])
def test_speed(n, seconds):
    values = outcomes(np.random.default_rng(12), [0.4] * 7, n)
    start = time.perf_counter()
    best_of_ranks([values])
    assert time.perf_counter() - start < seconds
