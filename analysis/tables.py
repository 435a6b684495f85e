"""The paper's tables: pure functions of run records and published numbers -> `layout.Table`."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd

from analysis.by_rank import table2, table3
from analysis.grid import DATA, METHODS, STATIC, Grid, Run, key, mean_score, percent, points
from analysis.layout import Block, Cell, Row, Table, to_csv, to_latex, to_markdown
from analysis.notes import protocol, reading, scope
from analysis.published import qdylora_table3, qlora_table5
from analysis.records import Record, check_comparable
from analysis.rivals import rivals
from analysis.semi_sorted import semi_sorted
from analysis.stats import DEFAULT, DIFFERENCE, Bootstrap, Estimate, best_of_ranks, mean_at
from analysis.study import STUDIES, study
from analysis.sweep import sweep

__all__ = ["TABLES", "Table", "table1", "table2", "table3", "to_csv", "to_latex", "to_markdown"]

TASK = "mmlu"
BASELINE = "qlora"
OWN, BEST, CHOSEN, SAME, LOWEST = "own", "best on test", "by validation", "as QLoRA", "lowest"  # a row's rank
Line = tuple[str, str, str, Callable[[Run], Cell]]  # method, label, where its rank comes from, what to show


def table1(records: Sequence[Record], published: pd.DataFrame | None = None, how: Bootstrap = DEFAULT) -> Table:
    """MMLU: QLoRA at its one rank against QDyLoRA at the best of its ranks, on four instruction sets.

    `published` is `published.qlora_table5()`; its rows appear for the models that the records hold. Raises
    ValueError for no records, two records of one cell, or records that may not be compared.
    """
    if not records:
        raise ValueError("no records, so no table")
    check_comparable(records)
    grid = Grid(records, TASK, how)
    blocks = [
        Block("Accuracy, percent, mean over questions (micro)", _accuracy(grid)),
        Block("Difference to QLoRA at its own rank, points, paired by question", _differences(grid)),
        Block("What choosing the rank on the test questions adds to the score, points", _optimism(grid)),
        Block("Accuracy, percent, mean over subjects (macro)", _macro(grid)),
        Block("Held-out loss ± one standard error (lower is better)", _heldout(grid)),
    ]
    if published is not None:
        blocks += _published(grid, published)
    shown = tuple(block for block in blocks if any(str(cell) for row in block.rows for cell in row.cells))
    header = ("model", "method", "which rank", *(DATA.get(data, data) for data in grid.data))
    title = f"Table 1 ({scope(records, TASK)})"
    return Table(title, header, shown, (*protocol(records, TASK), *reading(how), *grid.lost_notes()))


def _rows(grid: Grid, model: str, lines: Sequence[Line]) -> list[Row]:
    return [grid.row((model, label, rank), model, method, show) for method, label, rank, show in lines]


def _name(method: str) -> str:
    return METHODS.get(method, method)


def _selected(grid: Grid, best: Callable[[Run], Cell], chosen: Callable[[Run], Cell]) -> list[Line]:
    """Two lines for each method that was scored at several ranks, by how its rank was selected."""

    def several(show: Callable[[Run], Cell]) -> Callable[[Run], Cell]:
        return lambda run: show(run) if len(run.ranks) > 1 else Cell()

    lines = []
    for method in grid.methods:
        name = _name(method) + (", truncated" if method in STATIC else "")
        lines += [(method, name, BEST, several(best)), (method, name, CHOSEN, several(chosen))]
    return lines


def _accuracy(grid: Grid) -> tuple[Row, ...]:
    own = [(m, _name(m), OWN, lambda run: percent(run.own)) for m in grid.methods if m in STATIC]
    lines = own + _selected(grid, lambda run: percent(run.best), lambda run: percent(run.chosen))
    lines.sort(key=lambda line: grid.methods.index(line[0]))
    rows = []
    for model in grid.models:
        untrained = _untrained(grid, model, lambda record: record.split(TASK, "test").get("base"), 100, 1)
        rows += [*untrained, *_rows(grid, model, lines)]
    return tuple(rows)


def _untrained(grid: Grid, model: str, score: Callable[[Record], dict | None], unit: float, digits: int) -> list[Row]:
    """The row of the model before training, from one record a column (all cells of a column share it)."""
    cells = []
    for data in grid.data:
        runs = (run for (m, d, _), run in grid.runs.items() if (m, d) == (model, data))
        found = [score(record) for run in runs for record in run.records]
        cells.append(mean_score([base for base in found if base][:1], unit=unit, digits=digits))
    return [Row((model, "untrained", ""), tuple(cells))] if any(map(str, cells)) else []


def _differences(grid: Grid) -> tuple[Row, ...]:
    def show(estimate: Callable[[Run, list[pd.DataFrame], int], Estimate | None]) -> Callable[[Run], Cell]:
        """`estimate` gets the run, its differences to the baseline (a frame per seed), its rank."""

        def cell(run: Run) -> Cell:
            baseline = grid.other(run, BASELINE)
            frames = run.minus(baseline) if baseline else []
            return points(estimate(run, frames, baseline.own_rank)) if frames else Cell()

        return cell

    def at(frames: list[pd.DataFrame], rank: int) -> Estimate | None:
        return mean_at(frames, rank, grid.how, support=DIFFERENCE) if rank in frames[0] else None

    best = show(lambda run, frames, own: best_of_ranks(frames, grid.how, support=DIFFERENCE))
    chosen = show(lambda run, frames, own: run.chosen and at(frames, run.chosen.rank))
    same = show(lambda run, frames, own: at(frames, own))
    lines = []
    for method in grid.nested:
        label = f"{_name(method)} - {_name(BASELINE)}"
        lines += [(method, label, BEST, best), (method, label, CHOSEN, chosen), (method, label, SAME, same)]
    return tuple(row for model in grid.models for row in _rows(grid, model, lines))


def _optimism(grid: Grid) -> tuple[Row, ...]:
    def gap(run: Run) -> Cell:
        return Cell(100 * run.chosen.optimism) if run.chosen else Cell()

    lines = []
    for method in grid.nested:
        lines += [
            (method, _name(method), "best - by val.", gap),
            (method, _name(method), "bootstrap", lambda run: Cell(100 * run.best.bias)),
        ]
    return tuple(row for model in grid.models for row in _rows(grid, model, lines))


def _macro(grid: Grid) -> tuple[Row, ...]:
    def at(run: Run, rank: int) -> Cell:
        value = run.macro(rank)
        return Cell() if value is None else Cell(100 * value, rank)

    def chosen(run: Run) -> Cell:
        return at(run, run.chosen.rank) if run.chosen else Cell()

    own = [(BASELINE, _name(BASELINE), OWN, lambda run: at(run, run.own_rank))]
    selected = _selected(grid, lambda run: at(run, run.best.rank), chosen)
    lines = own + [line for line in selected if line[0] not in STATIC]
    return tuple(row for model in grid.models for row in _rows(grid, model, lines))


def _heldout(grid: Grid) -> tuple[Row, ...]:
    def at(run: Run, rank: int) -> Cell:
        return mean_score(run.heldout.get(rank, []), rank)

    def lowest(run: Run) -> Cell:
        return min((at(run, rank) for rank in run.heldout), key=lambda cell: cell.value, default=Cell())

    def same(run: Run) -> Cell:
        baseline = grid.other(run, BASELINE)
        return at(run, baseline.own_rank if baseline else run.own_rank)

    lines = [(BASELINE, _name(BASELINE), OWN, lambda run: at(run, run.own_rank))]
    for method in grid.nested:
        lines += [(method, _name(method), SAME, same), (method, _name(method), LOWEST, lowest)]
    rows = []
    for model in grid.models:
        untrained = _untrained(grid, model, lambda record: record.raw["heldout"].get("untrained"), 1, 3)
        rows += [*untrained, *_rows(grid, model, lines)]
    return tuple(rows)


def _published(grid: Grid, published: pd.DataFrame) -> list[Block]:
    """One block a source: the same model, data set and method as printed, not run here."""
    blocks = []
    for source, rows in published.groupby("source"):
        found = {(key(row.model), key(row.data), row.method): row for row in rows.dropna().itertuples()}
        lines = []
        for model in grid.models:
            printed = [found.get((key(model), data, BASELINE)) for data in grid.data]
            cells = tuple(Cell(row.value, row.rank) if row else Cell() for row in printed)
            lines.append(Row((model, f"{_name(BASELINE)}, published", OWN), cells))
        shown = tuple(line for line in lines if any(map(str, line.cells)))
        blocks.append(Block(f"Published, not run here: {source}, percent", shown))
    return blocks


def guanaco(records: Sequence[Record]) -> Table:
    """QLoRA's Guanaco models (OASST1) on MMLU: Table 1's layout, beside QLoRA's Table 5."""
    table = table1(records, qlora_table5())
    return replace(table, title=table.title.replace("Table 1", "Guanaco", 1))


#: A table's function of its records, by name.
TABLES: dict[str, Callable[[Sequence[Record]], Table]] = {
    "table1": lambda records: table1(records, qlora_table5()),
    "semi_sorted": semi_sorted,
    "table2": table2,
    "table3": lambda records: table3(records, qdylora_table3()),
    "guanaco": guanaco,
    "sweep": sweep,
    "rivals": rivals,
    "rivals_long": rivals,
    **dict.fromkeys(STUDIES, study),
}
