"""Records sorted into the cells of a table (model x data x method, over their seeds) and what each scored."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from analysis.layout import Cell, Row
from analysis.records import Record, item_groups, items
from analysis.stats import (
    Best,
    Bootstrap,
    Chosen,
    Estimate,
    best_of_ranks,
    chosen_on_validation,
    mean_at,
    paired,
)

STATIC = ("lora", "qlora", "qlora-graded", "adalora")  # trained at one rank; a lower rank is a truncation
METHODS = {
    "lora": "LoRA",
    "dylora": "DyLoRA",
    "qlora": "QLoRA",
    "qlora:truncate_alpha_over_b": "QLoRA, alpha/b",
    "qlora:svd": "QLoRA, SVD",
    "qlora-graded": "QLoRA, graded rates",
    "qlora-graded:svd": "QLoRA, graded rates, SVD",
    "qdylora": "QDyLoRA",
    "qdylora-sequence": "QDyLoRA, rank per sequence",
    "qdylora-anchored": "QDyLoRA, anchored",
    "qdylora-anchored-sqrt": "QDyLoRA, anchored, alpha/sqrt(b)",
    "qdylora-mostly-full": "QDyLoRA, mostly r_max",
    "qdylora-ends": "QDyLoRA, r_max or rank 1",
    "qdylora-sorted": "QDyLoRA, sorted at 3/4",
    "qdylora-sqrt": "QDyLoRA, alpha/sqrt(b)",
    "qdylora-constant": "QDyLoRA, alpha/r",
    "qdylora-masked": "QDyLoRA, masked Adam",
    "matryoshka": "MatryoshkaLoRA",
    "adalora": "AdaLoRA",
}
DATA = {"alpaca": "Alpaca", "oasst1": "OASST1", "self_instruct": "Self-Instruct", "flan_v2": "FLAN-v2"}  # Table 1
DATA_NAMES = DATA | {"webglm": "WebGLM", "gsm8k": "GSM8K", "triviaqa": "TriviaQA"}
MODELS = ("llama-7b", "llama-13b", "llama2-13b", "falcon-40b")  # the paper's order


def key(name: str) -> str:
    """One spelling for a name that a cell or a CSV may write with - or with _."""
    return name.lower().replace("-", "_")


def ordered(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Known names in their order, then the others by alphabet."""
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


@dataclass(frozen=True)
class Run:
    """One model x data x method on one task: its finished records, one per seed, in order of the seed."""

    records: tuple[Record, ...]
    task: str
    how: Bootstrap

    @property
    def own_rank(self) -> int:
        return self.records[0].r_max

    @cached_property
    def test(self) -> dict[int, pd.DataFrame]:
        """Seed -> test items x ranks; nothing where the task was not scored."""
        scored = [record for record in self.records if record.split(self.task, "test")]
        return {record.cell["seed"]: self._agreeing_items(record) for record in scored}

    @property
    def ranks(self) -> list[int]:
        return list(next(iter(self.test.values()), pd.DataFrame()).columns)

    def at(self, rank: int) -> Estimate | None:
        """The score at a rank, None where it was not scored."""
        if rank not in self.ranks:
            return None
        return mean_at([*self.test.values()], rank, self.how)

    @cached_property
    def own(self) -> Estimate:
        return mean_at([*self.test.values()], self.own_rank, self.how)

    @cached_property
    def best(self) -> Best:
        return best_of_ranks([*self.test.values()], self.how)

    @cached_property
    def chosen(self) -> Chosen | None:
        """None unless every seed was scored on validation items."""
        if not all(record.split(self.task, "validation") for record in self.records):
            return None
        validation = [items(record, self.task, "validation") for record in self.records]
        return chosen_on_validation(validation, [*self.test.values()], self.how)

    @cached_property
    def groups(self) -> pd.Series | None:
        return item_groups(self.records[0], self.task, "test")

    def macro(self, rank: int) -> float | None:
        """Mean over groups of the group means, averaged over seeds; None if items have no groups."""
        if self.groups is None:
            return None
        return float(np.mean([test[rank].groupby(self.groups).mean().mean() for test in self.test.values()]))

    def minus(self, other: "Run") -> list[pd.DataFrame]:
        """Item by item, this run at each rank minus the other at its own; one frame per seed both have."""
        shared = [seed for seed in self.test if seed in other.test]
        return [paired(self.test[seed], other.test[seed], other.own_rank) for seed in shared]

    def minus_at_same_rank(self, other: "Run") -> list[pd.DataFrame]:
        """Item by item, this run minus the other at every rank both have; one frame per seed both have."""
        ranks = [rank for rank in self.ranks if rank in other.ranks]
        shared = [seed for seed in self.test if seed in other.test]
        return [
            pd.concat([paired(self.test[seed][[rank]], other.test[seed], rank) for rank in ranks], axis=1)
            for seed in shared
        ]

    @property
    def heldout(self) -> dict[int, list[dict]]:
        """Rank -> held-out loss (value, stderr) of every seed, for the ranks that all seeds have."""
        losses = [record.raw["heldout"]["ranks"] for record in self.records]
        ranks = sorted(int(rank) for rank in losses[0] if all(rank in loss for loss in losses))
        return {rank: [loss[str(rank)] for loss in losses] for rank in ranks}

    def _agreeing_items(self, record: Record) -> pd.DataFrame:
        frame = items(record, self.task, "test")
        for rank, score in record.split(self.task, "test")["ranks"].items():
            fraction = score["value"] / record.unit(self.task)
            if abs(fraction - frame[int(rank)].mean()) > 5e-4:  # room for a score rounded to 3 digits
                raise ValueError(
                    f"{record.folder}: the record says {score['value']} for {self.task} test at rank {rank}, "
                    f"its items average {frame[int(rank)].mean():.4f}. Delete it and run the cell again."
                )
        return frame


