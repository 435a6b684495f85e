"""The gate: the diagonal g of  h = W0 x + B diag(g) A x.

One `Gate` serves every LoRA layer of a model through PEFT's `LoraVariant` hook, so the rank of the whole
model is switched in one place and no layer is rewritten. At rank b (1-based) the first b entries of g are
the scale, the rest are zero (QDyLoRA, arXiv 2402.10462, Eq. 1; DyLoRA, arXiv 2210.07558, Eq. 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer, LoraVariant

#: The scale of an adapter used at rank b, of maximum rank r_max: the paper's, rsLoRA's, plain LoRA's.
SCALES: dict[str, Callable[[float, int, int], float]] = {
    "alpha_over_b": lambda alpha, b, r_max: alpha / b,
    "alpha_over_sqrt_b": lambda alpha, b, r_max: alpha / math.sqrt(b),
    "constant": lambda alpha, b, r_max: alpha / r_max,
}

#: Neighbouring rows of one rank are sliced together, instead of masked, from this many tokens on average.
WORTH_SLICING = 64


@dataclass(frozen=True)
class Nested:
    """All prefixes of these ranks at once, summed, each with its own scale: what MatryoshkaLoRA (arXiv 2605.07850,
    Algorithm 1) trains. The sum is one product with a fixed diagonal: entry i is the sum of scale(b) over b >= i."""

    ranks: tuple[int, ...]


@dataclass(eq=False)
class Gate(LoraVariant):
    """Rank, scale and gradient rule of one adapter, shared by all its LoRA layers.

    `rank` is one integer b for the whole batch, which slices A[:b] and B[:, :b] so that cost falls with b; or one
    integer per row of the batch, which multiplies by a mask (or slices, where many neighbouring tokens have one
    rank), with the same numbers; or `Nested` ranks, for training.
    `frozen` lets only row b of A and column b of B learn (DyLoRA, Eq. 10); otherwise rows 1..b learn
    (QDyLoRA, Eq. 3).
    """

    r_max: int
    alpha: float
    scale: str = "alpha_over_b"
    frozen: bool = False
    rank: int | tuple[int, ...] | Nested = field(init=False)
    _masks: dict[tuple, torch.Tensor] = field(init=False, default_factory=dict, repr=False)
    _merged_at: WeakKeyDictionary = field(init=False, default_factory=WeakKeyDictionary, repr=False)

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale is {self.scale!r}; choose one of {', '.join(SCALES)}")
        self.rank = self.r_max

    def scale_at(self, b: int) -> float:
        """The factor on B[:, :b] A[:b] at rank b."""
        return SCALES[self.scale](self.alpha, b, self.r_max)

    def checked(self, b: int) -> int:
        """b as an int; ValueError unless it is a whole number in 1..r_max."""
        if isinstance(b, bool) or int(b) != b or not 1 <= b <= self.r_max:
            raise ValueError(f"rank must be a whole number from 1 to {self.r_max}, got {b}")
        return int(b)

    def set_rank(self, rank: int | Sequence[int] | Nested) -> None:
        """Use rank b for the whole batch, ranks[i] for row i of the batch, or the sum of `Nested` ranks."""
        if isinstance(rank, Nested):
            if self.frozen:
                raise ValueError("nested ranks train all rows at once, which a frozen gate does not: use frozen=False")
            rank = Nested(tuple(self.checked(b) for b in rank.ranks))
        elif isinstance(rank, (Sequence, torch.Tensor)) and not isinstance(rank, str):
            rank = tuple(self.checked(b) for b in rank)
        else:
            rank = self.checked(rank)
        if rank != self.rank:
            self.rank = rank
            self._masks.clear()

    @contextmanager
    def at(self, rank: int | Sequence[int] | Nested) -> Iterator[Gate]:
        """Inside this context the model works at the given rank(s); afterwards at those it had before."""
        before = self.rank
        self.set_rank(rank)
        try:
            yield self
        finally:
            self.set_rank(before)

    @contextmanager
    def scaled(self, scale: str) -> Iterator[Gate]:
        """Inside this context ranks are scaled by another rule of SCALES; afterwards by the one before."""
        if scale not in SCALES:
            raise ValueError(f"scale is {scale!r}; choose one of {', '.join(SCALES)}")
        before = self.scale
        self._set_scale(scale)
        try:
            yield self
        finally:
            self._set_scale(before)

    def _set_scale(self, scale: str) -> None:
        self.scale = scale
        self._masks.clear()

    # PEFT's LoraVariant interface ---------------------------------------------------------------------

    def init(self, module: LoraLayer, adapter_name: str, **kwargs) -> None:
        """Nothing to set up in a layer: PEFT has already made A (r_max, in) and B (out, r_max)."""

    def forward(
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs
    ) -> torch.Tensor:
        """result + B diag(g) A dropout(x), computed in x's dtype.

        Shapes: x (batch, ..., in), result (batch, ..., out). Raises ValueError when ranks are per row and the
        batch has another number of rows.
        """
        A, B = (p.to(x.dtype) for p in _factors(module, active_adapter))
        x = module.lora_dropout[active_adapter](x)
        if isinstance(self.rank, tuple):
            return result + self._per_row(module, x, A, B)
        if isinstance(self.rank, Nested):
            return result + F.linear(F.linear(x, A) * self._diagonal(self.rank.ranks, x), B)
        return result + self._sliced(x, A, B, self.rank)

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """orig_weight (out, in) plus the adapter at the current rank, as a new tensor."""
        if not isinstance(self.rank, int):
            raise ValueError("merging needs one rank for the whole model: call set_rank(b) with an integer first")
        self._merged_at[module] = self.rank
        return self.plus_delta(module, active_adapter, orig_weight, self.rank)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """As `merge_safe`, in place. PEFT calls this one by default; without it nothing would be merged."""
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight without the adapter, at the rank it was merged at, whatever the gate says now."""
        return self.plus_delta(module, active_adapter, orig_weight, self._merged_at.pop(module), sign=-1)

    # ---------------------------------------------------------------------------------------------------

    def plus_delta(self, module: LoraLayer, adapter: str, weight: torch.Tensor, b: int, sign: int = 1) -> torch.Tensor:
        """weight (out, in) plus, or minus, scale(b) B[:, :b] A[:b], as a new tensor of weight's type.

        The sum is made in float32 or wider and rounded once: a delta rounded to bfloat16 first would lose more.
        """
        A, B = (p.detach() for p in _factors(module, adapter))
        wide = torch.promote_types(torch.promote_types(A.dtype, weight.dtype), torch.float32)
        left, right = B[:, :b].to(wide), A[:b].to(wide)
        if getattr(module, "fan_in_fan_out", False):
            left, right = right.T, left.T
        return torch.addmm(weight.to(wide), left, right, alpha=sign * self.scale_at(b)).to(weight.dtype)

    def _sliced(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, b: int) -> torch.Tensor:
        A_b, B_b = A[:b], B[:, :b]
        if self.frozen and b > 1:
            A_b = torch.cat([A_b[:-1].detach(), A_b[-1:]])
            B_b = torch.cat([B_b[:, :-1].detach(), B_b[:, -1:]], dim=1)
        return F.linear(F.linear(x, A_b) * self.scale_at(b), B_b)

    def _per_row(self, module: LoraLayer, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        # The last batch of an epoch may be smaller: it uses the first of the ranks drawn for it.
        if len(self.rank) < len(x) or (len(self.rank) > len(x) and not module.training):
            raise ValueError(f"the gate holds {len(self.rank)} ranks, one per batch row, but the batch has {len(x)}")
        runs = [(b, len(list(rows))) for b, rows in groupby(self.rank[: len(x)])]
        if x[..., 0].numel() >= WORTH_SLICING * len(runs):
            parts = zip(x.split([n for _, n in runs]), runs, strict=True)
            return torch.cat([self._sliced(rows, A, B, b) for rows, (b, _) in parts])
        prefix = self._mask(x, last_only=False)
        if not (self.frozen and torch.is_grad_enabled()):
            return F.linear(F.linear(x, A) * prefix, B)
        last = self._mask(x, last_only=True)
        below = prefix - last
        z = F.linear(x, A) * last + F.linear(x, A.detach()) * below
        return F.linear(z * (last != 0), B) + F.linear(z * (last == 0), B.detach())

    def _diagonal(self, ranks: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
        """g of nested ranks, shape (r_max,)."""
        key = (x.device, x.dtype)
        if key not in self._masks:
            prefixes = torch.zeros(self.r_max, device=x.device)
            for b in ranks:
                prefixes[:b] += self.scale_at(b)
            self._masks[key] = prefixes.to(x.dtype)
        return self._masks[key]

    def _mask(self, x: torch.Tensor, last_only: bool) -> torch.Tensor:
        """g per row, shape (batch, 1, ..., r_max), with as many axes as x; only entry b of it if `last_only`."""
        key = (len(x), x.device, x.dtype, x.ndim, last_only)
        if key not in self._masks:
            ranks = torch.tensor(self.rank[: len(x)], device=x.device)[:, None]
            rows = torch.arange(1, self.r_max + 1, device=x.device)
            scale = torch.tensor([self.scale_at(b) for b in self.rank[: len(x)]], device=x.device)[:, None]
            mask = scale * (rows == ranks if last_only else rows <= ranks)
            self._masks[key] = mask.to(x.dtype).reshape(len(x), *[1] * (x.ndim - 2), self.r_max)
        return self._masks[key]


def _factors(module: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r_max, in) and B (out, r_max) of one layer."""
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight
