"""The README of a scale's results: what the report says, in Markdown, with its pictures beside it."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from analysis.claims import Claim
from analysis.layout import to_markdown
from analysis.readme import main, readme
from analysis.records import load
from analysis.tables import TABLES
from experiments.keep import RESULTS
from tests.commands import REPOSITORY
from tests.golden_outputs import ALPACA, change, make

CLAIM = Claim("C1", "as good as QLoRA", "not decided at this scale", 1.5, (-2.25, 5.5), 30, "make table1", "points")


@pytest.fixture(scope="module")
def scale(tmp_path_factory):
    return make(tmp_path_factory.mktemp("outputs") / "mini")


@pytest.fixture
def copy(scale, tmp_path):
    """A folder to change, with Alpaca's QDyLoRA alone."""
    folder = tmp_path / "mini"
    shutil.copytree(scale / "table1" / ALPACA, folder / "table1" / ALPACA)
    return folder


def pictures(page):
    """(file, words) of each image."""
    return [(unescape(file), unescape(words)) for file, words in re.findall(r'<img src="([^"]*)" alt="([^"]*)"', page)]


def cost(page):
    """Table -> the rest of its row in the last table."""
    rows = [[text.strip() for text in line.strip("|").split("|")] for line in page.split("## Cost")[1].splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) == 5}


def test_the_command_writes_the_page_and_its_pictures(scale):
    main(scale)
    page = (scale / "README.md").read_text()
    shown = pictures(page)
    assert [file.split("--")[-1] for file, _ in shown] == ["rank.png"] * 3 + ["paper.png"]
    for file, words in shown:
        assert (scale / file).read_bytes().startswith(b"\x89PNG") and len(words) > 20
    assert "**smollm2-135m, Alpaca, 40 steps: held-out loss** (table1)" in page
    assert page.startswith("# Results at scale mini\n\n11 cells: 9 done") and not list(scale.glob(".README*"))
    main(scale)
    assert (scale / "README.md").read_text() == page


def test_claims_and_tables_are_those_of_the_records(scale):
    page = readme(scale, [CLAIM], {})
    assert to_markdown(TABLES["table1"](load(scale / "table1"))).strip() in page
    assert "| C1    | as good as QLoRA    | not decided at this scale | +1.5 [-2.2, +5.5]     | 30 |" in page
    assert "Rebuild: make table1" in page


def test_what_is_refused_says_why_and_the_rest_stands(copy, scale):
    other = ALPACA.replace("qdylora", "qlora")
    shutil.copytree(scale / "table1" / other, copy / "table1" / other)
    change(copy / "table1" / other, budget={"asked": {"steps": 80, "examples": 640, "tokens": None}})
    page = readme(copy, "claims are decided at one scale, not 2", {})
    assert "## Claims\n\nNot printed: claims are decided at one scale, not 2\n" in page
    assert "## table1\n\nNot printed: records of one table must agree in budget asked for: steps" in page
    assert cost(page)["table1"][0] == "2"


def test_hours_are_of_the_cells_that_were_run(copy):
    asked = {"steps": 40, "examples": 640, "tokens": None}
    change(copy / "table1" / ALPACA, budget={"asked": asked, "spent": asked | {"seconds": 5400.0}})
    assert cost(readme(copy, [], {}))["table1"] == ["1", "1", "1.5", "4.0"]
    again = copy / "table2" / ALPACA
    shutil.copytree(copy / "table1" / ALPACA, again)
    cell = json.loads((again / "record.json").read_text())["cell"]
    change(again, cell=cell | {"table": "table2"}, taken_over={"from": f"table1/{ALPACA}", "commit": None})
    assert cost(readme(copy, [], {}))["table2"] == ["1", "0", "", ""]


def test_the_kept_page_shows_pictures_that_are_files_of_the_repository():
    page = RESULTS / "small/README.md"
    tracked = subprocess.run(["git", "ls-files", RESULTS], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    files = {str(REPOSITORY / name) for name in tracked.stdout.splitlines()}
    shown = pictures(page.read_text())
    assert shown and {str(page.parent / file) for file, _ in shown} <= files
