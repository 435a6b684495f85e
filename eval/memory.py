"""How much memory is free, and what a token's keys and values take of it."""

from __future__ import annotations

import psutil
import torch
from transformers import PreTrainedConfig


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def kv_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * itemsize
