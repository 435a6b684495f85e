"""What a table says about itself: its scope, what was run, how to read it."""

from collections import Counter
from collections.abc import Iterable, Sequence

from analysis.records import Record, item_groups
from analysis.stats import Bootstrap

CHANCE = {"mmlu": 25}  # percent, by guessing


def scope(records: Sequence[Record], task: str) -> str:
    """For the title: scale, models, where the training data came from, number of test items."""
    sources = _distinct((record.raw.get("data") or {}).get("source") for record in records)
    sizes = _distinct(record.split(task, "test")["n"] for record in records if record.done)
    parts = [", ".join(_distinct(record.cell["model"] for record in records))]
    parts += [f"{source} tasks" for source in sources] + [f"{size} items" for size in sizes]
    return f"scale {records[0].cell['scale']}: {', '.join(parts)}"


def protocol(records: Sequence[Record], task: str) -> list[str]:
    """Task, version, few-shot count, items and groups; the budget asked for and spent; seeds per cell."""
    done = [record for record in records if record.done]
    notes = []
    if done:
        about = done[0].tasks[task]
        sizes = [f"{result['n']} {split} items" for split, result in about["splits"].items()]
        groups = item_groups(done[0], task, "test")
        if groups is not None:
            sizes.append(f"{groups.nunique()} subjects")
        notes.append(
            f"{task}: {about['num_fewshot']}-shot {about['metric']}, task version {about['version']}; "
            f"{', '.join(sizes)}." + (f" Guessing scores {CHANCE[task]}%." if task in CHANCE else "")
        )
    asked = amounts([record.raw["budget"]["asked"] for record in records])
    spent = amounts([record.raw["budget"].get("spent") or {} for record in done])
    notes.append(f"Budget of every cell: {asked}" + (f"; spent: {spent}." if spent else "."))
    seeds = Counter((r.cell["model"], r.cell["data"], r.cell["method"]) for r in done).values()
    if seeds:
        notes.append(f"Training seeds per cell: {_range(min(seeds), max(seeds))}.")
    return notes


def reading(how: Bootstrap) -> list[str]:
    """How to read ranks, intervals and blanks."""
    return [
        "The rank is in brackets. own: the rank trained; best on test: the best rank on the items scored, as "
        "in the paper, ties to the smaller; by validation: the best rank on validation items, which the "
        "score does not use. truncated: QLoRA's adapter cut to a lower rank.",
        f"[low, high]: {100 * how.level:g}% interval, {how.resamples:,} bootstrap resamples of the items, "
        f"seed {how.seed}. With several training seeds it holds their spread too (Student's t), with one it "
        "says nothing about another training run. Best on test: for the true score of the rank chosen; its "
        "lower end chooses the rank again in every resample, so it lies further off. Differences are paired "
        "by item.",
        "best - by val.: best on test minus the test score of the rank chosen on validation. bootstrap: by "
        "how much the best rank of a resample is flattered by being chosen on it, on average.",
        "Blank: not run, or nothing to compare with.",
    ]


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
