"""Tiny random models that the tests share: LLaMA with grouped key heads, Falcon with its fused query_key_value."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from qdylora import attach, load_base

LLAMA = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FALCON = {
    "model_type": "falcon",
    "vocab_size": 258,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "new_decoder_architecture": True,
    "alibi": False,
    "bias": False,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS = {"llama": LLAMA, "falcon": FALCON}


def base(family: str, bits: int, cache, dtype=torch.float32):
    return load_base("random", bits, dtype, cache=cache, random_config=CONFIGS[family])


def adapted(family: str, bits: int, cache, r_max: int = 8, alpha: float = 16, seed: int = 0, **kwargs):
    """A model with a non-trivial any-rank adapter: B is random too, so every rank differs."""
    torch.manual_seed(seed)
    model = attach(base(family, bits, cache), r_max=r_max, alpha=alpha, **kwargs)
    randomize_B(model)
    return model


def plain_lora(family: str, bits: int, cache, source, rank: int, scale: float):
    """The independent implementation: stock PEFT LoRA of rank `rank`, its factors sliced from `source`'s."""
    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base(family, bits, cache), config)
    ours = dict(source.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.copy_(ours[name][:rank])
            elif "lora_B" in name:
                p.copy_(ours[name][:, :rank])
    return model


def randomize_B(model) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)


def tokens(batch: int = 3, length: int = 11, seed: int = 1) -> torch.Tensor:
    """Token ids, shape (batch, length)."""
    return torch.randint(2, 258, (batch, length), generator=torch.Generator().manual_seed(seed))


def adapter_grads(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
