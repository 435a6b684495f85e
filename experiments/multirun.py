"""What Hydra's multirun through submitit needs on a cluster (-m hydra/launcher=submitit_slurm)."""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path

STAND_INS = Path(__file__).resolve().parents[1] / "slurm" / "bin"


def make_ready(arguments: Sequence[str]) -> None:
    """Make sure that submitit can ask what became of a job: where there is no accounting, a stand-in for sacct answers.

    Without an answer it would wait for ever for a task that was killed.
    """
    if not any("submitit_slurm" in argument for argument in arguments):
        return
    # Our launcher file goes over the plugin's of the same name, which is what makes that one's defaults ours.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/submitit_slurm' is validated against ConfigStore")
    try:
        works = subprocess.run(["sacct", "--noheader", "--starttime=now"], capture_output=True).returncode == 0
    except FileNotFoundError:
        works = False
    if not works:
        os.environ["PATH"] = f"{STAND_INS}{os.pathsep}{os.environ['PATH']}"
