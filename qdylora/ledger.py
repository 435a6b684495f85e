"""Who holds how much memory: every tensor that operations on the meta device make, by part, from birth to death.

A tensor on the meta device has a shape, a type and a lifetime, but no content. So the real code of a model, of its
backward pass and of its optimizer runs in seconds on any machine, and what it would allocate can be counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
#: torch counts the floating-point operations of CUDA's fused attention, not of the CPU's.
FLOPS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *rest, **kwargs: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ](grad, q, k, v, **kwargs),
}

#: The parts, in the order of tables. `base_rest`: all base weights that are not in 4 bits. `activations`: made by the
#: forward pass, or made again by its recomputation, and still held. `logits`: all tensors as wide as the vocabulary.
#: `workspace`: the rest - gradients of activations, dequantized weights, an optimizer's temporary values.
PARTS = (
    "base_4bit",
    "base_constants",
    "base_rest",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "workspace",
)


class Ledger(TorchDispatchMode):
    """Inside this context new meta tensors are entered, and struck out when the last reference to them goes.

    `held` is bytes by part now, `peak` the same at the moment of their largest sum, `flops` the floating-point
    operations so far. `granule`: an allocation takes a multiple of so many bytes (CUDA's allocator: 512). `vocabulary`
    is the width by which logits are told. `phase`: forward, backward or optimizer; whoever runs them says so.
    """

    def __init__(self, vocabulary: int, granule: int = 1):
        super().__init__()
        self.vocabulary, self.granule = vocabulary, granule
        self.phase = "forward"
        self.held: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
        self.peak: dict[str, int] = dict(self.held)
        self.flops = 0
        self._total = self._highest = 0
        self._entries: dict[int, tuple[weakref.ref, int, str]] = {}
        self._dequantizing = False

    def enter(self, tensor: torch.Tensor, part: str) -> None:
        """Count `tensor`'s storage in `part`, from now on if it is counted in another, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            reference, size, before = self._entries[key]
            self.held[before] -= size
        else:
            size = -(-storage.nbytes() // self.granule) * self.granule
            reference = weakref.ref(storage, lambda _: self._strike_out(key))
            self._total += size
        self._entries[key] = reference, size, part
        self.held[part] += size
        if self._total > self._highest:
            self._highest, self.peak = self._total, dict(self.held)

    def _strike_out(self, key: int) -> None:
        _, size, part = self._entries.pop(key)
        self.held[part] -= size
        self._total -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            return self._gemm_4bit(*args, **kwargs)
        if func is aten._local_scalar_dense.default and args[0].dtype == torch.bool and args[0].is_meta:
            return True  # transformers asks: is no token padding, is no sequence packed?
        out = func(*args, **kwargs)
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._enter_new(tensor)
        return out

    def _enter_new(self, tensor: torch.Tensor) -> None:
        if tensor.untyped_storage()._cdata not in self._entries:  # else a view, or an operation in place
            self.enter(tensor, self._part_of(tensor))

    def _part_of(self, tensor: torch.Tensor) -> str:
        if self._dequantizing or self.phase == "optimizer":
            return "workspace"
        if tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
            return "logits"
        # A backward pass runs without grad mode, except where activation checkpointing repeats the forward pass.
        return "activations" if self.phase == "forward" or torch.is_grad_enabled() else "workspace"

    def _gemm_4bit(
        self, x, packed, shape, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None,
        absmax_offset=None,
    ):  # fmt: skip
        """bitsandbytes' product with a 4-bit weight, as its kernels compute it for more than a few rows: a
        dequantized copy, then an ordinary product. On a real device both happen inside one operation."""
        second = None if absmax_8bit is None else QuantState(absmax, None, absmax_code, 256, None, torch.float32)
        state = QuantState(
            absmax if absmax_8bit is None else absmax_8bit,
            torch.Size(shape), None, blocksize, quant_type, x.dtype, absmax_offset, second,
        )  # fmt: skip
        with self:
            self._dequantizing = True
            weight = dequantize_4bit(packed, state)
            self._dequantizing = False
            rows = x.reshape(-1, x.shape[-1])
            out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        self.enter(out, "activations")
        return out.view(*x.shape[:-1], -1)


@contextmanager
def device_kernels(device: str) -> Iterator[None]:
    """Inside this context meta tensors are computed on as on `device`, where kernels keep different tensors.

    Attention is fused on both, keeping query, key, value, output and log-sum-exp; dropout keeps a mask of bytes on
    CUDA and factors of the activations' type on the CPU. The functions are replaced, because a torch-function mode does
    not reach into a backward pass, where activation checkpointing calls them again.
    """
    before = F.scaled_dot_product_attention, F.dropout
    F.scaled_dot_product_attention = _fused_attention
    if device == "cuda":
        F.dropout = _fused_dropout
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = before


def _fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)  # to be added to the scores
    attend = aten._scaled_dot_product_flash_attention_for_cpu
    return attend(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _fused_dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, True)[0] if training and p else x
