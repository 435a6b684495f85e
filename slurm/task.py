"""What one task of an array does: run its cell. Called by slurm/array.sbatch as python -m slurm.task LIST INDEX.

Exit codes are those of experiments.run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from experiments.files import Damaged
from experiments.process import MALLOC, in_a_process
from experiments.signals import AGAIN, Interrupted, listen
from slurm.tasklist import TaskList


def run(tasks: TaskList, index: int) -> int:
    """Train, in all processes of the task if there are several, then score and record. Returns the exit code."""
    python, overrides = [sys.executable, "-m"], tasks.command(index)
    if tasks.processes > 1:
        code = in_a_process(["srun", "--kill-on-bad-exit=1", *python, "slurm.process", "experiments.train", *overrides])
        if code:
            return code
    return in_a_process([*python, "experiments.run", *overrides])


def main(file: str, index: str) -> int:
    listen()
    os.environ |= MALLOC
    try:
        return run(TaskList.read(Path(file)), int(index))
    except Interrupted:
        return AGAIN
    except (Damaged, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
