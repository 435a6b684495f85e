"""Measures of sortedness, tests corrected for many ranks, BLEU by item: against loops, scipy and simulation."""

from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
import sacrebleu
from scipy import stats as sps

from analysis.bleu import corpus_bleu, pseudo_values
from analysis.order import area, change, order
from analysis.stats import DIFFERENCE, REAL, UNIT, Bootstrap, holm, mean_at, p_values

RANKS = [1, 2, 4, 8, 16, 32, 64]
QUICK = Bootstrap(resamples=1000)
SCORE = {"higher_is_better": True, "support": UNIT}


def frame(values: np.ndarray, ranks=RANKS) -> pd.DataFrame:
    return pd.DataFrame(values, columns=ranks[: values.shape[1]], index=[f"h{i}" for i in range(len(values))])


def right_or_wrong(rng, truth, n, alike=0.7):
    shared, own = rng.standard_normal((n, 1)), rng.standard_normal((n, len(truth)))
    return frame((np.sqrt(alike) * shared + np.sqrt(1 - alike) * own < sps.norm.ppf(truth)).astype(float))


# Tests and their correction


def test_p_value_is_the_exact_sign_test_for_right_and_wrong():
    difference = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 29)
    exact = sps.binomtest(9, 11).pvalue
    (ours,) = p_values([frame(difference[:, None])], Bootstrap(resamples=100_000))
    assert ours == pytest.approx(exact, abs=0.003)


def test_p_values_are_scipys_sign_flips_column_by_column():
    rng = np.random.default_rng(0)
    values = rng.normal([0.0, 0.2, 0.4], 1.0, size=(14, 3))
    ours = p_values([frame(values)], Bootstrap(resamples=100_000), support=REAL)
    for k in range(3):
        exact = sps.permutation_test(
            (values[:, k],), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
        ).pvalue
        assert ours[k] == pytest.approx(exact, abs=0.01) or ours[k] > exact  # the bootstrap's tail may be the larger


