"""The rivals: adapters trained at one rank, and ways to have all ranks from one training, at every rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from analysis.grid import DATA_NAMES, METHODS, key, mean_score, ordered, percent, points
from analysis.grid import Run as Scores
from analysis.layout import Block, Cell, Row, Table
from analysis.notes import SEEDS, protocol, scope
from analysis.records import Record, check_comparable, heldout_items
from analysis.stats import DEFAULT, DIFFERENCE, REAL, Bootstrap, mean_at, paired

BASELINE, SVD = "qlora", "qlora:svd"
SEPARATE = "QLoRA, trained at each rank"
LOW = 8
#: Percent of QLoRA's held-out loss by which an adapter for all ranks may be worse than one trained at rank 8, at r_max.
ALLOWED_LOW, ALLOWED_TOP = 1.0, 0.5


@dataclass(frozen=True)
class Rival:
    """One method at one trained rank on one model and data set: its finished records, one a seed."""

    records: tuple[Record, ...]
    how: Bootstrap

    @cached_property
    def scores(self) -> Scores:
        return Scores(self.records, key(self.records[0].cell["data"]), self.how)

    @cached_property
    def losses(self) -> dict[int, pd.DataFrame]:
        """Seed -> held-out items x ranks."""
        return {record.cell["seed"]: heldout_items(record) for record in self.records}

    def loss(self, rank: int) -> Cell:
        return mean_score(self.scores.heldout.get(rank, []))

    def loss_over(self, other: "Rival", rank: int) -> Cell:
        """Held-out loss minus the other's at the same rank, in percent of the other's, paired by item."""
        shared = [seed for seed in self.losses if seed in other.losses]
        frames = [(self.losses[seed], other.losses[seed]) for seed in shared]
        if not frames or any(rank not in frame for pair in frames for frame in pair):
            return Cell()
        differences = [paired(mine[[rank]], theirs, rank) for mine, theirs in frames]
        whole = sum(theirs[rank].mean() for _, theirs in frames) / len(frames) / 100
        found = mean_at(differences, rank, self.how, support=REAL)
        return Cell(found.value / whole, low=found.low / whole, high=found.high / whole, digits=2, signed=True)

    def score_over(self, other: "Rival", rank: int) -> Cell:
        """The benchmark's score minus the other's at the same rank, in points, paired by item."""
        mine, theirs = self.scores.test, other.scores.test
        shared = [seed for seed in mine if seed in theirs]
        if not shared or rank not in self.scores.ranks or rank not in other.scores.ranks:
            return Cell()
        frames = [paired(mine[seed][[rank]], theirs[seed], rank) for seed in shared]
        return points(mean_at(frames, rank, self.how, support=DIFFERENCE))


class Field:
    """All rivals on one model and data set. `separate`: QLoRA by the rank it was trained at; `svd`: QLoRA cut by SVD,
    if it was."""

    def __init__(self, records: Sequence[Record], how: Bootstrap) -> None:
        found: dict[tuple[str, int], list[Record]] = {}
        every = [*records, *(record.cut(cut) for record in records for cut in record.cuts)]
        for record in sorted(every, key=lambda record: record.cell["seed"]):
            found.setdefault((_method(record), record.r_max), []).append(record)
        rivals = {at: Rival(tuple(some), how) for at, some in found.items()}
        self.separate = {rank: rival for (method, rank), rival in rivals.items() if method == BASELINE}
        names = ordered({method for method, _ in rivals}, list(METHODS))
        at_r_max = {name: rivals[name, max(rank for method, rank in rivals if method == name)] for name in names}
        self.svd = at_r_max.get(SVD)
        self.shared = {_name(name, rival): rival for name, rival in at_r_max.items()}
        self.ranks = sorted({rank for rival in rivals.values() for rank in rival.scores.heldout})


def rivals(records: Sequence[Record], how: Bootstrap = DEFAULT) -> Table:
    """Held-out loss and score of every rival at every rank, against QLoRA trained at that very rank; and who keeps
    within the loss allowed at rank 8 and at r_max. ValueError for no records, or records that may not be compared."""
    if not records:
        raise ValueError("no records, so no table")
    check_comparable(records)
    places: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.done:
            places.setdefault((record.cell["model"], key(record.cell["data"])), []).append(record)
    fields = {place: Field(some, how) for place, some in sorted(places.items())}
    ranks = sorted({rank for field in fields.values() for rank in field.ranks})
    blocks = [
        Block("Held-out loss ± one standard error (lower is better)", _rows(fields, ranks, _loss, with_separate=True)),
        Block("Held-out loss above that of QLoRA trained at the same rank, percent of it", _rows(fields, ranks, _over)),
        Block(
            f"Within {ALLOWED_LOW:g}% of QLoRA's held-out loss at rank {LOW} and {ALLOWED_TOP:g}% at r_max",
            _rows(fields, ranks, _verdict),
        ),
        Block("Held-out loss above that of QLoRA cut by SVD, percent of it", _rows(fields, ranks, _over_svd)),
        Block("Score, percent", _rows(fields, ranks, _score, with_separate=True)),
        Block("Score minus that of QLoRA trained at the same rank, points", _rows(fields, ranks, _score_over)),
    ]
    shown = tuple(block for block in blocks if any(str(cell) for row in block.rows for cell in row.cells))
    header = ("model", "data set", "method", *(f"rank {rank}" for rank in ranks))
    lost = [f"{r.name}: {r.raw['status']}: {r.raw.get('reason')}" for r in records if not r.done]
    tasks = dict.fromkeys(data for _, data in fields)
    return Table(f"Rivals ({scope(records)})", header, shown, (*protocol(records, *tasks), *_reading(how), *lost))


Show = Callable[[Field, Rival, int], Cell]


def _rows(fields: dict, ranks: Sequence[int], show: Show, with_separate: bool = False) -> tuple[Row, ...]:
    """A row a rival; `with_separate`, first one of QLoRA's runs, each at the rank it was trained at."""
    rows = []
    for (model, data), field in fields.items():
        labels = model, DATA_NAMES.get(data, data)
        if with_separate:
            own = (show(field, field.separate[rank], rank) if rank in field.separate else Cell() for rank in ranks)
            rows.append(Row((*labels, SEPARATE), tuple(own)))
        for name, rival in field.shared.items():
            rows.append(Row((*labels, name), tuple(show(field, rival, rank) for rank in ranks)))
    return tuple(rows)


