"""Which token prefixes to compute once: group contexts by shared trunk, and lay each context out as one row."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

Tokens = tuple[int, ...]

#: A group of its own must save at least this many tokens: every group costs a few forward passes.
OVERHEAD = 64
#: Branches of a row may be this long together, or as long as its context.
BRANCHES = 64


@dataclass(frozen=True)
class Group:
    """Contexts (indices) that begin with the same `trunk` tokens."""

    trunk: Tokens
    members: tuple[int, ...]


def group_by_trunk(contexts: Sequence[Tokens]) -> list[Group]:
    """Split contexts into groups with a common trunk so that few tokens are computed in all.

    The trunk of a group is computed once, the rest of each context by itself. At least one token of every
    context stays outside the trunk, because its hidden state is needed.
    """
    order = sorted(range(len(contexts)), key=contexts.__getitem__)
    groups: list[Group] = []
    pending = [order] if order else []
    while pending:
        members = pending.pop()
        depth = _shared(contexts[members[0]], contexts[members[-1]])  # sorted: the extremes share least
        depth = min(depth, *(len(contexts[i]) - 1 for i in members))
        stay, leave = [], []
        for branch in _branches(contexts, members, depth):
            (leave if len(branch) < len(members) and _pays(contexts, branch, depth) else stay).append(branch)
        if stay:
            groups.append(Group(contexts[members[0]][:depth], tuple(i for branch in stay for i in branch)))
        pending += leave
    return groups


def _shared(a: Tokens, b: Tokens) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _branches(contexts: Sequence[Tokens], members: list[int], depth: int) -> list[list[int]]:
    """Members, in sorted order, split by their token at `depth`."""
    branches: list[list[int]] = []
    for i in members:
        if branches and contexts[branches[-1][0]][depth] == contexts[i][depth]:
            branches[-1].append(i)
        else:
            branches.append([i])
    return branches


def _pays(contexts: Sequence[Tokens], branch: list[int], depth: int) -> bool:
    """Whether a branch saves tokens by computing its own longer trunk, from its first token on."""
    deeper = _shared(contexts[branch[0]], contexts[branch[-1]])
    return (len(branch) - 1) * (deeper - depth) > depth + OVERHEAD


@dataclass(frozen=True)
class Row:
    """Contexts behind a trunk, and the continuations to score after each, as small token trees side by side.

    tokens: a context's own tokens, then one branch for each continuation of two tokens or more (its last
        token is only read, never fed); then the next context's.
    positions: of each token in its sequence.
    blocks: (start, end, context start, context end); tokens start..end see each other causally and that context.
    reads: for each continuation, the indices of the tokens whose next-token distribution scores it.
    """

    tokens: Tokens
    positions: Tokens
    blocks: tuple[tuple[int, int, int, int], ...]
    reads: tuple[Tokens, ...]


def divide(own: int, continuations: Sequence[Tokens]) -> list[list[int]]:
    """Indices of the continuations that go into one row each, behind a context of `own` tokens.

    Branches of a row are masked from one another, but attention computes the square of the row all the same.
    """
    rows: list[list[int]] = []
    room = -1
    for i, continuation in enumerate(continuations):
        room -= len(continuation) - 1
        if room < 0:
            rows.append([])
            room = max(own, BRANCHES) - (len(continuation) - 1)
        rows[-1].append(i)
    return rows


def lay_out(context: Tokens, trunk: int, continuations: Sequence[Tokens]) -> Row:
    """The row of one context whose first `trunk` tokens are computed elsewhere."""
    tokens, positions = list(context[trunk:]), list(range(trunk, len(context)))
    own = len(tokens)
    branch_of: dict[Tokens, tuple[int, int]] = {}
    for fed in (continuation[:-1] for continuation in continuations):
        if fed and fed not in branch_of:
            branch_of[fed] = (len(tokens), len(tokens) + len(fed))
            tokens += fed
            positions += range(len(context), len(context) + len(fed))
    reads = tuple((own - 1, *range(*branch_of.get(c[:-1], (0, 0)))) for c in continuations)
    blocks = ((0, own, 0, 0), *((start, end, 0, own) for start, end in branch_of.values()))
    return Row(tuple(tokens), tuple(positions), blocks, reads)


def pack(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the rows to join, so that all are about as long as the longest and padding is little: each of the
    longer ones takes the shortest that still fit beside it."""
    waiting = deque(sorted(range(len(lengths)), key=lambda i: lengths[i]))
    width = lengths[waiting[-1]] if waiting else 0
    packed = []
    while waiting:
        packed.append([waiting.pop()])
        room = width - lengths[packed[-1][0]]
        while waiting and lengths[waiting[0]] <= room:
            packed[-1].append(waiting.popleft())
            room -= lengths[packed[-1][-1]]
    return packed


def join(rows: Sequence[Row]) -> Row:
    """Rows behind the same trunk as one."""
    starts = list(accumulate((len(row.tokens) for row in rows), initial=0))
    return Row(
        tuple(t for row in rows for t in row.tokens),
        tuple(p for row in rows for p in row.positions),
        tuple(
            tuple(edge + start for edge in block)
            for row, start in zip(rows, starts, strict=False)
            for block in row.blocks
        ),
        tuple(tuple(i + start for i in read) for row, start in zip(rows, starts, strict=False) for read in row.reads),
    )


def batches(lengths: Sequence[int], rows_each: int, budget: int) -> list[list[int]]:
    """Indices in batches of at most `budget` padded tokens, longest first; an item counts `rows_each` times."""
    result: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if result and (len(result[-1]) + 1) * longest * rows_each <= budget:
            result[-1].append(i)
        else:
            longest = max(lengths[i], 1)
            result.append([i])
    return result


@dataclass(frozen=True)
class Plan:
    """Requests whose contexts share a trunk. requests: of each row, whose reads score them in this order."""

    trunk: Tokens
    rows: list[Row]
    requests: list[list[int]]


def plans(pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Plan]:
    """How to score (context, continuation) token pairs: every shared trunk and every context once."""
    by_context: dict[Tokens, list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        by_context.setdefault(context, []).append(i)
    contexts = list(by_context)
    return [
        _plan(group.trunk, {contexts[i]: by_context[contexts[i]] for i in group.members}, pairs)
        for group in group_by_trunk(contexts)
    ]


def _plan(trunk: Tokens, requests_of: dict[Tokens, list[int]], pairs: Sequence[tuple[Tokens, Tokens]]) -> Plan:
    rows, requests = [], []
    for context, asked in requests_of.items():
        continuations = [pairs[j][1] for j in asked]
        for part in divide(len(context) - len(trunk), continuations):
            rows.append(lay_out(context, len(trunk), [continuations[k] for k in part]))
            requests.append([asked[k] for k in part])
    packs = pack([len(row.tokens) for row in rows])
    return Plan(
        trunk,
        [join([rows[k] for k in together]) for together in packs],
        [[j for k in together for j in requests[k]] for together in packs],
    )
