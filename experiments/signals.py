"""Signals that ask a command to stop: what is in work is saved at the next step, the exit code asks for a restart."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

#: Exit code of a command that was asked to stop, or found its cell taken: start it again and it goes on
#: (EX_TEMPFAIL of sysexits.h).
AGAIN = 75

#: Ctrl-C, a polite kill, and the warnings of SLURM (slurm/array.sbatch) before its time limit or a preemption.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(BaseException):
    """The command was asked to stop. Not an Exception: whoever handles failures is not meant."""

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        super().__init__(f"stopped by {self.signal.name}")


_received: int | None = None
_waiting = False


def listen() -> None:
    """From now on a signal raises Interrupted, or, inside `until_saved`, only asks for a checkpoint."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # else submitit listens already
            signal.signal(number, _receive)


def _receive(number: int, frame) -> None:
    global _received
    if _received is not None:  # one is enough: a second Ctrl-C must not break off what the first set going
        return
    _received = number
    if not _waiting:
        raise Interrupted(number)


@contextmanager
def until_saved() -> Iterator[None]:
    """Inside, a signal waits for the body to end, as `monitor.StopAtSignal` makes it; then raises Interrupted."""
    global _waiting
    _waiting = True
    try:
        yield
    finally:
        _waiting = False
    if _received is not None:
        raise Interrupted(_received)


def asked() -> int:
    """The signal that came, 0 if none did."""
    return _received or 0


def ask(number: int) -> None:
    """As if signal `number` had come to this process too."""
    global _received
    _received = number
