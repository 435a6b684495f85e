"""Run records: read, check, lay out as frames.

A record is `<folder>/<cell name>/record.json`, written by the runner; beside it lie the per-item outcomes
(gzip JSON lines, one line an item). This module only reads.
"""

import gzip
import json
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.bleu import pseudo_values
from experiments.files import read_json

SCHEMA = 1
STATUSES = ("done", "oom", "failed")
CELL_KEYS = ("table", "model", "data", "method", "seed", "scale")
UNITS = {"bleu": 100}  # a metric's own unit, in fractions: 100 for percent
BUDGET_KEYS = ("steps", "examples", "tokens")
TASK_KEYS = ("version", "num_fewshot", "metric", "higher_is_better")


@dataclass(frozen=True)
class Record:
    """One checked record; `raw` holds every key of the file, the rest are shortcuts into it."""

    folder: Path
    raw: dict

    @property
    def name(self) -> str:
        return self.raw["name"]

    @property
    def cell(self) -> dict:
        return self.raw["cell"]

    @property
    def done(self) -> bool:
        return self.raw["status"] == "done"

    @property
    def r_max(self) -> int:
        """The rank the cell was trained with; for LoRA and QLoRA their own rank."""
        return int(self.raw["config"]["ranks"]["r_max"])

    @property
    def adapter_bytes(self) -> dict[int, int]:
        """Rank -> bytes of the adapter there; empty where it was not recorded."""
        return {int(rank): size for rank, size in (self.raw.get("adapter_bytes") or {}).items()}

    @property
    def tasks(self) -> dict:
        return self.raw.get("tasks") or {}

    @property
    def cuts(self) -> list[str]:
        """Other ways than truncation in which the cell's adapter was cut to lower ranks; of a lost cell, was to be."""
        if self.done:
            return list(self.raw.get("cuts", {}))
        config = self.raw["config"]
        method = config["method"]
        static = method.get("draw", {}).get("kind") == "fixed" and method.get("gate") != "adalora"
        return config.get("ranks", {}).get("cuts", []) if static else []

    def cut(self, how: str) -> "Record":
        """The same cell with its adapter cut in another way, as if of a method of its own: `qlora:svd`."""
        method = {"cell": self.cell | {"method": f"{self.cell['method']}:{how}"}}
        return Record(self.folder, self.raw | method | (self.raw["cuts"][how] if self.done else {}))

    def unit(self, task: str) -> float:
        """What a score in a record is divided by to be a fraction."""
        return UNITS.get(self.tasks[task]["metric"], 1)

    def split(self, task: str, split: str) -> dict | None:
        """Results of one split of one task, None where it was not scored."""
        return self.tasks.get(task, {}).get("splits", {}).get(split)


def load(folder: str | Path) -> list[Record]:
    """All records under `folder`, sorted by name. What a changed configuration put aside (`name~digest`) is left out.

    Raises FileNotFoundError if there is no such folder, ValueError naming the file for a broken record.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of records at {folder}")
    records = [read(cell / "record.json") for cell in cells(folder) if (cell / "record.json").exists()]
    seen: dict[str, Record] = {}
    for record in records:
        if record.name in seen:
            raise ValueError(
                f"{record.folder} and {seen[record.name].folder} both hold the cell {record.name}: delete one"
            )
        seen[record.name] = record
    return sorted(records, key=lambda record: record.name)


def records_of(folder: Path) -> list[Record]:
    """All records under a scale's folder (outputs/<scale>). Raises as `tables` and `load` do."""
    return [record for table in tables(folder) for record in load(table)]


def tables(folder: Path) -> list[Path]:
    """The folders of tables in a scale's folder: those that hold cells. FileNotFoundError if there is no folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of records at {folder}")
    return sorted(table for table in folder.iterdir() if table.is_dir() and cells(table))


def cells(table: Path) -> list[Path]:
    """The folders of a table's cells, begun or ended; not those put aside when their configuration changed."""
    marks = {file.parent for name in ("record.json", "config.json") for file in table.glob(f"*/{name}")}
    return sorted(cell for cell in marks if "~" not in cell.name)


