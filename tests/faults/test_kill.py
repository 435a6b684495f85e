"""kill -9 at random moments of a cell, then the same command again: the result is that of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.releases import sha256
from tests.commands import ENVIRONMENT
from tests.test_cells import CELL, lines, without_time

OVERRIDES = ("table=table1", "scale=smoke", "tracker=none", "data=alpaca", "budget.steps=20", "checkpoint_every=3",
             "optim.compute_dtype=float32")  # fmt: skip
MOMENTS = int(os.environ.get("MOMENTS", 20))
#: What is on the disk only while it is being written; a kill then is aimed at, the others come at random times.
DRAFTS = ("checkpoints/checkpoint-6", ".adapter", "parts/.heldout.json.*", "items/mmlu-test.jsonl.draft",
          ".training.json.*", ".record.json.*")  # fmt: skip

# Forks once per start, so that only the first one takes the seconds of the imports.
STARTER = """
import os, sys
import experiments.run
from experiments.cli import command, quiet
quiet()
for line in sys.stdin:
    folder, *overrides = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.argv = ["experiments.run", *overrides]
        sys.stderr = open("stderr", "a", buffering=1)
        command(experiments.run.main)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Starter:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def start(self, folder: Path) -> int:
        """The process id of the command, just started in `folder`."""
        self.process.stdin.write("\t".join([str(folder), *OVERRIDES]) + "\n")
        return int(self._answer())

    def exit_code(self) -> int:
        return int(self._answer())

    def _answer(self) -> str:
        while True:
            line = self.process.stdout.readline()
            assert line, "the starter has ended"
            if line.strip().lstrip("-").isdigit():
                return line


@pytest.fixture(scope="module")
def starter():
    made = Starter()
    yield made
    made.process.stdin.close()
    made.process.wait()


@pytest.fixture(scope="module")
def undisturbed(starter, tmp_path_factory) -> tuple[Path, float]:
    """An undisturbed run's folder, and the seconds that it takes with its inputs in place."""
    first = tmp_path_factory.mktemp("first")
    starter.start(first)
    assert starter.exit_code() == 0, (first / "stderr").read_text()
    folder = with_inputs_of(first, tmp_path_factory.mktemp("undisturbed"))
    started = time.monotonic()
    starter.start(folder)
    assert starter.exit_code() == 0, (folder / "stderr").read_text()
    return folder, time.monotonic() - started


def with_inputs_of(other: Path, folder: Path) -> Path:
    for name in ("cache", "data"):
        shutil.copytree(other / "outputs" / name, folder / "outputs" / name)
    return folder


def results(folder: Path) -> dict:
    cell = folder / CELL
    record = json.loads((cell / "record.json").read_text())
    log = without_time(lines(cell / "log.jsonl"))
    return {
        "adapter": sha256(cell / "adapter/adapter_model.safetensors"),
        "items": {file.name: sha256(file) for file in sorted((cell / "items").glob("*"))},
        "log": log,
        "updates": record["updates"],
        **{key: record[key] for key in ("status", "heldout", "tasks", "data")},
    }


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_killed_at_any_moment(moment, starter, undisturbed, tmp_path):
    reference, seconds = undisturbed
    folder = with_inputs_of(reference, tmp_path)
    process = starter.start(folder)
    if moment < len(DRAFTS):
        pattern = DRAFTS[moment]
        while not any((folder / CELL).glob(pattern)) and not (folder / CELL / "record.json").exists():
            pass
    else:
        time.sleep(random.Random(moment).uniform(0, seconds))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    code = starter.exit_code()
    assert code in (-signal.SIGKILL, 0)
    left = sorted(str(f.relative_to(folder / CELL)) for f in (folder / CELL).rglob("*") if f.is_file())
    print(f"killed: {code != 0}; left {left}")
    starter.start(folder)
    assert starter.exit_code() == 0, (folder / "stderr").read_text()
    assert results(folder) == results(reference)
    assert not list((folder / CELL).rglob(".*.json.*"))
    assert not (folder / CELL / "checkpoints").exists()
