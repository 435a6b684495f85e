"""What a page of a scale's results says, whatever it looks like: its records, how its cells ended, tables, claims."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from analysis.claims import Claim, decided
from analysis.layout import Table
from analysis.records import Record, cells, tables
from analysis.settings import table4
from analysis.tables import TABLES


def claims_of(folder: Path, records: Sequence[Record]) -> list[Claim] | str:
    """The claims decided from the records and the forecasts beside `folder`, or why they are not."""
    return or_reason(decided, folder, records)


def summary(folder: Path, records: Sequence[Record]) -> str:
    """How many cells there are, how they ended, and of which models."""
    ends = Counter(status for _, status in states(folder, records))
    count = ", ".join(f"{number} {status}" for status, number in ends.most_common())
    models = ", ".join(dict.fromkeys(record.cell["model"] for record in records))
    return f"{ends.total()} cells: {count}. Models: {models}."


def states(folder: Path, records: Sequence[Record]) -> list[tuple[Path, str]]:
    """Every cell's folder with its status, also of cells that have not ended."""
    known = {record.folder: record.raw["status"] for record in records}
    return [(cell, known.get(cell, "not ended")) for table in tables(folder) for cell in cells(table)]


def tables_of(folder: Path, records: Sequence[Record]) -> list[tuple[str, Table | str]]:
    """Each table with its name, then their settings (Table 4); a refused one with the reason."""
    by_table = {name: some for name in TABLES if (some := [r for r in records if r.folder.parent == folder / name])}
    found = {name: or_reason(TABLES[name], some) for name, some in by_table.items()}
    if found:
        configs = {name: [record.raw["config"] for record in some] for name, some in by_table.items()}
        found["table4"] = or_reason(table4, configs)
    return sorted(found.items(), key=lambda item: (not item[0].startswith("table"), item[0]))


def or_reason(work: Callable[..., Any], *of: Any) -> Any:
    """What `work` makes of the records, or why it refuses them."""
    try:
        return work(*of)
    except ValueError as error:
        return str(error)
    except KeyError as error:
        return f"the records do not hold {error}"


def write_page(file: Path, text: str) -> Path:
    """Write the page so that a reader sees the old one or the new one; returns its path."""
    draft = file.with_name(f".{file.name}")
    draft.write_text(text, encoding="utf-8")
    return draft.replace(file)
