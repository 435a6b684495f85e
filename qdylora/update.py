"""What a step of the optimizer does to the ranks.

drift    nothing special: Adam's momentum and weight decay also move the rows above b, whose gradient is zero in this
         step (the official DyLoRA code's behaviour)
masked   the rows above b, and their optimizer state, stay as they were
graded   ours: low ranks learn faster than high ones
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor

from qdylora.adapter import factors

UPDATES = ("drift", "masked", "graded")


def set_update(
    update: str, optimizer: torch.optim.Optimizer, model: nn.Module, largest_rank: Callable[[], int]
) -> None:
    """From now on steps of `optimizer` follow one of UPDATES. ValueError as `mask_updates` raises it."""
    if update == "masked":
        mask_updates(optimizer, model, largest_rank)
    elif update == "graded":
        grade_updates(optimizer, model)


def mask_updates(optimizer: torch.optim.Optimizer, model: nn.Module, largest_rank: Callable[[], int]) -> None:
    """From now on a step of `optimizer` leaves alone all rows of A and columns of B above `largest_rank()`,
    the largest rank of the batch that made the gradient, together with their entries of the optimizer's state.

    Works by copying those rows before the step and putting them back after it, so it holds for every
    optimizer whose state has the parameter's shape; Adam's step count, one number per tensor, goes on. Raises
    ValueError for 8-bit optimizers, whose state has another shape.
    """
    if has_8bit_state(optimizer):
        raise ValueError(
            "update is 'masked', but an 8-bit optimizer's state cannot be cut by rank; "
            "choose a 32-bit optimizer such as adamw, or update: drift"
        )
    rank_axis = _rank_axes(model)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def unused_parts(b: int) -> Iterator[torch.Tensor]:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p not in rank_axis:
                    continue
                states = [s for s in optimizer.state.get(p, {}).values() if torch.is_tensor(s) and s.ndim]
                for tensor in (p.data, *states):
                    yield tensor.narrow(rank_axis[p], b, tensor.shape[rank_axis[p]] - b)

    def before(*_) -> None:
        kept[:] = [(part, part.clone()) for part in unused_parts(largest_rank())]

    def after(*_) -> None:
        for part, value in kept:
            part.copy_(value)
        # State that this step created starts at zero above b, as if the step had not been.
        known = {part.data_ptr() for part, _ in kept}
        for part in unused_parts(largest_rank()):
            if part.data_ptr() not in known:
                part.zero_()
        kept.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def grade_updates(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """From now on a step of `optimizer` moves column i of every B `rates(r)[i - 1]` times as far.

    A learning rate for every rank, as LoRA+ (arXiv 2402.12354) has one for A and one for B: with Adam it is as if entry
    i of the gate were scaled by it. What is learned gathers in few directions, which a cut by SVD keeps.
    """
    every_B = [B for _, B in factors(model)]
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before(*_) -> None:
        kept[:] = [(B, B.clone()) for B in (_local(B.detach()) for B in every_B)]

    def after(*_) -> None:
        for B, value in kept:
            B.copy_(value.lerp(B, rates(B.shape[1]).to(B)))
        kept.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def rates(r: int) -> torch.Tensor:
    """In proportion to 1/i for the ranks i = 1..r, 1 on average, shape (r,)."""
    rate = 1 / torch.arange(1, r + 1, dtype=torch.float64)
    return rate / rate.mean()


def has_8bit_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of bitsandbytes' that keep their state in 8 bits."""
    return getattr(getattr(optimizer, "args", None), "optim_bits", 32) != 32


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part, which FSDP cuts along the rows of B."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rank_axes(model: nn.Module) -> dict[nn.Parameter, int]:
    """Which axis of each adapter parameter counts rank: 0 of A (r, in), 1 of B (out, r)."""
    axes = {}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            axes |= {m.weight: 0 for m in module.lora_A.values()} | {m.weight: 1 for m in module.lora_B.values()}
    return axes
