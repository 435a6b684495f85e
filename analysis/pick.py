"""The smallest rank of an adapter that is good enough: within a distance of the best, on validation items."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.curves import METRICS
from analysis.grid import DATA_NAMES
from analysis.layout import Block, Cell, Row, Table
from analysis.records import Record, heldout_items, items
from analysis.stats import DEFAULT, DIFFERENCE, REAL, UNIT, Bootstrap, Estimate, choose_rank, mean_at, paired

HELDOUT = "heldout"
MIB = 1 << 20


@dataclass(frozen=True)
class Distance:
    """How far from the best a score may be: a share of it, or a number in the score's unit (points, BLEU, nats)."""

    value: float
    share: bool

    @classmethod
    def parse(cls, text: str | float) -> "Distance":
        """`1%` or `0.5`. ValueError for anything else."""
        number = str(text).strip()
        try:
            found = cls(float(number.removesuffix("%")), number.endswith("%"))
        except ValueError:
            found = None
        if found is None or not 0 <= found.value < np.inf:
            raise ValueError(f"within is {text!r}; give a share of the best score (1%) or a number in its unit (0.5)")
        return found

    def of(self, best: float) -> float:
        return abs(best) * self.value / 100 if self.share else self.value

    def __str__(self) -> str:
        return f"{self.value:g}%" if self.share else f"{self.value:g}"


@dataclass(frozen=True)
class Outcomes:
    """What a cell's ranks are compared by: items x ranks that choose, and items that had no part in it (None for the
    held-out loss, which has one set). Scores are shown times `unit`."""

    name: str
    items: str
    choosing: pd.DataFrame
    test: pd.DataFrame | None
    higher_is_better: bool
    support: tuple[float, float]
    unit: float

    @property
    def digits(self) -> int:
        return 1 if self.unit == 100 else 3

    def shown(self, estimate: Estimate, *, signed: bool = False) -> Cell:
        value, low, high = (self.unit * number for number in (estimate.value, estimate.low, estimate.high))
        return Cell(value, low=low, high=high, digits=self.digits, signed=signed)


@dataclass(frozen=True)
class Pick:
    """rank: the smallest within `distance` of the best."""

    record: Record
    outcomes: Outcomes
    distance: Distance
    best: int
    rank: int
    how: Bootstrap

    @property
    def ranks(self) -> list[int]:
        return sorted(self.outcomes.choosing.columns)

    def score(self, rank: int) -> Estimate:
        o = self.outcomes
        return mean_at([o.choosing], rank, self.how, support=o.support)

    def behind(self, rank: int, frame: pd.DataFrame) -> Estimate:
        """The score at a rank minus that at the best, paired by item."""
        support = REAL if self.outcomes.support == REAL else DIFFERENCE
        return mean_at([paired(frame, frame, self.best)], rank, self.how, support=support)

    def size(self, rank: int) -> float | None:
        """Bytes of the adapter at a rank, which grow with it; None where the record does not know."""
        return next((size * rank / known for known, size in self.record.adapter_bytes.items()), None)


def pick(record: Record, distance: Distance, on: str | None = None, how: Bootstrap = DEFAULT) -> Pick:
    """The smallest rank within `distance` of the best, by a benchmark's validation items or, `on` "heldout", by the
    held-out loss. By default the record's first benchmark. ValueError for one that was not scored."""
    outcomes = _outcomes(record, on or next(iter(record.tasks), HELDOUT))
    best = choose_rank([outcomes.choosing], higher_is_better=outcomes.higher_is_better)
    means = outcomes.choosing.mean() * outcomes.unit
    behind = (means[best] - means) * (1 if outcomes.higher_is_better else -1)
    near = behind.index[
        behind <= distance.of(means[best]) + 1e-9
    ]  # equal means of fractions may differ in the last bit
    return Pick(record, outcomes, distance, best, int(min(near)), how)


def _outcomes(record: Record, on: str) -> Outcomes:
    if on == HELDOUT:
        frame = heldout_items(record)
        return Outcomes("held-out loss, nats a token", f"{len(frame)} held-out items", frame, None, False, REAL, 1)
    if record.split(on, "validation") is None:
        scored = ", ".join([*record.tasks, HELDOUT])
        raise ValueError(f"on is {on!r}, which {record.name} was not scored on; choose one of {scored}")
    about = record.tasks[on]
    metric = METRICS.get(about["metric"], about["metric"])
    frame, test = items(record, on, "validation"), items(record, on, "test")
    name = f"{DATA_NAMES.get(on, on.upper())} {metric}"
    return Outcomes(name, f"{len(frame)} validation items", frame, test, about["higher_is_better"], UNIT, 100)


def sentence(picked: Pick) -> str:
    """Which rank, by what, how far it is behind the best, and what it saves."""
    o, best, cut = picked.outcomes, picked.best, picked.record.cell["method"].partition(":")[2]
    top = f"{o.unit * picked.score(best).value:.{o.digits}f}"
    way = f", cut: {cut}" if cut else ""
    among = f"of {', '.join(map(str, picked.ranks))} on the {o.items} ({o.name}{way}"
    if picked.rank == best:
        return f"Rank {best} is the best {among}: {top}).{_saved(picked)}"
    behind = f"{o.shown(picked.behind(picked.rank, o.choosing), signed=True)}"
    return (
        f"Rank {picked.rank} is the smallest {among}) within {picked.distance} of the best, {top} at rank {best}; "
        f"paired by item it is {behind}.{_saved(picked)}"
    )


def _saved(picked: Pick) -> str:
    r_max = picked.record.r_max
    size, whole = picked.size(picked.rank), picked.size(r_max)
    if size is None or picked.rank == r_max:
        return ""
    return (
        f" Its adapter takes {size / MIB:.3g} MiB, at rank {r_max} it is {whole / MIB:.3g}: "
        f"{1 - size / whole:.0%} saved."
    )


def table(picked: Pick) -> Table:
    """Every rank's score, and how far it is behind the best, paired by item."""
    o = picked.outcomes
    frames = [o.choosing] if o.test is None else [o.choosing, o.test]
    marks = {picked.best: "best", picked.rank: "picked"}
    rows = []
    for rank in picked.ranks:
        behind = [Cell() if rank == picked.best else o.shown(picked.behind(rank, f), signed=True) for f in frames]
        size = picked.size(rank)
        size_cell = Cell() if size is None else Cell(size / MIB, digits=2)
        rows.append(
            Row((str(rank),), (o.shown(picked.score(rank)), *behind, size_cell, Cell(text=marks.get(rank, ""))))
        )
    minus = f"minus rank {picked.best}'s"
    header = ("rank", "score", *[minus, f"on test, {minus}"][: len(frames)], "adapter, MiB", "")
    notes = ["Brackets: 95% bootstrap intervals over items, differences paired by item, one training seed."]
    if o.test is not None:
        notes.append("Test items had no part in the choice.")
    return Table(picked.record.name, header, (Block(f"{o.name}, on {o.items}", tuple(rows)),), tuple(notes))
