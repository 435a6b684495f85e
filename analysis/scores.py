"""All scores of one record, a row a rank, for a model card."""

from collections.abc import Iterator

from analysis.grid import DATA_NAMES
from analysis.layout import Block, Cell, Row, Table
from analysis.records import Record

MIB = 1 << 20


def scores(record: Record) -> Table:
    """Every rank that was scored: held-out loss, the benchmarks' validation and test scores, the adapter's size."""
    splits = [(task, split) for task, about in record.tasks.items() for split in about["splits"]]
    header = ("rank", "held-out loss", *(f"{DATA_NAMES.get(t, t.upper())}, {split}" for t, split in splits), "MiB")
    loss = record.raw["heldout"]["ranks"]
    rows = []
    for rank in sorted(loss, key=int):
        size = record.adapter_bytes.get(int(rank))
        scores = [_percent(record, task, split, rank) for task, split in splits]
        numbers = (Cell(loss[rank]["value"], error=loss[rank]["stderr"], digits=3), *scores)
        rows.append(Row((rank,), (*numbers, Cell() if size is None else Cell(size / MIB, digits=2))))
    title = "Losses in nats a token, scores in percent, ± one standard error; the adapter's size"
    notes = tuple(_notes(record))
    return Table("Scores by rank", header, (Block(title, tuple(rows)),), notes)


def _percent(record: Record, task: str, split: str, rank: str) -> Cell:
    score, unit = record.split(task, split)["ranks"][rank], 100 / record.unit(task)
    return Cell(unit * score["value"], error=None if score["stderr"] is None else unit * score["stderr"])


def _notes(record: Record) -> Iterator[str]:
    for task, about in record.tasks.items():
        sizes = ", ".join(f"{result['n']} {split} items" for split, result in about["splits"].items())
        yield f"{task}: {about['metric']}, {about['num_fewshot']}-shot; {sizes}."
