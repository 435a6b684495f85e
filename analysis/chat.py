"""Tables of ratings, order effects and agreement, from verdict frames -> `layout.Table`."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.agreement import alpha, by_judge, by_order, judge_pairs, order_effect, ratings_agree
from analysis.layout import Block, Cell, Row, Table
from analysis.ratings import HOW, Elo, Matches, Strengths, elo, strengths

ORDERS = 10_000
ELO_NOTE = (
    f"Elo: K 32, from 1000, every verdict a match, a tie half a point, mean of {ORDERS:,} random orders of the "
    "matches; ± half the 95% interval of that mean over orders, which says nothing about other prompts. The rank is "
    "in brackets."
)
STRENGTH_NOTE = (
    f"Bradley-Terry: in Elo points, mean 1000, no order of matches; [low, high]: 95% interval, {HOW.resamples:,} "
    f"bootstrap resamples of the prompts, seed {HOW.seed}. Of one who won, or lost, every match it says only that."
)


def ranks(values: Sequence[float]) -> list[int]:
    """1 for the highest; ratings that are the same whole number share a rank."""
    values = [round(value) for value in values]
    return [1 + sum(other > value for other in values) for value in values]


def elo_cells(result: Elo) -> dict[str, Cell]:
    rows = zip(result.players, result.rating, ranks(result.rating), result.interval, strict=True)
    return {player: Cell(rating, rank, error=error, digits=0) for player, rating, rank, error in rows}


def strength_cells(result: Strengths) -> dict[str, Cell]:
    rows = zip(result.players, result.rating, ranks(result.rating), result.low, result.high, strict=True)
    return {player: Cell(value, rank, low, high, digits=0) for player, value, rank, low, high in rows}


def tournament_table(verdicts: pd.DataFrame, title: str) -> Table:
    """Ratings of a tournament's contestants, a block for every judge that gave a verdict."""
    header = ("contestant", "Elo", "Bradley-Terry", "won", "tied", "lost")
    blocks = tuple(_standings(judge, part) for judge, part in _judges(verdicts))
    return Table(title, header, blocks, (ELO_NOTE, STRENGTH_NOTE))


def order_table(judges: Mapping[str, pd.DataFrame]) -> Table:
    """Order effects, ties and missing verdicts of judges, and each one's agreement with itself. Name -> verdicts."""
    header = ("judge", "verdicts", "first", "second", "tie", "points of the first", "none", "alpha of orders")
    rows = tuple(_order_row(judge, verdicts) for judge, verdicts in judges.items())
    notes = (
        "first, second, tie: shares of the verdicts given, by the place of the better answer. points of the first: a "
        "tie half; 50 without an order effect; [low, high]: 95% interval over prompts. none: share of all verdicts "
        "that could not be had or parsed.",
        "alpha of orders: Krippendorff's alpha (nominal) of a judge with itself, the same two answers in both orders: "
        "1 full agreement, 0 as by chance, below 0 worse than chance.",
    )
    return Table("Order of the answers, ties, missing verdicts", header, (Block("Percent of verdicts", rows),), notes)


def agreement_table(rows: Sequence[Row], notes: Sequence[str] = ()) -> Table:
    header = ("judge", "against", "systems", "Kendall tau", "Spearman rho", "alpha, examples")
    alpha_note = (
        "alpha, examples: Krippendorff's alpha (nominal) of the two judges' verdicts on the same two answers in the "
        "same order."
    )
    return Table("Agreement of judges", header, (Block("Ratings and verdicts", tuple(rows)),), (*notes, alpha_note))


def agreement_row(
    judge: str, against: str, left: Mapping[str, float], right: Mapping[str, float], both: pd.DataFrame | None = None
) -> Row:
    """Two judges' ratings of the systems, and their verdicts (a frame of both) if there are any to compare."""
    tau, rho, n = ratings_agree(left, right)
    examples = Cell() if both is None else _alpha(by_judge(both))
    # Undefined where a judge rates all systems alike.
    ranked = (Cell() if np.isnan(value) else Cell(value, digits=2) for value in (tau, rho))
    return Row((judge, against), (Cell(n, digits=0), *ranked, examples))


def judges_table(verdicts: pd.DataFrame) -> Table | None:
    """Every two judges of a tournament: their Bradley-Terry ratings and their verdicts. None for a single judge."""
    rated = {}
    for judge, part in _judges(verdicts):
        result = strengths(Matches.of(part))
        rated[judge] = dict(zip(result.players, result.rating, strict=True))
    rows = [
        agreement_row(left, right, rated[left], rated[right], verdicts[verdicts.judge.isin((left, right))])
        for left, right in judge_pairs(rated)
    ]
    return agreement_table(rows) if rows else None


def _standings(judge: str, verdicts: pd.DataFrame) -> Block:
    matches = Matches.of(verdicts)
    by_elo, by_strength = elo_cells(elo(matches, ORDERS)), strength_cells(strengths(matches))
    rows = []
    for player in sorted(by_elo, key=lambda player: -by_elo[player].value):
        score = [Cell(n, digits=0) for n in _won_tied_lost(matches, matches.players.index(player))]
        rows.append(Row((player,), (by_elo[player], by_strength[player], *score)))
    return Block(f"{judge} judges {matches.prompts} prompts", tuple(rows))


def _won_tied_lost(matches: Matches, player: int) -> tuple[int, int, int]:
    points = np.concatenate([matches.points[matches.first == player], 1 - matches.points[matches.second == player]])
    return tuple(int((points == value).sum()) for value in (1, 0.5, 0))


def _judges(verdicts: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(judge, part) for judge, part in verdicts.groupby("judge") if part.verdict.notna().any()]


def _order_row(judge: str, verdicts: pd.DataFrame) -> Row:
    if verdicts.verdict.isna().all():
        return Row((judge,), (Cell(0, digits=0), *[Cell()] * 4, Cell(100.0), Cell()))
    found = order_effect(verdicts)
    shares = (Cell(100 * share) for share in (found.first, found.second, found.tie))
    points = Cell(100 * found.points, low=100 * found.low, high=100 * found.high)
    missing = Cell(100 * found.missing)
    return Row((judge,), (Cell(found.verdicts, digits=0), *shares, points, missing, _alpha(by_order(verdicts))))


def _alpha(ratings: pd.DataFrame) -> Cell:
    value = alpha(ratings)
    return Cell() if value is None else Cell(value, digits=2)
