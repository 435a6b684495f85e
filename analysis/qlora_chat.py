"""QLoRA's chat tables from its released verdicts:  python -m analysis.qlora_chat ROOT

Prints Tables 1 and 7 (Elo), Table 6 (percent of ChatGPT's score), order effects and agreement beside what is printed
in the paper, and writes them as Markdown and CSV.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import published
from analysis.chat import (
    ELO_NOTE,
    ORDERS,
    STRENGTH_NOTE,
    agreement_row,
    agreement_table,
    elo_cells,
    order_table,
    strength_cells,
)
from analysis.layout import Block, Cell, Row, Table, to_csv, to_markdown
from analysis.ratings import Elo, Matches, elo, strengths
from analysis.relative import Percentage, percentage
from analysis.verdicts import FIRST, REFERENCE, SECOND, TIE, qlora_pairwise, qlora_relative

OUT = "outputs/elo"
BENCHMARKS = {"vicuna": "Vicuna, 80 prompts", "oa": "OpenAssistant, 953 prompts"}
TABLE_6_NOTES = (
    "Each order: the system's total score as a percentage of ChatGPT's. mean: the same over both orders together, "
    "which is what the printed means are. Prompts without scores are left out of both totals.",
    "Which answer came first is read off the answers' ids in the released reviews: only the files of GPT-4, Bard and "
    "Vicuna-13B are named in the order shown, all others (X-vs-gpt-3.5) showed ChatGPT's answer first.",
    "95% CI, half: by a rule found by trying (analysis/relative.py), since the paper names none; it treats the two "
    "systems' scores as independent. mean [bootstrap]: 95% interval over prompts, both systems' scores together.",
    "Differences above 0.1: GPT-4's two orders are printed the other way round. Open Assistant 33B's printed line "
    "repeats Vicuna-13B's. Alpaca 13B's printed mean does not follow from its two printed orders.",
)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's verdicts with their Elo ratings and the printed ones (system -> cell)."""

    name: str
    verdicts: pd.DataFrame
    elo: Elo
    table1: Mapping[str, Cell]
    table7: Mapping[str, Cell]

    @property
    def ratings(self) -> dict[str, float]:
        return dict(zip(self.elo.players, self.elo.rating, strict=True))

    def off(self, ratings: np.ndarray) -> np.ndarray:
        """Ratings (..., systems) minus the printed ones, for the systems that Table 7 has."""
        printed = [player in self.table7 for player in self.elo.players]
        values = [self.table7[player].value for player in self.elo.players if player in self.table7]
        return ratings[..., printed] - np.array(values)

    @property
    def in_printed_order(self) -> bool:
        printed = {player: self.ratings[player] for player in self.table7}
        return sorted(printed, key=printed.get) == sorted(printed, key=lambda player: self.table7[player].value)


def benchmarks(root: Path, orders: int = ORDERS) -> list[Benchmark]:
    """GPT-4's released verdicts, rated. FileNotFoundError if `root` holds none."""
    found, printed = qlora_pairwise(root), published.qlora_elo()
    gpt4 = printed[printed.judge == "gpt-4"]
    result = []
    for name in (name for name in BENCHMARKS if name in found):
        rows = {table: part for table, part in gpt4[gpt4.benchmark == name].groupby(gpt4["source"].str[-7:])}
        table1 = {r.system: Cell(r.elo, error=r.interval, digits=0) for r in _rows(rows.get("Table 1"))}
        table7 = {r.system: Cell(r.elo, int(r.rank), digits=0) for r in _rows(rows.get("Table 7"))}
        result.append(Benchmark(name, found[name], elo(Matches.of(found[name]), orders), table1, table7))
    return result


def _rows(frame: pd.DataFrame | None) -> list:
    return [] if frame is None else list(frame.itertuples())


