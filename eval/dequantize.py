"""Unpack a 4-bit base once for scoring, instead of in every forward pass: the same numbers, more memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import bitsandbytes as bnb
import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

from eval.memory import free_memory
from qdylora import lora_layers


@contextmanager
def dequantized(model: nn.Module, when: str = "auto") -> Iterator[bool]:
    """Inside this context the 4-bit linear layers under LoRA hold their weights in the compute type.

    when: `always`, `never`, or `auto` (if twice the space needed is free). Yields whether it was done.
    """
    layers = {n: m for n, m in lora_layers(model).items() if isinstance(m.get_base_layer(), bnb.nn.Linear4bit)}
    fits = 2 * _needed(layers) <= free_memory(next(model.parameters()).device)
    do = bool(layers) and (when == "always" or (when == "auto" and fits))
    packed = {}
    try:
        if do:
            for name, layer in layers.items():
                packed[name], layer.base_layer = layer.base_layer, _plain(layer.base_layer)
        yield do
    finally:
        for name, base_layer in packed.items():
            layers[name].base_layer = base_layer


def _plain(layer: bnb.nn.Linear4bit) -> nn.Linear:
    weight = dequantize_bnb_weight(layer.weight, state=layer.weight.quant_state).to(layer.compute_dtype)
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.to(layer.compute_dtype), requires_grad=False)
    return plain


def _needed(layers: dict[str, nn.Module]) -> int:
    """Bytes of the unpacked weights."""
    base_layers = [layer.get_base_layer() for layer in layers.values()]
    return sum(b.in_features * b.out_features * b.compute_dtype.itemsize for b in base_layers)
