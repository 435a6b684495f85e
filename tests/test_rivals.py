"""The table of rivals: its cells, its numbers from the items themselves, its verdicts."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from analysis.layout import Cell, Table
from analysis.records import Record, load
from analysis.rivals import SEPARATE, rivals, verdict
from analysis.stats import Bootstrap
from analysis.tables import TABLES, to_csv, to_latex, to_markdown
from experiments.cell import Cell as TableCell
from experiments.keep import RESULTS
from experiments.mistakes import ConfigError
from experiments.table import cells
from tests.test_conf import config

GOLDEN = Path(__file__).parent / "golden"
HOW = Bootstrap(resamples=2000)
RANKS = [1, 2, 4, 8, 16, 32, 64]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return load(GOLDEN / "rivals")


@pytest.fixture(scope="module")
def table(records) -> Table:
    return rivals(records, HOW)


def row(table: Table, block: str, method: str):
    (rows,) = [b.rows for b in table.blocks if b.title.startswith(block)]
    (found,) = [row for row in rows if row.labels[-1] == method]
    return dict(zip(RANKS, found.cells, strict=True))


def loss_items(variant: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Loss per token and tokens of every held-out item, read from the file itself."""
    file = GOLDEN / "rivals" / f"smollm2-135m--gsm8k--{variant}--seed0" / "items/heldout.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    return np.array([line["values"][str(rank)] for line in lines]), np.array([line["weight"] for line in lines])


@pytest.mark.parametrize("render, suffix", [(to_markdown, "md"), (to_latex, "tex"), (to_csv, "csv")])
def test_golden_table_byte_for_byte(table, render, suffix):
    assert render(table).encode() == (GOLDEN / f"rivals.{suffix}").read_bytes()


def test_every_method_is_compared_with_qlora_trained_at_that_very_rank(table):
    found = row(table, "Held-out loss above", "QDyLoRA")
    for rank in (1, 8, 64):
        mine, weights = loss_items("qdylora", rank)
        theirs, _ = loss_items(f"qlora-r{rank}", rank)
        want = 100 * ((mine * weights).sum() / (theirs * weights).sum() - 1)
        assert found[rank].value == pytest.approx(want, abs=1e-3)
        # Paired: the interval is that of a bootstrap of items, drawn together.
        rng = np.random.default_rng(1)
        draws = rng.integers(len(mine), size=(4000, len(mine)))
        ratios = ((mine - theirs) * weights)[draws].sum(1) / weights[draws].sum(1)
        low, high = 100 * np.quantile(ratios, (0.025, 0.975)) * weights.sum() / (theirs * weights).sum()
        assert (found[rank].low, found[rank].high) == (pytest.approx(low, abs=0.08), pytest.approx(high, abs=0.08))
    assert not any(str(found[rank]) for rank in (2, 4, 16, 32))


@pytest.mark.parametrize(
    ("name", "cell", "items"),
    [
        ("QDyLoRA, sorted at 3/4", "qdylora-sorted", "heldout"),
        ("QLoRA, graded rates, SVD", "qlora-graded", "svd-heldout"),
    ],
)
def test_every_method_is_compared_with_qlora_cut_by_svd_over_all_seeds(name, cell, items):
    """Of the kept results: what README says of our methods, from the items themselves."""
    kept = RESULTS / "small/rivals_long"
    found = row(rivals(load(kept), HOW), "Held-out loss above that of QLoRA cut by SVD", name)

    def mean_loss(cell: str, items: str, rank: int) -> float:
        file = kept / f"smollm2-135m--gsm8k--{cell}--steps192/items/{items}.jsonl.gz"
        lines = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
        weights = sum(line["weight"] for line in lines)
        return sum(line["values"][str(rank)] * line["weight"] for line in lines) / weights

    for rank in RANKS:
        mine = sum(mean_loss(f"{cell}--seed{seed}", items, rank) for seed in range(3))
        theirs = sum(mean_loss(f"qlora-r64--seed{seed}", "svd-heldout", rank) for seed in range(3))
        assert found[rank].value == pytest.approx(100 * (mine / theirs - 1), abs=1e-3)
        assert found[rank].low < found[rank].value < found[rank].high


