"""The figures of a scale from its records and logs:  python -m analysis.figures outputs/mini

Writes <folder>/figures/*.svg and *.png.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from analysis import plots
from analysis.cli import command
from analysis.curves import Panel, budget_panels, panels, updates
from analysis.forecasts import forecasts
from analysis.records import Record, budget_of, cells, check_comparable, check_same_tasks, load, log, tables
from analysis.stats import DEFAULT, Bootstrap
from analysis.style import save, svg

WIDEST = 6  # inches, of a figure that fits a text column


@dataclass(frozen=True)
class Picture:
    """A figure with what a page needs to say of it. kind: its heading; alt: its content in words."""

    kind: str
    name: str
    title: str
    alt: str
    figure: Figure

    @property
    def wide(self) -> bool:
        """Whether it does not fit a text column."""
        return self.figure.get_figwidth() > WIDEST

    def _repr_svg_(self) -> str:
        """How a notebook shows it."""
        return svg(self.figure, self.name)


def pictures(folder: Path, how: Bootstrap = DEFAULT) -> Iterator[Picture]:
    """Every figure that the records, logs and forecasts under `folder` (outputs/<scale>) give."""
    yield from comparisons(folder, how)
    yield from of_cells(folder)


def comparisons(folder: Path, how: Bootstrap = DEFAULT) -> Iterator[Picture]:
    """The figures of records and forecasts, which show several cells each.

    Records of a table that may not be compared are drawn in no figure; standard error says why.
    """
    for table in tables(folder):
        try:
            yield from of_records(load(table), how)
        except ValueError as error:
            print(f"no figure of {table.name}: {error}", file=sys.stderr)
    yield from _of_forecasts(folder)


def of_records(records: Sequence[Record], how: Bootstrap = DEFAULT) -> Iterator[Picture]:
    """The figures of one table's records. ValueError for records that may not be compared."""
    check_same_tasks(records)
    budgets: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        budgets[budget_of(record)].append(record)
    for group in budgets.values():
        check_comparable(group)
    yield from _of_panels(panels(records, how))
    for one in budget_panels(records, how):
        yield _of_panel("Change with the budget", "budgets", one, plots.quality_against_rank(one))
    yield from _of_updates(records)


def _of_panels(found: Sequence[Panel]) -> Iterator[Picture]:
    for one in found:
        about = "Held-out loss" if one.measure == "heldout" else "Score"
        yield _of_panel(f"{about} against rank", "rank", one, plots.quality_against_rank(one))
    for one in found:
        if all(curve.adapter_bytes for curve in one.curves):
            yield _of_panel("Quality against adapter size", "size", one, plots.quality_against_size(one))
    for one in found:
        if any(curve.memory_bytes for curve in one.curves):
            yield _of_panel("Quality against memory", "memory", one, plots.quality_against_memory(one))


def _of_panel(kind: str, suffix: str, one: Panel, figure: Figure) -> Picture:
    title = f"{one.title}: {one.quantity.split(',')[0]}"
    lost = f" Without a result: {'; '.join(one.lost)}." if one.lost else ""
    return Picture(kind, f"{one.name}--{suffix}", title, f"{'. '.join(map(str, one.curves))}.{lost}", figure)


def _of_updates(records: Sequence[Record]) -> Iterator[Picture]:
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.cell["table"], record.cell["model"], record.raw["budget"]["asked"]["examples"]].append(record)
    for (table, model, examples), group in groups.items():
        if counts := updates(group):
            alt = "; ".join(f"{one.label}: row 1 {one.counted[0]:g}, last row {one.counted[-1]:g}" for one in counts)
            title = f"{model}, {examples} training examples"
            name = f"{table}--{model}--{examples}--updates"
            yield Picture(
                "Updates of each row", name, title, f"Examples learned from. {alt}.", plots.updates_of_rows(counts)
            )


def of_cells(folder: Path) -> Iterator[Picture]:
    """The curves of each cell's training, from its log: two or three figures a cell."""
    for cell in (cell for table in tables(folder) for cell in cells(table)):
        if lines := log(cell):
            name = f"{cell.parent.name}--{cell.name}"
            first, last = lines[0], lines[-1]
            alt = f"Training loss {first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at {last['step']}."
            yield Picture("Training", f"{name}--training", cell.name, alt, plots.training(lines))
            yield _of_resources(cell, lines)
            if seen := [line for line in lines if line.get("heldout")]:
                losses = ", ".join(f"{loss:.3f} at rank {rank}" for rank, loss in seen[-1]["heldout"].items())
                alt = f"Held-out loss at step {seen[-1]['step']}: {losses}."
                yield Picture(
                    "Held-out loss in training", f"{name}--heldout", cell.name, alt, plots.heldout_over_steps(seen)
                )


def _of_resources(cell: Path, lines: Sequence[dict]) -> Picture:
    speed = f"Median {median(line['tokens_per_second'] for line in lines):.0f} tokens a second."
    peaks = [line["peak_memory_bytes"] for line in lines if "peak_memory_bytes" in line]
    alt = f"{speed} Peak memory {max(peaks) / plots.GIB:.2f} GiB." if peaks else speed
    name = f"{cell.parent.name}--{cell.name}--resources"
    return Picture("Speed and memory of training", name, cell.name, alt, plots.resources(lines))


def _of_forecasts(folder: Path) -> Iterator[Picture]:
    scales: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    for one in forecasts(folder):
        scales[one.scale][one.label] = one.parts
    for scale, shown in scales.items():
        alt = "; ".join(f"{label}: {sum(parts.values()) / plots.GIB:.1f} GiB" for label, parts in shown.items())
        title = f"Forecast for scale {scale}, as configured"
        yield Picture("Memory by part", f"forecast--{scale}", title, f"{alt}.", plots.memory_by_part(shown))


def main(folder: Path) -> None:
    for picture in pictures(folder):
        print(save(picture.figure, picture.name, folder / "figures"))


if __name__ == "__main__":
    command(main)
