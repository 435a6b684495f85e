"""The draw as a callback of the stock Hugging Face Trainer."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from qdylora.adapter import gate_of, rank_settings
from qdylora.draw import Draw
from qdylora.gate import Nested
from qdylora.sort import check_sortable, sort_ranks
from qdylora.update import UPDATES, set_update


class DrawCallback(TrainerCallback):
    """Draws the rank(s) of every micro-batch, and writes the rank settings beside every checkpoint.

        Trainer(model=attach(model), callbacks=[DrawCallback(Draw())], ...)

    `ranks`, shape (micro_batches, rows), are the current step's, of all processes; `largest_rank` is the
    largest of them. `update` is what a step of the optimizer does to the ranks, one of `qdylora.update.UPDATES`. Before
    the first step that is drawn, if it is not the first of all (`Draw.from_step`), the ranks are sorted.
    """

    def __init__(self, draw: Draw, update: str = "drift"):
        if update not in UPDATES:
            raise ValueError(f"update is {update!r}; choose one of {', '.join(UPDATES)}")
        self.draw = draw
        self.update = update
        self.ranks = np.full((1, 1), draw.r_max)
        self._micro = 0

    @property
    def largest_rank(self) -> int:
        return int(self.ranks.max())

    def on_train_begin(self, args, state, control, model: nn.Module, optimizer, **kwargs):
        if self.draw.r_max != gate_of(model).r_max:
            raise ValueError(f"draw.r_max is {self.draw.r_max}, but the adapter's is {gate_of(model).r_max}")
        if self.draw.from_step:
            check_sortable(_plain(optimizer))
            if gate_of(model).scale != "constant":
                raise ValueError(
                    f"draw.from_step is {self.draw.from_step}, but the adapter's scale is {gate_of(model).scale!r}: "
                    "sorted ranks count as they were trained at r_max, so attach with scale='constant'"
                )
        set_update(self.update, _plain(optimizer), model, lambda: self.largest_rank)

    def on_step_begin(self, args, state, control, model: nn.Module, optimizer=None, **kwargs):
        if state.global_step == self.draw.from_step > 0:
            sort_ranks(model, _plain(optimizer))
        micro_batches = args.gradient_accumulation_steps * args.world_size
        rows, processes = args.per_device_train_batch_size, args.world_size
        self.ranks = self.draw.ranks_of_step(state.global_step, micro_batches, rows, processes)
        self._micro = 0
        self._set_rank(args, model)

    def on_substep_end(self, args, state, control, model: nn.Module, **kwargs):
        self._micro += 1
        self._set_rank(args, model)

    def on_step_end(self, args, state, control, model: nn.Module, **kwargs):
        gate_of(model).set_rank(self.draw.r_max)  # so that evaluation between steps is always at one rank

    def on_save(self, args, state, control, model: nn.Module, **kwargs):
        if state.is_world_process_zero:
            folder = f"{args.output_dir}/checkpoint-{state.global_step}"
            rank_settings(model, self.draw, self.update).save(folder)

    def _set_rank(self, args, model: nn.Module) -> None:
        if self.draw.kind == "nested":
            gate_of(model).set_rank(Nested(self.draw.ranks))
            return
        ranks = self.ranks[self._micro * args.world_size + args.process_index]
        gate_of(model).set_rank(int(ranks[0]) if self.draw.per != "sequence" else ranks.tolist())


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
