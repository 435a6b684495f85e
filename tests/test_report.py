"""The report: everything that is there, nothing from elsewhere, and no text of a record taken for HTML."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from analysis import report as report_module
from analysis.claims import Claim
from analysis.records import cells, load
from analysis.report import main, report
from analysis.tables import TABLES
from tests.golden_outputs import ALPACA, GOLDEN, HOW, change, make

ATTACK = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
CLAIMS = [
    Claim("C1", "as good as QLoRA", "not decided at this scale", 1.5, (-2.25, 5.5), 30, "make table1", "points"),
    Claim("C3", "does not fit", "supported", None, None, 0, "make forecast", ""),
]
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """A page's elements, its texts by element, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", " ".join(text.split())))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def has(self, text, tag=None):
        return any(text in found and tag in (None, where) for where, found in self.texts)


@pytest.fixture(scope="module")
def scale(tmp_path_factory):
    return make(tmp_path_factory.mktemp("outputs") / "mini")


@pytest.fixture(scope="module")
def text(scale):
    return report(scale, CLAIMS, HOW)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture
def copy(scale, tmp_path):
    """A folder to change, with Alpaca's QDyLoRA alone."""
    folder = tmp_path / "mini"
    shutil.copytree(scale / "table1" / ALPACA, folder / "table1" / ALPACA)
    return folder


def rows(text, section):
    """The cells of a section's last table, row by row."""
    part = text.split(f'<section id="{section}">')[1].split("</section>")[0]
    found = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in part.split("<tr")[1:]]
    return {row[0]: row[1:] for row in found}


def test_the_page_loads_nothing_from_elsewhere(text, page):
    assert not page.all("script") + page.all("link") + page.all("img") + page.all("iframe")
    assert not re.search(r"@import|url\((?!#)|https?://", text)
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href", "src"):
            assert attributes.get(name, "#").startswith("#")
    (policy,) = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_cell_is_listed_with_its_end(text):
    found = rows(text, "cells")
    assert set(found) == {"cell", *(one.name for one in GOLDEN.iterdir())}
    assert found["smollm2-135m--self_instruct--qlora--seed0"][1:3] == ["oom", "CUDA out of memory at step 1"]
    assert found["smollm2-135m--flan_v2--qdylora--seed0"][1] == "failed"
    assert found[ALPACA][:2] == ["table1", "done"]
    assert "11 cells: 9 done, 1 oom, 1 failed" in text.replace("1 failed, 1 oom", "1 oom, 1 failed")


def test_a_cell_that_has_not_ended_is_listed(copy):
    begun = copy / "table1" / "smollm2-135m--oasst1--qlora--seed0"
    begun.mkdir()
    (begun / "config.json").write_text("{}")
    (begun / "log.jsonl").write_text((copy / "table1" / ALPACA / "log.jsonl").read_text())
    text = report(copy, [], HOW)
    assert rows(text, "cells")[begun.name] == ["table1", "not ended", *[""] * 6]
    assert Page(text).has(begun.name, "figcaption")  # its training so far is drawn


def test_budgets_are_asked_and_spent_and_blank_where_nothing_is(text):
    found = rows(text, "budgets")
    assert found[ALPACA] == [
        "table1", "40 steps, 640 examples", "40 steps, 640 examples, 60,600 tokens", "71.0", "4.00",
    ]  # fmt: skip
    assert found["smollm2-135m--oasst1--qdylora--seed1"][-1] == ""  # no memory in its record
    assert rows(text, "software") == {"what": ["version"]}


def test_provenance_is_the_records(copy):
    versions = {"python": "3.11.7", "torch": "2.13.0+cpu"}
    machine = {"system": "Linux", "cpu": "AMD EPYC", "threads": 2, "gpus": []}
    change(copy / "table1" / ALPACA, versions=versions, machine=machine, commit="c0ffee" * 6, digest="f00d")
    text = report(copy, [], HOW)
    assert rows(text, "cells")[ALPACA][4:6] == ["c0ffeec0ffee", "f00d"]
    assert rows(text, "software") == {
        "what": ["version"], "commit": ["c0ffee" * 6], "machine": ["AMD EPYC, 2 threads"], "python": ["3.11.7"],
        "system": ["Linux"], "torch": ["2.13.0+cpu"],
    }  # fmt: skip
    (data,) = [row for name, row in rows(text, "data").items() if name == "alpaca"]
    assert data[0] == "generated" and len(data[-1]) == 64


def test_claims_have_verdict_effect_and_interval(text):
    found = re.findall(r'<article class="claim">(.*?)</article>', text, re.DOTALL)
    texts = [" ".join(re.sub("<[^>]*>", " ", part).split()) for part in found]
    shown = dict(zip((claim.name for claim in CLAIMS), texts, strict=True))
    effect = "effect [95% interval] +1.5 [-2.25, +5.5]; n = 30"
    assert shown["C1"] == f"C1: as good as QLoRA not decided at this scale ; {effect} points make table1"
    assert "supported" in shown["C3"] and "effect" not in shown["C3"]


