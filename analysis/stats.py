"""Intervals over test items and training seeds, and what choosing the best of several ranks does to a score.

Input everywhere: a list of frames, one per seed, each items x ranks (`records.items`), whose means over items lie
inside `support` (0..1 for a score, -1..1 for a difference of two). All frames of a list share items and ranks.

Two sources of noise move a mean over seeds and items:
  items  resampled with replacement, the same ones for every rank and seed (they are the same questions);
  seeds  with S >= 2 seeds whose scores have standard deviation s: s/sqrt(S) times Student's t with S - 1
         degrees of freedom. (Resampling two or three seeds would give a spread too small by a factor
         sqrt((S - 1)/S), and no tails.)
Both hold the item x seed interaction, so intervals over seeds err to the wide side. With one seed the
interval is over items alone and says nothing about another training run. Drawing how often each distinct row
of outcomes occurs (multinomial) equals drawing items and is fast: right or wrong at 7 ranks is 128 rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

Frames = Sequence[pd.DataFrame]
UNIT = (0.0, 1.0)  # support of a score
DIFFERENCE = (-1.0, 1.0)  # and of a difference of two
REAL = (-np.inf, np.inf)  # of a loss
CHUNK = 2**22  # multinomial counts held at once (32 MB)


@dataclass(frozen=True)
class Bootstrap:
    """How to resample. The same settings give the same interval, whatever was computed before."""

    resamples: int = 10_000
    level: float = 0.95
    seed: int = 0

    @property
    def tails(self) -> tuple[float, float]:
        return (1 - self.level) / 2, (1 + self.level) / 2


DEFAULT = Bootstrap()


@dataclass(frozen=True)
class Estimate:
    """A score at `rank` with its interval, in the units of the items; n items, `seeds` training runs."""

    rank: int
    value: float
    low: float
    high: float
    n: int
    seeds: int


@dataclass(frozen=True)
class Best(Estimate):
    """The score of the best of several ranks; `bias` estimates how much the choice flatters it."""

    bias: float


@dataclass(frozen=True)
class Chosen(Estimate):
    """The test score of the rank chosen on validation items; `optimism` is by how much the best rank on test
    looks better than that (0 or more, whichever way is better)."""

    optimism: float


def paired(left: pd.DataFrame, right: pd.DataFrame, rank: int) -> pd.DataFrame:
    """Item by item, `left` at each of its ranks minus `right` at `rank`: a frame like `left`.

    Raises ValueError if the two do not hold the same items, or `right` lacks the rank.
    """
    _need_rank(right, rank)
    if not _same_items(left, right):
        only_left, only_right = left.index.difference(right.index), right.index.difference(left.index)
        raise ValueError(
            f"not the same items: {len(only_left)} only on the left, {len(only_right)} only on the right. "
            "A paired difference needs both cells scored on the same split."
        )
    return left.sub(right[rank].reindex(left.index), axis=0)


def mean_at(
    frames: Frames,
    rank: int,
    how: Bootstrap = DEFAULT,
    *,
    method: Literal["percentile", "bca"] = "percentile",
    support: tuple[float, float] = UNIT,
) -> Estimate:
    """Mean at a rank fixed beforehand. `bca` (Efron 1987) corrects for skewed items, for one seed only."""
    values, ranks = _stack(frames, support)
    _need_rank(frames[0], rank)
    seeds, n, _ = values.shape
    at = ranks.index(rank)
    # All ranks are resampled, so that a rank has one interval, whoever asks for it.
    centre, means, seed_noise, stretch = _resample(values, how)
    tails = how.tails
    if method == "bca":
        if seeds > 1:
            raise ValueError("bca is defined for one seed; use percentile for several")
        tails = _bca_tails(values[0, :, at], means[:, at], tails)
    value = float(centre[at])
    low, high = np.quantile((means + stretch * seed_noise)[:, at], tails)
    low, high = _bounded(float(low), float(high), value, n, how, support)
    return Estimate(rank, value, low, high, n, seeds)


def best_of_ranks(
    frames: Frames,
    how: Bootstrap = DEFAULT,
    *,
    higher_is_better: bool = True,
    support: tuple[float, float] = UNIT,
) -> Best:
    """The paper's reading: the best score over the ranks, on the same items that chose the rank.

    The interval is for the true score of *the rank that was chosen*. A winner's score is flattered, so:
      - The flattered end (the lower one, if higher is better) allows for the choice. Each resample chooses
        its own best rank and notes by how much that rank's resampled score exceeds the score it was
        resampled from; the end is the best score minus the upper quantile of these errors.
      - The other end is the plain percentile at the chosen rank: the choice cannot have moved the true score
        beyond it, and taking the estimated flattery off here too would miss clear winners.
    `bias` is the mean error, in the units of the score (positive if higher is better): the flattery expected.
    With ranks exactly equal it is about 0.7 of the real one; the simulations in tests/test_stats.py show that
    the interval holds all the same. A percentile interval of the maximum would be flattered twice.
    """
    values, ranks = _stack(frames, support)
    seeds, n, _ = values.shape
    centre, means, seed_noise, stretch = _resample(values, how)
    sign = 1 if higher_is_better else -1

    def errors(resampled: np.ndarray) -> np.ndarray:
        chosen = np.argmax(sign * resampled, axis=1)  # the first, so the smallest rank of a tie
        return resampled[np.arange(len(resampled)), chosen] - centre[chosen]

    best = _first_best(centre, sign)
    value = float(centre[best])
    noisy = means + stretch * seed_noise
    low, high = np.quantile(noisy[:, best], how.tails)
    least, most = np.quantile(errors(noisy), how.tails)
    low, high = (value - most, high) if higher_is_better else (low, value - least)
    low, high = _bounded(float(low), float(high), value, n, how, support)
    # Student's t has no mean for two seeds, so the bias takes the seeds' noise unstretched.
    return Best(ranks[best], value, low, high, n, seeds, bias=float(errors(means + seed_noise).mean()))


def choose_rank(frames: Frames, *, higher_is_better: bool = True) -> int:
    """The rank with the best mean; ties go to the smaller rank (the cheaper model)."""
    values, ranks = _stack(frames, (-np.inf, np.inf))
    return ranks[_first_best(values.mean(axis=(0, 1)), 1 if higher_is_better else -1)]


def chosen_on_validation(
    validation: Frames,
    test: Frames,
    how: Bootstrap = DEFAULT,
    *,
    higher_is_better: bool = True,
    support: tuple[float, float] = UNIT,
) -> Chosen:
    """Choose the rank on validation items, report its score on test items.

    Test items had no part in the choice, so the plain interval at that rank is right as it is. It is for the
    rank chosen here and leaves out what another validation set would have chosen.
    """
    rank = choose_rank(validation, higher_is_better=higher_is_better)
    at = mean_at(test, rank, how, support=support)
    best = np.mean([frame[choose_rank(test, higher_is_better=higher_is_better)].mean() for frame in test])
    return Chosen(at.rank, at.value, at.low, at.high, at.n, at.seeds, optimism=abs(float(best) - at.value))


def p_values(frames: Frames, how: Bootstrap = DEFAULT, *, support: tuple[float, float] = DIFFERENCE) -> np.ndarray:
    """For each column of paired differences, in ascending order of the columns, the two-sided p-value of no difference.

    The larger of two: items' signs flipped at random (a test that holds its level however few items differ), and
    twice the share of bootstrap means beyond zero, which hold the spread of the seeds. Not corrected: see `holm`.
    """
    values, _ = _stack(frames, support)
    rng = np.random.default_rng(how.seed)
    rows, counts = np.unique(values.mean(axis=0), axis=0, return_counts=True)
    centre = counts @ rows
    beyond = np.zeros(len(centre))
    step = max(1, CHUNK // len(rows))
    for start in range(0, how.resamples, step):
        kept = rng.binomial(counts, 0.5, size=(min(step, how.resamples - start), len(rows)))
        flipped = (2.0 * kept - counts) @ rows
        beyond += (np.abs(flipped) >= np.abs(centre) - 1e-9).sum(axis=0)
    signs = (1 + beyond) / (1 + how.resamples)
    noisy = resampled(frames, how, support=support)[1]
    tails = 2 * np.minimum((noisy <= 0).mean(axis=0), (noisy >= 0).mean(axis=0))
    return np.maximum(signs, np.minimum(tails, 1))


def holm(p: np.ndarray) -> np.ndarray:
    """P-values corrected for their number (Holm 1979): below a level where the step-down procedure rejects there."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return corrected


