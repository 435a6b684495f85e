"""Weights & Biases: one run a cell, offline unless asked otherwise, and never the reason that a cell stops.

The cell's log and record are the truth, and its run is brought up to them whenever it is opened: when training starts
or goes on after a kill, and when the record is written. Offline the run is then written anew, because W&B resumes
only runs that its server knows; so `wandb sync` finds one folder a cell, whole and without repeated steps.

A cell that ended untracked, or while W&B could not be reached, is sent by

    python -m experiments.tracker data=alpaca method=qdylora tracker=wandb_online
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import numpy as np
from transformers import TrainerCallback

from experiments.cell import Cell, note
from experiments.cli import command
from experiments.files import read_json, write_json
from experiments.mistakes import ConfigError
from experiments.monitor import read_log
from experiments.schema import Config

UPLOAD = 60.0  # seconds to wait for W&B at the end of a run; what is left stays in the folder
BINS = 512  # most that W&B takes in a histogram
GIB = 2**30


class CellRun:
    """The W&B run of a cell, opened and brought up to the cell's log."""

    def __init__(self, cell: Cell):
        folder = cell.folder.resolve()  # W&B's own process may be in another working directory
        local = folder / "wandb"
        os.environ |= {"WANDB_SILENT": "true", "WANDB_DATA_DIR": str(local / "data")}  # nothing in the home folder
        import wandb

        if wandb.run:  # of training that broke off in this process
            wandb.teardown(exit_code=1)
        shutil.rmtree(local, ignore_errors=True)
        c = cell.config
        self.cell, self.last_step, self.evaluated = cell, 0, []
        self.run = wandb.init(
            project=c.tracker.project,
            mode=c.tracker.wandb,
            id=_id(cell),
            resume="allow" if c.tracker.wandb == "online" else None,
            name=cell.name,
            group=f"{c.scale}/{c.table.name}",
            job_type=cell.name.replace(f"--seed{c.seed}", ""),
            tags=[c.scale, c.table.name, c.model.name, c.data.name, c.method.name, f"seed{c.seed}"],
            config=cell.portable_config,
            dir=str(folder),
            settings=wandb.Settings(console="off", finish_timeout=UPLOAD),
        )
        self.run.define_metric("score/rank", hidden=True)
        self.run.define_metric("score/*", step_metric="score/rank")
        for line in read_log(folder / "log.jsonl"):
            self.add(line)

    def add(self, line: dict) -> None:
        """Log a step of training."""
        self.last_step = line["step"]
        values = series(line)
        if line["heldout"]:
            self.evaluated.append(line)
            values["heldout_loss_over_steps"] = _heldout_chart(self.evaluated)
        self._log(values, line["step"])

    def conclude(self, record: dict) -> None:
        """Add the cell's record and what it says, and end the run."""
        from wandb import Artifact, Histogram, Table

        found = list(scores(record))
        ranks = sorted({rank for _, rank, *_ in found})
        for place, rank in enumerate(ranks, start=1):  # after training's steps; their axis is the rank
            values = {f"score/{name}": value for name, at, value, *_ in found if at == rank}
            self._log({"score/rank": rank} | values, self.last_step + place)
        last = {"scores": Table(columns=["name", "rank", "value", "standard_error", "n"], data=found)}
        if updates := record.get("updates"):
            rows = np.arange(1, len(updates) + 1)
            span = (0.5, len(updates) + 0.5)
            counts = np.histogram(rows, bins=min(len(updates), BINS), range=span, weights=updates)
            last["updates_of_rows"] = Histogram(np_histogram=counts)
        self._log(last, self.last_step + len(ranks) + 1)
        self.run.summary.update({"status": record["status"], "reason": record["reason"]})
        artifact = Artifact(f"{self.cell.config.scale}-{self.cell.config.table.name}-{self.cell.name}", type="record")
        artifact.add_file(str(self.cell.record_file.resolve()))
        self.run.log_artifact(artifact)
        self.close(failed=record["status"] == "failed")

    def close(self, failed: bool = False) -> None:
        import wandb

        self.run.finish(exit_code=int(failed))
        wandb.teardown()  # until W&B's own process has written its files

    def _log(self, values: dict, step: int) -> None:
        if step >= self.run.step:  # else it is there from before the restart
            self.run.log(values, step=step)


