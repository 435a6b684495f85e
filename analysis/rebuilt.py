"""A cell that was run again beside the one that was kept:  python -m analysis.rebuilt KEPT AGAIN

Both are folders of cells, such as experiments/results/small/rivals; cells that only one of them holds are left out.
"""

import sys
from pathlib import Path

from analysis.layout import Block, Cell, Row, Table, to_markdown
from analysis.records import Record, frame, load

ONE = ["name", "task", "split", "rank"]


def rebuilt(kept: list[Record], again: list[Record]) -> Table:
    """The largest difference of each score of the cells in both, over their ranks. ValueError if there is none, or if
    one was run with another configuration or other data."""
    pairs = [(a, b) for a in kept for b in again if a.name == b.name and a.done and b.done]
    if not pairs:
        raise ValueError("no finished cell is in both folders; run one of the kept cells again first")
    for a, b in pairs:
        for what in ("digest", "data"):
            if a.raw[what] != b.raw[what]:
                raise ValueError(f"{a.folder} and {b.folder} differ in {what}, so their scores may too")
    first, second = (frame(side)[[*ONE, "value"]].fillna({"rank": 0}) for side in zip(*pairs, strict=True))
    both = first.merge(second, on=ONE, suffixes=("", "_again"), validate="one_to_one")
    both["difference"] = (both.value - both.value_again).abs()
    rows = [
        Row((name, task, split), (Cell(text=str(len(at))), Cell(text=f"{at.difference.max():.2g}")))
        for (name, task, split), at in both.groupby(["name", "task", "split"])
    ]
    header = ("cell", "task", "split", "scores", "largest difference")
    machines = dict.fromkeys(_where(record) for pair in pairs for record in pair)
    title = "Scores of the same configuration and data, in the metric's own unit (losses in nats a token)"
    return Table("Run again", header, (Block(title, tuple(rows)),), tuple(machines))


def _where(record: Record) -> str:
    raw = record.raw
    machine = f"{raw['machine']['cpu']}, {raw['machine']['threads']} threads, computing in {raw['compute_dtype']}"
    return f"{record.folder}: {machine}, commit {raw['commit']}"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m analysis.rebuilt KEPT AGAIN, two folders of cells")
    try:
        print(to_markdown(rebuilt(*(load(Path(folder)) for folder in sys.argv[1:]))))
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
