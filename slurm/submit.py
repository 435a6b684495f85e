"""Run what is missing of a table as one SLURM array, follow it, and print the table:

python -m slurm.submit table=table1 scale=paper cluster=default
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from experiments.cell import Cell, note
from experiments.cli import command
from experiments.mistakes import ConfigError
from experiments.schema import Cluster, Config
from experiments.table import cells, show
from slurm.tasklist import FOLDER, Task, TaskList, is_a_place

POLL = 5.0  # seconds between looks at the queue
SCRIPT = Path(__file__).with_name("array.sbatch")
WAITING, RUNNING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"}, {"RUNNING", "COMPLETING", "CONFIGURING"}


def submit(missing: list[tuple[list[str], Cell]], config: Config) -> TaskList:
    """Submit an array with one task for each cell."""
    cluster = config.cluster
    tasks = [Task(cell.name, [o for o in overrides if not is_a_place(o)]) for overrides, cell in missing]
    processes = cluster.nodes * cluster.processes
    todo = TaskList.new(Path(config.outputs), title(config), tasks, processes)
    todo.logs.mkdir()
    limit = f"%{cluster.at_once}" if cluster.at_once else ""
    options = [
        f"--job-name={title(config)}",
        f"--array=0-{len(tasks) - 1}{limit}",
        f"--output={str(todo.logs).replace('%', '%%')}/%a.log",
        f"--signal=B:USR1@{cluster.warning}",
        "--export=ALL",
        *sbatch_options(cluster),
    ]
    script = [str(SCRIPT), sys.executable, str(todo.file), *cluster.modules]
    try:
        job = slurm("sbatch", "--parsable", *options, *script, env=environment(cluster))
    except ConfigError:
        todo.remove()
        raise
    todo = todo.submitted(job.strip().split(";")[0])
    for index, task in enumerate(tasks):
        slurm("scontrol", "update", f"JobId={todo.job}_{index}", f"JobName={task.name}", may_fail=True)
    note(f"submitted {len(tasks)} cells as array {todo.job}; logs in {todo.logs}")
    return todo


def sbatch_options(cluster: Cluster) -> list[str]:
    """What a cluster's profile asks of sbatch, as arguments: no shell reads them."""
    asked = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "gpus-per-node": cluster.gpus,
        "cpus-per-task": cluster.cpus,
        "mem": cluster.memory,
        "time": cluster.time,
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.processes,
    }
    return [f"--{name}={value}" for name, value in asked.items() if value is not None]


def environment(cluster: Cluster) -> dict[str, str]:
    """The batch jobs' environment: this one's, the profile's, and our packages from any working folder."""
    repository = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join([repository, *filter(None, [os.environ.get("PYTHONPATH")])])
    return dict(os.environ) | {"PYTHONPATH": paths} | {k: str(v) for k, v in cluster.environment.items()}


def slurm(*command: str, env: dict[str, str] | None = None, may_fail: bool = False) -> str:
    """What a SLURM command prints. ConfigError with its complaint if it refuses, or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]} is not installed here: LAUNCHER=slurm is for a machine of a cluster") from None
    if done.returncode and not may_fail:
        raise ConfigError(f"{command[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


def title(config: Config) -> str:
    return f"{config.table.name}-{config.scale}"


def in_queue(config: Config) -> dict[str, str]:
    """Cells of the table that wait or run in an array submitted from this output folder: name -> state."""
    lists = [TaskList.read(file) for file in (Path(config.outputs) / FOLDER).glob(f"{title(config)}-*.json")]
    jobs = {todo.job: todo for todo in lists if todo.job}
    found = {}
    for line in slurm("squeue", "--me", "--noheader", "--array", "--format=%F|%K|%T").splitlines() if jobs else ():
        job, index, state = line.split("|")
        if job in jobs and index.isdigit() and state in WAITING | RUNNING:
            found[jobs[job].tasks[int(index)].name] = state
    return found


def follow(cells_of_table: list[Cell], config: Config) -> None:
    """Show how many cells wait, run and have ended, until none waits or runs."""
    shown = ""
    while True:
        queue = in_queue(config)
        counts = Counter(progress(cell, queue) for cell in cells_of_table)
        states = ("waiting", "running", "done", "oom", "failed", "stopped")
        line = ", ".join(f"{counts[state]} {state}" for state in states if counts[state])
        if line != shown:
            note(f"{time.strftime('%H:%M:%S')} {line}")
            shown = line
        if not queue:
            return
        time.sleep(POLL)


def progress(cell: Cell, queue: dict[str, str]) -> str:
    """What became of a cell so far, in a word."""
    if cell.name in queue:
        return "waiting" if queue[cell.name] in WAITING else "running"
    record = cell.ended()
    return record["status"] if record else "stopped"


def main(config: Config) -> int:
    found = cells(config, list(HydraConfig.get().overrides.task))
    queued = in_queue(config)
    missing = [(o, cell) for o, cell in found if cell.record() is None and cell.name not in queued]
    if missing:
        submit(missing, config)
    if not config.cluster.wait:
        return 0
    follow([cell for _, cell in found], config)
    show(found, config)
    unfinished = [cell for _, cell in found if cell.record() is None]
    for cell in unfinished:
        record = cell.ended()
        note(f"{cell.name}: {record['reason'] if record else 'no record; see its log'}")
    return int(bool(unfinished))


if __name__ == "__main__":
    command(main)
