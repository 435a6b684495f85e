"""How much memory training will need, by part, and how much arithmetic: in seconds, without the weights.

Not a rule of thumb: the model's own code, PEFT's, bitsandbytes' and the optimizer's run on tensors without content,
and what they allocate is counted (`qdylora.ledger`). What is not counted is what lies outside PyTorch's allocator: the
CUDA context, libraries' own buffers and fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import bitsandbytes as bnb
import torch
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from qdylora.adapter import attach, gate_of, set_rank
from qdylora.base import contiguous_head_input
from qdylora.ledger import PARTS, Ledger, device_kernels
from qdylora.update import set_update

#: bitsandbytes keeps the state of smaller parameters out of unified memory.
PAGED_FROM = 100_000
#: What CUDA's caching allocator rounds an allocation up to.
CUDA_GRANULE = 512


@dataclass(frozen=True)
class Shape:
    """One micro-batch of training. length: tokens of its longest row. logits: how many of the last positions have
    logits computed, all if None. With more than one row the shorter ones are padded, so attention gets a mask.
    """

    micro_batch: int
    length: int
    logits: int | None = None


@dataclass(frozen=True)
class Training:
    """What else decides how much a step holds. optimizer: adamw, sgd, paged_adamw_32bit or paged_adamw_8bit.
    accumulate: a step has several micro-batches, so that gradients are held while the next ones are computed.
    update: see `qdylora.update`. rank_per_row: every row has a rank of its own. device: whose kernels,
    cuda or cpu.
    """

    optimizer: str = "paged_adamw_32bit"
    checkpoint_activations: bool = True
    accumulate: bool = True
    update: str = "drift"
    rank_per_row: bool = False
    device: str = "cuda"


@dataclass(frozen=True)
class Forecast:
    """parts: bytes at the moment of the largest total, by part (`qdylora.ledger.PARTS`). pageable: bytes of the
    optimizer's state that a paged optimizer lets CUDA move to the host. flops: of one micro-batch, forward and
    backward, recomputation included.
    """

    parts: dict[str, int]
    pageable: int
    flops: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Bytes that must be on the device, with all that is pageable moved away."""
        return self.peak - self.pageable


def attach_without_weights(base: PreTrainedModel, **adapter) -> PeftModel:
    """What `attach` makes of `base` (from `base_without_weights`), on the meta device, ready to be trained."""
    return without_weights(lambda: attach(base, **adapter))


def without_weights(attached: Callable[[], PeftModel]) -> PeftModel:
    """The model that `attached` makes, with its adapter on the meta device, ready to be trained."""
    with torch.device("meta"):
        model = attached()
    contiguous_head_input(model)
    return model.train()


