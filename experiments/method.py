"""What a configuration asks of `qdylora`: the arguments of its base model, its adapter and its draw."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from experiments.schema import Config
from qdylora import Draw, attach, compute_dtype
from qdylora.adalora import attach_adalora


def base_settings(c: Config) -> dict[str, Any]:
    """Of `load_base`, beside what names the model."""
    return {
        "bits": c.method.bits,
        "dtype": compute_dtype(c.optim.compute_dtype, c.method.bits),
        "quant_type": c.method.quant_type,
        "double_quant": c.method.double_quant,
    }


def adapter_settings(c: Config) -> dict[str, Any]:
    """Of `attach`."""
    return {
        "r_max": c.ranks.r_max,
        "alpha": c.method.alpha,
        "scale": c.method.scale,
        "frozen": c.method.gate == "frozen",
        "dropout": c.optim.lora_dropout,
        "targets": c.method.targets,
        "dtype": getattr(torch, c.optim.adapter_dtype),
    }


def adapted(base: PreTrainedModel, c: Config) -> PeftModel:
    """`base` with the method's adapter, to be trained."""
    settings = adapter_settings(c)
    if not adapts_ranks(c):
        return attach(base, **settings)
    shared = {name: settings[name] for name in ("alpha", "dropout", "targets", "dtype")}
    return attach_adalora(base, c.ranks.r_max, steps=c.budget.steps, **shared)


def adapts_ranks(c: Config) -> bool:
    """Whether the method is AdaLoRA, whose ranks are those that it keeps."""
    return c.method.gate == "adalora"


def draw(c: Config) -> Draw:
    """ValueError for a bad one."""
    settings = vars(c.method.draw) | {"ranks": tuple(c.method.draw.ranks)}
    from_step = round(settings.pop("after") * c.budget.steps)
    return Draw(r_max=c.ranks.r_max, r_min=c.ranks.r_min, from_step=from_step, seed=c.seed, **settings)
