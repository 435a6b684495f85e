"""Ratings against slow references and against simulated tournaments whose strengths are known."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from analysis.agreement import alpha, by_judge, by_order, order_effect, ratings_agree
from analysis.rank_chart import rank_chart
from analysis.ratings import POINTS, Matches, bradley_terry, elo, strengths
from analysis.stats import Bootstrap

PLAYERS = tuple("abcde")
TRUE = np.array([-260.0, -90.0, 0.0, 120.0, 230.0]) + 1000  # Elo points


def simulated(prompts: int, rng: np.random.Generator, true=TRUE, tie: float = 0.15, sets: int = 1) -> np.ndarray:
    """Points the first takes, (sets, prompts, ordered pairs): Bradley-Terry's expectation, with ties."""
    pairs = np.array(list(permutations(range(len(true)), 2)))
    p = 1 / (1 + np.exp((true[pairs[:, 1]] - true[pairs[:, 0]]) / POINTS))
    tied = np.minimum(tie, 2 * np.minimum(p, 1 - p))
    draw = rng.random((sets, prompts, len(pairs)))
    return np.where(draw < p - tied / 2, 1.0, np.where(draw < p + tied / 2, 0.5, 0.0))


def matches_of(points: np.ndarray, players=PLAYERS) -> Matches:
    """Of points (prompts, ordered pairs)."""
    pairs = np.array(list(permutations(range(len(players)), 2)))
    prompts = len(points)
    first, second = (np.tile(pairs[:, i], prompts) for i in (0, 1))
    return Matches(players, prompts, np.repeat(np.arange(prompts), len(pairs)), first, second, points.ravel())


def verdicts_of(rows, judge="judge") -> pd.DataFrame:
    frame = pd.DataFrame([(judge, *row) for row in rows], columns=["judge", "prompt", "first", "second", "verdict"])
    return frame.astype({"verdict": "Int64"})


def slow_elo(games, players: int, k: float = 32) -> list[float]:
    ratings = [1000.0] * players
    for first, second, points in games:
        expected = 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / 400))
        ratings[first], ratings[second] = (
            ratings[first] + k * (points - expected),
            ratings[second] - k * (points - expected),
        )
    return ratings


def test_one_match_moves_elo_by_hand():
    one = Matches(("a", "b"), 1, np.array([0]), np.array([0]), np.array([1]), np.array([1.0]))
    np.testing.assert_allclose(elo(one, orders=3).rating, [1016, 984])


def test_elo_is_the_mean_over_all_orders_of_the_matches():
    games = [(0, 1, 1.0), (1, 2, 0.0), (2, 0, 0.5), (0, 1, 0.5), (1, 2, 1.0), (0, 2, 1.0)]
    every = np.array([slow_elo(order, 3) for order in permutations(games)])
    first, second, points = (np.array(column) for column in zip(*games, strict=True))
    found = elo(Matches(("a", "b", "c"), 6, np.arange(6), first, second, points), orders=30_000)
    np.testing.assert_allclose(found.rating, every.mean(axis=0), atol=4 * every.std(axis=0).max() / np.sqrt(30_000))
    np.testing.assert_allclose(found.spread, every.std(axis=0), rtol=0.03)
    np.testing.assert_allclose(found.path[-1], found.rating)
    np.testing.assert_allclose(found.path.sum(axis=1), 3000)


def test_the_same_seed_gives_the_same_elo():
    matches = matches_of(simulated(5, np.random.default_rng(0))[0])
    np.testing.assert_array_equal(elo(matches, 50).rating, elo(matches, 50).rating)
    assert not np.array_equal(elo(matches, 50).rating, elo(matches, 50, seed=1).rating)


def test_bradley_terry_is_the_maximum_of_the_likelihood():
    matches = matches_of(simulated(7, np.random.default_rng(3))[0])

    def loss(free):
        theta = np.append(free, 0.0)
        gap = theta[matches.first] - theta[matches.second]
        return -(matches.points * gap - np.logaddexp(0, gap)).sum()

    theta = np.append(optimize.minimize(loss, np.zeros(4), options={"gtol": 1e-9}).x, 0.0)
    np.testing.assert_allclose(
        bradley_terry(matches.won.sum(axis=0)), 1000 + POINTS * (theta - theta.mean()), atol=0.02
    )


def test_a_player_who_won_every_match_has_a_finite_rating():
    always = np.where([[pair[0] == 0 or pair[1] == 4 for pair in permutations(range(5), 2)]] * 3, 1.0, 0.0)
    found = strengths(matches_of(always), Bootstrap(resamples=50))
    assert np.isfinite([found.rating, found.low, found.high]).all() and found.rating[0] > 2000


