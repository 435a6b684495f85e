"""What a table says about itself: its scope, what was run, how to read it."""

from collections import Counter
from collections.abc import Iterable, Sequence

from analysis.records import Record, budget_of, item_groups
from analysis.stats import Bootstrap

CHANCE = {"mmlu": 25}  # percent, by guessing
SEEDS = (
    "With several training seeds it holds their spread too (Student's t), with one it says nothing about another "
    "training run."
)


def scope(records: Sequence[Record], task: str | None = None) -> str:
    """For the title: scale, models, where the training data came from, number of test items (of one task or any)."""
    sources = _distinct((record.raw.get("data") or {}).get("source") for record in records)
    splits = [r.split(name, "test") for r in records if r.done for name in ([task] if task else r.tasks)]
    sizes = sorted(_distinct(split["n"] for split in splits if split))
    parts = [", ".join(_distinct(record.cell["model"] for record in records))]
    parts += [f"{source} tasks" for source in sources] + [f"{size} items" for size in sizes]
    return f"scale {records[0].cell['scale']}: {', '.join(parts)}"


def protocol(records: Sequence[Record], *tasks: str) -> list[str]:
    """Tasks, versions, few-shot counts, items and groups; the budget asked for and spent; seeds per cell."""
    notes = [note for task in tasks for note in _asked(records, task)]
    done = [record for record in records if record.done]
    budgets = amounts([record.raw["budget"]["asked"] for record in records])
    spent = amounts([record.raw["budget"].get("spent") or {} for record in done])
    notes.append(f"Budget of every cell: {budgets}" + (f"; spent: {spent}." if spent else "."))
    seeds = Counter((r.cell["model"], r.cell["data"], r.cell["method"], budget_of(r)) for r in done).values()
    if seeds:
        notes.append(f"Training seeds per cell: {_range(min(seeds), max(seeds))}.")
    return notes + _mixed_types(done)


def _mixed_types(done: Sequence[Record]) -> list[str]:
    """Says so where not all base models computed in one type, as on machines with and without bfloat16."""
    cells = {record.folder: record.raw.get("compute_dtype") for record in done}  # a cell once, however it was cut
    found = Counter(cells.values())
    parts = ", ".join(f"{name or 'not recorded'} in {count}" for name, count in sorted(found.items(), key=str))
    return [f"Cells by the type their base model computed in: {parts}."] if len(found) > 1 else []


def _asked(records: Sequence[Record], task: str) -> list[str]:
    done = [record for record in records if record.done and task in record.tasks]
    if done:
        about = done[0].tasks[task]
        sizes = [f"{result['n']} {split} items" for split, result in about["splits"].items()]
        groups = item_groups(done[0], task, "test")
        if groups is not None and groups.nunique() > 1:
            sizes.append(f"{groups.nunique()} subjects")
        return [
            f"{task}: {about['num_fewshot']}-shot {about['metric']}, task version {about['version']}; "
            f"{', '.join(sizes)}."
            + (f" Signature: {about['signature']}." if "signature" in about else "")
            + (f" Guessing scores {CHANCE[task]}%." if task in CHANCE else "")
        ]
    return []


def missing_models(records: Sequence[Record], paper: Sequence[str]) -> list[str]:
    """Says so where the models run are not the paper's."""
    run = sorted({record.cell["model"] for record in records})
    missing = [model for model in paper if model not in run]
    return (
        [f"Of the paper's models, not run at this scale: {', '.join(missing)}. Run: {', '.join(run)}."]
        if missing
        else []
    )


def reading(how: Bootstrap) -> list[str]:
    """How to read ranks, intervals and blanks."""
    return [
        "The rank is in brackets. own: the rank trained; best on test: the best rank on the items scored, as "
        "in the paper, ties to the smaller; by validation: the best rank on validation items, which the "
        "score does not use. truncated: QLoRA's adapter cut to a lower rank.",
        f"[low, high]: {100 * how.level:g}% interval, {how.resamples:,} bootstrap resamples of the items, "
        f"seed {how.seed}. {SEEDS} Best on test: for the true score of the rank chosen; its "
        "lower end chooses the rank again in every resample, so it lies further off. Differences are paired "
        "by item.",
        "best - by val.: best on test minus the test score of the rank chosen on validation. bootstrap: by "
        "how much the best rank of a resample is flattered by being chosen on it, on average.",
        "Blank: not run, or nothing to compare with.",
    ]


def ranks_tested(cuts: bool) -> list[str]:
    """How to read a table with a row for every rank; `cuts`: QLoRA's adapter was cut in several ways."""
    stars = "*: the difference is not zero at the 5% level after Holm's correction for the number of ranks."
    ways = (
        "QLoRA's columns are one adapter, cut to the row's rank: its first rows scaled as trained (alpha/r) or as if "
        "trained at that rank (alpha/b), or the best approximation of that rank (SVD)."
    )
    selected = (
        "Differences at the best rank on test or by validation are to a static method at the rank it was trained at."
    )
    return [stars, selected, *([ways] if cuts else [])]


def amounts(amounts: Sequence[dict]) -> str:
    """[{steps: 40, tokens: 10}, {steps: 40, tokens: 12}] -> `40 steps, 10 to 12 tokens`."""
    parts = []
    for unit in ("steps", "examples", "tokens"):
        found = [amount[unit] for amount in amounts if amount.get(unit) is not None]
        if found:
            parts.append(f"{_range(min(found), max(found))} {unit}")
    return ", ".join(parts)


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(value for value in values if value is not None))
