"""An exported adapter for llama.cpp: as a GGUF adapter, or merged into the GGUF file that its base came from.

Both know the LLaMA architecture only. llama.cpp keeps the rows of its queries and keys in another order than
transformers: the two halves of each head, which are rotated together, interleaved.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file
from transformers import PreTrainedConfig

from qdylora.export import CONFIG_FILE, WEIGHTS_FILE
from qdylora.gguf_io import ARCHITECTURE, copy_gguf, finish

LLAMA = "llama"
Factors = dict[str, tuple[np.ndarray, np.ndarray]]


def adapter_to_gguf(adapter: str | Path, base: PreTrainedConfig, target: str | Path) -> Path:
    """Write the PEFT adapter folder `adapter` (see `export_rank`) as llama.cpp's LoRA file `target`, in float32.

    `base` is its base model's configuration. ValueError unless that is a LLaMA. Returns `target`.
    """
    _need_llama(base.model_type)
    factors = _factors(
        Path(adapter),
        base.num_hidden_layers,
        {"attn_q": base.num_attention_heads, "attn_k": base.num_key_value_heads},
    )
    writer = gguf.GGUFWriter(target, LLAMA)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = len(next(iter(factors.values()))[0])
    # llama.cpp's scale is alpha / rank, also of an adapter whose scale in PEFT is alpha / sqrt(rank).
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _scale(Path(adapter)) * rank)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, (A, B) in factors.items():
        writer.add_tensor(f"{name}.lora_a", A)
        writer.add_tensor(f"{name}.lora_b", B)
    finish(writer)
    return Path(target)


def merge_into_gguf(adapter: str | Path, base: str | Path, target: str | Path) -> Path:
    """Write the GGUF model `base` with the PEFT adapter folder `adapter` merged in to the file `target`.

    The weights that the adapter changes become float16; the others, the tokenizer and the rest of the metadata stay
    as they are in `base`. ValueError unless that is a LLaMA with the layers that the adapter has. Returns `target`.
    """
    source = gguf.GGUFReader(base)
    _need_llama(source.fields[ARCHITECTURE].contents())
    layers, heads, kv_heads = (
        int(source.fields[f"{LLAMA}.{name}"].contents())
        for name in ("block_count", "attention.head_count", "attention.head_count_kv")
    )
    factors, scale = _factors(Path(adapter), layers, {"attn_q": heads, "attn_k": kv_heads}), _scale(Path(adapter))
    if absent := factors.keys() - {tensor.name for tensor in source.tensors}:
        raise ValueError(f"the adapter changes {min(absent)}, which is not in {base}")
    merged = {}
    for tensor in source.tensors:
        if tensor.name in factors:
            A, B = factors[tensor.name]
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
            merged[tensor.name] = (weight + scale * (B @ A)).astype(np.float16)
    file_type = {gguf.Keys.General.FILE_TYPE: int(gguf.LlamaFileType.MOSTLY_F16)}
    copy_gguf(source, Path(target), fields=file_type, tensors=merged)
    return Path(target)


def _need_llama(architecture: str) -> None:
    if architecture != LLAMA:
        raise ValueError(f"the base model's architecture is {architecture!r}; GGUF is written for 'llama' only")


def _scale(adapter: Path) -> float:
    """PEFT's factor on B A."""
    config = json.loads((adapter / CONFIG_FILE).read_text())
    return config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])


def _factors(adapter: Path, layers: int, heads: dict[str, int]) -> Factors:
    """A (rank, in) and B (out, rank) in float32 by the weight's name in GGUF, B's rows in llama.cpp's order.

    heads: how many heads the rows of a layer's part are, for the parts whose order differs.
    """
    weights = load_file(adapter / WEIGHTS_FILE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    factors: Factors = {}
    for name_A in (name for name in weights if ".lora_A." in name):
        A, B = (weights[name].astype(np.float32) for name in (name_A, name_A.replace(".lora_A.", ".lora_B.")))
        layer = name_A.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        name = names.get_name(layer)
        if name is None:
            raise ValueError(f"the adapter changes {layer}, which has no name in a GGUF file of {layers} layers")
        part = name.rsplit(".", 1)[-1]
        factors[f"{name}.weight"] = A, (_interleaved(B, heads[part]) if part in heads else B)
    return factors


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads x 2 halves x n, columns) -> (heads x n x 2 halves, columns)."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
