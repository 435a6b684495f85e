"""A private SLURM on this machine (two nodes, two fake GPUs each) for the tests of this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.commands import ENVIRONMENT

SCRIPTS = Path(__file__).parent / "cluster"
# Jobs of `low` make way for those of `high`.
PARTITIONS = """PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=node0 MaxTime=60 PriorityTier=1 State=UP
PartitionName=high Nodes=node0 MaxTime=60 PriorityTier=10 PreemptMode=OFF State=UP"""


@dataclass
class Cluster:
    """Commands that run with this SLURM."""

    environment: dict[str, str] = field(repr=False)

    def run(self, *command: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env=self.environment | more,
            capture_output=True,
            text=True,
            timeout=900,
        )

    def queue(self, **shown: str) -> list[list[str]]:
        """Array job, task, name and state of every task, ended ones too."""
        format = "--format=%F|%K|%j|%T|%A"
        out = self.run("squeue", "--states=all", "--noheader", "--array", format).stdout
        return [line.split("|") for line in out.splitlines()]

    def jobs(self) -> dict[str, list[str]]:
        """Cell name -> states of its tasks."""
        found: dict[str, list[str]] = {}
        for _, _, name, state, _ in self.queue():
            found.setdefault(name, []).append(state)
        return found

    def task(self, name: str, state: str = "RUNNING") -> str:
        """Waits for a task of this name in this state; its own job id."""
        found: list[str] = []

        def there() -> bool:
            found[:] = [job for _, _, n, s, job in self.queue() if n == name and s == state]
            return bool(found)

        wait_for(there, f"{name} {state}: {self.queue()}")
        return found[0]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} has not come"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def slurm() -> Cluster:
    """Skips where SLURM is not installed or this is not root, with CI set fails there."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=path)]
    if missing or os.geteuid() != 0:
        reason = f"needs root and SLURM (tests/slurm/cluster/install.sh); not here: {', '.join(missing) or 'root'}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "SUBMITIT"))}
    root = tempfile.mkdtemp(prefix="slurm-", dir="/tmp")  # short: a socket's path has at most 107 characters
    settings = {"NODES": "2", "CPUS": "2", "GPUS": "2", "EXTRA": PARTITIONS, "WATCH_PID": str(os.getpid())}
    subprocess.run([SCRIPTS / "start.sh", root], check=True, timeout=120, env=environment | settings)
    try:
        yield Cluster(environment | {"SLURM_CONF": f"{root}/etc/slurm.conf"})
    finally:
        subprocess.run([SCRIPTS / "stop.sh", root], timeout=60)
