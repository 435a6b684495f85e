"""Weights & Biases offline: what a run's file holds, also after kill -9; and the dashboard against real series."""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from eval.benchmarks import BENCHMARKS
from tests.commands import inside, start
from tests.wandb_file import OfflineRun, read_run
from tests.wandb_server import wandb_server

STEPS = 8
OVERRIDES = ("table=table1", "scale=smoke", "data=alpaca", "method=qlora", f"budget.steps={STEPS}",
             "checkpoint_every=3", "tracker.heldout_every=2", "tracker.heldout_items=2", "ranks.eval=[1,8]",
             "ranks.cuts=[svd]", "tasks.limit.test=4", "tasks.limit.validation=4")  # fmt: skip
CELL = "outputs/smoke/table1/tiny--alpaca--qlora--seed0"
KEY = "k" * 40


@dataclass
class Tracked:
    """A cell that was killed in training and brought to its end. killed: its W&B run's file as the kill left it."""

    folder: Path
    killed: Path
    ended: OfflineRun

    @property
    def record(self) -> dict:
        return json.loads((self.folder / CELL / "record.json").read_text())

    @property
    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / CELL / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Tracked:
    folder = tmp_path_factory.mktemp("tracked")
    process = start("experiments.run", *OVERRIDES, cwd=folder)
    log = folder / CELL / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 5:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = only_file(folder)
    done = inside("experiments.run", *OVERRIDES, cwd=folder)
    assert done.returncode == 0 and "going on from step" in done.stderr, done.stderr
    assert "W&B" not in done.stderr
    return Tracked(folder, killed, only_run(folder))


def only_file(folder: Path) -> Path:
    (file,) = (folder / CELL).glob("wandb/offline-run-*/run-*.wandb")
    return file


def only_run(folder: Path) -> OfflineRun:
    found = read_run(only_file(folder))
    assert found.ended, f"{only_file(folder)}: {only_file(folder).stat().st_size} bytes, {len(found.history)} steps"
    return found


def column(found: OfflineRun, key: str) -> list[tuple]:
    """(step, value) of a series."""
    return [(row["_step"], row[key]) for row in found.history if key in row]


def test_a_restarted_cell_continues_its_run_without_repeated_steps(tracked):
    assert tracked.killed.name == f"run-{tracked.ended.run.run_id}.wandb" and not tracked.killed.exists()
    steps = [row["_step"] for row in tracked.ended.history]
    assert steps == sorted(set(steps))
    assert column(tracked.ended, "train/loss") == [(line["step"], line["loss"]) for line in tracked.log]
    assert len(tracked.log) == STEPS


def test_every_series_of_training_is_the_logs(tracked):
    for key in ("lr", "grad_norm", "tokens_per_second"):
        assert column(tracked.ended, f"train/{key}") == [(line["step"], line[key]) for line in tracked.log]
    assert column(tracked.ended, "train/rank") == [(step, 64) for step in range(1, STEPS + 1)]
    memory = [line["peak_memory_bytes"] / 2**30 for line in tracked.log]
    assert [value for _, value in column(tracked.ended, "train/peak_memory_gib")] == memory and min(memory) > 0.1
    for rank in ("1", "8"):
        expected = [(line["step"], line["heldout"][rank]) for line in tracked.log if line["heldout"]]
        assert column(tracked.ended, f"heldout_loss/rank_{rank}") == expected
        assert [step for step, _ in expected] == [2, 4, 6, 8]


def test_heldout_loss_of_all_ranks_is_one_chart(tracked):
    assert tracked.ended.charts == {"heldout_loss_over_steps"}
    rows = table(tracked, "heldout_loss_over_steps_table")["data"]
    expected = {
        (line["step"], f"rank {rank}", loss) for line in tracked.log for rank, loss in (line["heldout"] or {}).items()
    }
    assert {tuple(row) for row in rows} == expected and len(rows) == 8


def table(tracked: Tracked, key: str) -> dict:
    (folder,) = (tracked.folder / CELL).glob("wandb/offline-run-*/files")
    return json.loads((folder / tracked.ended.summary[key]["path"]).read_text())


