"""A cell that another table has run is not trained again; only what that table did not ask for is scored."""

import json

import pytest

from tests.commands import inside

CELL = ("scale=smoke", "data=gsm8k", "method=qlora", "tasks=own", "tracker=none")
TABLE3 = "outputs/smoke/table3/tiny--gsm8k--qlora--seed0"
TABLE2 = "outputs/smoke/table2/tiny--gsm8k--qlora--seed0"


@pytest.fixture
def folder(tmp_path):
    """Where Table 3 has run a cell."""
    done = inside("experiments.run", *CELL, "table.name=table3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_the_other_table_has_its_record_and_scores_only_the_missing_cut(folder):
    done = inside("experiments.run", *CELL, "table.name=table2", "ranks.cuts=[svd]", cwd=folder)
    assert done.returncode == 0 and "table3/tiny--gsm8k--qlora--seed0" in done.stderr, done.stderr
    first, second = (json.loads((folder / cell / "record.json").read_text()) for cell in (TABLE3, TABLE2))
    assert second["taken_over"] == {"from": "table3/tiny--gsm8k--qlora--seed0", "commit": first["commit"]}
    for key in ("budget", "data", "updates", "heldout", "tasks"):
        assert second[key] == first[key], key
    assert "cuts" not in first and list(second["cuts"]) == ["svd"]
    logs = [(folder / cell / "log.jsonl").read_bytes() for cell in (TABLE3, TABLE2)]
    assert logs[0] == logs[1]  # to the millisecond: not a second training


@pytest.mark.parametrize("other", ["seed=1", "optim.lr=1e-4", "tasks.heldout_items=7"])
def test_another_configuration_is_trained(folder, other):
    done = inside("experiments.run", *CELL, "table.name=table2", other, cwd=folder)
    assert done.returncode == 0, done.stderr
    (record,) = (folder / "outputs/smoke/table2").glob("*/record.json")
    assert "taken_over" not in json.loads(record.read_text())


def test_a_damaged_adapter_is_not_taken(folder):
    weights = folder / TABLE3 / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    done = inside("experiments.run", *CELL, "table.name=table2", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "taken_over" not in json.loads((folder / TABLE2 / "record.json").read_text())
