"""The semi-sorted study: how sorted the ranks are, and what the budget and the draw change about it."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from analysis.grid import DATA_NAMES, Run, key
from analysis.layout import Block, Cell, Row, Table
from analysis.notes import missing_models, protocol, scope
from analysis.order import Change, Measure, Order, change, order
from analysis.records import Record, check_comparable, check_same_tasks, heldout_items
from analysis.stats import DEFAULT, REAL, UNIT, Bootstrap

DRAWS = {"qdylora": "uniform 1..64", "qdylora-powers": "powers of two", "qdylora-geometric": "geometric, p = 0.15"}
COLUMNS = ("pairs out of order", "beyond noise", "best rank", "AURAC, linear", "AURAC, log2")


@dataclass(frozen=True)
class Curve:
    """Score against rank of one (model, data, draw, steps): the finished records of its seeds."""

    records: tuple[Record, ...]
    how: Bootstrap

    @cached_property
    def score(self) -> tuple[list[pd.DataFrame], dict]:
        """Benchmark outcomes by seed, and how `order` is to read them."""
        run = Run(self.records, key(self.records[0].cell["data"]), self.how)
        return [*run.test.values()], {"higher_is_better": True, "support": UNIT}

    @cached_property
    def loss(self) -> tuple[list[pd.DataFrame], dict]:
        """Held-out loss by seed."""
        return [heldout_items(record) for record in self.records], {"higher_is_better": False, "support": REAL}

    @property
    def seeds(self) -> list[int]:
        return [record.cell["seed"] for record in self.records]


Reading = Callable[[Curve], tuple[list[pd.DataFrame], dict]]
READINGS: dict[str, Reading] = {"score": lambda curve: curve.score, "held-out loss": lambda curve: curve.loss}


class Study:
    """All curves of the study by (model, data) and (method, steps). ValueError for records that may not be compared."""

    def __init__(self, records: Sequence[Record], how: Bootstrap = DEFAULT) -> None:
        check_same_tasks(records)
        by_steps: dict[int, list[Record]] = defaultdict(list)
        found: dict[tuple, dict[tuple, list[Record]]] = defaultdict(lambda: defaultdict(list))
        for record in records:
            by_steps[steps_of(record)].append(record)
            if record.done:
                place = record.cell["model"], key(record.cell["data"])
                found[place][record.cell["method"], steps_of(record)].append(record)
        for group in by_steps.values():
            check_comparable(group)
        self.how = how
        self.curves = {
            place: {
                at: Curve(tuple(sorted(some, key=lambda r: r.cell["seed"])), how) for at, some in sorted(cells.items())
            }
            for place, cells in sorted(found.items())
        }

    def orders(self, reading: Reading) -> Iterator[tuple[tuple, str, int, Order]]:
        """(model, data), method, steps and the measures of every curve."""
        for place, curves in self.curves.items():
            for (method, steps), curve in _in_order(curves):
                frames, how_read = reading(curve)
                yield place, method, steps, order(frames, self.how, **how_read)

    def orders_of(self, curve: Curve) -> Iterator[tuple[Order, ...]]:
        """One curve's measures by every reading: the score, the held-out loss."""
        readings = (reading(curve) for reading in READINGS.values())
        yield tuple(order(frames, self.how, **how_read) for frames, how_read in readings)

    def change(self, place: tuple, new: tuple, base: tuple, reading: Reading) -> Change | None:
        """The measures of curve `new` (method, steps) minus those of `base`; None unless both ran, seed by seed."""
        curves = self.curves[place]
        if new not in curves or base not in curves or curves[new].seeds != curves[base].seeds:
            return None
        (frames, how_read), (other, _) = reading(curves[new]), reading(curves[base])
        return change(frames, other, self.how, **how_read)

    def steps(self, place: tuple) -> list[int]:
        return sorted({steps for _, steps in self.curves[place]})

    def methods(self, place: tuple) -> list[str]:
        return list(dict.fromkeys(method for (method, _), _ in _in_order(self.curves[place])))


def steps_of(record: Record) -> int:
    return record.raw["budget"]["asked"]["steps"]


def _in_order(curves: dict[tuple, Curve]) -> list[tuple[tuple, Curve]]:
    known = list(DRAWS)
    return sorted(
        curves.items(),
        key=lambda at: (known.index(at[0][0]) if at[0][0] in known else len(known), at[0]),
    )


