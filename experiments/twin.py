"""Tables share cells: what a cell of the same configuration has computed is taken over, not computed again.

Tables 2 and 3, semi_sorted and rivals all hold QDyLoRA on GSM8K, for one. A cell that asks for other cuts of the same
adapter is the same training, and scores only the cuts that are missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from experiments.cell import Cell, differences, environment, note
from experiments.config import substance
from experiments.files import Damaged, flaws, read_json, write_json

WORK = ("adapter", "items", "parts", "log.jsonl")  # items before the parts that speak of them
SAME = {"ranks.cuts"}  # may differ: every cut has parts of its own


def take_over(cell: Cell) -> None:
    """Copy the work of a finished twin into a cell that has none; `training.json`, which ends training, comes last and
    says whose it is."""
    if (cell.folder / "training.json").exists() or (cell.folder / "checkpoints").exists():
        return
    twin, record = next(twins(cell), (None, None))
    if twin is None:
        return
    for name in WORK:
        _copy(twin / name, cell.folder / name)
    of = f"{twin.parent.name}/{twin.name}"
    training = read_json(twin / "training.json")
    write_json(cell.folder / "training.json", {"taken_over": {"from": of, "commit": record["commit"]}} | training)
    note(f"{cell.name}: has the configuration of {of}, whose work is taken over")


def twins(cell: Cell) -> Iterator[tuple[Path, dict]]:
    """Folders and records of other cells of the scale, also of those put aside, that ended well with the same
    configuration, seed and library versions, and whose adapter is whole."""
    mine, versions = substance(cell.plain_config), environment()["versions"]
    for file in sorted(cell.folder.parent.parent.glob("*/*/record.json")):
        if file.parent == cell.folder:
            continue
        try:
            record = read_json(file)
        except Damaged:  # is for its own table to say
            continue
        same = record["status"] == "done" and record["versions"] == versions
        if same and set(differences(substance(record["config"]), mine)) <= SAME and _whole(file.parent):
            yield file.parent, record


def _whole(folder: Path) -> bool:
    return (folder / "training.json").exists() and not flaws(folder / "adapter")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)
