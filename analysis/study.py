"""A study: one setting varied and all else equal; what each variant learned, and what it took."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean

from analysis.grid import DATA_NAMES, key, percent
from analysis.grid import Run as Scores
from analysis.layout import Block, Cell, Row, Table
from analysis.notes import SEEDS, protocol, scope
from analysis.records import Record, check_same_tasks
from analysis.rivals import Rival
from analysis.stats import DEFAULT, Bootstrap

#: Tables that are studies: files of conf/table.
STUDIES = (
    "study",
    "study_precision",
    "study_optimizers",
    "study_epochs",
    "study_targets",
    "study_alpha",
    "study_quantization",
)
GIB = 1 << 30


def study(records: Sequence[Record], how: Bootstrap = DEFAULT) -> Table:
    """A row a variant: held-out loss, also against the first variant, scores, seconds and peak memory of training.

    Variants may differ in their budget, the data's rows and the rank; each is used at the rank it was trained at.
    ValueError for no records, or records whose tasks or data differ.
    """
    if not records:
        raise ValueError("no records, so no table")
    check_same_tasks(records)
    tasks = sorted({task for record in records for task in record.tasks})
    groups: dict[tuple[str, str], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: (_place(record), record.cell["seed"])):
        groups[record.cell["model"], key(record.cell["data"])][record.cell["method"]].append(record)
    rows = tuple(row for place, variants in sorted(groups.items()) for row in _rows(place, variants, tasks, how))
    header = (
        "model", "data set", "variant", "held-out loss", "above the first, percent", *(f"{t}, percent" for t in tasks),
        "steps", "seconds", "peak GiB",
    )  # fmt: skip
    name = records[0].cell["table"].capitalize().replace("_", ": ", 1)
    notes = (*protocol(records, *tasks), *_reading(how))
    return Table(f"{name} ({scope(records)})", header, (Block("All else equal", rows),), notes)


def _place(record: Record) -> int:
    """Of the record's variant among those of its table."""
    variants = list(record.raw["config"]["table"]["variants"])
    return variants.index(record.cell["method"]) if record.cell["method"] in variants else len(variants)


def _rows(place: tuple[str, str], variants: dict[str, list[Record]], tasks: Sequence[str], how: Bootstrap) -> list[Row]:
    model, data = place
    done = {name: Rival(tuple(r for r in some if r.done), how) for name, some in variants.items()}
    first = next(iter(done.values()))
    rows = []
    for name, some in variants.items():
        labels = model, DATA_NAMES.get(data, data), name
        if done[name].records:
            rows.append(Row(labels, _cells(done[name], first, tasks, how)))
        else:
            rows.append(Row(labels, (Cell(text=_how_lost(some[0])), *[Cell()] * (4 + len(tasks)))))
    return rows


def _cells(variant: Rival, first: Rival, tasks: Sequence[str], how: Bootstrap) -> tuple[Cell, ...]:
    rank = variant.records[0].r_max
    compared = variant is not first and first.records and first.records[0].r_max == rank
    scores = [percent(Scores(variant.records, task, how).own) for task in tasks]
    spent = [record.raw["budget"]["spent"] for record in variant.records]
    peak = max(record.raw["peak_memory_bytes"] for record in variant.records)
    return (
        variant.loss(rank),
        variant.loss_over(first, rank) if compared else Cell(),
        *scores,
        Cell(mean(one["steps"] for one in spent), digits=0),
        Cell(mean(one["seconds"] for one in spent), digits=0),
        Cell(peak / GIB, digits=2),
    )


def _how_lost(record: Record) -> str:
    return "OOM" if record.raw["status"] == "oom" else f"failed: {record.raw.get('reason')}"


def _reading(how: Bootstrap) -> list[str]:
    return [
        "Scores are at the rank trained, which is in brackets. ±: one standard error.",
        f"[low, high]: {100 * how.level:g}% interval, {how.resamples:,} bootstrap resamples of the items, seed "
        f"{how.seed}; the difference to the first variant is paired by item. {SEEDS}",
        "seconds: of the training steps. peak: most memory in use in training, of the GPU, or on a machine without one "
        "of the whole process, which holds the libraries too.",
    ]
