"""A tiny LLaMA as a GGUF file, laid out by hand, and GGUF files read back by hand: independent of `qdylora`."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers

ENDS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 64, 128, 2, 4, 2


Q4, F32 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F32


def write(file: Path, seed: int = 0, kind: gguf.GGMLQuantizationType = Q4) -> Path:
    """A random model with a byte tokenizer and one merge; its matrices are in Q4_0, as small models are handed out, or
    of another kind."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0 if kind == Q4 else gguf.LlamaFileType.ALL_F32)
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    kv = WIDTH // HEADS * KV_HEADS
    shapes = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (kv, WIDTH),
        "attn_v": (kv, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            weight = rng.normal(0, 0.2, shape).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", rng.uniform(0.5, 1.5, WIDTH).astype(np.float32))
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.5, (len(tokens), WIDTH)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return file


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file in float32, by its name there."""
    return {
        tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        for tensor in gguf.GGUFReader(file).tensors
    }


def fields(file: Path) -> dict:
    """Every metadata field of a file."""
    return {n: f.contents() for n, f in gguf.GGUFReader(file).fields.items() if not n.startswith("GGUF.")}


def reference_weights(file: Path) -> dict[str, torch.Tensor]:
    """A model file's tensors by their names in transformers. llama.cpp keeps the rows of q and k as rotated pairs."""
    known = fields(file)
    heads = {
        "attn_q": known["llama.attention.head_count"],
        "attn_k": known["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, w in tensors(file).items():
        parts = name.split(".")
        if parts[0] != "blk":
            weights[f"{NAMES[parts[0]]}.weight"] = w
            continue
        if parts[2] in heads:
            half = w.shape[0] // heads[parts[2]] // 2
            rows = [
                h * 2 * half + 2 * i + j for h in range(heads[parts[2]]) for j in range(2) for i in range(half)
            ]  # pair i of head h: its first number comes i-th, its second half a head later
            w = w[rows]
        weights[f"model.layers.{parts[1]}.{ENDS[parts[2]]}.weight"] = w
    return weights
