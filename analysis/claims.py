"""The paper's claims put to the records: each supported, not supported, or not decided at this scale."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from analysis.records import Record

Verdict = Literal["supported", "not supported", "not decided at this scale"]


@dataclass(frozen=True)
class Claim:
    """One claim and its evidence.

    `effect` is a number in the unit that `note` names (None: nothing to compute it from), `interval` its 95%
    interval in the same unit (None: the effect is exact, or there is none), `n` the items behind it, `command`
    what rebuilds the evidence from nothing.
    """

    name: str
    statement: str
    verdict: Verdict
    effect: float | None
    interval: tuple[float, float] | None
    n: int
    command: str
    note: str


def claims(records: Sequence[Record]) -> list[Claim]:
    """The verdict on every claim, in order of its name, from all records at hand (of any table, one scale)."""
    raise NotImplementedError
