"""Run the project's commands as a user types them, with the small random model of scale smoke."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def start(module: str, *overrides: str, cwd: Path) -> subprocess.Popen:
    """`python -m module overrides` in folder `cwd`, with its output captured as text."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *overrides],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(module: str, *overrides: str, cwd: Path) -> subprocess.CompletedProcess:
    process = start(module, *overrides, cwd=cwd)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
