"""One cell, one process; signals, kills, full disks, memory and numbers that run out: what is left and what is said."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import attempt
from experiments.files import Damaged, checksum, disk_is_full, flaws, read_json, seal, write_json
from tests.commands import ENVIRONMENT, REPOSITORY, inside, run, start
from tests.test_cells import CELL, TRAIN, kill_at, lines, without_time

SCORED = ("table=table1", "scale=smoke", "data=alpaca", "tracker=none")  # a table needs its benchmark
SMOKE = (*SCORED, "tasks.benchmarks=[]")
CELLS = "outputs/smoke/table1"


def record(folder: Path) -> dict:
    return json.loads((folder / CELL / "record.json").read_text())


def wait_for(condition, process: subprocess.Popen, what: str) -> None:
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    pytest.fail(f"{what} has not come")


# files


def test_a_json_file_comes_back_as_it_was_and_any_changed_bit_is_noticed(tmp_path):
    content = {"a": [1, 2.5, None], "b": {"1": "é"}}
    file = tmp_path / "x.json"
    write_json(file, content)
    assert read_json(file) == content and read_json(tmp_path / "none.json") is None
    assert [f.name for f in tmp_path.iterdir()] == ["x.json"]
    whole = file.read_bytes()
    noticed = 0
    for i in range(len(whole)):
        changed = bytearray(whole)
        changed[i] ^= 4
        file.write_bytes(changed)
        try:
            found = read_json(file)
        except Damaged:
            noticed += 1
        else:  # only the name of the checksum, or white space, was hit
            assert {key: found[key] for key in content} == content
    assert noticed > 0.8 * len(whole)


def test_keys_that_are_numbers_have_a_checksum_too(tmp_path):
    write_json(tmp_path / "x.json", {2: "b", 10: "a"})
    assert read_json(tmp_path / "x.json") == {"2": "b", "10": "a"}
    assert checksum({"a": 1, "b": 2}) == checksum({"b": 2, "a": 1}) != checksum({"a": 1, "b": 3})


def test_a_sealed_folder_names_what_is_broken(tmp_path):
    (tmp_path / "weights").write_bytes(b"12345")
    assert flaws(tmp_path) == ["checksums.json"]
    seal(tmp_path)
    assert flaws(tmp_path) == []
    (tmp_path / "weights").write_bytes(b"12346")
    assert flaws(tmp_path) == ["weights"]
    (tmp_path / "weights").unlink()
    assert flaws(tmp_path) == ["weights"]


def test_a_full_disk_is_known_by_what_each_library_says_of_it():
    assert disk_is_full(OSError(errno.ENOSPC, "No space left on device"))
    assert disk_is_full(OSError(errno.EDQUOT, "quota"))
    assert disk_is_full(
        RuntimeError("[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file")
    )
    wrapped = ValueError("x")
    wrapped.__cause__ = OSError(errno.ENOSPC, "full")
    assert disk_is_full(wrapped)
    assert not disk_is_full(OSError(errno.EIO, "input/output error")) and not disk_is_full(ValueError("x"))


# one process a cell

HOLDER = """
import sys, time
from experiments import attempt
from tests.test_attempt import cell_in
attempt.LEASE = float(sys.argv[2])
with attempt.alone(cell_in(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def cell_in(outputs: str):
    from hydra import compose, initialize_config_dir

    from experiments.cell import Cell
    from experiments.config import CONF, resolved

    with initialize_config_dir(CONF, version_base="1.3"):
        return Cell(resolved(compose("config", overrides=[*SMOKE, f"outputs={outputs}", "when_busy=leave"])))


def hold(outputs: Path, lease: float, seconds: float, *prefix: str) -> subprocess.Popen:
    """A process that holds the smoke cell in `outputs`."""
    holder = subprocess.Popen(
        [*prefix, sys.executable, "-c", HOLDER, str(outputs), str(lease), str(seconds)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_held_cell_is_left_alone_and_free_when_its_holder_is_killed(tmp_path):
    holder = hold(tmp_path, attempt.LEASE, 60)
    cell = cell_in(str(tmp_path))
    try:
        with pytest.raises(attempt.Busy, match=f"is being run by process {holder.pid}"), attempt.alone(cell):
            pass
    finally:
        holder.kill()
        holder.wait()
    started = time.monotonic()
    with attempt.alone(cell):
        assert time.monotonic() - started < 5  # not the lease: this machine knows that the process is gone


@pytest.mark.skipif(os.geteuid() != 0, reason="another host name needs root")
def test_a_holder_on_another_machine_is_given_up_when_it_shows_no_life(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt, "LEASE", 3.0)
    elsewhere = ("unshare", "--uts", "sh", "-c", 'hostname elsewhere; exec "$@"', "-")
    holder = hold(tmp_path, 3.0, 60, *elsewhere)
    cell = cell_in(str(tmp_path))
    cell.config.when_busy = "wait"
    lock = next(tmp_path.glob("*/*/.*.lock"))
    try:
        time.sleep(4)  # alive: its heartbeat keeps the cell, even if its clock is behind
        os.utime(lock, (0, 0))
        lease = attempt.claim(cell)
        with pytest.raises(TimeoutError):
            lease.acquire(timeout=4)
    finally:
        holder.kill()
        holder.wait()
    started = time.monotonic()
    with attempt.alone(cell):
        assert 1.5 < time.monotonic() - started < 15


def test_two_sweeps_side_by_side_run_every_cell_once(tmp_path):
    overrides = (*SCORED, "table.data=[alpaca,oasst1]", "table.methods=[qdylora]")
    sweeps = [start("experiments.table", *overrides, cwd=tmp_path) for _ in range(2)]
    ended = [sweep.communicate(timeout=600) for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], ended
    assert ended[0][0] == ended[1][0] and "Alpaca" in ended[0][0]
    records = sorted(tmp_path.glob(f"{CELLS}/*/record.json"))
    assert len(records) == 2
    for file in records:  # a step that was done twice would be logged twice
        assert [line["step"] for line in lines(file.parent / "log.jsonl")] == [1, 2, 3, 4]
    assert not list(tmp_path.glob(f"{CELLS}/.*.lock"))


# signals and starts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = inside("experiments.train", *TRAIN, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / CELL


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_the_step_and_asks_for_a_restart(undisturbed, tmp_path, name):
    process = start("experiments.train", *TRAIN, "checkpoint_every=1000", cwd=tmp_path)
    log = tmp_path / CELL / "log.jsonl"
    wait_for(lambda: log.exists() and len(lines(log)) >= 7, process, "step 7")
    process.send_signal(signal.Signals[name])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert f"stopped by {name}" in err and "Traceback" not in err
    saved = max(int(f.name.split("-")[1]) for f in (tmp_path / CELL / "checkpoints").iterdir())
    assert saved >= 7 and saved == len(lines(log))
    done = inside("experiments.train", *TRAIN, "checkpoint_every=1000", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {saved}" in done.stderr
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / CELL / weights).read_bytes() == (undisturbed / weights).read_bytes()
    assert without_time(lines(log)) == without_time(lines(undisturbed / "log.jsonl"))


def test_three_starts_without_progress_are_enough(tmp_path):
    overrides = (*TRAIN, "checkpoint_every=1000", "budget.steps=1000")
    for _ in range(3):
        (tmp_path / CELL / "log.jsonl").unlink(missing_ok=True)
        kill_at(2, tmp_path, *overrides)
    done = inside("experiments.train", *overrides, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert record(tmp_path)["status"] == "failed"
    assert "started 3 times without coming at all" in record(tmp_path)["reason"]
    assert "checkpoint_every" in record(tmp_path)["reason"]


def test_a_loss_that_is_no_number_ends_the_cell_and_keeps_the_last_good_checkpoint(tmp_path):
    done = inside("experiments.run", *TRAIN, "checkpoint_every=1", "optim.lr=1e30", "optim.schedule=constant",
                  "optim.warmup_ratio=0", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    found = record(tmp_path)
    step = len(lines(tmp_path / CELL / "log.jsonl"))
    rank = lines(tmp_path / CELL / "log.jsonl")[-1]["ranks"][0]
    assert found["status"] == "failed"
    assert f"in step {step} at rank {rank}" in found["reason"] and re.search("is (nan|inf)", found["reason"])
    assert (tmp_path / CELL / f"checkpoints/checkpoint-{step - 1}/checksums.json").exists()
    assert not (tmp_path / CELL / f"checkpoints/checkpoint-{step}").exists()


def test_memory_that_runs_out_is_a_result(tmp_path):
    huge = "model.random.intermediate_size=300000000"
    limited = [sys.executable, "-c", LIMITED, *SMOKE, huge, "model.name=huge"]
    done = subprocess.run(limited, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(tmp_path.glob(f"{CELLS}/huge--*/record.json")).read_text())
    assert (found["status"], found["oom"]) == ("oom", "met")
    assert found["peak_memory_bytes"] > 10**8 and "memory" in found["reason"]
    assert found["forecast"]["base_4bit"] > 2 * 3 * 64 * 300_000_000 // 2 // 2  # two layers of three such matrices


LIMITED = """
import resource, sys
import experiments.run as run
from experiments.cli import command
resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
command(run.main)
"""


def test_the_clock_may_go_back(tmp_path, undisturbed):
    kill_at(14, tmp_path, *TRAIN, "checkpoint_every=5")
    checkpoints = tmp_path / CELL / "checkpoints"
    newest = max(checkpoints.iterdir(), key=lambda f: int(f.name.split("-")[1]))
    for old in checkpoints.iterdir():
        if old != newest:
            os.utime(old, (2**32, 2**32))  # written in the future
    done = inside("experiments.train", *TRAIN, "checkpoint_every=5", cwd=tmp_path)
    assert done.returncode == 0 and f"going on from step {newest.name.split('-')[1]}" in done.stderr, done.stderr
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / CELL / weights).read_bytes() == (undisturbed / weights).read_bytes()


# tables


def test_a_table_with_a_failed_cell_is_printed_and_the_exit_code_tells(tmp_path):
    killed = {"progress": [[], False, []], "starts": 3}
    write_json(tmp_path / CELLS / "tiny--alpaca--qlora--seed0/starts.json", killed)
    done = run("experiments.table", *SCORED, "table.data=[alpaca]", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "failed" in done.stdout and "QDyLoRA" in done.stdout
    assert "tiny--alpaca--qlora--seed0 failed: started 3 times" in done.stderr
    again = inside("experiments.table", *SCORED, "table.data=[alpaca]", cwd=tmp_path)
    assert again.returncode == 0 and "[1/1]" in again.stderr and "failed" not in again.stdout, again.stderr


# disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB; skipped where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(small_disk, undisturbed):
    data = small_disk.parent / "data"
    own = (*TRAIN, "checkpoint_every=5", f"root={data}")
    done = inside("experiments.train", *own, "budget.steps=1", f"outputs={small_disk}/first", cwd=small_disk)
    assert done.returncode == 0, done.stderr  # so that what is read in is there
    process = start("experiments.train", *own, cwd=small_disk)
    cell = small_disk / CELL
    wait_for(lambda: (cell / "checkpoints/checkpoint-5/checksums.json").exists(), process, "a checkpoint")
    process.send_signal(signal.SIGSTOP)
    fill(small_disk)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "Traceback" not in err and "free some space and run the same command again" in err
    assert not flaws(cell / "checkpoints/checkpoint-5")
    (small_disk / "filler").unlink()
    done = inside("experiments.train", *own, cwd=small_disk)
    assert done.returncode == 0 and "going on from step" in done.stderr, done.stderr
    weights = "adapter/adapter_model.safetensors"
    assert (cell / weights).read_bytes() == (undisturbed / weights).read_bytes()


def test_a_disk_that_is_full_when_the_record_is_written(small_disk, monkeypatch):
    from experiments.cell import Cell

    finish, data = Cell.finish, small_disk.parent / "data"

    def on_a_full_disk(self, *arguments, **results):
        fill(small_disk)
        return finish(self, *arguments, **results)

    monkeypatch.setattr(Cell, "finish", on_a_full_disk)
    done = inside("experiments.run", *SMOKE, f"root={data}", cwd=small_disk)
    assert done.returncode == 1 and "free some space" in done.stderr, done.stderr
    assert not (small_disk / CELL / "record.json").exists()
    assert not list((small_disk / CELL).glob(".record*"))
    (small_disk / "filler").unlink()
    monkeypatch.undo()
    done = inside("experiments.run", *SMOKE, f"root={data}", cwd=small_disk)
    assert done.returncode == 0 and record(small_disk)["status"] == "done"


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 65536)
        except OSError as error:
            assert error.errno == errno.ENOSPC


def test_an_output_folder_that_cannot_be_written(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = inside("experiments.run", *SMOKE, f"outputs={small_disk}", f"root={REPOSITORY / 'nowhere'}", cwd=small_disk)
    assert done.returncode == 2, done.stderr
    assert "Read-only file system" in done.stderr and "outputs=FOLDER" in done.stderr and "Traceback" not in done.stderr
