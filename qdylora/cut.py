"""Ways to use a static adapter, trained at one rank r, at a lower rank b without further training.

truncate                the first b rows, scaled as trained: alpha/r (the zeros of the paper's Table 3)
truncate_alpha_over_b   the first b rows, scaled alpha/b, as if they had been trained at rank b
svd                     the best rank-b approximation of the whole product B A, what a careful user would do
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft import PeftModel

from qdylora.adapter import factors, gate_of
from qdylora.gate import Gate

AS_TRAINED = "truncate"  # how an adapter is used at a lower rank where nothing else is said
ALPHA_OVER_B, SVD = "truncate_alpha_over_b", "svd"
CUTS = (AS_TRAINED, ALPHA_OVER_B, SVD)


@contextmanager
def cut(model: PeftModel, how: str) -> Iterator[None]:
    """Inside this context the adapter is cut in the way `how` at every rank; afterwards it is as before.

    At r_max, alpha/b and SVD leave a LoRA adapter as it is. ValueError for an unknown way.
    """
    gate = gate_of(model)
    if checked(how) == AS_TRAINED:
        yield
    elif how == ALPHA_OVER_B:
        with gate.scaled("alpha_over_b"):
            yield
    else:
        before = _decompose(model, gate)
        try:
            with gate.scaled("constant"):
                yield
        finally:
            for weight, values in before:
                weight.data = values


def checked(how: str) -> str:
    """`how`; ValueError unless it is one of CUTS."""
    if how not in CUTS:
        raise ValueError(f"cut is {how!r}; choose one of {', '.join(CUTS)}")
    return how


def svd_factors(
    A: torch.Tensor, B: torch.Tensor, scale: float, rank: int, new_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A' (rank, in) and B' (out, rank) with new_scale B' A' the best rank-b approximation of scale B A.

    A is (r, in) and B (out, r). By QR of both factors the SVD is only of an (r, r) matrix. Where a layer is
    narrower than `rank`, the rows and columns that have nothing to do are zero.
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T * (scale / new_scale), full_matrices=False)
    root = S[:rank].sqrt()
    new_A = (Vh[:rank] * root[:, None]) @ Q_A.T
    new_B = (Q_B @ U[:, :rank]) * root
    idle = rank - len(root)
    return F.pad(new_A, (0, 0, 0, idle)).to(A.dtype), F.pad(new_B, (0, idle)).to(B.dtype)


def _decompose(model: PeftModel, gate: Gate) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Replace A and B of every layer by factors of the same product whose columns come in order of their singular
    values: every prefix, at a constant scale, is then the best approximation of its rank. Returns what was there."""
    trained = gate.scale_at(gate.r_max)
    with gate.scaled("constant"):
        constant = gate.scale_at(gate.r_max)
    before = []
    for A, B in factors(model):
        before += [(A, A.data), (B, B.data)]
        A.data, B.data = svd_factors(A.data, B.data, trained, gate.r_max, constant)
    return before
