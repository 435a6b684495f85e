"""A table as data, and its three renderings. Knows nothing of ranks' meaning, methods or records."""

import csv
import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

LATEX = {letter: "\\" + letter for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
}


@dataclass(frozen=True)
class Cell:
    """A number with its rank in brackets and its interval, or ± one standard error, and a mark; or a text instead.

    An empty cell is one that was not run. Numbers are in the unit that the block's title names.
    """

    value: float | None = None
    rank: int | None = None
    low: float | None = None
    high: float | None = None
    error: float | None = None
    text: str = ""
    digits: int = 1
    signed: bool = False
    mark: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return self.text
        parts = [self._number(self.value)]
        if self.rank is not None:
            parts.append(f"({self.rank})")
        if self.low is not None and self.high is not None and not math.isnan(self.low + self.high):
            parts.append(f"[{self._number(self.low)}, {self._number(self.high)}]")
        if self.error is not None:
            parts.append(f"± {self.error:.{self.digits}f}")
        return " ".join(parts) + self.mark

    def _number(self, number: float) -> str:
        rounded = round(number, self.digits) + 0.0  # + 0.0 turns -0.0 into 0.0
        return f"{rounded:{'+' if self.signed else ''}.{self.digits}f}"


@dataclass(frozen=True)
class Row:
    labels: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Block:
    """Rows under one heading, which names what the numbers are and their unit."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """`header` names the label columns, then the data columns; all blocks share them."""

    title: str
    header: tuple[str, ...]
    blocks: tuple[Block, ...]
    footnotes: tuple[str, ...]

    def __post_init__(self) -> None:
        for block in self.blocks:
            for row in block.rows:
                if len(row.labels) + len(row.cells) != len(self.header):
                    raise ValueError(f"row {row.labels} of {block.title!r} does not fit {self.header}")

    def _repr_markdown_(self) -> str:
        """How a notebook shows it."""
        return to_markdown(self)


def to_markdown(table: Table) -> str:
    """Aligned for the terminal: all blocks have the same column widths; a repeated label is left out."""
    grids = [[[_pipes(text) for text in line] for line in _texts(block.rows)] for block in table.blocks]
    header = [_pipes(text) for text in table.header]
    lines = [header, *(line for grid in grids for line in grid)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    out = [f"## {table.title}", ""]
    for block, grid in zip(table.blocks, grids, strict=True):
        out += [f"**{block.title}**", "", _markdown_line(header, widths)]
        out += [_markdown_line(["-" * width for width in widths], widths)]
        out += [*(_markdown_line(line, widths) for line in grid), ""]
    for note in table.footnotes:
        out += textwrap.wrap(note, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(out) + "\n"


def to_latex(table: Table) -> str:
    """A `table*` with booktabs rules; the footnotes follow in small print. Needs \\usepackage{booktabs}."""
    width = len(table.header)
    out = [
        r"\begin{table*}", r"\centering", r"\small", rf"\caption{{{_latex(table.title)}}}",
        rf"\begin{{tabular}}{{{'l' * width}}}", r"\toprule", _latex_line(table.header),
    ]  # fmt: skip
    for block in table.blocks:
        out += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{_latex(block.title)}}}}} \\"]
        out += [_latex_line(line) for line in _texts(block.rows)]
    out += [r"\bottomrule", r"\end{tabular}", "", r"\begin{minipage}{\linewidth}\footnotesize"]
    out += [_latex(note) + r"\par" for note in table.footnotes]
    return "\n".join([*out, r"\end{minipage}", r"\end{table*}"]) + "\n"


def to_csv(table: Table) -> str:
    """One line per cell that holds anything, numbers unrounded to 6 digits: for machines."""
    labels = len(table.blocks[0].rows[0].labels) if table.blocks and table.blocks[0].rows else 0
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    numbers = ("value", "rank", "low", "high", "error")
    writer.writerow(["block", *table.header[:labels], "column", "text", *numbers])
    for block in table.blocks:
        for row in block.rows:
            for column, cell in zip(table.header[labels:], row.cells, strict=True):
                if str(cell):
                    found = [getattr(cell, name) for name in numbers]
                    plain = ["" if number is None else f"{number:.6g}" for number in found]
                    writer.writerow([block.title, *row.labels, column, str(cell), *plain])
    return stream.getvalue()


def repeated(labels: Sequence[str], above: Sequence[str]) -> int:
    """How many labels, from the left, are those of the row above; the last one never counts."""
    same = 0
    while same < len(labels) - 1 and labels[: same + 1] == above[: same + 1]:
        same += 1
    return same


def _texts(rows: Sequence[Row]) -> list[list[str]]:
    """Rows as texts; a label is dropped where it and all to its left repeat the row above."""
    lines, above = [], ()
    for row in rows:
        same = repeated(row.labels, above)
        lines.append([*[""] * same, *row.labels[same:], *map(str, row.cells)])
        above = row.labels
    return lines


def _pipes(text: str) -> str:
    return text.replace("|", r"\|")


def _markdown_line(texts: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)) + " |"


def _latex(text: str) -> str:
    text = "".join(LATEX.get(letter, letter) for letter in text)
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", text)  # a minus sign, not a hyphen


def _latex_line(texts: Sequence[str]) -> str:
    return " & ".join(_latex(text) for text in texts) + r" \\"
