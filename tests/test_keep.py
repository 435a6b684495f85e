"""Results are kept in the repository without what is large or of this machine, and make the same table there."""

import shutil

from analysis.records import load
from analysis.rivals import rivals
from analysis.stats import Bootstrap
from experiments.keep import RESULTS, keep
from tests.commands import REPOSITORY, inside

GOLDEN = REPOSITORY / "tests/golden/rivals"


def test_finished_cells_and_tables_are_kept_and_nothing_else(tmp_path):
    scale, results = tmp_path / "outputs/mini", tmp_path / "results"
    shutil.copytree(GOLDEN, scale / "rivals")
    cell = next((scale / "rivals").iterdir())
    for name in ("adapter/adapter_model.safetensors", "parts/heldout.json", "checkpoints/x/y", "log.jsonl"):
        (cell / name).parent.mkdir(parents=True, exist_ok=True)
        (cell / name).write_text("{}\n")
    (scale / "rivals/unfinished").mkdir()
    shutil.copytree(cell, cell.with_name(f"{cell.name}~0123456789ab"))
    (scale / "rivals/rivals.md").write_text("| |")
    (tmp_path / "outputs/forecast").mkdir()
    (tmp_path / "outputs/forecast/paper--llama.json").write_text("{}\n")
    keep(scale, results)
    assert (results / "forecast/paper--llama.json").read_text() == "{}\n"  # where claims look for them
    there = results / "mini/rivals"
    assert {path.name for path in there.iterdir()} == {path.name for path in GOLDEN.iterdir()} | {"rivals.md"}
    assert {path.name for path in (there / cell.name).iterdir()} <= {"record.json", "items", "log.jsonl"}
    how = Bootstrap(resamples=200)
    assert rivals(load(there), how) == rivals(load(GOLDEN), how)


def test_nothing_to_keep_is_said_in_one_sentence(tmp_path):
    done = inside("experiments.keep", "scale=smoke", cwd=tmp_path)
    assert done.returncode == 2 and "holds no finished cell; run a table first" in done.stderr


def test_kept_records_name_no_folder_of_the_machine_that_made_them():
    records = [record for table in RESULTS.glob("*/*/") if table.name != "figures" for record in load(table)]
    assert records
    for record in records:
        assert not {"root", "outputs"} & record.raw["config"].keys() and "root" not in record.raw["data"], record.name
