"""Ratings of players from verdicts on pairs: Elo by QLoRA's protocol, and Bradley-Terry with intervals over prompts.

Elo (QLoRA, arXiv 2305.14314, section 5.3) depends on the order of the matches, so it is averaged over random orders;
an interval over orders shrinks with their number and says nothing about other prompts. Bradley and Terry's model
(1952) has no order; prompts are resampled, each with all its verdicts, because verdicts on one prompt are alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from analysis.stats import Bootstrap
from analysis.verdicts import FIRST, SECOND, TIE

START, K = 1000.0, 32.0
POINTS = 400 / np.log(10)  # Elo points to a unit of log odds
TYPES = (0.0, 0.5, 1.0)  # what the first player takes from a match
BATCH = 2_000  # random orders at a time
HOW = Bootstrap(resamples=2_000)
RIDGE = 1e-4  # keeps a player who won, or lost, every match at a finite rating


@dataclass(frozen=True)
class Elo:
    """rating: mean over the orders, (players,); spread: standard deviation over them, (players,); path: mean rating
    after every match, (matches, players)."""

    players: tuple[str, ...]
    rating: np.ndarray
    spread: np.ndarray
    path: np.ndarray
    orders: int

    @property
    def interval(self) -> np.ndarray:
        """Half the 95% interval of the mean over orders, (players,): QLoRA's +-1."""
        return 1.96 * self.spread / np.sqrt(self.orders)


@dataclass(frozen=True)
class Strengths:
    """Bradley-Terry ratings in Elo points with mean 1000, (players,), and the ends of their intervals."""

    players: tuple[str, ...]
    rating: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Matches:
    """Matches with a verdict as arrays (matches,): index of the prompt, of the first and the second player, and what
    the first took: 1, 0, or 1/2 for a tie."""

    players: tuple[str, ...]
    prompts: int
    prompt: np.ndarray
    first: np.ndarray
    second: np.ndarray
    points: np.ndarray

    @classmethod
    def of(cls, verdicts: pd.DataFrame, players: Sequence[str] | None = None) -> "Matches":
        """The verdicts that are not missing. `players` fixes the order of the results; default by alphabet."""
        given = verdicts[verdicts.verdict.notna()]
        players = tuple(players or sorted(set(verdicts["first"]) | set(verdicts["second"])))
        index = {name: i for i, name in enumerate(players)}
        prompt, prompts = pd.factorize(given.prompt)
        points = given.verdict.map({FIRST: 1.0, SECOND: 0.0, TIE: 0.5}).to_numpy(float)
        first, second = (given[side].map(index).to_numpy(int) for side in ("first", "second"))
        return cls(players, len(prompts), prompt, first, second, points)

    @cached_property
    def won(self) -> np.ndarray:
        """Points that a player took from another on a prompt, (prompts, players, players)."""
        won = np.zeros((self.prompts, len(self.players), len(self.players)))
        np.add.at(won, (self.prompt, self.first, self.second), self.points)
        np.add.at(won, (self.prompt, self.second, self.first), 1 - self.points)
        return won


def elo(matches: Matches, orders: int = 10_000, k: float = K, seed: int = 0) -> Elo:
    """Elo ratings, each order of all matches from 1000 points on; a tie is half a point for both.

    Orders run side by side: one step plays the next match of every order. Matches of the same players and outcome are
    interchangeable, so an order is a sequence of such types (a byte each).
    """
    m = len(matches.players)
    outcome = np.searchsorted(TYPES, matches.points)
    kinds, kind = np.unique(np.stack([matches.first, matches.second, outcome]), axis=1, return_inverse=True)
    first, second = kinds[:2].astype(np.int64)
    points = np.asarray(TYPES)[kinds[2]]
    smallest = np.min_scalar_type(kinds.shape[1])
    rng = np.random.default_rng(seed)
    total, squares, path = np.zeros(m), np.zeros(m), np.zeros((len(kind), m))
    for start in range(0, orders, BATCH):
        size = min(BATCH, orders - start)
        order = np.ascontiguousarray(rng.permuted(np.tile(kind.astype(smallest), (size, 1)), axis=1).T)
        ratings = np.full((size, m), START)
        flat, rows = ratings.reshape(-1), np.arange(size) * m
        for step, played in enumerate(order):
            a, b = rows + first[played], rows + second[played]
            expected = 1 / (1 + np.exp((flat[b] - flat[a]) / POINTS))
            gain = k * (points[played] - expected)
            flat[a] += gain
            flat[b] -= gain
            path[step] += ratings.sum(axis=0)
        total += ratings.sum(axis=0)
        squares += (ratings**2).sum(axis=0)
    mean = total / orders
    spread = np.sqrt(np.maximum(squares / orders - mean**2, 0) * orders / max(orders - 1, 1))
    return Elo(matches.players, mean, spread, path / orders, orders)


def bradley_terry(won: np.ndarray, iterations: int = 50, tolerance: float = 1e-9) -> np.ndarray:
    """Maximum-likelihood ratings in Elo points with mean 1000, (..., players), from points won (..., players, players).

    Newton's method on a batch of tables at once (a bootstrap is thousands of fits, which libraries do one by one),
    with a ridge of 1e-4 on the log odds; a tie counts as half a win of each. RuntimeError if it does not converge.
    """
    m = won.shape[-1]
    played = won + np.swapaxes(won, -1, -2)
    theta = np.zeros(won.shape[:-1])
    for _ in range(iterations):
        expected = 1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))
        gradient = (won - played * expected).sum(axis=-1) - RIDGE * theta
        weight = played * expected * (1 - expected)
        hessian = -weight
        hessian[..., np.arange(m), np.arange(m)] = weight.sum(axis=-1) - np.einsum("...ii->...i", weight) + RIDGE
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        step -= step.mean(axis=-1, keepdims=True)
        # A full step may overshoot where nearly all matches went one way.
        theta += step / np.maximum(1, np.abs(step).max(axis=-1, keepdims=True))
        if np.abs(step).max(initial=0) < tolerance:
            return START + POINTS * (theta - theta.mean(axis=-1, keepdims=True))
    raise RuntimeError(f"Bradley-Terry did not converge in {iterations} steps")


def strengths(matches: Matches, how: Bootstrap = HOW) -> Strengths:
    """Bradley-Terry ratings with percentile intervals over resampled prompts."""
    draws = resampled(matches, how)
    low, high = np.quantile(bradley_terry(draws), how.tails, axis=0)
    return Strengths(matches.players, bradley_terry(matches.won.sum(axis=0)), low, high)


def resampled(matches: Matches, how: Bootstrap = HOW) -> np.ndarray:
    """Points won in resamples of the prompts, (resamples, players, players)."""
    m = len(matches.players)
    return (counts(matches.prompts, how) @ matches.won.reshape(matches.prompts, m * m)).reshape(-1, m, m)


def counts(prompts: int, how: Bootstrap) -> np.ndarray:
    """How often each prompt is drawn, (resamples, prompts): drawing with replacement."""
    draws = np.random.default_rng(how.seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=how.resamples)
    return draws.astype(float)