class Grid:
    """All cells of a table, or those of one task. Raises ValueError for two records of one cell, or one not scored on
    the task. `among`: all records of the table, over which its failures are numbered."""

    def __init__(
        self, records: Sequence[Record], task: str, how: Bootstrap, among: Sequence[Record] | None = None
    ) -> None:
        self.how = how
        self.cells: dict[tuple[str, str, str], dict[int, Record]] = defaultdict(dict)
        for record in sorted(records, key=lambda record: record.cell["seed"]):
            cell = record.cell
            seeds = self.cells[cell["model"], key(cell["data"]), cell["method"]]
            if cell["seed"] in seeds:
                raise ValueError(f"{record.name} and {seeds[cell['seed']].name} are records of one cell")
            if record.done and record.split(task, "test") is None:
                raise ValueError(f"{record.name} is done but was not scored on the test items of {task}")
            seeds[cell["seed"]] = record
        self.models = ordered({model for model, _, _ in self.cells}, MODELS)
        self.data = ordered({data for _, data, _ in self.cells} | set(DATA), list(DATA))
        self.methods = ordered({method for *_, method in self.cells} | {"qlora", "qdylora"}, list(METHODS))
        failed = {record.name: record for record in among or records if record.raw["status"] == "failed"}
        self.failed = [failed[name] for name in sorted(failed)]  # a record once, in however many ways it was cut
        self.runs = {
            at: Run(tuple(record for record in seeds.values() if record.done), task, how)
            for at, seeds in self.cells.items()
            if any(record.done for record in seeds.values())
        }

    @property
    def nested(self) -> list[str]:
        """Methods whose every rank is trained."""
        return [method for method in self.methods if method not in STATIC]

    def other(self, run: Run, method: str) -> Run | None:
        """The run of another method on the same model and data."""
        cell = run.records[0].cell
        return self.runs.get((cell["model"], key(cell["data"]), method))

    def row(self, labels: tuple[str, ...], model: str, method: str, show: Callable[[Run], Cell]) -> Row:
        """One row over the data sets: `show` of the cell's run, else OOM, failed or blank (not run)."""
        return Row(labels, tuple(self.cell((model, data, method), show) for data in self.data))

    def lost_notes(self) -> list[str]:
        """Footnotes that name each cell that ran out of memory or failed, and why."""
        lost = [record for seeds in self.cells.values() for record in seeds.values()]
        oom = sorted((r for r in lost if r.raw["status"] == "oom"), key=lambda r: r.name)
        notes = [f"{_oom(record)}: {record.name} {_how_lost(record)}: {_reason(record)}" for record in oom]
        for number, record in enumerate(self.failed, start=1):
            notes.append(f"[{number}] {record.name} failed: {_reason(record)}")
        return notes

    def cell(self, at: tuple[str, str, str], show: Callable[[Run], Cell]) -> Cell:
        """`show` of the run of (model, data, method), else OOM, failed or blank (not run)."""
        if at in self.runs:
            return show(self.runs[at])
        lost = self.cells.get(at, {}).values()
        oom = sorted(_oom(record) for record in lost if record.raw["status"] == "oom")
        if oom:
            return Cell(text=oom[0])  # met, where one seed ran and another was forecast
        names = [record.name for record in self.failed]
        return Cell(text=", ".join(f"failed [{names.index(record.name) + 1}]" for record in lost))


def _oom(record: Record) -> str:
    """A cell that was run and died of it, or one that a forecast kept from being run."""
    return "OOM forecast" if record.raw.get("oom") == "forecast" else "OOM"


def _how_lost(record: Record) -> str:
    return "was not run" if record.raw.get("oom") == "forecast" else "ran out of memory"


def _reason(record: Record) -> str:
    return record.raw.get("reason") or "no reason recorded"


def percent(estimate: Estimate | None) -> Cell:
    """A fraction with its interval -> a cell in percent, with its rank."""
    if estimate is None:
        return Cell()
    return Cell(100 * estimate.value, estimate.rank, 100 * estimate.low, 100 * estimate.high)


def points(estimate: Estimate | None) -> Cell:
    """A difference of fractions with its interval -> a cell in points, with its sign and without its rank."""
    return replace(percent(estimate), rank=None, signed=True)


def mean_score(scores: Sequence[dict], rank: int | None = None, *, unit: float = 1, digits: int = 3) -> Cell:
    """Mean over seeds of recorded scores ± one standard error, over items and (if several) over seeds."""
    if not scores:
        return Cell()
    values = unit * np.array([score["value"] for score in scores])
    errors = unit * np.array([score["stderr"] for score in scores])
    # All seeds were scored on the same items, so averaging them does not shrink the items' share.
    between = values.var(ddof=1) / len(values) if len(values) > 1 else 0.0
    return Cell(values.mean(), rank, error=float(np.sqrt(np.mean(errors**2) + between)), digits=digits)
