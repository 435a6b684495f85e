"""Cut an adapter to one rank: as a plain PEFT adapter, or merged into a 16-bit base."""

from __future__ import annotations

import json
import math
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qdylora.adalora import adalora_bytes, is_adalora
from qdylora.adapter import SETTINGS_FILE, RankSettings, gate_of, load_adapter, lora_layers, trained_here
from qdylora.cut import ALPHA_OVER_B, AS_TRAINED, SVD, checked, svd_factors
from qdylora.cut import cut as cut_in
from qdylora.gate import SCALES, Gate

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def export_rank(
    source: str | Path, rank: int, target: str | Path, *, cut: str | None = None, base: str | None = None
) -> Path:
    """Write the adapter in `source` at `rank` as an ordinary PEFT adapter folder: r = rank, no extra code needed.

    `cut` is one of CUTS. An adapter trained here is used at a lower rank as it was trained, by its first rows, unless
    `cut` says otherwise. Any other LoRA adapter that PEFT has saved was trained at one rank, and `cut` must be given.
    `base` is the name to give for the base model, where the one in `source` is a path of this machine.
    Works on files alone, without the base model. Returns `target`. ValueError for a rank that `source` does not have,
    an unknown cut, and an adapter that is no plain LoRA of one rank (AdaLoRA, DoRA, rank_pattern).
    """
    source, target = Path(source), Path(target)
    config = json.loads((source / CONFIG_FILE).read_text())
    gate, how = _plain_lora(source, config), _how(source, cut)
    rank = gate.checked(rank)
    scale = SCALES["alpha_over_b" if how == ALPHA_OVER_B else gate.scale](gate.alpha, rank, gate.r_max)
    weights = load_file(source / WEIGHTS_FILE)
    if odd := [name for name, weight in weights.items() if "lora_embedding" in name or weight.ndim > 2]:
        raise ValueError(f"{source} adapts a layer that is not linear: {odd[0]}")
    for name_A in [name for name in weights if ".lora_A." in name]:
        name_B = name_A.replace(".lora_A.", ".lora_B.")
        A, B = weights[name_A], weights[name_B]
        if how == SVD:
            A, B = svd_factors(A, B, gate.scale_at(gate.r_max), rank, scale)
        weights[name_A], weights[name_B] = A[:rank].contiguous(), B[:, :rank].contiguous()
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank  # PEFT's scale is lora_alpha over it
    alpha = float(f"{scale * divisor:.12g}")
    config |= {"r": rank, "lora_alpha": alpha} | ({"base_model_name_or_path": base} if base else {})
    target.mkdir(parents=True, exist_ok=True)
    save_file(weights, target / WEIGHTS_FILE, metadata={"format": "pt"})
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return target


def _plain_lora(source: Path, config: dict) -> Gate:
    """The ranks and scales of the adapter in `source`; the scale of one that was not trained here is constant."""
    if config["peft_type"] != "LORA":
        raise ValueError(f"{source} is an {config['peft_type']} adapter of PEFT's, of one rank: use it as it is")
    if kinds := [kind for kind in ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias") if config.get(kind)]:
        raise ValueError(f"{source} has {' and '.join(kinds)}, which a plain LoRA of one rank does not")
    if trained_here(source):
        settings = RankSettings.load(source)
        return Gate(settings.r_max, settings.alpha, settings.scale)
    r, alpha = config["r"], config["lora_alpha"]
    return Gate(r, alpha * math.sqrt(r) if config.get("use_rslora") else alpha, "constant")


def _how(source: Path, cut: str | None) -> str:
    if cut is None and not trained_here(source):
        raise ValueError(
            f"{source} has no {SETTINGS_FILE}: it was trained at one rank, not by qdylora, so say how to cut it: "
            f"cut='{SVD}' (the nearest), '{ALPHA_OVER_B}' or '{AS_TRAINED}'"
        )
    return checked(cut or AS_TRAINED)


def merge(model: PeftModel, rank: int, *, safe: bool = False) -> None:
    """Add the adapter at `rank` to the base weights in place; `model.unmerge_adapter()` undoes it.

    With `safe` every layer is first checked for NaN. A 4-bit base is quantized again, which loses some of the
    adapter; `merge_into` does not.
    """
    with gate_of(model).at(gate_of(model).checked(rank)):
        model.merge_adapter(safe_merge=safe)


def merge_into(base: PreTrainedModel, adapter: str | Path, rank: int, *, cut: str = AS_TRAINED) -> PreTrainedModel:
    """`base`, loaded at 16 or 32 bits, with the adapter, `cut` to `rank`, merged in: an ordinary model to save.

    Raises ValueError for a 4-bit base.
    """
    if getattr(base, "is_quantized", False):
        raise ValueError("merging needs a base at 16 or 32 bits: a 4-bit base would be quantized again, with loss")
    model = load_adapter(base, adapter)
    with cut_in(model, cut):
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