def forecast(model: PeftModel, shape: Shape, training: Training) -> Forecast:
    """Peak memory of a training step of `model` (from `attach_without_weights`) at rank r_max, where it is largest,
    once the optimizer has its state."""
    r_max = gate_of(model).r_max
    # Neighbouring rows of one rank would be computed as one.
    set_rank(model, [max(1, r_max - i % 2) for i in range(shape.micro_batch)] if training.rank_per_row else r_max)
    ledger = Ledger(model.config.vocab_size, CUDA_GRANULE if training.device == "cuda" else 1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    with ledger, device_kernels(training.device):
        for part, tensors in static_parts(model).items():
            for tensor in tensors:
                ledger.enter(tensor, part)
        # A step's own order, the optimizer first: so the second step is seen without running the first.
        optimizer = _optimizer_step(model, trainable, training, ledger)
        if not training.accumulate:
            optimizer.zero_grad()
        ledger.flops = 0
        _forward_and_backward(model, shape, training, ledger)
        for p in trainable:
            p.grad = None
    return Forecast(ledger.peak, _pageable(optimizer, training), ledger.flops)


def largest_micro_batch(model: PeftModel, shape: Shape, training: Training, limit: int) -> int:
    """Rows of the largest micro-batch whose step needs no more than `limit` bytes; 0 if one row needs more.
    `shape`'s own number of rows is ignored."""

    @cache
    def needed(rows: int) -> int:
        return forecast(model, replace(shape, micro_batch=rows), training).needed

    for rows in (1, 2):  # one row has no padding and so no mask: the line below starts at two
        if needed(rows) > limit:
            return rows - 1
    # Each moment of a step holds a fixed number of bytes and a number per row, so their maximum is convex in the rows:
    # it lies above the line through two and three rows, but for the rounding of each allocation.
    fits, too_many = 2, 3 + (limit - needed(2)) // max(1, needed(3) - needed(2))
    while needed(too_many) <= limit:
        fits, too_many = too_many, too_many + 1
    while too_many - fits > 1:
        slope = (needed(too_many) - needed(fits)) / (too_many - fits)
        middle = min(max(fits + int((limit - needed(fits)) / slope), fits + 1), too_many - 1)
        fits, too_many = (middle, too_many) if needed(middle) <= limit else (fits, middle)
    return fits


def static_parts(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The tensors that `model` itself holds, by part: its parameters, buffers and quantization constants."""
    parts: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS[:4]}
    for p in model.parameters():
        if isinstance(p, Params4bit):
            parts["base_4bit"].append(p)
            parts["base_constants"] += _constants(p.quant_state)
        else:
            parts["adapter" if p.requires_grad else "base_rest"].append(p)
    parts["base_rest"] += model.buffers()
    return parts


def _constants(state: bnb.functional.QuantState | None) -> list[torch.Tensor]:
    if state is None:
        return []
    own = [t for t in (state.absmax, state.code, state.offset) if t is not None]
    return own + _constants(state.state2)


def _optimizer_step(
    model: PeftModel, trainable: list[nn.Parameter], training: Training, ledger: Ledger
) -> torch.optim.Optimizer:
    """An optimizer after its first step, with gradients as a backward pass leaves them."""
    ledger.phase = "optimizer"
    for p in trainable:
        p.grad = torch.empty_like(p)
        ledger.enter(p.grad, "gradients")
    optimizer = OPTIMIZERS[training.optimizer](trainable, foreach=training.device == "cuda")
    set_update(training.update, optimizer, model, lambda: 1)
    for _ in range(2):  # the first makes the state
        optimizer.step()
        for state in optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value) and value.is_meta:
                    ledger.enter(value, "optimizer")
    return optimizer


#: As Hugging Face's Trainer makes them. Paged ones without the paging, which needs a GPU and changes no size.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters, foreach: torch.optim.AdamW(parameters, foreach=foreach),
    "sgd": lambda parameters, foreach: torch.optim.SGD(parameters, foreach=foreach),
    "paged_adamw_32bit": lambda parameters, foreach: bnb.optim.AdamW(parameters, optim_bits=32),
    "paged_adamw_8bit": lambda parameters, foreach: bnb.optim.AdamW(parameters, optim_bits=8),
}


def _pageable(optimizer: torch.optim.Optimizer, training: Training) -> int:
    if not training.optimizer.startswith("paged"):
        return 0
    return sum(
        state[name].nbytes
        for p, state in optimizer.state.items()
        for name in ("state1", "state2")
        if p.numel() >= PAGED_FROM
    )


def _forward_and_backward(model: PeftModel, shape: Shape, training: Training, ledger: Ledger) -> None:
    with _checkpointing(model, training.checkpoint_activations), _gradients_entered(model, ledger):
        ledger.phase = "forward"
        loss = model(**_batch(shape)).loss
        ledger.phase = "backward"
        loss.backward()


def _batch(shape: Shape) -> dict[str, torch.Tensor | int]:
    rows, length = shape.micro_batch, shape.length
    keep = shape.logits or length
    with torch.device("meta"):
        ids, labels = (torch.empty(rows, n, dtype=torch.long) for n in (length, keep))
        # A model asks its mask whether there is padding, and here the answer is always no; but a mask of four axes is
        # not asked, and serves for several rows.
        mask = torch.empty_like(ids) if rows == 1 else torch.empty(rows, 1, length, length, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "logits_to_keep": keep}


@contextmanager
def _checkpointing(model: PeftModel, on: bool) -> Iterator[None]:
    """Activation checkpointing as the Trainer switches it on."""
    if not on:
        yield
        return
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()


@contextmanager
def _gradients_entered(model: PeftModel, ledger: Ledger) -> Iterator[None]:
    """Enters each adapter gradient as such as soon as it is there."""
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: ledger.enter(p.grad, "gradients"))
        for p in model.parameters()
        if p.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
