"""Keep the results of a scale in the repository:  make keep SCALE=small

Copies finished cells (records, items, logs) and tables from outputs/<scale> to experiments/results/<scale>, and beside
it the forecasts of memory, which claims need; adapters and checkpoints stay where they are. Kept records make tables as
those in outputs/ do, without running anything:
make rivals SCALE=small SOURCE=local ROOT=FOLDER ARGS=outputs=experiments/results
"""

from __future__ import annotations

import shutil
from pathlib import Path

from analysis.forecasts import files as forecasts
from experiments.cell import note
from experiments.cli import command
from experiments.mistakes import ConfigError
from experiments.schema import Config

RESULTS = Path(__file__).parent / "results"
OF_A_CELL = ("record.json", "log.jsonl", "items/*.jsonl.gz")
OF_A_TABLE = ("*.md", "*.tex", "*.csv")


def kept(scale: Path) -> list[Path]:
    """Files of outputs/ that belong to the results of `scale`, a folder there; none if no cell of it has ended. Cells
    that were put aside (`name~digest`) do not."""
    cells = [record.parent for record in sorted(scale.glob("*/*/record.json")) if "~" not in record.parent.name]
    tables = sorted({cell.parent for cell in cells})
    of_cells = [file for cell in cells for pattern in OF_A_CELL for file in sorted(cell.glob(pattern))]
    of_tables = [file for table in tables for pattern in OF_A_TABLE for file in sorted(table.glob(pattern))]
    return of_cells + of_tables + (forecasts(scale) if cells else [])


def keep(scale: Path, results: Path) -> int:
    """Copy the results of outputs/<scale> into `results`; returns how many files."""
    scale = scale.resolve()
    files = kept(scale)
    for file in files:
        target = results / file.relative_to(scale.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return len(files)


def main(config: Config) -> None:
    scale = Path(config.outputs) / config.scale
    if not kept(scale):
        raise ConfigError(f"scale is {config.scale!r}, and {scale} holds no finished cell; run a table first")
    note(f"{keep(scale, RESULTS)} files kept in {RESULTS / config.scale}")


if __name__ == "__main__":
    command(main)
