"""The analysis notebooks hold no output and run from records alone."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.golden_outputs import GOLDEN

ROOM = Path(__file__).resolve().parents[1] / "analysis"


def notebooks() -> list[str]:
    return sorted(file.name for file in ROOM.glob("*.ipynb"))


@pytest.mark.parametrize("name", notebooks())
def test_a_notebook_stores_no_output_and_is_small(name):
    cells = [cell for cell in nbformat.read(ROOM / name, as_version=4).cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert len(cells) <= 6 and all(len(cell.source.splitlines()) <= 12 for cell in cells)


@pytest.mark.parametrize("name", notebooks())
def test_a_notebook_runs_on_records_and_shows_its_table_and_figures(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOM.parent))
    table = Path(name).stem
    records = GOLDEN if table == "table1" else GOLDEN.parent / table
    shutil.copytree(records, tmp_path / "outputs" / "mini" / table)
    (tmp_path / "analysis").mkdir()
    notebook = nbformat.read(ROOM / name, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "analysis")}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any(data.get("text/markdown", "").startswith("## ") for data in shown)
    assert any("<svg" in data.get("image/svg+xml", "") for data in shown)
