"""Score and generate at all ranks of an adapter in one pass over the base model.

Rows of a batch belong to different ranks (the gate holds a rank per row); what requests share - few-shot
examples, a question with four choices - is computed once per rank.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm

from eval.decode import Decoding
from eval.memory import free_memory, kv_bytes
from eval.merge import merged, worth_merging
from eval.plan import Plan, Row, Tokens, batches, group_by_trunk, plans
from eval.prefix import PrefixCache, causal, forward, shared_prefix_attention
from qdylora import gate_of

log = logging.getLogger(__name__)

HEAD_POSITIONS = 1024  # positions that go through the output head at a time
SMALLEST_BUDGET = 64
KV_SHARE = 0.25  # of the free memory, for keys and values of rows that are being decoded

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass
class AllRanks:
    """The model at every rank of `ranks`. `budget`: tokens of a forward pass, halved when memory runs out, and with
    it the memory that decoding may take."""

    model: PeftModel
    ranks: Sequence[int]
    budget: int = 8192
    progress: bool = True
    computed_tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.gate = gate_of(self.model)
        self.ranks = [self.gate.checked(b) for b in self.ranks]
        self.base = self.model.get_base_model()
        self.kv_share = KV_SHARE

    def loglikelihood(self, pairs: Sequence[Pair], what: str = "scoring") -> tuple[np.ndarray, np.ndarray]:
        """For (context, continuation) token pairs: the continuation's summed log-probability and whether it is
        the greedy one, two arrays (pairs, ranks). Contexts and continuations need at least one token each."""
        logps = np.zeros((len(pairs), len(self.ranks)))
        greedy = np.zeros((len(pairs), len(self.ranks)), dtype=bool)
        pairs = [(tuple(context), tuple(continuation)) for context, continuation in pairs]
        groups = plans(pairs)
        with self._running(len(pairs) * len(self.ranks), what, "request") as bar:
            for ranks, weights in self._shares():
                with weights:
                    for group in groups:
                        for block in self._rank_blocks(len(group.trunk), ranks):
                            for sums, best, at in self._retrying(self._score_group, bar, group, block, pairs):
                                logps[at], greedy[at] = sums, best
        return logps, greedy

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: Callable[[list[int]], bool],
        what: str = "generating",
    ) -> list[list[list[int]]]:
        """Continue every prompt greedily at every rank: result[prompt][rank index] are the new token ids.
        `stops(new tokens)` ends an answer."""
        prompts = [tuple(p) for p in prompts]
        answers: dict[tuple[int, int], list[int]] = {}
        with self._running(len(prompts) * len(self.ranks), what, "answer") as bar:
            for group in group_by_trunk(prompts):
                answers |= self._retrying(self._generate_group, bar, group, prompts, max_new_tokens, stops)
        return [[answers[i, r] for r in range(len(self.ranks))] for i in range(len(prompts))]

    def forward(self, cache: PrefixCache, ids, positions, mask, rank_index: Sequence[int]) -> torch.Tensor:
        """Hidden states of rows, row i at rank `ranks[rank_index[i]]`. See `eval.prefix.forward`."""
        self.computed_tokens += ids.numel()
        with self.gate.at([self.ranks[k] for k in rank_index]):
            return forward(self.base, cache, ids, positions, mask)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits (rows, vocabulary) of hidden states (rows, hidden)."""
        return self.base.get_output_embeddings()(hidden).float()

    def _shares(self) -> Iterator[tuple[list[int], AbstractContextManager]]:
        """Indices of ranks that a pass may hold together, and the weights to have meanwhile: each rank by itself,
        merged into the base, or all of them behind the gate."""
        if worth_merging(self.model):
            return (([k], merged(self.model, rank)) for k, rank in enumerate(self.ranks))
        return iter([(list(range(len(self.ranks))), nullcontext())])

    def _score_group(self, bar, group: Plan, block: list[int], pairs: Sequence[Pair]):
        """(log-probabilities, greedy flags, where they belong) for requests behind one trunk, at a block of ranks."""
        results = []
        cache = self._trunk(group.trunk, block)
        for batch in batches([len(row.tokens) for row in group.rows], len(block), self.budget):
            requests = [j for k in batch for j in group.requests[k]]
            targets = [pairs[j][1] for j in requests]
            scored = self._score_rows(cache, [group.rows[k] for k in batch], targets, block)
            results.append((*scored, np.ix_(requests, block)))
            self._tick(bar, len(requests) * len(block))
        return results

    def _score_rows(self, cache: PrefixCache, rows: list[Row], targets: list[Tokens], block: list[int]):
        """Summed log-probabilities and greedy flags, each (targets, block), of rows behind one trunk."""
        device, n, ranks = self.base.device, len(rows), len(block)
        ids, positions, mask = (t.to(device).repeat(ranks, *[1] * (t.ndim - 1)) for t in _padded(rows))
        cache.place(torch.arange(ranks, device=device).repeat_interleave(n))
        hidden = self.forward(cache, ids, positions, mask, [k for k in block for _ in range(n)])
        reads = [(i, node) for i, row in enumerate(rows) for nodes in row.reads for node in nodes]
        row_index, node_index = torch.tensor(reads, device=device).T
        hidden = hidden.reshape(ranks, n, *hidden.shape[1:])[:, row_index, node_index]
        tokens = torch.tensor([t for target in targets for t in target], device=device)
        logp, best = self._head(hidden, tokens)
        starts = np.cumsum([0, *(len(target) for target in targets)])[:-1]
        return np.add.reduceat(logp, starts, axis=1).T, np.logical_and.reduceat(best, starts, axis=1).T

    def _head(self, hidden: torch.Tensor, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of `tokens` (reads,) and whether each is the likeliest, two arrays (ranks, reads), from
        hidden states (ranks, reads, hidden)."""
        logps, best = [], []
        pieces = zip(
            hidden.flatten(0, 1).split(HEAD_POSITIONS), tokens.repeat(len(hidden)).split(HEAD_POSITIONS), strict=True
        )
        for h, t in pieces:
            logits = self.logits(h)
            picked = logits.gather(1, t[:, None])[:, 0]
            logps.append((picked - logits.logsumexp(-1)).double())
            best.append(logits.argmax(-1) == t)
        return tuple(torch.cat(x).reshape(len(hidden), -1).cpu().numpy() for x in (logps, best))

    def _generate_group(self, bar, group, prompts, max_new_tokens, stops) -> dict[tuple[int, int], list[int]]:
        answers = {}
        for block in self._rank_blocks(len(group.trunk), list(range(len(self.ranks)))):
            own = max(len(prompts[i]) for i in group.members) - len(group.trunk) + max_new_tokens
            waiting = [((i, k), prompts[i][len(group.trunk) :]) for i in group.members for k in block]
            rows = min(len(waiting), self._decoding_rows(own))
            run = Decoding(self, self._trunk(group.trunk, block), block, rows, own, max_new_tokens, stops)
            answers |= run.all(waiting, on_answer=lambda: self._tick(bar, 1))
        return answers

    def _decoding_rows(self, own: int) -> int:
        """How many rows of `own` tokens are decoded at once: a pass costs little more for many than for few."""
        itemsize = torch.float32.itemsize if self.base.device.type == "cpu" else self.base.dtype.itemsize
        row = own * kv_bytes(self.base.config, itemsize)
        return max(1, int(self.kv_share * free_memory(self.base.device) / row))

    def _trunk(self, trunk: Tokens, block: list[int]) -> PrefixCache:
        """A cache with the trunk's keys and values at each rank of the block."""
        cache = PrefixCache(self._shared)
        if trunk:
            device = self.base.device
            ids = torch.tensor(trunk, device=device).expand(len(block), -1)
            positions = torch.arange(len(trunk), device=device).expand(len(block), -1)
            with cache.recording_prefix():
                self.forward(cache, ids, positions, causal(len(trunk), device), block)
        return cache

    def _rank_blocks(self, trunk: int, ranks: list[int]) -> list[list[int]]:
        """Indices of ranks that go together, so that their trunks fit the budget."""
        size = max(1, self.budget // max(trunk, 256))
        return [ranks[i : i + size] for i in range(0, len(ranks), size)]

    def _retrying(self, work: Callable, bar: tqdm, *args):
        """work(bar, *args), again with half the budget whenever memory runs out."""
        while True:
            before = bar.n
            try:
                return work(bar, *args)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self.budget <= SMALLEST_BUDGET:
                    raise
            self.budget //= 2
            self.kv_share /= 2
            log.warning("out of memory; going on with batches of %d tokens", self.budget)
            bar.n = before
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _tick(self, bar: tqdm, done: int) -> None:
        elapsed = bar.format_dict["elapsed"]
        bar.set_postfix_str(f"{self.computed_tokens / elapsed:.0f} tok/s" if elapsed else "", refresh=False)
        bar.update(done)

    @contextmanager
    def _running(self, total: int, what: str, unit: str) -> Iterator[tqdm]:
        self.computed_tokens = 0
        training = self.model.training
        self.model.eval()
        try:
            with (
                torch.no_grad(),  # inference tensors, such as the gate's masks, could not be used in training later
                shared_prefix_attention(self.base) as self._shared,
                tqdm(
                    total=total, desc=what, unit=unit, disable=not self.progress, leave=False, file=sys.__stderr__
                ) as bar,
            ):
                yield bar
        finally:
            self.model.train(training)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's, Python's, or the CPU allocator's way of saying so."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _padded(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids and positions (rows, tokens), and the mask (rows, 1, tokens, tokens), True where a token sees another."""
    width = max(len(row.tokens) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1, 1)  # padding sees itself: no row is empty
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        positions[i, : len(row.tokens)] = torch.tensor(row.positions)
        for start, end, context_start, context_end in row.blocks:
            mask[i, 0, start:end, context_start:context_end] = True
            mask[i, 0, start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    return ids, positions, mask
