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

import pandas as pd

from experiments.files import read_json

SCHEMA = 1
STATUSES = ("done", "oom", "failed")
CELL_KEYS = ("table", "model", "data", "method", "seed", "scale")
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
    def tasks(self) -> dict:
        return self.raw.get("tasks") or {}

    def split(self, task: str, split: str) -> dict | None:
        """Results of one split of one task, None where it was not scored."""
        return self.tasks.get(task, {}).get("splits", {}).get(split)


def load(folder: str | Path) -> list[Record]:
    """All records under `folder`, sorted by name.

    Raises FileNotFoundError if there is no such folder, ValueError naming the file for a broken record.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of records at {folder}")
    records = [_read(path) for path in sorted(folder.glob("*/record.json"))]
    seen: dict[str, Record] = {}
    for record in records:
        if record.name in seen:
            raise ValueError(
                f"{record.folder} and {seen[record.name].folder} both hold the cell {record.name}: delete one"
            )
        seen[record.name] = record
    return sorted(records, key=lambda record: record.name)


def _read(path: Path) -> Record:
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
    _check_ranks(raw["heldout"]["ranks"])
    for task in raw["tasks"].values():
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
        float(score["value"]), float(score["stderr"])


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
    return [
        {**about, "rank": rank, "value": float(score["value"]), "stderr": float(score["stderr"])}
        for rank, score in scores
    ]


def items(record: Record, task: str, split: str) -> pd.DataFrame:
    """Outcomes of one split: rows items (index: item hash), columns ranks (ascending), values the metric.

    An item that occurs several times has the keys hash, hash#1, ... so that every row can be aligned.
    Raises ValueError naming the file if it is broken, incomplete or outside the record's folder.
    """
    path, lines = _item_lines(record, task, split)
    try:
        ranks = sorted(int(rank) for rank in record.split(task, split)["ranks"])
        values = [[float(line["values"][str(rank)]) for rank in ranks] for line in lines]
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"an item has no number at a rank ({error!r})") from error
    if not all(math.isfinite(value) for row in values for value in row):
        raise _broken(path, "an item's value is not a finite number")
    return pd.DataFrame(values, index=_item_index(lines), columns=ranks, dtype=float)


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
    path = record.folder / result["items"]
    if not path.resolve().is_relative_to(record.folder.resolve()):
        raise _broken(record.folder / "record.json", f"items path {result['items']!r} leaves the folder")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            lines = [json.loads(line) for line in stream]
    except (OSError, EOFError, ValueError) as error:
        raise _broken(path, f"not readable as gzip JSON lines ({error})") from error
    if not all(isinstance(line, dict) and "hash" in line for line in lines):
        raise _broken(path, "an item has no hash")
    if len(lines) != result["n"]:
        raise _broken(path, f"holds {len(lines)} items, the record says {result['n']}")
    return path, lines


def check_comparable(records: Sequence[Record]) -> None:
    """Raise ValueError, naming the records, unless they may stand in one table.

    The same for all: scale, and per task the version, few-shot count, metric and checksum of each split. The
    same for all methods and seeds of one (model, data): the budget asked for (QLoRA's own differs by model
    and data set). The same for all methods of one (model, data, seed): the checksum of the training data.
    """
    _same(records, "scale", lambda r: r.cell["scale"])
    done = [record for record in records if record.done]
    by_column: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        by_column[record.cell["model"], record.cell["data"]].append(record)
    for group in by_column.values():
        for key in ("steps", "examples", "tokens"):
            _same(group, f"budget asked for: {key}", lambda r, key=key: r.raw["budget"]["asked"].get(key))
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
