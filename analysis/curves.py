"""Records -> the curves that figures draw: a method's quality at each of its ranks, with its interval."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from analysis.grid import DATA_NAMES, METHODS, MODELS, STATIC, Run, key, mean_score, ordered
from analysis.notes import CHANCE
from analysis.records import Record
from analysis.stats import Bootstrap

Z = 1.96  # standard errors on either side, for 95%
METRICS = {"acc": "accuracy, %", "exact_match": "exact match, %", "bleu": "BLEU"}
Naming = Callable[[Record], str]


def label(method: str) -> str:
    """A method's name for readers."""
    if method in METHODS:
        return METHODS[method]
    variant, colon, cut = method.partition(":")  # of a table whose cells are variants, which have names of their own
    if at_rank := re.fullmatch(r"(\w+)-r(\d+)", variant):
        variant = f"{METHODS.get(at_rank[1], at_rank[1])} of rank {at_rank[2]}"
    return variant + METHODS.get(f"qlora:{cut}", cut).removeprefix("QLoRA") if colon else variant


@dataclass(frozen=True)
class Curve:
    """Quality at ascending ranks, in the unit of the panel, each with its 95% interval. name: of the method, or what
    else sets it apart from the other curves.

    own: the one rank it was trained at (below it, it is cut), or None if every rank was trained.
    adapter_bytes: rank -> bytes of the adapter there; memory_bytes: peak of training. Both as recorded, else empty.
    """

    name: str
    ranks: tuple[int, ...]
    values: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    own: int | None
    higher_is_better: bool
    adapter_bytes: dict[int, int]
    memory_bytes: float | None

    @property
    def label(self) -> str:
        return label(self.name)

    @property
    def marked(self) -> int:
        """Place of the rank that stands for the method: its own, else the best (of equals the smallest)."""
        if self.own in self.ranks:
            return self.ranks.index(self.own)
        best = max(self.values) if self.higher_is_better else min(self.values)
        return self.values.index(best)

    @property
    def trained(self) -> bool:
        """Whether a run of its own stands behind it, not another way to cut a trained adapter."""
        return ":" not in self.name

    def __str__(self) -> str:
        points = [f"{value:.3g} at rank {rank}" for rank, value in zip(self.ranks, self.values, strict=True)]
        if self.adapter_bytes:
            sizes = [self.adapter_bytes[rank] for rank in self.ranks]
            points = [f"{point} ({size / 2**20:.2g} MiB)" for point, size in zip(points, sizes, strict=True)]
        memory = f"; peak memory {self.memory_bytes / 2**30:.2f} GiB" if self.memory_bytes and self.trained else ""
        return f"{self.label}: {', '.join(points)}{memory}"


@dataclass(frozen=True)
class Panel:
    """Curves that may be compared: of one table, model, data set and measure (a task, or held-out loss).

    shared: what else they have in common, their budget or their method. level: a horizontal line (value, what it is),
    or None. lost: the cells that have no result, and why.
    """

    table: str
    model: str
    data: str
    shared: str
    measure: str
    quantity: str
    curves: tuple[Curve, ...]
    level: tuple[float, str] | None
    lost: tuple[str, ...]

    @property
    def name(self) -> str:
        parts = (self.table, self.model, key(self.data), self.shared.replace(" ", "-"), self.measure)
        return "--".join(parts)

    @property
    def title(self) -> str:
        return f"{self.model}, {DATA_NAMES.get(key(self.data), self.data)}, {self.shared}"


def panels(records: Sequence[Record], how: Bootstrap) -> list[Panel]:
    """The methods against each other: a panel for every measure of each (model, data set, budget) with a result."""
    return _panels(records, how, shared=_steps, apart=lambda record: record.cell["method"])


def budget_panels(records: Sequence[Record], how: Bootstrap) -> list[Panel]:
    """The budgets against each other, for every method that ran with several."""
    found = _panels(records, how, shared=lambda record: label(record.cell["method"]), apart=_steps)
    return [panel for panel in found if len(panel.curves) > 1]


def _steps(record: Record) -> str:
    return f"{record.raw['budget']['asked']['steps']} steps"


