"""Tables 2 and 3: every method at every rank, each cell scored on the benchmark of the data set it was trained on."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd

from analysis.grid import (
    DATA_NAMES,
    METHODS,
    MODELS,
    STATIC,
    Grid,
    Run,
    key,
    mean_score,
    ordered,
    percent,
    points,
)
from analysis.layout import Block, Cell, Row, Table
from analysis.notes import missing_models, protocol, ranks_tested, reading, scope
from analysis.records import Record, check_comparable
from analysis.stats import DEFAULT, DIFFERENCE, Bootstrap, best_of_ranks, holm, mean_at, p_values

DATA_ORDER = ("webglm", "gsm8k", "triviaqa")
NEW = "qdylora"
BEST, CHOSEN = "best on test", "by validation"
LEVEL = 0.05


def table2(records: Sequence[Record], how: Bootstrap = DEFAULT) -> Table:
    """QLoRA, truncated in two ways and by SVD, against QDyLoRA at every rank, on WebGLM (BLEU) and GSM8K."""
    return _by_rank("Table 2", ("falcon-40b",), records, None, how)


def table3(records: Sequence[Record], published: pd.DataFrame | None = None, how: Bootstrap = DEFAULT) -> Table:
    """DyLoRA over 16 bits, QLoRA and QDyLoRA at every rank, on GSM8K and TriviaQA (exact match), beside the paper's
    cells (`published.qdylora_table3()`)."""
    return _by_rank("Table 3", ("llama-7b", "llama2-13b"), records, published, how)


class _Columns:
    """One table's cells: a grid for each data set, since each has a task of its own; methods are the columns."""

    def __init__(self, records: Sequence[Record], how: Bootstrap) -> None:
        every = [*records, *(record.cut(cut) for record in records for cut in record.cuts)]
        names = ordered({key(record.cell["data"]) for record in every}, DATA_ORDER)
        self.grids = {
            data: Grid([record for record in every if key(record.cell["data"]) == data], data, how, among=every)
            for data in names
        }
        self.methods = ordered({record.cell["method"] for record in every}, list(METHODS))
        self.models = ordered({record.cell["model"] for record in records}, MODELS)
        self.how = how

    @property
    def places(self) -> list[tuple[Grid, str, str]]:
        """(grid, model, data) of every group of rows: those with a cell that ended, well or not."""
        every = [(grid, model, data) for model in self.models for data, grid in self.grids.items()]
        return [place for place in every if any(place[1:] == at[:2] for at in place[0].cells)]

    def ranks(self, grid: Grid, model: str, data: str) -> list[int]:
        """All ranks scored there; those of the configuration where every cell was lost."""
        runs = [run for (m, d, _), run in grid.runs.items() if (m, d) == (model, data)]
        lost = [r for (m, d, _), seeds in grid.cells.items() if (m, d) == (model, data) for r in seeds.values()]
        asked = [rank for record in lost for rank in record.raw["config"]["ranks"].get("eval", [])]
        return sorted({rank for run in runs for rank in run.ranks} or set(asked))

    def row(self, grid: Grid, model: str, data: str, label: str, show: Callable[[str, Run], Cell]) -> Row:
        """One row over the methods; `show` gets the method and its run."""
        cells = (grid.cell((model, data, m), lambda run, m=m: show(m, run)) for m in self.methods)
        return Row((model, DATA_NAMES.get(data, data), label), tuple(cells))


def _by_rank(
    name: str, paper: tuple[str, ...], records: Sequence[Record], published: pd.DataFrame | None, how: Bootstrap
) -> Table:
    if not records:
        raise ValueError("no records, so no table")
    check_comparable(records)
    columns = _Columns(records, how)
    blocks = [
        Block("Score, percent", _scores(columns)),
        Block(f"{METHODS[NEW]} minus the method of the column, points, paired by item", _differences(columns)),
        Block("What choosing the rank on the test items adds to the score, points", _optimism(columns)),
        Block("Held-out loss ± one standard error (lower is better)", _heldout(columns)),
    ]
    if published is not None:
        blocks += _published(columns, published)
    shown = tuple(block for block in blocks if any(str(cell) for row in block.rows for cell in row.cells))
    cut = any(":" in method for method in columns.methods)
    heads = tuple("QLoRA, alpha/r" if cut and m == "qlora" else METHODS.get(m, m) for m in columns.methods)
    lost = [note for grid in columns.grids.values() for note in grid.lost_notes()]
    notes = [*protocol(records, *columns.grids), *missing_models(records, paper), *reading(how), *ranks_tested(cut)]
    header = ("model", "data set", "rank", *heads)
    return Table(f"{name} ({scope(records)})", header, shown, (*notes, *dict.fromkeys(lost)))


