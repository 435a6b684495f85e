"""The paper's claims put to the records: each supported, not supported, or not decided at this scale.

python -m analysis.claims outputs/mini    prints the verdicts and writes them beside the tables
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from analysis.forecasts import forecasts
from analysis.grid import METHODS, Grid, Run, key
from analysis.layout import Block, Cell, Row, Table, to_csv, to_latex, to_markdown
from analysis.records import Record, check_comparable, load
from analysis.semi_sorted import Study
from analysis.stats import DEFAULT, DIFFERENCE, Bootstrap, Estimate, best_of_ranks, holm, mean_at, p_values

Verdict = Literal["supported", "not supported", "not decided at this scale"]
SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "not decided at this scale"

BASE, NEW = "qlora", "qdylora"
COMPARED = ("table1", "table2", "table3")  # the tables whose cells, of one budget, claims compare
LEVEL = 0.05
MARGIN = 0.01  # of accuracy: how much worse still counts as "at least as good"
GB = 2**30
STATEMENTS = {
    "C1": "QDyLoRA at its best rank is at least as good as QLoRA on MMLU",
    "C2": "QDyLoRA beats truncated QLoRA at every lower rank",
    "C2a": "QDyLoRA beats QLoRA truncated and rescaled to alpha/b at every lower rank",
    "C2b": "QDyLoRA beats QLoRA cut by SVD at every lower rank",
    "C3": "16-bit DyLoRA on a 13B model does not fit 32 GB, QDyLoRA does; Falcon-40B with ranks 1..64 fits a 32 GB GPU",
    "C4": "Ranks are semi-sorted: some higher rank is worse than a lower one",
    "C4b": "A smaller budget leaves more pairs of ranks out of order",
    "C5 steps": "One QDyLoRA run takes fewer steps than a QLoRA run per rank",
    "C5 time": "One QDyLoRA run takes less time than a QLoRA run per rank",
    "C5 memory": "One QDyLoRA run takes no more memory than a QLoRA run",
}


@dataclass(frozen=True)
class Claim:
    """One claim and its evidence.

    `effect` is a number in the unit that `note` names (None: nothing to compute it from), `interval` its 95%
    interval in the same unit (None: the effect is exact, or there is none), `n` the items behind it, `command`
    what rebuilds the evidence from nothing.
    """

    name: str
    statement: str
    verdict: Verdict
    effect: float | None
    interval: tuple[float, float] | None
    n: int
    command: str
    note: str


def claims(records: Sequence[Record], memory: Sequence[dict] = (), how: Bootstrap = DEFAULT) -> list[Claim]:
    """The verdict on every claim, in order of its name, from all records at hand (of any table, one scale).

    `memory` are the forecasts at hand (`Forecast.for_claims`): model, method, gpu_bytes, needed_bytes. ValueError for
    records of several scales, or that a claim compares and that may not be compared.
    """
    scales = {record.cell["scale"] for record in records}
    if len(scales) != 1:
        raise ValueError(f"claims are decided at one scale, not {len(scales)}: {', '.join(sorted(scales))}")
    tables: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        tables[record.cell["table"]].append(record)
    for name in COMPARED:  # semi_sorted sweeps the budget, and checks for itself
        check_comparable(tables[name])
    scale = f" SCALE={scales.pop()}"
    by_rank = [pair for name in ("table2", "table3") for pair in _pairs_by_rank(tables[name], how)]
    study = Study(tables["semi_sorted"], how)
    return [
        _at_least_as_good(tables["table1"], "make table1" + scale, how),
        _beats_at_every_lower_rank("C2", by_rank, BASE, "make table2 table3" + scale),
        _beats_at_every_lower_rank("C2a", by_rank, f"{BASE}:truncate_alpha_over_b", "make table2" + scale),
        _beats_at_every_lower_rank("C2b", by_rank, f"{BASE}:svd", "make table2" + scale),
        _fits(memory),
        _semi_sorted(study, "make semi_sorted" + scale),
        _more_under_a_smaller_budget(study, "make semi_sorted" + scale),
        *_costs([r for name in COMPARED for r in tables[name]], "make table1 table2 table3" + scale),
    ]


def decided(folder: Path, records: Sequence[Record]) -> list[Claim]:
    """The claims from the records under `folder` (outputs/<scale>) and the forecasts beside it."""
    return claims(records, [forecast.for_claims() for forecast in forecasts(folder) if forecast.gpu])


def _claim(name: str, verdict: Verdict, effect, interval, n: int, command: str, note: str) -> Claim:
    return Claim(name, STATEMENTS[name], verdict, effect, interval, n, command, note)


def _unrun(name: str, command: str, note: str) -> Claim:
    return _claim(name, UNDECIDED, None, None, 0, command, note)


# C1 --------------------------------------------------------------------------------------------------


def _at_least_as_good(records: Sequence[Record], command: str, how: Bootstrap) -> Claim:
    grid = Grid(records, "mmlu", how) if records else None
    pairs = [(run, grid.other(run, BASE)) for at, run in grid.runs.items() if at[2] == NEW] if grid else []
    pairs = [(new, old) for new, old in pairs if old and new.chosen]
    if not pairs:
        return _unrun("C1", command, "no cell of QLoRA and QDyLoRA with validation items")
    chosen = _averaged([[f[[new.chosen.rank]] for f in new.minus(old)] for new, old in pairs])
    best = _averaged([[f[[best_of_ranks(new.minus(old), how, support=DIFFERENCE).rank]] for f in new.minus(old)]
                      for new, old in pairs])  # fmt: skip
    effect = mean_at(chosen, 1, how, support=DIFFERENCE)
    verdict = NOT_SUPPORTED if effect.high < 0 else SUPPORTED if effect.low >= -MARGIN else UNDECIDED
    note = (
        f"points of accuracy, rank chosen on validation items, mean of {len(pairs)} columns of Table 1; the margin is "
        f"{100 * MARGIN:g} point. With the rank chosen on the test items, as in the paper: "
        f"{100 * float(np.mean([f.mean() for f in best])):+.1f}. {_seeds(effect)}"
    )
    return _claim("C1", verdict, *_points(effect), effect.n, command, note)


def _averaged(columns: Sequence[Sequence[pd.DataFrame]]) -> list[pd.DataFrame]:
    """The mean over columns of single-rank frames of the same items: a frame a seed if all columns have as many
    seeds, else one frame."""
    bare = [[frame.set_axis([1], axis=1) for frame in frames] for frames in columns]
    if len({len(frames) for frames in bare}) > 1:
        bare = [[_mean(frames)] for frames in bare]
    return [_mean(frames) for frames in zip(*bare, strict=True)]


def _mean(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return reduce(lambda a, b: a.add(b.loc[a.index]), frames) / len(frames)


def _points(estimate: Estimate) -> tuple[float, tuple[float, float] | None]:
    return 100 * estimate.value, (100 * estimate.low, 100 * estimate.high)


def _seeds(estimate: Estimate) -> str:
    if estimate.seeds > 1:
        return f"{estimate.seeds} training seeds."
    return "One training seed: the interval is over items and says nothing about another training run."


# C2 --------------------------------------------------------------------------------------------------


def _pairs_by_rank(records: Sequence[Record], how: Bootstrap) -> Iterator[tuple[str, Run, Run]]:
    """(method, QDyLoRA's run, the method's run) of every (model, data) of Table 2 or 3."""
    every = [*records, *(record.cut(cut) for record in records for cut in record.cuts)]
    for data in sorted({key(record.cell["data"]) for record in every}):
        grid = Grid([record for record in every if key(record.cell["data"]) == data], data, how)
        for (model, name, method), run in grid.runs.items():
            new = grid.runs.get((model, name, NEW))
            if new and method != NEW:
                yield method, new, run


def _beats_at_every_lower_rank(name: str, pairs: Sequence[tuple[str, Run, Run]], method: str, command: str) -> Claim:
    compared = [(new, old) for found, new, old in pairs if found == method]
    if not compared:
        return _unrun(name, command, f"no cell of {METHODS[method]} and QDyLoRA scored at lower ranks")
    differences: list[tuple[Estimate, float]] = []
    lower_loss, losses = 0, 0
    for new, old in compared:
        frames = [frame.drop(columns=old.own_rank, errors="ignore") for frame in new.minus_at_same_rank(old)]
        corrected = holm(p_values(frames, old.how, support=DIFFERENCE))
        for rank, p in zip(sorted(frames[0]), corrected, strict=True):
            differences.append((mean_at(frames, rank, old.how, support=DIFFERENCE), p))
            pair = (np.mean([loss["value"] for loss in run.heldout[rank]]) for run in (new, old))
            lower_loss, losses = lower_loss + (next(pair) < next(pair)), losses + 1
    better = sum(p < LEVEL and at.value > 0 for at, p in differences)
    worse = sum(p < LEVEL and at.value < 0 for at, p in differences)
    verdict = NOT_SUPPORTED if worse else SUPPORTED if better == len(differences) else UNDECIDED
    weakest = min((at for at, _ in differences), key=lambda at: at.value)
    note = (
        f"points at the rank where QDyLoRA leads least (rank {weakest.rank}). Of {len(differences)} pairs of a lower "
        f"rank and a column, QDyLoRA is better at {better} and worse at {worse} after Holm's correction for the ranks; "
        f"its held-out loss is lower at {lower_loss} of {losses}. {_seeds(weakest)}"
    )
    return _claim(name, verdict, *_points(weakest), weakest.n, command, note)


# C3 --------------------------------------------------------------------------------------------------


def _fits(memory: Sequence[dict]) -> Claim:
    command = " && ".join(
        f"make forecast MODEL={model} METHOD={method} GPU=32"
        for model, method in (("llama2_13b", "dylora"), ("llama2_13b", "qdylora"), ("falcon_40b", "qdylora"))
    )
    found = {(key(f["model"]), f["method"]): f for f in memory if round(f["gpu_bytes"] / GB) == 32}
    wanted = {("llama2_13b", "dylora"): False, ("llama2_13b", "qdylora"): True, ("falcon_40b", "qdylora"): True}
    if not set(wanted) <= set(found):
        return _unrun("C3", command, "needs the three memory forecasts that the command makes")
    fits = {at: found[at]["needed_bytes"] <= found[at]["gpu_bytes"] for at in wanted}
    verdict = SUPPORTED if fits == wanted else NOT_SUPPORTED
    needs = ", ".join(
        f"{model} with {method} {found[model, method]['needed_bytes'] / GB:.1f}" for model, method in wanted
    )
    least = min(
        (1 if fit else -1) * (found[at]["gpu_bytes"] - found[at]["needed_bytes"]) / GB for at, fit in wanted.items()
    )
    note = (
        "GiB to spare at the closest of the three, negative where a part fails. Forecast needs, GiB, with the "
        f"optimizer's state on the host and what is kept free of training: {needs}. Not run."
    )
    return _claim("C3", verdict, least, None, len(wanted), command, note)


# C4 --------------------------------------------------------------------------------------------------


def _semi_sorted(study: Study, command: str) -> Claim:
    found = [
        (order, curve)
        for place, curves in study.curves.items()
        for (method, steps), curve in curves.items()
        if method == NEW and steps == _middle(study.steps(place))
        for order in study.orders_of(curve)
    ]
    if not found:
        return _unrun("C4", command, "the semi-sorted study has not been run")
    (by_score, by_loss), curve = found[0]
    verdict = SUPPORTED if by_score.beyond_noise else NOT_SUPPORTED if not by_score.out_of_order.value else UNDECIDED
    note = (
        f"pairs of {by_score.pairs} out of order by the benchmark's score, uniform draw, the scale's own budget; "
        f"beyond noise after Holm's correction: {by_score.beyond_noise}. Best rank {by_score.best_rank.value:g}. By "
        f"held-out loss {by_loss.out_of_order.value:g} out of order, {by_loss.beyond_noise} beyond noise, best rank "
        f"{by_loss.best_rank.value:g}."
    )
    measure = by_score.out_of_order
    n = len(curve.score[0][0])
    return _claim("C4", verdict, measure.value, (measure.low, measure.high), n, command, note)


def _middle(steps: Sequence[int]) -> int:
    return steps[len(steps) // 2]


def _more_under_a_smaller_budget(study: Study, command: str) -> Claim:
    for place, curves in study.curves.items():
        steps = study.steps(place)
        at = (NEW, steps[0]), (NEW, steps[-1])
        by_score = study.change(place, *at, lambda curve: curve.score) if len(steps) > 1 else None
        if by_score is None:
            continue
        by_loss = study.change(place, *at, lambda curve: curve.loss).out_of_order
        measure = by_score.out_of_order
        verdict = SUPPORTED if measure.low > 0 else NOT_SUPPORTED if measure.high < 0 else UNDECIDED
        note = (
            f"pairs out of order by the benchmark's score after {steps[0]} steps, minus after {steps[-1]}; by held-out "
            f"loss {by_loss.value:+g} [{by_loss.low:+g}, {by_loss.high:+g}]. One training run of each budget."
        )
        n = len(curves[at[0]].score[0][0])
        return _claim("C4b", verdict, measure.value, (measure.low, measure.high), n, command, note)
    return _unrun("C4b", command, "the semi-sorted study has not been run at two budgets")


# C5 --------------------------------------------------------------------------------------------------


def _costs(records: Sequence[Record], command: str) -> list[Claim]:
    done = {(r.cell["table"], r.cell["model"], key(r.cell["data"]), r.cell["seed"], r.cell["method"]): r
            for r in records if r.done}  # fmt: skip
    pairs = [(new, done[(*at[:-1], BASE)]) for at, new in done.items() if at[-1] == NEW and (*at[:-1], BASE) in done]
    pairs = [pair for pair in pairs if all("peak_memory_bytes" in record.raw for record in pair)]
    if not pairs:
        return [_unrun(name, command, "no cell of QLoRA and QDyLoRA") for name in STATEMENTS if name.startswith("C5")]
    ranks = len(pairs[0][0].raw["heldout"]["ranks"])
    spent = [[record.raw["budget"]["spent"] for record in pair] for pair in pairs]
    steps = _ratio([new["steps"] / (ranks * old["steps"]) for new, old in spent])
    seconds = _ratio([new["seconds"] / (ranks * old["seconds"]) for new, old in spent])
    peaks = _ratio([new.raw["peak_memory_bytes"] / old.raw["peak_memory_bytes"] for new, old in pairs])
    per_rank = (
        f"over {ranks} QLoRA runs, one for each rank evaluated, with the same budget each. QLoRA was run at its "
        "largest rank alone; a run at a lower rank is taken to cost the same, since the base does nearly all the work"
    )
    one_run = (
        "ratio of peak training memory to one QLoRA run, geometric mean of cells; runs for several ranks follow one "
        "another, so their peaks do not add up"
    )
    return [
        _cheaper("C5 steps", steps, len(pairs), command, f"ratio {per_rank}; exact"),
        _cheaper("C5 time", seconds, len(pairs), command, f"ratio of seconds {per_rank}; geometric mean of cells"),
        _cheaper("C5 memory", peaks, len(pairs), command, one_run),
    ]


def _ratio(ratios: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Geometric mean over cells with Student's t interval of the logarithms (None for a single cell)."""
    logs = np.log(ratios)
    mean = float(np.exp(logs.mean()))
    if len(logs) < 2:
        return mean, None
    reach = stats.t.ppf(1 - LEVEL / 2, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return mean, (float(np.exp(logs.mean() - reach)), float(np.exp(logs.mean() + reach)))


def _cheaper(name: str, ratio: tuple[float, tuple | None], n: int, command: str, note: str) -> Claim:
    effect, interval = ratio
    exact = name == "C5 steps"
    low, high = (effect, effect) if exact else interval or (0, np.inf)
    most = 1.02 if name == "C5 memory" else 1  # allocators differ by this much from run to run
    verdict = SUPPORTED if high < most else NOT_SUPPORTED if low > 1 else UNDECIDED
    return _claim(name, verdict, effect, None if exact else interval, n, command, note)


# The table -------------------------------------------------------------------------------------------


def claims_table(found: Sequence[Claim], scale: str) -> Table:
    """The verdicts as a table; notes and commands are its footnotes."""
    rows = tuple(
        Row((claim.name, claim.statement), (Cell(text=claim.verdict), _effect(claim), Cell(text=str(claim.n or ""))))
        for claim in found
    )
    notes = [f"{claim.name}: {claim.note.rstrip('.')}. Rebuild: {claim.command}" for claim in found]
    header = ("claim", "what the paper says", "verdict", "effect [95% interval]", "n")
    return Table(f"Claims (scale {scale})", header, (Block("Verdicts", rows),), tuple(notes))


def _effect(claim: Claim) -> Cell:
    if claim.effect is None:
        return Cell()
    low, high = claim.interval or (None, None)
    ratio, count = claim.name.startswith("C5"), claim.name == "C4"
    return Cell(claim.effect, low=low, high=high, digits=3 if ratio else 0 if count else 1, signed=not (ratio or count))


def main(folder: Path) -> None:
    """Decide the claims from the records of every table in `folder` (outputs/<scale>)."""
    records = [record for table in sorted(folder.glob("*/")) for record in load(table)]
    table = claims_table(decided(folder, records), folder.name)
    for suffix, render in (("md", to_markdown), ("tex", to_latex), ("csv", to_csv)):
        (folder / f"claims.{suffix}").write_text(render(table), encoding="utf-8")
    print(to_markdown(table))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
