"""Cells and tables through the commands a user types: resume, restart, change, failure."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from eval.releases import sha256
from tests import commands
from tests.commands import inside, start

SMOKE = ("table=table1", "scale=smoke")
TRAIN = (*SMOKE, "budget.steps=20", "checkpoint_every=10", "optim.compute_dtype=float32", "tracker=none")
CELL = "outputs/smoke/table1/tiny--alpaca--qdylora--seed0"
SECRET = "this-key-must-not-be-written-anywhere"


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def kill_at(step: int, cwd: Path, *overrides: str) -> None:
    """Start training and kill -9 it when `step` steps are logged."""
    process = start("experiments.train", *overrides, cwd=cwd)
    while len(lines_so_far(cwd)) < step:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def lines_so_far(cwd: Path) -> list[str]:
    log = cwd / CELL / "log.jsonl"
    return log.read_text().splitlines() if log.exists() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A cell trained for 20 steps without a break."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = inside("experiments.train", *TRAIN, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / CELL


def without_time(log: list[dict]) -> list[dict]:
    measured = ("seconds", "tokens_per_second", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in measured} for line in log]


@pytest.mark.parametrize("damage", ["none", "checkpoint", "log"])
def test_killed_training_goes_on_and_ends_bit_for_bit_the_same(undisturbed, tmp_path, damage):
    kill_at(14, tmp_path, *TRAIN, *(["checkpoint_every=5"] if damage == "checkpoint" else []))
    cell = tmp_path / CELL
    if damage == "checkpoint":  # one bit of the newest: the one before it serves
        weights = cell / "checkpoints/checkpoint-10/adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-100] ^= 1
        weights.write_bytes(content)
    if damage == "log":  # killed in the middle of a line
        log = cell / "log.jsonl"
        log.write_text("\n".join(log.read_text().splitlines()[:12]) + '\n{"step": 13, "lo')
    done = inside("experiments.train", *TRAIN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {5 if damage == 'checkpoint' else 10}" in done.stderr
    assert ("damaged" in done.stderr) == (damage == "checkpoint")
    weights = "adapter/adapter_model.safetensors"
    assert sha256(cell / weights) == sha256(undisturbed / weights)
    assert without_time(lines(cell / "log.jsonl")) == without_time(lines(undisturbed / "log.jsonl"))
    assert not (cell / "checkpoints").exists()


def test_what_training_spent_and_did_is_recorded(undisturbed):
    training = json.loads((undisturbed / "training.json").read_text())
    log = lines(undisturbed / "log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 21))
    spent = training["budget"]["spent"]
    assert (spent["steps"], spent["examples"]) == (20, 80)
    assert spent["tokens"] == sum(line["tokens"] for line in log)
    drawn = [rank for line in log for rank in line["ranks"]]
    assert training["updates"] == [sum(rank >= b for rank in drawn) for b in range(1, 65)]
    assert training["expected_updates"] == pytest.approx([80 * (65 - b) / 64 for b in range(1, 65)], abs=1e-3)
    weights = load_file(undisturbed / "adapter/adapter_model.safetensors").values()
    at_64 = sum(weight.numel() * weight.element_size() for weight in weights)
    assert training["adapter_bytes"] == {str(b): at_64 * b // 64 for b in (1, 2, 4, 8, 16, 32, 64)}
    assert training["compute_dtype"] == "float32"
    data = training["data"]
    assert data["sha256"] and data["truncated"] >= 0


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Table 1 at scale smoke with one data set, made by the command, with secrets in the environment."""
    folder = tmp_path_factory.mktemp("table")
    secrets = {"HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "ENVIRONMENT", commands.ENVIRONMENT | secrets)
        done = inside("experiments.table", *SMOKE, "table.data=[alpaca]", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "[2/2]" in done.stderr
    (folder / "printed.md").write_text(done.stdout)
    return folder


def records(folder: Path) -> dict[Path, int]:
    return {f: f.stat().st_mtime_ns for f in folder.glob("outputs/smoke/table1/*/record.json")}


def test_the_table_is_printed_and_written(table):
    printed = (table / "printed.md").read_text()
    assert "qlora" in printed.lower() and "alpaca" in printed.lower()
    written = table / "outputs/smoke/table1"
    assert (written / "table1.md").read_text().strip() == printed.strip()
    assert r"\begin{tabular}" in (written / "table1.tex").read_text()
    assert (written / "table1.csv").read_text().count("\n") > 2


def test_a_second_call_runs_nothing_and_prints_the_same_table(table):
    before = records(table)
    done = inside("experiments.table", *SMOKE, "table.data=[alpaca]", cwd=table)
    assert done.returncode == 0 and "[1/" not in done.stderr
    assert done.stdout == (table / "printed.md").read_text()
    assert records(table) == before and len(before) == 2


def test_records_hold_what_a_reader_needs_to_trust_them(table):
    for file in records(table):
        record = json.loads(file.read_text())
        assert record["status"] == "done"
        assert set(record["heldout"]["ranks"]) == set(record["tasks"]["mmlu"]["splits"]["test"]["ranks"])
        assert record["versions"]["torch"] and record["machine"]["cpu"] and record["commit"]
        for split in record["tasks"]["mmlu"]["splits"].values():
            assert split["sha256"] and (file.parent / split["items"]).is_file()


def test_methods_see_the_same_examples_in_the_same_order(table):
    tokens = [
        [line["tokens"] for line in lines(folder / "log.jsonl")]
        for folder in sorted((table / "outputs/smoke/table1").glob("tiny--*"))
    ]
    assert len(tokens) == 2 and tokens[0] == tokens[1]


def test_no_key_from_the_environment_is_in_any_file(table):
    files = [f for f in table.rglob("*") if f.is_file()]
    assert len(files) > 20
    assert not [f for f in files if SECRET.encode() in f.read_bytes()]


def test_wandb_writes_an_offline_run_into_the_cell(table):
    for file in records(table):
        assert list(file.parent.glob("wandb/offline-run-*/run-*.wandb"))


def test_a_changed_configuration_is_named_and_the_old_work_put_aside(table):
    overrides = (*SMOKE, "data=alpaca", "method=qlora", "tracker=none", "optim.lr=1e-3", "tasks.benchmarks=[]")
    done = inside("experiments.run", *overrides, cwd=table)
    assert done.returncode == 0, done.stderr
    assert "optim.lr" in done.stderr and "put aside" in done.stderr
    kept = list((table / "outputs/smoke/table1").glob("tiny--alpaca--qlora--seed0~*/record.json"))
    assert len(kept) == 1


def test_a_tracker_that_fails_stops_nothing(tmp_path):
    done = inside("experiments.train", *SMOKE, "tracker.wandb=online", cwd=tmp_path)  # no account, no network
    assert done.returncode == 0, done.stderr
    assert "the cell goes on without it" in done.stderr
    assert len(lines_so_far(tmp_path)) == 4


def test_a_failed_cell_says_why_and_is_run_again(tmp_path):
    model = tmp_path / "model"
    run_tiny_model_into(model)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    overrides = (*SMOKE, f"model.id={model}", "model.random=null", "tracker=none", "tasks.benchmarks=[]")
    done = inside("experiments.run", *overrides, cwd=tmp_path)
    assert done.returncode == 1
    record = json.loads((tmp_path / CELL / "record.json").read_text())
    assert record["status"] == "failed" and record["reason"]
    weights.write_bytes(whole)
    done = inside("experiments.run", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / CELL / "record.json").read_text())["status"] == "done"


def run_tiny_model_into(folder: Path) -> None:
    import torch

    from qdylora import load_base, load_tokenizer
    from tests.tiny import LLAMA

    load_base("random", 32, torch.float32, cache=folder.parent, random_config=LLAMA).save_pretrained(folder)
    load_tokenizer("random", cache=folder.parent, random_config=LLAMA).save_pretrained(folder)
