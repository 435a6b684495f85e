"""One of several processes that SLURM's srun starts, as torch.distributed wants it:

srun python -m slurm.process experiments.train data=alpaca method=qdylora
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys

FIRST_PORT, PORTS = 20_000, 20_000


def rendezvous(environment: dict[str, str]) -> dict[str, str]:
    """The variables of torch.distributed from those of SLURM. The port is the job's own."""
    nodes = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
    first = environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if first is None:
        first = subprocess.run(nodes, capture_output=True, text=True, check=True).stdout.split()[0]
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "MASTER_ADDR": first,
        "MASTER_PORT": str(FIRST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS),
    }


if __name__ == "__main__":
    os.environ |= rendezvous(dict(os.environ))
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