def test_claims_that_cannot_be_decided_say_why_and_the_rest_stands(copy):
    text = report(copy, "claims are decided at one scale, not 2", HOW)
    assert "Not decided: claims are decided at one scale" in text
    assert set(rows(text, "cells")) == {"cell", ALPACA}


def test_tables_are_the_tables_cells(text, page):
    table = TABLES["table1"](load(GOLDEN))
    assert page.has(table.title, "h3")
    texts = [found for where, found in page.texts if where == "td"]
    for block in table.blocks:
        assert page.has(block.title, "th")
        assert all(str(cell) in texts for row in block.rows for cell in row.cells if str(cell))
    assert all(page.has(note[:40], "li") for note in table.footnotes)


def test_a_refused_table_says_why_and_the_rest_stands(copy, scale):
    other = ALPACA.replace("qdylora", "qlora")
    shutil.copytree(scale / "table1" / other, copy / "table1" / other)
    change(copy / "table1" / other, budget={"asked": {"steps": 80, "examples": 640, "tokens": None}})
    text = report(copy, CLAIMS, HOW)
    assert "Not printed: records of one table must agree in budget asked for: steps" in text
    assert set(rows(text, "cells")) == {"cell", ALPACA, other}


def test_figures_are_inline_and_have_words(page):
    figures = page.all("figure")
    drawings = [one for one in page.all("div") if one.get("role") == "img"]
    assert len(figures) == len(drawings) == len(page.all("svg")) == len(page.all("figcaption")) == 18
    assert all(len(one["aria-label"]) > 20 for one in drawings)
    ids = [one["id"] for _, one in page.elements if "id" in one]
    assert len(ids) == len(set(ids))
    used = {one["xlink:href"] for _, one in page.elements if "xlink:href" in one}
    assert used and used <= {f"#{name}" for name in ids}


def test_curves_of_many_cells_are_left_to_files(scale, text, monkeypatch):
    count = sum(len(cells(table)) for table in scale.iterdir() if table.is_dir())
    monkeypatch.setattr(report_module, "MOST_CURVES", count - 1)
    many = report(scale, CLAIMS, HOW)
    assert f"Those of {count} cells are too many for one page. They are files: python -m analysis.figures" in many
    assert "tokens a second" in text and "tokens a second" not in many
    assert Page(many).has("Score against rank", "h3")


def test_a_reader_without_sight_or_mouse_finds_the_way(page):
    assert page.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(lower <= upper + 1 for upper, lower in pairwise(levels))
    assert all(one.get("scope") for one in page.all("th"))
    regions = [one for one in page.all("div") if one.get("class") == "scroll"]
    assert len(regions) == len(page.all("table")) and all(one["aria-label"] and one["tabindex"] for one in regions)
    anchors = {one["href"] for one in page.all("a")}
    assert anchors == {f"#{one['id']}" for one in page.all("section")}


def test_text_from_records_is_never_html(copy):
    cell = copy / "table1" / ALPACA
    raw = json.loads((cell / "record.json").read_text())
    raw["cell"] |= {"model": ATTACK, "data": ATTACK, "method": ATTACK}
    raw |= {"name": ATTACK, "commit": ATTACK, "versions": {ATTACK: ATTACK}, "digest": ATTACK, "reason": ATTACK}
    raw["data"] |= {"name": ATTACK, "source": ATTACK, "sha256": ATTACK}
    raw["machine"] = {"system": ATTACK, "cpu": ATTACK, "threads": ATTACK, "gpus": []}
    raw["tasks"]["mmlu"]["metric"] = ATTACK
    (cell / "record.json").write_text(json.dumps(raw))
    claim = Claim(ATTACK, ATTACK, ATTACK, None, None, 0, ATTACK, ATTACK)
    text = report(copy, [claim], HOW)
    found = Page(text)
    assert not found.all("script") + found.all("img")
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert text.count("&lt;script&gt;") > 20 and found.has(ATTACK, "td") and found.has("<script>", "text")


def test_the_same_records_give_the_same_page(copy):
    assert report(copy, CLAIMS, HOW) == report(copy, CLAIMS, HOW)


def test_the_command_writes_the_page(copy, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(report_module, "claims_of", lambda *of: given.append(of) or CLAIMS)
    main(copy)
    ((folder, records),) = given
    assert folder == copy and [one.name for one in records] == [ALPACA]
    assert capsys.readouterr().out == f"{copy / 'report.html'}\n"
    assert (copy / "report.html").read_text().startswith("<!doctype html>")
    assert len(cells(copy / "table1")) == 1 and not list(copy.glob(".report*"))


def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path):
    code = [sys.executable, "-m", "analysis.report", str(tmp_path / "nothing")]
    done = subprocess.run(code, cwd=GOLDEN.parents[2], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"error: no folder of records at {tmp_path / 'nothing'}\n"