def semi_sorted(records: Sequence[Record], how: Bootstrap = DEFAULT) -> Table:
    """How sorted the ranks are by draw and budget, and the changes; by the benchmark's score and by held-out loss."""
    if not records:
        raise ValueError("no records, so no table")
    study = Study(records, how)
    blocks = []
    for what, reading in READINGS.items():
        unit, digits = (100, 1) if what == "score" else (1, 3)
        title = f"{what} (AURAC in {'percent' if unit == 100 else 'nats a token, lower is better'})"
        blocks += [
            Block(f"By {title}", _orders(study, reading, unit, digits)),
            Block(f"Change with the budget, by {title}", _by_budget(study, reading, unit, digits)),
            Block(f"Change with the draw, by {title}", _by_draw(study, reading, unit, digits)),
        ]
    shown = tuple(block for block in blocks if block.rows)
    lost = [f"{r.name}: {r.raw['status']}: {r.raw.get('reason')}" for r in records if not r.done]
    tasks = dict.fromkeys(key(record.cell["data"]) for record in records)
    notes = (*protocol(records, *tasks), *missing_models(records, ("falcon-40b",)), *_reading(how), *lost)
    return Table(
        f"Semi-sorted ranks ({scope(records)})", ("model", "data set", "draw", "steps", *COLUMNS), shown, notes
    )


def _orders(study: Study, reading: Reading, unit: float, digits: int) -> tuple[Row, ...]:
    rows = []
    for place, method, steps, found in study.orders(reading):
        cells = (
            Cell(text=f"{_cell(found.out_of_order, 1, 0)} of {found.pairs}"),
            Cell(found.beyond_noise, digits=0),
            _cell(found.best_rank, 1, 0),
            _cell(found.aurac_linear, unit, digits),
            _cell(found.aurac_log2, unit, digits),
        )
        rows.append(Row((*_labels(place), DRAWS.get(method, method), str(steps)), cells))
    return tuple(rows)


def _by_budget(study: Study, reading: Reading, unit: float, digits: int) -> tuple[Row, ...]:
    """Each larger budget minus the smallest."""
    rows = []
    for place in study.curves:
        least, *more = study.steps(place)
        for method in study.methods(place):
            for steps in more:
                found = study.change(place, (method, steps), (method, least), reading)
                rows += _change_row(
                    (*_labels(place), DRAWS.get(method, method), f"{steps} - {least}"), found, unit, digits
                )
    return tuple(rows)


def _by_draw(study: Study, reading: Reading, unit: float, digits: int) -> tuple[Row, ...]:
    """Each other draw minus the first."""
    rows = []
    for place in study.curves:
        first, *others = study.methods(place)
        for method in others:
            for steps in study.steps(place):
                found = study.change(place, (method, steps), (first, steps), reading)
                label = f"{DRAWS.get(method, method)} - {DRAWS.get(first, first).split()[0]}"
                rows += _change_row((*_labels(place), label, str(steps)), found, unit, digits)
    return tuple(rows)


def _change_row(labels: tuple[str, ...], found: Change | None, unit: float, digits: int) -> list[Row]:
    if found is None:
        return []
    cells = (
        _cell(found.out_of_order, 1, 0, signed=True),
        Cell(),
        _cell(found.log2_best_rank, 1, 1, signed=True),
        _cell(found.aurac_linear, unit, digits, signed=True),
        _cell(found.aurac_log2, unit, digits, signed=True),
    )
    return [Row(labels, cells)]


def _cell(measure: Measure, unit: float, digits: int, signed: bool = False) -> Cell:
    value, low, high = (unit * number for number in (measure.value, measure.low, measure.high))
    return Cell(value, low=low, high=high, digits=digits, signed=signed)


def _labels(place: tuple) -> tuple[str, str]:
    model, data = place
    return model, DATA_NAMES.get(data, data)


def _reading(how: Bootstrap) -> list[str]:
    return [
        "pairs out of order: pairs of ranks whose higher rank scores worse. beyond noise: those whose difference, "
        "paired by item, is not zero at the 5% level after Holm's correction for the number of pairs.",
        "AURAC: area under the score-rank curve by the trapezoid rule, over rank or log2 rank, divided by the width of "
        "the axis (the metric of MatryoshkaLoRA, arXiv 2605.07850).",
        "Changes: of the best rank, the difference of its log2; both curves are resampled together.",
        f"[low, high]: {100 * how.level:g}% interval, {how.resamples:,} bootstrap resamples of the items, seed "
        f"{how.seed}. Noise puts pairs out of order in resamples too, so that column's interval lies on the high side. "
        "With one training seed the intervals say nothing about another training run.",
    ]