def resampled(
    frames: Frames, how: Bootstrap = DEFAULT, *, support: tuple[float, float] = UNIT
) -> tuple[np.ndarray, np.ndarray]:
    """Means (columns,) in ascending order of the columns, and their bootstrap draws (resamples, columns)."""
    centre, means, seed_noise, stretch = _resample(_stack(frames, support)[0], how)
    return centre, means + stretch * seed_noise


def _same_items(left: pd.DataFrame, right: pd.DataFrame) -> bool:
    return left.index.equals(right.index) or (len(left) == len(right) and set(left.index) == set(right.index))


def _need_rank(frame: pd.DataFrame, rank: int) -> None:
    if rank not in frame.columns:
        raise ValueError(f"rank {rank} was not scored; there are {', '.join(map(str, frame.columns))}")


def _stack(frames: Frames, support: tuple[float, float]) -> tuple[np.ndarray, list[int]]:
    """Frames of several seeds -> (seeds, items, ranks), aligned by item, and the ranks in ascending order."""
    if not frames or frames[0].empty:
        raise ValueError("no items to take a mean of")
    first = frames[0].sort_index(axis=1)
    ranks = [int(rank) for rank in first.columns]
    for other in frames[1:]:
        if set(other.columns) != set(ranks) or not _same_items(first, other):
            raise ValueError("the seeds of one cell were scored at different ranks or on different items")
    values = np.stack([frame.loc[first.index, ranks].to_numpy(float) for frame in frames])
    means = values.mean(axis=1)  # of items alone: pseudo-values of BLEU may lie further out
    if means.min() < support[0] - 1e-9 or means.max() > support[1] + 1e-9:
        raise ValueError(f"a mean over items lies outside {support}: percent taken for fractions?")
    return values, ranks


