"""Make the golden records and the table files expected of them: `PYTHONPATH=. python tests/golden/make.py`.

The records are only made where there are none, so that a change of the tables does not change them. Eleven
cells of invented outcomes, one model: Alpaca with both methods, OASST1 with three seeds, Self-Instruct whose
QLoRA ran out of memory, FLAN-v2 whose QDyLoRA failed and whose QLoRA was not run.
"""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np

from analysis.records import load
from analysis.stats import Bootstrap
from analysis.tables import table1, to_csv, to_latex, to_markdown

HERE = Path(__file__).parent
RANKS = (1, 2, 4, 8, 16, 32, 64)
SUBJECTS = ("capital_cities", "currencies", "elements")
HOW = Bootstrap(resamples=2000)
SKILL = {  # chance of a right answer at each rank
    "qlora": (0.25, 0.25, 0.25, 0.28, 0.30, 0.35, 0.50),
    "qdylora": (0.40, 0.48, 0.55, 0.55, 0.52, 0.50, 0.48),
}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def outcomes(rng: np.random.Generator, method: str, hard: np.ndarray) -> np.ndarray:
    """Right or wrong, (items, ranks); `hard` (items,) in 0..1 is the same in all cells: they correlate."""
    luck = rng.uniform(size=(len(hard), len(RANKS)))
    return ((0.6 * hard[:, None] + 0.4 * luck) < np.array(SKILL[method])).astype(float)


def split(folder: Path, rng: np.random.Generator, method: str, name: str, n: int) -> dict:
    hard = np.random.default_rng(n).uniform(size=n)
    right = outcomes(rng, method, hard)
    lines = [
        json.dumps(
            {
                "id": item,
                "hash": sha(f"{name} {item}")[:12],
                "group": SUBJECTS[min(item % 5, 2)],
                "values": {str(rank): value for rank, value in zip(RANKS, right[item].tolist(), strict=True)},
            }
        )
        for item in range(n)
    ]
    path = folder / "items" / f"mmlu-{name}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    means, errors = right.mean(axis=0), right.std(axis=0, ddof=1) / np.sqrt(n)
    return {
        "n": n,
        "sha256": sha(name),
        "ranks": scores(means, errors),
        "items": f"items/mmlu-{name}.jsonl.gz",
        "base": {"value": 0.25, "stderr": 0.079},
    }


def scores(values: np.ndarray, errors: np.ndarray) -> dict:
    pairs = zip(RANKS, values.tolist(), errors.tolist(), strict=True)
    return {str(rank): {"value": round(value, 6), "stderr": round(error, 6)} for rank, value, error in pairs}


def record(folder: Path, data: str, method: str, seed: int, status: str = "done", reason: str | None = None) -> None:
    name = f"smollm2-135m--{data}--{method}--seed{seed}"
    rng = np.random.default_rng(list(name.encode()))  # hash() would differ from run to run
    asked = {"steps": 40, "examples": 640, "tokens": None}
    made = {
        "schema": 1,
        "name": name,
        "cell": {"table": "table1", "model": "smollm2-135m", "data": data, "method": method, "seed": seed,
                 "scale": "mini"},
        "status": status,
        "reason": reason,
        "config": {"method": {"name": method}, "ranks": {"r_max": 64}},
        "data": {"name": data, "source": "generated", "sha256": sha(data), "rows": 1900},
        "budget": {"asked": asked, "spent": {**asked, "tokens": 60_000 + 100 * len(data), "seconds": 71.0}},
    }  # fmt: skip
    (folder / name).mkdir(parents=True)
    if status == "done":
        loss = np.array([2.0, 1.95, 1.9, 1.88, 1.86, 1.85, 1.87]) + rng.normal(0, 0.01, 7).round(3)
        made["heldout"] = {
            "n": 64,
            "untrained": {"value": 2.31, "stderr": 0.05},
            "ranks": scores(loss, np.full(7, 0.04)),
        }
        made["tasks"] = {
            "mmlu": {
                "version": 2,
                "num_fewshot": 5,
                "metric": "acc",
                "higher_is_better": True,
                "splits": {
                    "test": split(folder / name, rng, method, "test", 30),
                    "validation": split(folder / name, rng, method, "validation", 24),
                },
            }
        }
    (folder / name / "record.json").write_text(json.dumps(made, indent=1) + "\n")


def make_records(folder: Path) -> None:
    for method in ("qlora", "qdylora"):
        record(folder, "alpaca", method, 0)
        for seed in (0, 1, 2):
            record(folder, "oasst1", method, seed)
    record(folder, "self_instruct", "qdylora", 0)
    record(folder, "self_instruct", "qlora", 0, "oom", "CUDA out of memory at step 1")
    record(folder, "flan_v2", "qdylora", 0, "failed", "loss is not finite at step 7 (lr_scheduler_type=constant)")


if __name__ == "__main__":
    if not (HERE / "records").exists():
        make_records(HERE / "records")
    table = table1(load(HERE / "records"), how=HOW)
    for suffix, render in (("md", to_markdown), ("tex", to_latex), ("csv", to_csv)):
        (HERE / f"table1.{suffix}").write_text(render(table), encoding="utf-8")
