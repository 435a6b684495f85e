"""Decoding in one batch for all ranks and prompts: rows that have stopped leave it and waiting ones enter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from eval.plan import Tokens
from eval.prefix import PrefixCache, causal

if TYPE_CHECKING:
    from eval.engine import AllRanks

Key = tuple[int, int]  # (prompt, rank index)


class Decoding:
    """Greedy continuation of prompts behind the trunk in `cache`.

    rows: how many answers are in the batch at once. own: the most tokens of a row behind the trunk.
    block: rank index of each prefix in the cache.
    """

    def __init__(
        self,
        engine: AllRanks,
        cache: PrefixCache,
        block: list[int],
        rows: int,
        own: int,
        max_new_tokens: int,
        stops: Callable[[list[int]], bool],
    ):
        self.engine, self.cache, self.block = engine, cache, block
        self.rows, self.max_new_tokens, self.stops = rows, max_new_tokens, stops
        self.trunk = cache.prefix_length
        self.device = engine.base.device
        self.active: list[Key] = []
        self.lengths: list[int] = []  # own tokens of each active row whose keys are in the cache
        self.answers: dict[Key, list[int]] = {}
        cache.reserve(rows, own)

    def all(self, waiting: list[tuple[Key, Tokens]], on_answer: Callable[[], None]) -> dict[Key, list[int]]:
        """The new tokens of every waiting (key, tokens behind the trunk)."""
        waiting = waiting[::-1]
        while waiting or self.active:
            free = self.rows - len(self.active)
            # Entering a few rows at a time would make a pass over the base for each of them.
            if waiting and free >= min(len(waiting), max(1, self.rows // 4)):
                self._enter([waiting.pop() for _ in range(min(free, len(waiting)))], on_answer)
            else:
                self._step(on_answer)
        return self.answers

    def _enter(self, prompts: list[tuple[Key, Tokens]], on_answer: Callable[[], None]) -> None:
        """Compute the prompts' own tokens and their first new one, in passes within the budget."""
        while prompts:
            width = max(len(tokens) for _, tokens in prompts)
            now, prompts = (
                prompts[: max(1, self.engine.budget // width)],
                prompts[max(1, self.engine.budget // width) :],
            )
            first, n = len(self.active), len(now)
            lengths = torch.tensor([len(tokens) for _, tokens in now], device=self.device)
            ids = torch.zeros(n, width, dtype=torch.long, device=self.device)
            for i, (_, tokens) in enumerate(now):
                ids[i, : len(tokens)] = torch.tensor(tokens, device=self.device)
            columns = torch.arange(width, device=self.device).expand(n, -1)
            self.active += [key for key, _ in now]
            self.lengths += lengths.tolist()
            hidden = self._forward(ids, columns, causal(width, self.device), slice(first, first + n), width)
            self._append(hidden[torch.arange(n, device=self.device), lengths - 1], first, on_answer)

    def _step(self, on_answer: Callable[[], None]) -> None:
        """One more token for every active row."""
        ids = torch.tensor([[self.answers[key][-1]] for key in self.active], device=self.device)
        lengths = torch.tensor(self.lengths, device=self.device)[:, None]
        visible = max(self.lengths) + 1
        mask = torch.arange(visible, device=self.device) <= lengths[:, :, None, None]
        hidden = self._forward(ids, lengths, mask, slice(0, len(self.active)), visible)
        self.lengths = [length + 1 for length in self.lengths]
        self._append(hidden[:, 0], 0, on_answer)

    def _forward(self, ids, columns, mask, rows: slice, visible: int) -> torch.Tensor:
        ranks = [k for _, k in self.active[rows]]
        prefix = torch.tensor([self.block.index(k) for k in ranks], device=self.device)
        self.cache.place(prefix, rows, columns, visible)
        return self.engine.forward(self.cache, ids, columns + self.trunk, mask, ranks)

    def _append(self, hidden: torch.Tensor, first: int, on_answer: Callable[[], None]) -> None:
        """Add the likeliest next token to the rows from `first` on, and let those that end leave."""
        tokens = self.engine.logits(hidden).argmax(-1).tolist()
        ended = set()
        for row, (key, token) in enumerate(zip(self.active[first:], tokens, strict=True), start=first):
            answer = self.answers.setdefault(key, [])
            answer.append(token)
            if len(answer) == self.max_new_tokens or self.stops(answer):
                ended.add(row)
                on_answer()
        self._leave(ended)

    def _leave(self, ended: set[int]) -> None:
        """Drop rows; the last rows move to the places that become free."""
        left = len(self.active) - len(ended)
        holes = sorted(row for row in ended if row < left)
        movers = [row for row in range(left, len(self.active)) if row not in ended]
        if holes:
            self.cache.move(movers, holes)
        for hole, mover in zip(holes, movers, strict=True):
            self.active[hole], self.lengths[hole] = self.active[mover], self.lengths[mover]
        del self.active[left:], self.lengths[left:]
