"""A sweep over ranks: every cell trained at its own rank and scored there."""

from collections.abc import Sequence

from analysis.grid import DATA, METHODS, key
from analysis.layout import Block, Cell, Row, Table
from analysis.records import Record, check_comparable


def sweep(records: Sequence[Record]) -> Table:
    """Each cell's score at the rank it was trained with: rows model x data x method x seed, columns ranks.

    A rank's cell is blank if it was not run, OOM or failed if it ended so. Raises ValueError for no records, or records
    that may not be compared.
    """
    if not records:
        raise ValueError("no records, so no table")
    check_comparable(records)
    ranks = sorted({record.r_max for record in records})
    tasks = sorted({task for record in records for task in record.tasks})
    blocks = [Block("Held-out loss ± one standard error (lower is better)", _rows(records, ranks, None))]
    blocks += [Block(f"{task} ± one standard error", _rows(records, ranks, task)) for task in tasks]
    header = ("model", "data", "method", "seed", *(f"r = {b}" for b in ranks))
    note = "Every cell is a training run of its own, scored at the rank it was trained with."
    return Table(f"Ranks (scale {records[0].cell['scale']})", header, tuple(blocks), (note,))


def _rows(records: Sequence[Record], ranks: Sequence[int], task: str | None) -> tuple[Row, ...]:
    lines: dict[tuple, dict[int, Cell]] = {}
    for record in records:
        cell = record.cell
        method, data = METHODS.get(key(cell["method"]), cell["method"]), DATA.get(cell["data"], cell["data"])
        lines.setdefault((cell["model"], data, method, str(cell["seed"])), {})[record.r_max] = _score(record, task)
    return tuple(Row(labels, tuple(line.get(b, Cell()) for b in ranks)) for labels, line in sorted(lines.items()))


def _score(record: Record, task: str | None) -> Cell:
    if not record.done:
        return Cell(text={"oom": "OOM"}.get(record.raw["status"], record.raw["status"]))
    result = record.raw["heldout"] if task is None else record.split(task, "test")
    score = result["ranks"].get(str(record.r_max)) if result else None
    return Cell(score["value"], error=score["stderr"], digits=3) if score else Cell()