def elo_table(rated: list[Benchmark]) -> Table:
    """QLoRA's Table 1 and the GPT-4 columns of its Table 7, rebuilt."""
    early = closest(rated)
    blocks = tuple(Block(f"{BENCHMARKS[b.name]}, GPT-4 judges", _elo_rows(b, early)) for b in rated)
    header = ("system", "Table 1", "Table 7", "Elo", "minus Table 7", f"Elo, {early} matches", "Bradley-Terry")
    notes = (
        "Table 1, Table 7: as printed; a blank cell is not in the source. Verdicts: GPT-4's, released with QLoRA; "
        "those it did not give are left out.",
        ELO_NOTE,
        _largest(rated),
        f"Elo, {early} matches: the same, stopped after so many matches of every order, before the ratings settle. The "
        "number is the one that fits Table 7 best (largest difference then "
        f"{max(np.abs(b.off(b.elo.path[early - 1])).max() for b in rated):.0f} points). The paper does not say how its "
        "matches were sampled; too few of them, or a smaller K, would explain the difference.",
        STRENGTH_NOTE,
    )
    return Table("QLoRA's Tables 1 and 7 (Elo) from the released verdicts", header, blocks, notes)


def _elo_rows(b: Benchmark, early: int) -> tuple[Row, ...]:
    ours, strength = elo_cells(b.elo), strength_cells(strengths(Matches.of(b.verdicts)))
    walk = dict(zip(b.elo.players, b.elo.path[early - 1], strict=True))
    rows = []
    for player in sorted(ours, key=lambda player: -ours[player].value):
        printed = b.table7.get(player, Cell())
        gap = Cell(ours[player].value - printed.value, digits=0, signed=True) if str(printed) else Cell()
        cells = (b.table1.get(player, Cell()), printed, ours[player], gap, Cell(walk[player], digits=0))
        rows.append(Row((player,), (*cells, strength[player])))
    return tuple(rows)


def closest(rated: list[Benchmark]) -> int:
    """After how many matches of each order the mean ratings lie closest to Table 7, over all benchmarks."""
    length = min(len(b.elo.path) for b in rated)
    return int(sum((b.off(b.elo.path[:length]) ** 2).sum(axis=1) for b in rated).argmin()) + 1


def _largest(rated: list[Benchmark]) -> str:
    gaps = [(abs(b.ratings[p] - cell.value), p, b) for b in rated for p, cell in b.table7.items()]
    gap, player, b = max(gaps, key=lambda found: found[0])
    same = ", ".join(b.name for b in rated if b.in_printed_order) or "no benchmark"
    return (
        f"Systems in the printed order: {same}. Largest difference: {player} on {b.name}, {b.ratings[player]:.0f} "
        f"against {b.table7[player].value:.0f} ({gap:.0f} points)."
    )


def score_table(relative: pd.DataFrame) -> Table:
    """QLoRA's Table 6, rebuilt: three lines a system, printed, rebuilt and their difference."""
    printed = published.qlora_table6().set_index("system")
    found = {name: percentage(rows) for name, rows in relative.groupby("system")}
    compared = [row for name in printed.index if name in found for row in _compared(name, found[name], printed)]
    others = [Row((name, "rebuilt"), _percent_cells(p)) for name, p in found.items() if name not in printed.index]
    blocks = [Block("Percent of ChatGPT's score, GPT-4 judges, Vicuna prompts", tuple(compared))]
    if others:
        blocks.append(Block("Released, but not in the printed table as we know it", tuple(others)))
    header = ("system", "", "ChatGPT first", "system first", "mean", "95% CI, half", "mean [bootstrap]")
    return Table("QLoRA's Table 6 from the released scores", header, tuple(blocks), TABLE_6_NOTES)


def _percent_cells(p: Percentage) -> tuple[Cell, ...]:
    values = map(Cell, (p.reference_first, p.system_first, p.mean, p.printed_interval))
    return (*values, Cell(p.mean, low=p.low, high=p.high))


def _compared(name: str, p: Percentage, printed: pd.DataFrame) -> list[Row]:
    old = [Cell(float(printed.loc[name, c])) for c in ("reference_first", "system_first", "mean", "interval")]
    new = _percent_cells(p)
    gaps = [Cell(now.value - then.value, signed=True) for now, then in zip(new, old, strict=False)]
    lines = {"printed": (*old, Cell()), "rebuilt": new, "difference": (*gaps, Cell())}
    return [Row((name, line), cells) for line, cells in lines.items()]