def _loss(field: Field, rival: Rival, rank: int) -> Cell:
    return rival.loss(rank)


def _over(field: Field, rival: Rival, rank: int) -> Cell:
    return _compared(Rival.loss_over, rival, field.separate.get(rank), rank)


def _over_svd(field: Field, rival: Rival, rank: int) -> Cell:
    return _compared(Rival.loss_over, rival, field.svd, rank)


def _verdict(field: Field, rival: Rival, rank: int) -> Cell:
    """Shown at rank 8 and at the largest rank."""
    allowed = {LOW: ALLOWED_LOW, max(field.ranks): ALLOWED_TOP}.get(rank)
    over = _over(field, rival, rank)
    return Cell() if allowed is None or over.value is None else Cell(text=verdict(over, allowed))


def verdict(over: Cell, allowed: float) -> str:
    """Whether a loss that is `over` percent above another is within what is allowed; * if its whole interval is."""
    if over.value > allowed:
        return "missed"
    return "met*" if over.high <= allowed else "met"


def _score(field: Field, rival: Rival, rank: int) -> Cell:
    found = percent(rival.scores.at(rank))
    return Cell(found.value, low=found.low, high=found.high)


def _score_over(field: Field, rival: Rival, rank: int) -> Cell:
    return _compared(Rival.score_over, rival, field.separate.get(rank), rank)


def _compared(compare: Callable[[Rival, Rival, int], Cell], rival: Rival, other: Rival | None, rank: int) -> Cell:
    """Blank where there is nothing to compare with, or only the rival itself."""
    return Cell() if other is None or other is rival else compare(rival, other, rank)


def _method(record: Record) -> str:
    """The method's name, and after a colon the way its adapter was cut, if it is not plainly truncated."""
    _, colon, cut = record.cell["method"].partition(":")
    return record.raw["config"]["method"]["name"] + colon + cut


def _name(method: str, rival: Rival) -> str:
    name = METHODS.get(method, method)
    return f"{name} of rank {rival.scores.own_rank}, truncated" if method == BASELINE else name


def _reading(how: Bootstrap) -> list[str]:
    return [
        f"{SEPARATE}: each rank is a training run of its own; every other row is one run, used at the rank of the "
        "column. AdaLoRA has one rank: the average over its layers.",
        "met: the difference is within what the block's title allows; *: so is its whole interval.",
        f"[low, high]: {100 * how.level:g}% interval, {how.resamples:,} bootstrap resamples of the items, seed "
        f"{how.seed}. Differences are paired by item. {SEEDS}",
        "Blank: not run, or nothing to compare with.",
    ]
