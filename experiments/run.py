"""Run one cell to its end - train, score, record:  python -m experiments.run data=alpaca method=qdylora"""

from __future__ import annotations

import os

from experiments.attempt import attempt
from experiments.cell import Cell
from experiments.cli import command, quiet, verdict
from experiments.forecast import forecast_of, why_not
from experiments.mistakes import ConfigError
from experiments.schema import Config
from experiments.score import score
from experiments.tracker import Tracker
from experiments.train import train


def run(cell: Cell) -> dict:
    """The cell's record, from its file if the cell has ended. Running out of memory is a result: met, or forecast
    where the configuration names a GPU."""
    if record := cell.record():
        return record
    attempt(cell, lambda: _run(cell), lambda: _expected(cell.config))
    record = cell.ended()
    Tracker(cell).conclude(record)
    return record


def _run(cell: Cell) -> dict:
    if record := cell.record():  # finished by another process while this one waited for it
        return record
    predicted = {}
    if cell.config.forecast.gpu_gb is not None:
        memory = forecast_of(cell.config)
        predicted = {"forecast": memory.parts}
        if reason := why_not(memory, cell.config.forecast):
            return cell.finish("oom", reason, oom="forecast", **predicted)
    return cell.finish("done", **train(cell), **score(cell), **predicted)


def _expected(config: Config) -> dict:
    """For the record of a cell that ran out of memory: what was forecast, if the base's architecture is known."""
    try:
        return {"forecast": forecast_of(config).parts}
    except ConfigError:
        return {}


def main(config: Config) -> int:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "WORLD_SIZE is more than 1, but only training uses several processes: "
            "start experiments.train with torchrun, then experiments.run without"
        )
    quiet()
    return verdict(run(Cell(config)))


if __name__ == "__main__":
    command(main)