def test_p_values_hold_their_level_for_a_difference_on_few_items():
    """The percentile interval alone would call three items of forty, all one way, nearly significant."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        items = rng.choice([-1.0, 0.0, 1.0], p=[0.05, 0.9, 0.05], size=40)
        hits += p_values([frame(items[:, None])], QUICK)[0] < 0.05
    assert hits / 1000 <= 0.05 + 0.02


def test_p_values_over_seeds_hold_their_level():
    """Three training runs that differ: their spread is in the p-value, or half would be significant."""
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(400):
        seeds = [frame(rng.normal(rng.normal(0, 0.3), 0.5, size=(40, 1))) for _ in range(3)]
        hits += p_values(seeds, Bootstrap(resamples=400), support=REAL)[0] < 0.05
    assert hits / 400 <= 0.05 + 0.02


def test_holm_rejects_what_the_step_down_procedure_does():
    rng = np.random.default_rng(3)
    for _ in range(200):
        p = rng.uniform(0, 0.1, size=6)
        rejected = np.zeros(6, bool)
        for step, k in enumerate(np.argsort(p)):  # Holm 1979, as written
            if p[k] > 0.05 / (6 - step):
                break
            rejected[k] = True
        assert ((holm(p) <= 0.05) == rejected).all()
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0]


# Measures of a curve


def by_loops(scores):
    """Pairs out of order, best rank, both areas of one curve over RANKS, as one would on paper."""
    worse = sum(scores[j] < scores[i] for i, j in combinations(range(7), 2))
    best = RANKS[max(range(7), key=lambda i: (scores[i], -i))]
    areas = []
    for axis in (RANKS, np.log2(RANKS)):
        total = sum((axis[i + 1] - axis[i]) * (scores[i] + scores[i + 1]) / 2 for i in range(6))
        areas.append(total / (axis[-1] - axis[0]))
    return worse, best, *areas


def test_measures_are_those_of_the_loops():
    rng = np.random.default_rng(4)
    for _ in range(20):
        values = frame(rng.integers(0, 2, size=(30, 7)).astype(float))
        found = order([values], Bootstrap(resamples=50), **SCORE)
        expected = by_loops(values.mean().to_numpy())
        assert (found.out_of_order.value, found.best_rank.value) == expected[:2]
        assert (found.aurac_linear.value, found.aurac_log2.value) == pytest.approx(expected[2:])


def test_area_of_a_flat_and_of_a_straight_curve():
    assert area(np.full((2, 7), 0.3), RANKS) == pytest.approx([0.3, 0.3])
    assert area(np.array(RANKS, float), RANKS) == pytest.approx(32.5)
    assert area(np.arange(7.0), np.log2(RANKS)) == pytest.approx(3.0)


def test_aurac_interval_is_that_of_the_items_own_areas():
    values = right_or_wrong(np.random.default_rng(5), [0.3, 0.4, 0.5, 0.5, 0.5, 0.4, 0.4], 200)
    found = order([values], Bootstrap(resamples=20_000), **SCORE).aurac_log2
    own = frame(area(values.to_numpy(), np.log2(RANKS))[:, None])
    same = mean_at([own], 1, Bootstrap(resamples=20_000))
    assert found.value == pytest.approx(same.value)
    assert (found.low, found.high) == pytest.approx((same.low, same.high), abs=0.003)


def test_lower_is_better_mirrors():
    values = right_or_wrong(np.random.default_rng(6), [0.2, 0.3, 0.5, 0.7, 0.5, 0.3, 0.2], 1500)
    up = order([values], QUICK, **SCORE)
    down = order([1 - values], QUICK, higher_is_better=False, support=UNIT)
    assert (up.out_of_order.value, up.beyond_noise, up.best_rank.value) == (
        down.out_of_order.value,
        down.beyond_noise,
        down.best_rank.value,
    )


def test_pairs_beyond_noise_are_found_and_noise_is_not_taken_for_them():
    rng = np.random.default_rng(7)
    hill = right_or_wrong(rng, [0.2, 0.3, 0.5, 0.7, 0.5, 0.3, 0.2], 1500)
    sure = sum(a > b for a, b in combinations([0.2, 0.3, 0.5, 0.7, 0.5, 0.3, 0.2], 2))
    assert order([hill], QUICK, **SCORE).beyond_noise == sure == 9
    false = [order([right_or_wrong(rng, [0.4] * 7, 150)], QUICK, **SCORE).beyond_noise > 0 for _ in range(80)]
    assert np.mean(false) <= 0.05 + 0.02  # any of 21 pairs, one-sided: Holm keeps it at 2.5%


def test_coverage_of_aurac_and_of_its_change():
    """Nominal 95%, at most 2 points off, for one curve and for the difference of two of the same items."""
    rng, truth, other = np.random.default_rng(8), [0.3, 0.4, 0.5, 0.5, 0.5, 0.4, 0.3], [0.3] * 7
    want = area(np.array(truth), np.log2(RANKS)), area(np.array(truth) - np.array(other), np.log2(RANKS))
    hits = np.zeros((1000, 2))
    how = Bootstrap(resamples=400)
    for i in range(1000):
        shared = rng.standard_normal((200, 1))
        latent = np.sqrt(0.7) * shared + np.sqrt(0.3) * rng.standard_normal((200, 14))
        both = (latent < sps.norm.ppf(truth + other)).astype(float)
        one, two = frame(both[:, :7]), frame(both[:, 7:])
        own = mean_at([frame(area(one.to_numpy(), np.log2(RANKS))[:, None])], 1, how)
        moved = change([one], [two], how, **SCORE).aurac_log2
        hits[i] = own.low <= want[0] <= own.high, moved.low <= want[1] <= moved.high
    assert hits.mean(axis=0) == pytest.approx([0.95, 0.95], abs=0.02)


def test_a_change_is_paired_and_of_equal_curves_nothing():
    values = right_or_wrong(np.random.default_rng(9), [0.3, 0.4, 0.5, 0.5, 0.5, 0.4, 0.4], 100)
    same = change([values], [values.iloc[::-1]], QUICK, **SCORE)
    for measure in (same.out_of_order, same.log2_best_rank, same.aurac_linear, same.aurac_log2):
        assert (measure.value, measure.low, measure.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="same items"):
        change([values], [values.rename(index={"h0": "other"})], QUICK, **SCORE)
    with pytest.raises(ValueError, match="same ranks"):
        change([values], [values.drop(columns=64)], QUICK, **SCORE)
    with pytest.raises(ValueError, match="at least two ranks, not 1"):
        order([values[[1]]], QUICK, **SCORE)


# BLEU


def corpora():
    words = [
        "the capital of chad is n'djamena",
        "its currency is the franc",
        "gold has the symbol au",
        "it is in africa",
    ]
    rng = np.random.default_rng(10)
    for hypothesis, reference in product(words, words):
        cut = rng.integers(3, 7)
        yield " ".join(hypothesis.split()[:cut]) + " " + reference, reference + " " + words[rng.integers(4)]


def counted(pairs):
    found = [sacrebleu.BLEU().corpus_score([h], [[r]]) for h, r in pairs]
    return np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in found])


def test_bleu_of_summed_counts_is_sacrebleus_of_the_corpus():
    pairs = list(corpora())
    whole = sacrebleu.corpus_bleu([h for h, _ in pairs], [[r for _, r in pairs]]).score
    assert corpus_bleu(counted(pairs).sum(axis=0)) == pytest.approx(whole / 100, abs=1e-12)
    assert pseudo_values(counted(pairs)).mean() == pytest.approx(whole / 100, abs=1e-12)
    assert corpus_bleu(np.array([5, 5] + [0] * 4 + [5, 4, 3, 2])) == 0


def test_intervals_of_bleu_agree_with_resampling_the_corpus():
    counts = counted(list(corpora()) * 4)
    values = pseudo_values(counts)
    ours = mean_at([frame(values[:, None])], 1, support=REAL)
    rng = np.random.default_rng(11)
    picks = rng.integers(len(counts), size=(4000, len(counts)))
    resampled = [corpus_bleu(counts[pick].sum(axis=0)) for pick in picks]
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_coverage_of_bleu():
    """Answers as n-gram counts from a known law: its BLEU is that of a very large corpus."""
    rng = np.random.default_rng(12)

    def draw(n):
        length, hard = rng.integers(9, 12, size=n), rng.uniform(0.5, 0.8, size=n)
        totals = np.stack([length - k for k in range(4)], axis=1)
        matches = rng.binomial(totals, hard[:, None] ** np.arange(1, 5))
        return np.concatenate([length[:, None], np.full((n, 1), 10), matches, totals], axis=1)

    truth = corpus_bleu(draw(400_000).sum(axis=0))
    how, hits = Bootstrap(resamples=400), []
    for _ in range(400):
        found = mean_at([frame(pseudo_values(draw(80))[:, None])], 1, how, support=REAL)
        hits.append(found.low <= truth <= found.high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


def test_a_difference_nobody_saw_is_not_certainty_where_values_have_no_bounds():
    same = frame(np.full((20, 1), 0.2))
    found = mean_at([same], 1, support=REAL)
    assert found.value == pytest.approx(0.2) and np.isnan(found.low) and np.isnan(found.high)
    assert p_values([same - 0.2], QUICK, support=DIFFERENCE).tolist() == [1.0]
