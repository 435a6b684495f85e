"""Sorted ranks: A and B turned so that B A stays as it is and its strongest directions come first.

Every prefix of a sorted adapter is close to the best approximation of its rank, as after `cut`'s SVD, but no singular
value moves from one factor to the other and the turn is orthogonal: training goes on where it was.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from qdylora.adapter import factors
from qdylora.update import has_8bit_state

#: What optimizers call their averages of the gradient and of its square: torch's Adam and SGD, bitsandbytes' all.
AVERAGES = {"exp_avg", "state1", "momentum_buffer"}
AVERAGES_OF_SQUARES = {"exp_avg_sq", "state2"}


@torch.no_grad()
def sort_ranks(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Sort the ranks of every layer's adapter, and with them the optimizer's state, in place.

    At r_max the model computes what it did before. Averages of gradients are turned exactly, averages of their squares
    as if gradients of different ranks were independent. Raises ValueError as `check_sortable` does.
    """
    check_sortable(optimizer)
    for A, B in factors(model):
        turn = sorting_turn(_whole(A), _whole(B)).to(A.dtype)
        _broadcast(turn)
        for parameter, rank_axis in ((A, 0), (B, 1)):
            _turn(parameter, turn, rank_axis)
            state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
            for name in state.keys() & AVERAGES:
                _turn(state[name], turn, rank_axis)
            for name in state.keys() & AVERAGES_OF_SQUARES:
                _turn(state[name], turn**2, rank_axis)


def check_sortable(optimizer: torch.optim.Optimizer | None) -> None:
    """Raises ValueError for 8-bit optimizers, whose state has another shape than the adapter."""
    if optimizer is not None and has_8bit_state(optimizer):
        raise ValueError("an 8-bit optimizer's state cannot be sorted by rank; choose a 32-bit optimizer such as adamw")


def sorting_turn(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The orthogonal R, shape (r, r) in float64, that sorts A (r, in) and B (out, r) as R A and B R^T.

    Its rows are the right singular vectors of B (A A^T)^1/2. Where the rows of A are orthogonal and of one length, as
    random ones of A's initial kind nearly are, the first b ranks are then the best approximation of rank b.
    """
    A, B = A.double(), B.double()
    values, vectors = torch.linalg.eigh(A @ A.T)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return torch.linalg.svd(torch.linalg.qr(B @ root).R, full_matrices=True).Vh


def _turn(tensor: torch.Tensor, turn: torch.Tensor, rank_axis: int) -> None:
    """Multiply `tensor`, (r, in) or (out, r), in place; where FSDP shards it, each process its part."""
    whole, turn = _whole(tensor), turn.to(tensor.dtype)
    turned = turn @ whole if rank_axis == 0 else whole @ turn.T
    if isinstance(tensor, DTensor):
        turned = distribute_tensor(turned, tensor.device_mesh, tensor.placements)
    tensor.copy_(turned)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _broadcast(turn: torch.Tensor) -> None:
    """All processes take the first one's: two devices need not find the same signs."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(turn, src=0)
