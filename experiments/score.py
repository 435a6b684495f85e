"""Score a trained cell at every rank:  python -m experiments.score data=gsm8k method=qdylora

Held-out loss and the table's benchmarks. What has been scored is kept when the process is killed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from eval.benchmarks import Settings, load
from eval.dequantize import dequantized
from eval.engine import AllRanks
from eval.lm import RankedLM
from eval.score import answer, heldout_loss
from eval.score import score as score_task
from experiments.attempt import attempt
from experiments.cell import Cell
from experiments.cli import command, quiet, verdict
from experiments.config import Config, ConfigError, mistakes_in
from experiments.examples import prepare, release_folder
from experiments.files import Damaged, flaws, read_json, write_json
from experiments.monitor import sequences
from experiments.train import base_model, tokenizer_of
from qdylora import load_adapter

SPLITS = ("validation", "test")


def score(cell: Cell) -> dict:
    """The results of a cell: held-out loss and tasks at every evaluation rank, for its record."""
    if not cell.adapter.is_dir():
        raise ConfigError(f"{cell.name} has no trained adapter in {cell.adapter}; run experiments.train first")
    if broken := flaws(cell.adapter):
        raise Damaged(
            f"{cell.adapter / broken[0]} is missing or differs from its checksum; "
            f"delete {cell.folder}/training.json, and the adapter is trained again"
        )
    c = cell.config
    tokenizer = tokenizer_of(cell)
    model = load_adapter(base_model(cell), cell.adapter)
    held_out = sequences(prepare(c, tokenizer).held_out)
    engine = AllRanks(model, c.ranks.eval, c.tasks.tokens_per_batch)
    with dequantized(model, c.tasks.dequantize):
        results = {
            "heldout": _part(cell, "heldout", lambda file: _heldout(engine, held_out, file)),
            "tasks": {name: _benchmark(cell, name, engine, tokenizer) for name in c.tasks.benchmarks},
        }
    return results


def _heldout(engine: AllRanks, held_out: list, items_file: Path) -> dict:
    result = heldout_loss(engine, held_out, items_file) | {"items": f"items/{items_file.name}"}
    with engine.model.disable_adapter():
        untrained = AllRanks(engine.model, [engine.gate.r_max], engine.budget)
        result["untrained"] = heldout_loss(untrained, held_out)["ranks"][str(engine.gate.r_max)]
    return result


def _benchmark(cell: Cell, name: str, engine: AllRanks, tokenizer) -> dict:
    """Both splits of a benchmark, asked together."""
    c = cell.config
    tasks = {}
    for split in SPLITS:
        settings = Settings(
            num_fewshot=c.tasks.num_fewshot[name],
            root=release_folder(c),
            limit=getattr(c.tasks.limit, split),
            references=c.tasks.webglm_references,
            keep_citations=c.tasks.webglm_citations,
        )
        with mistakes_in(f"benchmark {name}"):
            tasks[split] = load(name, split, settings)
    lm = RankedLM(engine, tokenizer)

    def compute(split: str) -> Callable[[Path], dict]:
        def now(items_file: Path) -> dict:
            answer(lm, [task for s, task in tasks.items() if not _part_file(cell, f"{name}-{s}").exists()])
            return score_task(lm, tasks[split], items_file) | {"items": f"items/{items_file.name}"}

        return now

    splits = {split: _part(cell, f"{name}-{split}", compute(split)) for split in SPLITS}
    return tasks["test"].facts() | {"num_fewshot": c.tasks.num_fewshot[name], "splits": splits}


def _part(cell: Cell, name: str, compute: Callable[[Path], dict]) -> dict:
    """A part of the results, computed at most once: from its file, or now."""
    file = _part_file(cell, name)
    found = read_json(file)
    if found is None:
        found = compute(cell.folder / "items" / f"{name}.jsonl.gz")
        write_json(file, found)
    return found


def _part_file(cell: Cell, name: str) -> Path:
    return cell.folder / "parts" / f"{name}.json"


def main(config: Config) -> int:
    quiet()
    cell = Cell(config)
    scored = attempt(cell, lambda: score(cell))
    if scored is None:
        return verdict(cell.ended())
    print(json.dumps(scored["heldout"]["ranks"]))
    return 0


if __name__ == "__main__":
    command(main)