def _id(cell: Cell) -> str:
    """The run's id, made once and kept in the cell's folder: it goes with the folder's work, also when put aside."""
    file = cell.folder / "tracker.json"
    if (found := read_json(file)) is None:
        found = {"id": uuid4().hex[:16]}
        write_json(file, found)
    return found["id"]


def series(line: dict) -> dict[str, float]:
    """A line of the log as W&B's named series."""
    found = {f"train/{key}": line[key] for key in ("loss", "lr", "grad_norm", "tokens_per_second")}
    found["train/rank"] = sum(line["ranks"]) / len(line["ranks"])
    if "peak_memory_bytes" in line:  # logs of before it was logged
        found["train/peak_memory_gib"] = line["peak_memory_bytes"] / GIB
    return found | {f"heldout_loss/rank_{b}": value for b, value in (line["heldout"] or {}).items()}


def _heldout_chart(lines: list[dict]) -> Any:
    """Held-out loss at every rank over the steps, in one chart."""
    from wandb.plot import line_series

    ranks = list(lines[0]["heldout"])
    losses = [[line["heldout"][b] for line in lines] for b in ranks]
    names = [f"rank {b}" for b in ranks]
    return line_series([line["step"] for line in lines], losses, names, "held-out loss", "optimizer step")


def scores(record: dict) -> Iterator[tuple[str, int, float, float | None, int]]:
    """(name, rank, value, standard error, items) of all that a record says was scored, other cuts as svd_mmlu_test."""
    ways = {"": record} | {f"{how}_": results for how, results in record.get("cuts", {}).items()}
    for prefix, results in ways.items():
        scored = {"heldout_loss": results["heldout"]} if "heldout" in results else {}
        for task, found in results.get("tasks", {}).items():
            scored |= {f"{task}_{split}": of_split for split, of_split in found["splits"].items()}
        for name, of in scored.items():
            for rank, one in of["ranks"].items():
                yield prefix + name, int(rank), one["value"], one["stderr"], of["n"]


class Tracker(TrainerCallback):
    """Sends each step's log line to the cell's run, and the record when the cell has ended."""

    def __init__(self, cell: Cell):
        self.cell = cell
        self.run: CellRun | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._open()

    def on_log(self, args, state, control, logs, **kwargs):
        if self.run and "line" in logs:
            self._safely(lambda: self.run.add(logs["line"]))

    def on_train_end(self, args, state, control, **kwargs):
        if self.run:
            self._safely(self.run.close)

    def conclude(self, record: dict) -> None:
        self._open()
        if self.run:
            self._safely(lambda: self.run.conclude(record))

    def _open(self) -> None:
        if self.cell.config.tracker.wandb != "off":
            self.run = self._safely(lambda: CellRun(self.cell))

    def _safely(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # whatever a tracker does, the cell goes on
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            note(f"{self.cell.name}: W&B stopped ({reason}); the cell goes on without it")
            self.run = None


def main(config: Config) -> int:
    from wandb.errors import Error

    cell = Cell(config)
    record = cell.ended()
    if record is None:
        raise ConfigError(f"{cell.name} has not ended with this configuration; experiments.run runs it")
    if config.tracker.wandb == "off":
        raise ConfigError("tracker.wandb is 'off'; choose tracker=wandb_offline or tracker=wandb_online")
    try:
        CellRun(cell).conclude(record)
    except Error as error:
        raise ConfigError(f"W&B: {error}") from error
    return 0


if __name__ == "__main__":
    command(main)
