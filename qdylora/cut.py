"""Ways to use a static adapter, trained at one rank r, at a lower rank b without further training.

truncate                the first b rows, scaled as trained: alpha/r (the zeros of the paper's Table 3)
truncate_alpha_over_b   the first b rows, scaled alpha/b, as if they had been trained at rank b
svd                     the best rank-b approximation of the whole product B A, what a careful user would do
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel

from qdylora.adapter import gate_of, lora_layers
from qdylora.export import svd_factors
from qdylora.gate import Gate

CUTS = ("truncate", "truncate_alpha_over_b", "svd")


@contextmanager
def cut(model: PeftModel, how: str) -> Iterator[None]:
    """Inside this context the adapter is cut in the way `how` at every rank; afterwards it is as before.

    At r_max, alpha/b and SVD leave a LoRA adapter as it is. ValueError for an unknown way.
    """
    if how not in CUTS:
        raise ValueError(f"cut is {how!r}; choose one of {', '.join(CUTS)}")
    gate = gate_of(model)
    if how == "truncate":
        yield
    elif how == "truncate_alpha_over_b":
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


def _decompose(model: PeftModel, gate: Gate) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Replace A and B of every layer by factors of the same product whose columns come in order of their singular
    values: every prefix, at a constant scale, is then the best approximation of its rank. Returns what was there."""
    trained = gate.scale_at(gate.r_max)
    with gate.scaled("constant"):
        constant = gate.scale_at(gate.r_max)
    before = []
    for layer in lora_layers(model).values():
        for adapter, variant in layer.lora_variant.items():
            if variant is gate:
                A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                before += [(A, A.data), (B, B.data)]
                A.data, B.data = svd_factors(A.data, B.data, trained, gate.r_max, constant)
    return before
