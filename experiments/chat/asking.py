"""Ask a judge about matches, many at a time, and keep every verdict the moment it is there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tqdm import tqdm

from experiments.cell import note
from experiments.chat import judging
from experiments.chat.judges import Refused, Reply, Unreachable
from experiments.chat.matches import Match, Verdicts
from experiments.schema import JudgeSettings
from experiments.signals import asked, until_saved

ATTEMPTS = 2  # a verdict that does not parse is asked once more
CHARACTERS_A_TOKEN = 4  # of English, roughly
SECONDS_A_REQUEST = 5.0  # before any has been timed


@dataclass
class Outcome:
    """What was asked now; `refused` matches and those left `open` when the judge went away have no verdict."""

    asked: int = 0
    refused: int = 0
    open: int = 0
    reasons: set[str] = field(default_factory=set)


def about(settings: JudgeSettings) -> dict:
    """How a verdict's line names its judge."""
    name = settings.model.rstrip("/").rsplit("/", 1)[-1]  # of a folder its last part
    return {
        "judge": f"{name} ({settings.prompt}, T {settings.temperature:g})",
        "model": settings.model,
        "prompt_version": settings.prompt,
        "temperature": settings.temperature,
    }


def estimate(matches: Sequence[Match], settings: JudgeSettings, before: Sequence[dict]) -> str:
    """What asking will cost at most, in tokens, dollars (if prices are configured) and time. before: this judge's
    verdicts so far, whose mean time stands for a request's."""
    texts = (judging.messages(settings.prompt, m.prompt.text, m.first_answer, m.second_answer) for m in matches)
    tokens_in = sum(sum(len(part["content"]) for part in text) for text in texts) // CHARACTERS_A_TOKEN
    tokens_out = len(matches) * settings.max_tokens
    times = [line["seconds"] for line in before]
    seconds = statistics.mean(times) if times else SECONDS_A_REQUEST
    at_once = settings.parallel if settings.kind == "endpoint" else 1
    parts = [f"{len(matches)} verdicts to ask", f"about {tokens_in:,} tokens in, at most {tokens_out:,} out"]
    if settings.price_in is not None and settings.price_out is not None:
        dollars = (tokens_in * settings.price_in + tokens_out * settings.price_out) / 1e6
        parts.append(f"at most about ${dollars:,.2f}")
    else:
        parts.append("no prices configured (judge.price_in, judge.price_out)")
    parts.append(f"about {len(matches) * seconds / at_once / 60:.1f} min at {seconds:.1f} s each, {at_once} at once")
    return "; ".join(parts)


def ask_all(
    matches: Sequence[Match], ask: Callable[[list[dict]], Reply], settings: JudgeSettings, verdicts: Verdicts
) -> Outcome:
    """Ask about every match. Stops asking new ones when the judge cannot be reached or a signal came; the answers under
    way are waited for and kept."""
    outcome, waiting = Outcome(), list(matches)[::-1]
    at_once = settings.parallel if settings.kind == "endpoint" else 1
    under_way: set[Future] = set()
    # A signal between the writing of a verdict and the note that it is written would have it written twice.
    with (
        until_saved(),
        ThreadPoolExecutor(at_once) as pool,
        tqdm(total=len(matches), desc="verdicts", unit="verdict") as bar,
    ):
        while True:
            while waiting and not outcome.open and not asked() and len(under_way) < at_once:
                under_way.add(pool.submit(one, waiting.pop(), ask, settings))
            if not under_way:
                break
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                _keep(future, outcome, verdicts)
                under_way.remove(future)
                bar.update()
    outcome.open += len(waiting)
    return outcome


def _keep(future: Future, outcome: Outcome, verdicts: Verdicts) -> None:
    try:
        verdicts.add(future.result())
        outcome.asked += 1
    except Refused as error:
        outcome.refused += 1
        outcome.reasons.add(str(error))
    except Unreachable as error:
        outcome.open += 1
        outcome.reasons.add(str(error))


def one(match: Match, ask: Callable[[list[dict]], Reply], settings: JudgeSettings) -> dict:
    """The line of a match's verdict: asked again once if it does not parse, then recorded as none (null)."""
    text = judging.messages(settings.prompt, match.prompt.text, match.first_answer, match.second_answer)
    replies: list[Reply] = []
    start, found = time.monotonic(), None
    while found is None and len(replies) < ATTEMPTS:
        replies.append(ask(text))
        found = judging.verdict(replies[-1].text)
    return {
        **about(settings),
        "match": match.key,
        "prompt": match.prompt.id,
        "first": match.first,
        "second": match.second,
        "verdict": found,
        "replies": [reply.text for reply in replies],
        "tokens_in": _total(reply.tokens_in for reply in replies),
        "tokens_out": _total(reply.tokens_out for reply in replies),
        "seconds": round((time.monotonic() - start) / len(replies), 3),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _total(counts: Iterable[int | None]) -> int | None:
    """The sum, None if a part of it is not known."""
    counts = list(counts)
    return None if None in counts else sum(counts)


def report(outcome: Outcome) -> None:
    """Tell the user what was not answered."""
    why = "; ".join(sorted(outcome.reasons))
    if outcome.refused:
        note(f"{outcome.refused} matches were refused and have no verdict: {why}")
    if outcome.open:
        note(f"{outcome.open} matches are still open: {why}. What was answered is kept; run the same command to go on")
