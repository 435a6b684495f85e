"""Whole checkpoints: sealed by a list of checksums written last, so that a half-written one is never used."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback

from eval.releases import sha256
from experiments.cell import note, read_json, write_json
from experiments.config import ConfigError

SEAL = "checksums.json"


class Seal(TrainerCallback):
    """Seals a checkpoint when the Trainer, and the callbacks before this one, have written all of it."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / SEAL, {f.name: sha256(f) for f in sorted(folder.iterdir()) if f.is_file()})


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def last_good(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose files are all as they were sealed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        try:
            sums = read_json(checkpoint / SEAL)
        except ValueError:
            sums = None
        if sums and all((checkpoint / name).is_file() and sha256(checkpoint / name) == s for name, s in sums.items()):
            return checkpoint
        note(f"{checkpoint} is incomplete or damaged; using the one before it")
    return None


def divided(batch: int, parts: int) -> int:
    """batch / parts. ConfigError unless it is whole."""
    if batch % parts:
        raise ConfigError(f"budget.batch is {batch}, which {parts} rows a forward pass on all processes do not divide")
    return batch // parts
