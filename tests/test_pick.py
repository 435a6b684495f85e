"""The smallest rank that is good enough, from records with invented outcomes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from analysis.pick import Distance, pick
from analysis.records import heldout_items, items, read
from analysis.stats import Bootstrap
from tests.commands import inside

GOLDEN = Path(__file__).parent / "golden" / "table2"
GSM8K = GOLDEN / "smollm2-135m--gsm8k--qdylora--seed0"
HOW = Bootstrap(resamples=2000)


@pytest.mark.parametrize("within", ["0", "5", "0.5", "12.5", "1%", "20%", "40%", "99%"])
def test_the_smallest_rank_near_the_best_on_validation_items_by_a_plain_search(within):
    record = read(GSM8K / "record.json")
    scores = record.split("gsm8k", "validation")["ranks"]
    percent = {int(rank): 100 * score["value"] for rank, score in scores.items()}
    best = max(percent.values())
    distance = best * float(within[:-1]) / 100 if within.endswith("%") else float(within)
    want = next(rank for rank in sorted(percent) if percent[rank] >= best - distance - 1e-6)
    assert pick(record, Distance.parse(within), how=HOW).rank == want


def test_by_held_out_loss_lower_is_better():
    record = read(GSM8K / "record.json")
    loss = {int(rank): score["value"] for rank, score in record.raw["heldout"]["ranks"].items()}
    found = {within: pick(record, Distance.parse(within), "heldout", HOW).rank for within in ("0", "0.1", "5%")}
    assert found["0"] == min(loss, key=loss.get)
    assert found["0.1"] == min(rank for rank in loss if loss[rank] <= min(loss.values()) + 0.1)
    assert found["5%"] == min(rank for rank in loss if loss[rank] <= min(loss.values()) * 1.05)


@pytest.mark.parametrize("on", ["gsm8k", "heldout"])
def test_the_interval_is_that_of_differences_paired_by_item(on):
    """Against a bootstrap that draws items one by one."""
    record = read(GSM8K / "record.json")
    found = pick(record, Distance.parse("0"), on, Bootstrap(resamples=10_000))
    frame = heldout_items(record) if on == "heldout" else items(record, on, "validation")
    difference = (frame[2] - frame[found.best]).to_numpy()
    drawn = np.random.default_rng(1).choice(difference, size=(10_000, len(difference))).mean(axis=1)
    estimate = found.behind(2, found.outcomes.choosing)
    assert estimate.value == pytest.approx(difference.mean())
    scale = drawn.std()
    assert (estimate.low, estimate.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.3 * scale)


@pytest.mark.parametrize("how", ["svd", "truncate_alpha_over_b"])
def test_an_adapter_cut_in_another_way_is_picked_by_what_it_scores_so(how, tmp_path):
    qlora = GOLDEN / "smollm2-135m--gsm8k--qlora--seed0"
    scores = json.loads((qlora / "record.json").read_text())["cuts"][how]["tasks"]["gsm8k"]["splits"]["validation"]
    percent = {int(rank): 100 * score["value"] for rank, score in scores["ranks"].items()}
    want = min(rank for rank in percent if percent[rank] >= max(percent.values()) - 10 - 1e-6)
    done = inside("experiments.pick", f"cell={qlora}", "within=10", f"cut={how}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Rank {want} is the ") and f"(GSM8K exact match, %, cut: {how}" in done.stdout


@pytest.fixture
def cell(tmp_path) -> Path:
    """A finished cell whose record knows its adapter's sizes."""
    folder = tmp_path / GSM8K.name
    shutil.copytree(GSM8K, folder)
    record = json.loads((folder / "record.json").read_text())
    record.pop("checksum", None)
    record["adapter_bytes"] = {"1": 2**20, "8": 8 * 2**20}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def test_the_command_says_which_rank_and_why_and_what_it_saves(cell, tmp_path):
    done = inside("experiments.pick", f"cell={cell}", "within=20%", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said, table = done.stdout.split("\n\n", 1)
    assert said.startswith("Rank 4 is the smallest of 1, 2, 4, 8, 16, 32, 64 on the 24 validation items")
    assert re.search(
        r"within 20% of the best, 66\.7 at rank 8; paired by item it is -12\.5 \[-\d+\.\d, \+\d+\.\d\]", said
    )
    assert said.endswith("Its adapter takes 4 MiB, at rank 64 it is 64: 94% saved.")
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if re.match(r"\| \d", line)}
    assert len(rows) == 7 and "picked" in rows["4"] and "best" in rows["8"] and "-12.5 [" in rows["4"]
    assert "54.2 [" in rows["4"] and "4.00" in rows["4"]


BAD = {
    "no distance": ("within is 'near'; give a share", ["within=near"]),
    "a negative distance": ("within is '-1%'", ["within=-1%"]),
    "an unknown measure": ("on is 'mmlu', which .* was not scored on; choose one of gsm8k, heldout", ["on=mmlu"]),
    "an unknown cut": ("pick.cut is 'qr'; choose one of truncate", ["cut=qr"]),
    "a cut that was not scored": (
        "pick.cut is 'svd', in which .* was not scored; choose one of truncate$",
        ["cut=svd"],
    ),
    "a described and a named cell": ("leave out data=gsm8k", ["data=gsm8k"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(name, cell, tmp_path):
    says, overrides = BAD[name]
    done = inside("experiments.pick", f"cell={cell}", *overrides, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and re.search(says, done.stderr), done.stderr


@pytest.mark.parametrize("how", [["cell=nowhere"], ["data=gsm8k", "table=table2"]])
def test_a_cell_without_a_record_is_refused(how, tmp_path):
    done = inside("experiments.pick", *how, cwd=tmp_path)
    assert done.returncode == 2 and "has no record.json" in done.stderr and "run experiments.run first" in done.stderr
