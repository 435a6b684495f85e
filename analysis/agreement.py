"""Whether a judge favours an order, and whether judges agree."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import krippendorff
import numpy as np
import pandas as pd
from scipy import stats

from analysis.ratings import HOW, Matches, counts
from analysis.stats import Bootstrap
from analysis.verdicts import FIRST, SECOND, TIE


@dataclass(frozen=True)
class Order:
    """Shares of the given verdicts; `points`: what the answer shown first takes, a tie half (no order effect: 0.5),
    with its interval over prompts; `missing`: share of all verdicts that could not be had."""

    verdicts: int
    first: float
    second: float
    tie: float
    missing: float
    points: float
    low: float
    high: float


def order_effect(verdicts: pd.DataFrame, how: Bootstrap = HOW) -> Order:
    """How often the answer shown first is preferred. ValueError if no verdict was given."""
    given = verdicts.verdict.dropna()
    if given.empty:
        raise ValueError("no verdict was given, so there is no order effect to measure")
    matches = Matches.of(verdicts)
    won = np.bincount(matches.prompt, matches.points, matches.prompts)
    played = np.bincount(matches.prompt, minlength=matches.prompts)
    draws = counts(matches.prompts, how)
    low, high = np.quantile((draws @ won) / (draws @ played), how.tails)
    first, second, tie = (float((given == value).mean()) for value in (FIRST, SECOND, TIE))
    missing = float(verdicts.verdict.isna().mean())
    return Order(len(given), first, second, tie, missing, float(matches.points.mean()), float(low), float(high))


def ratings_agree(left: Mapping[str, float], right: Mapping[str, float]) -> tuple[float, float, int]:
    """Kendall's tau-b and Spearman's rho of two ratings of the players that both have, and how many those are."""
    shared = sorted(left.keys() & right.keys())
    pairs = [[side[name] for name in shared] for side in (left, right)]
    return float(stats.kendalltau(*pairs).statistic), float(stats.spearmanr(*pairs).statistic), len(shared)


def alpha(ratings: pd.DataFrame) -> float | None:
    """Krippendorff's alpha, nominal, of a frame units x raters with <NA> where a rater did not judge.

    None if no unit was judged twice or all verdicts are the same.
    """
    known = ratings[ratings.notna().sum(axis=1) > 1]
    if known.empty or len(pd.unique(known.to_numpy(dtype=float)[known.notna().to_numpy()])) < 2:
        return None
    return float(krippendorff.alpha(known.to_numpy(dtype=float, na_value=np.nan).T, level_of_measurement="nominal"))


def by_order(verdicts: pd.DataFrame) -> pd.DataFrame:
    """A judge's two orders of a pair as two raters: units (prompt, pair), values who is better, or a tie."""
    return _units(verdicts).pivot_table(
        index=["prompt", "left", "right"], columns="turned", values="better", aggfunc="first"
    )


def by_judge(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Judges as raters: units (prompt, pair, order), values who is better, or a tie."""
    units = ["prompt", "left", "right", "turned"]
    return _units(verdicts).pivot_table(index=units, columns="judge", values="better", aggfunc="first")


def judge_pairs(judges: Iterable[str]) -> list[tuple[str, str]]:
    return list(combinations(sorted(judges), 2))


def _units(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Verdicts with the pair by alphabet (left, right), whether it was shown the other way round (turned), and
    `better`: 1 left, 2 right, 3 a tie."""
    pair = np.sort(verdicts[["first", "second"]].to_numpy(dtype=str), axis=1)
    turned = (verdicts["first"] > verdicts["second"]).to_numpy()
    verdict = verdicts.verdict.to_numpy(dtype=float, na_value=np.nan)
    better = np.where(turned & np.isin(verdict, (FIRST, SECOND)), FIRST + SECOND - verdict, verdict)
    columns = {"judge": verdicts.judge.to_numpy(), "prompt": verdicts.prompt.to_numpy()}
    return pd.DataFrame(columns | {"left": pair[:, 0], "right": pair[:, 1], "turned": turned, "better": better})