def _first_best(means: np.ndarray, sign: int) -> int:
    # Rounded, or two equal means of fractions could differ in the last bit and the larger rank win.
    return int(np.argmax(np.round(sign * means, 12)))


def _resample(values: np.ndarray, how: Bootstrap) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Values (seeds, items, ranks) -> means (ranks,), means over resampled items (resamples, ranks), normal
    noise of the seeds' mean (resamples, ranks), and the factors (resamples, 1) that make it Student's t."""
    rng = np.random.default_rng(how.seed)
    seeds, n, _ = values.shape
    rows, counts = np.unique(values.mean(axis=0), axis=0, return_counts=True)
    centre = counts @ rows / n
    means = np.empty((how.resamples, len(centre)))
    step = max(1, CHUNK // len(rows))
    for start in range(0, how.resamples, step):
        size = min(step, how.resamples - start)
        means[start : start + size] = rng.multinomial(n, counts / n, size=size).astype(float) @ rows / n
    if seeds == 1:
        return centre, means, np.zeros((1, 1)), np.ones((1, 1))
    scores = values.mean(axis=1)
    spread = (scores - scores.mean(axis=0)) / np.sqrt(seeds * (seeds - 1))
    seed_noise = rng.standard_normal((how.resamples, seeds)) @ spread
    stretch = np.sqrt((seeds - 1) / rng.chisquare(seeds - 1, size=(how.resamples, 1)))
    return centre, means, seed_noise, stretch


def _bca_tails(values: np.ndarray, means: np.ndarray, tails: tuple[float, float]) -> np.ndarray:
    """Quantiles to read instead of `tails` (Efron 1987; the jackknife of a mean in closed form)."""
    off = values - values.mean()
    if not off.any():
        return np.asarray(tails)
    below = (np.mean(means < values.mean()) + np.mean(means <= values.mean())) / 2
    z0 = stats.norm.ppf(below)
    acceleration = (off**3).sum() / (6 * (off**2).sum() ** 1.5)
    z = z0 + stats.norm.ppf(tails)
    return stats.norm.cdf(z0 + z / (1 - acceleration * z))


def _bounded(
    low: float, high: float, value: float, n: int, how: Bootstrap, support: tuple[float, float]
) -> tuple[float, float]:
    """Keep the interval inside the support. If all items agree the bootstrap has nothing to say (zero width):
    then at most a share u of all items can differ, u = 1 - ((1 - level)/2)**(1/n), which for right-or-wrong
    items is Clopper and Pearson's exact interval. NaN where the support has no bounds to say so with."""
    if low == high and np.isinf(support).any():
        return np.nan, np.nan
    if low == high:
        share = 1 - how.tails[0] ** (1 / n)
        return value - share * (value - support[0]), value + share * (support[1] - value)
    return max(low, support[0]), min(high, support[1])
