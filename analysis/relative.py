"""QLoRA's Table 6: a system's scores out of ten as a percentage of ChatGPT's."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.ratings import HOW, counts
from analysis.stats import Bootstrap


@dataclass(frozen=True)
class Percentage:
    """Percent of the reference's total, by the order shown and over both, with an interval over prompts.

    printed_interval: half of it by the rule that gives QLoRA's printed ones (see `printed_interval`).
    """

    reference_first: float
    system_first: float
    mean: float
    low: float
    high: float
    printed_interval: float
    missing: int


def percentage(scores: pd.DataFrame, how: Bootstrap = HOW) -> Percentage:
    """scores: one system's rows of `verdicts.qlora_relative`. The mean is total over total, over both orders."""
    given = scores.dropna(subset=["score", "reference"])
    orders = given.groupby("reference_first")[["score", "reference"]].sum()
    each = 100 * orders.score / orders.reference
    prompts = given.groupby("prompt")[["score", "reference"]].sum()
    totals = counts(len(prompts), how) @ prompts.to_numpy(float)
    low, high = np.quantile(100 * totals[:, 0] / totals[:, 1], how.tails)
    return Percentage(
        each[True],
        each[False],
        100 * given.score.sum() / given.reference.sum(),
        float(low),
        float(high),
        printed_interval(given),
        len(scores) - len(given),
    )


def printed_interval(given: pd.DataFrame) -> float:
    """How far the ratio of the system's lower to the reference's upper 95% end lies below the ratio, in percent.

    QLoRA does not say how its intervals were made. This rule, found by trying, gives the printed ones: normal
    intervals of the two mean scores (per prompt, over both orders), as if the two were independent.
    """
    prompts = given.groupby("prompt")[["score", "reference"]].mean()
    half = 1.96 * prompts.std(ddof=0) / np.sqrt(len(prompts))
    mean = prompts.mean()
    worst = (mean.score - half.score) / (mean.reference + half.reference)
    return 100 * (given.score.sum() / given.reference.sum() - worst)
