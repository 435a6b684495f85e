"""Weights & Biases: offline unless asked otherwise, and never the reason that a cell stops."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from experiments.cell import Cell, note


class Tracker(TrainerCallback):
    """Sends each step's log line to a W&B run that belongs to the cell, also after a restart."""

    def __init__(self, cell: Cell):
        self.cell = cell
        self.run: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.cell.config.tracker.wandb != "off" and state.is_world_process_zero:
            self.run = self._safely(self._start)

    def on_log(self, args, state, control, logs, **kwargs):
        if self.run and "line" in logs:
            self._safely(lambda: self.run.log(_series(logs["line"]), step=state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        if self.run:
            self._safely(self.run.finish)

    def _start(self):
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        c = self.cell.config
        return wandb.init(
            project=c.tracker.project,
            mode=c.tracker.wandb,
            id=f"{c.scale}-{c.table.name}-{self.cell.name}-{self.cell.digest}",
            name=self.cell.name,
            group=f"{c.scale}/{c.table.name}",
            tags=[c.model.name, c.data.name, c.method.name],
            config=self.cell.plain_config,
            dir=str(self.cell.folder),
            resume="allow" if c.tracker.wandb == "online" else None,
        )

    def _safely(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # whatever a tracker does, the cell goes on
            note(f"{self.cell.name}: W&B stopped ({type(error).__name__}: {error}); training goes on without it")
            self.run = None


def _series(line: dict) -> dict:
    """A log line as W&B's named series."""
    series = {f"train/{key}": line[key] for key in ("loss", "lr", "grad_norm", "tokens_per_second")}
    series["train/rank"] = sum(line["ranks"]) / len(line["ranks"])
    return series | {f"heldout_loss/rank_{b}": value for b, value in (line["heldout"] or {}).items()}