def test_known_strengths_are_found():
    matches = matches_of(simulated(3_000, np.random.default_rng(1))[0])
    found = strengths(matches)
    np.testing.assert_allclose(found.rating, TRUE, atol=15)
    assert ((found.low < TRUE) & (found.high > TRUE)).all()
    assert list(np.argsort(elo(matches, 20).rating)) == list(np.argsort(TRUE))


def test_intervals_cover_at_their_level():
    """95% intervals of 5 players in 600 tournaments: within 2 points of nominal."""
    sets, prompts, rng = 600, 80, np.random.default_rng(7)
    points = simulated(prompts, rng, sets=sets)
    held = []
    for one in points:
        found = strengths(matches_of(one), Bootstrap(resamples=300, seed=int(rng.integers(1 << 30))))
        held.append((found.low <= TRUE) & (found.high >= TRUE))
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_prompts_are_resampled_whole():
    """A judge whose verdicts on a prompt are all alike has as many independent ones as prompts, not as verdicts."""
    rng = np.random.default_rng(5)
    rows = []
    for prompt in range(60):
        winner = rng.integers(2)
        for _ in range(10):
            rows += [(prompt, "a", "b", 1 + winner), (prompt, "b", "a", 2 - winner)]
    found = strengths(Matches.of(verdicts_of(rows)))
    half = (found.high[0] - found.low[0]) / 2
    assert half == pytest.approx(1.96 * POINTS / 2 * np.sqrt(4 / 60), rel=0.2)  # of log odds: 2 sqrt(1/n)


def test_missing_verdicts_are_no_matches():
    rows = [(1, "a", "b", 1), (1, "b", "a", None), (2, "a", "b", 3)]
    matches = Matches.of(verdicts_of(rows))
    assert list(matches.points) == [1.0, 0.5] and matches.prompts == 2
    assert order_effect(verdicts_of(rows)).missing == pytest.approx(1 / 3)


def test_order_effect_of_a_judge_that_only_sees_places_and_of_a_fair_one():
    pairs = [(prompt, *pair) for prompt in range(20) for pair in permutations("abc", 2)]
    blind = order_effect(verdicts_of([(*pair, 1) for pair in pairs]))
    assert (blind.first, blind.second, blind.tie, blind.points, blind.low) == (1, 0, 0, 1, 1)
    # On even prompts the earlier letter is better, on odd ones the later.
    fair = verdicts_of([(prompt, x, y, 1 if (x < y) == (prompt % 2 == 0) else 2) for prompt, x, y in pairs])
    assert order_effect(fair).points == 0.5
    assert alpha(by_order(fair)) == pytest.approx(1)
    assert alpha(by_order(verdicts_of([(*pair, 1) for pair in pairs]))) < 0


def test_agreement_of_judges():
    pairs = [(prompt, *pair) for prompt in range(30) for pair in permutations("abc", 2)]
    left = verdicts_of([(*pair, 1 + (i % 2)) for i, pair in enumerate(pairs)], "left")
    assert alpha(by_judge(pd.concat([left, left.assign(judge="right")]))) == pytest.approx(1)
    turned = left.assign(judge="right", verdict=3 - left.verdict)
    assert alpha(by_judge(pd.concat([left, turned]))) < -0.9
    rng = np.random.default_rng(0)
    chance = left.assign(judge="right", verdict=rng.integers(1, 4, len(left)))
    assert abs(alpha(by_judge(pd.concat([left, chance])))) < 0.2
    assert alpha(by_judge(left)) is None
    tau, rho, n = ratings_agree({"a": 1, "b": 2, "c": 3, "x": 0}, {"a": 10, "b": 30, "c": 20})
    assert (n, tau, rho) == (3, pytest.approx(1 / 3), pytest.approx(0.5))


def test_the_chart_shows_every_rank_and_the_base_or_nothing():
    pairs = list(permutations(["base", "r1", "r8", "r64"], 2))
    rows = [(prompt, *pair, 1 + (prompt + i) % 3) for prompt in range(9) for i, pair in enumerate(pairs)]
    figure = rank_chart(verdicts_of(rows), {"r64": 64, "r1": 1, "base": None, "r8": 8}, orders=20)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["no adapter", "1", "8", "64"]
    assert rank_chart(verdicts_of(rows), {"r1": 1, "base": None}, orders=20) is None
