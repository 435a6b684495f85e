"""Run what is missing of a table, cell by cell, and print it:  python -m experiments.table table=table1 scale=mini"""

from __future__ import annotations

import sys
import time
from collections import deque
from itertools import product
from pathlib import Path

from filelock import SoftFileLease, Timeout
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from analysis.records import load
from analysis.settings import table4
from analysis.tables import TABLES, Table, to_csv, to_latex, to_markdown
from experiments.attempt import claim
from experiments.cell import Cell, note
from experiments.cli import Unsuccessful, command
from experiments.config import CONF, resolved
from experiments.mistakes import mistakes_in
from experiments.process import MALLOC, in_a_process
from experiments.schema import Config, TableSettings
from experiments.signals import AGAIN

PATIENCE = 5.0  # seconds between looks at cells that other processes run


def cells(config: Config, overrides: list[str]) -> list[tuple[list[str], Cell]]:
    """Every cell of the configuration's table, with the command-line overrides that make it.

    `overrides` are the table's own; those of a cell come after them.
    """
    table = config.table
    found = []
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        ranks = [[f"ranks.r_max={b}", f"ranks.eval=[{b}]"] for b in table.ranks] or [[]]
        cells_of = product(table.models, table.data, ways(table), ranks, table.seeds)
        for model, data, way, rank, seed in cells_of:
            own = [*overrides, f"model={model}", f"data={data}", *way, *rank, f"seed={seed}"]
            one = resolved(compose("config", overrides=own))
            for share in table.budgets:
                swept = [*own, f"budget.steps={max(1, round(share * one.budget.steps))}"]
                found.append((swept, Cell(resolved(compose("config", overrides=swept)))))
            if not table.budgets:
                found.append((own, Cell(one)))
    return found


def ways(table: TableSettings) -> list[list[str]]:
    """The overrides by which a table's cells of one model, data set and seed differ: its variants, or its methods."""
    variants = [[f"table.variant={name}", *overrides] for name, overrides in table.variants.items()]
    return variants or [[f"method={method}"] for method in table.methods]


def run_missing(found: list[tuple[list[str], Cell]]) -> int:
    """Run the cells that have no record, each in a process of its own; returns how many did not end well.

    A cell that another process runs is left for later: two sweeps side by side share the cells.
    """
    waiting = deque((overrides, cell, claim(cell)) for overrides, cell in found if cell.record() is None)
    total, finished, failed, passed_over = len(waiting), 0, 0, 0
    started = time.monotonic()
    while waiting:
        overrides, cell, lease = waiting.popleft()
        if cell.record() is not None:  # the other sweep has finished it
            finished, passed_over = finished + 1, 0
            continue
        if taken(lease):
            waiting.append((overrides, cell, lease))
            passed_over += 1
            if passed_over == len(waiting):
                time.sleep(PATIENCE)
                passed_over = 0
            continue
        left = (time.monotonic() - started) / finished * (total - finished) if finished else None
        note(f"[{finished + 1}/{total}] {cell.name}" + (f", about {left / 60:.0f} min left" if left else ""))
        code = in_a_process([sys.executable, "-m", "experiments.run", *overrides, "when_busy=leave"], MALLOC)
        if code == AGAIN:  # another process was faster to take it
            waiting.append((overrides, cell, lease))
            continue
        if code == 2:  # a mistake in the configuration or a missing file: the other cells have it too
            raise Unsuccessful(2)
        finished, failed, passed_over = finished + 1, failed + (code != 0), 0
    return failed


def taken(lease: SoftFileLease) -> bool:
    """Whether another process holds a cell."""
    try:
        lease.acquire(blocking=False)
    except Timeout:
        return True
    lease.release()
    return False


def show(found: list[tuple[list[str], Cell]], config: Config) -> None:
    """The table made of the cells' records."""
    names = {cell.name for _, cell in found}
    if not any(cell.ended() for _, cell in found):
        note(f"no cell of {config.table.name} has ended, so there is no table yet")
        return
    with mistakes_in(f"records of {config.table.name}"):
        records = load(folder_of(config))
        table = TABLES[config.table.name]([record for record in records if record.name in names])
    write(table, config)


def settings(config: Config, overrides: list[str]) -> Table:
    """The table of the settings of other tables' cells, which are composed and not run."""
    own = [text for text in overrides if not text.startswith("table=")]
    tables = {}
    for name in config.table.of:
        of = [f"table={name}", *own]
        tables[name] = [cell.plain_config for _, cell in cells(composed(of), of)]
    return table4(tables)


def composed(overrides: list[str]) -> Config:
    """The configuration that a command with these overrides would have."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return resolved(compose("config", overrides=overrides))


def folder_of(config: Config) -> Path:
    return Path(config.outputs) / config.scale / config.table.name


def write(table: Table, config: Config) -> None:
    """Print a table, and write it as Markdown, LaTeX and CSV into its folder."""
    folder = folder_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, render in {"md": to_markdown, "tex": to_latex, "csv": to_csv}.items():
        (folder / f"{config.table.name}.{suffix}").write_text(render(table))
    print(to_markdown(table))
    note(f"written to {folder}/{config.table.name}.md, .tex and .csv")


def main(config: Config) -> int:
    overrides = list(HydraConfig.get().overrides.task)
    if config.table.of:
        write(settings(config, overrides), config)
        return 0
    found = cells(config, overrides)
    failed = run_missing(found)
    show(found, config)
    return int(failed > 0)


if __name__ == "__main__":
    command(main)
