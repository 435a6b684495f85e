"""What is watched while a cell trains: a log of every step, held-out loss at every rank, a progress bar."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from eval.engine import AllRanks
from eval.score import heldout_loss
from experiments import signals
from experiments.attempt import Hopeless
from experiments.cell import peak_memory
from experiments.data.encode import Encoded
from experiments.schema import Config
from qdylora import DrawCallback


def sequences(encoded: list[Encoded]) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) tokens of each example."""
    return [(e.input_ids[: e.prompt_tokens], e.input_ids[e.prompt_tokens :]) for e in encoded]


def read_log(file: Path, up_to: int | None = None, rewrite: bool = False) -> list[dict]:
    """The lines of a training log, those of steps up to `up_to`; `rewrite` drops the others from the file.

    A step after the checkpoint that training resumes from is done, and logged, again.
    """
    if not file.exists():
        return []
    lines = []
    for text in file.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # killed while writing the last line
        if up_to is None or line["step"] <= up_to:
            lines.append(line)
    if rewrite:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


class HeldOutLoss(TrainerCallback):
    """Every N steps, the held-out loss at every evaluation rank, logged with the step."""

    def __init__(self, config: Config, held_out: list[Encoded]):
        self.every, self.config = config.tracker.heldout_every, config
        self.sequences = sequences(held_out[: config.tracker.heldout_items])

    def on_step_end(self, args, state, control, model, **kwargs):
        if self.every and (state.global_step % self.every == 0 or state.global_step == state.max_steps):
            tasks = self.config.tasks
            engine = AllRanks(model, self.config.ranks.eval, tasks.tokens_per_batch, progress=False)
            state.heldout = {b: r["value"] for b, r in heldout_loss(engine, self.sequences)["ranks"].items()}


class TokenBudget(TrainerCallback):
    """Stops training when the budget's tokens are spent."""

    def __init__(self, tokens: int | None):
        self.tokens = tokens

    def on_step_end(self, args, state, control, **kwargs):
        if self.tokens and state.num_input_tokens_seen >= self.tokens:
            control.should_training_stop = control.should_save = True


class Log(TrainerCallback):
    """One JSON line a step: loss, learning rate, gradient norm, ranks drawn, tokens, seconds, memory so far."""

    def __init__(self, file: Path, draws: DrawCallback):
        self.file, self.draws = file, draws

    def on_step_begin(self, args, state, control, **kwargs):
        self.started, self.tokens = time.monotonic(), state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.monotonic() - self.started
        state.heldout = getattr(state, "heldout", None)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        tokens = state.num_input_tokens_seen - self.tokens
        line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": float(logs["grad_norm"]),
            "ranks": self.draws.ranks.ravel().tolist(),
            "tokens": tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens / self.seconds, 1),
            "peak_memory_bytes": peak_memory(),
            "heldout": state.heldout,
        }
        state.heldout = None
        logs |= {"line": line}
        with open(self.file, "a") as stream:
            stream.write(json.dumps(line) + "\n")


class Finite(TrainerCallback):
    """Stops training, before the next checkpoint, when the loss or its gradient is not a number any more."""

    def __init__(self, draws: DrawCallback):
        self.draws = draws

    def on_log(self, args, state, control, logs, **kwargs):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0)):
                raise Hopeless(
                    f"{name} is {logs[name]} in step {state.global_step} at rank {self.draws.largest_rank}; "
                    "the last good checkpoint is kept; choose a lower optim.lr or a wider optim.compute_dtype"
                )


class StopAtSignal(TrainerCallback):
    """Ends training with a checkpoint after the step in which a signal came; all processes at the same step."""

    def on_step_end(self, args, state, control, **kwargs):
        number = signals.asked()
        if args.world_size > 1:
            highest = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            number = int(highest)
        if number:
            signals.ask(number)
            control.should_save = control.should_training_stop = True


class ProgressBar(TrainerCallback):
    """Steps, loss, rank, and the time left."""

    def __init__(self, name: str, draws: DrawCallback):
        self.name, self.draws = name, draws

    def on_train_begin(self, args, state, control, **kwargs):
        disable = not state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", leave=False, disable=disable
        )

    def on_log(self, args, state, control, logs, **kwargs):
        if "line" in logs:
            line = logs["line"]
            self.bar.set_postfix(loss=f"{line['loss']:.3f}", rank=self.draws.largest_rank, refresh=False)
            self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
