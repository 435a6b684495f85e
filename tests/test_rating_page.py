"""The page for human raters, in headless Chromium with the keyboard alone, and what is read back from its file."""

import json
import os
import shutil
import subprocess
import time
import urllib.request
from base64 import b64decode
from collections import Counter
from pathlib import Path

import pytest

from experiments.chat.matches import Verdicts, schedule
from experiments.chat.page import human_verdicts, sample, write_page
from experiments.chat.prompts import Prompt
from experiments.mistakes import ConfigError
from tests.commands import inside
from tests.judge_server import JudgeServer, Plan, write_answers

RIGHT = "\ue014"
NASTY = "</script><script>document.title='broken'</script> <!-- <b>bold</b> & \u2028 \"quoted\""


def matches(prompts: int = 4, contestants: str = "abc"):
    given = [Prompt(str(i), (f"Question {i}? {NASTY}",)) for i in range(prompts)]
    return schedule(given, {n: {p.id: f"{n} says {p.id} {NASTY}" for p in given} for n in contestants})


def test_pairs_are_drawn_once_in_random_order():
    chosen = sample(matches(40), 100, seed=0)
    assert len({(m.prompt.id, frozenset((m.first, m.second))) for m in chosen}) == 100
    turned = sum(m.first < m.second for m in chosen)
    assert 30 < turned < 70
    assert chosen == sample(matches(40), 100, seed=0) != sample(matches(40), 100, seed=1)
    assert len(sample(matches(2), 100, seed=0)) == 6
    same = schedule([Prompt("1", ("Q",))], {"a": {"1": "same"}, "b": {"1": "same"}})
    assert sample(same, 5, seed=0) == []


def test_the_page_does_not_say_whose_answers_it_shows(tmp_path):
    given = [Prompt("1", ("Q?",))]
    chosen = sample(schedule(given, {"secret-one": {"1": "x"}, "secret-two": {"1": "y"}}), 5, seed=0)
    text = write_page(tmp_path, chosen, "T").read_text()
    assert "secret" not in text and "http://" not in text and "https://" not in text


def test_saved_verdicts_are_read_back_and_the_later_one_counts(tmp_path):
    chosen = sample(matches(), 5, seed=0)
    page = write_page(tmp_path, chosen, "T").stem.removeprefix("rating-")
    saved = [{"page": page, "item": i, "verdict": v, "rater": "R"} for i, v in ((0, 1), (3, 3), (0, 2))]
    (tmp_path / "human").mkdir()
    (tmp_path / "human" / "r.jsonl").write_text("\n".join(map(json.dumps, saved)) + "\n")
    found = human_verdicts(tmp_path)
    assert [(line["match"], line["verdict"]) for line in found] == [(chosen[0].key, 2), (chosen[3].key, 3)]
    assert (found[0]["judge"], found[0]["first"], found[0]["prompt"]) == (
        "human R",
        chosen[0].first,
        chosen[0].prompt.id,
    )
    for broken in ("{", '{"page": "../x", "item": 0, "verdict": 1, "rater": ""}', json.dumps(saved[0] | {"item": 9})):
        (tmp_path / "human" / "r.jsonl").write_text(broken + "\n")
        with pytest.raises(ConfigError, match=r"r\.jsonl, line 1 is"):
            human_verdicts(tmp_path)


