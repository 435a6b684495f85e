"""Verdicts on pairs of answers, as frames: what QLoRA released and what a tournament here has written.

A verdict frame has one row a verdict: judge, prompt (its id), first, second (names, in the order shown) and
verdict: 1 the first is better, 2 the second, 3 a tie, <NA> none could be had.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

FIRST, SECOND, TIE = 1, 2, 3
COLUMNS = ["judge", "prompt", "first", "second", "verdict"]
REFERENCE = "gpt-3.5"  # ChatGPT, whose score is 100 percent in QLoRA's Table 6

#: The released files' names -> ours. QLoRA's 30b is LLaMA's 33B.
SYSTEMS = {"gpt35": "gpt-3.5", "gpt4": "gpt-4"}
RECIPES = {
    "flan": "flan-v2",
    "huggingchat": "open-assistant",
    "oassist": "guanaco",
    "unnatural-instructions": "unnatural",
}
#: The released files of scores out of ten name the two systems in the order shown only for these. All others
#: are called X-vs-gpt-3.5 where ChatGPT's answer came first: their `answer1_id`s are those of ChatGPT's answers.
NAMED_AS_SHOWN = ("gpt-4", "bard", "vicuna-13b")


def qlora_pairwise(root: str | Path) -> dict[str, pd.DataFrame]:
    """GPT-4's verdicts released with QLoRA, benchmark (`vicuna`, `oa`) -> verdict frame.

    root: the folder with pairwise_gpt4.csv, or a clone of artidoro/qlora. FileNotFoundError if it is neither.
    """
    table = Path(root) / "pairwise_gpt4.csv"
    rows = pd.read_csv(table, dtype={"question_id": str}) if table.exists() else _released(root, "pairwise")
    frames = {}
    for benchmark, part in rows.groupby("benchmark"):
        frames[benchmark] = pd.DataFrame(
            {
                "judge": "gpt-4",
                "prompt": part.question_id,
                "first": part.model_a.map(system),
                "second": part.model_b.map(system),
                "verdict": part.verdict.where(part.verdict.isin((FIRST, SECOND, TIE))).astype("Int64"),
            }
        ).reset_index(drop=True)
    return frames


def qlora_relative(root: str | Path) -> pd.DataFrame:
    """GPT-4's scores out of ten released with QLoRA, each system against ChatGPT on the Vicuna prompts.

    Columns system, prompt, reference_first, score, reference (ChatGPT's score); <NA> where GPT-4 gave no scores.
    `root` as for `qlora_pairwise`.
    """
    table = Path(root) / "relative_gpt4.csv"
    rows = pd.read_csv(table, dtype={"question_id": str}) if table.exists() else _released(root, "relative")
    first, second = rows.model_a.map(system), rows.model_b.map(system)
    other = first.where(first != REFERENCE, second)
    reference_first = (first == REFERENCE) == other.isin(NAMED_AS_SHOWN)
    scores = rows[["score_a", "score_b"]].where((rows[["score_a", "score_b"]] >= 0).all(axis=1))
    return pd.DataFrame(
        {
            "system": other,
            "prompt": rows.question_id,
            "reference_first": reference_first,
            "score": scores.score_b.where(reference_first, scores.score_a),
            "reference": scores.score_a.where(reference_first, scores.score_b),
        }
    )


def system(name: str) -> str:
    """A released file's name for a system -> ours: `30b-flan` -> `flan-v2-33b`."""
    size, _, recipe = name.partition("-")
    if not size.removesuffix("b").isdigit():
        return SYSTEMS.get(name, name)
    return f"{RECIPES.get(recipe, recipe)}-{size.replace('30b', '33b')}"


def _released(root: str | Path, kind: str) -> pd.DataFrame:
    """The condensed table of a clone's rating files: question_id, model_a, model_b, benchmark, then verdict or scores.

    A file is A-vs-B-gpt-4-reviewer-threeclass.jsonl with one line {question_id, score, ...} a verdict.
    """
    folder = Path(root) / "eval" / "ratings-gpt4"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{root} holds neither {kind}_gpt4.csv nor eval/ratings-gpt4; give the folder of QLoRA's ratings "
            "or a clone of artidoro/qlora, as in `make elo ROOT=../qlora`"
        )
    places = {"pairwise": ("oa", "vicuna/pairwise"), "relative": ("vicuna/relative-gpt-3.5",)}[kind]
    rows = []
    for file in sorted(file for place in places for file in (folder / place).glob("*.jsonl")):
        names = file.stem.split("-gpt-4-reviewer")[0].split("-gpt4-reviewer")[0].split("-vs-")
        about = dict(zip(("model_a", "model_b"), map(_model, names), strict=True))
        for line in filter(None, file.read_text(encoding="utf-8").split("\n")):
            found = json.loads(line)
            scores = {"verdict": found["score"]}
            if kind == "relative":
                scores = dict(zip(("score_a", "score_b"), found["score"], strict=True))
            about["benchmark"] = file.relative_to(folder).parts[0]
            rows.append({"question_id": str(found["question_id"]), **about, **scores})
    return pd.DataFrame(rows)


def _model(name: str) -> str:
    for benchmark in ("vicuna", "oa"):
        name = name.split(f"-{benchmark}-generations")[0]
    return name.removeprefix("answer-")


def frame(lines: Iterable[dict]) -> pd.DataFrame:
    """The verdict frame of a tournament's lines (verdicts.jsonl); a verdict of null is missing."""
    return pd.DataFrame(list(lines), columns=COLUMNS).astype({"verdict": "Int64"})
