"""A chart of ratings over the rank of one adapter."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from analysis.ratings import Matches, elo, strengths
from analysis.style import INK, looks, panel, styled

BASE = "no adapter"


@styled
def rank_chart(verdicts: pd.DataFrame, ranks: Mapping[str, int | None], orders: int = 1_000) -> Figure | None:
    """Bradley-Terry ratings with 95% intervals over prompts, and Elo (hollow), by rank, one look a judge.

    ranks: contestant -> its rank, None without an adapter; others in `verdicts` are rated but not drawn. None if
    fewer than two ranks were rated.
    """
    shown = {name: rank for name, rank in ranks.items() if name in set(verdicts["first"]) | set(verdicts["second"])}
    places = {rank: i for i, rank in enumerate(sorted(set(shown.values()), key=lambda rank: rank or 0))}
    if len([rank for rank in places if rank is not None]) < 2:
        return None
    judges = [(judge, part) for judge, part in verdicts.groupby("judge") if part.verdict.notna().any()]
    figure, axes = panel()
    look = looks(judge for judge, _ in judges)
    for i, (judge, part) in enumerate(judges):
        colour, marker = look[judge].colour, look[judge].marker
        matches = Matches.of(part)
        rated, walked = strengths(matches), elo(matches, orders)
        at = [k for k, player in enumerate(rated.players) if player in shown]
        x = [places[shown[rated.players[k]]] + 0.14 * (i - (len(judges) - 1) / 2) for k in at]
        ends = [[rated.rating[k] - rated.low[k] for k in at], [rated.high[k] - rated.rating[k] for k in at]]
        axes.errorbar(x, rated.rating[at], yerr=ends, fmt=marker, color=colour, capsize=3, markersize=5, label=judge)
        axes.plot([here + 0.06 for here in x], walked.rating[at], marker, color=colour, mfc="white", markersize=5)
    axes.set_xticks(range(len(places)), [BASE if rank is None else str(rank) for rank in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel("rank b of the adapter")
    axes.set_ylabel("rating, Elo points")
    axes.axhline(1000, color=INK, linewidth=0.8, zorder=0)
    axes.grid(axis="x", visible=False)
    axes.set_title("filled: Bradley-Terry, 95% interval over prompts; hollow: Elo", fontsize=8, loc="left")
    axes.legend(frameon=False, fontsize=8)
    return figure