class Browser:
    """Headless Chromium over the WebDriver protocol."""

    def __init__(self, downloads: Path, profile: Path):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        line = next(line for line in self.driver.stdout if "successfully on port" in line)
        port = line.split("port ")[1].strip(" .\n")
        self.url = f"http://127.0.0.1:{port}/session"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        flags += ["--disable-background-networking", "--disable-component-update", "--window-size=1200,900"]
        prefs = {"download.default_directory": str(downloads), "download.prompt_for_download": False}
        options = {"args": [*flags, f"--user-data-dir={profile}"], "prefs": prefs}
        made = self.call("", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self.url += f"/{made['sessionId']}"

    def call(self, path: str, content: dict | None = None, method: str | None = None):
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def keys(self, text: str) -> None:
        presses = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": presses}]})

    def script(self, text: str):
        return self.call("/execute/sync", {"script": text, "args": []})

    def open(self, page: Path) -> None:
        self.call("/url", {"url": page.as_uri()})
        # Chromium drops what is typed before a page's first paint.
        self.wait_for("return performance.getEntriesByName('first-contentful-paint').length", 1)

    def wait_for(self, script: str, value) -> None:
        deadline = time.monotonic() + 60
        while (found := self.script(script)) != value:
            assert time.monotonic() < deadline, f"{script}: {found!r}"
            time.sleep(0.05)

    def close(self) -> None:
        self.call("", method="DELETE")
        self.driver.terminate()
        self.driver.wait()


@pytest.fixture
def browser(tmp_path):
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        reason = "needs chromium and chromedriver (tests/install.sh)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    found = Browser(tmp_path / "downloads", tmp_path / "profile")
    yield found
    found.close()


def test_rating_with_the_keyboard_alone(browser, tmp_path):
    chosen = sample(matches(3), 4, seed=0)
    page = write_page(tmp_path, chosen, "Which answer is better?")
    browser.open(page)
    assert browser.script("return document.querySelector('h1').textContent") == "Which answer is better?"
    shown = browser.script("return [question.textContent, first.textContent, second.textContent]")
    assert shown == [chosen[0].prompt.text, chosen[0].first_answer, chosen[0].second_answer]
    browser.keys("1" + RIGHT + "3" + "2")  # item 1 is passed over; after the last one the page stays there
    browser.wait_for("return count.textContent", "4 of 4, 3 rated")
    browser.keys("s")  # no name yet: the field gets the focus
    browser.wait_for("return document.activeElement.id", "rater")
    browser.keys("Ann1\ue007" + "s")
    file = tmp_path / "downloads" / f"{page.stem}-Ann1.jsonl"
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["item"], line["verdict"], line["rater"]) for line in saved] == [
        (0, 1, "Ann1"), (2, 3, "Ann1"), (3, 2, "Ann1"),
    ]  # fmt: skip
    deadline = time.monotonic() + 60  # Chromium may need a moment to pass on what a page has stored
    while True:
        browser.open(page)  # closed and opened again: nothing is lost
        count = browser.script("return count.textContent")
        if count == "4 of 4, 3 rated":
            break
        assert time.monotonic() < deadline, count
    kept = "localStorage.getItem(place)"
    browser.script(
        f"const news = {kept}.replace('\"at\":3', '\"at\":0'); localStorage.setItem(place, news);"
        "dispatchEvent(new StorageEvent('storage', {key: place}))"
    )  # as if another tab had gone back
    browser.wait_for("return count.textContent", "1 of 4, 3 rated")
    (tmp_path / "page.png").write_bytes(b64decode(browser.call("/screenshot")))
    shutil.copytree(tmp_path / "downloads", tmp_path / "human")
    read = {line["match"]: line["verdict"] for line in human_verdicts(tmp_path)}
    assert read == {chosen[0].key: 1, chosen[2].key: 3, chosen[3].key: 2}


def test_the_tournament_reads_what_raters_saved(tmp_path):
    overrides = write_answers(tmp_path, "abc", 4)
    made = inside("experiments.rate", *overrides, "tournament.human_matches=9", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    page = Path(made.stdout.strip())
    digest = page.stem.removeprefix("rating-")
    key = json.loads((page.parent / "keys" / f"{digest}.json").read_text())["items"]
    better = [1 if item["first"] < item["second"] else 2 for item in key]
    saved = [{"page": digest, "item": i, "verdict": v, "rater": "Bo"} for i, v in enumerate(better)]
    (page.parent / "human").mkdir()
    (page.parent / "human" / "bo.jsonl").write_text("\n".join(map(json.dumps, saved)) + "\n")
    alone = inside("experiments.tournament", *overrides, "judge=none", cwd=tmp_path)
    assert alone.returncode == 0 and "human Bo judges" in alone.stdout, alone.stderr
    with JudgeServer(lambda n, user: Plan("3")) as server:
        asked = ["judge.model=judge", f"judge.address={server.address}"]
        done = inside("experiments.tournament", *overrides, *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "human Bo judges" in done.stdout and "| human Bo " in done.stdout
    assert len(Verdicts(page.parent / "verdicts.jsonl").lines()) == 24
    assert Counter(json.loads((page.parent / "record.json").read_text())["verdicts"]) == {
        "human Bo": 9, "judge (explain-v1, T 0.2)": 24,
    }  # fmt: skip
