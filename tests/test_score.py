"""Scoring through lm-eval: what every rank is asked, and what a record holds for each way of cutting an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import LLAMA, adapted

from analysis.records import load as load_records
from eval.benchmarks import Settings, load
from eval.engine import AllRanks
from eval.lm import RankedLM
from eval.score import answer, score
from experiments.data.sources import release_root
from qdylora import load_tokenizer
from tests.commands import inside

CELL = "outputs/smoke/table2/tiny--webglm--qlora--seed0"
SMOKE = ("table=table2", "scale=smoke", "data=webglm", "method=qlora", "tracker=none", "ranks.eval=[1,8,64]")


@pytest.mark.parametrize("name, few_shot", [("gsm8k", 2), ("triviaqa", 2), ("webglm", 0)])
def test_every_rank_is_asked_the_same_and_each_question_is_computed_once(name, few_shot, generated_root, tmp_path):
    root = release_root("generated", generated_root, seed=0)
    task = load(name, "test", Settings(few_shot, root, limit=2))
    engine = AllRanks(adapted("llama", 32, tmp_path), [1, 8], progress=False)
    lm = RankedLM(engine, load_tokenizer("random", cache=tmp_path, random_config=LLAMA))
    answer(lm, [task])
    asked = set(lm._answers)
    result = score(lm, task, tmp_path / "items.jsonl.gz")
    assert set(lm._answers) == asked and len(asked) == result["n"] == 2
    if name == "webglm":
        assert all(score["stderr"] is None for score in result["ranks"].values())


@pytest.fixture(scope="module")
def cell(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cell")
    done = inside("experiments.run", *SMOKE, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / CELL


def test_a_static_adapter_is_scored_in_every_way_it_can_be_cut(cell):
    record = json.loads((cell / "record.json").read_text())
    assert list(record["cuts"]) == ["truncate_alpha_over_b", "svd"]
    whole = record["heldout"]["ranks"]["64"]["value"]
    for results in record["cuts"].values():
        assert results["heldout"]["ranks"]["64"]["value"] == pytest.approx(whole, abs=1e-3)  # at r_max nothing is cut
        assert results["heldout"]["ranks"]["1"]["value"] != pytest.approx(
            record["heldout"]["ranks"]["1"]["value"], abs=1e-6
        )
        for split in results["tasks"]["webglm"]["splits"].values():
            assert (cell / split["items"]).is_file()
    (read,) = load_records(cell.parent)
    assert read.cuts == ["truncate_alpha_over_b", "svd"] and read.cut("svd").cell["method"] == "qlora:svd"


def test_the_same_prompts_are_answered_side_by_side(cell):
    folder = cell.parents[3]
    done = inside("experiments.samples", *SMOKE, "samples.ranks=[64,28]", "samples.items=1", cwd=folder)
    assert done.returncode == 0, done.stderr
    text = (cell / "samples.md").read_text()
    assert text.strip() == done.stdout.strip()
    assert "| rank 64 | rank 28 | reference |" in text and text.count("## ") == 1 and "> Question" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| ") and "rank" not in line and "---" not in line]
    assert row.replace(r"\|", "").count("|") == 4


def test_samples_of_an_untrained_cell_say_what_to_do(tmp_path):
    done = inside("experiments.samples", *SMOKE, cwd=tmp_path)
    assert (
        done.returncode == 2
        and "has no trained adapter" in done.stderr
        and "run experiments.train first" in done.stderr
    )


def test_samples_at_a_rank_that_the_adapter_does_not_have_are_refused(tmp_path):
    done = inside("experiments.samples", *SMOKE, "samples.ranks=[65]", cwd=tmp_path)
    assert done.returncode == 2 and "samples.ranks has 65; ranks go from r_min 1 to r_max 64" in done.stderr
