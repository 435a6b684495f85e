"""The draw: which rank b ~ p_B each row of each training step is trained at (QDyLoRA, Algorithm 1).

The paper names no family for p_B; DyLoRA's default, and ours, is uniform over r_min..r_max. A draw is keyed by
(seed, step): it touches no global generator, so a resumed run and every process of a data-parallel run
see the same ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = ("uniform", "list", "geometric", "fixed", "nested")
PER = ("step", "process", "micro_batch", "sequence")


@dataclass(frozen=True)
class Draw:
    """p_B and how often it is drawn.

    kind: `uniform` over r_min..r_max, `list` (uniform over `ranks`), `geometric` (p (1-p)^(b-r_min), cut to
        r_min..r_max), `fixed` (always r_max: plain LoRA), `nested` (nothing is drawn: every step trains the prefixes of
        all of `ranks`, which end with r_max, see `gate.Nested`).
    per: one rank per optimizer `step` (the official DyLoRA code's way), one of its own for each data-parallel
        `process` in a step (their gradients are averaged, so draws depend on how many there are), per `micro_batch`,
        or per `sequence`.
    from_step: the first step whose rank is drawn; every step before it is at r_max, and the trained ranks are sorted
        in between (`sort_ranks`), so that those that count most are drawn most.
    at_r_max, at_r_min: share of each step's rows that is anchored at that rank instead of drawn (slimmable
        networks' sandwich rule); needs per = sequence.
    """

    r_max: int = 64
    r_min: int = 1
    kind: str = "uniform"
    per: str = "step"
    ranks: tuple[int, ...] = ()
    p: float = 0.15
    at_r_max: float = 0.0
    at_r_min: float = 0.0
    from_step: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        in_range = all(isinstance(b, int) and self.r_min <= b <= self.r_max for b in self.ranks)
        anchors = (self.at_r_max, self.at_r_min)
        needs = [
            (
                1 <= self.r_min <= self.r_max,
                f"r_min is {self.r_min} and r_max {self.r_max}; 1 <= r_min <= r_max is needed",
            ),
            (self.kind in KINDS, f"draw.kind is {self.kind!r}; choose one of {', '.join(KINDS)}"),
            (self.per in PER, f"draw.per is {self.per!r}; choose one of {', '.join(PER)}"),
            (
                self.kind != "list" or (self.ranks and in_range),
                f"draw.ranks is {list(self.ranks)}; kind 'list' needs ranks from {self.r_min} to {self.r_max}",
            ),
            (
                self.kind != "nested" or (in_range and self.r_max in self.ranks and self.per == "step"),
                f"draw.ranks is {list(self.ranks)} and draw.per {self.per!r}; kind 'nested' needs ranks from "
                f"{self.r_min} to r_max {self.r_max}, which is one of them, and per = step",
            ),
            (
                self.from_step >= 0 and (self.from_step == 0 or self.kind not in ("fixed", "nested")),
                f"draw.from_step is {self.from_step} and draw.kind {self.kind!r}; it must be at least 0, and 0 where "
                "nothing is drawn",
            ),
            (self.seed >= 0, f"draw.seed is {self.seed}; it must be at least 0"),
            (0 < self.p < 1, f"draw.p is {self.p}; 0 < p < 1 is needed"),
            (
                min(anchors) >= 0 and sum(anchors) <= 1,
                f"draw.at_r_max is {self.at_r_max} and draw.at_r_min {self.at_r_min}; as shares they sum to at most 1",
            ),
            (
                self.per == "sequence" or not any(anchors),
                f"draw.per is {self.per!r}; anchored rows need per = sequence",
            ),
        ]
        for holds, sentence in needs:
            if not holds:
                raise ValueError(sentence)

    def probabilities(self) -> np.ndarray:
        """p_B over ranks 1..r_max, shape (r_max,), of the rows that are not anchored."""
        b = np.arange(1, self.r_max + 1)
        weight = {
            "uniform": lambda: np.ones(self.r_max),
            "list": lambda: np.bincount(self.ranks, minlength=self.r_max + 1)[1:].astype(float),
            "geometric": lambda: (1 - self.p) ** (b - self.r_min).astype(float),
            "fixed": lambda: (b == self.r_max).astype(float),
            "nested": lambda: (b == self.r_max).astype(float),
        }[self.kind]()
        weight[: self.r_min - 1] = 0
        return weight / weight.sum()

    def ranks_of_step(self, step: int, micro_batches: int, rows: int, processes: int = 1) -> np.ndarray:
        """Ranks of all rows of an optimizer step, shape (micro_batches, rows).

        `micro_batches` counts gradient accumulation times processes, so that process p of P uses entries
        p, p + P, ... and, but for `per = process`, the draws do not depend on how a batch is spread over processes.
        """
        if step < self.from_step:
            return np.full((micro_batches, rows), self.r_max)
        rng = np.random.default_rng((self.seed, step))
        drawn = {
            "step": (1, 1),
            "process": (processes, 1),
            "micro_batch": (micro_batches, 1),
            "sequence": (micro_batches, rows),
        }[self.per]
        ranks = 1 + rng.choice(self.r_max, size=drawn, p=self.probabilities())
        if self.at_r_max or self.at_r_min:
            self._anchor(ranks.reshape(-1), rng)
        if self.per == "process":
            ranks = np.tile(ranks, (micro_batches // processes, 1))
        return np.broadcast_to(ranks, (micro_batches, rows))

    def _anchor(self, ranks: np.ndarray, rng: np.random.Generator) -> None:
        """Put the anchored shares of the step's rows, shape (n,), at r_max and r_min, in random places."""
        order = rng.permutation(len(ranks))
        top, bottom = (round(share * len(ranks)) for share in (self.at_r_max, self.at_r_min))
        ranks[order[:top]] = self.r_max
        ranks[order[top : top + bottom]] = self.r_min

    def update_probability(self, frozen: bool = False) -> np.ndarray:
        """Chance that a row of the adapter learns from a row of the batch, shape (r_max,): P(b >= row), or
        P(b = row) when frozen; anchored shares included. From `from_step` on."""
        p = (1 - self.at_r_max - self.at_r_min) * self.probabilities()
        p[-1] += self.at_r_max
        p[self.r_min - 1] += self.at_r_min
        return p if frozen else p[::-1].cumsum()[::-1]

    def expected_updates(self, steps: int, frozen: bool = False) -> np.ndarray:
        """How many of the first `steps` steps a row of the adapter learns in, shape (r_max,), of one batch row each."""
        before = min(steps, self.from_step)
        at_r_max = (np.arange(1, self.r_max + 1) == self.r_max) if frozen else np.ones(self.r_max)
        return before * at_r_max + (steps - before) * self.update_probability(frozen)
