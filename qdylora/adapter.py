"""Attach an any-rank adapter to a model, save it beside its rank settings, and load it again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from qdylora.adalora import fix_rank, is_adalora
from qdylora.draw import Draw
from qdylora.gate import Gate, Nested

SETTINGS_FILE = "qdylora.json"


@dataclass(frozen=True)
class RankSettings:
    """What a PEFT adapter folder does not say: how its ranks were trained, and so how they are to be used."""

    r_max: int
    alpha: float
    scale: str
    frozen: bool
    update: str
    draw: dict

    def save(self, folder: Path) -> None:
        (Path(folder) / SETTINGS_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RankSettings:
        """Raises FileNotFoundError where `folder` holds no adapter trained here."""
        if not trained_here(folder):
            raise FileNotFoundError(f"{folder} has no {SETTINGS_FILE}: it is not an adapter trained by qdylora")
        return cls(**json.loads((Path(folder) / SETTINGS_FILE).read_text()))


def trained_here(folder: str | Path) -> bool:
    return (Path(folder) / SETTINGS_FILE).exists()


def attach(
    model: PreTrainedModel,
    r_max: int = 64,
    alpha: float = 16,
    *,
    scale: str = "alpha_over_b",
    frozen: bool = False,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """`model` with a trainable adapter of ranks 1..r_max on every linear layer but the output head.

    A is (r_max, in), Kaiming-uniform, B is (out, r_max), zero, both stored in `dtype`. The adapter starts at rank
    r_max. `targets` may name layers instead ("q_proj", ...).
    """
    config = LoraConfig(
        r=r_max,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=scale == "alpha_over_sqrt_b",  # so that stock PEFT has the right scale at r_max
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    _share(model, Gate(r_max, alpha, scale, frozen))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    return model


def load_adapter(model: PreTrainedModel, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """`model` with the adapter saved in `folder` (a training checkpoint): at rank r_max, an AdaLoRA at its only one."""
    settings = RankSettings.load(folder)
    model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    if is_adalora(model):
        fix_rank(model, settings.r_max, settings.alpha)
        return model
    _share(model, Gate(settings.r_max, settings.alpha, settings.scale, settings.frozen))
    return model


def save_adapter(model: PeftModel, folder: str | Path, draw: Draw, update: str = "drift") -> None:
    """Save the adapter of `model` and its rank settings, as `DrawCallback` does with every checkpoint: what
    `load_adapter` and `export_rank` read. `draw` and `update` say how its ranks were trained."""
    model.save_pretrained(str(folder))
    rank_settings(model, draw, update).save(folder)


def rank_settings(model: nn.Module, draw: Draw, update: str) -> RankSettings:
    gate = gate_of(model)
    return RankSettings(gate.r_max, gate.alpha, gate.scale, gate.frozen, update, vars(draw))


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Every LoRA layer of the model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def factors(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """A (r_max, in) and B (out, r_max) of every layer of the any-rank adapter."""
    gate = gate_of(model)
    for layer in lora_layers(model).values():
        for adapter, variant in layer.lora_variant.items():
            if variant is gate:
                yield layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def gate_of(model: nn.Module) -> Gate:
    """The gate that all LoRA layers of `model` share. ValueError if it has none."""
    for layer in lora_layers(model).values():
        for variant in layer.lora_variant.values():
            if isinstance(variant, Gate):
                return variant
    raise ValueError("this model has no any-rank adapter: call qdylora.attach or qdylora.load_adapter first")


def set_rank(model: nn.Module, rank: int | Sequence[int] | Nested) -> None:
    """Use rank b for the whole batch, ranks[i] for row i of the batch, or `Nested` ranks, from now on."""
    gate_of(model).set_rank(rank)


def at_rank(model: nn.Module, rank: int | Sequence[int]) -> AbstractContextManager[Gate]:
    """A context in which the model works at `rank`."""
    return gate_of(model).at(rank)


def _share(model: PeftModel, gate: Gate, adapter: str = "default") -> None:
    for layer in lora_layers(model).values():
        layer.lora_variant[adapter] = gate
        # The gate casts the small factors to the activations' type; PEFT would cast the activations instead.
        layer.cast_input_dtype_enabled = False