def log(cell: Path) -> list[dict]:
    """The lines of a cell's training log, one a step; none if there is no log. A line half written is the last."""
    file = cell / "log.jsonl"
    lines: list[dict] = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def read(path: Path) -> Record:
    """The record in one file. ValueError naming it if it is broken."""
    try:
        raw = read_json(path)
    except OSError as error:
        raise _broken(path, f"not readable ({error})") from error
    if raw.get("schema") != SCHEMA:
        raise ValueError(
            f"{path}: record schema {raw.get('schema')!r}, this code reads {SCHEMA}. Use the code that wrote it, or "
            "delete this cell's folder and run the cell again."
        )
    try:
        _check(raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise _broken(path, f"a part is missing or of the wrong type ({error!r})") from error
    except ValueError as error:
        raise _broken(path, str(error)) from error
    return Record(path.parent, raw)


def _broken(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: {why}. Delete this cell's folder and run the cell again.")


def _check(raw: dict) -> None:
    """Raise KeyError, TypeError or ValueError unless the parts used here are there and sane."""
    for key in CELL_KEYS:
        raw["cell"][key]
    if not isinstance(raw["name"], str):
        raise ValueError(f"name is {raw['name']!r}, not a text")
    if raw["status"] not in STATUSES:
        raise ValueError(f"status {raw['status']!r} is none of {', '.join(STATUSES)}")
    raw["budget"]["asked"].keys()
    if raw["status"] != "done":
        return
    int(raw["config"]["ranks"]["r_max"])
    for results in (raw, *raw.get("cuts", {}).values()):
        _check_results(results)


def _check_results(results: dict) -> None:
    _check_ranks(results["heldout"]["ranks"])
    for task in results["tasks"].values():
        for key in TASK_KEYS:
            task[key]
        for split in task["splits"].values():
            _check_ranks(split["ranks"])
            for key in ("n", "sha256", "items"):
                split[key]


def _check_ranks(ranks: dict) -> None:
    for rank, score in ranks.items():
        if int(rank) < 1:
            raise ValueError(f"rank {rank}: ranks start at 1")
        float(score["value"]), _stderr(score)


def _stderr(score: dict) -> float:
    """NaN for a metric whose standard error has no closed form (BLEU)."""
    return float("nan") if score["stderr"] is None else float(score["stderr"])


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per cell x task x split x rank.

    Held-out loss is the task `heldout` (metric `loss`, lower is better). `rank` is <NA> for the untrained
    base model. A cell that ran out of memory or failed keeps one row without a task, so as not to vanish.
    """
    rows: list[dict] = []
    for record in records:
        cell = {"name": record.name, "status": record.raw["status"]} | {k: record.cell[k] for k in CELL_KEYS}
        if not record.done:
            rows.append(cell)
            continue
        loss = record.raw["heldout"]
        about = {"task": "heldout", "metric": "loss", "higher_is_better": False, "split": "heldout"}
        rows += _rank_rows(cell | about | {"n": loss.get("n")}, loss["ranks"], loss.get("untrained"))
        for name, task in record.tasks.items():
            about = {"task": name} | {key: task[key] for key in TASK_KEYS}
            for split, result in task["splits"].items():
                here = cell | about | {"split": split, "n": result["n"]}
                rows += _rank_rows(here, result["ranks"], result.get("base"))
    columns = ["name", *CELL_KEYS, "status", "task", *TASK_KEYS, "split", "n", "rank", "value", "stderr"]
    return pd.DataFrame(rows, columns=columns).astype({"rank": "Int64"})


def _rank_rows(about: dict, ranks: dict, base: dict | None) -> list[dict]:
    scores = [(int(rank), score) for rank, score in ranks.items()]
    if base is not None:
        scores.append((None, base))
    return [{**about, "rank": rank, "value": float(score["value"]), "stderr": _stderr(score)} for rank, score in scores]


def items(record: Record, task: str, split: str) -> pd.DataFrame:
    """Outcomes of one split: rows items (index: item hash), columns ranks (ascending), values the metric.

    Of BLEU, which is no mean over items, the values are pseudo-values in fractions (`bleu.pseudo_values`). An item
    that occurs several times has the keys hash, hash#1, ... so that every row can be aligned.
    Raises ValueError naming the file if it is broken, incomplete or outside the record's folder.
    """
    path, lines = _item_lines(record, task, split)
    try:
        ranks = sorted(int(rank) for rank in record.split(task, split)["ranks"])
        values = _bleu(lines, ranks) if "bleu" in lines[0] else _values(lines, ranks)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _broken(path, f"an item has no number at a rank ({error!r})") from error
    return _frame(path, values, _item_index(lines), ranks)


def heldout_items(record: Record) -> pd.DataFrame:
    """Held-out loss like `items`: rows items, columns ranks, values whose mean is the loss per token.

    That mean is a ratio, summed loss to tokens, so the values are its linear terms: loss L + w (l - L) / mean w for
    an item of w tokens and loss l per token; their spread gives the ratio's standard error.
    """
    path = _inside(record, record.raw["heldout"]["items"])
    lines = _lines(path)
    try:
        ranks = sorted(int(rank) for rank in record.raw["heldout"]["ranks"])
        losses = np.array(_values(lines, ranks))
        weights = np.array([float(line["weight"]) for line in lines])[:, None]
        index = pd.Index([line["id"] for line in lines], name="item")
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"an item has no number at a rank, or no weight ({error!r})") from error
    mean = (weights * losses).sum(axis=0) / weights.sum()
    return _frame(path, mean + weights * (losses - mean) / weights.mean(), index, ranks)


def _values(lines: Sequence[dict], ranks: Sequence[int]) -> list[list[float]]:
    return [[float(line["values"][str(rank)]) for rank in ranks] for line in lines]


def _bleu(lines: Sequence[dict], ranks: Sequence[int]) -> list[list[float]]:
    counts = np.array([[line["bleu"][str(rank)] for rank in ranks] for line in lines])
    return np.stack([pseudo_values(counts[:, k]) for k in range(len(ranks))], axis=1).tolist()


def _frame(path: Path, values: Sequence, index: pd.Index, ranks: Sequence[int]) -> pd.DataFrame:
    if not all(math.isfinite(value) for row in values for value in row):
        raise _broken(path, "an item's value is not a finite number")
    return pd.DataFrame(values, index=index, columns=ranks, dtype=float)


def item_groups(record: Record, task: str, split: str) -> pd.Series | None:
    """Group (MMLU: subject) of every item, indexed as `items`; None if the task has no groups."""
    _, lines = _item_lines(record, task, split)
    groups = [line.get("group") for line in lines]
    if not groups or None in groups:
        return None
    return pd.Series(groups, index=_item_index(lines), name="group")


def _item_index(lines: Sequence[dict]) -> pd.Index:
    hashes = pd.Series([line["hash"] for line in lines], dtype=str)
    repeat = hashes.groupby(hashes).cumcount()
    return pd.Index(hashes.where(repeat == 0, hashes + "#" + repeat.astype(str)), name="item")


def _item_lines(record: Record, task: str, split: str) -> tuple[Path, list[dict]]:
    result = record.split(task, split)
    if result is None:
        raise ValueError(f"{record.name}: {task} was not scored on {split}")
    path = _inside(record, result["items"])
    lines = _lines(path)
    if not all(isinstance(line, dict) and "hash" in line for line in lines):
        raise _broken(path, "an item has no hash")
    if len(lines) != result["n"]:
        raise _broken(path, f"holds {len(lines)} items, the record says {result['n']}")
    return path, lines


def _inside(record: Record, items: str) -> Path:
    path = record.folder / items
    if not path.resolve().is_relative_to(record.folder.resolve()):
        raise _broken(record.folder / "record.json", f"items path {items!r} leaves the folder")
    return path


def _lines(path: Path) -> list[dict]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]
    except (OSError, EOFError, ValueError) as error:
        raise _broken(path, f"not readable as gzip JSON lines ({error})") from error


def budget_of(record: Record) -> tuple:
    """The budget asked for: steps, examples, tokens (None where not stated)."""
    return tuple(record.raw["budget"]["asked"].get(key) for key in BUDGET_KEYS)


def check_comparable(records: Sequence[Record]) -> None:
    """Raise ValueError, naming the records, unless they may stand in one table.

    The same for all methods and seeds of one (model, data): the budget asked for (QLoRA's own differs by model
    and data set). And what `check_same_tasks` asks.
    """
    by_column: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        by_column[record.cell["model"], record.cell["data"]].append(record)
    for group in by_column.values():
        for key in BUDGET_KEYS:
            _same(group, f"budget asked for: {key}", lambda r, key=key: r.raw["budget"]["asked"].get(key))
    check_same_tasks(records)


def check_same_tasks(records: Sequence[Record]) -> None:
    """Raise ValueError, naming the records, unless they were asked the same; their budgets may differ.

    The same for all: scale, and per task the version, few-shot count, metric and checksum of each split. The same
    for all methods of one (model, data, seed): the checksum of the training data.
    """
    _same(records, "scale", lambda r: r.cell["scale"])
    done = [record for record in records if record.done]
    for task in sorted({task for record in done for task in record.tasks}):
        scored = [record for record in done if task in record.tasks]
        for key in ("version", "num_fewshot", "metric"):
            _same(scored, f"{task} {key}", lambda r, task=task, key=key: r.tasks[task][key])
        for split in sorted({split for record in scored for split in record.tasks[task]["splits"]}):
            _same(
                [record for record in scored if record.split(task, split)],
                f"{task} {split} items (sha256)",
                lambda r, task=task, split=split: r.split(task, split)["sha256"],
            )
    by_run: dict[tuple, list[Record]] = defaultdict(list)
    for record in done:
        by_run[record.cell["model"], record.cell["data"], record.cell["seed"]].append(record)
    for group in by_run.values():
        _same(group, "training data (sha256)", lambda r: (r.raw.get("data") or {}).get("sha256"))


def _same(records: Sequence[Record], what: str, value: Callable[[Record], Hashable]) -> None:
    names: dict[Hashable, list[str]] = defaultdict(list)
    for record in records:
        names[value(record)].append(record.name)
    if len(names) > 1:
        parts = "; ".join(f"{found!r}: {', '.join(who)}" for found, who in names.items())
        raise ValueError(f"records of one table must agree in {what}, but have {parts}")
