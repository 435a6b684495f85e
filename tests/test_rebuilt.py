"""A cell run again is compared score by score with the kept one."""

import json
import shutil

import pytest

from analysis.rebuilt import rebuilt
from analysis.records import load
from tests.commands import REPOSITORY, run

GOLDEN = REPOSITORY / "tests/golden/rivals"


@pytest.fixture
def kept(tmp_path):
    """Finished cells with what the runner writes beside the scores."""
    folder = shutil.copytree(GOLDEN, tmp_path / "kept")
    for file in folder.glob("*/record.json"):
        machine = {"cpu": "a CPU", "threads": 2}
        facts = {"digest": "a", "machine": machine, "compute_dtype": "float32", "commit": "c", "data": {"sha256": "d"}}
        file.write_text(json.dumps(json.loads(file.read_text()) | facts))
    return folder


@pytest.fixture
def again(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "again")


def change(again, **values):
    file = next(again.glob("*qlora-r8*/record.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_largest_difference_of_each_score_is_shown(kept, again, tmp_path):
    loss = next(record for record in load(kept) if record.r_max == 8 and "qlora" in record.name).raw["heldout"]
    other = loss["ranks"]["8"] | {"value": loss["ranks"]["8"]["value"] + 0.25}
    change(again, heldout=loss | {"ranks": loss["ranks"] | {"8": other}})
    done = run("analysis.rebuilt", str(kept), str(again), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines[2:]]
    found = {(task, split): difference for _, task, split, _, difference in rows if difference not in ("", "0")}
    assert found == {("heldout", "heldout"): "0.25"}
    assert "a CPU, 2 threads, computing in float32, commit c" in " ".join(done.stdout.split())


@pytest.mark.parametrize("what", ["digest", "data"])
def test_other_configurations_and_other_data_are_not_compared(kept, again, what):
    change(again, **{what: {"digest": "b", "data": {"sha256": "other"}}[what]})
    with pytest.raises(ValueError, match=f"differ in {what}"):
        rebuilt(load(kept), load(again))


def test_nothing_in_common_is_said_in_one_sentence(kept, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run("analysis.rebuilt", str(kept), str(tmp_path / "empty"), cwd=tmp_path)
    assert done.returncode == 2 and "no finished cell is in both folders" in done.stderr
