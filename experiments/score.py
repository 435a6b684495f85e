"""Score a trained cell at every rank:  python -m experiments.score data=gsm8k method=qdylora

Held-out loss and the table's benchmarks; a static adapter also in the other ways it can be cut to a lower rank
(`ranks.cuts`). What has been scored is kept when the process is killed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from eval.benchmarks import Settings, Task, load
from eval.dequantize import dequantized
from eval.engine import AllRanks
from eval.lm import RankedLM
from eval.score import answer, heldout_loss
from eval.score import score as score_task
from experiments.attempt import attempt
from experiments.cell import Cell
from experiments.cli import command, quiet, verdict
from experiments.examples import prepare, release_folder
from experiments.files import Damaged, flaws, read_json, write_json
from experiments.method import adapts_ranks
from experiments.mistakes import ConfigError, mistakes_in
from experiments.monitor import sequences
from experiments.schema import Config
from experiments.train import base_model, base_tokenizer
from qdylora import cut, load_adapter
from qdylora.cut import AS_TRAINED

SPLITS = ("validation", "test")


def score(cell: Cell) -> dict:
    """The results of a cell for its record: held-out loss and tasks at every evaluation rank, and under `cuts` the
    same for each other way of cutting a static adapter; and whether the base was dequantized for it."""
    engine, tokenizer = ranked(cell, cell.config.ranks.eval)
    held_out = sequences(prepare(cell.config, tokenizer).held_out)
    with dequantized(engine.model, cell.config.tasks.dequantize) as unpacked:
        results = {how: _results(Scoring(cell, engine, tokenizer, how), held_out) for how in cuts(cell.config)}
    return results.pop(AS_TRAINED) | ({"cuts": results} if results else {}) | {"dequantized": unpacked}


def ranked(cell: Cell, ranks: list[int]) -> tuple[AllRanks, PreTrainedTokenizerBase]:
    """The trained cell's model at `ranks`, and its tokenizer. ConfigError if it has no adapter."""
    adapter = trained_adapter(cell)
    return AllRanks(load_adapter(base_model(cell), adapter), ranks, cell.config.tasks.tokens_per_batch), base_tokenizer(
        cell
    )


def trained_adapter(cell: Cell) -> Path:
    """The folder of the cell's adapter, whole. ConfigError if there is none, Damaged if it is not as it was written."""
    if not cell.adapter.is_dir():
        raise ConfigError(f"{cell.name} has no trained adapter in {cell.adapter}; run experiments.train first")
    if broken := flaws(cell.adapter):
        raise Damaged(
            f"{cell.adapter / broken[0]} is missing or differs from its checksum; "
            f"delete {cell.folder}/training.json, and the adapter is trained again"
        )
    return cell.adapter


def cuts(config: Config) -> list[str]:
    """The ways to use the cell's adapter at a lower rank: one, unless it was trained at one rank and has several."""
    static = config.method.draw.kind == "fixed" and not adapts_ranks(config)
    return [AS_TRAINED, *(how for how in config.ranks.cuts if static and how != AS_TRAINED)]


@dataclass
class Scoring:
    """A cell's model with its adapter cut in the way `how`; results go to the parts and items of that way."""

    cell: Cell
    engine: AllRanks
    tokenizer: PreTrainedTokenizerBase
    how: str = AS_TRAINED

    def part(self, name: str, compute: Callable[[Path], dict]) -> dict:
        """A part of the results, computed at most once: from its file, or now."""
        file = self.part_file(name)
        found = read_json(file)
        if found is None:
            items_file = self.cell.folder / "items" / f"{self._full(name)}.jsonl.gz"
            with cut(self.engine.model, self.how):
                found = compute(items_file) | {"items": f"items/{items_file.name}"}
            write_json(file, found)
        return found

    def part_file(self, name: str) -> Path:
        return self.cell.folder / "parts" / f"{self._full(name)}.json"

    def _full(self, name: str) -> str:
        return name if self.how == AS_TRAINED else f"{self.how}-{name}"


def _results(scoring: Scoring, held_out: list) -> dict:
    return {
        "heldout": scoring.part("heldout", lambda file: _heldout(scoring, held_out, file)),
        "tasks": {name: _benchmark(scoring, name) for name in scoring.cell.config.tasks.benchmarks},
    }


def _heldout(scoring: Scoring, held_out: list, items_file: Path) -> dict:
    engine = scoring.engine
    result = heldout_loss(engine, held_out, items_file)
    if scoring.how == AS_TRAINED:
        with engine.model.disable_adapter():
            untrained = AllRanks(engine.model, [engine.gate.r_max], engine.budget)
            result["untrained"] = heldout_loss(untrained, held_out)["ranks"][str(engine.gate.r_max)]
    return result


def _benchmark(scoring: Scoring, name: str) -> dict:
    """Both splits of a benchmark, asked together."""
    tasks = {split: task(scoring.cell.config, name, split) for split in SPLITS}
    lm = RankedLM(scoring.engine, scoring.tokenizer)

    def compute(split: str) -> Callable[[Path], dict]:
        def now(items_file: Path) -> dict:
            answer(lm, [task for s, task in tasks.items() if not scoring.part_file(f"{name}-{s}").exists()])
            return score_task(lm, tasks[split], items_file)

        return now

    splits = {split: scoring.part(f"{name}-{split}", compute(split)) for split in SPLITS}
    asked = scoring.cell.config.tasks
    few_shot = {"num_fewshot": asked.num_fewshot[name], "fewshot": asked.fewshot}
    return tasks["test"].facts() | few_shot | {"splits": splits}


def task(c: Config, name: str, split: str) -> Task:
    """A split of a benchmark as the configuration asks it."""
    settings = Settings(
        num_fewshot=c.tasks.num_fewshot[name],
        root=release_folder(c),
        limit=getattr(c.tasks.limit_of.get(name, c.tasks.limit), split),
        fewshot=c.tasks.fewshot,
        references=c.tasks.webglm_references,
        keep_citations=c.tasks.webglm_citations,
    )
    with mistakes_in(f"benchmark {name}"):
        return load(name, split, settings)


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