def as_verdicts(relative: pd.DataFrame) -> pd.DataFrame:
    """Scores out of ten as a verdict frame: the higher score is better."""
    lead = (relative.score - relative.reference) * (1 - 2 * relative.reference_first.astype(int))
    verdict = lead.map(lambda points: FIRST if points > 0 else SECOND if points < 0 else TIE, na_action="ignore")
    columns = {
        "judge": "gpt-4, scores",
        "prompt": relative.prompt,
        "first": relative.system.where(~relative.reference_first, REFERENCE),
        "second": relative.system.where(relative.reference_first, REFERENCE),
        "verdict": verdict.astype("Int64"),
    }
    return pd.DataFrame(columns)


def agreement(rated: list[Benchmark], relative: pd.DataFrame) -> Table:
    """GPT-4 with humans (as printed), with itself on the other benchmark, and with its own scores out of ten."""
    elos, stated = published.qlora_elo(), published.qlora_agreement().set_index("statistic").value
    table7 = elos[(elos.benchmark == "vicuna") & elos["source"].str.endswith("Table 7")]
    human, gpt4 = (table7[table7.judge == judge].set_index("system").elo.to_dict() for judge in ("human", "gpt-4"))
    others = {name: value for name, value in gpt4.items() if name != "gpt-4"}
    vicuna, oa = (next(b for b in rated if b.name == name) for name in ("vicuna", "oa"))
    percent = {name: percentage(rows).mean for name, rows in relative.groupby("system")}
    both = pd.concat([vicuna.verdicts, as_verdicts(relative)])
    both = both[(both["first"] == REFERENCE) | (both["second"] == REFERENCE)]
    facts = [Cell(stated[name], digits=2) for name in ("kendall tau", "spearman r", "fleiss kappa")]
    rows = [
        Row(("GPT-4, as stated in the paper", "humans"), (Cell(), *facts)),
        agreement_row("GPT-4, Table 7 as printed", "humans, Table 7 as printed", gpt4, human),
        agreement_row("the same without GPT-4's answers", "humans, Table 7 as printed", others, human),
        agreement_row("GPT-4, Vicuna, rebuilt", "humans, Table 7 as printed", vicuna.ratings, human),
        agreement_row("GPT-4, Vicuna, rebuilt", "GPT-4, OpenAssistant, rebuilt", vicuna.ratings, oa.ratings),
        agreement_row("GPT-4, Vicuna, rebuilt", "GPT-4's scores (Table 6)", vicuna.ratings, percent, both),
    ]
    notes = (
        "As stated: Kendall's tau, Spearman's r and (in the last column) Fleiss' kappa of single examples. QLoRA did "
        "not release the human verdicts, so agreement with them on examples cannot be rebuilt.",
    )
    return agreement_table(rows, notes)


def tables(root: Path, orders: int = ORDERS) -> dict[str, Table]:
    """All tables by file name. FileNotFoundError if `root` holds no ratings."""
    rated, relative = benchmarks(root, orders), qlora_relative(root)
    judges = {f"GPT-4, pairwise, {b.name}": b.verdicts for b in rated}
    return {
        "table7": elo_table(rated),
        "table6": score_table(relative),
        "order": order_table(judges | {"GPT-4, scores, vicuna": as_verdicts(relative)}),
        "agreement": agreement(rated, relative),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="their folder, or a clone of artidoro/qlora")
    parser.add_argument("--out", default=OUT, type=Path)
    options = parser.parse_args()
    try:
        found = tables(options.root)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for name, table in found.items():
        (options.out / f"{name}.md").write_text(to_markdown(table), encoding="utf-8")
        (options.out / f"{name}.csv").write_text(to_csv(table), encoding="utf-8")
        print(to_markdown(table))
    print(f"written to {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
