"""A room imports only from the floors below it; commands alone reach up to `analysis`, to show what they have made."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import REPOSITORY

FLOORS = ("qdylora", "eval", "experiments", "slurm", "analysis")
COMMAND = 'if __name__ == "__main__":'


def imported(file: Path) -> set[str]:
    """The top-level packages that a module imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_from_below(room):
    files = sorted((REPOSITORY / room).rglob("*.py"))
    assert files
    above = set(FLOORS[FLOORS.index(room) + 1 :])
    for file in files:
        found = imported(file) & above
        allowed = {"analysis"} if room == "experiments" and COMMAND in file.read_text() else set()
        assert found <= allowed, f"{file.relative_to(REPOSITORY)} imports {found - allowed}"


def test_analysis_needs_no_torch():
    names = [f"analysis.{file.stem}" for file in sorted((REPOSITORY / "analysis").glob("*.py"))]
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=300).returncode == 0
