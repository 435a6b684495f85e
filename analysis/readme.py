"""A scale's results as the page that GitHub shows with their folder:  python -m analysis.readme outputs/mini

Writes <folder>/README.md - held-out loss against rank as pictures, claims, tables, what was spent - and the pictures'
files. All figures and every cell are in `analysis.report`.
"""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from analysis.claims import Claim, claims_table
from analysis.cli import command
from analysis.contents import claims_of, summary, tables_of, write_page
from analysis.figures import Picture, comparisons
from analysis.layout import Block, Cell, Row, Table, to_markdown
from analysis.plots import GIB
from analysis.records import Record, records_of
from analysis.style import save

SHOWN = ("Held-out loss against rank", "Change with the budget", "Memory by part")  # kinds of figures, in this order
NARROW, WIDE = 500, 800  # pixels


def readme(folder: Path, claims: Sequence[Claim] | str, files: Mapping[Picture, str]) -> str:
    """The page of all records under `folder` (outputs/<scale>), with the claims or why they are not decided, and with
    pictures, each in a file that lies below `folder`.

    Raises FileNotFoundError if there is no such folder, ValueError that names a broken record.
    """
    records, scale = records_of(folder), folder.resolve().name
    judged = claims if isinstance(claims, str) else claims_table(claims, scale)
    tables = [("Claims", judged), *tables_of(folder, records), ("Cost", _cost(records))]
    parts = [f"# Results at scale {scale}", summary(folder, records), *_gallery(files)]
    parts += [f"## {name}\n\nNot printed: {one}" if isinstance(one, str) else to_markdown(one) for name, one in tables]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _gallery(files: Mapping[Picture, str]) -> list[str]:
    parts = []
    for kind, pictures in groupby(sorted(files, key=lambda one: SHOWN.index(one.kind)), lambda one: one.kind):
        parts += [f"## {kind}", *(_figure(one, files[one]) for one in pictures)]
    return parts


def _figure(one: Picture, file: str) -> str:
    width = WIDE if one.wide else NARROW
    table = one.name.split("--")[0]
    return f'**{one.title}** ({table})\n\n<img src="{escape(file)}" alt="{escape(one.alt)}" width="{width}">'


def _cost(records: Sequence[Record]) -> Table:
    """What training took: hours are of the cells that were run, not of those taken over from another table."""
    rows = []
    for name, group in groupby(sorted(records, key=lambda one: one.cell["table"]), lambda one: one.cell["table"]):
        cells = list(group)
        run = [one.raw for one in cells if not one.raw.get("taken_over")]
        hours = sum((raw["budget"].get("spent") or {}).get("seconds", 0) for raw in run) / 3600
        peak = max((raw.get("peak_memory_bytes") or 0 for raw in run), default=0) / GIB
        rows.append(Row((name,), (_count(len(cells)), _count(len(run)), Cell(hours or None), Cell(peak or None))))
    header = ("table", "cells", "run, not taken over", "training, hours", "most memory, GiB")
    return Table("Cost of training", header, (Block("Scoring is not in it", tuple(rows)),), ())


def _count(number: int) -> Cell:
    return Cell(number, digits=0)


def main(folder: Path) -> None:
    pictures = [one for one in comparisons(folder) if one.kind in SHOWN]
    files = {one: save(one.figure, one.name, folder / "figures").with_suffix(".png") for one in pictures}
    names = {one: file.relative_to(folder).as_posix() for one, file in files.items()}
    print(write_page(folder / "README.md", readme(folder, claims_of(folder, records_of(folder)), names)))


if __name__ == "__main__":
    command(main)
