"""Attention of many rows over a few shared prefixes: each prefix is stored once and read once for all its rows.

The attention over prefix and own tokens is computed in two parts and merged by their log-sum-exp, which is
exact. Models that do not use transformers' attention interface (Falcon) get the prefix copied to each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from transformers import AttentionInterface, Cache, PreTrainedConfig, PreTrainedModel

ATTENTION = "qdylora_shared_prefix"
_cache: ContextVar[PrefixCache] = ContextVar("prefix cache of the running forward pass")


def can_share(config: PreTrainedConfig) -> bool:
    """Whether keys and values of a prefix serve every suffix: full attention in all layers, positions by rotation,
    and a plain output head."""
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    odd = ("alibi", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale")
    rotary = getattr(config, "rope_parameters", None) is not None
    return rotary and set(layer_types) == {"full_attention"} and not any(getattr(config, name, None) for name in odd)


class PrefixCache(Cache):
    """Keys and values: of shared prefixes (layer -> (prefixes, kv_heads, length, head_dim)) and of the rows' own.

    Before every pass over rows `place` says which prefix each row continues. The rows' own keys are kept from
    one pass to the next only after `reserve`.
    """

    def __init__(self, shared_attention: bool):
        super().__init__(layers=[])
        self.shared_attention = shared_attention
        self.prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.reserved: tuple[int, int] | None = None  # (rows, columns)
        self.recording = False

    def __len__(self) -> int:
        return len(self.prefix)

    @property
    def prefix_length(self) -> int:
        return next(iter(self.prefix.values()))[0].shape[2] if self.prefix else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.recording else self.prefix_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def reserve(self, rows: int, columns: int) -> None:
        """Keep own keys and values of up to `rows` rows and `columns` tokens from now on."""
        self.reserved = (rows, columns)
        self.own.clear()

    @contextmanager
    def recording_prefix(self) -> Iterator[None]:
        """The rows of passes inside this context become the prefixes."""
        self.recording = True
        yield
        self.recording = False

    def place(
        self,
        row_prefix: torch.Tensor,
        rows: slice | None = None,
        columns: torch.Tensor | None = None,
        visible: int | None = None,
    ) -> None:
        """For the next pass: row i continues prefix row_prefix[i]; if own keys are kept, its token j goes to column
        columns[i, j] of own row rows.start + i, and it sees the first `visible` columns."""
        self.row_prefix, self.rows, self.columns, self.visible = row_prefix, rows, columns, visible
        self.groups = _groups(row_prefix)

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy own rows `source` onto rows `target`."""
        for keys, values in self.own.values():
            keys[target], values[target] = keys[source], values[source]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Keys and values (rows, kv_heads, tokens, head_dim) of this pass in, those that the queries see out."""
        if keys.device.type == "cpu" and self.shared_attention:  # the CPU's fused kernel is faster in float32
            keys, values = keys.float(), values.float()
        if self.recording:
            self.prefix[layer_idx] = keys, values
            return keys, values
        if self.reserved:
            keys, values = self._append(keys, values, layer_idx)
        if self.prefix and not self.shared_attention:
            return tuple(
                torch.cat([shared[self.row_prefix], own], dim=2)
                for shared, own in zip(self.prefix[layer_idx], (keys, values), strict=True)
            )
        return keys, values

    def _append(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int):
        if layer_idx not in self.own:
            rows, columns = self.reserved
            shape = (rows, keys.shape[1], columns, keys.shape[3])
            self.own[layer_idx] = keys.new_zeros(shape), values.new_zeros(shape)
        row = torch.arange(self.rows.start, self.rows.stop, device=keys.device)[:, None]
        seen = []
        for store, new in zip(self.own[layer_idx], (keys, values), strict=True):
            store[row, :, self.columns] = new.transpose(1, 2)
            seen.append(store[self.rows, :, : self.visible])
        return seen


def _groups(row_prefix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows by prefix, padded: (prefixes, most) row indices; and where each row is among them, (rows,)."""
    order = torch.argsort(row_prefix, stable=True)
    count = torch.bincount(row_prefix)
    start = count.cumsum(0) - count
    column = torch.arange(len(order), device=order.device) - start[row_prefix[order]]
    rows = torch.zeros(len(count), int(count.max()), dtype=torch.long, device=order.device)
    rows[row_prefix[order], column] = order
    where = torch.empty_like(order)
    where[order] = row_prefix[order] * rows.shape[1] + column
    return rows, where


def causal(tokens: int, device: torch.device) -> torch.Tensor:
    """Boolean (1, 1, tokens, tokens): token i sees tokens 0..i."""
    return torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril()


@contextmanager
def shared_prefix_attention(model: PreTrainedModel) -> Iterator[bool]:
    """Inside this context `model` attends through `attend_rows` if it can; yields whether it does."""
    before = model.config._attn_implementation
    if shared := model._supports_attention_backend:
        model.set_attn_implementation(ATTENTION)
    try:
        yield shared
    finally:
        model.set_attn_implementation(before)


def forward(model: PreTrainedModel, cache: PrefixCache, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor):
    """Final hidden states (rows, tokens, hidden) of the backbone.

    ids and positions are (rows, tokens); mask is boolean, (rows or 1, 1, tokens, own tokens), True where a token
    sees an own token. Every token sees the whole prefix of its row.
    """
    if cache.shared_attention:
        groups = model.config.num_attention_heads // model.config.num_key_value_heads
        dtype = torch.float32 if ids.device.type == "cpu" else model.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        mask = mask.repeat(1, 1, groups, 1)
    elif not cache.recording and cache.prefix_length:
        mask = torch.cat([mask.new_ones(*mask.shape[:3], cache.prefix_length), mask], dim=3)
    mask = mask.expand(len(ids), -1, -1, -1)
    token = _cache.set(cache)
    try:
        out = model.base_model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
    finally:
        _cache.reset(token)
    return out.last_hidden_state


def attend_rows(module: nn.Module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' attention interface. query (rows, heads, tokens, head_dim); key and value are the rows' own,
    (rows, kv_heads, own tokens, head_dim); additive mask (rows, 1, groups * tokens, own tokens)."""
    cache = _cache.get()
    rows, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    # Query heads that share a key head become further query positions of it: no key is ever repeated.
    q = query.reshape(rows, kv_heads, -1, head_dim).to(key.dtype)
    out, lse = attend(q, key, value, attention_mask, scaling)
    if cache.prefix and not cache.recording:
        prefix_keys, prefix_values = cache.prefix[module.layer_idx]
        by_prefix, where = cache.groups
        n, most = by_prefix.shape
        grouped = q[by_prefix.flatten()].reshape(n, most, kv_heads, -1, head_dim).transpose(1, 2).flatten(2, 3)
        shared = attend(grouped, prefix_keys[:n], prefix_values[:n], None, scaling)
        shared_out, shared_lse = (
            t.reshape(n, kv_heads, most, -1, *t.shape[3:]).transpose(1, 2).flatten(0, 1)[where] for t in shared
        )
        total = torch.logaddexp(lse, shared_lse)
        out = out * (lse - total).exp()[..., None] + shared_out * (shared_lse - total).exp()[..., None]
    return out.reshape(rows, heads, tokens, head_dim).transpose(1, 2).to(query.dtype), None


def attend(q, k, v, mask, scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scaling q k^T + mask) v, (..., queries, head_dim), and the log-sum-exp of the scores, (..., queries)."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scaling)
    scores = (q @ k.transpose(-1, -2)).float() * scaling
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


AttentionInterface.register(ATTENTION, attend_rows)
