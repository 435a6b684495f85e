"""Run one cell to its end - train, score, record:  python -m experiments.run data=alpaca method=qdylora"""

from __future__ import annotations

import traceback

from eval.engine import is_out_of_memory
from experiments.cell import Cell, note
from experiments.cli import command, quiet
from experiments.config import Config, ConfigError
from experiments.forecast import forecast_of, why_not
from experiments.score import score
from experiments.train import peak_memory, train


def run(cell: Cell) -> dict:
    """The cell's record, from its file if the cell has ended. Running out of memory is a result: met, or forecast
    where the configuration names a GPU."""
    if record := cell.record():
        return record
    for name in cell.prepare():
        note(f"{cell.name}: {name} has changed; what was there is put aside, the cell starts anew")
    predicted = {}
    try:
        if cell.config.forecast.gpu_gb is not None:
            memory = forecast_of(cell.config)
            predicted = {"forecast": memory.parts}
            if reason := why_not(memory, cell.config.forecast):
                return cell.finish("oom", reason, oom="forecast", budget={"asked": cell.budget}, **predicted)
        return cell.finish("done", **train(cell), **score(cell), **predicted)
    except (ConfigError, FileNotFoundError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if is_out_of_memory(error):
            met = {"oom": "met", "peak_memory_bytes": peak_memory()}
            return cell.finish("oom", reason, budget={"asked": cell.budget}, **met, **predicted)
        traceback.print_exc()
        return cell.finish("failed", reason, budget={"asked": cell.budget})


def main(config: Config) -> int:
    quiet()
    record = run(Cell(config))
    if record["status"] == "failed":
        note(f"{record['name']} failed: {record['reason']}")
    return int(record["status"] == "failed")


if __name__ == "__main__":
    command(main)
