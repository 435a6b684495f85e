"""Cut an any-rank adapter to one rank: as a plain PEFT adapter, by SVD, or merged into a 16-bit base."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qdylora.adalora import adalora_bytes, is_adalora
from qdylora.adapter import RankSettings, gate_of, load_adapter, lora_layers
from qdylora.gate import Gate

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def export_rank(
    source: str | Path, rank: int, target: str | Path, *, svd: bool = False, base: str | None = None
) -> Path:
    """Write the adapter in `source` at `rank` as an ordinary PEFT adapter folder: r = rank, no extra code needed.

    The first `rank` rows are taken, which is how an any-rank adapter is used; with `svd` the best rank-b
    approximation of the whole product B A instead, which is how a careful user would cut a static adapter.
    `base` is the name to give for the base model, where the one in `source` is a path of this machine.
    Works on files alone, without the base model. Returns `target`. ValueError for an AdaLoRA, which has one rank.
    """
    source, target = Path(source), Path(target)
    settings = RankSettings.load(source)
    gate = Gate(settings.r_max, settings.alpha, settings.scale)
    rank = gate.checked(rank)
    config = json.loads((source / CONFIG_FILE).read_text())
    if config["peft_type"] != "LORA":
        raise ValueError(f"{source} is an {config['peft_type']} adapter of PEFT's, of one rank: use it as it is")
    weights = load_file(source / WEIGHTS_FILE)
    cut = {}
    for name_A in (name for name in weights if ".lora_A." in name):
        name_B = name_A.replace(".lora_A.", ".lora_B.")
        A, B = weights[name_A], weights[name_B]
        if svd:
            A, B = svd_factors(A, B, gate.scale_at(settings.r_max), rank, gate.scale_at(rank))
        cut[name_A], cut[name_B] = A[:rank].contiguous(), B[:, :rank].contiguous()
    # PEFT's scale is lora_alpha / r, and lora_alpha / sqrt(r) with use_rslora.
    alpha = settings.alpha if settings.scale != "constant" else settings.alpha * rank / settings.r_max
    config |= {"r": rank, "lora_alpha": alpha} | ({"base_model_name_or_path": base} if base else {})
    target.mkdir(parents=True, exist_ok=True)
    save_file(cut, target / WEIGHTS_FILE, metadata={"format": "pt"})
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return target


def svd_factors(
    A: torch.Tensor, B: torch.Tensor, scale: float, rank: int, new_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A' (rank, in) and B' (out, rank) with new_scale B' A' the best rank-b approximation of scale B A.

    A is (r, in) and B (out, r). By QR of both factors the SVD is only of an (r, r) matrix. Where a layer is
    narrower than `rank`, the rows and columns that have nothing to do are zero.
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T * (scale / new_scale), full_matrices=False)
    root = S[:rank].sqrt()
    new_A = (Vh[:rank] * root[:, None]) @ Q_A.T
    new_B = (Q_B @ U[:, :rank]) * root
    idle = rank - len(root)
    return F.pad(new_A, (0, 0, 0, idle)).to(A.dtype), F.pad(new_B, (0, idle)).to(B.dtype)


def merge(model: PeftModel, rank: int, *, safe: bool = False) -> None:
    """Add the adapter at `rank` to the base weights in place; `model.unmerge_adapter()` undoes it.

    With `safe` every layer is first checked for NaN. A 4-bit base is quantized again, which loses some of the
    adapter; `merge_into` does not.
    """
    with gate_of(model).at(gate_of(model).checked(rank)):
        model.merge_adapter(safe_merge=safe)


def merge_into(base: PreTrainedModel, adapter: str | Path, rank: int) -> PreTrainedModel:
    """`base`, loaded at 16 or 32 bits, with the adapter at `rank` merged in: an ordinary model to save.

    Raises ValueError for a 4-bit base.
    """
    if getattr(base, "is_quantized", False):
        raise ValueError("merging needs a base at 16 or 32 bits: a 4-bit base would be quantized again, with loss")
    model = load_adapter(base, adapter)
    merge(model, rank, safe=True)
    return model.unload()


def adapter_bytes(model: PeftModel, rank: int) -> int:
    """Size in bytes of the adapter's weights at `rank`; of an AdaLoRA, of those it has kept."""
    if is_adalora(model):
        return adalora_bytes(model)
    return sum(
        rank * (A.in_features + B.out_features) * A.weight.element_size()
        for layer in lora_layers(model).values()
        for A, B in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True)
    )
