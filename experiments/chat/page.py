"""The page for human raters: made here, used in any browser without a server, its saved file read here.

The page holds the answers but not whose they are; that is in a key file beside it, which raters need not see.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

from experiments.chat.matches import Match
from experiments.files import read_json, write_json
from experiments.mistakes import ConfigError

TEMPLATE = Path(__file__).with_name("page.html")
VERDICTS = (1, 2, 3)


def sample(matches: Sequence[Match], n: int, seed: int) -> list[Match]:
    """n matches in random order, each pair of answers at most once, its order random."""
    rng = random.Random(seed)
    shuffled = rng.sample(list(matches), len(matches))
    pairs = {(match.prompt.id, frozenset((match.first, match.second))): match for match in shuffled}
    # Two identical answers would teach nothing.
    different = [match for match in pairs.values() if match.first_answer != match.second_answer]
    return rng.sample(different, min(n, len(different)))


def write_page(folder: Path, matches: Sequence[Match], title: str) -> Path:
    """Write rating-<digest>.html and its key; the same matches make the same page. Returns the page's file."""
    items = [{"question": m.prompt.text, "answers": [m.first_answer, m.second_answer]} for m in matches]
    digest = hashlib.sha256(json.dumps([m.key for m in matches]).encode()).hexdigest()[:12]
    content = {"page": digest, "title": title, "items": items}
    # In a script element only "</" and "<!" could end or change it.
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    file = folder / f"rating-{digest}.html"
    folder.mkdir(parents=True, exist_ok=True)
    key = [{"match": m.key, "prompt": m.prompt.id, "first": m.first, "second": m.second} for m in matches]
    write_json(folder / "keys" / f"{digest}.json", {"items": key})
    file.write_text(TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data), encoding="utf-8")
    return file


def human_verdicts(folder: Path) -> list[dict]:
    """The verdicts that raters saved and someone put into <folder>/human/*.jsonl, as lines of verdicts.jsonl.

    Of two verdicts of one rater on one item the later counts. ConfigError that names a broken file or unknown page.
    """
    lines = {}
    for file in sorted((folder / "human").glob("*.jsonl")):
        for number, text in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
            if text.strip():
                line = _resolved(folder, file, number, text)
                lines[line["judge"], line["match"]] = line
    return list(lines.values())


def _resolved(folder: Path, file: Path, number: int, text: str) -> dict:
    try:
        given = json.loads(text)
        page, item, verdict, rater = str(given["page"]), int(given["item"]), given["verdict"], str(given["rater"])
        if verdict not in VERDICTS or not page.isalnum() or item < 0:
            raise ValueError("not a verdict of a rating page")
        key = read_json(folder / "keys" / f"{page}.json")
        shown = key["items"][item] if key else None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{file}, line {number} is broken ({error!r}); take it out and run again") from error
    if shown is None:
        raise ConfigError(f"{file}, line {number} is of page {page}, whose key is not in {folder / 'keys'}")
    return {"judge": f"human {rater}", **shown, "verdict": verdict}
