"""AdaLoRA (arXiv 2303.10512) as PEFT implements it: it begins with too many ranks and, by their importance, cuts them
until the layers have r on average. A rival that is fixed at one budget: it is not to be used at another rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import AdaLoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from qdylora.gate import Gate

#: Ranks at the beginning for each at the end: PEFT's defaults, 12 for 8.
SURPLUS = 1.5
#: Shares of the steps before ranks are cut and after the last is. Ours: the paper tunes them for each task.
UNCUT, SETTLED = 0.1, 0.3
#: The importance of a rank is only known after a step, and the cut takes another.
LEAST_STEPS = 2


class OneRank(Gate):
    """The gate of an adapter that exists at rank r_max alone. The layers of AdaLoRA do not ask it anything."""

    def checked(self, b: int) -> int:
        """ValueError unless b is r_max."""
        if b != self.r_max:
            raise ValueError(f"an AdaLoRA adapter has one rank, {self.r_max}, got {b}")
        return self.r_max


def attach_adalora(
    model: PreTrainedModel,
    r: int,
    alpha: float,
    steps: int,
    *,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """`model` with a trainable AdaLoRA adapter of `r` ranks a layer on average after `steps` optimizer steps.

    Train it with `Allocate` among the Trainer's callbacks. Its scale is alpha / (1.5 r), PEFT's, at all times.
    ValueError for fewer than `LEAST_STEPS` steps.
    """
    if steps < LEAST_STEPS:
        raise ValueError(f"AdaLoRA needs at least {LEAST_STEPS} steps to cut ranks by their importance, got {steps}")
    config = AdaLoraConfig(
        init_r=round(SURPLUS * r),
        target_r=r,
        tinit=int(UNCUT * steps),
        tfinal=int(SETTLED * steps),
        total_step=steps,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    fix_rank(model, r, alpha)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    return model


def is_adalora(model: PeftModel) -> bool:
    return model.peft_config[model.active_adapter].peft_type == PeftType.ADALORA


def fix_rank(model: PeftModel, r: int, alpha: float, adapter: str = "default") -> None:
    """Give the layers of an AdaLoRA model a gate, for those who ask for one."""
    gate = OneRank(r, alpha, "constant")
    for layer in _layers(model):
        layer.lora_variant[adapter] = gate


def adalora_bytes(model: PeftModel, adapter: str = "default") -> int:
    """Size in bytes of the ranks that are left."""
    return sum(
        int(layer.lora_E[adapter].count_nonzero())
        * (layer.in_features + layer.out_features + 1)
        * layer.lora_E[adapter].element_size()
        for layer in _layers(model)
    )


class Allocate(TrainerCallback):
    """Measures importance and cuts ranks after every optimizer step, while its gradients are still there.

    The averages behind the importance are in no checkpoint: training cannot be resumed, only begun anew.
    """

    def on_optimizer_step(self, args, state, control, model: nn.Module, **kwargs):
        model.base_model.update_and_allocate(state.global_step + 1)


def _layers(model: PeftModel) -> list[AdaLoraLayer]:
    return [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
