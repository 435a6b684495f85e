"""Which training rows are also questions of a benchmark."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from eval import benchmarks
from eval.releases import FILES, LETTERS, normalized, rows


def questions(benchmark_rows: Iterable[dict]) -> list[str]:
    """Return the question texts of hub-schema rows, of multiple choice also with the choices."""
    found = []
    for row in benchmark_rows:
        found.append(row["question"])
        if "choices" in row:
            lettered = (f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
            found.append("\n".join([row["question"], *lettered]))
    return found


def evaluation_questions(root: Path) -> dict[str, list[str]]:
    """Return {"gsm8k/test": questions, ...} of every evaluation split whose files are in a release folder.

    `validation` splits count: the rank is chosen on them.
    """
    found = {}
    for benchmark in FILES:
        for split in ("validation", "test"):
            try:
                found[f"{benchmark}/{split}"] = questions(rows(benchmark, split, root))
            except FileNotFoundError:
                continue  # a folder with some of the benchmarks is fine: the report names those compared with
    return found


def hub_questions(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the same of the benchmarks `names`, from the hub."""
    return {f"{name}/{s}": questions(benchmarks.rows(name, s, None)) for name in names for s in ("validation", "test")}


def count(training: Iterable[str], evaluation: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Return per evaluation set how many of the training questions equal one of its questions, normalized."""
    keys = [normalized(text) for text in training]
    found = {}
    for name, texts in evaluation.items():
        known = {normalized(text) for text in texts} - {""}  # nothing but punctuation equals nothing
        found[name] = sum(key in known for key in keys)
    return found
