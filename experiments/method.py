"""What a configuration asks of `qdylora`: the arguments of its base model, its adapter and its draw."""

from __future__ import annotations

from typing import Any

import torch

from experiments.schema import Config
from qdylora import Draw, compute_dtype


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


def draw(c: Config) -> Draw:
    """ValueError for a bad one."""
    settings = vars(c.method.draw) | {"ranks": tuple(c.method.draw.ranks)}
    return Draw(r_max=c.ranks.r_max, r_min=c.ranks.r_min, seed=c.seed, **settings)
