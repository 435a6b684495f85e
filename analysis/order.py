"""Semi-sorted ranks, made measurable: is a higher rank a better one, and what is the whole curve worth?

Of a curve of scores over K ranks:
    pairs out of order   how many of its K (K - 1) / 2 pairs of ranks have the higher rank score worse; beyond noise:
                         those whose difference, paired by item, is not zero after Holm's correction for the pairs
    best rank            the rank of the optimum (the smallest of a tie)
    AURAC                area under the curve by the trapezoid rule, over the rank or over its log2, divided by the
                         width of the axis: a mean score over ranks (the metric of MatryoshkaLoRA, arXiv 2605.07850)
Frames are as in `stats`, which see; two curves to be compared are resampled together, item by item.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from analysis.stats import DEFAULT, Bootstrap, Frames, holm, p_values, resampled

LEVEL = 0.05  # of the tests for pairs out of order


@dataclass(frozen=True)
class Measure:
    """A measure of a curve, or a change of one, with its percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Order:
    """How sorted one curve is. `beyond_noise` of `pairs` pairs are out of order; AURACs in the unit of the score."""

    ranks: tuple[int, ...]
    pairs: int
    out_of_order: Measure
    beyond_noise: int
    best_rank: Measure
    aurac_linear: Measure
    aurac_log2: Measure


@dataclass(frozen=True)
class Change:
    """One curve's measures minus another's; of the best rank, the difference of the log2."""

    out_of_order: Measure
    log2_best_rank: Measure
    aurac_linear: Measure
    aurac_log2: Measure


def order(frames: Frames, how: Bootstrap = DEFAULT, *, higher_is_better: bool, support: tuple[float, float]) -> Order:
    """Measure one curve; `frames` hold one frame per seed, items x ranks. ValueError for fewer than two ranks."""
    ranks = _ranks(frames)
    centre, draws = resampled(frames, how, support=support)
    curves = np.vstack([centre, draws])
    found = _measures(curves, ranks, 1 if higher_is_better else -1)
    best = found.pop("log2_best_rank")
    return Order(
        ranks=tuple(ranks),
        pairs=len(ranks) * (len(ranks) - 1) // 2,
        beyond_noise=_beyond_noise(frames, how, higher_is_better, support),
        best_rank=_measure(2.0**best, how, method="inverted_cdf"),
        **{name: _measure(values, how) for name, values in found.items()},
    )


def change(
    frames: Frames, base: Frames, how: Bootstrap = DEFAULT, *, higher_is_better: bool, support: tuple[float, float]
) -> Change:
    """The measures of the curve `frames` minus those of `base`, both of the same items, ranks and seeds."""
    ranks = _ranks(frames)
    if ranks != _ranks(base) or len(frames) != len(base):
        raise ValueError("two curves to compare need the same ranks and the same number of seeds")
    both = [_side_by_side(left, right) for left, right in zip(frames, base, strict=True)]
    centre, draws = resampled(both, how, support=support)
    curves, sign = np.vstack([centre, draws]), 1 if higher_is_better else -1
    new, old = (_measures(part, ranks, sign) for part in np.split(curves, 2, axis=1))
    return Change(**{name: _measure(new[name] - old[name], how) for name in new})


def area(curves: np.ndarray, axis: Sequence[float]) -> np.ndarray:
    """Area under each curve (..., ranks) over `axis` by the trapezoid rule, divided by the axis' width."""
    return np.trapezoid(curves, axis, axis=-1) / (axis[-1] - axis[0])


def _measures(curves: np.ndarray, ranks: list[int], sign: int) -> dict[str, np.ndarray]:
    """Every measure of every curve (curves, ranks)."""
    signed = np.round(sign * curves, 12)  # or two equal means could differ in the last bit
    worse = [signed[:, j] < signed[:, i] for i, j in combinations(range(len(ranks)), 2)]
    log2 = np.log2(ranks)
    return {
        "out_of_order": np.sum(worse, axis=0),
        "log2_best_rank": log2[signed.argmax(axis=1)],
        "aurac_linear": area(curves, ranks),
        "aurac_log2": area(curves, log2),
    }


def _measure(values: np.ndarray, how: Bootstrap, method: str = "linear") -> Measure:
    """The first of the values with the interval of the others."""
    low, high = np.quantile(values[1:], how.tails, method=method)
    return Measure(float(values[0]), float(low), float(high))


def _beyond_noise(frames: Frames, how: Bootstrap, higher_is_better: bool, support: tuple[float, float]) -> int:
    pairs = list(combinations(_ranks(frames), 2))
    differences = [
        pd.DataFrame({k: frame[high] - frame[low] for k, (low, high) in enumerate(pairs)}) for frame in frames
    ]
    width = support[1] - support[0]
    corrected = holm(p_values(differences, how, support=(-width, width)))
    gain = np.mean([frame.mean().to_numpy() for frame in differences], axis=0)
    return int(((corrected < LEVEL) & ((gain < 0) == higher_is_better)).sum())


def _side_by_side(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    """Both frames' columns for the same items; ValueError if the items differ."""
    if set(left.index) != set(right.index):
        raise ValueError("two curves to compare need the same items")
    values = np.hstack([left.sort_index(axis=1), right.loc[left.index].sort_index(axis=1)])
    return pd.DataFrame(values, index=left.index)


def _ranks(frames: Frames) -> list[int]:
    ranks = sorted(frames[0].columns) if frames else []
    if len(ranks) < 2:
        raise ValueError(f"a curve needs at least two ranks, not {len(ranks)}")
    return ranks
