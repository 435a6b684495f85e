"""A command in a process of its own that hears the signals this one gets."""

from __future__ import annotations

import os
import subprocess

from experiments.signals import Interrupted

# Weights of a few hundred MB come and go with every quantized forward pass: keep them mapped.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


def in_a_process(command: list[str], environment: dict[str, str] | None = None) -> int:
    """The exit code of `command`, 128 + n if signal n killed it. A signal to this process is passed on, and raised when
    the other has ended."""
    process = subprocess.Popen(command, env=os.environ | (environment or {}))
    try:
        code = process.wait()
    except Interrupted as stopped:
        process.send_signal(stopped.signal)
        process.wait()
        raise
    return code if code >= 0 else 128 - code
