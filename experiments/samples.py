"""The same prompts answered at chosen ranks, side by side (the paper's appendix A.2), from a trained cell's adapter:

python -m experiments.samples table=table2 data=gsm8k method=qdylora
"""

from __future__ import annotations

from collections.abc import Sequence

from eval.dequantize import dequantized
from eval.lm import RankedLM
from experiments.cell import Cell, note
from experiments.checks import out_of_range
from experiments.cli import command, quiet
from experiments.mistakes import ConfigError
from experiments.schema import Config
from experiments.score import ranked, task


def samples(cell: Cell) -> str:
    """Greedy answers to the first test items of the cell's benchmark, as Markdown: a heading and a table an item."""
    c = cell.config
    for complaint in out_of_range("samples.ranks", c.samples.ranks, c):
        raise ConfigError(complaint)
    engine, tokenizer = ranked(cell, c.samples.ranks)
    lm = RankedLM(engine, tokenizer)
    lm.what = "answering"
    (asked,) = task(c, c.tasks.benchmarks[0], "test").ready()["tasks"].values()
    asked.build_all_requests()
    instances = asked.instances[: c.samples.items]
    with dequantized(engine.model, c.tasks.dequantize):
        answers = lm.at_all_ranks(instances[0].request_type, instances)
    sections = [
        section(number, asked.doc_to_text(one.doc), str(asked.doc_to_target(one.doc)), engine.ranks, found)
        for number, (one, found) in enumerate(zip(instances, answers, strict=True), start=1)
    ]
    few_shot = c.tasks.num_fewshot[c.tasks.benchmarks[0]]
    head = (
        f"# {c.tasks.benchmarks[0]} answered at {len(engine.ranks)} ranks\n\n"
        f"{cell.name}, scale {c.scale}, {c.budget.steps} steps; greedy, {few_shot}-shot.\n"
    )
    return "\n".join([head, *sections])


def section(number: int, prompt: str, target: str, ranks: Sequence[int], answers: Sequence[str]) -> str:
    """One prompt quoted, and a table with a column for every rank and the reference."""
    header = [*(f"rank {rank}" for rank in ranks), "reference"]
    cells = [_in_a_cell(text) for text in (*answers, target)]
    lines = [f"## {number}", "", *(f"> {line}" for line in prompt.splitlines()), ""]
    return "\n".join([*lines, _line(header), _line(["---"] * len(header)), _line(cells), ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _in_a_cell(text: str) -> str:
    """Text as it stands in a Markdown table: its lines kept, nothing in it taken for markup."""
    escaped = text.strip().replace("&", "&amp;").replace("<", "&lt;").replace("|", r"\|").replace("*", r"\*")
    return escaped.replace("\n", "<br>") or "(nothing)"


def main(config: Config) -> None:
    quiet()
    cell = Cell(config)
    text = samples(cell)
    file = cell.folder / "samples.md"
    file.write_text(text, encoding="utf-8")
    print(text)
    note(f"written to {file}")


if __name__ == "__main__":
    command(main)