def test_qlora_s_own_row_is_of_separate_runs_and_is_compared_with_no_run_of_itself(table):
    own, truncated = (row(table, "Held-out loss ±", name) for name in (SEPARATE, "QLoRA of rank 64, truncated"))
    assert [rank for rank in RANKS if str(own[rank])] == [1, 8, 64]
    assert own[64] == truncated[64] and own[8] != truncated[8]
    assert str(row(table, "Held-out loss above", "QLoRA of rank 64, truncated")[64]) == ""
    assert [rank for rank, cell in row(table, "Held-out loss ±", "AdaLoRA").items() if str(cell)] == [8]
    assert "qdylora-masked--seed0: oom" in table.footnotes[-1]


@pytest.mark.parametrize(
    ("allowed", "want"), [(0.5, "met*"), (0.4, "met*"), (0.3, "met"), (0.2, "met"), (0.1, "missed")]
)
def test_a_verdict_is_met_within_the_limit_and_certain_if_the_whole_interval_is(allowed, want):
    assert verdict(Cell(0.2, low=0.1, high=0.4), allowed) == want


def test_verdicts_are_given_at_rank_8_and_at_r_max(table):
    found = row(table, "Within 1% of QLoRA's held-out loss at rank 8 and 0.5% at r_max", "QDyLoRA")
    assert {rank: str(cell) for rank, cell in found.items() if str(cell)} == {8: "met*", 64: "met*"}


def test_the_cells_of_the_table_are_told_by_their_variants():
    overrides = ["scale=smoke", "table=rivals"]
    found = cells(config(*overrides), overrides)
    assert [cell.method for _, cell in found] == list(config(*overrides).table.variants)
    assert len({cell.name for _, cell in found}) == len({cell.digest for _, cell in found}) == len(found) == 16
    trained = {
        cell.method: (cell.config.method.name, cell.config.ranks.r_max, cell.config.ranks.eval) for _, cell in found
    }
    assert trained["qlora-r8"] == ("qlora", 8, [8]) and trained["adalora-r8"] == ("adalora", 8, [8])
    assert trained["matryoshka"] == ("matryoshka", 64, RANKS)
    assert {(cell.config.budget.steps, cell.config.budget.batch, cell.config.data.name) for _, cell in found} == {
        (4, 4, "gsm8k")
    }
    again = TableCell(config(*found[1][0]))  # what the command that runs the cell makes of its overrides
    assert (again.name, again.digest) == (found[1][1].name, found[1][1].digest)
    assert TABLES["rivals"] is rivals


def test_the_long_table_repeats_six_rivals_with_four_times_the_steps_and_no_benchmark():
    overrides = ["scale=smoke", "table=rivals_long"]
    found = [cell for _, cell in cells(config(*overrides), overrides)]
    short = config("scale=smoke", "table=rivals").table.variants
    variants = dict(config(*overrides).table.variants)
    assert [cell.method for cell in found] == list(variants)
    assert {name: list(short[name]) for name in variants} == variants
    assert {(cell.config.budget.steps, tuple(cell.config.tasks.benchmarks)) for cell in found} == {(16, ())}
    assert len(found) == 6 and TABLES["rivals_long"] is rivals


def test_rivals_told_apart_by_held_out_loss_alone(records, table):
    shown = rivals([Record(one.folder, one.raw | {"tasks": {}}) for one in records], HOW)
    blocks = [block for block in table.blocks if not block.title.startswith("Score")]
    assert list(shown.blocks) == blocks and len(blocks) < len(table.blocks)


def test_a_variant_s_name_is_part_of_a_file_name():
    with pytest.raises(ConfigError, match=r"table\.variant is 'a/b'; as part of a file name"):
        config("scale=smoke", "table.variant=a/b")


def test_qlora_is_shown_in_every_way_its_adapter_was_cut():
    table2 = [record for record in load(GOLDEN / "table2") if record.cell["data"] == "gsm8k"]
    shown = rivals(table2, HOW)
    svd = json.loads((next(r for r in table2 if r.cuts).folder / "record.json").read_text())["cuts"]["svd"]
    for rank, cell in row(shown, "Held-out loss ±", "QLoRA, SVD").items():
        assert cell.value == svd["heldout"]["ranks"][str(rank)]["value"]
    assert row(shown, "Held-out loss ±", "QLoRA, alpha/b")[8].value is not None
