"""One static page for a scale - claims, tables, figures, budgets, provenance:  python -m analysis.report outputs/mini

Writes <folder>/report.html, which needs no server and loads nothing: styles and figures are part of it. Every text
from a record is escaped.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from tqdm import tqdm

from analysis.claims import Claim
from analysis.cli import command
from analysis.contents import claims_of, states, summary, tables_of, write_page
from analysis.figures import Picture, comparisons, of_cells
from analysis.layout import repeated
from analysis.notes import amounts
from analysis.records import Record, cells, records_of, tables
from analysis.stats import DEFAULT, Bootstrap
from analysis.style import inline, svg

GIB = 2**30
MOST_CURVES = 24  # cells whose curves of training a page still holds: 50 KiB each
LISTS = (
    ("budgets", "Budgets", "What each cell was asked to spend, and spent."),
    ("cells", "Cells", "How each cell ended, and what made it."),
    ("data", "Training data", "As each data set was read; all cells of one data set share it."),
    ("software", "Software and machines", "Of the records above."),
)


def report(folder: Path, claims: Sequence[Claim] | str, how: Bootstrap = DEFAULT) -> str:
    """The page of all records, logs and forecasts under `folder` (outputs/<scale>), with the claims or the reason why
    they are not decided.

    Raises FileNotFoundError if there is no such folder, ValueError that names a broken record.
    """
    records = records_of(folder)
    rows = {"budgets": _budgets, "cells": _cells, "data": _data, "software": _software}
    lists = [(anchor, name, caption, *rows[anchor](folder, records)) for anchor, name, caption in LISTS]
    sections = [("claims", "Claims"), ("figures", "Figures"), ("curves", "Curves of training"), ("tables", "Tables")]
    page = _environment().get_template("report.html")
    return page.render(
        title=f"QDyLoRA at scale {folder.resolve().name}",
        summary=summary(folder, records),
        sections=sections + [(anchor, name) for anchor, name, _ in LISTS],
        claims=claims,
        tables=tables_of(folder, records),
        kinds=_by_kind(comparisons(folder, how)),
        curves=_curves(folder),
        lists=lists,
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.globals["repeated"] = repeated
    environment.filters["effect"] = _effect
    return environment


def _effect(claim: Claim) -> str:
    """A claim's effect with its interval; blank if there is none."""
    if claim.effect is None:
        return ""
    return f"{claim.effect:+.3g}" + (" [{:+.3g}, {:+.3g}]".format(*claim.interval) if claim.interval else "")


def _curves(folder: Path) -> list[tuple[str, list[dict]]] | str:
    """The curves of every cell's training, or where they are if they are too many for a page."""
    count = sum(len(cells(table)) for table in tables(folder))
    if count > MOST_CURVES:
        return f"Those of {count} cells are too many for one page. They are files: python -m analysis.figures {folder}"
    return _by_kind(of_cells(folder))


def _by_kind(pictures: Iterator[Picture]) -> list[tuple[str, list[dict]]]:
    """The pictures by kind, in the order in which the kinds first come."""
    shown: dict[str, list[dict]] = {}
    for picture in tqdm(pictures, desc="figures", unit="figure", leave=False, disable=None):
        drawn = Markup(inline(svg(picture.figure, picture.name)))
        shown.setdefault(picture.kind, []).append(
            {"title": picture.title, "alt": picture.alt, "svg": drawn, "wide": picture.wide}
        )
    return list(shown.items())


def _budgets(folder: Path, records: Sequence[Record]) -> tuple[tuple[str, ...], list[tuple]]:
    header = ("cell", "table", "asked", "spent", "training, s", "peak memory, GiB")
    rows = []
    for record in records:
        budget, memory = record.raw["budget"], record.raw.get("peak_memory_bytes")
        spent = budget.get("spent") or {}
        peak = "" if memory is None else f"{memory / GIB:.2f}"
        amount = amounts([budget["asked"]]), amounts([spent])
        rows.append((record.name, record.cell["table"], *amount, spent.get("seconds", ""), peak))
    return header, rows


def _cells(folder: Path, records: Sequence[Record]) -> tuple[tuple[str, ...], list[tuple]]:
    header = ("cell", "table", "status", "reason", "seed", "commit", "configuration", "data (sha256)", "machine")
    known = {record.folder: record.raw for record in records}
    rows = []
    for cell, status in states(folder, records):
        raw = known.get(cell, {})
        about = raw.get("reason") or "", raw.get("cell", {}).get("seed", ""), (raw.get("commit") or "")[:12]
        data = ((raw.get("data") or {}).get("sha256") or "")[:12]
        rows.append((cell.name, cell.parent.name, status, *about, raw.get("digest", ""), data, _machine(raw)))
    return header, rows


def _machine(raw: dict) -> str:
    machine = raw.get("machine") or {}
    return ", ".join(machine.get("gpus") or [f"{machine['cpu']}, {machine['threads']} threads"] if machine else [])


def _data(folder: Path, records: Sequence[Record]) -> tuple[tuple[str, ...], list[tuple]]:
    keys = ("name", "source", "rows", "train", "held_out", "duplicates", "truncated", "sha256")
    found = [record.raw["data"] for record in records if record.raw.get("data")]
    return keys, list(dict.fromkeys(tuple(data.get(key, "") for key in keys) for data in found))


def _software(folder: Path, records: Sequence[Record]) -> tuple[tuple[str, ...], list[tuple]]:
    pairs = [pair for record in records for pair in (record.raw.get("versions") or {}).items()]
    pairs += [("commit", record.raw["commit"]) for record in records if record.raw.get("commit")]
    pairs += [("machine", text) for record in records if (text := _machine(record.raw))]
    pairs += [("system", record.raw["machine"]["system"]) for record in records if record.raw.get("machine")]
    counts = sorted(Counter(pairs).items())
    rows = [
        (name, ", ".join(str(value) for (_, value), _ in group)) for name, group in groupby(counts, lambda x: x[0][0])
    ]
    return ("what", "version"), rows


def main(folder: Path) -> None:
    print(write_page(folder / "report.html", report(folder, claims_of(folder, records_of(folder)))))


if __name__ == "__main__":
    command(main)
