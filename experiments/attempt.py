"""One start of a cell: alone, counted, and with a record of how it failed."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from filelock import SoftFileLease, Timeout

from eval.engine import is_out_of_memory
from experiments.cell import Cell, note
from experiments.files import Damaged, disk_is_full, read_json, write_json
from experiments.mistakes import ConfigError
from experiments.signals import AGAIN, Interrupted

LEASE = 120.0  # seconds without a sign of life after which a holder on another machine is given up
STARTS = 3  # without progress between them, after which a cell is marked failed


class Busy(Exception):
    """Another process runs the cell."""


def attempt(cell: Cell, work: Callable[[], dict], about_memory: Callable[[], dict] = dict) -> dict | None:
    """What `work` returns, done while holding the cell, or None if it failed or ran out of memory: the cell then has a
    record that says so, with what `about_memory` says. Work of another configuration is put aside first.

    A user's mistake, a full disk and a signal leave no record: the cell is as if it had not been started. Raises Busy
    if another process holds the cell and `when_busy` is leave.
    """
    if int(os.environ.get("RANK", 0)):  # the first of several processes holds the cell for all
        return _recorded(cell, work, about_memory)
    with alone(cell):
        for name in cell.prepare():
            note(f"{cell.name}: {name} has changed; what was there is put aside, the cell starts anew")

        def counted() -> dict:
            _count_start(cell)
            return work()

        return _recorded(cell, counted, about_memory)


def _recorded(cell: Cell, work: Callable[[], dict], about_memory: Callable[[], dict]) -> dict | None:
    try:
        return work()
    except (ConfigError, Damaged, FileNotFoundError):
        _starts_file(cell).unlink(missing_ok=True)
        cell.withdraw()
        raise
    except Interrupted as stopped:
        if stopped.signal == signal.SIGINT:  # a person's decision, not a start that failed
            _starts_file(cell).unlink(missing_ok=True)
        raise
    except Exception as error:
        if disk_is_full(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if is_out_of_memory(error):
            cell.finish("oom", reason, oom="met", **about_memory())
        elif isinstance(error, Hopeless):
            cell.finish("failed", str(error))
        else:
            traceback.print_exc()
            cell.finish("failed", reason)
        return None


class Hopeless(RuntimeError):
    """A cell that further starts as they are will not bring to its end; the text is the reason for its record."""


def _count_start(cell: Cell) -> None:
    """Hopeless if the cell was started `STARTS` times and has not come further since.

    What a kill leaves behind counts: the last checkpoint, the end of training, parts of the scores.
    """
    checkpoints = sorted(f.parent.name for f in cell.folder.glob("checkpoints/*/checksums.json"))
    parts = sorted(f.name for f in cell.folder.glob("parts/*.json"))
    progress = [checkpoints, (cell.folder / "training.json").exists(), parts]
    before = read_json(_starts_file(cell)) or {}
    starts = before["starts"] if before.get("progress") == progress else 0
    if starts == STARTS:
        at = f"beyond {checkpoints[-1]}" if checkpoints else "at all"
        raise Hopeless(
            f"started {STARTS} times without coming {at}; if it was killed for its memory or time, allow more of it "
            f"or set checkpoint_every below {cell.config.checkpoint_every}, then run it again"
        )
    write_json(_starts_file(cell), {"progress": progress, "starts": starts + 1})


def _starts_file(cell: Cell):
    return cell.folder / "starts.json"


def claim(cell: Cell) -> SoftFileLease:
    """The lock of a cell, not yet acquired: a file beside its folder that its holder touches every 40 s.

    It works where flock is not shared (NFS). A holder that died on this machine is found out at once, one on another
    after `LEASE` seconds, counted by the clock of the process that waits.
    """
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    return SoftFileLease(cell.folder.with_name(f".{cell.name}.lock"), lease_duration=LEASE, on_compromise=_taken_over)


def _taken_over(loss) -> None:
    # Suspended for so long that another process goes on with the cell: not one more write.
    note(f"{loss.lock_file}: another process has taken over this cell ({loss.reason}); this one stops")
    os._exit(AGAIN)


@contextmanager
def alone(cell: Cell) -> Iterator[None]:
    """Inside, no other process runs the cell. Waits for one that does, or raises Busy if `when_busy` is leave."""
    lease = claim(cell)
    try:
        lease.acquire(blocking=False)
    except Timeout:
        owner = lease.owner
        holder = f"process {owner.pid} on {owner.hostname}" if owner else "another process"
        if cell.config.when_busy == "leave":
            raise Busy(f"{cell.name} is being run by {holder}") from None
        note(f"{cell.name} is being run by {holder}; waiting for it to end")
        lease.acquire(poll_interval=1)
    try:
        yield
    finally:
        lease.release()