def test_scores_are_drawn_over_the_rank_and_listed_in_a_table(tracked):
    assert tracked.ended.axes == {"score/*": "score/rank"}
    test = tracked.record["tasks"]["mmlu"]["splits"]["test"]["ranks"]
    svd = tracked.record["cuts"]["svd"]["heldout"]["ranks"]
    curves = [row for row in tracked.ended.history if "score/rank" in row]
    assert [row["score/rank"] for row in curves] == [1, 8]
    assert [row["score/mmlu_test"] for row in curves] == [test["1"]["value"], test["8"]["value"]]
    assert [row["score/svd_heldout_loss"] for row in curves] == [svd["1"]["value"], svd["8"]["value"]]
    listed = table(tracked, "scores")
    assert listed["columns"] == ["name", "rank", "value", "standard_error", "n"]
    assert ["svd_heldout_loss", 8, svd["8"]["value"], svd["8"]["stderr"], 8] in listed["data"]
    names = {f"{cut}{name}" for cut in ("", "svd_") for name in ("heldout_loss", "mmlu_test", "mmlu_validation")}
    assert {row[0] for row in listed["data"]} == names and len(listed["data"]) == 2 * len(names)


def test_updates_are_a_histogram_over_rows(tracked):
    (row,) = [row["updates_of_rows"] for row in tracked.ended.history if "updates_of_rows" in row]
    assert row["_type"] == "histogram"
    assert row["values"] == tracked.record["updates"] == [STEPS * 4] * 64
    assert (row["bins"][0], row["bins"][-1]) == (0.5, 64.5)


def test_the_record_is_an_artifact(tracked):
    (artifact,) = [one for one in tracked.ended.artifacts if one.type == "record"]
    (content,) = artifact.manifest.contents
    assert content.path == "record.json"
    assert json.loads(Path(content.local_path).read_text()) == tracked.record
    assert tracked.ended.summary["status"] == "done"


def test_runs_are_named_grouped_and_tagged(tracked):
    found = tracked.ended.run
    assert found.display_name == "tiny--alpaca--qlora--seed0"
    assert (found.run_group, found.job_type) == ("smoke/table1", "tiny--alpaca--qlora")
    assert list(found.tags) == ["smoke", "table1", "tiny", "alpaca", "qlora", "seed0"]
    assert found.project == "qdylora"


def test_a_cell_that_ended_untracked_is_sent_by_one_command(tracked, tmp_path):
    shutil.copytree(tracked.folder / CELL, tmp_path / CELL, ignore=shutil.ignore_patterns("wandb", "tracker.json"))
    done = inside("experiments.tracker", *OVERRIDES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = only_run(tmp_path)
    assert again.run.run_id != tracked.ended.run.run_id
    measured = [{k: v for k, v in row.items() if k.startswith(("train/", "score/"))} for row in again.history]
    assert measured == [
        {k: v for k, v in row.items() if k.startswith(("train/", "score/"))} for row in tracked.ended.history
    ]


def test_what_cannot_be_sent_is_said_in_one_sentence(tracked):
    done = inside("experiments.tracker", *OVERRIDES, "tracker=none", cwd=tracked.folder)
    assert done.returncode == 2 and "choose tracker=wandb_offline or tracker=wandb_online" in done.stderr
    done = inside("experiments.tracker", *OVERRIDES, "seed=1", cwd=tracked.folder)
    assert done.returncode == 2 and "seed1 has not ended" in done.stderr


def test_the_dashboard_is_saved_once_and_shows_series_that_a_run_has(tracked, monkeypatch):
    with wandb_server() as (address, views):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        for _ in range(2):
            done = inside("experiments.dashboard", "ranks.eval=[1,8]", cwd=tracked.folder)
            assert done.returncode == 0, done.stderr
    (view,) = views.values()
    assert (view["entity"], view["project"]) == ("someone", "qdylora")
    assert done.stdout == f"{address}/someone/qdylora?nw=qdylora\n"
    section = json.loads(view["spec"])["section"]
    configs = [panel["config"] for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    had = {key for row in tracked.ended.history for key in row}
    shown = {key for config in configs for key in (config["xAxis"], *config["metrics"])}
    assert {as_mmlu(key) for key in shown} <= had
    own = {key for key in had if key.startswith(("train/", "heldout_loss/", "score/")) and "svd" not in key}
    assert own - shown == {"train/lr", "train/grad_norm"}
    assert ["heldout_loss/rank_1", "heldout_loss/rank_8"] in [config["metrics"] for config in configs]
    assert [key["name"] for key in section["runSets"][0]["grouping"]] == ["group", "jobType"]


def as_mmlu(key: str) -> str:
    """A series of any benchmark as the one of the benchmark that the cell ran."""
    for name in BENCHMARKS:
        key = key.replace(f"score/{name}_", "score/mmlu_")
    return key


def test_a_dashboard_without_a_login_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    done = inside("experiments.dashboard", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: W&B: "), done.stderr
