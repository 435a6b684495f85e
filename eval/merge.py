"""The adapter at one rank added into the base's weights, for passes over many tokens: the same numbers to float32's
rounding, without a product for each of A and B in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from eval.memory import free_memory
from qdylora import gate_of, lora_layers
from qdylora.adalora import is_adalora


def worth_merging(model: PeftModel) -> bool:
    """Whether `merged` changes nothing but rounding, and has room: the base's layers under LoRA are plain float32
    ones (in 16 bits the sum would be rounded once more), and twice the space of their weights is free. Not for AdaLoRA,
    whose product is not the gate's, nor where the adapter is switched off."""
    if is_adalora(model) or any(layer.disable_adapters for layer in lora_layers(model).values()):
        return False
    layers = [layer.get_base_layer() for layer in lora_layers(model).values()]
    plain = all(isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32 for layer in layers)
    return plain and 2 * sum(layer.weight.nbytes for layer in layers) <= free_memory(layers[0].weight.device)


@contextmanager
def merged(model: PeftModel, rank: int) -> Iterator[None]:
    """Inside this context every LoRA layer of `model` is a linear layer with the adapter at `rank` in its weight."""
    gate, layers = gate_of(model), lora_layers(model)
    try:
        for name, layer in layers.items():
            (adapter,) = layer.active_adapters
            base = layer.get_base_layer()
            plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
            plain.weight = nn.Parameter(gate.plus_delta(layer, adapter, base.weight, rank), requires_grad=False)
            plain.bias = base.bias
            model.set_submodule(name, plain)
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
