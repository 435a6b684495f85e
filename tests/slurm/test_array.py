"""Tables and sweeps as arrays of a real SLURM: failures, kills, requeues, preemption, several nodes, multirun."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval.releases import sha256
from experiments.files import write_json
from tests.slurm.conftest import wait_for
from tests.test_cells import lines, without_time

BASE = ("scale=smoke", "tracker=none", "cluster.time=20")
SWEEP = (*BASE, "tasks.benchmarks=[]", "table=sweep", "table.models=[tiny,tiny_wide]", "table.ranks=[1,2]")
LONG = (*BASE, "table=table1", "table.data=[alpaca]", "table.methods=[qdylora]", "budget.steps=120",
        "checkpoint_every=1000", "optim.compute_dtype=float32")  # fmt: skip
NAME = "tiny--alpaca--qdylora--seed0"
CELL = f"outputs/smoke/table1/{NAME}"
WEIGHTS = "adapter/adapter_model.safetensors"


def submit(slurm, folder: Path, *overrides: str):
    return slurm.run(sys.executable, "-m", "slurm.submit", *overrides, cwd=folder)


def started(slurm, folder: Path, *overrides: str, step: int = 20) -> str:
    """Submit one long cell and wait for a step of it; its job."""
    done = submit(slurm, folder, *LONG, "cluster.wait=false", *overrides)
    assert done.returncode == 0, done.stderr
    job = slurm.task(NAME)
    wait_for(lambda: len(log(folder)) >= step, f"step {step}")
    return job


def log(folder: Path) -> list[str]:
    file = folder / CELL / "log.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def states(slurm, job: str) -> str:
    found = slurm.run("scontrol", "show", "job", job).stdout
    return re.search(r"JobState=(\S+)", found)[1]


def restarts(slurm, job: str) -> int:
    return int(re.search(r"Restarts=(\d+)", slurm.run("scontrol", "show", "job", job).stdout)[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, slurm) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = slurm.run(sys.executable, "-m", "experiments.table", *LONG, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / CELL


def assert_ends_as(undisturbed: Path, folder: Path) -> None:
    cell = folder / CELL
    wait_for((cell / "record.json").exists, f"a record; {logs(folder)}")
    assert sha256(cell / WEIGHTS) == sha256(undisturbed / WEIGHTS)
    assert without_time(lines(cell / "log.jsonl")) == without_time(lines(undisturbed / "log.jsonl"))
    ours, theirs = (json.loads((c / "record.json").read_text()) for c in (cell, undisturbed))
    assert ours["status"] == "done" and ours["heldout"] == theirs["heldout"]


def logs(folder: Path) -> str:
    return "\n".join(file.read_text() for file in folder.glob("outputs/slurm/*/*.log"))


def test_a_sweep_over_ranks_and_models_with_a_failing_cell(slurm, tmp_path):
    folder = tmp_path / 'it\'s "here" $(now) 50%'
    folder.mkdir()
    bad = "tiny--alpaca--qlora--r2--seed0"
    write_json(
        folder / f"outputs/smoke/sweep/{bad}/starts.json", {"progress": [[], False, []], "starts": 3}
    )  # as after three kills
    done = submit(slurm, folder, *SWEEP, "cluster.at_once=2")
    assert done.returncode == 1, done.stderr
    assert "submitted 4 cells" in done.stderr and "3 done, 1 failed" in done.stderr
    assert "started 3 times without coming" in done.stderr
    assert "| tiny-wide |" in done.stdout and "failed" in done.stdout and "r = 2" in done.stdout
    found = {name: state for name, state in slurm.jobs().items() if "--r" in name}
    assert {name: state[-1] for name, state in found.items()} == {
        f"{model}--alpaca--qlora--r{rank}--seed0": "FAILED" if (model, rank) == ("tiny", 2) else "COMPLETED"
        for model in ("tiny", "tiny-wide")
        for rank in (1, 2)
    }
    again = submit(slurm, folder, *SWEEP)
    assert again.returncode == 0, again.stderr
    assert "submitted 1 cells" in again.stderr and "failed" not in again.stdout
    assert submit(slurm, folder, *SWEEP).stdout == again.stdout


def test_the_warning_before_the_time_limit(slurm, tmp_path, undisturbed):
    job = started(slurm, tmp_path)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: restarts(slurm, job) == 1, f"a restart; {logs(tmp_path)}")
    assert_ends_as(undisturbed, tmp_path)
    assert "stopped by SIGUSR1" in logs(tmp_path) and "going on from step" in logs(tmp_path)
    wait_for(lambda: states(slurm, job) == "COMPLETED", "the end")


def test_cancelled_and_submitted_again(slurm, tmp_path, undisturbed):
    job = started(slurm, tmp_path)
    slurm.run("scancel", job)
    wait_for(lambda: states(slurm, job) == "CANCELLED", "the end")
    assert restarts(slurm, job) == 0 and not (tmp_path / CELL / "record.json").exists()
    done = submit(slurm, tmp_path, *LONG)
    assert done.returncode == 0, done.stderr
    assert_ends_as(undisturbed, tmp_path)


def test_requeued_by_hand(slurm, tmp_path, undisturbed):
    job = started(slurm, tmp_path)
    slurm.run("scontrol", "requeue", job)
    assert_ends_as(undisturbed, tmp_path)
    assert restarts(slurm, job) == 1


def test_preempted(slurm, tmp_path, undisturbed):
    job = started(slurm, tmp_path, "cluster.partition=low", "cluster.cpus=2")
    urgent = slurm.run(
        "sbatch", "--parsable", "--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 1"
    )
    assert urgent.returncode == 0, urgent.stderr
    assert_ends_as(undisturbed, tmp_path)
    assert restarts(slurm, job) == 1 and states(slurm, urgent.stdout.strip()) == "COMPLETED"


def test_what_is_in_the_queue_is_not_submitted_twice(slurm, tmp_path):
    longer = "budget.steps=500"  # outlasts the start of the second submission
    started(slurm, tmp_path, longer)
    done = submit(slurm, tmp_path, *LONG, longer)
    assert done.returncode == 0, done.stderr
    assert "submitted" not in done.stderr and "1 running" in done.stderr and "1 done" in done.stderr


def test_two_nodes_with_two_processes_each(slurm, tmp_path):
    layout = ("cluster.nodes=2", "cluster.processes=2", "optim.micro_batch=1")
    done = submit(slurm, tmp_path, *LONG, "budget.steps=8", *layout)
    assert done.returncode == 0, done.stderr + logs(tmp_path)
    one = tmp_path / "one"
    one.mkdir()
    alone = slurm.run(
        sys.executable, "-m", "experiments.train", *LONG, "data=alpaca", "budget.steps=8", *layout, cwd=one
    )
    assert alone.returncode == 0, alone.stderr
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / CELL / WEIGHTS) for folder in (tmp_path, one))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 1e-4
    assert [line["ranks"] for line in lines(tmp_path / CELL / "log.jsonl")] == [
        line["ranks"] for line in lines(one / CELL / "log.jsonl")
    ]


def test_every_task_has_a_gpu_of_its_own(slurm, tmp_path):
    overrides = (
        *BASE,
        "tasks.benchmarks=[]",
        "table=sweep",
        "table.models=[tiny]",
        "table.ranks=[1,2]",
        "budget.steps=300",
    )
    done = submit(slurm, tmp_path, *overrides, "cluster.gpus=1", "cluster.wait=false")
    assert done.returncode == 0, done.stderr
    seen: dict[str, str] = {}

    def both() -> bool:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().decode().split("\0")
                environment = dict(v.split("=", 1) for v in (process / "environ").read_text().split("\0") if "=" in v)
            except OSError:
                continue
            if "experiments.run" in command and environment.get("SLURM_CONF") == slurm.environment["SLURM_CONF"]:
                rank = next(part for part in command if part.startswith("ranks.r_max="))
                seen[rank] = environment["SLURMD_NODENAME"] + environment["CUDA_VISIBLE_DEVICES"]
        return len(seen) == 2

    wait_for(both, "two tasks")
    assert len(set(seen.values())) == 2, seen
    slurm.run("scancel", "--me")


def test_a_task_list_cannot_lead_out_of_the_output_folder(slurm, tmp_path):
    done = submit(slurm, tmp_path, *LONG, "budget.steps=2", "cluster.wait=false")
    assert done.returncode == 0, done.stderr
    file = next((tmp_path / "outputs/slurm").glob("*.json"))
    content = json.loads(file.read_text())
    content.pop("checksum")
    content["tasks"][0]["overrides"].append("outputs=/tmp/elsewhere")
    file.write_text(json.dumps(content))
    ran = slurm.run(sys.executable, "-m", "slurm.task", str(file), "0", cwd=tmp_path)
    assert ran.returncode == 2 and "may not name output folders" in ran.stderr
    assert not os.path.exists("/tmp/elsewhere")
    slurm.run("scancel", "--me")


def test_a_value_is_no_shell_command(slurm, tmp_path):
    evil = "x'; touch $(pwd)/injected; `touch injected` #"
    for key in ("cluster.account", "cluster.partition"):
        submit(slurm, tmp_path, *LONG, "budget.steps=2", f"{key}={quoted(evil)}")
    other = ("table.data=[oasst1]", "budget.steps=2")
    done = submit(slurm, tmp_path, *LONG, *other, f"cluster.modules=[{quoted(evil)}]")
    assert done.returncode == 1  # there is no such module
    assert not list(tmp_path.rglob("injected"))


def quoted(text: str) -> str:
    from slurm.tasklist import quoted

    return quoted(text)


@pytest.fixture
def submitit(slurm):
    if subprocess.run([sys.executable, "-c", "import submitit"], capture_output=True).returncode:
        pytest.fail("hydra-submitit-launcher is not installed (make setup)")
    return slurm


MULTIRUN = ("experiments.run", "--multirun", "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=20",
            "table=table1", "scale=smoke", "data=alpaca", "tracker=none", "tasks.benchmarks=[]")  # fmt: skip


def test_hydra_multirun(submitit, tmp_path):
    done = submitit.run(sys.executable, "-m", *MULTIRUN, "method=qlora,qdylora", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("outputs/smoke/table1/*/record.json"))) == 2
    done = submitit.run(sys.executable, "-m", *MULTIRUN, "seed=1", "optim.lr=1e30", cwd=tmp_path)
    assert done.returncode == 1, done.stderr  # a cell that failed is no completed job


def test_a_killed_task_does_not_hang_the_multirun(submitit, tmp_path):
    command = [sys.executable, "-m", *MULTIRUN, "method=qdylora", "budget.steps=3000", "checkpoint_every=1000"]
    driver = subprocess.Popen(
        command, cwd=tmp_path, env=submitit.environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(log(tmp_path)) >= 2, "a step")
    running = [job for *_, state, job in submitit.queue() if state == "RUNNING"]
    assert len(running) == 1, submitit.queue()
    (job,) = running
    submitit.run("scancel", "--signal=KILL", "--full", job)
    _, err = driver.communicate(timeout=180)
    assert driver.returncode == 1, err