def _panels(records: Sequence[Record], how: Bootstrap, shared: Naming, apart: Naming) -> list[Panel]:
    """A panel for each (model, data, `shared` of the record) and measure; in it a curve for each `apart`."""
    views = [view for record in records for view in (record, *map(record.cut, record.cuts))]
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in views:
        groups[record.cell["table"], record.cell["model"], record.cell["data"], shared(record)].append(record)
    known = ((), MODELS, tuple(DATA_NAMES), sorted({place[3] for place in groups}, key=_natural))
    orders = [ordered({place[i] for place in groups}, names) for i, names in enumerate(known)]
    return [
        _panel(place, measure, group, how, apart)
        for place in product(*orders)
        if (group := groups.get(place))
        for measure in (*sorted({task for record in group if record.done for task in record.tasks}), "heldout")
        if any(record.done for record in group)
    ]


def _natural(name: str) -> tuple:
    """8 steps before 16 steps."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _panel(place: tuple, measure: str, group: Sequence[Record], how: Bootstrap, apart: Naming) -> Panel:
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(group, key=lambda record: record.cell["seed"]):
        if record.done and (measure == "heldout" or record.split(measure, "test")):
            runs[apart(record)].append(record)
    draw = loss_curve if measure == "heldout" else score_curve
    order = [*METHODS, *sorted(runs, key=_natural)]
    curves = tuple(draw(name, Run(tuple(runs[name]), measure, how)) for name in sorted(runs, key=order.index))
    lost = {f"{r.name}: {r.raw.get('reason') or r.raw['status']}": None for r in group if not r.done}
    quantity = "held-out loss, nats a token"
    if measure != "heldout":
        metric = next(r.tasks[measure]["metric"] for found in runs.values() for r in found)
        quantity = f"{DATA_NAMES.get(measure, measure.upper())} {METRICS.get(metric, metric)}"
    level = (CHANCE[measure], "guessing") if measure in CHANCE else None
    if measure == "heldout":
        level = _untrained(group)
    return Panel(*place, measure, quantity, curves, level, tuple(lost))


def _untrained(group: Sequence[Record]) -> tuple[float, str] | None:
    """The held-out loss of the base, which all cells of a panel share."""
    losses = [record.raw["heldout"].get("untrained") for record in group if record.done]
    return (losses[0]["value"], "untrained") if losses[0] else None


def score_curve(name: str, run: Run) -> Curve:
    """A task's test score in percent at every rank that all seeds have."""
    found = [run.at(rank) for rank in run.ranks]
    triples = [(100 * one.value, 100 * one.low, 100 * one.high) for one in found]
    return _curve(name, run, run.ranks, triples, higher_is_better=run.records[0].tasks[run.task]["higher_is_better"])


def loss_curve(name: str, run: Run) -> Curve:
    """Held-out loss at every rank that all seeds have; the interval is 1.96 standard errors to either side."""
    cells = {rank: mean_score(scores) for rank, scores in run.heldout.items()}
    triples = [(cell.value, cell.value - Z * cell.error, cell.value + Z * cell.error) for cell in cells.values()]
    return _curve(name, run, list(cells), triples, higher_is_better=False)


def _curve(name: str, run: Run, ranks: list[int], triples: list[tuple], higher_is_better: bool) -> Curve:
    values, lows, highs = zip(*triples, strict=True)
    return Curve(
        name=name,
        ranks=tuple(ranks),
        values=values,
        lows=lows,
        highs=highs,
        own=run.own_rank if run.records[0].raw["config"]["method"]["name"] in STATIC else None,
        higher_is_better=higher_is_better,
        adapter_bytes=run.records[0].adapter_bytes,
        memory_bytes=_mean([record.raw.get("peak_memory_bytes") for record in run.records]),
    )


@dataclass(frozen=True)
class Updates:
    """How often each row 1..r_max of the adapter learned from a training example: as p_B says, and as counted.

    expected is empty where the record does not have it. Both are means over the method's cells.
    """

    method: str
    expected: tuple[float, ...]
    counted: tuple[float, ...]

    @property
    def label(self) -> str:
        return label(self.method)


def updates(records: Sequence[Record]) -> list[Updates]:
    """One a method, of the finished records that counted; they must share a table, a model and a budget."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.done and record.raw.get("updates"):
            groups[record.cell["method"]].append(record)
    return [
        Updates(method, _mean_rows(group, "expected_updates"), _mean_rows(group, "updates"))
        for method, group in sorted(groups.items())
    ]


def _mean_rows(group: Sequence[Record], name: str) -> tuple[float, ...]:
    lists = [record.raw.get(name) for record in group]
    return () if None in lists else tuple(sum(row) / len(row) for row in zip(*lists, strict=True))


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)
