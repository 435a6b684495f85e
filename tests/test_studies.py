"""Studies: every variant composes, differs from the others in what it says, and one study runs from end to end."""

import csv
from pathlib import Path

import pytest

from analysis.records import Record, load
from analysis.rivals import Rival
from analysis.stats import Bootstrap
from analysis.study import STUDIES, study
from analysis.tables import TABLES
from experiments.cell import Cell
from experiments.config import CONF, substance
from experiments.examples import prepare
from experiments.mistakes import ConfigError
from experiments.table import cells
from experiments.train import base_tokenizer
from tests.commands import inside
from tests.test_conf import config

#: What the variants of each study differ in, dotted names of the configuration.
VARIED = {
    "study_precision": {"method.name", "method.bits"},
    "study_optimizers": {"optim.name", "optim.lr", "optim.schedule"},
    "study_epochs": {"budget.steps"},
    "study_targets": {"method.targets"},
    "study_alpha": {"method.alpha"},
    "study_quantization": {"method.quant_type", "method.double_quant"},
}


def leaves(tree, path: str = "") -> dict:
    if not isinstance(tree, dict):
        return {path: repr(tree)}
    return {name: leaf for key, part in tree.items() for name, leaf in leaves(part, f"{path}.{key}".strip(".")).items()}


def test_every_study_has_a_file_and_a_table():
    assert {file.stem for file in Path(CONF, "table").glob("study*.yaml")} == set(STUDIES) == {"study", *VARIED}
    assert all(TABLES[name] is study for name in STUDIES)


@pytest.mark.parametrize("name", VARIED)
def test_variants_differ_in_nothing_but_what_is_studied(name):
    overrides = [f"table={name}", "scale=small"]
    found = [cell for _, cell in cells(config(*overrides), overrides)]
    assert [cell.method for cell in found] == list(config(*overrides).table.variants)
    assert len({cell.digest for cell in found}) == len(found) >= 2
    assert all(cell.config.ranks.eval == [cell.config.ranks.r_max] for cell in found)
    asked = [leaves(substance(cell.plain_config)) for cell in found]
    assert {key for key in asked[0] if len({one.get(key) for one in asked}) > 1} == VARIED[name]


def test_at_scale_paper_a_study_has_qloras_settings_but_for_what_is_studied():
    overrides = ["table=study_alpha", "scale=paper"]
    for _, cell in cells(config(*overrides), overrides):
        c = cell.config
        assert (c.model.name, c.budget.steps, c.budget.batch, c.optim.name) == (
            "llama-7b",
            10000,
            16,
            "paged_adamw_32bit",
        )


def test_a_key_that_is_not_asked_for_leaves_older_records_valid():
    plain = config("scale=smoke").data
    assert plain.rows is None
    assert "rows" not in substance_of("scale=smoke")["data"]
    assert substance_of("scale=smoke", "data.rows=8")["data"]["rows"] == 8


def substance_of(*overrides: str) -> dict:
    return substance(Cell(config(*overrides)).plain_config)


def test_what_ran_out_of_memory_keeps_its_row_also_as_the_first():
    names = ("qdylora-masked", "qlora-r8", "adalora-r8")
    variants = {"table": {"variants": {name: [] for name in names}}}
    golden = {record.cell["method"]: record for record in load(Path(__file__).parent / "golden" / "rivals")}
    records = [Record(golden[n].folder, golden[n].raw | {"config": golden[n].raw["config"] | variants}) for n in names]

    def texts(some) -> dict[str, list[str]]:
        (block,) = study(some, Bootstrap(resamples=50)).blocks
        return {row.labels[-1]: [str(cell) for cell in row.cells] for row in block.rows}

    lost_first, lost_last = texts(records[::-1]), texts(records[1:])
    assert list(lost_first) == list(names)  # in the order of the configuration, whatever that of the records
    assert lost_first["qdylora-masked"] == ["OOM", "", "", "", "", ""]
    assert lost_first["adalora-r8"][:2] == ["1.952 ± 0.040", ""]
    assert lost_last["qlora-r8"][1] == "" and lost_last["adalora-r8"][1].startswith("-0.82 [")
    assert lost_last["adalora-r8"][2].startswith("50.0 (8) [")


def test_a_study_runs_from_end_to_end(tmp_path):
    overrides = ("table=study_epochs", "scale=smoke", "tracker=none", "tasks.benchmarks=[]")
    few = "table.variants={once:['data.rows=8','budget.steps=2'],twice:['data.rows=8','budget.steps=4']}"
    done = inside("experiments.table", *overrides, few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs/smoke/study_epochs"
    once, twice = load(folder)
    assert [r.raw["budget"]["spent"]["examples"] for r in (once, twice)] == [8, 16]
    assert once.raw["data"]["sha256"] == twice.raw["data"]["sha256"]
    rows = csv.DictReader((folder / "study_epochs.csv").read_text().splitlines())
    lines = {(row["variant"], row["column"]): row for row in rows}
    assert float(lines["twice", "steps"]["value"]) == 4 and float(lines["once", "peak GiB"]["value"]) > 0.1
    assert ("once", "above the first, percent") not in lines
    found = lines["twice", "above the first, percent"]
    loss = [r.raw["heldout"]["ranks"]["64"]["value"] for r in (once, twice)]
    assert float(found["value"]) == pytest.approx(100 * (loss[1] / loss[0] - 1), abs=1e-3)
    few_resamples = Bootstrap(resamples=50)
    assert Rival((twice,), few_resamples).loss_over(Rival((once,), few_resamples), 64).value == pytest.approx(
        float(found["value"]), abs=1e-3
    )
    c = config(*overrides, "data.rows=1000000", f"outputs={tmp_path}/outputs")
    with pytest.raises(ConfigError, match=r"data\.rows is 1000000, but alpaca has only .* training rows; choose fewer"):
        prepare(c, base_tokenizer(Cell(c)))
