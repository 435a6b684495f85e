"""Whole checkpoints: sealed by a list of checksums written last, so that a half-written one is never used."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import TrainerCallback

from experiments.cell import note
from experiments.files import flaws, seal
from experiments.mistakes import ConfigError

KEPT = 2


class Seal(TrainerCallback):
    """Seals a checkpoint when the Trainer, and the callbacks before this one, have written all of it; then removes
    all but the newest `KEPT`.

    The Trainer itself would remove old ones before the new one is sealed, and go by the clock.
    """

    def on_save(self, args, state, control, **kwargs):
        if args.world_size > 1:
            torch.distributed.barrier()  # every process writes its random state
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            seal(folder / f"checkpoint-{state.global_step}")
            for old in newest_first(folder)[KEPT:]:
                shutil.rmtree(old)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not."""
    return sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)


def last_good(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose files are all as they were sealed. Newer ones, which are of no use, are
    removed."""
    for checkpoint in newest_first(folder):
        if not flaws(checkpoint):
            return checkpoint
        note(f"{checkpoint} is incomplete or damaged; using the one before it")
        shutil.rmtree(checkpoint)
    return None


def divided(batch: int, parts: int) -> int:
    """batch / parts. ConfigError unless it is whole."""
    if batch % parts:
        raise ConfigError(f"budget.batch is {batch}, which {parts} rows a forward pass on all processes do not divide")
    return batch // parts