def _scores(columns: _Columns) -> tuple[Row, ...]:
    rows = []
    for place in columns.places:
        for rank in columns.ranks(*place):
            rows.append(columns.row(*place, str(rank), lambda m, run, rank=rank: _no_rank(percent(run.at(rank)))))
        rows.append(columns.row(*place, BEST, lambda m, run: percent(run.best)))
        rows.append(columns.row(*place, CHOSEN, lambda m, run: percent(run.chosen)))
    return tuple(rows)


def _no_rank(cell: Cell) -> Cell:
    return replace(cell, rank=None)  # the row says it


def _differences(columns: _Columns) -> tuple[Row, ...]:
    rows = []
    for grid, model, data in columns.places:
        new = grid.runs.get((model, data, NEW))
        if new is None:
            continue
        for rank in new.ranks:
            rows.append(columns.row(grid, model, data, str(rank), lambda m, run, n=new, b=rank: _same_rank(n, run, b)))
        for label in (BEST, CHOSEN):
            rows.append(columns.row(grid, model, data, label, lambda m, run, n=new, at=label: _to_own(m, n, run, at)))
    return tuple(rows)


def _same_rank(new: Run, run: Run, rank: int) -> Cell:
    """`new` minus `run` at one rank, marked where it is not zero after correction for the number of ranks."""
    frames = new.minus_at_same_rank(run) if run.records[0].cell["method"] != NEW else []
    if not frames or rank not in frames[0]:
        return Cell()
    corrected = dict(zip(sorted(frames[0]), holm(p_values(frames, run.how, support=DIFFERENCE)), strict=True))
    cell = _no_rank(points(mean_at(frames, rank, run.how, support=DIFFERENCE)))
    return replace(cell, mark="*" if corrected[rank] < LEVEL else "")


def _to_own(method: str, new: Run, run: Run, label: str) -> Cell:
    """`new` at a selected rank minus a static method at the rank it was trained at."""
    frames = new.minus(run) if method in STATIC else []
    if not frames or (label == CHOSEN and new.chosen is None):
        return Cell()
    if label == BEST:
        return points(best_of_ranks(frames, run.how, support=DIFFERENCE))
    return points(mean_at(frames, new.chosen.rank, run.how, support=DIFFERENCE))


def _optimism(columns: _Columns) -> tuple[Row, ...]:
    def gap(method: str, run: Run) -> Cell:
        return Cell(100 * run.chosen.optimism) if run.chosen else Cell()

    rows = []
    for place in columns.places:
        rows.append(columns.row(*place, "best - by val.", gap))
        rows.append(columns.row(*place, "bootstrap", lambda m, run: Cell(100 * run.best.bias)))
    return tuple(rows)


def _heldout(columns: _Columns) -> tuple[Row, ...]:
    rows = []
    for place in columns.places:
        for rank in columns.ranks(*place):
            rows.append(columns.row(*place, str(rank), lambda m, run, b=rank: mean_score(run.heldout.get(b, []))))
    return tuple(rows)


def _published(columns: _Columns, published: pd.DataFrame) -> list[Block]:
    """The paper's cells of these data sets, of its own models, one block a source."""
    blocks = []
    for source, rows in published.groupby("source"):
        lines = []
        for (model, data), group in rows.groupby(["model", "task"], sort=False):
            found = {(row.method, row.rank): row for row in group.itertuples()}
            for rank in sorted(group["rank"].unique()):
                printed = (found.get((method, rank)) for method in columns.methods)
                cells = tuple(_printed(row) for row in printed)
                lines.append(Row((model, DATA_NAMES.get(data, data), str(rank)), cells))
        blocks.append(Block(f"Published, not run here: {source}, percent", tuple(lines)))
    return blocks


def _printed(row) -> Cell:
    if row is None:
        return Cell()
    return Cell(text="OOM") if row.status == "oom" else Cell(row.value, digits=2)
