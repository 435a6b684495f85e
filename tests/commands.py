"""Run the project's commands as a user types them, with the small random model of scale smoke."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from experiments import signals
from experiments.cli import command

REPOSITORY = Path(__file__).resolve().parents[1]
SURROUNDINGS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
ENVIRONMENT = os.environ | SURROUNDINGS


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


def inside(module: str, *overrides: str, cwd: Path) -> subprocess.CompletedProcess:
    """As `run`, in this process: the same entry point without the seconds that imports take."""
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    out, err = io.StringIO(), io.StringIO()
    GlobalHydra.instance().clear()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", [module, *overrides])
        for name, value in SURROUNDINGS.items():  # for the processes that it starts
            patch.setenv(name, value)
        patch.setattr(signals, "_received", None)
        try:
            entry = importlib.import_module(module)
            command(entry.main, getattr(entry, "OPTIONS", None))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess([module, *overrides], ended.value.code, out.getvalue(), err.getvalue())
